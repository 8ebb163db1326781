"""One line that says what is trained on what."""

__all__ = ["describe_run"]

from anomalib.models.components import AnomalibModule

from cflow_plugin.images.loading import data_module_of
from cflow_plugin.model.torch_model import CflowModel


def describe_run(module: AnomalibModule, model: CflowModel, images: int) -> str:
    """Say what is trained on what.

    Args:
        module: The model, attached to a trainer.
        model: Its encoder and decoders.
        images: Number of images that are trained on.

    Returns:
        A sentence, for example "Training CflowPlugin on 40 images of Textures, weave: resnet18 (layer2, layer3) at
        256×256 pixels, frozen; decoders of 2.3 million parameters; on cpu."
    """
    data = data_module_of(module.trainer)
    of = ", ".join(filter(None, (getattr(data, "name", ""), str(getattr(data, "category", "") or ""))))
    height, width = module.hparams["image_size"]
    parameters = sum(parameter.numel() for parameter in model.decoders.parameters()) / 1e6
    return (
        f"Training {type(module).__name__} on {images} images of {of}: {model.encoder.backbone} "
        f"({', '.join(model.encoder.layers)}) at {height}×{width} pixels, frozen; decoders of {parameters:.1f} million "
        f"parameters; on {module.device}."
    )
