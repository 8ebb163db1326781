"""Files made to run code or to write where they should not: nothing of it happens, and the user is told."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils.download import extract

from cflow_plugin import CflowError, CflowPlugin, Spade
from cflow_plugin.commands.compare.report import write_report
from cflow_plugin.commands.import_checkpoint import import_checkpoint
from cflow_plugin.commands.watch.timeline import read_truth
from cflow_plugin.data.clips import read_mask
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.weights import load_file

from .conftest import QUICK, make_engine


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (os.system, (f"touch '{self.proof}'",))


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """The file that hostile code would write; that it can is tried first. torch's weakest setting is chosen."""
    path = tmp_path / "proof"
    torch.save(Hostile(path), tmp_path / "try.pt")
    torch.load(tmp_path / "try.pt", weights_only=False)
    assert path.exists()
    path.unlink()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    return path


@pytest.fixture
def hostile(checkpoint, tmp_path, proof):
    """A checkpoint that is complete and right, but for one more entry."""
    path = tmp_path / "hostile.ckpt"
    torch.save({**torch.load(checkpoint, weights_only=True), "callbacks": {"mine": Hostile(proof)}}, path)
    return path


REFUSED = "other objects than tensors"


@pytest.mark.parametrize("use", ["fit", "test", "predict"])
def test_a_checkpoint_in_the_engine(hostile, proof, textures, tmp_path, use):
    model, engine = CflowPlugin(**QUICK), make_engine(tmp_path / "runs")
    with pytest.raises(CflowError, match=REFUSED):
        getattr(engine, use)(model, datamodule=textures, ckpt_path=hostile)
    assert not proof.exists()


def test_a_checkpoint_in_an_export(hostile, proof, tmp_path):
    with pytest.raises(CflowError, match=REFUSED):
        make_engine(tmp_path).export(CflowPlugin(**QUICK), "onnx", export_root=tmp_path, ckpt_path=hostile)
    assert not proof.exists()


def test_a_checkpoint_whose_scores_are_read(hostile, proof):
    with pytest.raises(CflowError, match="could not be read"):
        read_reference_scores(hostile)
    assert not proof.exists()


def test_a_checkpoint_for_spade(hostile, proof, textures, tmp_path):
    with pytest.raises(CflowError, match=REFUSED):
        make_engine(tmp_path / "runs").test(
            Spade(backbone="resnet18", layers=["layer1"], image_layer="layer2", pre_trained=False),
            datamodule=textures,
            ckpt_path=hostile,
        )
    assert not proof.exists()


def test_a_checkpoint_of_the_original_code(proof, tmp_path):
    path = tmp_path / "mvtec_resnet18_bottle.pt"
    torch.save({"encoder_state_dict": {}, "decoder_state_dict": [Hostile(proof)]}, path)
    with pytest.raises(CflowError, match="could run anything"):
        import_checkpoint(path, "resnet18", tmp_path / "model.ckpt")
    assert not proof.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors"])
def test_encoder_weights(name, proof, tmp_path):
    torch.save({"conv1.weight": Hostile(proof)}, tmp_path / name)
    with pytest.raises(CflowError, match="could not be read as weights"):
        load_file(Encoder("resnet18", ["layer1"]), tmp_path / name)
    assert not proof.exists()


def test_arrays(proof, tmp_path):
    path = tmp_path / "01_0001.npy"
    np.save(path, np.array([Hostile(proof)]), allow_pickle=True)
    with pytest.raises(CflowError):
        read_truth(path)
    with pytest.raises(ValueError, match=r"pickle|Python objects"):
        read_mask(path, 0)
    assert not proof.exists()


def test_archives_stay_in_their_folder(tmp_path):
    """The data sets' archives are unpacked by anomalib; that it does so safely is a promise of ours to users."""
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    with tarfile.open(inside / "data.tar", "w") as archive:
        for name in ("../../escaped", str(tmp_path / "absolute"), "good.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../.."
        archive.addfile(link)
        through = tarfile.TarInfo("link/through")
        through.size = 2
        archive.addfile(through, io.BytesIO(b"hi"))
    extract(inside / "data.tar", inside)
    with zipfile.ZipFile(inside / "data.zip", "w") as archive:
        archive.writestr("../../escaped", "hi")
        archive.writestr("better.txt", "hi")
    extract(inside / "data.zip", inside)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a/b/good.txt", "a/b/better.txt"} | ({"a/b/link/through"} & files)
    assert not (inside / "link").is_symlink()


def test_names_cannot_put_code_into_the_report(tmp_path):
    import pandas as pd

    bad = "<script>alert(1)</script>"
    row = {
        "key": "k", "model": bad, "anomalib_model": "CflowPlugin", "settings": "{}", "encoder": "gabor", "layers": "",
        "data": "Folder", "category": bad, "size": "64×64", "seed": 0, "image_AUROC": 0.5, "pixel_AUROC": 0.5,
        "pixel_AUPRO": 0.5, "train_seconds": 1.0, "test_seconds": 1.0, "image_ms": 1.0, "peak_memory_mb": 1.0,
        "size_mb": 1.0, "images": 4,
    }  # fmt: skip
    machine = {"processor": bad, "threads": 1, "versions": {"torch": "2"}, "date": "2026-01-01"}
    html = write_report(pd.DataFrame([row]), machine, tmp_path).read_text()
    assert "alert(1)" in html
    assert bad not in html
