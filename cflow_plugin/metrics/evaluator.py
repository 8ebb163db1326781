"""The metrics of section 5.2, as far as a data set allows them, and the file they go to."""

__all__ = ["CflowEvaluator", "write_metrics"]

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import AnomalibMetric, Evaluator, F1Score
from lightning import LightningModule, Trainer
from torchmetrics import Metric
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from cflow_plugin.files import atomic_file
from cflow_plugin.metrics import AUPRO, AUROC
from cflow_plugin.metrics.found import SIZES, FalseRegions, RegionRecall

_TIGHT = 0.05

logger = logging.getLogger(__name__)


class CflowEvaluator(Evaluator):
    """Image AUROC and F1, pixel AUROC, AUPRO and F1, regions found; what cannot be computed is left out with a note.

    AUPRO is up to the false-positive rate 0.3, as published for MVTec AD, and up to 0.05, as for MVTec AD 2: in a large
    image 0.3 is many times what a small defect covers. Of the regions there are the share of true ones that is found,
    of all and by their size, and the false ones an image.

    Areas below curves are of the model's own scores: normalisation may make different scores equal.

    Without masks there are no pixel metrics. A curve of true against false positives needs anomalous and normal
    examples, so without defects (or without good images) there is no AUROC.

    Args:
        inside_only: Leave pixels outside of the model's region of interest out of the metrics of pixels.
    """

    def __init__(self, inside_only: bool = False) -> None:
        tight = AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False, fpr_limit=_TIGHT)
        tight.name = f"{tight.name}_{_TIGHT}"
        masks: dict[str, Any] = {"fields": ["pred_mask", "gt_mask"], "strict": False}
        super().__init__(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_", strict=False),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_", strict=False),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                F1Score(prefix="pixel_", **masks),
                tight,
                RegionRecall(**masks),
                *(RegionRecall(**masks, sizes=sizes) for sizes in SIZES),
                FalseRegions(**masks),
            ]
        )
        self._seen: dict[str, set[bool]] = {"gt_label": set(), "gt_mask": set()}
        self._own: InferenceBatch | None = None
        self._inside_only = inside_only

    def take_scores(self, scores: InferenceBatch) -> None:
        """Take the scores and maps of the next batch, as the model gives them.

        Args:
            scores: The model's output, before post-processing.
        """
        self._own = scores

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what earlier tests saw."""
        del trainer, pl_module
        for values in self._seen.values():
            values.clear()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Update the metrics and note which classes there are."""
        for field, values in self._seen.items():
            truth = getattr(batch, field, None)
            if truth is not None:
                values.update({bool(truth.min()), bool(truth.max())})
        if self._inside_only and batch.gt_mask is not None:
            batch = self._inside(batch, cast("Any", pl_module.model).scoring.interest)
        own, self._own = self._own, None
        if own is not None:
            batch = batch.update(in_place=False, pred_score=own.pred_score, anomaly_map=own.anomaly_map)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)

    def _inside(self, batch: Batch, interest: torch.Tensor) -> Batch:
        masks = cast("torch.Tensor", batch.gt_mask)
        inside = resize(interest[None], list(masks.shape[-2:]), InterpolationMode.NEAREST_EXACT)[0]
        for metric in self.test_metrics:
            if isinstance(metric, AUROC | AUPRO) and metric.fields[1] == "gt_mask":
                metric.inside = inside.cpu().numpy()
        return batch.update(in_place=False, gt_mask=masks & inside)  # nothing outside is found, so F1 needs no more

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log the metrics that can be computed."""
        del args, kwargs
        facts = [[value in values for value in (False, True)] for values in self._seen.values()]
        metrics = [m for m in self.test_metrics if isinstance(m, AnomalibMetric) and isinstance(m, Metric)]
        facts += [[metric.update_called, getattr(metric, "has_examples", True)] for metric in metrics]
        # What one process has met another may not have, but all have to log the same.
        known = trainer.strategy.reduce(torch.tensor(facts, device=pl_module.device).int(), reduce_op="max").tolist()
        classes = dict(zip(self._seen, known, strict=False))
        left_out: dict[str, list[str]] = {}
        for metric, (updated, has_examples) in zip(metrics, known[len(classes) :], strict=True):
            truth = metric.fields[1]
            has_normal, has_anomaly = classes[truth]
            what = "mask" if truth == "gt_mask" else "label"
            if not (has_normal or has_anomaly):
                reason = f"the test set has no {what}s"
            elif not updated:
                reason = "the model has no threshold"
            elif not has_anomaly:
                reason = f"the {what}s of the test set show no anomaly"
            elif not has_normal:
                reason = f"the {what}s of the test set show nothing normal"
            else:
                if has_examples:
                    pl_module.log(metric.name, metric)
                continue
            if "px" not in metric.name:  # of sizes nothing is said that is not of all
                left_out.setdefault(reason, []).append(metric.name)
            metric.reset()
        for reason, names in left_out.items():
            logger.warning("Left out, since %s: %s.", reason, ", ".join(names))


def write_metrics(trainer: Trainer) -> None:
    """Write a test's metrics into ``metrics.json`` next to its pictures.

    Where that is impossible a warning says so: the metrics are on the screen.
    """
    if not trainer.is_global_zero:
        return
    metrics = {name: round(value.item(), 6) for name, value in sorted(trainer.callback_metrics.items())}
    folder = Path(trainer.default_root_dir)
    file = folder / "metrics.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(metrics, indent=2) + "\n")
    except OSError as error:
        logger.warning("The metrics could not be written to %s (%s).", file, error)
