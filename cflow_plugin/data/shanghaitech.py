"""ShanghaiTech Campus, a scene at a time, as single frames."""

__all__ = ["ShanghaiTechFrames", "ShanghaiTechFramesDataset"]

from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName, ValSplitMode, read_image
from pandas import DataFrame
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image, Mask

from cflow_plugin.data.clips import Clip, compare_labels_with_masks, find_clips, read_mask
from cflow_plugin.data.video_frames import extract_frames, extracted_frames
from cflow_plugin.errors import CflowError

_URL = "https://svip-lab.github.io/dataset/campus_dataset.html"
_PARTS = ("training/videos", "testing/frames", "testing/test_frame_mask", "testing/test_pixel_mask")
_SCENES = range(1, 13)
_SCENE_WITHOUT_TRUTH = 13


class ShanghaiTechFramesDataset(AnomalibDataset):
    """Frames, each with its label and mask.

    Args:
        samples: A row a frame, with ``image_path``, ``split``, ``label_index``, ``video``, and for test frames
            ``mask_path`` (a ``.npy`` file of the whole clip's masks) and ``frame`` (the position in it).
        augmentations: Augmentations of image and mask.
    """

    def __init__(self, samples: DataFrame, augmentations: Transform | None = None) -> None:
        super().__init__(augmentations)
        samples.attrs["task"] = "segmentation"
        self.samples = samples

    def __getitem__(self, index: int) -> ImageItem:
        """Read a frame, and of the masks that frame's alone.

        Raises:
            CflowError: If frame and mask differ in size.
        """
        row = self.samples.iloc[index]
        image = Image(read_image(row.image_path, as_tensor=True))
        size = tuple(image.shape[-2:])
        values = read_mask(row.mask_path, row.frame) if row.mask_path else np.zeros(size, np.uint8)
        if values.shape != size:
            message = (
                f"The mask of {row.image_path} is {values.shape} pixels and the image {size}; see {row.mask_path}."
            )
            raise CflowError(message)
        mask = Mask(torch.from_numpy(values))
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        return ImageItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(row.label_index),
            image_path=row.image_path,
            mask_path=row.mask_path,
        )


class ShanghaiTechFrames(AnomalibDataModule):
    """One scene of ShanghaiTech Campus for models of single images.

    The files are expected where anomalib's own ``ShanghaiTech`` has them, and must be downloaded by hand::

        <root>/training/videos/01_001.avi
               testing/frames/01_0014/000.jpg
               testing/test_frame_mask/01_0014.npy
               testing/test_pixel_mask/01_0014.npy

    Training frames are extracted from the videos on first use. A test frame's label is that of ``test_frame_mask``, and
    its mask that of ``test_pixel_mask``; where the two contradict each other, a warning says how often.

    Nothing is fitted on test frames: by default some training videos are held out for validation. They show nothing
    anomalous, so decision thresholds come from the highest scores among them.

    Args:
        root: Folder of the data set.
        scene: 1 to 12. Scene 13 has no ground truth to test on.
        frame_step: Train on every so many frames of the videos; neighbouring frames are nearly equal. 1 as in the
            paper.
        frame_cache: Folder for the extracted frames; by default ``training/extracted_frames`` below ``root``.
        train_batch_size: Batch size in training.
        eval_batch_size: Batch size in validation and test.
        num_workers: Processes that load images.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations where there are none for the stage.
        val_split_mode: Where validation images come from; ``from_train`` holds out whole videos.
        val_split_ratio: Share of the training videos (in ``from_test``, of the test frames) taken for validation.
        seed: Seed of the split, where a split mode makes one at random.

    Example:
        >>> from cflow_plugin.data import ShanghaiTechFrames
        >>> ShanghaiTechFrames(scene=1).category
        'scene_01'

    References:
        Liu, Luo, Lian, Gao: Future Frame Prediction for Anomaly Detection - A New Baseline. CVPR 2018.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/shanghaitech",
        scene: int = 1,
        frame_step: int = 10,
        frame_cache: Path | str | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root)
        self.scene = scene
        self.category = f"scene_{scene:02d}"
        self.frame_step = frame_step
        self.frame_cache = Path(frame_cache) if frame_cache else self.root / "training/extracted_frames"

    @property
    def _frame_folder(self) -> Path:
        return self.frame_cache / f"every_{self.frame_step}"

    def prepare_data(self) -> None:
        """Extract the scene's training frames unless they are there, and compare test labels with masks.

        Raises:
            CflowError: If there is no such scene, a setting is out of range, the data are not there, or something of
                them cannot be read.
        """
        self._check_settings()
        videos, clips = self._find_videos(), self._find_clips()
        extract_frames(videos, self._frame_folder, self.frame_step)
        compare_labels_with_masks(clips, self.frame_cache / "labels_by_mask")

    def _check_settings(self) -> None:
        # Not when the object is made: the command line would hide the sentence in a stack trace of its own.
        if self.scene == _SCENE_WITHOUT_TRUTH:
            message = "Scene 13 of ShanghaiTech has training videos only and no test ground truth; choose 1 to 12."
            raise CflowError(message)
        if self.scene not in _SCENES:
            message = f"ShanghaiTech has the scenes 1 to 12 to test on; there is no scene {self.scene}."
            raise CflowError(message)
        if self.frame_step < 1:
            message = f"frame_step must be 1 or more, got {self.frame_step}."
            raise CflowError(message)
        if not 0 < self.val_split_ratio < 1:
            message = f"val_split_ratio must lie between 0 and 1, got {self.val_split_ratio}."
            raise CflowError(message)

    def _find_videos(self) -> list[Path]:
        for part in _PARTS:
            if not (self.root / part).is_dir():
                message = (
                    f"ShanghaiTech Campus is not in {self.root}: there is no {part}. Download it by hand from {_URL} "
                    f"and unpack it so that {', '.join(_PARTS)} lie there, or name its folder with --data.root; "
                    "`cflow-plugin make-scenes --output FOLDER` draws a small stand-in."
                )
                raise CflowError(message)
        videos = sorted((self.root / "training/videos").glob(f"{self.scene:02d}_*.avi"))
        return videos or self._raise_no_scene("training video")

    def _find_clips(self) -> list[Clip]:
        return find_clips(self.root, self.scene) or self._raise_no_scene("test clip")

    def _raise_no_scene(self, what: str) -> NoReturn:
        there = {file.name[:2] for file in (self.root / "training/videos").glob("*_*.avi")}
        message = (
            f"There is no {what} of scene {self.scene} in {self.root}; there are training videos of the scenes "
            f"{', '.join(sorted(there)) or 'none'}."
        )
        raise CflowError(message)

    def _setup(self, _stage: str | None = None) -> None:
        self._check_settings()
        rows = []
        for video in self._find_videos():
            frames = extracted_frames(self._frame_folder, video.stem)
            if not frames:
                message = f"The frames of {video} have not been extracted; call prepare_data() first."
                raise CflowError(message)
            rows += [(str(frame), "train", LabelName.NORMAL, video.stem, "", -1) for frame in frames]
        self.train_data = ShanghaiTechFramesDataset(_table(rows))
        rows = [
            (str(frame), "test", LabelName(int(label)), clip.name, str(clip.mask_file), index)
            for clip in self._find_clips()
            for index, (frame, label) in enumerate(zip(clip.frames, clip.labels, strict=True))
        ]
        self.test_data = ShanghaiTechFramesDataset(_table(rows))

    def _create_test_split(self) -> None:
        """Leave the test frames as they are."""

    def _create_val_split(self) -> None:
        """Hold out whole videos: another frame of a training video is no unseen one."""
        if self.val_split_mode != ValSplitMode.FROM_TRAIN:
            super()._create_val_split()
            return
        samples = self.train_data.samples
        videos = samples.video.unique()
        if len(videos) > 1:
            count = min(len(videos) - 1, max(1, round(self.val_split_ratio * len(videos))))
            chosen = (len(videos) * (np.arange(count) + 0.5) / count).astype(int)  # evenly spread, none twice
            held_out = samples.video.isin(videos[chosen]).to_numpy()
        else:
            count = max(1, round(self.val_split_ratio * len(samples)))
            held_out = np.arange(len(samples)) >= len(samples) - count
        if held_out.all():
            message = (
                f"Scene {self.scene} has too few training frames ({len(samples)}) to hold some out for validation; "
                "lower frame_step, or set val_split_mode to none."
            )
            raise CflowError(message)
        self.val_data = self.train_data.subsample(np.flatnonzero(held_out).tolist())
        self.train_data = self.train_data.subsample(np.flatnonzero(~held_out).tolist())


def _table(rows: list[tuple]) -> DataFrame:
    return DataFrame(rows, columns=["image_path", "split", "label_index", "video", "mask_path", "frame"])
