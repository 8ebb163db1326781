"""Files with random damage: a loader returns something of the right kind or complains in a sentence, and no more."""

import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.import_checkpoint import import_checkpoint
from cflow_plugin.commands.watch.timeline import read_truth
from cflow_plugin.data.textures import draw
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.decisions.score_tables import read_scores
from cflow_plugin.images.reading import read_image, unreadable
from cflow_plugin.model.weights import read_weights
from cflow_plugin.training.checkpoints import CheckpointFiles

PICTURE = Image.fromarray(draw("weave", "hole", "test", 3, size=64).image)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".webp": "WEBP", ".ppm": "PPM"}
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def damage(data: bytes, where: list[float], what: list[int], length: float) -> bytes:
    """Change bytes at relative places, and cut."""
    changed = bytearray(data)
    for place, value in zip(where, what, strict=False):
        changed[int(place * (len(changed) - 1))] = value
    return bytes(changed[: int(length * len(changed))])


# Headers are the interesting part: half of all places are near the beginning.
PLACES = st.lists(st.one_of(st.floats(0, 0.02), st.floats(0, 1)), min_size=1, max_size=12)
VALUES = st.lists(st.integers(0, 255), min_size=12, max_size=12)
LENGTHS = st.one_of(st.just(1.0), st.floats(0, 1))


@pytest.mark.parametrize(
    "suffix", [pytest.param(suffix, marks=[pytest.mark.long] * (suffix not in {".png", ".jpg"})) for suffix in FORMATS]
)
def test_images(suffix, tmp_path):
    whole = io.BytesIO()
    PICTURE.save(whole, FORMATS[suffix])
    path = tmp_path / f"image{suffix}"

    @MANY
    @given(PLACES, VALUES, LENGTHS)
    def check(where, what, length):
        path.write_bytes(damage(whole.getvalue(), where, what, length))
        complaint = None
        try:
            image = read_image(path)
        except CflowError as error:
            complaint = str(error)
        if complaint is not None:
            assert str(path) in complaint
            assert unreadable([path])
            return
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3

    check()


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """A good file for each loader."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(checkpoint, folder / "model.ckpt")
    weights = {"conv1.weight": torch.randn(8, 3, 3, 3), "bn1.bias": torch.randn(8)}
    save_file(weights, folder / "weights.safetensors")
    torch.save(weights, folder / "weights.pth")
    torch.save({"encoder_state_dict": weights, "decoder_state_dict": [weights]}, folder / "mvtec_resnet18_x.pt")
    np.save(folder / "truth.npy", np.arange(50) % 2)
    (folder / "truth.csv").write_text("start,end\n2,4\n9,9\n")
    (folder / "scores.csv").write_text("frame,image,time,score\n0,a.png,0.0,0.5\n1,b.png,0.1,0.25\n")
    return folder


LOADERS = {
    "model.ckpt": lambda path: CheckpointFiles().load_checkpoint(path),
    "model.ckpt, as a model": lambda path: CflowPlugin.load_from_checkpoint(path),
    "model.ckpt, its scores": read_reference_scores,
    "weights.safetensors": read_weights,
    "weights.pth": read_weights,
    "mvtec_resnet18_x.pt": lambda path: import_checkpoint(path, "resnet18", path.with_suffix(".ckpt")),
    "truth.npy": read_truth,
    "truth.csv": read_truth,
    "scores.csv": read_scores,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * ("ckpt" in name or name.startswith("mvtec"))) for name in LOADERS],
)
def test_other_files(name, files, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    source = files / name.split(",")[0]
    whole, path = source.read_bytes(), tmp_path / source.name

    @settings(MANY, max_examples=50 if name.endswith("model") else 100)  # a model is built anew each time
    @given(PLACES, VALUES, LENGTHS)
    def check(where, what, length):
        path.write_bytes(damage(whole, where, what, length))
        complaint = None
        try:
            LOADERS[name](path)
        except CflowError as error:
            complaint = str(error)
        assert complaint is None or len(complaint) > 20

    check()


@pytest.mark.parametrize("header", [b"{\x00", b"{'descr': '<i8', 'shape': (", b"\xff" * 20])
def test_a_header_of_numpy_s_that_python_cannot_parse(header, tmp_path):
    path = tmp_path / "truth.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(CflowError, match="could not be read as a NumPy array"):
        read_truth(path)


def test_no_file_was_harmed_by_the_damage(files):
    """The undamaged files are read, so the test above is not one of refusals alone."""
    for name, load in LOADERS.items():
        if not name.startswith("mvtec"):  # a mere stand-in, refused for its shapes
            load(Path(files / name.split(",")[0]))
