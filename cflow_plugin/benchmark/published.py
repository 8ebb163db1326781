"""Figures that the paper publishes, as data."""

__all__ = ["TABLE_6", "PublishedSpeed"]

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSpeed:
    """A row of Table 6.

    Attributes:
        model: Method, or ``encoder`` for the encoder alone.
        backbone: timm's name of the encoder.
        fps_256: Images a second at 256×256. PaDiM and SPADE were measured on an Intel i7, the rest on a GTX 1080.
        fps_512: The same at 512×512.
        size_mb: Size of all parameters in MB, for MVTec AD.
    """

    model: str
    backbone: str
    fps_256: float | None
    fps_512: float | None
    size_mb: float | None


TABLE_6 = (
    PublishedSpeed("encoder", "resnet18", 80, 62, 45),
    PublishedSpeed("PaDiM", "resnet18", 4.4, None, 170),
    PublishedSpeed("CFLOW-AD", "resnet18", 34, 12, 96),
    PublishedSpeed("encoder", "wide_resnet50_2", 62, 30, 268),
    PublishedSpeed("SPADE", "wide_resnet50_2", 0.1, None, 1400),
    PublishedSpeed("PaDiM", "wide_resnet50_2", 1.1, None, 3800),
    PublishedSpeed("CFLOW-AD", "wide_resnet50_2", 27, 9, 947),
    PublishedSpeed("encoder", "mobilenetv3_large_100", 82, 61, 12),
    PublishedSpeed("CFLOW-AD", "mobilenetv3_large_100", 35, 12, 25),
)
"""Gudovskiy et al., WACV 2022, Table 6."""
