"""Masks from annotations of COCO, YOLO, LabelMe, VIA or CVAT."""

__all__ = ["make_masks"]

import logging
from pathlib import Path

from cflow_plugin.data.annotations import write_masks

logger = logging.getLogger(__name__)


def make_masks(annotations: Path, images: Path, output: Path = Path("masks")) -> None:
    """Make masks for the test out of annotations, for anomalib's --data.mask_dir.

    Args:
        annotations: A file of COCO (.json), VIA (.json), LabelMe (.json) or CVAT (.xml, "for images"); or a folder of
            LabelMe's .json or YOLO's .txt files, named as the images are. Boxes and polygons of all classes count.
        images: Folder of the annotated images of defects.
        output: Folder for the masks, which are called as the images are.
    """
    count = write_masks(annotations, images, output)
    logger.info("%d masks are in %s; test with --data.mask_dir %s.", count, output.resolve(), output)
