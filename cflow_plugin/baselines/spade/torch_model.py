"""From an image to its anomaly map by nearest neighbours: encoder, gallery, smoothing."""

__all__ = ["SpadeModel"]

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur

from cflow_plugin.baselines.spade.gallery import Gallery
from cflow_plugin.errors import CflowError
from cflow_plugin.model.encoder import Encoder

# The scales of scores are medians over this many training images; any value of their order serves.
_CALIBRATION_IMAGES = 8


class SpadeModel(nn.Module):
    r"""SPADE without anything about its training.

    An image's score is its mean distance to the ``k`` nearest training images, by the encoder's last stage averaged
    over the image. Each position's is its mean distance to the ``kappa`` nearest positions of those images' pyramids;
    the map is upsampled bilinearly and smoothed with a Gaussian.

    Both are reported as :math:`d / (d + c)`, which lies below one and ranks as the distance does: torchmetrics takes
    scores above one for logits, batch by batch, and would saturate them. The constants :math:`c`, one for images and
    one for pixels, are medians of training images' distances to other training images.

    Args:
        backbone: Name of the encoder, see :class:`~cflow_plugin.model.encoder.Encoder`.
        layers: Layers of the pyramid.
        image_layer: Layer whose average describes the image.
        k: Training images to retrieve.
        kappa: Nearest positions to average over.
        sigma: Smoothing of the anomaly map, in pixels.
        half_precision: Keep the gallery's pyramids in float16.
        image_size: Height and width of the images, see :class:`~cflow_plugin.model.encoder.Encoder`.

    Raises:
        CflowError: If a setting is out of range, or the encoder cannot be built.

    References:
        Cohen, Hoshen: Sub-Image Anomaly Detection with Deep Pyramid Correspondences. arXiv:2005.02357, 2020.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        image_layer: str = "layer4",
        k: int = 50,
        kappa: int = 1,
        sigma: float = 4.0,
        half_precision: bool = False,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("k", k), ("kappa", kappa)):
            if value < 1:
                msg = f"{name} must be at least 1, got {value}."
                raise CflowError(msg)
        if not sigma >= 0:
            msg = f"sigma must not be negative, got {sigma}."
            raise CflowError(msg)
        if not layers:
            msg = "layers must name at least one layer of the encoder."
            raise CflowError(msg)
        self.layers = list(dict.fromkeys(layers))
        self.image_layer = image_layer
        self.k = k
        self.kappa = kappa
        self.sigma = sigma
        self.encoder = Encoder(backbone, list(dict.fromkeys([*layers, image_layer])), image_size=image_size)
        self.gallery = Gallery(len(self.layers), half_precision)
        self.image_scale: torch.Tensor
        self.pixel_scale: torch.Tensor
        self.register_buffer("image_scale", torch.tensor(float("nan")))
        self.register_buffer("pixel_scale", torch.tensor(float("nan")))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Describe images.

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            The pooled vectors ``(B, D)``, and the pyramid, for each scale ``(B, D_k, H_k, W_k)``, fine to coarse.
        """
        maps = dict(zip(self.encoder.layers, self.encoder(images), strict=True))
        # Distances are differences of large numbers; mixed precision ends here.
        maps = {layer: part.to(torch.promote_types(part.dtype, torch.float32)) for layer, part in maps.items()}
        pyramid = sorted((maps[layer] for layer in self.layers), key=lambda part: -part.shape[-2:].numel())
        return maps[self.image_layer].mean((2, 3)), pyramid

    @torch.no_grad()
    def finish_gallery(self) -> None:
        """Take what was added to the gallery, and learn the scales of scores from it.

        Raises:
            CflowError: If nothing was added.
        """
        gallery = self.gallery
        gallery.finish()
        # The nearest image to one in the gallery is itself; where it is the only one, any scale serves.
        distances, nearest = gallery.nearest_images(gallery.pooled, self.k + 1)
        self.image_scale.copy_(_median(distances[:, 1:].mean(1)))
        sizes = [tuple(size) for size in gallery.sizes.tolist()]
        self.pixel_scale.copy_(
            _median(
                torch.cat(
                    [
                        gallery.nearest_positions(
                            [part.to(gallery.pooled.dtype) for part in gallery.vectors(image)],
                            sizes,
                            [index for index in nearest[image, :2].tolist() if index != image][:1],
                            1,
                        ).flatten()
                        for image in range(min(_CALIBRATION_IMAGES, len(gallery)))
                    ]
                )
            )
        )

    @torch.no_grad()
    def distances(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the method's distances.

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            For each image its mean distance to the nearest training images, ``(B,)``, and for each position of the
            finest layer its mean distance to the nearest positions of those images, ``(B, H_0, W_0)``.
        """
        pooled, pyramid = self.features(images)
        # Autocasting the products of distances would leave three digits of them.
        with torch.autocast(images.device.type, enabled=False):
            distances, retrieved = self.gallery.nearest_images(pooled, self.k)
            sizes = [(part.shape[-2], part.shape[-1]) for part in pyramid]
            vectors = [part.flatten(2).transpose(1, 2) for part in pyramid]
            maps = [
                self.gallery.nearest_positions([part[index] for part in vectors], sizes, neighbours, self.kappa).mean(1)
                for index, neighbours in enumerate(retrieved.tolist())
            ]
        return distances.mean(1), torch.stack(maps).unflatten(1, sizes[0])

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Compute anomaly maps and image scores.

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            ``anomaly_map`` ``(B, 1, H, W)`` and ``pred_score`` ``(B,)``, both between 0 and 1.

        Raises:
            CflowError: If the model has not been trained.
        """
        if not len(self.gallery):
            msg = (
                "This model has not been trained. Run `anomalib train` first and pass the checkpoint it writes with "
                "--ckpt_path."
            )
            raise CflowError(msg)
        score, cells = self.distances(images)
        size = images.shape[-2:]
        anomaly_map = functional.interpolate(cells[:, None], size, mode="bilinear", align_corners=False)
        if self.sigma:
            # Cut after four standard deviations, and where a small image has no more to reflect.
            height, width = (2 * min(round(4 * self.sigma), side - 1) + 1 for side in size)
            anomaly_map = gaussian_blur(anomaly_map, [width, height], [self.sigma])
        return InferenceBatch(
            pred_score=score / (score + self.image_scale), anomaly_map=anomaly_map / (anomaly_map + self.pixel_scale)
        )


def _median(distances: torch.Tensor) -> torch.Tensor:
    """The median of the distances above zero, or one where there are none."""
    distances = distances[distances > 0]
    return distances.median() if len(distances) else distances.new_tensor(1.0)
