"""The export of a model, as anomalib asks for it: files that are there whole or not at all."""

__all__ = ["FoldedExport"]

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin import ExportMixin
from torchmetrics import Metric
from torchvision.transforms.v2 import Normalize

from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.decisions.reference_scores import KEY
from cflow_plugin.deploy.graph import (
    InferenceGraph,
    convert_to_openvino,
    free_dimensions,
    note_in_onnx,
    split_transform,
)
from cflow_plugin.deploy.quantization import check_data, compress
from cflow_plugin.deploy.runtime import ENCODER_KEY
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_folder
from cflow_plugin.model.torch_model import CflowModel

# Where a mixin stands in front of it, anomalib's module is what self is.
_Base = AnomalibModule if TYPE_CHECKING else ExportMixin


class FoldedExport(_Base):
    """Export with the decoders folded, and with what a file says of its decisions."""

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
            **kwargs: More arguments of :func:`torch.onnx.export`.

        Returns:
            The file's path.
        """
        self.check_exportable()
        # What the exporter writes by itself; an older version would be asked of it in vain.
        kwargs = {"opset_version": 18, "verbose": False, "dynamic_shapes": free_dimensions(input_size), **kwargs}
        path = _folder(export_root, ExportType.ONNX) / f"{model_file_name}.onnx"
        with atomic_folder(path.parent, last=path.name) as partial:
            written = InferenceGraph(self, input_size).to_onnx(partial, model_file_name, input_size, **kwargs)
            note_in_onnx(written, self._notes())
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
            datamodule: Its training images calibrate INT8_PTQ and INT8_ACQ; its validation images measure ``metric``.
            metric: anomalib metric for INT8_ACQ; by default the image F1 score.
            task: Ignored; results are images' and pixels' alike.
            max_drop: How much of the metric INT8_ACQ may lose.
            ov_kwargs: More arguments of :func:`openvino.convert_model`.
            onnx_kwargs: Ignored; nothing goes through ONNX.

        Returns:
            The .xml file's path.

        Raises:
            CflowError: If the model is not trained, or data are needed and not given.
        """
        del task, onnx_kwargs
        self.check_exportable()
        kind = None if compression_type is None else CompressionType(compression_type)
        if kind is not None:
            check_data(kind, datamodule)  # before the slow conversion
        model = convert_to_openvino(self, input_size, **(ov_kwargs or {}))
        if kind is not None:
            model = compress(model, kind, datamodule, metric, max_drop)
        for key, value in self._notes().items():
            model.set_rt_info(value, key)
        path = _folder(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
        with atomic_folder(path.parent, last=path.name) as partial:
            openvino.save_model(model, partial / path.name, compress_to_fp16=kind == CompressionType.FP16)
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

    def _notes(self) -> dict[str, str]:
        """What a file says of its encoder and of the reference images: their scores, normalised as its own are."""
        encoder = self.model.encoder
        size, interpolation, rest = split_transform(getattr(self.pre_processor, "transform", None))
        about: dict[str, Any] = {"backbone": encoder.backbone, "layers": encoder.layers, "weights": encoder.source}
        about |= {"image_size": size, "interpolation": interpolation}
        for part in rest.modules() if rest else ():
            if isinstance(part, Normalize):
                about |= {"mean": list(part.mean), "std": list(part.std)}
        notes = {ENCODER_KEY: json.dumps(about)}
        if isinstance(self.post_processor, ConformalPostProcessor) and self.post_processor.is_calibrated:
            notes[KEY] = json.dumps(self.post_processor.normalized_reference_scores.tolist())
        return notes


def _folder(export_root: Path | str, kind: ExportType) -> Path:
    """Where anomalib looks for files of a kind."""
    folder = Path(export_root) / "weights" / kind.value
    folder.mkdir(parents=True, exist_ok=True)
    return folder
