"""Images a second that `cflow-plugin score` manages with one worker and with more, on Ray and without.

    python benchmarks/scaling.py --model model.xml --images FOLDER

The images below the folder are linked again and again until there are enough of them. Every run is the command's own
function in a process of its own, with one thread a worker; the runs alternate. A whole run includes starting Ray and
compiling the model, which a large collection pays once; the rate between the first part that is written and the last
does not.
"""

import statistics
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli
from rich import box
from rich.progress import track
from rich.table import Table
from training import in_own_process, publish

from cflow_plugin.commands.score.listing import list_images


def measure(model: Path, source: Path, engine: str, workers: int, batch: int) -> dict:
    """Score all images once.

    Args:
        model: The exported model.
        source: Folder of images.
        engine: ``local`` or ``ray``.
        workers: Threads of the local engine, or Ray's workers of one thread each.
        batch: Images in a part.

    Returns:
        Seconds of the whole run, and images a second after the first part was written.
    """
    from cflow_plugin.commands.score import score

    with tempfile.TemporaryDirectory() as folder:
        settings = {"threads": workers} if engine == "local" else {"threads": 1, "workers": workers}
        start = time.time()
        score(model, str(source), Path(folder) / "scores", engine=engine, batch=batch, **settings)
        seconds = time.time() - start
        written = sorted(file.stat().st_mtime for file in (Path(folder) / "scores").glob("*.parquet"))
    return {"seconds": seconds, "steady": batch * (len(written) - 1) / (written[-1] - written[0])}


def main(
    model: Path,
    images: Path,
    count: int = 4096,
    workers: list[int] = [1, 2],  # noqa: B006  shown in --help
    batch: int = 32,
    runs: int = 3,
    output: Path = Path("results/benchmarks/scaling"),
) -> None:
    """Score the same images with different numbers of workers, and write the figures as JSON and Markdown.

    Args:
        model: The .xml file that ``anomalib export`` wrote.
        images: Folder of images.
        count: How many images to score.
        workers: Numbers of workers.
        batch: Images in a part; there must be many parts a worker.
        runs: Runs of each, of which the median is shown.
        output: Folder for the results.
    """
    model, output = model.resolve(), output.resolve()
    found = [Path(path) for path in list_images(str(images))]
    kinds = [(engine, number) for number in workers for engine in ("local", "ray")]
    measured: dict[tuple[str, int], list[dict]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            file = found[number % len(found)]
            (Path(folder) / f"{number:06d}{file.suffix}").symlink_to(file)
        for kind in track([kind for _ in range(runs) for kind in kinds], description="Scoring"):
            measured[kind].append(in_own_process(measure, model, Path(folder), *kind, batch))
    table = Table("engine", "workers", "seconds", "images/s, whole run", "images/s, steady", box=box.MARKDOWN)
    rows = []
    for (engine, number), results in measured.items():
        seconds = statistics.median(result["seconds"] for result in results)
        steady = statistics.median(result["steady"] for result in results)
        rows.append({"engine": engine, "workers": number, "seconds": seconds, "steady": steady, "runs": results})
        table.add_row(engine, str(number), f"{seconds:.1f}", f"{count / seconds:.1f}", f"{steady:.1f}")
    publish("scaling", table, {"count": count, "batch": batch, "rows": rows}, output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
