import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy.signal import lfilter
from sklearn.metrics import roc_auc_score

from cflow_plugin import CflowError
from cflow_plugin.commands.watch.score_plot import plot_scores
from cflow_plugin.commands.watch.timeline import Smoother, frame_auroc, intervals, read_truth


@given(some.lists(some.tuples(some.integers(0, 5), some.booleans()), min_size=1))
def test_auroc_with_ties(frames):
    scores, truth = np.array([score for score, _ in frames]), np.array([true for _, true in frames])
    auroc = frame_auroc(scores, truth)
    if truth.all() or not truth.any():
        assert auroc is None
    else:
        assert auroc == pytest.approx(roc_auc_score(truth, scores))


def test_smoothing_of_evenly_spaced_frames_is_a_linear_filter():
    scores, step, constant = np.random.default_rng(0).random(50), 0.04, 0.3
    smoother = Smoother(constant)
    smoothed = [smoother(index * step, score) for index, score in enumerate(scores)]
    keep = np.exp(-step / constant)
    expected, _ = lfilter([1 - keep], [1, -keep], scores, zi=[keep * scores[0]])
    assert np.allclose(smoothed, expected)


def test_a_gap_counts_for_its_length():
    """Frames left out while the score stays the same change nothing."""
    every, few = Smoother(1.0), Smoother(1.0)
    every(0.0, 0.0), few(0.0, 0.0)
    for time in np.arange(0.1, 2.05, 0.1):
        last = every(time, 1.0)
    assert few(2.0, 1.0) == pytest.approx(last) == pytest.approx(1 - np.exp(-2))


def test_no_smoothing_is_no_smoothing():
    smoother = Smoother(0.0)
    assert [smoother(0.0, score) for score in (0.1, 0.9, 0.4)] == [0.1, 0.9, 0.4]
    with pytest.raises(CflowError, match="0 seconds or more"):
        Smoother(-1.0)


@given(some.lists(some.booleans(), min_size=1))
def test_both_kinds_of_truth_say_the_same(tmp_path_factory, frames):
    folder = tmp_path_factory.mktemp("truth")
    mask = np.array(frames)
    np.save(folder / "mask.npy", mask.astype(np.int8))
    found = intervals(mask)
    lines = ["first,last", *(f"{first}, {last}" for first, last in found), ""]
    (folder / "intervals.csv").write_text("\n".join(lines))
    from_mask, from_lines = read_truth(folder / "mask.npy"), read_truth(folder / "intervals.csv")
    assert from_mask.intervals == from_lines.intervals == found
    assert (from_mask.total, from_lines.total) == (len(mask), None)
    assert np.array_equal(from_mask.of(range(len(mask))), mask)
    assert not from_lines.of([len(mask), len(mask) + 1000]).any()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.csv", None, "no ground truth at"),
        ("backwards.csv", b"3,9\n7,5\n", "Line 2 of .*'7,5'"),
        ("words.csv", b"first,last\nthree,nine\n", "Line 2 of"),
        ("one.csv", b"5\n", "Line 1 of"),
        ("negative.csv", b"-1,5\n", "Line 1 of"),
        ("binary.csv", b"\xff\xfe\x00", "could not be read as CSV"),
        ("damaged.npy", b"\x93NUMPY", "could not be read as a NumPy array"),
        ("empty.npy", b"", "could not be read as a NumPy array"),
    ],
)
def test_truth_that_cannot_be_read(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CflowError, match=words):
        read_truth(tmp_path / name)


def test_masks_of_pixels_are_no_truth_of_frames(tmp_path):
    np.save(tmp_path / "pixels.npy", np.zeros((4, 5, 6), np.uint8))
    with pytest.raises(CflowError, match="test_frame_mask"):
        read_truth(tmp_path / "pixels.npy")


def test_the_plot_shades_the_true_intervals(tmp_path):
    """Reddish columns cover the same share of the axes as anomalous frames do of all."""
    times = np.arange(400) / 25
    truth = np.zeros(400, bool)
    truth[40:80] = truth[300:360] = True
    plot_scores(tmp_path / "plot.png", times, np.full(400, 0.2), threshold=0.5, truth=truth, title="shaded")
    picture = cv2.imread(str(tmp_path / "plot.png")).astype(int)
    row = picture[int(0.8 * len(picture))]  # below the scores, within the axes
    left, *_, right = np.flatnonzero(picture[:, :].min(axis=2).mean(axis=0) < 120)  # the axes' frame
    blue, green, red = row[left : right + 1].T
    shaded = (red - green > 15) & (red - blue > 15)
    assert shaded.mean() == pytest.approx(truth.mean(), abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    plot_scores(tmp_path / "plot.png", times, np.full(400, 0.2), smoothed=np.full(400, 0.3))
    row = cv2.imread(str(tmp_path / "plot.png")).astype(int)[int(0.8 * len(picture))]
    assert not (row[:, 2] - row[:, 1] > 15).any()


def test_one_frame_can_be_plotted(tmp_path):
    plot_scores(tmp_path / "plot.png", [0.0], [0.4], truth=np.array([True]))
    assert cv2.imread(str(tmp_path / "plot.png")) is not None
