from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ijepa.data.loading.decode import DecodeError, decode_mask
from ijepa.data.open import open_dataset
from ijepa.evaluation.segmentation.dataset import Annotated, find_classes
from ijepa.evaluation.segmentation.evaluate import evaluate_segmentation
from ijepa.evaluation.segmentation.label_map import IGNORED, LabelError, LabelMap, label_maps, load_label_map
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import UserError
from tests.helpers.encoders import PALETTE, MeanColour, block_mask, png, write_pairs
from tests.helpers.images import encoded
from tests.helpers.paths import ROOT

STREET = """
name: street
classes:
  road: 7
  vehicle: [26-28, 31]
  plant: ["#6B8E23", "#98fb98"]
ignore: [0-6, 255, "#000000"]
"""


@pytest.fixture
def street(tmp_path: Path) -> LabelMap:
    (tmp_path / "street.yaml").write_text(STREET)
    return load_label_map(str(tmp_path / "street.yaml"))


def slow(labels: LabelMap, value: Any) -> int | None:
    """The number of one value, by looking through the map."""
    for number, values in enumerate(labels.classes.values()):
        if value in values:
            return number
    return IGNORED if labels.ignore == "rest" or value in labels.ignore else None


def test_values_become_numbers(street: LabelMap) -> None:
    assert street.names == ("road", "vehicle", "plant")
    values = np.array([[7, 26, 27], [31, 0, 255]], dtype=np.uint8)
    assert street.numbers(values).tolist() == [[0, 1, 1], [1, 255, 255]]
    colours = np.array([[[0x6B, 0x8E, 0x23], [0, 0, 0], [0x98, 0xFB, 0x98]]], dtype=np.uint8)
    assert street.numbers(colours).tolist() == [[2, 255, 2]]
    with pytest.raises(LabelError, match="label 9 in the mask is neither a class nor ignored in the label map street"):
        street.numbers(values + np.uint8(2))
    with pytest.raises(LabelError, match="label #6b8e24 in the mask"):
        street.numbers(colours + np.array([0, 0, 1], dtype=np.uint8))


@pytest.mark.parametrize("name", label_maps())
def test_presets_agree_with_looking_through_them(name: str) -> None:
    labels = load_label_map(name)
    assert labels.name == name and labels.description
    for value in range(256):
        expected = slow(labels, value)
        if expected is None:
            with pytest.raises(LabelError):
                labels.numbers(np.array([[value]]))
        else:
            assert labels.numbers(np.array([[value]])).item() == expected
    for values in labels.classes.values():
        for value in values:
            if isinstance(value, str):
                rgb = np.array([[[int(value[i : i + 2], 16) for i in (1, 3, 5)]]], dtype=np.uint8)
                assert labels.numbers(rgb).item() == slow(labels, value)


def test_presets_are_what_the_field_evaluates_by() -> None:
    maps = {name: load_label_map(name) for name in label_maps()}
    counts = {"ade20k": 150, "camvid": 11, "cityscapes": 19, "coco-stuff-27": 27, "voc": 21}
    assert {name: len(labels.names) for name, labels in maps.items()} == counts
    numbers = {name: labels._by_id for name, labels in maps.items()}
    assert numbers["ade20k"][:4].tolist() == [IGNORED, 0, 1, 2] and maps["ade20k"].names[149] == "flag"
    assert numbers["cityscapes"][[7, 8, 11, 33, 0, 29, 255]].tolist() == [0, 1, 2, 18, 255, 255, 255]
    assert numbers["voc"][:21].tolist() == list(range(21)) and maps["voc"].names[15] == "person"
    coco = numbers["coco-stuff-27"][:182]
    assert set(coco.tolist()) == set(range(27)), "every one of 182 has its group"
    assert [maps["coco-stuff-27"].names[coco[i]] for i in (0, 2, 16, 105, 181)] == [
        "person-things",
        "vehicle-things",
        "animal-things",
        "sky-stuff",
        "solid-stuff",
    ]
    colours = [value for group in maps["camvid"].classes.values() for value in group if isinstance(value, str)]
    assert len(colours) == len(set(colours)) == 31, "32 colours, one of them void"


def test_rest_ignores_what_no_class_names() -> None:
    labels = LabelMap.read({"name": "x", "classes": {"a": 1, "b": ["#010203"]}, "ignore": "rest"}, "x")
    assert labels.numbers(np.array([[1, 9, 60000]])).tolist() == [[0, 255, 255]]
    assert labels.numbers(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)).tolist() == [[1, 255]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nclasses: {a: 1, b: 1}", "classes: 1 stands for a and for b"),
        ("name: x\nclasses: {a: 1, b: 255}", "classes: 255 stands for b and for ignore"),
        ("name: x\nclasses: {a: 1, b: [2-]}", "is no id, no range such as 3-7 and no colour"),
        ("name: x\nclasses: {a: 1, b: '#12345'}", "'#12345' is no id"),
        ("name: x\nclasses: {a: 1, b: -1}", "-1 is no id"),
        ("name: x\nclasses: {a: 1, b: 70000}", "70000 is no id"),
        ("name: x\nclasses: {a: 1}", "classes"),
        ("name: x\nclases: {a: 1, b: 2}", "classes"),
        ("- 1", "holds no keys and values"),
        ("a: [", "is no YAML"),
    ],
)
def test_maps_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError, match=r".*map\.yaml") as caught:
        load_label_map(str(tmp_path / "map.yaml"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_colours_are_of_classes(tmp_path: Path) -> None:
    text = "name: x\nclasses: {road: 0, tree: 1}\ncolours: {%s}\n"
    for words, problem in (
        ('raod: "#ff0000"', "colours: raod: is no class; did you mean road"),
        ("tree: red", "colours"),
    ):
        (tmp_path / "m.yaml").write_text(text % words)
        with pytest.raises(UserError, match=problem):
            load_label_map(str(tmp_path / "m.yaml"))


def test_maps_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="--labels: no label map 'cityscape'; did you mean cityscapes?"):
        load_label_map("cityscape")
    with pytest.raises(UserError, match="--labels: no.yaml cannot be read"):
        load_label_map("no.yaml")


def test_masks_of_indices_palettes_and_colours() -> None:
    indices = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    palette = Image.fromarray(indices, mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90] + [0] * 759)
    plain, coloured = encoded(palette, "PNG"), encoded(palette.convert("RGB"), "PNG")
    for colours in ("refuse", "accept"):
        assert (decode_mask(plain, colours) == indices).all()
    assert decode_mask(plain, "only")[1, 0].tolist() == [70, 80, 90]
    assert decode_mask(coloured, "accept")[0, 1].tolist() == [40, 50, 60]
    assert decode_mask(encoded(palette.convert("RGBA"), "PNG"), "accept").shape == (2, 2, 3)
    with pytest.raises(DecodeError, match="one class index a pixel, and this one is RGB"):
        decode_mask(coloured)


def coloured_set(root: Path, first: int, count: int, form: str) -> Path:
    """Masks of classes 0 to 3 and void, as indices of a palette, as ids with gaps, or as colours."""
    masks = [block_mask(first + i) for i in range(count)]
    for mask in masks:
        mask[:8, :8] = 255
    write_pairs(root, masks)
    for number, mask in enumerate(masks):
        file = root / "masks" / f"{number:03d}.png"
        if form == "ids":
            file.write_bytes(png(np.where(mask == 255, 0, mask * 10 + 7).astype(np.uint8)))
        elif form == "colours":
            file.write_bytes(png(np.where(mask[..., None] == 255, 0, PALETTE[np.minimum(mask, 3)]).astype(np.uint8)))
        else:
            image = Image.fromarray(mask, mode="P")
            image.putpalette(PALETTE.tobytes() + bytes(756))
            file.write_bytes(encoded(image, "PNG"))
    return root


COLOURS = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in PALETTE.tolist()]
IDS = {"name": "ids", "classes": {"w": 7, "x": 17, "y": 27, "z": 37}, "ignore": [0]}
SHADES = {"name": "shades", "classes": dict(zip("wxyz", COLOURS, strict=True)), "ignore": ["#000000"]}
SIZE = {"name": "p", "method": "retrieval", "image_size": 32, "retrieval": {"neighbours": [1]}}


def write_map(path: Path, values: dict[str, Any]) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_the_same_masks_in_three_forms_score_alike(tmp_path: Path) -> None:
    rows = []
    for form, labels in (("indices", None), ("ids", IDS), ("colours", SHADES)):
        sets = []
        for split, first, count in (("train", 0, 12), ("val", 100, 6)):
            coloured_set(tmp_path / form / split, first, count, form)
            if labels is not None:
                write_map(tmp_path / form / "labels.yaml", labels)
            sets.append(open_dataset(tmp_path / form, split=split))
        result = evaluate_segmentation({"toy": MeanColour()}, *sets, SegmentationProtocol.read(SIZE, "p"), seed=0)
        rows.append(result["rows"])
        if labels is not None:
            assert result["data"]["classes"] == list("wxyz")
            assert result["data"]["labels"] == {"train": labels["name"], "test": labels["name"]}
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0]["miou"] == pytest.approx(1)


def test_two_sets_of_the_same_classes_may_be_labelled_otherwise(tmp_path: Path) -> None:
    for form, labels in (("ids", IDS), ("colours", SHADES)):
        coloured_set(tmp_path / form, 0 if form == "ids" else 100, 8, form)
        write_map(tmp_path / form / "labels.yaml", labels)
    sets = open_dataset(tmp_path / "ids"), open_dataset(tmp_path / "colours")
    result = evaluate_segmentation({"toy": MeanColour()}, *sets, SegmentationProtocol.read(SIZE, "p"), seed=0)
    assert result["rows"][0]["miou"] == pytest.approx(1)
    assert result["data"]["labels"] == {"train": "ids", "test": "shades"}


def refusal(train: Path, test: Path, labels: str | None = None, **changed: Any) -> str:
    sets = [(open_dataset(train), "--train"), (open_dataset(test), "--test")]
    rule = SegmentationProtocol.read({**SIZE, **changed}, "p")
    with pytest.raises(UserError) as caught:
        classes = find_classes(sets, rule.classes, rule.ignore, labels)
        for source, flag in sets:
            list(Annotated(source, np.arange(len(source)), flag, 32, 32).batches(4, classes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_classes_that_do_not_match_are_refused(tmp_path: Path) -> None:
    ids = coloured_set(tmp_path / "ids", 0, 4, "ids")
    shades = coloured_set(tmp_path / "colours", 100, 4, "colours")
    own = str(write_map(ids / "labels.yaml", IDS))
    assert "--test: has no label map, and the other set is labelled as ids" in refusal(ids, shades)
    write_map(shades / "labels.yaml", {**SHADES, "classes": {"w": COLOURS[0], "q": COLOURS[1:]}})
    found = refusal(ids, shades)
    assert found.startswith(
        "--test: its classes, labelled as shades, are not those of ids: it has q and lacks x, y, z; "
    )
    assert "--labels" in found
    found = refusal(ids, shades, own)
    assert "the mask of 000.png: a mask holds one class index a pixel, and this one is RGB" in found
    write_map(shades / "labels.yaml", {**SHADES, "classes": dict(zip("wxyz", [*COLOURS[:3], "#123456"], strict=True))})
    found = refusal(ids, shades)
    assert found.startswith("--test: 000.png: label #2828e6 in the mask is neither a class nor ignored")
    assert refusal(ids, ids, classes=5).startswith("classes = 5: the label map ids has 4")
    assert find_classes([(open_dataset(ids), "--test")], None, (11, 255)).ignore == (11, 255), "means nothing else here"
    assert refusal(ids, ids, ignore=[0, 255]).startswith("ignore = [0, 255]: the label map ids says what")


def test_sets_without_a_class_in_common_are_refused(tmp_path: Path) -> None:
    low = write_pairs(tmp_path / "low", [np.zeros((32, 32), np.uint8)])
    high = write_pairs(tmp_path / "high", [np.full((32, 32), 2, np.uint8)])
    void = write_pairs(tmp_path / "void", [np.full((32, 32), 255, np.uint8)])
    assert refusal(low, high).startswith("--test: 000.png: label 2 in its mask is in none of --train's")
    assert refusal(low, void).startswith("--test: no pixel of its masks is scored; all are in ignore = [255]")


def test_one_stray_label_adds_no_class(tmp_path: Path) -> None:
    """Counted by their highest label, the classes of either set would be 10, and so would level 0's clusters."""
    masks = [block_mask(i) for i in range(4)]
    clean = write_pairs(tmp_path / "clean", masks)
    masks[2] = masks[2].copy()
    masks[2][5, 5] = 9
    stray = write_pairs(tmp_path / "stray", masks)
    assert refusal(clean, stray).startswith("--test: 002.png: label 9 in its mask is in none of --train's; if it is a")
    gap = "002.png: label 9 in its mask, and 4, below it, in none of the set's"
    assert refusal(stray, clean).startswith(f"--train: {gap}")
    for classes, ignore in ((None, (9, 255)), (4, (9, 255))):
        sets = [(open_dataset(clean), "--train"), (open_dataset(stray), "--test")]
        assert find_classes(sets, classes, ignore).count == 4
    rule = SegmentationProtocol.read({"name": "k", "method": "kmeans", "image_size": 32}, "k")
    source = open_dataset(stray)
    with pytest.raises(UserError, match=f"--test: {gap}"):
        evaluate_segmentation({"toy": MeanColour()}, source, source, rule, seed=0)


def test_how_names_of_classes_differ_is_said(tmp_path: Path) -> None:
    """Of sets whose first names are the same."""
    sets = [open_dataset(write_pairs(tmp_path / name, [block_mask(0)])) for name in ("a", "b")]
    sets[0].classes, sets[1].classes = ("u", "v", "w", "x"), ("u", "v", "w", "y")
    with pytest.raises(UserError, match="--test: its classes are not those of the other set: it has y and lacks x"):
        find_classes(list(zip(sets, ("--train", "--test"), strict=True)), None, (255,))
    sets[1].classes = ("v", "u", "w", "x")
    with pytest.raises(UserError, match="they stand in another order"):
        find_classes(list(zip(sets, ("--train", "--test"), strict=True)), None, (255,))


def test_a_test_set_of_void_is_refused(tmp_path: Path) -> None:
    for split, number in (("train", 7), ("val", 0)):
        write_pairs(tmp_path / split, [np.full((32, 32), number, np.uint8)] * 3)
    write_map(tmp_path / "labels.yaml", IDS)
    sets = [open_dataset(tmp_path, split=split) for split in ("train", "val")]
    with pytest.raises(UserError, match="--test: no pixel of its masks is scored"):
        evaluate_segmentation({"toy": MeanColour()}, *sets, SegmentationProtocol.read(SIZE, "p"), seed=0)


def test_a_list_chooses_images_with_their_masks(tmp_path: Path) -> None:
    root = coloured_set(tmp_path / "set", 0, 6, "ids")
    write_map(root / "labels.yaml", IDS)
    (tmp_path / "list").write_text("004.png\n001\n")
    part = open_dataset(str(root), where="--train", split="train", names=str(tmp_path / "list"))
    classes = find_classes([(part, "--train")], None, (255,))
    ((_, masks),) = Annotated(part, np.arange(2), "--train", 32, 32).batches(2, classes)
    expected = [block_mask(number) for number in (1, 4)]
    for mask in expected:
        mask[:8, :8] = 255
    assert (masks == np.stack(expected)).all()


def test_the_documented_map_is_one_and_every_preset_is_documented(tmp_path: Path) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    (tmp_path / "street.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert load_label_map(str(tmp_path / "street.yaml")).names == ("road", "vehicle", "plant")
    for name in label_maps():
        assert f"`{name}`" in page
