"""The names that an encoder's weights have elsewhere: as trained, in torchvision, in Hugging Face's transformers."""

__all__ = ["layouts"]

import logging
import re
import sys
from collections.abc import Iterator, Mapping

import torch
from timm.models import model_entrypoint

from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.model.backbones import create
from cflow_plugin.model.encoder import Encoder

logger = logging.getLogger(__name__)

_PREFIX = re.compile(
    r"^(module|model|encoder|backbone|network|teacher|timm_model|trunk"
    r"|vision_model|vit|deit|dinov2\w*|dinov3\w*|siglip|convnext\w*)\."
)

# Of transformers' plain ViT, DeiT, DINOv2, DINOv3 and SigLIP.
_PLAIN = (
    (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^layers?\.", "blocks."),
    (r"\.(attention\.attention|attention|self_attn)\.(query|q_proj)\.", ".attn.q."),
    (r"\.(attention\.attention|attention|self_attn)\.(key|k_proj)\.", ".attn.k."),
    (r"\.(attention\.attention|attention|self_attn)\.(value|v_proj)\.", ".attn.v."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.up_proj|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"^(post_)?layernorm\.", "norm."),
)
# Of its ConvNeXt, and of DINOv3's.
_CONVNEXT = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsampl(ing|e)_layers?\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.(dwconv|depthwise_conv)\.", ".conv_dw."),
    (r"\.(layernorm|layer_norm)\.", ".norm."),
    (r"\.(pwconv|pointwise_conv)(\d)\.", r".mlp.fc\2."),
    (r"\.layer_scale_parameter$", ".gamma"),
)


def layouts(weights: Mapping[str, torch.Tensor], encoder: Encoder) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Weights under the names that they may have in timm, most likely first.

    Args:
        weights: Tensors under the names of a file.
        encoder: What they are for.

    Returns:
        How the names were mapped, for the log, and the tensors under the new names.

    Raises:
        CflowError: If the weights are of a variant of the network that timm has under another name.
    """
    yield "", weights
    plain = dict(weights)
    while any(map(_PREFIX.match, plain)):
        plain = {_PREFIX.sub("", name): tensor for name, tensor in plain.items()}
        yield ", a prefix of names left out", plain
    if any(name.startswith(("embeddings.", "stages.0.downsample_layers.")) for name in plain):
        plain = _from_transformers(plain, encoder)
        yield ", names mapped from transformers'", plain
    # Each of timm's files of models knows the layout of its authors' weights, and resamples position embeddings.
    names = vars(sys.modules[model_entrypoint(encoder.backbone).__module__])
    own = names.get("checkpoint_filter_fn") or names.get("_filter_fn")
    if own is not None:
        try:
            yield ", mapped as timm does", own(dict(plain), encoder.network)
        except Exception as error:
            logger.debug("timm's own mapping does not apply: %s", first_line(error))
    ordered = _in_order(plain, encoder.backbone)
    if ordered:
        yield ", names mapped by the order of tensors", ordered


def _from_transformers(weights: Mapping[str, torch.Tensor], encoder: Encoder) -> dict[str, torch.Tensor]:
    """Weights of a model of Hugging Face's transformers in timm's names."""
    needed = encoder.network.state_dict()
    convnext = any(re.search(r"\.(dwconv|depthwise_conv)\.", name) for name in weights)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        for pattern, replacement in _CONVNEXT if convnext else _PLAIN:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    if convnext:
        return found
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].reshape(1, *found["pos_embed"].shape[-2:])
        if "reg_token" in found:  # timm adds the class token's own beforehand: registers have none
            found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
            found["pos_embed"] = found["pos_embed"][:, 1:]
    if "blocks.0.gamma_1" in needed:
        found = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): tensor for name, tensor in found.items()}
    for query in [name for name in found if name.endswith(".attn.q.weight")]:
        attention = query.removesuffix("q.weight")
        parts = [found.pop(f"{attention}{part}.weight") for part in "qkv"]
        found[f"{attention}qkv.weight"] = torch.cat(parts)
        biases = [found.pop(f"{attention}{part}.bias", parts[0].new_zeros(len(parts[0]))) for part in "qkv"]
        found[f"{attention}qkv.bias"] = torch.cat(biases)
        found[f"{attention}q_bias"], _, found[f"{attention}v_bias"] = biases
        unbiased = f"{attention}qkv.weight" in needed and not {f"{attention}qkv.bias", f"{attention}q_bias"} & set(
            needed
        )
        if unbiased and any(bias.any() for bias in biases):
            msg = (
                f"The weights have biases of queries and values, and {encoder.backbone!r} has none: take the network "
                "that timm has for them (of DINOv3's, the one with _qkvb in its name)."
            )
            raise CflowError(msg)
    return found


def _in_order(weights: Mapping[str, torch.Tensor], backbone: str) -> dict[str, torch.Tensor]:
    """Weights of a whole network in timm's names, if their sizes in order are those of timm's own.

    Implementations of one network define its layers in the order in which they run. For torchvision's EfficientNet,
    MobileNet, ConvNeXt and MNASNet the tests compare the outputs. A file may have sorted its names, as safetensors
    does, which not all sizes betray: so a norm's weight, bias, mean and variance must be called that, too.
    """
    given = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    try:
        with torch.device("meta"):
            wanted = create(backbone).state_dict()
    except Exception:
        return {}
    wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith("num_batches_tracked")}
    if [_role(*item) for item in given.items()] != [_role(*item) for item in wanted.items()]:
        return {}
    return {
        name: tensor.reshape(like.shape) for (name, like), tensor in zip(wanted.items(), given.values(), strict=True)
    }


def _role(name: str, tensor: torch.Tensor) -> tuple[str, torch.Size]:
    kind = name.rpartition(".")[2]
    return kind if kind in ("weight", "bias", "running_mean", "running_var") else "", tensor.squeeze().shape
