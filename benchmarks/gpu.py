"""What a GPU brings: training and inference time, memory, and whether decisions stay those of the CPU.

    python benchmarks/gpu.py

Training by the default recipe and by the paper's, in single and mixed precision; inference of CflowPlugin, its encoder
alone, and anomalib's Cflow and Padim, batch 1 and 32, in single precision, with factors rounded to TF32, in bf16,
replayed as a CUDA graph, and compiled, in alternating rounds; ONNX Runtime's GPU providers where they are installed;
whether a run repeats itself; and the difference of scores between the GPU that trained a model and the CPU. At most
``--minutes``: what takes longest is prepared last, and left out where they are over. Without a GPU the same runs on the
CPU with everything small (``--rehearse``), which says nothing of speed.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import seed_everything
from rich import box
from rich.table import Table
from torch import nn
from training import EpochClock, publish

from cflow_plugin import CflowPlugin
from cflow_plugin.commands.benchmark.candidates import build_model
from cflow_plugin.commands.configs import find_config
from cflow_plugin.data import Textures
from cflow_plugin.deploy.graph import InferenceGraph
from cflow_plugin.errors import CflowError
from cflow_plugin.modules import in_full_single_precision

MODELS = ("CflowPlugin", "encoder", "Cflow", "Padim")
MODES = ("f32", "TF32", "bf16", "CUDA graph", "CUDA graph bf16", "compiled", "compiled bf16")


def settings_of(recipe: str, rehearse: bool) -> dict[str, Any]:
    """A recipe's settings.

    Args:
        recipe: ``default`` or ``paper``.
        rehearse: Everything small.
    """
    given = yaml.safe_load(find_config("paper").read_text())["model"]["init_args"] if recipe == "paper" else {}
    given = {name: value for name, value in given.items() if name != "epochs"}
    small = {"backbone": "test_resnet", "layers": [0, 1], "coupling_blocks": 1, "image_size": (64, 64)}
    return {**given, **(small if rehearse else {}), "pre_trained": False, "visualizer": False}


def train(
    recipe: str, precision: str, epochs: int | None, data: AnomalibDataModule, rehearse: bool, device: str
) -> tuple[dict[str, Any], CflowPlugin]:
    """Train once.

    Args:
        recipe: ``default`` or ``paper``.
        precision: Lightning's name of the precision.
        epochs: Length; the recipe's own by default.
        data: What to train on.
        rehearse: Everything small.
        device: ``cuda`` or ``cpu``.

    Returns:
        Figures, and the model.
    """
    seed_everything(0, verbose=False)
    model, clock = CflowPlugin(**settings_of(recipe, rehearse)), EpochClock()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    length = {} if epochs is None else {"max_epochs": epochs}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, accelerator="gpu" if device == "cuda" else "cpu", devices=1,
            precision=precision, callbacks=[clock], **quiet, **length,
        )  # fmt: skip
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
    row = {"recipe": recipe, "precision": precision, "epochs": engine.trainer.current_epoch, "seconds": seconds}
    row["epoch seconds"] = statistics.median(clock.spent) if clock.spent else None
    row["GPU MiB"] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return row, model


@contextmanager
def _in_tf32() -> Iterator[None]:
    """What others compute in: torch's default for convolutions, and what Lightning advises for other products."""
    with in_full_single_precision():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        yield


def runner(model: nn.Module, images: torch.Tensor, mode: str) -> Callable[[], object]:
    """What runs a batch once, and waits for the result.

    Args:
        model: The model, in eval mode.
        images: The batch, where the model is.
        mode: One of ``MODES``.
    """
    cuda, lower = images.is_cuda, mode.endswith("bf16")
    network = torch.compile(model) if mode.startswith("compiled") else model

    def once() -> object:
        precision = _in_tf32() if mode == "TF32" else in_full_single_precision()
        with torch.inference_mode(), precision, torch.autocast(images.device.type, torch.bfloat16, enabled=lower):
            return network(images)

    def wait(run: Callable[[], object]) -> Callable[[], object]:
        def waiting() -> None:
            run()
            if cuda:
                torch.cuda.synchronize()

        return waiting

    if not mode.startswith("CUDA graph"):
        return wait(once)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return wait(graph.replay)


def inference(
    models: Sequence[str],
    backbone: str,
    size: int,
    batches: list[int],
    device: str,
    rounds: int,
    seconds: float,
    end: float,
) -> list[dict]:
    """Latencies of all models and modes.

    Args:
        models: Which models.
        backbone: timm's name of the encoder.
        size: Height and width of the images.
        batches: Images at once.
        device: ``cuda`` or ``cpu``.
        rounds: How often each has its turn.
        seconds: Length of a turn.
        end: When the last turn is to be over, by ``time.monotonic``.
    """
    wanted = [(batch, name, mode) for batch in batches for name in models for mode in MODES]
    wanted.sort(key=lambda one: one[2].startswith("compiled"))  # minutes each
    rows: list[dict] = []
    prepared: list[tuple[dict, Callable[[], object], list[float]]] = []
    for batch, name, mode in wanted:
        row: dict = {"model": name, "mode": mode, "batch": batch}
        rows.append(row)
        try:
            if device == "cpu" and mode not in ("f32", "bf16"):
                raise CflowError("there is no GPU")
            if time.monotonic() > end - rounds * seconds * (len(prepared) + 1):
                raise CflowError("the minutes are over")
            images = torch.rand(batch, 3, size, size, device=device)
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            model = build_model(name, backbone, size)
            if isinstance(model, CflowPlugin) and mode not in ("f32", "bf16"):
                model = InferenceGraph(model, (size, size))  # the same without checks, as in an exported file
            model = model.to(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run = runner(model, images, mode)
            for _ in range(3):
                run()
            row["warm-up s"] = time.perf_counter() - start
            row["GPU MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else None
            prepared.append((row, run, []))
        except Exception as error:
            row["not measured"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    for _ in range(rounds):
        for _, run, times in prepared:
            turn = time.perf_counter() + seconds
            while time.perf_counter() < turn or len(times) < 3:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
    for row, _, times in prepared:
        p50 = statistics.median(times)
        row["p50 ms"], row["images/s"] = 1000 * p50, row["batch"] / p50
    return rows


def onnxruntime_rows(model: CflowPlugin, size: int, batches: list[int], seconds: float) -> list[dict]:
    """Latencies of the exported file by each GPU provider that ONNX Runtime has here.

    Args:
        model: A trained model.
        size: Height and width of the images.
        batches: Images at once.
        seconds: Length of a turn.
    """
    try:
        import onnxruntime
    except ImportError:
        return [{"model": "CflowPlugin", "mode": "ONNX Runtime", "not measured": "it is not installed"}]
    wanted = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
    providers = [name for name in onnxruntime.get_available_providers() if name in wanted]
    if not providers:
        return [{"model": "CflowPlugin", "mode": "ONNX Runtime", "not measured": "it has no GPU provider"}]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = model.to_onnx(folder, input_size=(size, size), batch=None)
        for provider in providers:
            session = onnxruntime.InferenceSession(path, providers=[provider, "CPUExecutionProvider"])
            for batch in batches:
                feed = {session.get_inputs()[0].name: np.random.rand(batch, 3, size, size).astype(np.float32)}
                times: list[float] = []
                end = time.perf_counter() + seconds
                while time.perf_counter() < end or len(times) < 6:
                    start = time.perf_counter()
                    session.run(None, feed)
                    times.append(time.perf_counter() - start)
                p50 = statistics.median(times[3:])
                rows.append({"model": "CflowPlugin", "mode": provider, "batch": batch})
                rows[-1] |= {"p50 ms": 1000 * p50, "images/s": batch / p50}
    return rows


@torch.no_grad()
def scores(model: CflowPlugin, data: AnomalibDataModule, device: str) -> torch.Tensor:
    """Scores of the test images.

    Args:
        model: A trained model; it is moved.
        data: The data.
        device: Where to compute.
    """
    model.eval().to(device)
    found = [model.scored(model.prepared(batch.image.to(device))).pred_score for batch in data.test_dataloader()]
    return torch.cat([part.cpu() for part in found])


def main(
    backbone: str = "resnet18",
    size: int = 256,
    batches: list[int] = [1, 32],  # noqa: B006
    images: int = 64,
    paper_epochs: int = 5,
    rounds: int = 3,
    seconds: float = 0.5,
    minutes: float = 8,
    rehearse: bool = not torch.cuda.is_available(),
    output: Path = Path("results/benchmarks/gpu"),
) -> None:
    """Measure, and write all figures as JSON and Markdown.

    Args:
        backbone: timm's name of the encoder; its weights are random, which speed does not depend on.
        size: Height and width of the images.
        batches: Images at once in inference.
        images: Training images, of the procedural textures.
        paper_epochs: Epochs of the paper's recipe that are run; it takes 100.
        rounds: How often each model and mode has its turn in inference.
        seconds: Length of a turn.
        minutes: When inference is to be over, from the start; what is not prepared by then is left out.
        rehearse: Run everything small; the default without a GPU.
        output: Folder for the results.
    """
    end = time.monotonic() + 60 * minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if rehearse:
        size, batches, images, paper_epochs, rounds, seconds = 64, batches[:1], 12, 2, 1, 0.01
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU: a rehearsal, whose times mean nothing"
    with tempfile.TemporaryDirectory() as folder:
        small = {"resolution": 64, "test_good": 4, "test_defect": 2, "val_good": 4, "val_defect": 2} if rehearse else {}
        data = Textures(root=folder, train_good=images, **small)
        lower = "bf16-mixed"
        plan = [("default", "32", None), ("default", lower, None), ("paper", "32", paper_epochs)]
        plan += [("paper", lower, paper_epochs)]
        trained = [train(*one, data, rehearse, device) for one in plan]
        again = train("default", "32", None, data, rehearse, device)[1]
        first = trained[0][1]
        pairs = zip(first.cpu().state_dict().values(), again.cpu().state_dict().values(), strict=True)
        repeats = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
        difference = (scores(first, data, device) - scores(first, data, "cpu")).abs().max().item()
        models, encoder = (MODELS[:1], "test_resnet") if rehearse else (MODELS, backbone)
        timed = inference(models, encoder, size, batches, device, rounds, seconds, end)
        timed += onnxruntime_rows(first, size, batches, seconds)
    facts = {"card": card, "a run repeats itself bit by bit": repeats, "largest difference of scores": difference}
    table = Table(box=box.MARKDOWN, title=f"{card}; a run repeats itself: {repeats}; GPU and CPU: {difference:.1e}")
    for column in ("what", "batch", "seconds", "p50 ms", "images/s", "GPU MiB", "remark"):
        table.add_column(column)
    for row in [row for row, _ in trained] + timed:
        training = "recipe" in row
        what = f"{row['recipe']} recipe, {row['precision']}" if training else f"{row['model']}, {row['mode']}"
        remark = f"{row['epochs']} epochs" if training else row.get("not measured", "")
        numbers = [row.get(key) for key in ("seconds", "p50 ms", "images/s", "GPU MiB")]
        shown = ["" if number is None else f"{number:.4g}" for number in numbers]
        table.add_row(what, str(row.get("batch", "")), *shown, remark)
    publish("gpu", table, {**facts, "training": [row for row, _ in trained], "inference": timed}, output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
