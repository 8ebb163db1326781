"""Large pictures tile by tile: the same as the whole, whatever the tiles, in torch and in files."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from lightning import seed_everything
from torch import nn

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.model.tiles import SEAMS, Tiles
from cflow_plugin.model.torch_model import CflowModel

from .conftest import QUICK, make_engine, make_textures

SIZE = (200, 360)  # no multiple of any stride
SEAM = 2e-3  # of maps between 0 and 1, which is what the documentation states


def model_of(tile, size=SIZE, backbone="resnet18", layers=("layer1", "layer2")):
    """A model with random weights that count, and the same scoring for all tiles."""
    torch.manual_seed(0)
    model = CflowModel(backbone, list(layers), coupling_blocks=2, image_size=size, tile_size=tile)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.whole.fit(torch.rand(20, sum(model.encoder.channels), generator=torch.Generator().manual_seed(2)))
        model.calibrate([part.clone() for part in model.train().log_likelihoods(images[..., :200, :200])])
    return model.eval(), images


def test_tiles_cover_all_once():
    for size, tile in (((3000, 4000), 1024), ((129, 1000), 128), ((64, 65), 64)):
        for spans, length in zip((Tiles(size, tile, 64).rows, Tiles(size, tile, 64).columns), size, strict=True):
            assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
            assert spans[-1].stop == length
            for span in spans:
                assert span.stop - span.start <= -(-tile // 32) * 32
                assert span.first == max(0, span.start - 64)
                assert span.last == min(length, span.stop + 64)


def test_the_whole_picture_s_features_likelihoods_and_maps():
    """Features of other tilings, and of none, are equal; so no seam shows, and a place is that of the whole picture."""
    (whole, images), (small, _), (large, _) = model_of(None), model_of(64), model_of(128)
    with torch.no_grad():
        for tiled in (small, large):
            assert tiled.scoring.score_area == 256**2
            for expected, found in zip(whole.features(images), tiled.features(images), strict=True):
                assert (found - expected).abs().max() <= SEAMS * expected.std()
            tiled.load_state_dict(whole.state_dict())
            tiled.eval()
            pairs = zip(whole.log_likelihoods(images), tiled.log_likelihoods(images), strict=True)
            for expected, found in pairs:
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(tiled(images).anomaly_map, whole(images).anomaly_map, rtol=0, atol=SEAM)
            tiled.scoring.score_area = None  # the score, what the image says as a whole included, is read alike
            tiled.drop_folded()
            torch.testing.assert_close(tiled(images).pred_score, whole(images).pred_score, rtol=0, atol=SEAM)
        # Nothing of the size of all positions is kept.
        assert all(block.position is None for flow in small.folded(SIZE).flows for block in flow.blocks)


def test_what_does_not_go_in_tiles():
    with pytest.raises(CflowError, match="tile_size takes a convolutional encoder"):
        CflowModel("vit_tiny_patch16_224", image_size=(512, 512), tile_size=256)
    with pytest.raises(CflowError, match="at least 64 pixels"):
        model_of(32)


def test_anomalib_s_tiler_is_refused(textures, tmp_path):
    model = CflowPlugin(**QUICK)
    with pytest.raises(CflowError, match=r"--model\.tile_size"):
        make_engine(tmp_path, callbacks=[TilerConfigurationCallback(enable=True)]).fit(model, datamodule=textures)


@pytest.mark.long
def test_trained_and_exported(tmp_path):
    """From training on whole pictures in tiles to files that take the whole picture."""
    seed_everything(0)
    model = CflowPlugin(
        **{**QUICK, "image_size": (128, 192), "tile_size": 96, "epochs": 1, "steps_per_epoch": 3},
        target_false_alarm_rate=0.2,
    )
    data = make_textures(tmp_path / "data", train_good=16, resolution=128)
    make_engine(tmp_path).fit(model, datamodule=data)
    assert data.train_batch_size == data.eval_batch_size == 1
    model = CflowPlugin.load_from_checkpoint(next(tmp_path.rglob("model.ckpt")), map_location="cpu").eval()
    assert model.model.folded((128, 192)).tiles is not None
    images = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    compiled = openvino.Core().compile_model(
        model.to_openvino(tmp_path, input_size=None), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled(images.numpy())
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path, input_size=(128, 192)))
    in_onnx = session.run(["anomaly_map", "pred_score", "pred_label"], {"input": images.numpy()})
    for anomaly_map, score, label in (
        (found["anomaly_map"], found["pred_score"], found["pred_label"]),
        in_onnx,
    ):
        np.testing.assert_allclose(anomaly_map, expected.anomaly_map, atol=1e-4)
        np.testing.assert_allclose(score, expected.pred_score, atol=1e-5)
        assert (np.asarray(label) == expected.pred_label.numpy()).all()
