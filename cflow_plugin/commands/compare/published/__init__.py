"""Figures that the paper publishes, as data: Tables 2 to 6 of Gudovskiy et al., WACV 2022, as tidy CSV files.

Encoders have timm's names, classes those of anomalib's MVTec AD, metrics those that anomalib logs; AUROC and AUPRO are
in percent. Figures of other methods are those the paper quotes. They stand as printed: PaDiM's AUPRO of leather
(88.8) and SPADE's of wood (97.4) do not fit the averages printed below them, which imply 97.8 and 87.4.
"""

__all__ = ["CAPTIONS", "published_table"]

from importlib.resources import files

import pandas as pd

CAPTIONS = {
    2: "Ablation on MVTec AD: localisation AUROC, %, mean and σ of four runs",
    3: "MVTec AD, each class: AUROC and AUPRO, %; CFLOW-AD at the best of three resolutions",
    4: "MVTec AD, mean over classes, %; CFLOW-AD with wide_resnet50_2",
    5: "ShanghaiTech Campus, mean over scenes, %; CFLOW-AD with wide_resnet50_2 at 256×256",
    6: "Speed and size; PaDiM and SPADE were timed on an Intel i7, the rest on a GTX 1080",
}
"""What each table shows."""


def published_table(number: int) -> pd.DataFrame:
    """One of the paper's tables, a figure a row.

    Args:
        number: 2 to 6, as in the paper. Table 6 has one row a model: ``fps_256`` and ``fps_512`` in images a second,
            and ``mvtec_mb`` and ``stc_mb``, the size of all parameters trained for either data set.
    """
    with (files(__name__) / f"table_{number}.csv").open() as file:
        return pd.read_csv(file)
