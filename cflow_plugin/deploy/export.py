"""The export of a model, as anomalib asks for it: files that are there whole or not at all."""

__all__ = ["FoldedExport"]

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin import ExportMixin
from torch import nn
from torchmetrics import Metric
from torchvision.transforms.v2 import Normalize, Resize

from cflow_plugin import __version__
from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.decisions.reference_images import ReferenceImages
from cflow_plugin.decisions.reference_scores import DECISIONS_KEY, KEY
from cflow_plugin.decisions.region_files import REGIONS_KEY, note_of
from cflow_plugin.decisions.regions import outlines_of
from cflow_plugin.deploy.eight_bits import onnx_translations
from cflow_plugin.deploy.fingerprint import FINGERPRINT, RELEASE, fingerprint_of
from cflow_plugin.deploy.graph import (
    InferenceGraph,
    convert_to_openvino,
    fix_batch,
    free_dimensions,
    with_decisions,
)
from cflow_plugin.deploy.model_info import model_info
from cflow_plugin.deploy.onnx_file import describe_onnx, note_in_onnx, settle_onnx
from cflow_plugin.deploy.openvino_input import take_bytes
from cflow_plugin.deploy.quantization import check_data, compress
from cflow_plugin.deploy.runtime import BITS, ENCODER_KEY
from cflow_plugin.deploy.thresholds import threshold_images, thresholds_of
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_folder
from cflow_plugin.images.loading import steps_of
from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.model.torch_model import CflowModel

logger = logging.getLogger(__name__)

_ONE_FILE = 1_900_000_000  # bytes; an ONNX file ends at 2 GiB

# Where a mixin stands in front of it, anomalib's module is what self is.
_Base = AnomalibModule if TYPE_CHECKING else ExportMixin


class FoldedExport(_Base):
    """Export with the decoders folded, and with what a file says of its decisions."""

    reference: ReferenceImages
    model: CflowModel  # pyright: ignore[reportIncompatibleVariableOverride]  never any other module

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, with the decoders folded.

        Args:
            export_root: Folder; the file lies in ``weights/onnx`` below it.
            model_file_name: Name of the file without its suffix.
            input_size: Height and width of the images; ``None`` takes images of any size.
            **kwargs: More arguments of :func:`torch.onnx.export`; and ``batch``, images at a time, by default 1,
                ``None`` for any number.

        Returns:
            The file's path.
        """
        self.check_exportable()
        batch = kwargs.pop("batch", 1)
        self._check_input(input_size, batch)
        graph = InferenceGraph(self, input_size)
        size = sum(value.nbytes for value in graph.state_dict().values())
        defaults = {
            "opset_version": 18,  # what the exporter writes by itself; an older version would be asked of it in vain
            "verbose": False,
            "dynamic_shapes": free_dimensions(input_size, batch),
            "external_data": size > _ONE_FILE,
        }
        if self.hparams.get("encoder_precision") == "int8":
            defaults["custom_translation_table"] = onnx_translations()
        options = {**defaults, **kwargs}
        path = _folder(export_root, ExportType.ONNX) / f"{model_file_name}.onnx"
        with atomic_folder(path.parent, last=path.name) as partial:
            written = graph.to_onnx(partial, model_file_name, input_size, **options)
            settle_onnx(written)
            info = model_info(self._bits(), input_size, takes_bytes=False)
            notes = self._notes(self.post_processor, openvino.Core().read_model(written))
            note_in_onnx(written, {**notes, **{f"model_info {name}": value for name, value in info.items()}})
        describe_onnx(path)
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO, with the decoders folded.

        Args:
            export_root: Folder; the files lie in ``weights/openvino`` below it.
            model_file_name: Name of the files without suffix.
            input_size: Height and width of the images; ``None`` takes images of any size.
            compression_type: ``FP16`` halves the file, ``INT8`` quarters the weights in it, ``INT8_PTQ`` also computes
                in 8 bits, ``INT8_ACQ`` does so only as far as ``metric`` allows.
            datamodule: The data the model was trained on. Its training images calibrate INT8_PTQ and INT8_ACQ; its
                validation images measure ``metric``. The images that thresholds come from are looked for in it, unless
                their files lie where they did in training: each compression has thresholds of its own.
            metric: anomalib metric for INT8_ACQ; by default the image F1 score.
            task: Ignored; results are images' and pixels' alike.
            max_drop: How much of the metric INT8_ACQ may lose.
            ov_kwargs: More arguments of :func:`openvino.convert_model`; and ``batch``, images at a time, by default 1,
                ``None`` for any number; and ``camera_bytes``, by which the file takes ``(B, H, W, 3)``, bytes, blue
                first (16-bit values of a camera with more bits), in place of ``(B, 3, H, W)`` between 0 and 1.
            onnx_kwargs: Nothing goes through ONNX; ``batch`` and ``camera_bytes`` may stand here, too.

        Returns:
            The .xml file's path.

        Raises:
            CflowError: If the model is not trained, or data are needed and not given.
        """
        del task
        self.check_exportable()
        arguments = {**(ov_kwargs or {})}
        options = {**arguments, **(onnx_kwargs or {})}  # the command line has the latter alone
        batch, camera_bytes = options.get("batch", 1), bool(options.get("camera_bytes", False))
        for name in ("batch", "camera_bytes"):
            arguments.pop(name, None)
        self._check_input(input_size, batch)
        kind = None if compression_type is None else CompressionType(compression_type.lower())
        if kind is not None:
            check_data(kind, datamodule)  # before the slow conversion
        post_processor, images = self.post_processor, None
        if kind is not None:
            images = threshold_images(self, datamodule)
        model = convert_to_openvino(self, input_size, **arguments)
        if kind is not None:
            files = self.reference.files
            model = compress(model, kind, datamodule, metric, max_drop, post_processor, leave_out=files)
        if images is not None:
            post_processor = thresholds_of(model, self, images)
        model = with_decisions(model, post_processor)
        if camera_bytes:
            take_bytes(model, self._bits())
        if "input" not in arguments:
            fix_batch(model, batch)
        for key, value in self._notes(post_processor, model).items():
            model.set_rt_info(value, key)
        for name, value in model_info(self._bits(), input_size, camera_bytes).items():
            model.set_rt_info(value, ["model_info", name])
        path = _folder(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
        with atomic_folder(path.parent, last=path.name) as partial:
            openvino.save_model(model, partial / path.name, compress_to_fp16=False)  # of thresholds no digit is lost
        return path

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export for PyTorch, as a pickle that anomalib's ``TorchInferencer`` reads.

        Args:
            export_root: Folder; the file lies in ``weights/torch`` below it.
            model_file_name: Name of the file without its suffix.

        Returns:
            The file's path.
        """
        path = _folder(export_root, ExportType.TORCH) / f"{model_file_name}.pt"
        with atomic_folder(path.parent, last=path.name) as partial:
            super().to_torch(partial, model_file_name)
        return path

    def check_exportable(self) -> None:
        """Refuse to export what cannot decide.

        Raises:
            CflowError: If the model is not trained, or was to keep a false-alarm rate and has no reference scores.
        """
        if not self.model.scoring.is_calibrated:
            msg = "Only a trained model can be exported: pass the checkpoint that training wrote with --ckpt_path."
            raise CflowError(msg)
        if isinstance(self.post_processor, ConformalPostProcessor) and self.post_processor.is_conformal:
            self.post_processor.check_calibrated()

    def _check_input(self, size: tuple[int, int] | None, batch: int | None) -> None:
        """Refuse what is no size, and warn of images that will show less than those of training."""
        if (size is not None and min(size) < 1) or (batch is not None and batch < 1):
            msg = f"input_size and batch must be at least 1, got {size} and {batch}; null leaves them open."
            raise CflowError(msg)
        trained = self.model.encoder.image_size or self.hparams["image_size"]
        if size is not None and any(given < own for given, own in zip(size, trained, strict=True)):
            logger.warning(
                "The file takes images of %d×%d pixels, and the model was trained at %d×%d. Images that are reduced "
                "for it show less than those of training, whose thresholds do not hold for them.",
                *size,
                *trained,
            )

    def _bits(self) -> int:
        """Bits of a value in the images."""
        bits = self.pre_processor.bits if isinstance(self.pre_processor, CflowPreProcessor) else None
        return bits or 8

    def _notes(self, post_processor: nn.Module | None, model: openvino.Model) -> dict[str, str]:
        """What a file says of images, encoder and decisions, and the reference images' scores, as its own are."""
        encoder = self.model.encoder
        about: dict[str, Any] = {"backbone": encoder.backbone, "layers": encoder.layers, "weights": encoder.source}
        for step in steps_of(getattr(self.pre_processor, "transform", None)):
            if isinstance(step, Resize):
                interpolation = getattr(step.interpolation, "value", "bilinear")
                about |= {"image_size": step.size, "interpolation": interpolation}
            elif isinstance(step, Normalize):
                about |= {"mean": list(step.mean), "std": list(step.std)}
        fingerprint = fingerprint_of(model, self._bits())
        notes = {BITS: str(self._bits()), ENCODER_KEY: json.dumps(about), RELEASE: __version__}
        if isinstance(post_processor, ConformalPostProcessor):
            notes[DECISIONS_KEY] = post_processor.describe()
            edges = outlines_of(self.model.scoring.interest.cpu().numpy())
            notes[REGIONS_KEY] = note_of(replace(post_processor.region_settings, outlines=edges))
            if post_processor.is_calibrated:
                notes[KEY] = json.dumps(post_processor.normalized_reference_scores.tolist())
                fingerprint["rate"] = post_processor.rate
        notes[FINGERPRINT] = json.dumps(fingerprint)
        return notes


def _folder(export_root: Path | str, kind: ExportType) -> Path:
    """Where anomalib looks for files of a kind."""
    folder = Path(export_root) / "weights" / kind.value
    folder.mkdir(parents=True, exist_ok=True)
    return folder
