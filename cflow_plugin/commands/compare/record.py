"""What a comparison keeps of a test: curves, distributions and a few pictures."""

__all__ = ["Recorder"]

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from anomalib.data import Batch
from anomalib.data.utils import read_image
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from sklearn.metrics import precision_recall_curve

from cflow_plugin.files import atomic_file
from cflow_plugin.metrics.bins import to_keys, to_scores
from cflow_plugin.metrics.regions import region_weights

# Scores are counted in bins of this many float32 values: about 2^-11 of a score's own size.
_BIN_BITS = 12
_CURVE_POINTS = 400
_DENSITY_BINS = 100
_SAMPLES = 6
_SAMPLE_SIZE = 192
_FPR_LIMIT = 0.3


class Recorder(Callback):
    """Watch a test, and summarise it without keeping every pixel.

    Pixel scores are counted in fine bins, for normal pixels, anomalous pixels, and anomalous pixels with each region's
    weight, from which ROC, PRO, F1 and densities follow.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._seconds = 0.0
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._paths: list[str] = []
        bins = 2 ** (32 - _BIN_BITS)
        self._normal = np.zeros(bins, dtype=np.int64)
        self._anomalous = np.zeros(bins, dtype=np.int64)
        self._regions = np.zeros(bins)
        self._samples: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        del args, kwargs
        self._start = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Stop the clock, and count the batch's scores."""
        del trainer, pl_module, batch, args, kwargs
        self._seconds += time.perf_counter() - self._start
        self._scores.append(outputs.pred_score.detach().float().cpu().numpy().reshape(-1))
        self._labels.append(outputs.gt_label.cpu().numpy().reshape(-1).astype(bool))
        self._paths.extend(map(str, outputs.image_path))
        if outputs.anomaly_map is None or outputs.gt_mask is None:
            return
        maps = outputs.anomaly_map.detach().float().cpu().numpy()
        maps = maps.reshape(len(self._labels[-1]), *maps.shape[-2:])
        masks = outputs.gt_mask.cpu().numpy().reshape(maps.shape).astype(bool)
        for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
            self._count(anomaly_map, mask)
            kind = Path(outputs.image_path[index]).parent.name
            if kind not in self._samples and len(self._samples) < _SAMPLES:
                # From its file: the batch's has been normalised for the model.
                image = np.asarray(read_image(outputs.image_path[index]))
                self._samples[kind] = (_shrink(image), _shrink(mask.astype(np.float32)), _shrink(anomaly_map))

    def _count(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        bins = _bin(anomaly_map)
        size = len(self._normal)
        self._normal += np.bincount(bins[~mask], minlength=size)
        if not mask.any():
            return
        self._anomalous += np.bincount(bins[mask], minlength=size)
        weights = region_weights(mask[None])
        self._regions += np.bincount(bins[mask], weights=weights, minlength=size)

    def save(self, file: Path) -> dict[str, float]:
        """Write what was seen, whole or not at all.

        Args:
            file: The .npz file to write.

        Returns:
            Figures for the table: seconds of the test, milliseconds an image, the best F1 scores.
        """
        scores, labels = np.concatenate(self._scores), np.concatenate(self._labels)
        record: dict[str, Any] = {"image_scores": scores, "image_labels": labels, "image_paths": np.array(self._paths)}
        facts = {"test_seconds": self._seconds, "images": len(scores), "image_ms": 1000 * self._seconds / len(scores)}
        if labels.any() and not labels.all():
            record["image_threshold"], facts["image_F1"] = _best_f1(labels, scores)
        if self._normal.any() and self._anomalous.any():
            curves = self._pixel_curves()
            facts["pixel_F1"] = float(curves.pop("pixel_F1"))
            record |= curves
        if self._samples:
            record["sample_names"] = np.array(list(self._samples))
            images, masks, maps = zip(*self._samples.values(), strict=True)
            record |= {"sample_images": np.stack(images), "sample_masks": np.stack(masks) > 0.5}
            record["sample_maps"] = np.stack(maps)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, **record)
        return facts

    def _pixel_curves(self) -> dict[str, Any]:
        used = np.flatnonzero(self._normal + self._anomalous)
        normal, anomalous, regions = (part[used] for part in (self._normal, self._anomalous, self._regions))
        values = _value(used)
        # From the highest score down, as a threshold falls.
        false = np.cumsum(normal[::-1])
        true = np.cumsum(anomalous[::-1])
        overlap = np.cumsum(regions[::-1])
        overlap /= overlap[-1]  # the weights of a region sum to one
        fpr, tpr = false / false[-1], true / true[-1]
        f1 = 2 * true / (true + false + true[-1])
        best = int(f1.argmax())
        low, high = (values[np.searchsorted(np.cumsum(normal), share * false[-1])] for share in (0.001, 0.9999))
        high = max(high, values[np.searchsorted(np.cumsum(anomalous), 0.999 * true[-1])])
        edges = np.linspace(low, max(high, low + 1e-12), _DENSITY_BINS + 1)
        return {
            "roc": _thin(fpr, tpr),
            "pro": _thin(fpr, overlap, _FPR_LIMIT),
            "density_edges": edges,
            "density_normal": np.histogram(values, edges, weights=normal, density=True)[0],
            "density_anomalous": np.histogram(values, edges, weights=anomalous, density=True)[0],
            "pixel_threshold": values[::-1][best],
            "pixel_F1": f1[best],
        }


def _bin(scores: np.ndarray) -> np.ndarray:
    """Number of the bin of each score; higher scores have higher or equal numbers."""
    keys = to_keys(np.ascontiguousarray(scores, dtype=np.float32))
    return (keys >> _BIN_BITS) + (1 << (31 - _BIN_BITS))


def _value(bins: np.ndarray) -> np.ndarray:
    """The lowest score of each bin."""
    keys = (bins - (1 << (31 - _BIN_BITS))).astype(np.int32) << _BIN_BITS
    return to_scores(keys).astype(np.float64)


def _thin(x: np.ndarray, y: np.ndarray, limit: float = 1.0) -> np.ndarray:
    """A curve with few points, from (0, 0) to ``limit``, ``(2, P)``."""
    grid = np.concatenate([np.geomspace(1e-5, 0.01, _CURVE_POINTS // 4), np.linspace(0.01, limit, _CURVE_POINTS)[1:]])
    grid = np.concatenate([[0.0], grid * 1.0])
    return np.stack([grid, np.interp(grid, np.concatenate([[0.0], x]), np.concatenate([[0.0], y]))])


def _best_f1(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(thresholds[best]), float(f1[best])


def _shrink(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SAMPLE_SIZE, _SAMPLE_SIZE), interpolation=cv2.INTER_AREA)
