"""AUROC and AUPRO as anomalib metrics: from ranks alone, whatever the range of the scores and the size of the set."""

__all__ = ["AUPRO", "AUROC"]

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from anomalib.metrics import AnomalibMetric
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from cflow_plugin.errors import CflowError
from cflow_plugin.metrics.area import area_below_curve
from cflow_plugin.metrics.bins import join_bins, sum_by_key, to_keys
from cflow_plugin.metrics.regions import region_weights

logger = logging.getLogger(__name__)

# Up to this many pixels (or images, for image scores), of all processes together, the area is exact. Scores are kept as
# they are: 4 bytes a pixel. All of MVTec AD's categories fit at 512×512.
EXACT_SCORES = 2**26
# Beyond, scores are gathered until there are this many, and then put into bins.
GATHERED_SCORES = 2**24
# The most bins of normal and the most of anomalous pixels that may be occupied, at 12 bytes a bin. Scores spread over
# all of float32's range, the worst case, leave it 13 of 23 bits of its fraction; a range as of 0.001 to 1 leaves 18.
OCCUPIED_BINS = 2**22

_STATES = {
    "negatives": torch.float32,
    "positives": torch.float32,
    "weights": torch.float64,
    "negative_keys": torch.int32,
    "negative_counts": torch.float64,
    "positive_keys": torch.int32,
    "positive_weights": torch.float64,
}


class _RankedArea(Metric):
    """Area below the curve of the share of anomalous pixels found against the false-positive rate.

    Both curves follow from the scores of normal pixels and the scores and weights of anomalous ones. These are kept as
    they are up to `EXACT_SCORES`. When more come, all are put into bins of neighbouring floating-point numbers, of
    which only occupied ones are stored. At first each number is a bin of its own; while too many are occupied,
    neighbours are joined two by two. So the bins suit any distribution of scores, and `error_bound` says what they
    cost.

    torchmetrics' own binned curves do not serve. Their thresholds are equally spaced in [0, 1], and most pixels of a
    map may lie between two of them; they know no weights; and a batch with a score outside [0, 1] goes through a
    sigmoid.

    Every state can be joined with that of another process: lists are concatenated, and of the bins' widths the largest
    holds for all. It makes no difference whether a process has bins, scores, or no images at all.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    fpr_limit = 1.0
    inside: np.ndarray | None = None
    """Which pixels count, ``(H, W)`` bool; all of them where it is ``None``."""

    negatives: list[torch.Tensor]
    positives: list[torch.Tensor]
    weights: list[torch.Tensor]
    dropped_bits: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("dropped_bits", default=torch.tensor(0), dist_reduce_fx="max")
        self._error_bound = 0.0

    @property
    def error_bound(self) -> float:
        """The exact area differs from the one last computed by at most this; 0 where that is exact."""
        return self._error_bound

    def reset(self) -> None:
        """Forget all scores."""
        super().reset()
        self._error_bound = 0.0

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Take in scores.

        Args:
            preds: Scores, higher for anomalies, in any range; they are compared as float32.
            target: As many values, above 0 where there is an anomaly. The last two dimensions of masks are an image's.

        Raises:
            CflowError: There are NaNs among the scores, or the two differ in size.
        """
        # The CPU has the memory, and NumPy sorts several times faster there than PyTorch, which sorts an index as well.
        scores = preds.detach().to("cpu", torch.float32).numpy()
        anomalous = (target.detach().cpu() > 0).numpy()
        if scores.size != anomalous.size:
            raise CflowError(
                f"The metrics got {scores.size} scores for {anomalous.size} true values (shapes {scores.shape} and "
                f"{anomalous.shape}). Resize the masks to the size of the anomaly maps."
            )
        if np.isnan(scores).any():
            raise CflowError(
                "Scores that are not numbers (NaN) cannot be ranked. Check the weights and the test images."
            )
        counted = None if self.inside is None else np.broadcast_to(self.inside, anomalous.shape)
        if counted is not None:
            anomalous = anomalous & counted
        where, scores = anomalous.ravel(), scores.ravel()
        if where.any():
            self.positives.append(torch.from_numpy(scores[where]))
            weights = self._weigh(anomalous)
            if weights is not None:
                self.weights.append(torch.from_numpy(weights))
        # A copy in any case: the map may be changed in place later on.
        scores = scores[~where if counted is None else counted.ravel() & ~where]
        if scores.size:
            self.negatives.append(torch.from_numpy(scores))
        kept = sum(len(part) for name in ("negatives", "positives") for part in self._parts(name))
        if kept > (GATHERED_SCORES if self._is_binned else EXACT_SCORES // _processes()):
            self._put_into_bins()

    def compute(self) -> torch.Tensor:
        """Integrate the curve up to the limit.

        Returns:
            The area divided by the limit, a float64 scalar; NaN without normal or without anomalous pixels.
        """
        if not self._is_binned:
            negatives, positives, weights = self._array("negatives"), self._array("positives"), None
            negatives.sort()
            if self._weighs:
                order = np.argsort(positives)
                positives, weights = positives[order], self._array("weights")[order]
            else:
                positives.sort()
            area = area_below_curve(negatives, positives, self.fpr_limit, None, weights)
            self._error_bound = 0.0
            return torch.tensor(area.value, dtype=torch.float64)
        self._put_into_bins()
        negatives, counts = self._bins("negative_keys", "negative_counts")
        positives, weights = self._bins("positive_keys", "positive_weights")
        area = area_below_curve(negatives, positives, self.fpr_limit, counts, weights)
        # A bin that holds a single floating-point number moves nothing.
        self._error_bound = area.error if self.dropped_bits else 0.0
        if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]  Lightning sets it
            name = getattr(self, "name", type(self).__name__)
            bins = len(negatives) + len(positives)
            logger.info(
                "%s of %.3g normal scores in %d bins: within %.1e of exact.", name, counts.sum(), bins, self.error_bound
            )
        return torch.tensor(area.value, dtype=torch.float64)

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        """Join the states of all processes; see torchmetrics."""
        # Of a list that is empty torchmetrics makes a float32 tensor, which does not fit what other processes send.
        for name, dtype in _STATES.items():
            if not len(getattr(self, name)):
                setattr(self, name, [torch.empty(0, dtype=dtype)])
        gather = dist_sync_fn or gather_all_tensors

        def gather_on_device(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
            return [part.cpu() for part in gather(state.to(self.device), group)]

        super().sync(gather_on_device, process_group, should_sync, distributed_available)

    _weighs = False

    def _weigh(self, anomalous: np.ndarray) -> np.ndarray | None:
        """Weights of the anomalous pixels, or ``None`` for equal ones."""
        del anomalous

    @property
    def _is_binned(self) -> bool:
        return any(len(keys) for name in ("negative_keys", "positive_keys") for keys in self._parts(name))

    def _parts(self, name: str) -> list[torch.Tensor]:
        state = getattr(self, name)
        return [state] if isinstance(state, torch.Tensor) else state  # what other processes sent has been concatenated

    def _array(self, name: str) -> np.ndarray:
        """A copy of a state as one array."""
        empty = torch.empty(0, dtype=_STATES[name])
        return torch.cat([empty, *(part.cpu() for part in self._parts(name))]).numpy()

    def _bins(self, keys: str, masses: str) -> tuple[np.ndarray, np.ndarray]:
        return sum_by_key(join_bins(self._array(keys), int(self.dropped_bits)), self._array(masses))

    def _put_into_bins(self) -> None:
        """Move the scores that are kept into bins."""
        positive = ["positives", "weights"] if self._weighs else ["positives"]
        for states, keys, masses in (
            (["negatives"], "negative_keys", "negative_counts"),
            (positive, "positive_keys", "positive_weights"),
        ):
            bins = self._bins(keys, masses)
            dropped = int(self.dropped_bits)
            for scores, *weights in self._take(states):
                new = sum_by_key(join_bins(to_keys(scores), dropped), *weights)
                bins = sum_by_key(*(np.concatenate(pair) for pair in zip(bins, new, strict=True)))
                while len(bins[0]) > OCCUPIED_BINS:
                    dropped += 1
                    bins = sum_by_key(join_bins(bins[0], dropped), bins[1])
            setattr(self, keys, [torch.from_numpy(bins[0])])
            setattr(self, masses, [torch.from_numpy(bins[1])])
            self.dropped_bits = torch.tensor(dropped)

    def _take(self, states: list[str]) -> Iterator[list[np.ndarray]]:
        """Empty states of one length a piece at a time, so that each is freed before the next is put into bins."""
        pieces = [[piece for part in self._parts(name) for piece in part.split(GATHERED_SCORES)] for name in states]
        for name in states:
            setattr(self, name, [])
        while pieces[0]:
            count = size = 0
            while count < len(pieces[0]) and size < GATHERED_SCORES:
                count += 1
                size += len(pieces[0][-count])
            yield [torch.cat([parts.pop() for _ in range(count)]).cpu().numpy() for parts in pieces]


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


class _RegionArea(_RankedArea):
    """The same with every anomalous region weighted equally, up to a false-positive rate.

    Args:
        fpr_limit: Upper end of the integral, in (0, 1].
    """

    _weighs = True

    def __init__(self, fpr_limit: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < fpr_limit <= 1:
            raise CflowError(f"fpr_limit must be above 0 and at most 1, not {fpr_limit}.")
        self.fpr_limit = fpr_limit

    def _weigh(self, anomalous: np.ndarray) -> np.ndarray:
        return region_weights(anomalous.reshape(-1, *anomalous.shape[-2:]))


class AUROC(AnomalibMetric, _RankedArea):
    """Area under the ROC curve, of images or of pixels.

    The probability that an anomalous score exceeds a normal one, ties counting one half; exact to float64, or within
    `error_bound`. anomalib's sums a curve in float32, and takes a batch with a score outside [0, 1] for logits.

    Args:
        fields: Names of the scores and of the truth in a batch.
        prefix: What the metric's name starts with.
        strict: Whether a batch without these fields is an error.
        **kwargs: torchmetrics' settings.
    """

    def compute(self) -> torch.Tensor:
        """Integrate the curve up to the limit."""
        # anomalib's own would fail in a process without images, which here answers with the area of the others.
        return _RankedArea.compute(self)


class AUPRO(AnomalibMetric, _RegionArea):
    """Area under the per-region overlap curve (Bergmann et al., IJCV 2021, section 5.2; the paper's section 5.2).

    The overlap of the predicted with the true anomaly, averaged over the regions of all images, integrated over the
    false-positive rate from 0 to the limit and divided by it; the curve is straight between two thresholds, also where
    it meets the limit. Exact to float64, or within `error_bound`. anomalib's is the same area from sums in float32.

    Args:
        fields: Names of the maps and of the masks in a batch.
        prefix: What the metric's name starts with.
        strict: Whether a batch without these fields is an error.
        **kwargs: `fpr_limit`, 0.3 unless given, and torchmetrics' settings.
    """

    def compute(self) -> torch.Tensor:
        """Integrate the curve up to the limit."""
        # anomalib's own would fail in a process without images, which here answers with the area of the others.
        return _RankedArea.compute(self)
