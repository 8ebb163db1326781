"""What each choice behind the default recipe is worth on real images: one thing changed at a time.

    python benchmarks/choices.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]

DATA holds one folder a category in MVTec AD's layout. Each run has a process of its own; metrics are those of the last
epoch. Likelihoods are of the training vectors of the last epoch, noise included, so they compare only at equal noise.
"""

import statistics
from pathlib import Path

from jsonargparse import auto_cli
from rich import box
from rich.progress import track
from rich.table import Table
from training import METRICS, in_own_process, measure, publish

PAPER_SCORING = {"sigma": 0.0, "top_fraction": 0.0, "position_correction": 0.0}
CHOICES = {
    "default": {},
    "random permutations": {"permutation": "random"},
    "no whitening": {"whiten": False},
    "no noise": {"noise": 0.0},
    "half the noise": {"noise": 0.3},
    "no neighbourhood": {"neighbourhood": 1},
    "no position correction": {"position_correction": 0.0},
    "no smoothing": {"sigma": 0.0},
    "maximum as image score": {"top_fraction": 0.0},
    "the paper's scoring": PAPER_SCORING,
    "half the steps": {"steps_per_epoch": 15},
    "twice the steps": {"steps_per_epoch": 60},
    "vectors per step × 4, steps / 4": {"vectors_per_step": 2048, "steps_per_epoch": 8},
    "UFLOW": {"condition_dims": 0},
    "4 coupling blocks": {"coupling_blocks": 4},
    "bfloat16 mixed precision": {"precision": "bf16-mixed"},
    "untrained ResNet-18": {"weights": None, "pre_trained": False},
    "Gabor filter bank": {"backbone": "gabor", "layers": None, "weights": None},
}


def main(
    data: Path,
    weights: Path,
    categories: list[str],
    choices: list[str] = list(CHOICES),  # noqa: B006
    seeds: list[int] = [0, 1],  # noqa: B006  jsonargparse shows it in --help
    output: Path = Path("results/benchmarks/choices"),
) -> None:
    """Train the default recipe and its variations, and write the figures as JSON and Markdown.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        weights: ResNet-18 weights in timm's names, .safetensors, at least up to layer3.
        categories: Which categories.
        choices: Which of the variations.
        seeds: Every figure is the mean over these.
        output: Folder for the results.
    """
    data, weights, output = data.resolve(), weights.resolve(), output.resolve()
    rows = []
    runs = [(category, title) for category in categories for title in choices]
    for category, title in track(runs, description="Training"):
        found = [
            in_own_process(measure, "CflowPlugin", CHOICES[title], None, data, category, weights, seed, output / "runs")
            for seed in seeds
        ]
        means = {key: statistics.fmean(run[key] for run in found) for key in found[0]}
        rows.append({"category": category, "choice": title, **means})
    table = Table("category", "choice", "seconds", *METRICS, "nats/dim fine", "coarse", box=box.MARKDOWN)
    for row in rows:
        figures = [f"{row[metric]:.4f}" for metric in METRICS]
        nats = [f"{-value:.3f}" for key, value in row.items() if key.startswith("train_nll_")][:2]
        table.add_row(row["category"], row["choice"], f"{row['seconds']:.1f}", *figures, *nats)
    publish("choices", table, {"seeds": seeds, "rows": rows}, output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
