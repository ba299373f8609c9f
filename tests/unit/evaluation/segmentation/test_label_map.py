from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ijepa.data.loading.decode import DecodeError, decode_mask
from ijepa.evaluation.segmentation.label_map import IGNORED, LabelError, LabelMap, label_maps, load_label_map
from ijepa.utils.errors import UserError
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


def test_numbers_of_ids_and_colors(street: LabelMap) -> None:
    assert street.names == ("road", "vehicle", "plant")
    values = np.array([[7, 26, 27], [31, 0, 255]], dtype=np.uint8)
    assert street.numbers(values).tolist() == [[0, 1, 1], [1, 255, 255]]
    colors = np.array([[[0x6B, 0x8E, 0x23], [0, 0, 0], [0x98, 0xFB, 0x98]]], dtype=np.uint8)
    assert street.numbers(colors).tolist() == [[2, 255, 2]]
    with pytest.raises(LabelError, match="label 9 .* street"):
        street.numbers(values + np.uint8(2))
    with pytest.raises(LabelError, match="label #6b8e24"):
        street.numbers(colors + np.array([0, 0, 1], dtype=np.uint8))


@pytest.mark.parametrize("name", label_maps())
def test_numbers_of_presets_agree_with_a_slow_lookup(name: str) -> None:
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


def test_presets_have_the_classes_of_the_benchmarks() -> None:
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
    colors = [value for group in maps["camvid"].classes.values() for value in group if isinstance(value, str)]
    assert len(colors) == len(set(colors)) == 31, "32 colors, one of them void"


def test_ignore_rest_ignores_values_without_a_class() -> None:
    labels = LabelMap.read({"name": "x", "classes": {"a": 1, "b": ["#010203"]}, "ignore": "rest"}, "x")
    assert labels.numbers(np.array([[1, 9, 60000]])).tolist() == [[0, 255, 255]]
    assert labels.numbers(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)).tolist() == [[1, 255]]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: x\nclasses: {a: 1, b: 1}", "1 is in both a and b"),
        ("name: x\nclasses: {a: 1, b: 255}", "255 is in both b and ignore"),
        ("name: x\nclasses: {a: 1, b: [2-]}", "'2-'"),
        ("name: x\nclasses: {a: 1, b: '#12345'}", "'#12345'"),
        ("name: x\nclasses: {a: 1, b: -1}", "-1"),
        ("name: x\nclasses: {a: 1, b: 70000}", "70000"),
        ("name: x\nclasses: {a: 1}", "classes"),
        ("name: x\nclases: {a: 1, b: 2}", "classes"),
        ('name: x\nclasses: {road: 0, tree: 1}\ncolors: {raod: "#ff0000"}', "did you mean road"),
        ("name: x\nclasses: {road: 0, tree: 1}\ncolors: {tree: red}", "colors"),
        ("- 1", "mapping"),
    ],
)
def test_load_label_map_refuses_invalid_files(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError) as err:
        load_label_map(str(tmp_path / "map.yaml"))
    assert str(tmp_path / "map.yaml") in err.value.where
    assert word in str(err.value)


def test_load_label_map_refuses_missing_presets_and_files() -> None:
    for name in ("cityscape", "no.yaml"):
        with pytest.raises(UserError) as err:
            load_label_map(name)
        assert name in err.value.where


def test_decode_mask_of_indices_palettes_and_colors() -> None:
    indices = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    palette = Image.fromarray(indices, mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90] + [0] * 759)
    plain, colored = encoded(palette, "PNG"), encoded(palette.convert("RGB"), "PNG")
    for colors in ("refuse", "accept"):
        assert (decode_mask(plain, colors) == indices).all()
    assert decode_mask(plain, "only")[1, 0].tolist() == [70, 80, 90]
    assert decode_mask(colored, "accept")[0, 1].tolist() == [40, 50, 60]
    assert decode_mask(encoded(palette.convert("RGBA"), "PNG"), "accept").shape == (2, 2, 3)
    with pytest.raises(DecodeError, match="RGB"):
        decode_mask(colored)


def test_documentation_has_a_valid_map_and_names_every_preset(tmp_path: Path) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    (tmp_path / "street.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert load_label_map(str(tmp_path / "street.yaml")).names == ("road", "vehicle", "plant")
    for name in label_maps():
        assert f"`{name}`" in page
