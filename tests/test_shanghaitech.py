import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data.datasets.video.shanghaitech import make_shanghaitech_dataset
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import Normalize

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.make_scenes import make_scenes
from cflow_plugin.data import ShanghaiTechFrames
from cflow_plugin.data.clips import compare_labels_with_masks, find_clips, read_mask
from cflow_plugin.data.video_frames import extract_frames, extracted_frames
from cflow_plugin.decisions.reference_images import ReferenceImages

from .conftest import ROOT, make_engine, run_command, run_in_small_space, sentence_of

FEW = {"train_videos": 3, "train_frames": 14, "test_clips": 2, "test_frames": 12, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "scenes"
    make_scenes(folder, **FEW)
    return folder


@pytest.fixture
def root(drawn, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(drawn, tmp_path / "scenes")


def make_scene(root, **settings):
    quick = {"frame_step": 3, "num_workers": 0, "train_batch_size": 4, "eval_batch_size": 4}
    datamodule = ShanghaiTechFrames(root, **{**quick, **settings})
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def read_video(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = capture.read()
        if not there:
            return frames
        frames.append(frame)


def write_video(path, shades):
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 24, (64, 48))
    for shade in shades:
        film.write(np.full((48, 64, 3), shade, np.uint8))
    film.release()


# The drawn scenes


def test_drawn_scenes_have_the_layout(drawn):
    assert {path.name for path in (drawn / "training/videos").iterdir()} == {
        f"{scene}_{number}.avi" for scene in ("01", "02") for number in ("001", "002", "003")
    }
    assert all(len(read_video(path)) == 14 for path in (drawn / "training/videos").iterdir())
    for scene in (1, 2):
        # As anomalib's own reader of this layout finds it.
        samples = make_shanghaitech_dataset(drawn, scene, "test")
        assert len(samples) == 2
        for row in samples.itertuples():
            masks, labels = np.load(row.mask_path), np.load(row.mask_path.replace("pixel", "frame"))
            assert masks.shape == (12, 48, 64)
            assert np.array_equal(masks.any(axis=(1, 2)), labels)
            assert 0 < labels.sum() < 12


def test_drawn_scenes_differ_only_by_seed(drawn, tmp_path):
    make_scenes(tmp_path / "again", **FEW)
    make_scenes(tmp_path / "other", **FEW, seed=1)
    for path in (path for path in drawn.rglob("*") if path.is_file() and "extracted" not in str(path)):
        same = (tmp_path / "again" / path.relative_to(drawn)).read_bytes()
        assert same == path.read_bytes()
        if path.suffix != ".npy":
            assert (tmp_path / "other" / path.relative_to(drawn)).read_bytes() != same


def test_a_vehicle_changes_its_mask_and_nothing_else(drawn):
    """The median over frames is the empty scene; people are dark, the vehicle is not."""
    folder = drawn / "testing/frames/01_0001"
    frames = np.stack([cv2.imread(str(path)) for path in sorted(folder.iterdir())]).astype(float)
    masks = np.load(drawn / "testing/test_pixel_mask/01_0001.npy").astype(bool)
    red = frames[..., 2] - frames[..., 1] > 90
    assert red[masks].mean() > 0.5
    assert red[~masks].mean() < 0.01


def test_test_frames_have_passed_through_the_videos_codec(drawn):
    """Where nobody walks, training and test frames of a place are the same but for the camera's noise."""
    train = [frame for path in sorted((drawn / "training/videos").glob("01_*")) for frame in read_video(path)]
    test = [cv2.imread(str(path)) for path in sorted(drawn.glob("testing/frames/01_*/*.jpg"))]
    train, test = (np.median(np.stack(frames), axis=0) for frames in (train, test))
    top = np.s_[:10]  # the lawn above all heads
    assert np.abs(train[top].mean((0, 1)) - test[top].mean((0, 1))).max() < 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"train_videos": 0}, "train_videos"), ({"width": 65}, "even"), ({"scenes": []}, "scenes"), ({}, "already")],
)
def test_scenes_that_cannot_be_drawn(tmp_path, settings, words):
    if not settings:
        (tmp_path / "scenes").mkdir()
    with pytest.raises(CflowError, match=words):
        make_scenes(tmp_path / "scenes", **{**FEW, **settings})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.long
@pytest.mark.parametrize("size", ["200k", "600k", "1200k"])  # full in training videos, in test clips, in masks
def test_scenes_on_a_full_disk(tmp_path, size):
    program = Path(sys.executable).with_name("cflow-plugin")
    sentence = sentence_of(run_in_small_space(tmp_path, size, [program, "make-scenes", "--output", "scenes"]))
    assert "The scenes could not be written to scenes" in sentence
    assert "free some space" in sentence


# Frames


def test_every_third_frame_is_extracted(root):
    videos = sorted((root / "training/videos").glob("01_*.avi"))
    extract_frames(videos, root / "frames", step=3)
    for video in videos:
        frames = extracted_frames(root / "frames", video.stem)
        assert [path.name for path in frames] == [f"{number:06d}.jpg" for number in (0, 3, 6, 9, 12)]
        decoded = read_video(video)
        for path in frames:
            differences = [np.abs(cv2.imread(str(path)).astype(float) - frame).mean() for frame in decoded]
            assert np.argmin(differences) == int(path.stem)
            assert min(differences) < 4


@pytest.mark.long
def test_extraction_goes_on_after_a_kill(tmp_path):
    videos = [tmp_path / f"01_{number:03d}.avi" for number in range(3)]
    for video in videos:
        write_video(video, np.arange(500) % 250)
    code = "import sys, pathlib; from cflow_plugin.data.video_frames import extract_frames; "
    code += "extract_frames([pathlib.Path(name) for name in sys.argv[2:]], pathlib.Path(sys.argv[1]))"
    folder = tmp_path / "frames"
    process = subprocess.Popen([sys.executable, "-c", code, folder, *videos], stdout=subprocess.DEVNULL)
    half = folder / ".01_001.partial"
    end = time.monotonic() + 120
    while not (half.is_dir() and len(list(half.glob("*.jpg"))) > 50):
        assert process.poll() is None, "it was to be killed at work"
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert half.is_dir()
    first = folder / videos[0].stem
    assert len(extracted_frames(folder, first.name)) == 500
    assert extracted_frames(folder, "01_001") == []
    written = first.stat().st_ino

    extract_frames(videos, folder)
    for video in videos:
        assert [path.name for path in extracted_frames(folder, video.stem)] == [f"{n:06d}.jpg" for n in range(500)]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *(video.stem for video in videos)]
    assert first.stat().st_ino == written


def test_extracted_again_when_the_video_or_a_frame_is_another(tmp_path):
    video = tmp_path / "01_001.avi"
    write_video(video, [10] * 5)
    extract_frames([video], tmp_path / "frames")
    extracted_frames(tmp_path / "frames", "01_001")[2].unlink()
    assert extracted_frames(tmp_path / "frames", "01_001") == []
    extract_frames([video], tmp_path / "frames")
    assert len(extracted_frames(tmp_path / "frames", "01_001")) == 5
    write_video(video, [200] * 7)
    extract_frames([video], tmp_path / "frames")
    frames = extracted_frames(tmp_path / "frames", "01_001")
    assert len(frames) == 7
    assert cv2.imread(str(frames[0])).mean() == pytest.approx(200, abs=3)


def test_a_damaged_video_is_named(root):
    (root / "training/videos/01_002.avi").write_bytes(b"no video")
    with pytest.raises(CflowError, match=r"01_002\.avi could not be opened as a video"):
        make_scene(root)


# The data module


def test_a_scene(root):
    datamodule = make_scene(root, scene=2)
    train, val, test = datamodule.train_data, datamodule.val_data, datamodule.test_data
    assert (len(train), len(val), len(test)) == (10, 5, 24)
    assert not set(train.samples.video) & set(val.samples.video)
    assert all(name.startswith("02_") for name in {*train.samples.video, *val.samples.video, *test.samples.video})
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.image.shape == (4, 3, 48, 64)
    assert not batch.gt_mask.any()
    assert not batch.gt_label.any()
    seen = 0
    for batch in datamodule.test_dataloader():
        for image, mask, label, path in zip(batch.image, batch.gt_mask, batch.gt_label, batch.image_path, strict=True):
            clip, number = path.split("/")[-2], int(path.split("/")[-1][:3])
            assert np.array_equal(mask, np.load(root / f"testing/test_pixel_mask/{clip}.npy")[number])
            assert label == np.load(root / f"testing/test_frame_mask/{clip}.npy")[number]
            bgr = cv2.imread(path)
            assert np.abs(image.numpy().transpose(1, 2, 0)[..., ::-1] * 255 - bgr).max() < 4
            seen += 1
    assert seen == 24


@pytest.mark.parametrize(("ratio", "held_out"), [(0.01, 1), (0.3, 1), (0.5, 2), (0.7, 2), (0.99, 2)])
def test_as_many_videos_are_held_out_as_asked(root, ratio, held_out):
    datamodule = make_scene(root, val_split_ratio=ratio)  # three videos, of which one must remain
    assert datamodule.val_data.samples.video.nunique() == held_out
    assert datamodule.train_data.samples.video.nunique() == 3 - held_out


def test_nothing_of_the_test_frames_is_fitted_on_unless_asked(root):
    for video in (root / "training/videos").glob("*_00[23].avi"):
        video.unlink()
    datamodule = make_scene(root)  # one video is left, of which the end is held out
    assert datamodule.val_data.samples.image_path.min() > datamodule.train_data.samples.image_path.max()
    assert all("training" in path for path in datamodule.val_data.samples.image_path)
    assert len(make_scene(root, val_split_mode="same_as_test").val_data) == 24
    with pytest.raises(CflowError, match="too few training frames"):
        make_scene(root, frame_step=14)


@pytest.mark.parametrize(
    ("settings", "rate", "words"),
    [
        ({}, 0.2, "the 5 good frames that set the thresholds are of 1 video(s) not"),
        ({"val_split_ratio": 0.6}, 0.2, "the 10 good frames that set the thresholds are of 2 video(s) not"),
        ({"val_split_ratio": 0.6}, 0.4, None),  # two videos vouch for a rate of 1 / 3 and more
        # Frames between those that are trained on: no video is held out as a whole.
        ({"val_split_mode": "none"}, 0.2, "the 4 good frames that set the thresholds are of 0 video(s) not"),
    ],
)
def test_thresholds_from_few_videos_are_warned_of(root, caplog, settings, rate, words):
    datamodule = make_scene(root, **settings)
    images = datamodule.train_dataloader()
    ReferenceImages(0.2, None, may_choose_rate=False).take_from(images, datamodule, rate, 0, training_has_begun=False)
    warnings = [record.message for record in caplog.records if "Frames of one video are alike" in record.message]
    assert (not warnings) if words is None else (words in warnings[0])


def test_frames_are_taken_in_natural_order(root):
    folder = root / "testing/frames/01_0001"
    for path in sorted(folder.iterdir()):
        path.rename(folder / f"{int(path.stem)}.jpg")
    samples = make_scene(root).test_data.samples
    mine = samples[samples.video == "01_0001"]
    assert {int(path.split("/")[-1][:-4]): frame for path, frame in zip(mine.image_path, mine.frame, strict=True)} == {
        number: number for number in range(12)
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scene": 0}, "1 to 12"),
        ({"scene": 13}, "no test ground truth; choose 1 to 12"),
        ({"scene": 14}, "1 to 12"),
        ({"frame_step": 0}, "frame_step"),
        ({"val_split_ratio": 1.0}, "val_split_ratio"),
    ],
)
def test_what_cannot_be_asked_for(root, settings, words):
    with pytest.raises(CflowError, match=words):
        make_scene(root, **settings)
    with pytest.raises(CflowError, match=words):
        ShanghaiTechFrames(root, **settings).setup()


def test_where_labels_and_masks_differ_both_are_kept_and_a_warning_counts(root, caplog):
    labels_file = root / "testing/test_frame_mask/01_0002.npy"
    labels = np.load(labels_file)
    [marked], [clean] = np.flatnonzero(labels)[:1], np.flatnonzero(labels == 0)[:1]
    labels[[marked, clean]] = 0, 1
    np.save(labels_file, labels)
    for _ in range(2):  # from the masks, and from what was noted of them
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cflow_plugin"):
            test = make_scene(root).test_data
        [message] = [record.getMessage() for record in caplog.records if record.name.startswith("cflow_plugin")]
        assert message.startswith("In 2 of 24 test frames")
        assert f"frame {min(marked, clean)} of 01_0002" in message
    rows = test.samples[test.samples.video == "01_0002"].set_index("frame")
    assert rows.label_index[marked] == 0
    assert rows.label_index[clean] == 1
    item = test[int(np.flatnonzero(test.samples.image_path == rows.image_path[marked])[0])]
    assert item.gt_label == 0
    assert item.gt_mask.any()

    masks_file = root / "testing/test_pixel_mask/01_0002.npy"
    masks = np.load(masks_file)
    masks[marked], masks[clean] = 0, 1
    np.save(masks_file, masks)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cflow_plugin"):
        make_scene(root)
    assert not [record for record in caplog.records if record.name.startswith("cflow_plugin")]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: shutil.rmtree(root / "testing"), "no testing/frames.*campus_dataset.*make-scenes"),
        (lambda root: shutil.rmtree(root), "no training/videos"),
        (lambda root: (root / "testing/frames/01_0001/003.jpg").unlink(), r"test_frame_mask.01_0001.*11 frames"),
        (lambda root: (root / "testing/test_pixel_mask/01_0002.npy").unlink(), r"test_pixel_mask.01_0002.*missing"),
        (
            lambda root: (root / "testing/test_frame_mask/01_0002.npy").write_bytes(b""),
            r"01_0002.npy could not be read",
        ),
        (lambda root: [file.unlink() for file in root.rglob("01_*.avi")], r"no training video of scene 1 .* 02"),
        (lambda root: [shutil.rmtree(clip) for clip in root.rglob("testing/frames/01_*")], "no test clip of scene 1"),
    ],
    ids=["no test", "nothing", "a frame too few", "no masks", "damaged labels", "no videos", "no clips"],
)
def test_what_is_missing_is_named(root, spoil, words):
    spoil(root)
    with pytest.raises(CflowError, match=words):
        make_scene(root)


def test_a_mask_of_another_size_is_an_error(root):
    np.save(root / "testing/test_pixel_mask/01_0001.npy", np.zeros((12, 10, 10), np.uint8))
    with pytest.raises(CflowError, match=r"mask of .*01_0001.*\(10, 10\)"):
        make_scene(root).test_data[0]


def test_frames_not_yet_extracted(root):
    with pytest.raises(CflowError, match="prepare_data"):
        ShanghaiTechFrames(root).setup()


def test_a_frame_costs_the_memory_of_its_own_mask(root):
    frames, size = 12, (4000, 6000)
    masks = np.lib.format.open_memmap(root / "testing/test_pixel_mask/01_0001.npy", "w+", np.uint8, (frames, *size))
    masks[5, 7, 9] = 255
    del masks
    tracemalloc.start()
    [clip, _] = find_clips(root, 1)
    differing = compare_labels_with_masks([clip], root / "kept")
    mask = read_mask(clip.mask_file, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.sum() == mask[7, 9] == 1
    assert (5 in differing["01_0001"]) != np.load(clip.label_file)[5]
    assert peak < 1.2 * np.prod(size) < frames * np.prod(size) / 5


# End to end


@pytest.mark.long
def test_train_a_scene(tmp_path):
    data = ["--train_videos", "3", "--train_frames", "20", "--test_clips", "2", "--test_frames", "20"]
    run_command("cflow-plugin", "make-scenes", "--output", "tiny", "--scenes", "[3]", *data, cwd=tmp_path)
    quick = ["--model.backbone", "gabor", "--model.epochs", "3", "--model.steps_per_epoch", "10"]
    quick += ["--model.coupling_blocks", "2"]
    out = run_command(
        "anomalib", "train", "--config", ROOT / "configs/shanghaitech/scene_03.yaml", *quick, "--data.root", "tiny",
        "--data.frame_step", "4", "--data.num_workers", "0", "--trainer.accelerator", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert "image_AUROC" in out
    assert "Traceback" not in out
    results = tmp_path / "results/CflowPlugin/ShanghaiTechFrames/scene_03/latest"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["pixel_AUROC"] > 0.8

    model = CflowPlugin.load_from_checkpoint(results / "weights/lightning/model.ckpt")
    [normalize] = [part for part in model.pre_processor.transform.transforms if isinstance(part, Normalize)]
    assert (normalize.mean, normalize.std) == ([0.5] * 3, [0.225] * 3)
    datamodule = make_scene(tmp_path / "tiny", scene=3, frame_step=4)
    batches = make_engine(tmp_path / "again").predict(model, dataloaders=datamodule.test_dataloader())
    scores = torch.cat([batch.pred_score for batch in batches]).flatten()
    paths = [path for batch in batches for path in batch.image_path]
    labels = [
        np.load(tmp_path / f"tiny/testing/test_frame_mask/{path.split('/')[-2]}.npy")[int(path[-7:-4])]
        for path in paths
    ]
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)


@pytest.mark.long
def test_scene_13_ends_in_one_sentence(tmp_path):
    out = run_command(
        "anomalib", "train", "--model", "CflowPlugin", "--data", "ShanghaiTechFrames", "--data.scene", "13",
        cwd=tmp_path, expect=1,
    )  # fmt: skip
    assert "Traceback" not in out
    assert "no test ground truth" in out.strip().splitlines()[-1]
