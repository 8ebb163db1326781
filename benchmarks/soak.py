"""Memory over many images through the exported model: does it stay flat?

    python benchmarks/soak.py --model model.xml --images FOLDER

Images are read from files of all kinds, one after another as `cflow-plugin watch` does it and in batches as
`cflow-plugin score` does, each in a process of its own; the resident memory is noted on the way.
"""

import itertools
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from rich import box
from rich.progress import track
from rich.table import Table
from training import in_own_process, publish

from cflow_plugin.commands.score.listing import list_images
from cflow_plugin.commands.score.scorer import Scorer, Settings
from cflow_plugin.commands.watch.sources import open_source
from cflow_plugin.deploy.runtime import compile_exported

NOTES = 100


def resident_mib() -> float:
    """Resident memory of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def one_by_one(model: Path, folder: Path, count: int) -> dict:
    """As ``watch`` does it."""
    compiled = compile_exported(model, "CPU", "f32")
    notes, scores = [], []
    endless = itertools.chain.from_iterable(open_source(str(folder), 25.0).frames for _ in itertools.count())
    for number, frame in enumerate(track(itertools.islice(endless, count), total=count, description="watch")):
        scores.append(float(compiled([frame.image[None]])["pred_score"][0]))
        if number % (count // NOTES) == 0:
            notes.append(resident_mib())
    return {"notes": notes, "finite": bool(np.isfinite(scores).all()), "scores": len(scores)}


def in_batches(model: Path, folder: Path, count: int) -> dict:
    """As ``score`` does it, with maps."""
    scorer = Scorer(Settings(model, folder, True, "CPU", "f32", 2))
    paths = list(itertools.islice(itertools.cycle(list_images(str(folder))), count))
    notes, scores = [], []
    size = count // NOTES
    for start in track(range(0, count, size), description="score"):
        scores += [row.score for row in scorer(paths[start : start + size])]
        notes.append(resident_mib())
    scorer.close()
    return {"notes": notes, "finite": bool(np.isfinite(scores).all()), "scores": len(scores)}


def main(model: Path, images: Path, count: int = 10_000, output: Path = Path("results/benchmarks/soak")) -> None:
    """Run many images through an exported model, and write its memory as JSON and Markdown.

    Args:
        model: The .xml file that ``anomalib export`` wrote.
        images: Folder of images, read again and again.
        count: How many images, in each of the two ways.
        output: Folder for the results.
    """
    table = Table(
        "way", "images", "MiB at 10 %", "at 50 %", "at 100 %", "most", "MiB per 1,000 images", box=box.MARKDOWN
    )
    rows = []
    for name, function in (("watch", one_by_one), ("score", in_batches)):
        found = in_own_process(function, model.resolve(), images.resolve(), count)
        notes = np.array(found["notes"])
        steady = notes[len(notes) // 10 :]
        slope = np.polyfit(np.linspace(0.1, 1, len(steady)) * count / 1000, steady, 1)[0]
        at = [f"{notes[min(len(notes) - 1, int(share * len(notes)))]:.0f}" for share in (0.1, 0.5, 1)]
        table.add_row(name, str(found["scores"]), *at, f"{notes.max():.0f}", f"{slope:+.2f}")
        rows.append({"way": name, "slope": slope, **found})
        if not found["finite"]:
            print(f"{name}: a score was not a finite number.")
    publish("soak", table, {"count": count, "rows": rows}, output.resolve())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
