"""How much memory one large image takes where it goes: training, held-out calibration, predict and score (Linux).

    python benchmarks/large_images.py

Each is done with small images first, so that nothing but the images' size is new. Counted is how far the process's
resident memory then rises at its highest.
"""

import ctypes
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from anomalib.data import Folder
from anomalib.engine import Engine
from jsonargparse import auto_cli
from PIL import Image
from psutil import Process
from rich import box
from rich.table import Table
from training import publish

from cflow_plugin import CflowPlugin
from cflow_plugin.commands.machine import peak_resident_bytes
from cflow_plugin.commands.score import score

SMALL = (256, 256)
RATE = 0.3  # needs three held-out images


def main(
    height: int = 3648,
    width: int = 5472,
    bits: int = 8,
    output: Path = Path("results/benchmarks/large_images"),
) -> None:
    """Measure memory, and write the figures as JSON and Markdown.

    Args:
        height: Height of the large images, in pixels.
        width: Their width.
        bits: 8, in colour, or 16, grey.
        output: Folder for the results.
    """
    output = output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = write_images(root / "small", SMALL, 8, bits)
        large = write_images(root / "large", (height, width), 3, bits)
        model = fit(root, small, small)
        file = model.eval().to_openvino(root / "file")
        engine = Engine(default_root_dir=root / "predict", logger=False, accelerator="cpu")
        kinds: dict[str, Callable[[Path], object]] = {
            "training": lambda images: fit(root, images, small),
            "held out": lambda images: fit(root, small, images),
            "predict": lambda images: engine.predict(model, data_path=images, return_predictions=False),
            "score": lambda images: score(file, str(images), root / f"scores {images.name}", threads=1),
        }
        rows = [{"where": name, "bytes": rise(run, small, large)} for name, run in kinds.items()]
    table = Table("where", "MiB", box=box.MARKDOWN)
    for row in rows:
        table.add_row(row["where"], f"{row['bytes'] / 2**20:.0f}")
    publish("large_images", table, {"size": [height, width], "bits": bits, "rows": rows}, output)


def write_images(folder: Path, size: tuple[int, int], count: int, bits: int) -> Path:
    """Smooth images, which compress well."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        shape = (8, 8, 3) if bits == 8 else (8, 8)
        coarse = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).resize(size[::-1])
        pixels = np.asarray(coarse)
        Image.fromarray(pixels if bits == 8 else pixels.astype(np.uint16) * 257).save(folder / f"{number}.png")
    return folder


def fit(root: Path, images: Path, held_out: Path) -> CflowPlugin:
    """Train for a moment."""
    data = Folder("x", images, root=root, test_split_mode="none", val_split_mode="none", num_workers=0)
    model = CflowPlugin(
        backbone="gabor", layers=["scale2"], image_size=SMALL, coupling_blocks=1, epochs=1, steps_per_epoch=2,
        unseen_share=0, visualizer=False, target_false_alarm_rate=RATE,
        held_out_images=str(held_out),
    )  # fmt: skip
    Engine(default_root_dir=root / "run", logger=False, accelerator="cpu").fit(model, datamodule=data)
    return model


def rise(run: Callable[[Path], object], small: Path, large: Path) -> int:
    """Bytes by which the highest memory with large images exceeds what small ones have left."""
    run(small)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the C library would keep what is free
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far
    before = Process().memory_info().rss
    run(large)
    return peak_resident_bytes() - before


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
