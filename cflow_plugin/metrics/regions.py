"""How much each anomalous pixel counts when every anomalous region counts the same."""

__all__ = ["region_weights"]

import cv2
import numpy as np


def region_weights(masks: np.ndarray) -> np.ndarray:
    """Weigh each anomalous pixel by one over the number of pixels in its region.

    Regions are 8-connected and end with their image, as in MVTec's evaluation code and in anomalib.

    Args:
        masks: ``(B, H, W)`` bool.

    Returns:
        ``(P,)`` float64 in the order of ``masks[masks]``; the weights of a region sum to 1.
    """
    weights = [np.empty(0)]
    for mask in masks:
        if mask.any():
            _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            regions = labels[mask]
            weights.append(1 / np.bincount(regions)[regions])
    return np.concatenate(weights)
