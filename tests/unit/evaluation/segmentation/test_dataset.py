from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ijepa.data.open import open_dataset
from ijepa.evaluation.segmentation.dataset import Classes, SegmentationDataset, find_classes, nearest_resize
from ijepa.evaluation.segmentation.evaluate import evaluate_segmentation
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import UserError
from tests.helpers.encoders import PALETTE, MeanColor, block_mask, png, write_pairs
from tests.helpers.images import encoded

COLORS = ["#{:02x}{:02x}{:02x}".format(*color) for color in PALETTE.tolist()]
IDS = {"name": "ids", "classes": {"w": 7, "x": 17, "y": 27, "z": 37}, "ignore": [0]}
SHADES = {"name": "shades", "classes": dict(zip("wxyz", COLORS, strict=True)), "ignore": ["#000000"]}
SIZE = {"name": "p", "method": "retrieval", "image_size": 32, "retrieval": {"neighbors": [1]}}


def write_map(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_masks(root: Path, first: int, count: int, form: str) -> Path:
    """Write images and masks of classes 0 to 3 and void: as indices of a palette, as ids with gaps, or as colors."""
    masks = [block_mask(first + i) for i in range(count)]
    for mask in masks:
        mask[:8, :8] = 255
    write_pairs(root, masks)
    for number, mask in enumerate(masks):
        file = root / "masks" / f"{number:03d}.png"
        if form == "ids":
            file.write_bytes(png(np.where(mask == 255, 0, mask * 10 + 7).astype(np.uint8)))
        elif form == "colors":
            file.write_bytes(png(np.where(mask[..., None] == 255, 0, PALETTE[np.minimum(mask, 3)]).astype(np.uint8)))
        else:
            image = Image.fromarray(mask, mode="P")
            image.putpalette(PALETTE.tobytes() + bytes(756))
            file.write_bytes(encoded(image, "PNG"))
    return root


def read_masks(train: Path, test: Path, labels: str | None = None, **changed: Any) -> Classes:
    """Read all masks of two sets; return their classes."""
    sets = {"--train": open_dataset(train), "--test": open_dataset(test)}
    rule = SegmentationProtocol.read({**SIZE, **changed}, "p")
    classes = find_classes(sets, rule.classes, rule.ignore, labels)
    for flag, source in sets.items():
        list(SegmentationDataset(source, np.arange(len(source)), flag, classes, 32, 32).batches(4))
    return classes


def refusal(train: Path, test: Path, labels: str | None = None, **changed: Any) -> UserError:
    with pytest.raises(UserError) as err:
        read_masks(train, test, labels, **changed)
    assert "\n" not in str(err.value)
    return err.value


def test_masks_as_indices_ids_and_colors_give_the_same_scores(tmp_path: Path) -> None:
    rows = []
    for form, labels in (("indices", None), ("ids", IDS), ("colors", SHADES)):
        sets = []
        for split, first, count in (("train", 0, 12), ("val", 100, 6)):
            write_masks(tmp_path / form / split, first, count, form)
            if labels is not None:
                write_map(tmp_path / form / "labels.yaml", labels)
            sets.append(open_dataset(tmp_path / form, split=split))
        result = evaluate_segmentation({"toy": MeanColor()}, *sets, SegmentationProtocol.read(SIZE, "p"))
        rows.append(result.rows)
        if labels is not None:
            assert result.data.classes == tuple("wxyz")
            assert result.data.labels == {"train": labels["name"], "test": labels["name"]}
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0]["miou"] == pytest.approx(1)


def test_two_sets_with_the_same_classes_may_have_different_label_maps(tmp_path: Path) -> None:
    for form, labels in (("ids", IDS), ("colors", SHADES)):
        write_masks(tmp_path / form, 0 if form == "ids" else 100, 8, form)
        write_map(tmp_path / form / "labels.yaml", labels)
    sets = open_dataset(tmp_path / "ids"), open_dataset(tmp_path / "colors")
    result = evaluate_segmentation({"toy": MeanColor()}, *sets, SegmentationProtocol.read(SIZE, "p"))
    assert result.rows[0]["miou"] == pytest.approx(1)
    assert result.data.labels == {"train": "ids", "test": "shades"}


def test_find_classes_refuses_label_maps_with_different_classes(tmp_path: Path) -> None:
    ids, shades = write_masks(tmp_path / "ids", 0, 4, "ids"), write_masks(tmp_path / "colors", 100, 4, "colors")
    own = str(write_map(ids / "labels.yaml", IDS))
    assert refusal(ids, shades).where == "--test"
    write_map(shades / "labels.yaml", {**SHADES, "classes": {"w": COLORS[0], "q": COLORS[1:]}})
    error = refusal(ids, shades)
    assert error.where == "--test" and "has q and lacks x, y, z" in error.problem and "--labels" in error.hint
    assert "RGB" in refusal(ids, shades, own).problem
    write_map(shades / "labels.yaml", {**SHADES, "classes": dict(zip("wxyz", [*COLORS[:3], "#123456"], strict=True))})
    error = refusal(ids, shades)
    assert error.where == "--test" and "000.png: label #2828e6" in error.problem
    assert refusal(ids, ids, classes=5).where == "classes = 5"
    assert refusal(ids, ids, ignore=[0, 255]).where == "ignore = [0, 255]"
    assert find_classes({"--test": open_dataset(ids)}, None, (11, 255)).ignore == (11, 255)


def test_find_classes_refuses_a_set_without_the_classes_of_the_first(tmp_path: Path) -> None:
    low, high, void = (
        write_pairs(tmp_path / name, [np.full((32, 32), value, np.uint8)])
        for name, value in (("low", 0), ("high", 2), ("void", 255))
    )
    error = refusal(low, high)
    assert error.where == "--test" and "label 2" in error.problem
    assert "ignore = [255]" in refusal(low, void).hint


def test_find_classes_refuses_one_stray_label(tmp_path: Path) -> None:
    """If classes were counted by the highest label, there would be 10, and as many clusters at level 0."""
    masks = [block_mask(i) for i in range(4)]
    clean = write_pairs(tmp_path / "clean", masks)
    masks[2] = masks[2].copy()
    masks[2][5, 5] = 9
    stray = write_pairs(tmp_path / "stray", masks)
    error = refusal(clean, stray)
    assert error.where == "--test" and "002.png: its mask has label 9" in error.problem
    error = refusal(stray, clean)
    assert error.where == "--train" and "002.png: its mask has label 9" in error.problem
    for classes, ignore in ((None, (9, 255)), (4, (9, 255))):
        sets = {"--train": open_dataset(clean), "--test": open_dataset(stray)}
        assert find_classes(sets, classes, ignore).count == 4
    rule = SegmentationProtocol.read({"name": "k", "method": "kmeans", "image_size": 32}, "k")
    with pytest.raises(UserError) as err:
        evaluate_segmentation({"toy": MeanColor()}, None, open_dataset(stray), rule)
    assert err.value.where == "--test"


def test_find_classes_names_the_difference_of_class_names(tmp_path: Path) -> None:
    sets = {f"--{name}": open_dataset(write_pairs(tmp_path / name, [block_mask(0)])) for name in ("train", "test")}
    sets["--train"].classes = ("u", "v", "w", "x")
    for classes, words in ((("u", "v", "w", "y"), "has y and lacks x"), (("v", "u", "w", "x"), "order")):
        sets["--test"].classes = classes
        with pytest.raises(UserError) as err:
            find_classes(sets, None, (255,))
        assert err.value.where == "--test" and words in err.value.problem


def test_find_classes_counts_classes_without_names(tmp_path: Path) -> None:
    sets = {"--train": open_dataset(write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)]))}
    assert find_classes(sets, None, (255, 0)) == Classes(4, ("0", "1", "2", "3"), (255, 0))
    assert find_classes(sets, None, (255, 0)).scored == 3


def test_find_classes_adds_the_ground_to_named_classes(scenes: Path) -> None:
    found = find_classes({"--train": open_dataset(scenes, split="train")}, None, (255,))
    assert found.names[:2] == ("ground", "ring")
    assert found.count == found.scored == 9


def test_a_test_set_with_ignored_pixels_only_is_refused(tmp_path: Path) -> None:
    for split, number in (("train", 7), ("val", 0)):
        write_pairs(tmp_path / split, [np.full((32, 32), number, np.uint8)] * 3)
    write_map(tmp_path / "labels.yaml", IDS)
    sets = [open_dataset(tmp_path, split=split) for split in ("train", "val")]
    with pytest.raises(UserError) as err:
        evaluate_segmentation({"toy": MeanColor()}, *sets, SegmentationProtocol.read(SIZE, "p"))
    assert err.value.where == "--test" and "scored" in err.value.problem


def test_a_list_selects_images_with_their_masks(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "set", 0, 6, "ids")
    write_map(root / "labels.yaml", IDS)
    (tmp_path / "list").write_text("004.png\n001\n")
    part = open_dataset(str(root), where="--train", split="train", names=str(tmp_path / "list"))
    classes = find_classes({"--train": part}, None, (255,))
    ((_, masks),) = SegmentationDataset(part, np.arange(2), "--train", classes, 32, 32).batches(2)
    expected = [block_mask(number) for number in (1, 4)]
    for mask in expected:
        mask[:8, :8] = 255
    assert (masks == np.stack(expected)).all()


def test_nearest_resize_takes_the_pixel_at_the_new_center() -> None:
    assert nearest_resize(np.arange(4)[None].repeat(4, 0), (2, 2)).tolist() == [[1, 3], [1, 3]]
    assert nearest_resize(np.array([[1, 2], [3, 4]]), (4, 4))[0].tolist() == [1, 1, 2, 2]
