"""Annotations of labelling tools, made into masks: the same shapes from every format."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.draw import polygon2mask

from cflow_plugin import CflowError
from cflow_plugin.data.annotations import write_masks

from .conftest import run_command

WIDTH, HEIGHT = 40, 30
BOX = (4, 6, 10, 5)  # left, top, width, height
POLYGON = [[20.0, 10.0], [36.0, 12.0], [30.0, 26.0]]


def expected():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[6:11, 4:14] = True
    return mask | polygon2mask(mask.shape, np.array(POLYGON)[:, ::-1] - 0.5)


def coco(folder):
    flat = [value for point in POLYGON for value in point]
    annotations = [{"image_id": 7, "bbox": BOX}, {"image_id": 7, "bbox": [0, 0, 1, 1], "segmentation": [flat]}]
    content = {"images": [{"id": 7, "file_name": "bad/1.png"}], "annotations": annotations, "categories": []}
    return content, "coco.json"


def labelme(folder):
    left, top, width, height = BOX
    box = {"shape_type": "rectangle", "points": [[left + width, top], [left, top + height]]}
    return {"imagePath": "..\\x\\1.png", "shapes": [box, {"shape_type": "polygon", "points": POLYGON}]}, "1.json"


def via(folder):
    box = dict(zip(("x", "y", "width", "height"), BOX, strict=True), name="rect")
    x, y = zip(*POLYGON, strict=True)
    shapes = [
        {"shape_attributes": box},
        {"shape_attributes": {"name": "polygon", "all_points_x": x, "all_points_y": y}},
    ]
    return {"_via_img_metadata": {"1.png123": {"filename": "1.png", "regions": shapes}}}, "via.json"


def cvat(folder):
    left, top, width, height = BOX
    points = ";".join(f"{x},{y}" for x, y in POLYGON)
    box = f'<box label="a" xtl="{left}" ytl="{top}" xbr="{left + width}" ybr="{top + height}"/>'
    return f'<annotations><image name="1.png">{box}<polygon points="{points}"/></image></annotations>', "cvat.xml"


def yolo(folder):
    left, top, width, height = BOX
    box = f"0 {(left + width / 2) / WIDTH} {(top + height / 2) / HEIGHT} {width / WIDTH} {height / HEIGHT}"
    return f"{box}\n1 {' '.join(f'{x / WIDTH:.8f} {y / HEIGHT:.8f}' for x, y in POLYGON)}\n", "labels/1.txt"


@pytest.fixture
def image(tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/1.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return tmp_path


def write(folder: Path, content, name: str) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


@pytest.mark.parametrize("kind", [coco, labelme, via, cvat, yolo], ids=lambda kind: kind.__name__)
def test_the_same_masks_from_every_format(kind, image):
    file = write(image, *kind(image))
    assert write_masks(file.parent if kind is yolo else file, image / "images", image / "masks") == 1
    mask = cv2.imread(str(image / "masks/1.png"), cv2.IMREAD_GRAYSCALE)
    assert set(np.unique(mask)) == {0, 255}
    assert np.array_equal(mask > 0, expected())


def boxes(**of):
    images = [{"id": number, "file_name": name.replace("__", "/") + ".png"} for number, name in enumerate(of)]
    annotations = [{"image_id": number, "bbox": box} for number, box in enumerate(of.values())]
    return {"images": images, "annotations": annotations}


@pytest.mark.parametrize("folder", ["", "elsewhere__"])
def test_images_of_one_name_in_several_folders(image, folder):
    for name in ("a", "b"):
        (image / "images" / name).mkdir()
        shutil.copy(image / "images/1.png", image / "images" / name)
    (image / "images/1.png").unlink()
    file = write(image, boxes(**{f"{folder}a__1": (1, 2, 3, 4), f"{folder}b__1": (20, 10, 5, 5)}), "coco.json")
    assert write_masks(file, image / "images", image / "masks") == 2
    for name, place, area in (("a", (2, 1), 12), ("b", (10, 20), 25)):
        mask = cv2.imread(str(image / "masks" / name / "1.png"), cv2.IMREAD_GRAYSCALE) > 0
        assert mask.sum() == area
        assert mask[place]
    write_masks(file, image / "images/b", image / "of_b")
    assert (cv2.imread(str(image / "of_b/1.png")) > 0).any(-1).sum() == 25
    with pytest.raises(CflowError, match=r"a/1\.png and .*b/1\.png are both called 1\.png"):
        write_masks(write(image, boxes(**{"1": (1, 2, 3, 4)}), "coco.json"), image / "images", image / "none")
    with pytest.raises(CflowError, match=r"may be c/1\.png or d/1\.png"):
        write_masks(write(image, boxes(c__1=BOX, d__1=BOX), "coco.json"), image / "images/a", image / "none")
    assert not (image / "none").exists()


def test_circles_and_specks(image):
    circle = {"shape_type": "circle", "points": [[20, 15], [20, 20]]}
    speck = {"shape_type": "rectangle", "points": [[2.1, 2.1], [2.3, 2.3]]}
    write_masks(write(image, {"shapes": [circle, speck]}, "1.json"), image / "images", image / "masks")
    mask = cv2.imread(str(image / "masks/1.png"), cv2.IMREAD_GRAYSCALE) > 0
    assert mask[2, 2]
    assert mask.sum() - 1 == pytest.approx(np.pi * 25, rel=0.06)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("{", "a.json", "could not be read as annotations"),
        ({"images": [], "annotations": []}, "a.json", r"marks nothing for 1\.png"),
        ({"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "segmentation": {"a": 1}}]},
         "a.json", "run-length"),
        ("<annotations/>", "a.xml", "CVAT for images"),
        ({"shapes": [{"shape_type": "line", "points": [[0, 0], [1, 1]]}]}, "1.json", "has no area"),
    ],
)  # fmt: skip
def test_what_cannot_be_used(content, name, words, image):
    with pytest.raises(CflowError, match=words):
        write_masks(write(image, content, name), image / "images", image / "masks")
    assert not (image / "masks").exists()


def test_the_command(image):
    file = write(image, *coco(image))
    out = run_command("cflow-plugin", "make-masks", "--annotations", file, "--images", image / "images", cwd=image)
    assert "--data.mask_dir masks" in out
    assert (image / "masks/1.png").is_file()
