"""The encoder's weights: from timm's hub, from its cache, or from a local file."""

__all__ = ["load", "load_file", "load_pretrained", "read_weights"]

import logging
from pathlib import Path

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import get_session
from safetensors.torch import load_file as load_safetensors

from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.model.encoder import BACKBONES, Encoder

logger = logging.getLogger(__name__)


def load(encoder: Encoder, weights: str | Path | None, pre_trained: bool) -> None:
    """Load what a model's settings ask for.

    Args:
        encoder: The encoder.
        weights: A local file, or ``None``.
        pre_trained: Load timm's ImageNet weights where no file is given.

    Raises:
        CflowError: As :func:`load_file` and :func:`load_pretrained` do.
    """
    if weights is not None:
        load_file(encoder, weights)
    elif pre_trained:
        load_pretrained(encoder)
    else:
        logger.warning("The encoder is untrained, as asked; expect far less than with ImageNet weights.")


def load_pretrained(encoder: Encoder) -> None:
    """Load the ImageNet weights from timm's hub or its local cache.

    Args:
        encoder: The encoder.

    Raises:
        CflowError: If the weights are not in the cache and the hub cannot be reached.
    """
    if encoder.backbone == "gabor":
        logger.info("The encoder is a fixed bank of Gabor filters: nothing is downloaded.")
        return
    name = BACKBONES[encoder.backbone].weights if encoder.backbone in BACKBONES else encoder.backbone
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if repository:
        cached = try_to_load_from_cache(repository, "model.safetensors")
        if isinstance(cached, str):
            load_file(encoder, cached)
            return
    try:
        if repository:
            # One quick request: the hub's own client retries for most of a minute before it gives up.
            get_session().head(ENDPOINT, timeout=10)
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many unrelated types when it is offline
        msg = (
            f"The ImageNet weights {name!r} could not be fetched from timm's hub ({first_line(error)}). Connect "
            "to the internet once, or pass a local file with --model.weights FILE (.safetensors or .pth), or "
            "accept an untrained encoder with --model.pre_trained false."
        )
        raise CflowError(msg) from error
    encoder.load_weights(network.state_dict(), source=f"timm's {name}")
    logger.info("Loaded the encoder's weights from timm's %s.", name)


def load_file(encoder: Encoder, path: str | Path) -> None:
    """Load weights in timm's parameter names from a local file; see :meth:`Encoder.load_weights`.

    Args:
        encoder: The encoder.
        path: ``.safetensors``, or a ``.pth``/``.pt``/``.bin`` file that holds a state dict (no pickled objects).

    Raises:
        CflowError: If the file is missing, unreadable, lacks a needed tensor or has one of another shape.
    """
    encoder.load_weights(read_weights(path), source=str(path))
    logger.info("Loaded the encoder's weights from %s.", path)


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
            weights = weights.get("state_dict", weights)
    except Exception as error:  # truncated, foreign or unsafe files fail in many ways
        msg = (
            f"{path} could not be read as weights ({type(error).__name__}). It must be a .safetensors file or a "
            ".pth file with nothing but a state dict of tensors."
        )
        raise CflowError(msg) from error
    return weights
