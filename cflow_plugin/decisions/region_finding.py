"""Regions of maps and masks as models give them: the tensors' side of :mod:`~cflow_plugin.decisions.regions`."""

__all__ = ["FindsRegions"]

from collections.abc import Sequence

import numpy as np
import torch

from cflow_plugin.decisions.regions import Region, RegionSettings, find_regions, region_level, shown_mask


class FindsRegions:
    """What a post-processor does with regions."""

    _regions: RegionSettings

    @property
    def region_settings(self) -> RegionSettings:
        """Which regions are shown, and by which levels they have p-values."""
        return self._regions

    def levels(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """The highest level at which each map has a region that would be shown.

        Args:
            anomaly_map: Maps, normalised or not, ``(B, 1, H, W)``.

        Returns:
            ``(B,)``; without a smallest region the maps' highest values.
        """
        if self._regions.smallest == 1:
            return anomaly_map.flatten(1).amax(1)
        maps = anomaly_map.detach().flatten(0, -3).cpu().numpy()
        return anomaly_map.new_tensor([region_level(one, self._regions.smallest) for one in maps])

    def find_regions(
        self, anomaly_map: torch.Tensor, pred_mask: torch.Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[list[Region]]:
        """The regions of each image, see :func:`~cflow_plugin.decisions.regions.find_regions`.

        Args:
            anomaly_map: Maps as predicted (normalised), ``(B, 1, H, W)`` or ``(B, H, W)``.
            pred_mask: Masks as predicted, shaped as the maps.
            sizes: Height and width of each picture, if these are not the maps'.
        """
        settings, shape = self.region_settings, anomaly_map.shape[-2:]
        maps, masks = (part.detach().reshape(-1, *shape).cpu().numpy() for part in (anomaly_map, pred_mask))
        each = zip(maps, masks, sizes or [None] * len(maps), strict=True)
        return [find_regions(one, mask, settings, size) for one, mask, size in each]

    def _shown(self, anomaly_map: torch.Tensor | None, pred_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Masks without the regions that are not shown."""
        if anomaly_map is None or pred_mask is None or (self._regions.smallest == 1 and self._regions.most is None):
            return pred_mask
        shape = pred_mask.shape
        maps, masks = (part.detach().reshape(-1, *shape[-2:]).cpu().numpy() for part in (anomaly_map, pred_mask))
        shown = [shown_mask(one, mask, self._regions) for one, mask in zip(maps, masks, strict=True)]
        return torch.from_numpy(np.stack(shown)).to(pred_mask).reshape(shape)
