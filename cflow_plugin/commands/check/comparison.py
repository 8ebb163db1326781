"""One runtime's results beside the reference's, image by image."""

__all__ = ["Alarms", "Pictures", "Row", "alarms_expected", "compare", "reference_scores_hold"]

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from cflow_plugin.commands.check.file import Finding
from cflow_plugin.commands.check.runtimes import NotHereError, Run, Runtime
from cflow_plugin.decisions.conformal import threshold_rank
from cflow_plugin.deploy.fingerprint import Result, patterns
from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.images.reading import read_image

_HALF = 0.5
_CONFIDENCE = 0.99
_SIGNIFICANT = 1e-3
_FEW = 5  # images that say little of a distribution


class Pictures(NamedTuple):
    """What all runtimes are given, read anew for each: many large images do not fit into memory.

    Attributes:
        files: Image files.
        bits: Bits of a value in them.
        size: Height and width that a file takes; others are resized once, to whole numbers, the same for all runtimes.
        pattern: Height and width of the built-in pattern, which comes first.
        interpolation: How images are resized, ``bilinear`` or ``bicubic``.
        transform: What the data module did to images before, if anything.
    """

    files: list[str]
    bits: int
    size: tuple[int, int] | None
    pattern: tuple[int, int]
    interpolation: str
    transform: Any = None

    def all(self) -> Iterator[NDArray[Any]]:
        """Pattern and images, as a runtime is given them."""
        yield from patterns(self.pattern, self.bits)
        for file in self.files:
            yield self.read(file)

    def read(self, file: str) -> NDArray[Any]:
        """One image, ``(H, W, 3)``, as a runtime is given it.

        Args:
            file: The file.
        """
        pixels = read_image(file, self.bits)
        highest = np.iinfo(pixels.dtype).max
        if self.transform is not None:
            import torch  # there with the checkpoint that knows of it

            image = torch.from_numpy(pixels.astype(np.float32) / highest).permute(2, 0, 1).flip(0)  # red first
            values = self.transform(image).flip(0).permute(1, 2, 0).numpy() * highest
            pixels = values.round().clip(0, highest).astype(pixels.dtype)
        if self.size is None or pixels.shape[:2] == self.size:
            return pixels
        new, kind = (self.size[1], self.size[0]), Image.Resampling[self.interpolation.upper()]
        channels = [Image.fromarray(pixels[..., index].astype(np.float32)).resize(new, kind) for index in range(3)]
        resized = np.stack([np.asarray(channel) for channel in channels], -1)
        return resized.round().clip(0, 2**self.bits - 1).astype(pixels.dtype)

    @property
    def patterns(self) -> int:
        """How many of the images are the pattern's."""
        return len(patterns((1, 1)))


class Alarms(NamedTuple):
    """False alarms to be expected on good images.

    Attributes:
        images: Which of the images count.
        low: The least number that a threshold which keeps its rate is likely to raise.
        high: The highest such number.
    """

    images: list[int]
    low: int | None
    high: int | None


class Row(NamedTuple):
    """One runtime's part of the table.

    Attributes:
        name: The runtime.
        agrees: Whether it is the reference's equal; ``None`` where it could not be run.
        score: Largest difference of scores.
        map: Largest difference of maps.
        decisions: How many images are decided otherwise.
        alarms: False alarms.
        milliseconds: Median time for an image.
        detail: A sentence.
    """

    name: str
    agrees: bool | None
    score: float | None = None
    map: float | None = None
    decisions: int | None = None
    alarms: int | None = None
    milliseconds: float | None = None
    detail: str = ""


def alarms_expected(fresh: list[int], reference_images: int | None, rate: float | None) -> Alarms:
    """Between which numbers the false alarms on good images lie, 99 times in 100, if the threshold keeps its rate.

    Of n reference images the threshold leaves the highest l = floor((n + 1) rate) at or above it, and the number of
    alarms among m new good images follows a beta-binomial distribution of m, l and n + 1 - l.

    Args:
        fresh: Which images are good and new.
        reference_images: How many scores the threshold comes from.
        rate: The false-alarm rate.

    Example:
        >>> alarms_expected(list(range(100)), 99, 0.05)[1:]
        (0, 15)
    """
    if not fresh or reference_images is None or rate is None:
        return Alarms(fresh, None, None)
    from scipy.stats import betabinom

    try:
        above = reference_images + 1 - threshold_rank(reference_images, rate)
    except CflowError:  # too few for the rate: what is said of the threshold
        return Alarms(fresh, None, None)
    low, high = betabinom(len(fresh), above, reference_images + 1 - above).interval(_CONFIDENCE)
    return Alarms(fresh, int(low), int(high))


def compare(
    runtime: Runtime, pictures: Pictures, expected: list[Result] | None, tolerance: float, alarms: Alarms
) -> tuple[Row, list[Result]]:
    """Run all images through a runtime.

    Args:
        runtime: The runtime.
        pictures: The images.
        expected: The reference's results, or ``None`` for the reference itself.
        tolerance: Difference of scores and maps that counts as none.
        alarms: Which images are good, and what is expected of them.

    Returns:
        Its row, and its results; none where it could not be run.

    Raises:
        CflowError: If an image cannot be read.
    """
    try:
        results, milliseconds = _run_all(runtime.name, runtime.open(), pictures)
    except NotHereError as error:
        return Row(runtime.name, None, detail=f"Not run: {error}."), []
    except CflowError:
        raise
    except Exception as error:  # what a runtime does not like about a file, it says in its own way
        return Row(runtime.name, None, detail=f"Not run: {_reason(error)}."), []
    raised = sum(bool(results[index].label) for index in alarms.images) if alarms.images else None
    reasons = []
    score = maps = decisions = None
    if expected is not None:
        score, maps, decisions, reasons = _differences(results, expected, tolerance)
    elif not np.isfinite([result.score for result in results]).all():
        reasons.append("scores that are no numbers")
    if raised is not None and not (alarms.low or 0) <= raised <= (math.inf if alarms.high is None else alarms.high):
        reasons.append(f"{raised} false alarms, where {alarms.low} to {alarms.high} are likely")
    agrees = not reasons
    detail = "Reference." if expected is None and agrees else "Agrees." if agrees else f"Differs: {'; '.join(reasons)}."
    return Row(runtime.name, agrees, score, maps, decisions, raised, milliseconds, detail), results


def _reason(error: Exception) -> str:
    """An error's message in a line; OpenVINO's begins with places in its source code."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return first_line(type(error)(lines[-1])) if lines else first_line(error)


def _run_all(name: str, run: Run, pictures: Pictures) -> tuple[list[Result], float]:
    results, seconds = [], []
    for pixels in track(pictures.all(), name, total=pictures.patterns + len(pictures.files), transient=True):
        if not results:
            run(pixels)  # the first run is slower
        start = time.perf_counter()
        results.append(run(pixels))
        seconds.append(time.perf_counter() - start)
    return results, 1000 * float(np.median(seconds))


def _differences(
    results: list[Result], expected: list[Result], tolerance: float
) -> tuple[float, float | None, int, list[str]]:
    pairs = list(zip(results, expected, strict=True))
    reasons = []
    score = max(_apart(one.score, other.score) for one, other in pairs)
    if score > tolerance:
        reasons.append("scores")
    both = [(one.map, other.map) for one, other in pairs if one.map is not None and other.map is not None]
    maps = max((_apart(one, other) for one, other in both), default=None)
    if maps is not None and maps > tolerance:
        reasons.append("maps")
    changed = [other for one, other in pairs if one.label != other.label]
    # Where a score lies at the threshold to the last digits, either side is right.
    if any(not abs(other.score - _HALF) <= tolerance for other in changed):
        reasons.append("decisions")
    return score, maps, len(changed), reasons


def _apart(one: Any, other: Any) -> float:
    """The largest difference; infinite where there is none to be taken."""
    if np.shape(one) != np.shape(other):
        return float("inf")
    difference = float(np.abs(np.subtract(one, other, dtype=np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")


def reference_scores_hold(
    stored: NDArray[Any] | None, own: NDArray[Any] | None, fresh: NDArray[Any], tolerance: float
) -> Finding:
    """Whether the stored scores of reference images are what the file gives.

    Args:
        stored: The scores in the file, ascending.
        own: The file's scores of the reference images themselves, where these are at hand.
        fresh: Its scores of other good images.
        tolerance: Difference that counts as none.
    """
    what = "reference scores"
    if stored is None:
        return Finding(what, None, "The file holds none: the model was trained without a false-alarm rate.")
    stale = "the thresholds are of other scores than the file's. Export it again."
    if own is not None:
        if len(own) != len(stored):
            return Finding(what, False, f"{len(stored)} scores are stored, and there are {len(own)} reference images.")
        apart = _apart(np.sort(own), stored)
        if apart <= tolerance:
            return Finding(what, True, f"{len(own)} reference images score what is stored (to {apart:.1e}).")
        return Finding(what, False, f"Reference images score up to {apart:.2g} from what is stored: {stale}")
    if len(fresh) < _FEW or len(stored) < _FEW:
        return Finding(what, None, "To look at them, give the checkpoint or good images (--checkpoint, --images).")
    from scipy.stats import ks_2samp

    p_value = float(ks_2samp(fresh, stored).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    medians = f"medians {np.median(fresh):.3f} and {np.median(stored):.3f}, p = {p_value:.2g}"
    if p_value >= _SIGNIFICANT:
        return Finding(what, True, f"The images given score as the reference images did ({medians}).")
    detail = f"The images given do not score as the reference images did ({medians}): they are no new good images, or "
    return Finding(what, False, detail + stale)
