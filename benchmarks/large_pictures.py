"""Large pictures with small defects: ways to look at them, side by side, and what each takes.

    python benchmarks/large_pictures.py memory --size '[3000, 4000]' --tile 1024
    python benchmarks/large_pictures.py speed
    python benchmarks/large_pictures.py export --size '[3000, 4000]' --tile 1024
    python benchmarks/large_pictures.py accuracy --weights resnet18.safetensors
    python benchmarks/large_pictures.py accuracy --weights resnet18.safetensors --data /data/ball_screw

`accuracy` draws a procedural set (cast metal, 4000×3000, defects of 8 to 64 pixels) unless it is given real pictures in
the folders of MVTec AD, and trains and tests each way in a process of its own: CflowPlugin in tiles, resized and (if
asked for) whole, PaDiM resized, and PaDiM in anomalib's tiled ensemble. Results are written after each.
"""

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import openvino as ov
import safetensors.torch
import torch
from anomalib.data import Folder
from anomalib.models import Padim
from jsonargparse import auto_cli
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from rich.progress import track
from training import in_own_process

from cflow_plugin import CflowPlugin
from cflow_plugin.anomalib_patches.registration import publish

_MEGA = 1e6
_WEIGHTS = "CFLOW_BENCHMARK_WEIGHTS"
_SIDES = (8, 16, 32, 64)


def _model(size: tuple[int, int], tile: int, layers: list[str]) -> Any:
    from cflow_plugin.model.torch_model import CflowModel

    torch.manual_seed(0)
    model = CflowModel("resnet18", layers, image_size=size, tile_size=tile or None).eval()
    model.scoring.log_maximum.zero_()
    return model


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(size: tuple[int, int] = (3000, 4000), tile: int = 1024, threads: int = 2) -> dict[str, float]:
    """Peak memory of building a model and scoring one picture, in this process.

    Args:
        size: Height and width of the picture.
        tile: Tiles of at most so many pixels; 0 for none.
        threads: Threads that torch uses.
    """
    torch.set_num_threads(threads)
    before = _peak()
    model = _model(size, tile, ["layer2", "layer3"])
    built = _peak()
    with torch.inference_mode():
        model(torch.rand(1, 3, *size))
    found = {"imports_gib": before, "built_gib": built, "peak_gib": _peak()}
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))
    return found


def export(size: tuple[int, int] = (3000, 4000), tile: int = 1024, threads: int = 2) -> dict[str, float]:
    """A model in tiles as an OpenVINO file of one size: how it agrees with torch, and what it takes, in this process.

    Args:
        size: Height and width of the picture.
        tile: Tiles of at most so many pixels; 0 for none.
        threads: Threads that torch and OpenVINO use.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = CflowPlugin(
        layers=["layer2", "layer3"], pre_trained=False, image_size=size, tile_size=tile or None, visualizer=False
    ).eval()
    model.model.scoring.log_maximum.zero_()
    image = torch.rand(1, 3, *size)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        file = model.to_openvino(Path(folder), input_size=size)
        found = {"export_seconds": time.perf_counter() - start, "export_peak_gib": _peak()}
        found["file_mb"] = sum(one.stat().st_size for one in Path(folder).rglob("model.*")) / _MEGA
        start = time.perf_counter()
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = ov.compile_model(file, "CPU", settings)
        found["compile_seconds"] = time.perf_counter() - start
    results = compiled(image.numpy())
    found["picture_seconds"] = min(_timed(lambda: compiled(image.numpy())) for _ in range(3))
    found["peak_gib"] = _peak()
    with torch.inference_mode():
        expected = model.model(model.pre_processor(image))
    found["torch_seconds"] = _timed(lambda: model.model(model.pre_processor(image)))
    found["map_differs"] = float(np.abs(results["anomaly_map"] - expected.anomaly_map.numpy()).max())
    found["map_range"] = float(np.ptp(expected.anomaly_map.numpy()))
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))
    return found


def speed(
    heights: list[int] = [866, 1500, 2121, 3000],  # noqa: B006  shown in --help
    tile: int = 1024,
    runs: int = 5,
    threads: int = 2,
    output: Path = Path("results/benchmarks/large_pictures"),
) -> None:
    """Seconds per megapixel of pictures of 1 to 12 megapixels, and a picture's time beside the sum of its tiles'.

    Args:
        heights: Heights of pictures; they are 4:3.
        tile: Tiles of at most so many pixels.
        runs: Runs of each, of which the fastest counts.
        threads: Threads that torch uses.
        output: Folder for the results.
    """
    torch.set_num_threads(threads)
    rows = []
    with torch.inference_mode():
        for height in heights:
            size = height, height * 4 // 3
            model, images = _model(size, tile, ["layer2", "layer3"]), torch.rand(1, 3, *size)
            folded = model.folded(size)
            model(images)
            whole = min(_timed(lambda: model(images)) for _ in range(runs))  # noqa: B023
            alone = None
            if folded.tiles is not None:
                alone = sum(
                    min(
                        _timed(lambda: folded._of_tile(images[..., r.first : r.last, c.first : c.last], r, c))  # noqa: B023, SLF001
                        for _ in range(runs)
                    )
                    for r in folded.tiles.rows
                    for c in folded.tiles.columns
                )
            megapixels = size[0] * size[1] / _MEGA
            rows.append({"megapixels": megapixels, "seconds": whole, "seconds_per_megapixel": whole / megapixels})
            rows[-1]["times_its_tiles"] = None if alone is None else whole / alone
            print(json.dumps(rows[-1]))
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps({"tile": tile, "threads": threads, "rows": rows}, indent=2) + "\n")


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# The procedural set


def draw_set(folder: Path, size: tuple[int, int], train: int, good: int, defects: int, seed: int = 0) -> None:
    """Draw cast metal with screw holes, in the folders of MVTec AD; defects are dents and scratches of 8 to 64 pixels.

    Args:
        folder: Where; what is there is kept.
        size: Height and width.
        train: Training pictures.
        good: Good pictures to test on.
        defects: Pictures with one to three defects.
        seed: Seed of all of them.
    """
    plan = [("train/good", train, False), ("test/good", good, False), ("test/defect", defects, True)]
    for name, count, spoilt in plan:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "ground_truth/defect").mkdir(parents=True, exist_ok=True)
        for number in track(range(count), f"Drawing {name}"):
            file = folder / name / f"{number:03}.png"
            if file.exists():
                continue
            rng = np.random.default_rng([seed, len(name), number, int(spoilt)])
            picture, mask = _plate(rng, size), np.zeros(size, np.uint8)
            for _ in range(int(rng.integers(1, 4)) if spoilt else 0):
                _spoil(rng, picture, mask)
            if spoilt:
                cv2.imwrite(str(folder / f"ground_truth/defect/{number:03}.png"), mask)
            cv2.imwrite(str(file), picture.clip(0, 255).astype(np.uint8))


def _plate(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Cast metal, 0 to 255: grain of two sizes, uneven light, and holes at fixed places with a little play."""
    height, width = size
    grain = rng.standard_normal(size, np.float32)
    coarse = cv2.resize(rng.standard_normal((height // 8, width // 8), np.float32), (width, height))
    light = cv2.resize(rng.uniform(-8, 8, (3, 4)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    grey = 130 + 7 * cv2.GaussianBlur(grain, None, 1.2) * 2 + 5 * coarse + light
    for row in (0.2, 0.5, 0.8):
        for column in (0.15, 0.5, 0.85):
            centre = (int(width * column + rng.integers(-3, 4)), int(height * row + rng.integers(-3, 4)))
            cv2.circle(grey, centre, height // 30, 60, -1, cv2.LINE_AA)
            cv2.circle(grey, centre, height // 26, 165, height // 200, cv2.LINE_AA)
    return np.repeat(grey[..., None], 3, axis=2)


def _spoil(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray) -> None:
    side = int(rng.choice(_SIDES))
    top, left = (int(rng.integers(side, length - 2 * side)) for length in mask.shape)
    shape = np.zeros(mask.shape, np.uint8)
    if rng.random() < 0.5:
        cv2.ellipse(shape, (left + side // 2, top + side // 2), (side // 2, max(2, side // 3)), 0, 0, 360, 1, -1)
    else:
        points = rng.integers(0, side, (3, 2)) + np.array([left, top])
        cv2.polylines(shape, [points.astype(np.int32)], isClosed=False, color=1, thickness=max(2, side // 8))
    soft = cv2.GaussianBlur(shape.astype(np.float32), None, 0.8)[..., None]
    picture += soft * float(rng.choice([-60, 60]))
    mask[shape > 0] = 255


# The ways compared


class LocalPadim(Padim):
    """PaDiM with encoder weights from the file that the environment variable names, for anomalib's pipeline."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(pre_trained=False, **settings)
        weights = safetensors.torch.load_file(os.environ[_WEIGHTS])
        network = self.model.feature_extractor.feature_extractor
        missing = [
            name for name in network.load_state_dict(weights, strict=False).missing_keys if "num_batches" not in name
        ]
        assert not missing, missing


def run_way(way: str, folder: Path, weights: Path, size: tuple[int, int], runs: Path, settings: dict[str, Any]) -> dict:
    """Train and test one way, in this process, and measure at the pictures' own size.

    Args:
        way: ``tiles``, ``whole`` (the same without tiles), ``resized``, ``padim`` or ``ensemble``.
        folder: The pictures, in the folders of MVTec AD.
        weights: ResNet-18's weights in timm's names.
        size: Height and width of the pictures.
        runs: Folder for what training writes.
        settings: ``tile``, ``resized``, ``ensemble_size``, ``ensemble_tile``, and CflowPlugin's others under ``model``.

    Returns:
        Metrics, seconds of training and of a picture, measuring included, and peak memory in GiB.
    """
    from anomalib.engine import Engine

    os.environ[_WEIGHTS] = str(weights)
    seed_everything(0, verbose=False)
    suffixes = {file.suffix for file in (folder / "train/good").iterdir()} | {".png"}
    data_settings = {
        "name": folder.name, "root": str(folder), "normal_dir": "train/good", "normal_test_dir": "test/good",
        "abnormal_dir": [f"test/{one.name}" for one in sorted((folder / "test").iterdir()) if one.name != "good"],
        "mask_dir": [f"ground_truth/{one.name}" for one in sorted((folder / "ground_truth").iterdir())],
        "extensions": sorted(suffixes), "num_workers": 0, "train_batch_size": 1, "eval_batch_size": 1,
        "val_split_mode": "same_as_test" if way in ("padim", "ensemble") else "none",
    }  # fmt: skip
    start = time.perf_counter()
    found = Found()
    if way == "ensemble":
        trained = None
        for batch in _ensemble(data_settings, settings, runs):
            found.add(batch)
    else:
        common = {"layers": ["layer2", "layer3"], "weights": str(weights), "visualizer": False}
        if way == "padim":
            model: Any = LocalPadim(visualizer=False, pre_processor=Padim.configure_pre_processor(settings["resized"]))
        elif way in ("tiles", "whole"):
            tile = settings["tile"] if way == "tiles" else None
            model = CflowPlugin(image_size=size, tile_size=tile, **common, **settings["model"])
        else:
            model = CflowPlugin(image_size=settings["resized"], **common, **settings["model"])
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        engine = Engine(default_root_dir=runs, accelerator="cpu", callbacks=[found], **quiet)
        data = Folder(**data_settings)
        engine.fit(model, datamodule=data)
        trained = time.perf_counter() - start
        start = time.perf_counter()
        engine.predict(model, dataloaders=data.test_dataloader(), return_predictions=False)
    seconds = (time.perf_counter() - start) / max(1, found.batches)
    return {"way": way, **found.compute(), "train_seconds": trained, "picture_seconds": seconds, "peak_gib": _peak()}


class Found(Callback):
    """Metrics of predictions at the pictures' own sizes, whatever they were resized to; the pictures are not kept."""

    def __init__(self) -> None:
        from cflow_plugin.metrics import AUPRO, AUROC
        from cflow_plugin.metrics.found import SIZES, FalseRegions, RegionRecall

        of_maps, of_masks = {"fields": ["anomaly_map", "gt_mask"]}, {"fields": ["pred_mask", "gt_mask"]}
        self.batches = 0
        self._waiting: Any = None
        self._metrics = {
            "image_AUROC": AUROC(fields=["pred_score", "gt_label"]),
            "AUPRO": AUPRO(**of_maps),
            "AUPRO_0.05": AUPRO(**of_maps, fpr_limit=0.05),
            "region_recall": RegionRecall(**of_masks),
            **{f"recall_{low}_{high}": RegionRecall(**of_masks, sizes=(low, high)) for low, high in SIZES},
            "false_regions": FalseRegions(**of_masks),
        }

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Note the batch before; this one's masks come from the model's own callbacks, which are called after."""
        del trainer, pl_module
        self.on_predict_end()
        self._waiting = outputs

    def on_predict_end(self, *_: Any) -> None:
        """Note the last batch."""
        if self._waiting is not None:
            self.add(self._waiting)
        self._waiting = None

    def add(self, batch: Any) -> None:
        """Note a batch of predictions, with masks' paths."""
        self.batches += 1
        for index, path in enumerate(batch.image_path):
            label = "good" not in Path(path).parts
            own = (*Path(path).parts[:-3], "ground_truth", *Path(path).parts[-2:])
            size = cv2.imread(path).shape[:2]
            mask = np.zeros(size, bool)
            if label:
                mask = cv2.imread(str(Path(*own).with_suffix(".png")), cv2.IMREAD_GRAYSCALE) > 0
            maps, decided = (
                torch.nn.functional.interpolate(part[index].float().reshape(1, 1, *part.shape[-2:]), size, mode=mode)[
                    0, 0
                ]
                for part, mode in ((batch.anomaly_map, "bilinear"), (batch.pred_mask, "nearest"))
            )
            values = {
                "pred_score": batch.pred_score[index].reshape(1), "gt_label": torch.tensor([label]),
                "anomaly_map": maps[None], "pred_mask": decided[None] > 0, "gt_mask": torch.from_numpy(mask)[None],
            }  # fmt: skip
            for metric in self._metrics.values():
                metric.update(SimpleNamespace(**values))

    def compute(self) -> dict[str, float]:
        """All metrics."""
        return {name: float(metric.compute()) for name, metric in self._metrics.items()}


def _ensemble(data: dict[str, Any], settings: dict[str, Any], runs: Path) -> list[Any]:
    """Train anomalib's tiled ensemble, and return what it predicts of the test pictures, put together."""
    from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble

    publish("anomalib.models", LocalPadim)  # anomalib takes models of its own package alone
    tile = settings["ensemble_tile"]
    size = list(settings["ensemble_size"])
    arguments = {
        "seed": 0, "accelerator": "cpu", "default_root_dir": str(runs), "normalization_stage": "image",
        "thresholding_stage": "image", "tiling": {"tile_size": [tile, tile], "stride": tile, "image_size": size},
        "data": {"class_path": "anomalib.data.Folder", "init_args": {**data, "test_split_mode": "from_dir"}},
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": "LocalPadim"}},
    }  # fmt: skip
    training = TrainTiledEnsemble()
    found: Any = None
    for runner in training._setup_runners(arguments):  # noqa: SLF001  its run() takes a file, and keeps the results
        found = runner.run(arguments.get(runner.generator.job_class.name) or {}, found)
    found = None
    for runner in EvalTiledEnsemble(training.root_dir)._setup_runners(arguments):  # noqa: SLF001
        if runner.generator.job_class.name in ("Visualize", "Metrics"):
            break
        found = runner.run(arguments.get(runner.generator.job_class.name) or {}, found)
    return list(found)


def accuracy(
    weights: Path,
    data: Path | None = None,
    size: tuple[int, int] = (3000, 4000),
    train: int = 60,
    good: int = 20,
    defects: int = 30,
    tile: int = 1024,
    resized: tuple[int, int] = (256, 256),
    ensemble_size: tuple[int, int] = (1536, 2048),
    ensemble_tile: int = 512,
    ways: list[str] = ["tiles", "resized", "padim", "ensemble"],  # noqa: B006  shown in --help
    model: dict[str, Any] | None = None,
    output: Path = Path("results/benchmarks/large_pictures"),
) -> None:
    """Compare the ways, and write each one's figures as JSON and all as a table in Markdown.

    Args:
        weights: ResNet-18's weights in timm's names.
        data: Real pictures of one size in the folders of MVTec AD; a set is drawn without.
        size: Height and width of what is drawn.
        train: Training pictures drawn.
        good: Good pictures drawn to test on.
        defects: Pictures with defects drawn.
        tile: CflowPlugin's tiles.
        resized: What CflowPlugin and PaDiM resize to.
        ensemble_size: What the ensemble resizes to, a multiple of its tiles.
        ensemble_tile: Its tiles, each with a model of its own.
        ways: Which ways.
        model: More settings of CflowPlugin.
        output: Folder for the results.
    """
    folder = (data or output / f"plates_{size[1]}x{size[0]}").resolve()
    if data is None:
        draw_set(folder, size, train, good, defects)
    first = sorted((folder / "train/good").iterdir())[0]
    size = cv2.imread(str(first)).shape[:2]
    output.mkdir(parents=True, exist_ok=True)
    settings = {"tile": tile, "resized": tuple(resized), "ensemble_size": ensemble_size, "ensemble_tile": ensemble_tile}
    settings["model"] = {"target_false_alarm_rate": 0.05, **(model or {})}
    rows = []
    for way in ways:
        print(f"{way} …", flush=True)
        row = in_own_process(run_way, way, folder, weights.resolve(), size, output / "runs" / way, settings)
        rows.append(row)
        (output / f"{folder.name}.json").write_text(json.dumps({"size": size, "rows": rows}, indent=2) + "\n")
        names = list(row)
        lines = [names, ["---"] * len(names)]
        lines += [
            [f"{value:.3f}" if isinstance(value, float) else str(value) for value in one.values()] for one in rows
        ]
        (output / f"{folder.name}.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    print((output / f"{folder.name}.md").read_text())


if __name__ == "__main__":
    auto_cli([accuracy, export, memory, speed], as_positional=False)
