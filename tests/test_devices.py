"""A model trained, tested and exported on a device that is not the CPU, which no machine of ours has."""

from pathlib import Path

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils import backend_registration

from cflow_plugin import CflowPlugin, Spade

from .conftest import QUICK, call_in_a_copy, make_engine, make_textures
from .test_export import run_openvino

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no device that is written in Python",
)
RESNET = {"backbone": "test_resnet", "layers": [0, 1], "pre_trained": False}
SETTINGS = {
    "default": {"image_size": (48, 48)},  # so small that it is tried whether a map comes out
    "int8": {**RESNET, "encoder_precision": "int8"},
    "tiles": {"image_size": (96, 96), "tile_size": 64},
    "paper": {"whiten": False, "noise": 0.0, "unseen_share": 0.0, "aggregation": "probability", "permutation": "soft"},
}


def mixed_devices_are_refused():
    from .pretended_device import DEVICE, Pretending, lack_doubles

    with Pretending():
        layer, values = torch.nn.Linear(3, 2).to(DEVICE), torch.ones(4, 3)
        assert layer.weight.device == layer(values.to(DEVICE)).device == DEVICE
        with pytest.raises(RuntimeError, match="two devices"):
            layer(values)
        with pytest.raises(RuntimeError, match="two devices"):
            layer.weight.detach()[torch.tensor([0])].add_(torch.ones(1, 3))
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=DEVICE, generator=torch.Generator())
        double = values.to(DEVICE).double()
        lack_doubles()
        with pytest.raises(TypeError, match="float64"):
            double.add(1)
        with pytest.raises(TypeError, match="float64"):
            values.to(DEVICE).double()
        with pytest.raises(RuntimeError, match="not supported"):
            layer.weight.detach().numpy()
        layer(values.to(DEVICE)).sum().backward()
        torch.testing.assert_close(layer.weight.grad.cpu(), torch.full((2, 3), 4.0))


def run(folder, model, data, **settings):
    engine = make_engine(folder, inference_mode=False, **settings)
    engine.fit(model, datamodule=data)
    [metrics] = engine.test(model, datamodule=data, verbose=False)
    batches = engine.predict(model, datamodule=data)
    return metrics, *(torch.cat([getattr(one, name).cpu() for one in batches]) for name in ("pred_score", "pred_label"))


def train_here_and_there(folder, name, settings, doubles=True):
    from .pretended_device import DEVICE, PretendedAccelerator, Pretending, lack_doubles

    if not doubles:
        lack_doubles()
    folder = Path(folder)
    data = make_textures(folder / "data", train_good=30, test_good=4)
    length = {"epochs": 2, "steps_per_epoch": 3, "target_false_alarm_rate": 0.2} if name == "CflowPlugin" else {}

    def model():
        seed_everything(0)
        return {"CflowPlugin": CflowPlugin, "Spade": Spade}[name](**settings, **length, visualizer=False)

    expected, scores, labels = run(folder / "here", model(), data)
    strategy = SingleDeviceStrategy(device=DEVICE, accelerator=PretendedAccelerator())
    with Pretending():
        trained, seen = model(), set()
        trained.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].device))
        found, *rest = run(folder / "there", trained, data, accelerator="auto", strategy=strategy)
        assert seen == {DEVICE}
        if name == "CflowPlugin":
            file = trained.to(DEVICE).to_openvino(folder, input_size=settings["image_size"])
    torch.testing.assert_close(rest[0], scores, rtol=0, atol=1e-5)
    assert torch.equal(rest[1], labels)
    assert found == pytest.approx(expected, abs=1e-3)
    if name == "CflowPlugin":
        batch = next(iter(data.test_dataloader()))
        of_file = run_openvino(file, batch.image[:1])
        assert of_file["pred_score"].item() == pytest.approx(scores[0].item(), abs=1e-4)


def test_the_device_refuses_what_a_gpu_would():
    call_in_a_copy(mixed_devices_are_refused)


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(name, marks=pytest.mark.long) for name in list(SETTINGS)[1:])]
)
def test_on_another_device_it_is_the_same_model(tmp_path, name):
    call_in_a_copy(train_here_and_there, str(tmp_path), "CflowPlugin", {**QUICK, **SETTINGS[name]})


@pytest.mark.long
def test_on_a_device_without_doubles_it_is_the_same_model(tmp_path):
    call_in_a_copy(train_here_and_there, str(tmp_path), "CflowPlugin", QUICK, False)


@pytest.mark.long
def test_on_another_device_spade_is_the_same(tmp_path):
    settings = {"backbone": "gabor", "layers": ["scale1", "scale2"], "image_layer": "scale2"}
    call_in_a_copy(train_here_and_there, str(tmp_path), "Spade", settings)
