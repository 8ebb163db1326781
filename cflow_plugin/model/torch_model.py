"""From an image to its anomaly map (Figure 2): encoder, one decoder a scale, scoring."""

__all__ = ["CflowModel"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import nn

from cflow_plugin.errors import CflowError
from cflow_plugin.model.encoder import Encoder, Padding, Precision
from cflow_plugin.model.flow import ConditionalFlow, Permutation
from cflow_plugin.model.folded import FoldedModel
from cflow_plugin.model.position import positional_encoding_2d
from cflow_plugin.model.scoring import Aggregation, AnomalyScoring, cells_inside, fill_unknown, means_inside
from cflow_plugin.model.tiles import Span, Tiles, measure
from cflow_plugin.model.whole import WholeImage
from cflow_plugin.modules import ModuleListOf

# How much image scores differ is told well enough by those of so many images, or of so many pixels of them.
_FEWEST_SCORES, _MOST_PIXELS = 16, 128 * 256 * 256


class CflowModel(nn.Module):
    """CFLOW-AD without anything about its training.

    Args:
        backbone: Name of the encoder, see :class:`~cflow_plugin.model.encoder.Encoder`.
        layers: Layers of its feature pyramid, fine to coarse; see :class:`~cflow_plugin.model.encoder.Encoder`.
        condition_dims: Length of the positional condition; 0 makes unconditional decoders (UFLOW).
        coupling_blocks: Coupling blocks of each decoder; the paper has 8, which take twice the time.
        clamp: Soft clamp of the blocks' log-scales.
        permutation: Permutation between the blocks, see :class:`~cflow_plugin.model.flow.CouplingBlock`.
        neighbourhood: See :class:`~cflow_plugin.model.encoder.Encoder`.
        padding: What the convolutions see beyond the border, see :class:`~cflow_plugin.model.encoder.Encoder`.
        sigma: Smoothing of the anomaly map, in pixels.
        top_fraction: Part of the map's highest values that makes the image score.
        position_correction: See :class:`~cflow_plugin.model.scoring.AnomalyScoring`.
        aggregation: How the scales make one map, see :class:`~cflow_plugin.model.scoring.AnomalyScoring`.
        map_mean: What the map's mean counts in the image score, see
            :class:`~cflow_plugin.model.scoring.AnomalyScoring`.
        whole_image: What the image as a whole counts in its score, see :class:`~cflow_plugin.model.whole.WholeImage`.
        image_size: Height and width of the images in pixels, see :class:`~cflow_plugin.model.encoder.Encoder`.
        flow_dimensions: How many dimensions of a vector the coupling blocks take at most; ``None`` takes all. See
            :class:`~cflow_plugin.model.flow.Whitening`.
        tile_size: Larger images are seen in tiles of at most so many pixels in height and width. The image score is
            then read on as many pixels as in an image of 256×256, whatever the size.
        encoder_precision: See :class:`~cflow_plugin.model.encoder.Encoder`.

    Raises:
        CflowError: If a setting is out of range, or the encoder cannot be built.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str | int] | None = None,
        condition_dims: int = 128,
        coupling_blocks: int = 4,
        clamp: float = 1.9,
        permutation: Permutation = "swap",
        neighbourhood: int | Sequence[int] | None = None,
        padding: Padding = "zeros",
        sigma: float = 2.0,
        top_fraction: float = 0.0025,
        position_correction: float = 0.25,
        aggregation: Aggregation = "surprise",
        whole_image: float = 2.0,
        map_mean: float = 0.15,
        image_size: Sequence[int] | None = None,
        flow_dimensions: int | None = None,
        tile_size: int | None = None,
        encoder_precision: Precision = "float32",
    ) -> None:
        super().__init__()
        if condition_dims:
            positional_encoding_2d(condition_dims, 1, 1)  # refuses what is no length, before anything is loaded
        if flow_dimensions is not None and flow_dimensions < 2:
            msg = f"flow_dimensions must be at least 2, or null for all, got {flow_dimensions}."
            raise CflowError(msg)
        self.condition_dims = condition_dims
        self.tile_size = tile_size
        in_tiles = tile_size is not None and image_size is not None
        # It is never given more than a tile with its margins.
        encoder_size = (256, 256) if in_tiles else image_size
        self.encoder = Encoder(backbone, layers, neighbourhood, padding, encoder_size, encoder_precision)
        if tile_size is not None and image_size is not None:
            self._margin, self._strides = measure(self.encoder)
            self.encoder.image_size = (image_size[0], image_size[1])
            if tile_size < self._margin:
                msg = f"tile_size must be at least {self._margin} pixels for {backbone!r}, got {tile_size}."
                raise CflowError(msg)
        self.decoders = ModuleListOf[ConditionalFlow](
            ConditionalFlow(channels, condition_dims, coupling_blocks, clamp, permutation, flow_dimensions)
            for channels in self.encoder.channels
        )
        self.scoring = AnomalyScoring(
            len(self.decoders), sigma, top_fraction, position_correction, aggregation, map_mean
        )
        self.whole = WholeImage(sum(self.encoder.channels), whole_image)
        self.scoring.score_area = None if tile_size is None else 256 * 256
        self._conditions: dict[tuple[int, int], torch.Tensor] = {}
        self._folded: dict[tuple[int, int], FoldedModel] = {}
        self.register_load_state_dict_post_hook(_drop_folded)

    def condition(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """Condition vectors of a feature map, ``(height * width, C)``, on the device and in the dtype of ``like``."""
        if not self.condition_dims:
            return like.new_empty(height * width, 0)
        table = self._conditions.get((height, width))
        if table is None or table.device != like.device or table.dtype != like.dtype:
            table = positional_encoding_2d(self.condition_dims, height, width).to(like)
            self._conditions[height, width] = table
        return table

    def log_likelihoods(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Log-likelihood per dimension of the features at every scale and position (Eq. 8 divided by D).

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            For each scale ``(B, H_k, W_k)``, in nats per dimension.
        """
        if not self.training:
            return self.folded((images.shape[-2], images.shape[-1])).log_likelihoods(images)
        return self._log_likelihoods(self.encoder(images))

    def _log_likelihoods(self, pyramid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        result = []
        for decoder, features in zip(self.decoders, pyramid, strict=True):
            height, width = features.shape[-2:]
            vectors = features.flatten(2).transpose(1, 2)
            likelihood = decoder.log_likelihood(vectors, self.condition(height, width, vectors))
            result.append(likelihood.unflatten(1, (height, width)))
        return result

    def folded(self, size: tuple[int, int]) -> FoldedModel:
        """The model in its form for inference, made once and kept until the model changes.

        It is made anew after ``train()`` or ``eval()``, :meth:`calibrate`, ``load_state_dict()`` and a move to another
        device or number format. Who changes a tensor in place in eval mode calls :meth:`drop_folded` afterwards.

        Args:
            size: Height and width of the images.
        """
        found = self._folded.get(size)
        if found is None:
            found = FoldedModel(self.encoder, self.decoders, self.scoring, self.whole, size, self._tiles(size))
            self._folded = {size: found}  # one at a time: it is as large as the model
        return found

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The encoder's features, large images' tile by tile.

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            For each scale ``(B, D_k, H_k, W_k)``.
        """
        tiles = self._tiles((images.shape[-2], images.shape[-1]))
        if tiles is None:
            return self.encoder(images)

        def of_tile(part: torch.Tensor, row: Span, column: Span) -> list[torch.Tensor]:
            return [
                features[..., row.cells(stride), column.cells(stride)]
                for features, stride in zip(self.encoder(part), self._strides, strict=True)
            ]

        return tiles(images, of_tile)

    def _tiles(self, size: tuple[int, int]) -> Tiles | None:
        """How images of a size are cut, ``None`` where they are not."""
        if self.tile_size is None or max(size) <= self.tile_size:
            return None
        return Tiles(size, self.tile_size, self._margin)

    def drop_folded(self) -> None:
        """Let the next image fold the model anew."""
        self._folded = {}

    def fit_whitening(self, features: Sequence[torch.Tensor], changes: Sequence[torch.Tensor] | None = None) -> None:
        """Start the decoders from the features' covariance; see :meth:`Whitening.fit`.

        Args:
            features: For each scale ``(N, D_k)``, training features.
            changes: For each scale ``(M, D_k)``, by how much they differ between images of one part.
        """
        for scale, (decoder, vectors) in enumerate(zip(self.decoders, features, strict=True)):
            decoder.whitening.fit(vectors, None if changes is None else changes[scale])
        self.drop_folded()

    def calibrate(self, log_likelihoods: Sequence[torch.Tensor], unseen: Sequence[torch.Tensor] | None = None) -> None:
        """Set the scoring constants; see :meth:`AnomalyScoring.calibrate`.

        Args:
            log_likelihoods: For each scale ``(N, H_k, W_k)``, nats per dimension, of training features.
            unseen: The same of good images that were not trained on, if there are any.
        """
        self.scoring.calibrate(log_likelihoods, unseen)
        if self.whole.is_fitted or self.scoring.map_mean:
            tops, means = self._statistics_of(log_likelihoods)
            if self.whole.is_fitted:
                self.whole.calibrate(tops)
            if unseen is not None:  # it is these that differ as new images will
                more = self._statistics_of(unseen)
                tops, means = torch.cat([tops, more[0]]), torch.cat([means, more[1]])
            self.scoring.calibrate_mean(tops, means)
        self.drop_folded()

    def _statistics_of(self, log_likelihoods: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps' highest values and means of images; they are fewer where they are large."""
        sizes = [(values.shape[-2], values.shape[-1]) for values in log_likelihoods]
        height, width = self.encoder.image_size or (8 * sizes[0][0], 8 * sizes[0][1])
        scoring = self.scoring.folded(sizes, (height, width))
        images = min(len(log_likelihoods[0]), max(_FEWEST_SCORES, _MOST_PIXELS // (height * width)))
        # Of positions without a value the nearest one's is taken.
        known = [fill_unknown(values[:images]) for values in log_likelihoods]
        maps = (scoring([values[image, None] for values in known])[0] for image in range(images))
        tops, means = zip(*(scoring.statistics(one[:, 0]) for one in maps), strict=True)
        return torch.cat(tops), torch.cat(means)

    def train(self, mode: bool = True) -> "CflowModel":
        """Set the mode, and drop what was folded: training may have changed all it is made of."""
        self.drop_folded()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CflowModel":
        # What .to(), .half() and their like call.
        self.drop_folded()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed anew, so that a saved or copied model stays small."""
        return {**super().__getstate__(), "_folded": {}, "_conditions": {}}

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Compute anomaly maps and image scores. In eval mode no gradient reaches the parameters.

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            ``anomaly_map`` ``(B, 1, H, W)`` and ``pred_score`` ``(B,)``.

        Raises:
            CflowError: If the model has not been trained.
        """
        height, width = images.shape[-2:]
        folded = None if self.training else self.folded((height, width))
        if not (self.scoring if folded is None else folded).is_calibrated:
            msg = (
                "This model has not been trained, or was imported without images to calibrate it on. Pass the "
                "checkpoint that `anomalib train`, or `cflow-plugin import-checkpoint --images FOLDER`, writes with "
                "--ckpt_path."
            )
            raise CflowError(msg)
        if folded is not None:
            return folded(images)
        pyramid = self.encoder(images)
        anomaly_map, score = self.scoring(self._log_likelihoods(pyramid), (height, width))
        if self.whole.is_fitted:
            cells = [cells_inside(self.scoring.interest, part.shape[-2:]) for part in pyramid]
            score = self.whole(means_inside(pyramid, cells), score)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)


def _drop_folded(model: CflowModel, _: object) -> None:
    model.drop_folded()
