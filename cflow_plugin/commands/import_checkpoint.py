"""A checkpoint of the original CFLOW-AD code as one of this package's: the same likelihoods, in anomalib."""

__all__ = ["import_checkpoint"]

import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import lightning
import numpy as np
import torch
from anomalib.data import PredictDataset
from rich.progress import track
from torch import nn

from cflow_plugin.decisions.conformal import check_enough
from cflow_plugin.decisions.reference_images import choose_reference
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.images.reading import check_images, unreadable
from cflow_plugin.model.backbones import BACKBONES
from cflow_plugin.model.encoder import Padding
from cflow_plugin.model.flow import CouplingBlock
from cflow_plugin.training.lightning_model import CflowPlugin

if TYPE_CHECKING:
    from cflow_plugin.decisions.post_processing import ConformalPostProcessor

logger = logging.getLogger(__name__)

EncoderName = Literal["mobilenet_v3_large", "resnet18", "wide_resnet50_2"]
DatasetName = Literal["mvtec", "stc"]

_CLAMP = 1.9  # not in the checkpoint: a constant of the original code
_NORMALIZATION = {
    "mvtec": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "stc": ([0.5] * 3, [0.225] * 3),
}
# Batch norm's epsilon in torchvision's MobileNetV3, from which the original code's is taken, and in timm's.
_MOBILENET_EPSILON, _TIMM_EPSILON = 1e-3, 1e-5
_CALIBRATION_IMAGES = 128
_DEFAULT_RATE = 0.05


@dataclass(frozen=True)
class _Source:
    """One of the original code's encoders, in terms of this package.

    Attributes:
        backbone: timm's name.
        layers: What the original code hooks, fine to coarse; models of fewer scales do without the first ones.
        padding: What its convolutions see beyond the border.
    """

    backbone: str
    layers: tuple[str, ...]
    padding: Padding


_SOURCES: Mapping[str, _Source] = {
    "resnet18": _Source("resnet18", ("layer2", "layer3", "layer4"), "reflect"),
    "wide_resnet50_2": _Source("wide_resnet50_2", ("layer2", "layer3", "layer4"), "reflect"),
    # The projections themselves, in front of their batch norms and of the shortcuts.
    "mobilenet_v3_large": _Source(
        "mobilenetv3_large_100",
        ("blocks.2.2.conv_pwl", "blocks.4.1.conv_pwl", "blocks.5.2.conv_pwl"),
        "zeros",
    ),
}


def import_checkpoint(
    checkpoint: Path,
    encoder: EncoderName,
    output: Path = Path("model.ckpt"),
    images: Path | None = None,
    held_out_images: Path | None = None,
    target_false_alarm_rate: float | None = None,
    image_size: tuple[int, int] | None = None,
    dataset: DatasetName | None = None,
) -> None:
    """Turn a checkpoint of the original CFLOW-AD code (github.com/gudovskiy/cflow-ad) into a CflowPlugin checkpoint.

    The result gives the same log-likelihoods and works with `anomalib predict`, `test` and `export --model CflowPlugin
    --ckpt_path`. Nothing but tensors is read from the file: pickled code in it is never run.

    Name --images, too: the original normalises scores over its test set, so its checkpoints hold nothing that a single
    image could be scored by. From good images (best those it was trained on) come the constants of the scores. Without
    them, the result has likelihoods, but refuses to score.

    A threshold takes good images that it was not trained on: name them with --held_out_images. Where --images were not
    trained on either, --target_false_alarm_rate alone holds a part of them out. Without a threshold, the result gives
    scores and maps, and decides nothing.

    Args:
        checkpoint: The original's .pt file. It may be given without the option, as the first argument.
        encoder: The original's --enc-arch.
        output: The file to write.
        images: Folder of good images.
        held_out_images: Folder of other good images, not trained on, whose scores set the threshold.
        target_false_alarm_rate: Share of good images that may be called anomalous; 0.05 with --held_out_images.
        image_size: Height and width that images are resized to. By default what the original wrote into the file's
            name (…_inp256_…), or else 256×256.
        dataset: Whose normalisation of colours the original used. By default what the file's name begins with, or else
            mvtec, which is that of ImageNet.

    Raises:
        CflowError: If the file is not such a checkpoint or does not fit the encoder, if there are no images in a
            folder, or too few for the rate, or if the output cannot be written.
    """
    if output.is_dir() or not output.resolve().parent.is_dir():
        msg = f"{output} cannot be written: it must be a file in an existing folder; choose another --output."
        raise CflowError(msg)
    if images is None and (held_out_images, target_false_alarm_rate) != (None, None):
        msg = "A threshold takes scores, and scores take --images: name a folder of good images."
        raise CflowError(msg)
    files, held_out = _choose_images(images, held_out_images, target_false_alarm_rate) if images else ([], [])
    encoder_weights, decoders = _read(checkpoint)
    size = _size_from_name(checkpoint) if image_size is None else (image_size[0], image_size[1])
    if dataset is None:
        dataset = "stc" if checkpoint.name.startswith("stc_") else "mvtec"
    model = _build(checkpoint, encoder, encoder_weights, decoders, size, dataset)
    if files:
        _calibrate(model, files)
        _set_threshold(model, held_out, target_false_alarm_rate)
    else:
        logger.warning("Without --images the model is not calibrated: it has likelihoods, but cannot score images.")
    _save(model, output)
    logger.info(
        "%s: %s of %d scales, %s decoders of %d blocks, images of %d×%d pixels, %s normalisation.",
        output, encoder, len(decoders), "conditional" if decoders[0].condition_dims else "unconditional",
        len(decoders[0].blocks), *size, dataset,
    )  # fmt: skip


@dataclass(frozen=True)
class _Decoder:
    """One decoder's weights and what they say of its shape."""

    dimensions: int
    condition_dims: int
    blocks: list[dict[str, torch.Tensor]]

    @property
    def is_hard(self) -> bool:
        """Whether all its permutations merely change the order."""
        return all(bool(((matrix == 0) | (matrix == 1)).all()) for matrix in self.permutations)

    @property
    def permutations(self) -> list[torch.Tensor]:
        return [block["w_perm"] for block in self.blocks]


def _read(path: Path) -> tuple[Mapping[str, torch.Tensor], list[_Decoder]]:
    """The encoder's weights and the decoders of a checkpoint."""
    if not path.is_file():
        msg = f"There is no checkpoint at {path}."
        raise CflowError(msg)
    if not zipfile.is_zipfile(path):
        msg = f"{path} is no checkpoint, or is cut off: copy or download it again."
        raise CflowError(msg)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        msg = (
            f"{path} holds Python objects other than tensors, which are not loaded because they could run anything. "
            "Only a file that the original code's save_weights wrote can be imported."
        )
        raise CflowError(msg) from error
    except Exception as error:  # a damaged or foreign archive fails in many ways
        msg = f"{path} could not be read as a checkpoint ({type(error).__name__}): it is damaged, or something else."
        raise CflowError(msg) from error
    parts = content if isinstance(content, dict) else {}
    encoder, decoders = parts.get("encoder_state_dict"), parts.get("decoder_state_dict")
    if not _is_state_dict(encoder) or not _are_state_dicts(decoders):
        found = f"holds {', '.join(map(str, list(parts)[:4]))}" if parts else f"is a {type(content).__name__}"
        msg = (
            f"{path} is not a checkpoint of the original CFLOW-AD code: it {found} in place of the weights in "
            "encoder_state_dict and one entry a scale in decoder_state_dict."
        )
        raise CflowError(msg)
    if not 1 <= len(decoders) <= 3:
        msg = f"{path} holds {len(decoders)} decoders; the original code has one for each of one to three scales."
        raise CflowError(msg)
    parsed = [_parse(decoder, f"decoder {number} of {path}") for number, decoder in enumerate(decoders, 1)]
    if len({(decoder.condition_dims, len(decoder.blocks)) for decoder in parsed}) > 1:
        msg = f"The decoders of {path} differ in their number of coupling blocks or the length of their condition."
        raise CflowError(msg)
    return encoder, parsed


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, torch.Tensor]]:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, torch.Tensor) for part in value.values())


def _are_state_dicts(value: object) -> TypeGuard[list[Mapping[str, torch.Tensor]]]:
    return isinstance(value, list) and all(map(_is_state_dict, value))


def _parse(weights: Mapping[str, torch.Tensor], what: str) -> _Decoder:
    """Sort a decoder's weights by coupling blocks, and check what loading them would not."""
    blocks: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"module_list\.(\d+)\.(.+)", name)
        if match is None:
            msg = f"There is a weight {name} in {what}, which no decoder of the original code has."
            raise CflowError(msg)
        if not torch.isfinite(tensor).all():
            msg = f"There are NaN or infinite values in {name} of {what}."
            raise CflowError(msg)
        blocks.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    ordered = [blocks[index] for index in sorted(blocks)]
    needed = {"global_scale", "global_offset", "w_perm", "w_perm_inv"}
    needed |= {f"subnet.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    for index, block in enumerate(ordered):
        if sorted(blocks) != list(range(len(blocks))) or set(block) != needed:
            odd = ", ".join(sorted(needed ^ set(block))) or "its number"
            msg = f"Coupling block {index} of {what} is not one of the original code's: it differs in {odd}."
            raise CflowError(msg)
        matrix = block["w_perm"]
        dimensions = block["global_scale"].numel()
        square = matrix.shape == (dimensions, dimensions)
        if not square or not torch.allclose(matrix @ matrix.T, torch.eye(dimensions), atol=1e-3):
            msg = (
                f"The permutation of coupling block {index} of {what} is not an orthogonal matrix of its {dimensions} "
                "dimensions: the file is damaged."
            )
            raise CflowError(msg)
    dimensions = ordered[0]["global_scale"].numel()
    inputs = ordered[0]["subnet.0.weight"].shape[-1]
    return _Decoder(dimensions, inputs - (dimensions - dimensions // 2), ordered)


def _build(
    path: Path,
    encoder: str,
    encoder_weights: Mapping[str, torch.Tensor],
    decoders: Sequence[_Decoder],
    size: tuple[int, int],
    dataset: str,
) -> CflowPlugin:
    """The model that the weights belong to, with the weights in it."""
    source = _SOURCES[encoder]
    found = [decoder.dimensions for decoder in decoders]
    expected = list(BACKBONES[source.backbone].channels[-len(decoders) :])
    if found != expected:
        fitting = [
            name for name, other in _SOURCES.items() if found == list(BACKBONES[other.backbone].channels[-len(found) :])
        ]
        msg = (
            f"The decoders of {path} take features of {_enumerate(found)} channels, but {encoder} gives "
            f"{_enumerate(expected)}. " + (f"Pass --encoder {fitting[0]}." if fitting else "No known encoder fits.")
        )
        raise CflowError(msg)
    condition_dims = decoders[0].condition_dims
    if condition_dims < 0 or condition_dims % 4:
        msg = f"The decoders of {path} take a condition of {condition_dims} values; it must be a multiple of four."
        raise CflowError(msg)
    mean, std = _NORMALIZATION[dataset]
    model = CflowPlugin(
        backbone=source.backbone,
        layers=list(source.layers[-len(decoders) :]),
        pre_trained=False,
        image_size=size,
        condition_dims=condition_dims,
        coupling_blocks=len(decoders[0].blocks),
        clamp=_CLAMP,
        permutation="random" if all(decoder.is_hard for decoder in decoders) else "soft",
        neighbourhood=1,
        padding=source.padding,
        whiten=False,
        noise=0.0,
        sigma=0.0,
        top_fraction=0.0,
        position_correction=0.0,
        aggregation="probability",
        map_mean=0.0,
    ).eval()
    model.pre_processor = CflowPreProcessor.of(size, mean, std)
    ours = model.model.encoder
    if encoder.startswith("mobilenet"):
        encoder_weights = _in_timm_names(encoder_weights, ours.network)
    ours.load_weights(encoder_weights, source=f"The encoder of {path}")
    for number, (decoder, flow) in enumerate(zip(decoders, model.model.decoders, strict=True), 1):
        couplings = [part for part in flow.modules() if isinstance(part, CouplingBlock)]
        for index, (block, target) in enumerate(zip(decoder.blocks, couplings, strict=True)):
            weights = {name: tensor for name, tensor in block.items() if not name.startswith("w_perm")}
            if target.rotation is None:
                weights["permutation"] = block["w_perm"].argmax(1)
            else:
                weights["rotation"] = block["w_perm"]
            try:
                target.load_state_dict(weights)
            except RuntimeError as error:
                msg = f"The weights of coupling block {index} of decoder {number} of {path} do not fit together."
                raise CflowError(msg) from error
    return model


def _enumerate(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _in_timm_names(weights: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the feature part of torchvision's MobileNetV3 in timm's names.

    torchvision numbers what timm calls by name: ``4.block.1.0`` is the depthwise convolution in the fourth block.
    """
    blocks = list(dict.fromkeys(re.findall(r"(?m)^(blocks\.\d+\.\d+)\.", "\n".join(network.state_dict()))))
    names = {"0.0": "conv_stem", "0.1": "bn1"}
    for number, block in enumerate(blocks, 1):
        parts = sorted({int(part) for part in re.findall(rf"(?m)^{number}\.block\.(\d+)\.", "\n".join(weights))})
        squeeze = [part for part in parts if f"{number}.block.{part}.fc1.weight" in weights]
        convolutions = [part for part in parts if part not in squeeze]
        # The first block has nothing to expand.
        roles = ["conv_pw", "conv_dw", "conv_pwl"] if len(convolutions) == 3 else ["conv_dw", "conv_pw"]
        for index, (part, role) in enumerate(zip(convolutions, roles, strict=False), 1):
            names[f"{number}.block.{part}.0"] = f"{block}.{role}"
            names[f"{number}.block.{part}.1"] = f"{block}.bn{index}"
        for part in squeeze:
            names[f"{number}.block.{part}.fc1"] = f"{block}.se.conv_reduce"
            names[f"{number}.block.{part}.fc2"] = f"{block}.se.conv_expand"
    renamed = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            if kind == "running_var":
                # What timm's epsilon lacks is added to the variance, which is the same function.
                tensor = tensor + (_MOBILENET_EPSILON - _TIMM_EPSILON)
            renamed[f"{names[module]}.{kind}"] = tensor
    return renamed


def _size_from_name(path: Path) -> tuple[int, int]:
    match = re.search(r"_inp(\d+)_", path.name)
    return (int(match[1]), int(match[1])) if match else (256, 256)


def _choose_images(
    folder: Path, held_out_folder: Path | None, rate: float | None
) -> tuple[Sequence[Path], Sequence[Path]]:
    """The images that set the constants, and those that set the threshold, if any do."""
    found = _find_images(folder, "--images")
    if held_out_folder is not None:
        held_out = _find_images(held_out_folder, "--held_out_images")
        check_enough(len(held_out), _DEFAULT_RATE if rate is None else rate)
        return found, held_out
    if rate is None:
        return found, []
    chosen = set(choose_reference(len(found), rate, share=0.5, seed=0))
    return [file for index, file in enumerate(found) if index not in chosen], [found[index] for index in sorted(chosen)]


def _find_images(folder: Path, option: str) -> list[Path]:
    """The images of a folder."""
    if not folder.is_dir():
        msg = f"There is no folder {folder}; name a folder of good images with {option}."
        raise CflowError(msg)
    try:
        found = PredictDataset(folder)
    except ValueError as error:
        msg = f"There is no image in {folder}; name a folder of good images with {option}."
        raise CflowError(msg) from error
    check_images(found.image_filenames)
    return sorted(found.image_filenames)


@torch.no_grad()
def _calibrate(model: CflowPlugin, files: Sequence[Path]) -> None:
    """Set the scoring constants from good images."""
    chosen = np.unique(np.linspace(0, len(files) - 1, _CALIBRATION_IMAGES).round().astype(int))
    likelihoods = [
        model.model.log_likelihoods(_prepared(model, files[index]))
        for index in track(chosen, description="Calibrating", transient=True)
    ]
    model.model.calibrate([torch.cat(scale) for scale in zip(*likelihoods, strict=True)])
    logger.info("The scores' constants are of %d good images.", len(chosen))


@torch.no_grad()
def _set_threshold(model: CflowPlugin, files: Sequence[Path], rate: float | None) -> None:
    """Set the threshold by good images that were not trained on."""
    if not files:
        logger.warning(
            "There is no threshold: the model gives scores and maps, and decides nothing. Good images that it was not "
            "trained on set one: --held_out_images."
        )
        return
    processor = cast("ConformalPostProcessor", model.post_processor)
    processor.target_false_alarm_rate = _DEFAULT_RATE if rate is None else rate
    scores, maxima = [], []
    for file in track(files, description="Held-out images", transient=True):
        result = model.model(_prepared(model, file))
        scores.append(result.pred_score)
        maxima.append(result.anomaly_map.amax((1, 2, 3)))
    processor.calibrate(torch.cat(scores), torch.cat(maxima))
    model.reference.files = list(map(str, files))
    logger.info("%s", processor.describe())


def _prepared(model: CflowPlugin, file: Path) -> torch.Tensor:
    """One image as the model takes it."""
    assert model.pre_processor is not None
    try:
        image = torch.as_tensor(PredictDataset(file)[0].image)
    except Exception as error:  # a damaged file fails in many ways
        raise CflowError(unreadable([file]) or str(error)) from error
    return model.pre_processor(image[None])


def _save(model: CflowPlugin, output: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
    }
    model.on_save_checkpoint(checkpoint)
    try:
        with atomic_file(output) as partial:
            torch.save(checkpoint, partial)
    except OSError as error:
        msg = f"{output} could not be written ({error.strerror or error}); choose another --output."
        raise CflowError(msg) from error
