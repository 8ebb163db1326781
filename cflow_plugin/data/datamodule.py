"""Data module of the procedural textures."""

__all__ = ["Textures"]

from dataclasses import asdict
from pathlib import Path

from anomalib.data import AnomalibDataModule
from anomalib.data.datasets import MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

from cflow_plugin.data.textures import Recipe, generate_category


class Textures(AnomalibDataModule):
    """Procedural textures with exactly known defects, generated on first use.

    The files have the MVTec AD layout and are read by anomalib's own data set. anomalib's data module of MVTec AD fits
    thresholds on the very images it then tests on, because that data set has no validation part. This one has: labelled
    images of other pieces, so thresholds and test results are independent.

    Args:
        root: Folder of the data set; see ``generate_category`` for what is written there.
        category: ``brushed_metal``, ``grille``, ``mosaic``, ``terrazzo``, ``weave`` or ``wood_grain``.
        resolution: Width and height of the generated images in pixels, at least 64.
        train_good: Number of training images, all without a defect.
        test_good: Number of test images without a defect.
        test_defect: Number of test images for each of the category's five or six kinds of defect.
        val_good: Number of validation images without a defect.
        val_defect: Number of validation images for each kind of defect.
        seed: Seed of the generated images, and of the split where a split mode makes one at random.
        train_batch_size: Batch size in training.
        eval_batch_size: Batch size in validation and test.
        num_workers: Processes that load images. None by default: these images are few and small, and reading them all
            takes less time than starting workers, which Lightning does anew in every epoch.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations where there are none for the stage.
        test_split_mode: Where test images come from.
        val_split_mode: Where validation images come from; by default from their own folder.
        val_split_ratio: Share of the training or test images taken for validation, in the modes that do so.

    Raises:
        CflowError: If the category is unknown or a number out of range.

    Example:
        >>> from cflow_plugin.data import Textures
        >>> datamodule = Textures(category="weave")
        >>> datamodule.prepare_data()  # doctest: +SKIP
        >>> datamodule.setup()  # doctest: +SKIP
        >>> next(iter(datamodule.train_dataloader())).image.shape  # doctest: +SKIP
        torch.Size([32, 3, 256, 256])
    """

    def __init__(
        self,
        root: Path | str = "./datasets/Textures",
        category: str = "weave",
        resolution: int = 256,
        train_good: int = 40,
        test_good: int = 16,
        test_defect: int = 6,
        val_good: int = 10,
        val_defect: int = 3,
        seed: int = 0,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_DIR,
        val_split_ratio: float = 0.5,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root)
        self.category = category
        self.recipe = Recipe(
            category=category,
            resolution=resolution,
            seed=seed,
            train_good=train_good,
            test_good=test_good,
            test_defect=test_defect,
            val_good=val_good,
            val_defect=val_defect,
        )

    def prepare_data(self) -> None:
        """Generate the category's images unless they are there.

        Raises:
            CflowError: If there are images of other settings, or the folder cannot be written.
        """
        generate_category(self.root, **asdict(self.recipe))

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TRAIN)
        self.test_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TEST)
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            # The layout has no name for validation images, so they are the test part of a data set of their own.
            self.val_data = MVTecADDataset(root=self.root / "validation", category=self.category, split=Split.TEST)
