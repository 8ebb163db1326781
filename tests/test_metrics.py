import itertools
import json
import logging
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib import metrics as anomalib_metrics
from anomalib.data import ImageBatch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from cflow_plugin.errors import CflowError
from cflow_plugin.metrics import AUPRO, AUROC, ranked
from cflow_plugin.metrics.bins import join_bins, sum_by_key, to_keys
from cflow_plugin.metrics.evaluator import CflowEvaluator
from cflow_plugin.metrics.found import SIZES

from .conftest import call_in_a_copy

FIELDS = ["anomaly_map", "gt_mask"]


def feed(metric, maps, masks, batch=3):
    for start in range(0, len(maps), batch):
        part = slice(start, start + batch)
        metric.update(SimpleNamespace(anomaly_map=torch.as_tensor(maps[part]), gt_mask=torch.as_tensor(masks[part])))
    return metric


def auroc(maps, masks, **settings):
    return feed(AUROC(fields=FIELDS), maps, masks, **settings)


def aupro(maps, masks, fpr_limit=0.3, **settings):
    return feed(AUPRO(fields=FIELDS, fpr_limit=fpr_limit), maps, masks, **settings)


def brute_force_pro(maps, masks, fpr_limit=0.3):
    """The definition, threshold by threshold and region by region, in float64."""
    maps = np.asarray(maps, np.float64)
    structure = np.zeros((3, 3, 3))
    structure[1] = 1
    labels, regions = ndimage.label(masks, structure)
    normal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        overlaps = [np.mean(maps[labels == region] >= threshold) for region in range(1, regions + 1)]
        points.append((np.mean(normal >= threshold), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        end = min(x1, fpr_limit)
        if end > x0:
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / fpr_limit


def smooth_maps(images, size, seed=0):
    """Maps as a model's: smooth, with higher values in the defects and elsewhere, most of them close to each other."""
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.standard_normal((images, size, size)), (0, size / 32, size / 32))
    masks = ndimage.gaussian_filter(generator.standard_normal((images, size, size)), (0, size / 16, size / 16))
    masks = masks > np.quantile(masks, 0.97)
    masks[::4] = False
    raised = noise / noise.std() + 2 * ndimage.gaussian_filter(masks.astype(float), (0, 2, 2))
    return (1 / (1 + np.exp(3 - raised))).astype(np.float32), masks


@st.composite
def sets(draw):
    """A few small images: with ties, constants, scores outside [0, 1], and regions that touch at corners."""
    images, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 7))
    count = images * height * width
    kind = draw(st.sampled_from(["any", "ties", "signed zeros", "close"]))
    values = {
        "any": st.floats(width=32, allow_nan=False),
        "ties": st.integers(-2, 3).map(float),
        "signed zeros": st.sampled_from([-0.0, 0.0, 1e-45, -1e-45]),
        "close": st.integers(0, 40).map(lambda step: 1 - step * 2**-24),
    }[kind]
    maps = draw(st.lists(values, min_size=count, max_size=count))
    masks = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(lambda drawn: len(set(drawn)) == 2))
    shape = (images, height, width)
    return np.array(maps, np.float32).reshape(shape), np.array(masks).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(data=sets(), fpr_limit=st.sampled_from([0.05, 0.3, 1.0]), batch=st.integers(1, 4))
def test_equal_to_the_definition(data, fpr_limit, batch):
    maps, masks = data
    found = aupro(maps, masks, fpr_limit, batch=batch).compute().item()
    assert found == pytest.approx(brute_force_pro(maps, masks, fpr_limit), abs=1e-12)
    ranks = np.unique(maps, return_inverse=True)[1]  # scikit-learn refuses infinities
    expected = roc_auc_score(masks.ravel(), ranks.ravel())
    assert auroc(maps, masks, batch=batch).compute().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [64, 160])
def test_equal_to_anomalib_s(size):
    maps, masks = smooth_maps(10, size)
    theirs = {"maps": torch.from_numpy(maps), "masks": torch.from_numpy(masks)}
    expected = feed(anomalib_metrics.AUPRO(fields=FIELDS), *theirs.values()).compute().item()
    assert aupro(maps, masks).compute().item() == pytest.approx(expected, abs=1e-4)
    expected = feed(anomalib_metrics.AUROC(fields=FIELDS), *theirs.values()).compute().item()
    assert auroc(maps, masks).compute().item() == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def few(monkeypatch):
    """A limit that small sets pass, and so few bins that they have to be joined."""

    def limit(exact=500, gathered=300, bins=64):
        monkeypatch.setattr(ranked, "EXACT_SCORES", exact)
        monkeypatch.setattr(ranked, "GATHERED_SCORES", gathered)
        monkeypatch.setattr(ranked, "OCCUPIED_BINS", bins)

    return limit


DISTRIBUTIONS = {
    "as a model's": lambda maps: maps,
    "close to one": lambda maps: 1 - maps * np.float32(1e-6),
    "close to zero": lambda maps: maps * np.float32(1e-30),
    "of both signs": lambda maps: 100 * (maps - np.float32(0.04)),
    "few values": lambda maps: np.round(maps * 10) / 10,
    "constant": lambda maps: np.full_like(maps, 0.5),
    "with infinities": lambda maps: np.where(maps > 0.5, np.float32(np.inf), np.where(maps < 0.02, -np.inf, maps)),
}


@pytest.mark.parametrize("bins", [8, 64, 4096])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_binned_within_the_bound(few, distribution, bins):
    maps, masks = smooth_maps(6, 48)
    maps = DISTRIBUTIONS[distribution](maps).astype(np.float32)
    exact = [build(maps, masks) for build in (auroc, aupro)]
    expected = [metric.compute().item() for metric in exact]
    assert [metric.error_bound for metric in exact] == [0, 0]
    few(bins=bins)
    for build, value in zip((auroc, aupro), expected, strict=True):
        metric = build(maps, masks, batch=1)
        found = metric.compute().item()
        assert len(metric.negative_keys[0]) <= bins
        assert len(metric.positive_keys[0]) <= bins
        assert abs(found - value) <= metric.error_bound + 1e-12


@settings(deadline=None, max_examples=60)
@given(data=sets(), dropped=st.integers(0, 31), fpr_limit=st.sampled_from([0.05, 0.3, 1.0]))
def test_no_order_within_bins_breaks_the_bound(data, dropped, fpr_limit):
    maps, masks = data
    exact = aupro(maps, masks, fpr_limit)
    binned = aupro(maps, masks, fpr_limit)
    binned.dropped_bits = torch.tensor(dropped)
    binned._put_into_bins()
    difference = abs(binned.compute().item() - exact.compute().item())
    assert difference <= binned.error_bound + 1e-12
    assert dropped or binned.error_bound == 0
    assert dropped or difference < 1e-12


def test_bound_is_half_the_sum_over_bins_of_the_products_of_shares():
    generator = np.random.default_rng(0)
    maps, masks = generator.random((2, 20, 20), np.float32), generator.random((2, 20, 20)) > 0.8
    metric = auroc(maps, masks)
    metric.dropped_bits = torch.tensor(20)
    metric._put_into_bins()
    metric.compute()
    bins = np.unique(maps.view(np.int32) >> 20, return_inverse=True)[1].reshape(maps.shape)
    normal, anomalous = (np.bincount(bins[where], minlength=bins.max() + 1) for where in (~masks, masks))
    expected = (normal / normal.sum()) @ (anomalous / anomalous.sum()) / 2
    assert 0 < expected < 0.1
    assert metric.error_bound == pytest.approx(expected, abs=1e-12)


def test_switch_when_the_limit_is_passed(few, caplog):
    maps, masks = smooth_maps(5, 20)
    few(exact=800, gathered=10**6, bins=10**6)
    metric = AUROC(fields=FIELDS, prefix="pixel_")
    feed(metric, maps[:2], masks[:2])
    assert sum(map(len, metric.negatives)) > 0
    assert not metric.negative_keys
    feed(metric, maps[2:3], masks[2:3])
    assert metric.negative_keys
    assert not metric.negatives
    feed(metric, maps[3:], masks[3:])
    assert sum(map(len, metric.negatives)) > 0
    with caplog.at_level(logging.INFO):
        # With a bin for each number nothing is lost.
        assert metric.compute().item() == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert metric.error_bound == 0
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("pixel_AUROC")


def test_batch_size_makes_no_difference(few):
    maps, masks = smooth_maps(12, 32)
    for limits in ({"exact": 10**6}, {"exact": 100, "gathered": 2500, "bins": 128}):
        few(**limits)
        values = [build(maps, masks, batch=batch).compute() for build in (auroc, aupro) for batch in (1, 5, 12)]
        assert max(values[:3]) - min(values[:3]) < 1e-12
        assert max(values[3:]) - min(values[3:]) < 1e-12


def test_reset_forgets_all(few):
    maps, masks = smooth_maps(8, 32)
    few(bins=32)
    for build, again in ((auroc, AUROC(fields=FIELDS)), (aupro, AUPRO(fields=FIELDS))):
        feed(again, maps[:4], masks[:4]).compute()
        again.reset()
        assert again.error_bound == 0
        feed(again, maps[4:], masks[4:])
        assert again.compute() == build(maps[4:], masks[4:]).compute()


def test_computing_half_way_changes_nothing(few):
    maps, masks = smooth_maps(8, 32)
    for exact in (100, 10**6):
        few(exact=exact)
        metric = aupro(maps[:4], masks[:4])
        metric.compute()
        feed(metric, maps[4:], masks[4:])
        assert metric.compute().item() == pytest.approx(aupro(maps, masks).compute().item(), abs=1e-12)


def test_maps_changed_later_do_not_matter():
    maps, masks = smooth_maps(3, 16)
    expected = roc_auc_score(masks.ravel(), maps.ravel())
    metric = auroc(maps, masks, batch=1)
    maps[:] = 0
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


def test_image_scores_above_one_are_ranked():
    # One batch with a score above one must not be squeezed while another is not.
    scores, labels = torch.tensor([0.2, 0.7, 20.0, 30.0, 0.9, 0.1]), torch.tensor([0, 1, 0, 1, 0, 0])
    metric = AUROC(fields=["pred_score", "gt_label"], prefix="image_")
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        metric.update(SimpleNamespace(pred_score=scores[part], gt_label=labels[part]))
    assert metric.name == "image_AUROC"
    assert metric.compute().item() == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_shapes_and_types():
    maps, masks = smooth_maps(4, 24)
    expected = aupro(maps, masks).compute()
    assert aupro(maps[:, None], masks).compute() == expected
    assert aupro(maps[:, None], masks[:, None].astype(np.uint8)).compute() == expected
    assert aupro(maps, masks.astype(np.float32)).compute() == expected
    rough = torch.from_numpy(maps).bfloat16()
    assert aupro(rough, masks).compute() == aupro(rough.float(), masks).compute()


def test_without_anomalies_or_without_normal_pixels_there_is_no_value():
    maps, masks = smooth_maps(2, 16)
    for build in (auroc, aupro):
        assert math.isnan(build(maps, np.zeros_like(masks)).compute())
        assert math.isnan(build(maps, np.ones_like(masks)).compute())


def test_bad_scores_are_refused():
    maps, masks = smooth_maps(2, 16)
    maps[0, 0, 0] = np.nan
    with pytest.raises(CflowError, match="NaN"):
        auroc(maps, masks)
    with pytest.raises(CflowError, match="Resize the masks"):
        aupro(maps[:, :8], masks)
    with pytest.raises(CflowError, match="fpr_limit"):
        AUPRO(fields=FIELDS, fpr_limit=0.0)


@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=2))
def test_keys_keep_the_order(values):
    scores = np.array(values, np.float32)
    keys = to_keys(scores).astype(np.int64)
    assert ((keys[:, None] > keys) == (scores[:, None] > scores)).all()
    coarse = join_bins(to_keys(scores), 9).astype(np.int64)
    assert ((keys - coarse >= 0) & (keys - coarse < 512)).all()


def test_neighbouring_numbers_have_neighbouring_keys():
    for value in (-3.5, -1e-40, 0.0, 0.1, 1.0):
        pair = np.array([value, np.nextafter(np.float32(value), np.float32(np.inf))], np.float32)
        assert np.diff(to_keys(pair)) == 1


@given(pairs=st.lists(st.tuples(st.integers(-5, 5), st.floats(0, 1)), max_size=30))
def test_masses_are_summed(pairs):
    keys = np.array([key for key, _ in pairs], np.int32)
    masses = np.array([mass for _, mass in pairs])
    distinct, summed = sum_by_key(keys, masses)
    assert distinct.tolist() == sorted(set(keys.tolist()))
    assert summed.tolist() == pytest.approx([masses[keys == key].sum() for key in distinct])
    assert sum_by_key(keys)[1].tolist() == [(keys == key).sum() for key in distinct]


# Several processes


# Of 9 images of 1,024 pixels the first process has some. With a share of half the limit, only one of the two has bins.
CASES = {
    "exact": {"limit": 10**6, "first": 1, "binned": [False, False]},
    "one binned": {"limit": 6000, "first": 7, "binned": [True, False]},
    "both binned": {"limit": 200, "first": 4, "binned": [True, True]},
    "no images": {"limit": 6000, "first": 0, "binned": [False, True]},
}


def _one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    maps, masks = smooth_maps(9, 32)
    ranked.GATHERED_SCORES, ranked.OCCUPIED_BINS = 2000, 128
    found = {}
    for case, plan in CASES.items():
        ranked.EXACT_SCORES = plan["limit"]
        mine = slice(0, plan["first"]) if rank == 0 else slice(plan["first"], None)
        for metric in (AUROC(fields=FIELDS, strict=False), AUPRO(fields=FIELDS, strict=False)):
            feed(metric, maps[mine], masks[mine])
            binned = bool(metric.negative_keys)
            value = metric.compute().item()
            metric._computed = None
            again = metric.compute().item()  # what one process had was restored
            found[case, metric.name] = (value, again, metric.error_bound, binned)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def _both(folder):
    torch.multiprocessing.start_processes(_one_of_two, (folder,), nprocs=2, start_method="fork")


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    maps, masks = smooth_maps(9, 32)
    expected = {"AUROC": auroc(maps, masks).compute().item(), "AUPRO": aupro(maps, masks).compute().item()}
    call_in_a_copy(_both, str(tmp_path))
    results = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    for case, plan in CASES.items():
        for name, exact in expected.items():
            (value, again, bound, first_binned), (other, _, _, second_binned) = (part[case, name] for part in results)
            assert [first_binned, second_binned] == plan["binned"], case
            assert value == other == again, case
            assert abs(value - exact) <= bound + 1e-12, case
            assert bound < 0.05, case
            assert (bound > 0) == any(plan["binned"]), case


class Replay(LightningModule):
    """Has an evaluator as anomalib's models do, and takes batches for results."""

    def __init__(self):
        super().__init__()
        self.evaluator = CflowEvaluator()

    def configure_callbacks(self):
        return [self.evaluator]

    def test_step(self, batch, *_):
        return batch


def _collate(parts):
    maps, masks = (torch.stack([torch.as_tensor(part[index]) for part in parts]) for index in (0, 1))
    results = {"anomaly_map": maps[:, None], "pred_mask": maps[:, None] > 0.1, "pred_score": maps.amax((1, 2))}
    labels = masks.any(-1).any(-1)
    image = torch.zeros(len(parts), 3, *maps.shape[-2:])
    return ImageBatch(image, gt_mask=masks, gt_label=labels, pred_label=results["pred_score"] > 0.5, **results)


def _with_good_ones():
    maps, masks = smooth_maps(8, 32)
    masks[::2] = False
    return maps, masks


def _replay_one_of_two(rank, folder, port):
    # As Lightning's launcher tells the processes that it starts who they are.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    loader = DataLoader(list(zip(*_with_good_ones(), strict=True)), batch_size=2, collate_fn=_collate)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, accelerator="cpu", devices=2, strategy="ddp", **quiet)
    assert trainer.world_size == 2
    [metrics] = trainer.test(Replay(), loader, verbose=False)
    Path(folder, f"{rank}.json").write_text(json.dumps(metrics))


def _replay(folder):
    arguments = (folder, find_free_network_port())
    torch.multiprocessing.start_processes(_replay_one_of_two, arguments, nprocs=2, start_method="fork")


@pytest.mark.long
def test_a_process_that_meets_only_good_images(tmp_path):
    call_in_a_copy(_replay, str(tmp_path))
    metrics, others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert metrics == others
    maps, masks = _with_good_ones()
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-7)
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-7)
    assert metrics["pixel_AUPRO"] == pytest.approx(brute_force_pro(maps, masks), abs=1e-7)
    assert metrics["pixel_AUPRO_0.05"] == pytest.approx(brute_force_pro(maps, masks, 0.05), abs=1e-7)
    found, total, false = regions_found(maps > 0.1, masks)
    assert metrics["region_recall"] == pytest.approx(sum(found.values()) / sum(total.values()))
    assert metrics["false_regions_per_image"] == pytest.approx(false / len(masks))
    assert {name for name in metrics if name.endswith("px")} == {f"region_recall_{name}" for name in total}
    for name, count in total.items():
        assert metrics[f"region_recall_{name}"] == pytest.approx(found[name] / count)


def regions_found(predicted, masks):
    """By size, how many true regions are touched and how many there are; and false regions. One pixel at a time."""
    found, total, false, square = Counter(), Counter(), 0, np.ones((3, 3))
    for one, mask in zip(predicted, masks, strict=True):
        labels, count = ndimage.label(mask, square)
        for number in range(1, count + 1):
            side = (labels == number).sum() ** 0.5
            name = next(f"{low}-{high}px" for low, high in SIZES if low <= side < high)
            total[name] += 1
            found[name] += bool(one[labels == number].any())
        own, count = ndimage.label(one, square)
        false += sum(not mask[own == number].any() for number in range(1, count + 1))
    return found, total, false
