"""Each change to anomalib, Lightning and torch, with and without it: one that is no longer needed fails a test here.

``startup.py`` has test_startup.py to itself.
"""

import errno
import importlib.util
import logging
import os
import re
import sys

import anomalib.data
import anomalib.models
import pytest
import timm
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, MVTecAD, UnknownDatamoduleError, get_datamodule
from anomalib.data.utils import path as anomalib_paths
from anomalib.models import UnknownModelError, get_model
from anomalib.post_processing import PostProcessor
from lightning import Trainer
from lightning.pytorch.trainer import trainer as lightning_trainer
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

from cflow_plugin import CflowPlugin, Spade
from cflow_plugin.anomalib_patches import error_hook
from cflow_plugin.anomalib_patches.augmentations import resize_as_model_does
from cflow_plugin.anomalib_patches.error_hook import explain
from cflow_plugin.anomalib_patches.file_names import accept_any_language
from cflow_plugin.anomalib_patches.run_length import is_open
from cflow_plugin.anomalib_patches.thresholds import set_thresholds
from cflow_plugin.anomalib_patches.traced_checks import is_shape_check
from cflow_plugin.data import Textures
from cflow_plugin.model.encoder import Encoder

from .conftest import QUICK, make_engine, make_textures, run_command, run_warm
from .test_distributed import config_file

# run_length.py


def test_a_trainer_knows_whether_its_length_was_asked_for():
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    limits = lightning_trainer._parse_loop_limits  # what a trainer calls when it begins to train
    for given, expected in ((None, True), (1000, False), (8, False)):
        trainer.fit_loop.max_epochs = limits(None, -1, None, given, trainer)[1]
        assert is_open(trainer) is expected
    # Lightning by itself cannot tell; when this fails, ours can go.
    assert limits.__wrapped__(None, -1, None, None, trainer) == limits.__wrapped__(None, -1, None, 1000, trainer)


# registration.py


def test_registration(tmp_path):
    assert anomalib.models.Spade is Spade
    model = get_model({"class_path": "CflowPlugin", "init_args": {"backbone": "gabor"}})
    assert type(model) is CflowPlugin
    data = get_datamodule({"class_path": "Textures", "init_args": {"root": str(tmp_path)}})
    assert type(data) is Textures


def test_without_registration(monkeypatch, tmp_path, caplog):
    """anomalib looks for names nowhere but in its own packages."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.delattr(anomalib.models, "CflowPlugin")
    monkeypatch.delattr(anomalib.data, "Textures")
    with pytest.raises((UnknownModelError, AttributeError)):
        get_model({"class_path": "CflowPlugin", "init_args": {"backbone": "gabor"}})
    with pytest.raises(UnknownDatamoduleError):
        get_datamodule({"class_path": "Textures", "init_args": {"root": str(tmp_path)}})


# seed.py


@pytest.mark.parametrize("honoured", [True, False])
def test_seed(monkeypatch, tmp_path, honoured):
    """The command line, up to where it has built model and data."""
    if not honoured:
        monkeypatch.setattr(AnomalibCLI, "instantiate_classes", AnomalibCLI.instantiate_classes.__wrapped__)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    command = ["train", "--model", "CflowPlugin", "--model.backbone", "gabor", "--model.coupling_blocks", "1"]
    command += ["--data", "Textures", "--seed_everything", "7", "--trainer.accelerator", "cpu"]
    AnomalibCLI(args=command, run=False)
    assert torch.initial_seed() == (7 if honoured else 1)


# file_names.py

NAME = "größer – 大.png"


def fresh(module):
    """A second copy of a module, as it is without changes."""
    spec = importlib.util.spec_from_file_location("fresh", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_file_names(tmp_path):
    (tmp_path / NAME).touch()
    assert anomalib_paths.validate_path(tmp_path / NAME) == tmp_path / NAME
    with pytest.raises(ValueError, match="non-printable"):
        anomalib_paths.validate_path(f"{tmp_path}/a\nb.png", should_exist=False)


def test_without_file_names(monkeypatch, tmp_path):
    (tmp_path / NAME).touch()
    theirs = fresh(anomalib_paths)
    with pytest.raises(ValueError, match="non-printable"):
        theirs.validate_path(tmp_path / NAME)
    monkeypatch.setattr(anomalib_paths, "contains_non_printable_characters", theirs.contains_non_printable_characters)
    with pytest.raises(ValueError, match="non-printable"):
        anomalib_paths.validate_path(tmp_path / NAME)
    accept_any_language()
    assert anomalib_paths.validate_path(tmp_path / NAME) == tmp_path / NAME


# error_hook.py: each of the messages as anomalib itself raises it


def no_folder(folder):
    Folder(name="mine", root=folder, normal_dir="good").setup()


def no_image(folder):
    (folder / "good").mkdir()
    Folder(name="mine", root=folder, normal_dir="good").setup()


def no_image_of_mvtec_ad(folder):
    (folder / "screw").mkdir()
    MVTecAD(root=folder, category="screw").setup()


def a_link_to_nowhere(folder):
    (folder / "good").mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32)).save(folder / f"good/{number}.png")
    (folder / "good/5.png").symlink_to("nowhere")
    Folder(name="mine", root=folder, normal_dir="good").setup()


def one_image(folder):
    (folder / "good").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "good/0.png")
    Folder(name="mine", root=folder, normal_dir="good").setup()


MISTAKES = {
    no_folder: "Path does not exist.*Check --data.root",
    no_image: "no image where some are needed.*Check --data.root",
    no_image_of_mvtec_ad: "no image where some are needed.*Check --data.root",
    a_link_to_nowhere: "links in it that lead nowhere",
    one_image: "too few images to split",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_error_hook(mistake, tmp_path, monkeypatch):
    with pytest.raises(Exception) as caught:  # noqa: PT011  what it is, is what is tested
        mistake(tmp_path)
    sentence = explain(caught.value)
    assert sentence is not None
    assert re.search(MISTAKES[mistake], sentence), sentence
    # Without the words nothing tells it apart from any other error: it has no type of its own, and says no remedy.
    assert type(caught.value).__module__ == "builtins"
    assert "--data.root" not in str(caught.value)
    monkeypatch.setattr(error_hook, "_OF_ANOMALIB", {})
    assert explain(caught.value) is None


def test_every_word_of_the_error_hook_is_tested(tmp_path):
    needed = set()
    for number, mistake in enumerate(MISTAKES):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Exception) as caught:  # noqa: PT011
            mistake(folder)
        needed |= {words for words in error_hook._OF_ANOMALIB if words in str(caught.value)}
    assert needed == set(error_hook._OF_ANOMALIB)


def test_the_same_words_of_others_are_not_explained():
    with pytest.raises(ValueError, match="Found 0 ") as caught:
        raise ValueError("Found 0 coins in my pocket")
    assert explain(caught.value) is None


@pytest.mark.parametrize("may_be_read", [True, False])
def test_what_may_not_be_read_is_no_place_to_write(may_be_read, tmp_path, monkeypatch):
    file = tmp_path / "0.png"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK or may_be_read or path != str(file))
    sentence = explain(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file)))
    assert sentence.startswith(f"{file}: Permission denied.")
    assert ("read it" in sentence) == (not may_be_read)
    assert ("--default_root_dir" in sentence) == may_be_read
    sentence = explain(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "new/0.png")))
    assert "--default_root_dir" in sentence


@pytest.mark.parametrize("loaded", [True, False])
def test_the_hook_comes_after_rich_s(loaded):
    """With the command line's module comes a hook that shows a hundred lines; ours has to be the later one."""
    before = sys.excepthook
    try:
        fresh(sys.modules["anomalib.cli.cli"])  # as it is without us
        assert sys.excepthook is not before
        assert sys.excepthook.__module__.startswith("rich")
        if loaded:
            error_hook.install_excepthook()
            assert sys.excepthook.__module__ == error_hook.__name__
    finally:
        sys.excepthook = before


# telemetry.py


@pytest.mark.long
@pytest.mark.parametrize(("switched", "found"), [(True, "MagicMock"), (False, "NNCFTelemetry")])
def test_telemetry(tmp_path, switched, found):
    code = "from cflow_plugin.anomalib_patches.telemetry import switch_off_telemetry\n" * switched
    code += "switch_off_telemetry()\n" * switched
    code += "from nncf.telemetry import wrapper\nprint(type(wrapper.telemetry).__name__)"
    out = run_command("python", "-c", code, cwd=tmp_path, PYTHONWARNINGS="ignore")
    assert out.splitlines()[-1] == found


# results_folder.py; with it: test_distributed.py

SEPARATE = """
import cflow_plugin.training.distributed

cflow_plugin.training.distributed.share_results_folder = lambda trainer: None

from anomalib.cli.cli import main

main()
"""


@pytest.mark.long
def test_without_a_shared_results_folder(tmp_path):
    (tmp_path / "separate.py").write_text(SEPARATE)
    command = [str(tmp_path / "separate.py"), "train", "--config", config_file(tmp_path), "--default_root_dir", "out"]
    command += ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    status, out = run_warm(command, tmp_path, {**os.environ})
    assert status == 0, out[-4000:]
    folders = [path for path in (tmp_path / "out/CflowPlugin/Textures/weave").iterdir() if not path.is_symlink()]
    assert len(folders) == 2


# augmentations.py


@pytest.mark.parametrize("brought_in_line", [True, False])
def test_augmentations(tmp_path, textures, brought_in_line):
    data = make_textures(textures.root)
    model = CflowPlugin(**QUICK, epochs=1, steps_per_epoch=1)
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=data)
    assert data.test_data[0].image.shape[-2:] == (64, 64)
    model.pre_processor = CflowPlugin.configure_pre_processor((96, 80))
    if brought_in_line:
        resize_as_model_does(data)
    assert data.test_data[0].image.shape[-2:] == ((96, 80) if brought_in_line else (64, 64))
    assert not hasattr(data, "update_augmentations")


# thresholds.py


def test_thresholds():
    post_processor = PostProcessor()
    set_thresholds(post_processor, 0.25, torch.tensor(0.75))
    assert post_processor.image_threshold == 0.25
    assert post_processor.pixel_threshold == 0.75


@pytest.mark.parametrize("name", ["image_threshold", "pixel_threshold"])
def test_without_thresholds(name):
    with pytest.raises(AttributeError):
        setattr(PostProcessor(), name, torch.tensor(0.25))


# traced_checks.py


def test_traced_checks():
    name, layer = "mobilenetv3_small_050", "blocks.1.0"
    graph = create_feature_extractor(timm.create_model(name), {layer: layer}).eval_graph
    graph.eliminate_dead_code()
    # Without us they stay, and hold on to layers far above.
    assert any(is_shape_check(node) for node in graph.nodes)
    assert any("blocks.4" in str(node.target) for node in graph.nodes)
    encoder = Encoder(name, [layer])
    assert not any(is_shape_check(node) for node in encoder.network.graph.nodes)
    assert not any("blocks.2" in weight or "blocks.4" in weight for weight in encoder.state_dict())


def test_errors_of_torch_and_of_large_files_are_explained(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 3).state_dict())
    assert "weights do not fit" in explain(caught.value)
    said = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"  # torch's words
    assert "--data.num_workers 0" in explain(RuntimeError(said))
    assert "ulimit -f" in explain(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
    assert explain(RuntimeError("something else")) is None
