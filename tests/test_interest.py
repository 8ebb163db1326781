"""The region of interest: what lies outside is not trained on, scored, counted or shown, in torch and in files."""

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import ImageBatch
from lightning import Callback, LightningModule, seed_everything
from sklearn.metrics import roc_auc_score

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.decisions.region_files import read_region_settings
from cflow_plugin.metrics.evaluator import CflowEvaluator
from cflow_plugin.model.scoring import cells_inside
from cflow_plugin.training.interest import find_interest

from .conftest import QUICK, make_engine, make_textures

BOX = [[0.25, 0.25, 0.75, 1.0]]


def test_boxes_polygons_files_foregrounds_and_borders(textures, tmp_path):
    images = textures.train_dataloader()
    expected = np.zeros((64, 64), bool)
    expected[16:, 16:48] = True

    def find(given, border=0):
        return find_interest(given, border, (64, 64), images, tmp_path).numpy()

    assert find(None).shape == (1, 1)
    assert np.array_equal(find(BOX), expected)
    assert np.array_equal(find([[0.25, 0.25, 0.75, 0.25, 0.75, 1, 0.25, 1]]), expected)
    cv2.imwrite(str(tmp_path / "mask.png"), np.kron(expected, np.ones((3, 2))).astype(np.uint8) * 255)
    assert np.array_equal(find(str(tmp_path / "mask.png")), expected)
    bordered = find(BOX, border=5)
    expected[-5:] = False
    assert np.array_equal(bordered, expected)
    picture = cv2.imread(str(tmp_path / "region_of_interest.png")).mean(2)
    assert picture[expected].mean() > 2 * picture[~expected].mean()
    bright, dark = find("bright"), find("dark")
    assert bright.any()
    assert dark.any()
    assert not (bright & ~bright).any()
    for wrong in ([[0.1, 0.2, 0.3]], [[0, 0, 100, 100]]):
        with pytest.raises(CflowError, match="in shares of the width and height"):
            find(wrong)
    with pytest.raises(CflowError, match="is empty"):
        find(None, border=32)
    with pytest.raises(CflowError, match=r"nowhere\.png"):
        find(str(tmp_path / "nowhere.png"))


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    """A model that looks at a part of its pictures, the bank it was trained from, and its folder."""
    folder = tmp_path_factory.mktemp("looking")
    seed_everything(0)
    model = CflowPlugin(
        **{**QUICK, "epochs": 2, "steps_per_epoch": 5}, target_false_alarm_rate=0.2, region_of_interest=BOX
    )
    banks = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            banks.append(pl_module.calibration.bank)

    data = make_textures(tmp_path_factory.mktemp("data"), train_good=16)
    make_engine(folder, callbacks=[Keep()]).fit(model, datamodule=data)
    return model.eval(), banks[0], folder


@pytest.mark.long
def test_what_lies_outside_is_neither_trained_on_nor_scored(looking, tmp_path):
    model, bank, folder = looking
    interest = model.model.scoring.interest
    for positions, size in zip(bank.positions, bank.sizes, strict=True):
        assert torch.equal(positions, cells_inside(interest, size).flatten().nonzero()[:, 0])
    again = CflowPlugin.load_from_checkpoint(next(folder.rglob("model.ckpt")), map_location="cpu").eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[..., :2, :] = 1 - changed[..., :2, :]  # far enough from the region for the encoder's filters
    with torch.no_grad():
        first, second, third = model.model(images), model.model(changed), again.model(images)
    outside = ~interest.expand(2, 1, -1, -1)
    assert (first.anomaly_map[outside] == 0).all()
    assert (first.anomaly_map[~outside] > 0).float().mean() > 0.9
    torch.testing.assert_close(second.pred_score, first.pred_score, rtol=0, atol=1e-5)
    torch.testing.assert_close(third.anomaly_map, first.anomaly_map, rtol=0, atol=0)
    # Every runtime, and what is drawn
    xml, onnx = model.to_openvino(tmp_path, input_size=(64, 64)), model.to_onnx(tmp_path, input_size=(64, 64))
    session = onnxruntime.InferenceSession(onnx)
    with torch.no_grad():
        expected = model(images[:1])
    found = session.run(["pred_score", "anomaly_map", "pred_mask"], {"input": images[:1].numpy()})
    np.testing.assert_allclose(found[0], expected.pred_score, atol=1e-5)
    np.testing.assert_allclose(found[1], expected.anomaly_map, atol=1e-4)
    assert not (found[2] & ~interest.numpy()).any()
    [outline] = read_region_settings(xml).outlines
    assert read_region_settings(onnx).outlines == [outline]
    np.testing.assert_allclose(np.ptp(outline, axis=0), [0.5, 0.75], atol=0.02)
    picture = (images[0].permute(1, 2, 0).numpy()[..., ::-1] * 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "one.png"), cv2.resize(picture, (256, 256)))
    watch(xml, str(tmp_path / "one.png"), tmp_path / "watched")
    drawn = cv2.imread(str(tmp_path / "watched/overlays/one.png"))
    assert (drawn[100:200, 62:70] == (255, 255, 0)).all(2).any(1).mean() > 0.9


def test_metrics_of_what_is_inside():
    interest = torch.zeros(8, 8, dtype=torch.bool)
    interest[2:, 3:] = True
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(4, 8, 8, generator=generator), torch.rand(4, 8, 8, generator=generator) > 0.8
    model = LightningModule()
    model.model = torch.nn.Module()
    model.model.scoring = torch.nn.Module()
    model.model.scoring.interest = interest
    batch = ImageBatch(image=torch.zeros(4, 3, 8, 8), anomaly_map=maps, gt_mask=masks, gt_label=masks.flatten(1).any(1),
                       pred_mask=(maps > 0.5) & interest)  # fmt: skip
    for inside_only in (True, False):
        evaluator = CflowEvaluator(inside_only)
        evaluator.on_test_batch_end(None, model, None, batch, 0)
        values = {metric.name: metric for metric in evaluator.test_metrics}
        where = interest.expand(4, -1, -1) if inside_only else torch.ones_like(masks)
        expected = roc_auc_score(masks[where], maps[where])
        assert values["pixel_AUROC"].compute().item() == pytest.approx(expected)
        found, truth = batch.pred_mask[where], masks[where]
        f1 = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert values["pixel_F1Score"].compute().item() == pytest.approx(f1.item())
