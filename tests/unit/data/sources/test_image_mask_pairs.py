"""Small data sets in every official layout."""

from pathlib import Path

import numpy as np
import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.utils.errors import UserError
from tests.helpers.images import encoded, write_tree

TREES: dict[str, dict[str, tuple[str, str]]] = {
    "ade20k": {
        "train": ("images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"),
        "val": ("images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"),
    },
    "cityscapes": {
        split: (
            f"leftImg8bit/{split}/{city}/{city}_000000_000019_leftImg8bit.png",
            f"gtFine/{split}/{city}/{city}_000000_000019_gtFine_labelIds.png",
        )
        for split, city in (("train", "aachen"), ("val", "munster"), ("test", "berlin"))
    },
    "coco-stuff-27": {
        "train": ("images/train2017/000000000009.jpg", "annotations/train2017/000000000009.png"),
        "val": ("images/val2017/000000000139.jpg", "annotations/val2017/000000000139.png"),
    },
    "coco-stuff-27 pixelmaps": {
        "train": ("train2017/000000000009.jpg", "stuffthingmaps_trainval2017/train2017/000000000009.png"),
        "val": ("val2017/000000000139.jpg", "stuffthingmaps_trainval2017/val2017/000000000139.png"),
    },
    "camvid segnet": {
        "train": ("train/0001TP_006690.png", "trainannot/0001TP_006690.png"),
        "val": ("val/0016E5_07959.png", "valannot/0016E5_07959.png"),
        "test": ("test/Seq05VD_f00000.png", "testannot/Seq05VD_f00000.png"),
    },
    "camvid colors": {
        "train": ("train/0001TP_006690.png", "train_labels/0001TP_006690_L.png"),
        "val": ("val/0016E5_07959.png", "val_labels/0016E5_07959_L.png"),
    },
    "camvid pairs": {
        "train": ("train/images/0001TP_006690.jpg", "train/masks/0001TP_006690.png"),
        "val": ("val/images/0016E5_07959.jpg", "val/masks/0016E5_07959.png"),
    },
    "none pairs": {
        "train": ("images/train/a/1.jpg", "masks/train/a/1.png"),
        "val": ("images/val/2.jpg", "masks/val/2.png"),
    },
}


def tree(root: Path, name: str) -> Path:
    """Write a data set with the other files of its layout; the content of each image and mask is its name."""
    files = {file: file.encode() for pair in TREES[name].values() for file in pair}
    if name == "cityscapes":
        for _, mask in TREES[name].values():
            for other in ("color.png", "instanceIds.png", "polygons.json"):
                files[mask.replace("labelIds.png", other)] = b"another"
    if name == "ade20k":
        files |= {"objectInfo150.txt": b"", "sceneCategories.txt": b""}
    return write_tree(root, files)


def contents(source: Source) -> list[tuple[str, str]]:
    samples = [source[i] for i in range(len(source))]
    return [(sample.image.decode(), sample.mask.decode()) for sample in samples]


@pytest.mark.parametrize("name", TREES)
def test_find_pairs_in_every_layout(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / "downloaded", name)
    labels = None if name.startswith("none") else name.split()[0]
    fingerprints = set()
    for split, pair in TREES[name].items():
        source = open_dataset(root, split=split)
        assert contents(source) == [pair]
        assert source.annotation == labels
        assert source.labels is None and source.classes is None
        source.require_masks("--train")
        fingerprints.add(source.fingerprint)
    assert len(fingerprints) == len(TREES[name])
    if "val" in TREES[name] and name != "camvid pairs":
        folder = root / Path(TREES[name]["val"][0]).parent
        folder = folder.parent if name == "cityscapes" else folder
        assert contents(open_dataset(folder)) == [TREES[name]["val"]], "the folder of the images determines the split"
        with pytest.raises(UserError, match="several splits"):
            open_dataset(root)


def test_find_pairs_in_the_folder_of_an_archive(tmp_path: Path) -> None:
    tree(tmp_path / "ADEChallengeData2016", "ade20k")
    assert contents(open_dataset(tmp_path, split="val")) == [TREES["ade20k"]["val"]]


def test_find_pairs_in_camvids_original_form(tmp_path: Path) -> None:
    pairs = [(f"701_StillsRaw_full/{n}.png", f"LabeledApproved_full/{n}_L.png") for n in ("0001TP_1", "Seq05VD_f2")]
    write_tree(tmp_path, {file: file.encode() for pair in pairs for file in pair})
    source = open_dataset(tmp_path)
    assert contents(source) == pairs and source.annotation == "camvid"
    (tmp_path / "val.txt").write_text("Seq05VD_f2\n")
    part = open_dataset(str(tmp_path), where="--test", split="val", names=str(tmp_path / "val.txt"))
    assert contents(part) == pairs[1:] and part.annotation == "camvid"


def test_pairs_with_other_names_are_not_camvid(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/images/a.jpg": b"a", "train/masks/a.png": b"m", "val/images/b.jpg": b"", "val/c": b""})
    assert open_dataset(tmp_path, split="train").annotation is None


@pytest.mark.parametrize("place", ["set/train/labels.yaml", "set/labels.yaml"])
def test_find_pairs_label_map(tmp_path: Path, place: str) -> None:
    write_tree(tmp_path, {"set/train/images/a.jpg": b"a", "set/train/masks/a.png": b"m", place: b"x: 1"})
    one = open_dataset(tmp_path / "set", split="train")
    assert one.annotation == str(tmp_path / place)
    (tmp_path / place).write_bytes(b"x: 2")
    assert open_dataset(tmp_path / "set/train").fingerprint != one.fingerprint


def test_missing_mask_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "cityscapes")
    write_tree(root, {"leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png": b"x"})
    with pytest.raises(UserError, match="1 of 2 .*lindau/lindau_000000_000019"):
        open_dataset(root, split="val").require_masks("--test")
    (root / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match=r"lindau/.*_gtFine_labelIds.png"):
        open_dataset(root, where="--test", split="val")
    with pytest.raises(UserError, match="train, val") as err:
        open_dataset(tree(tmp_path / "ade", "ade20k"), split="test")
    assert err.value.where == "data.path"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    lists = {"train": ["2007_000032"], "val": ["2007_000033"], "trainaug": ["2008_000008", "2007_000032"]}
    root = "VOCdevkit/VOC2012/"
    files = {f"{root}ImageSets/Segmentation/{name}.txt": "\n".join(x).encode() + b"\n" for name, x in lists.items()}
    for name in ("2007_000032", "2007_000033", "2008_000008", "2009_000001"):
        files[f"{root}JPEGImages/{name}.jpg"] = name.encode()
    for name in ("2007_000032", "2007_000033"):
        files[f"{root}SegmentationClass/{name}.png"] = b"original"
    write_tree(tmp_path, files)
    return tmp_path


def test_voc_index(voc: Path) -> None:
    root = voc / "VOCdevkit/VOC2012"
    for path in (voc, voc / "VOCdevkit", root):
        assert contents(open_dataset(path, split="train")) == [("2007_000032", "original")]
    assert contents(open_dataset(root, split="val")) == [("2007_000033", "original")]
    assert open_dataset(root, split="val").annotation == "voc"
    assert len(open_dataset(root)) == 2, "all images with a mask"
    with pytest.raises(UserError, match=r"Segmentation/test.txt"):
        open_dataset(root, split="test")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n2010_1\n")
    with pytest.raises(UserError, match="1 of 2 .*2010_1"):
        open_dataset(root, split="val")


def test_voc_index_trainaug(voc: Path) -> None:
    root = voc / "VOCdevkit/VOC2012"
    names = ("2007_000032", "2007_000033", "2008_000008")
    write_tree(root, {f"SegmentationClassAug/{name}.png": b"aug" for name in names})
    expected = [("2007_000032", "original"), ("2008_000008", "aug")]
    (voc / "mine.txt").write_text(
        "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in ("2008_000008", "2007_000032"))
    )
    (voc / "names.txt").write_text("2008_000008\n2007_000032\n")
    for listed in ("trainaug", str(voc / "mine.txt"), str(voc / "names.txt")):
        source = open_dataset(str(root), where="--train", split="train", names=listed)
        assert sorted(contents(source)) == expected
    assert contents(open_dataset(root, split="val")) == [("2007_000033", "original")]
    with pytest.raises(UserError, match="trainaugg"):
        open_dataset(str(root), where="--train", split="train", names="trainaugg")


def test_pairs_without_a_label_map(tmp_path: Path) -> None:
    mask = encoded(np.zeros((4, 4), np.uint8), "PNG")
    source = open_dataset(write_tree(tmp_path, {"images/1.jpg": b"1", "masks/1.png": mask}))
    assert source[0].mask == mask and source.annotation is None
