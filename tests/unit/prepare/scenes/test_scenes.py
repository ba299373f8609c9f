"""Scenes are functions of (seed, position), keep the mask convention, and hide the class from simple statistics."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa.data.loading.decode import decode, decode_mask
from ijepa.data.open import open_dataset
from ijepa.prepare.scenes import scenes
from ijepa.prepare.scenes.scenes import CLASSES, Scene, SceneRule, draw_scene, draw_scenes, write_scenes
from ijepa.utils.errors import UserError
from tests.reference.scenes import coverage

GOLDEN_LABELS = [6, 0, 4, 7, 5, 6, 4, 4, 0, 5, 5, 4]
GOLDEN_AREAS = [979, 814, 634, 716, 356, 687, 652, 867, 526, 897, 473, 582]
CHANCE = 1 / len(CLASSES)
PLAIN = {"grain": 0.0, "clouds": 0.0}


def same(a: Scene, b: Scene) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) and a.label == b.label


def test_draw_scene_depends_on_seed_and_position_only() -> None:
    positions = [5, 0, 130, 7, 1 << 40]
    together = list(draw_scenes(3, positions))
    for position, scene in zip(positions, together, strict=True):
        assert same(scene, draw_scene(3, position))
    assert not same(draw_scene(3, 5), draw_scene(4, 5))
    assert not same(draw_scene(3, 5), draw_scene(3, 6))


def test_draw_scenes_golden_labels_and_areas() -> None:
    # Raise scenes.VERSION with these numbers.
    drawn = list(draw_scenes(0, range(12)))
    assert scenes.VERSION == 2
    assert [scene.label for scene in drawn] == GOLDEN_LABELS
    assert [int((scene.mask > 0).sum()) for scene in drawn] == pytest.approx(GOLDEN_AREAS, abs=2)


@pytest.mark.parametrize("size", [32, 64, 97])
def test_draw_scenes_types_and_mask_values(size: int) -> None:
    for scene in draw_scenes(1, range(40), size=size):
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.mask.shape == (size, size) and scene.mask.dtype == np.uint8
        assert scene.image.flags.c_contiguous and scene.mask.flags.c_contiguous
        assert set(np.unique(scene.mask)) == {0, scene.label + 1}
        assert 0 <= scene.label < len(CLASSES)


@pytest.mark.parametrize("label", range(len(CLASSES)))
@pytest.mark.parametrize(("unit", "angle"), [(9.0, 0.0), (13.5, 0.7), (16.0, -2.4)])
def test_coverage_by_table_agrees_with_the_formula(label: int, unit: float, angle: float) -> None:
    center = (20.3, 19.6)
    axis = np.arange(40) + 0.5
    u, v = (axis - center[0])[None, None, :], (axis - center[1])[None, :, None]
    cell = scenes._cells(u, v, np.array([unit]), np.array([angle]))
    fast = scenes._coverage(label, cell, np.array([unit]))[0]
    error = np.abs(fast - coverage(CLASSES[label], 40, center, unit, angle))
    assert error.max() < 0.15  # half a table cell, .006 units of up to 16 pixels, in both directions
    assert error.mean() < 0.005


def test_draw_scenes_number_and_area_of_instances() -> None:
    rule = SceneRule(instances=(2, 2), cells=2, jitter=0.0, shift=0.0, diameter=(0.3, 0.3), **PLAIN)
    areas: dict[int, list[int]] = {label: [] for label in range(len(CLASSES))}
    for scene in draw_scenes(0, range(300), size=96, rule=rule):
        areas[scene.label].append(int((scene.mask > 0).sum()))
    for label, found in areas.items():  # a mask is whole pixels, so areas hold on average
        assert np.mean(found) == pytest.approx(2 * 0.45 * (0.3 * 96) ** 2, rel=0.015), CLASSES[label]


def test_color_varies_unless_shared() -> None:
    def colors(rule: SceneRule) -> float:
        counts = []
        for scene in draw_scenes(0, range(30), rule=rule):
            flat = scene.image[scene.mask > 0].astype(np.int64) @ [1, 256, 65536]
            counts.append((np.unique(flat, return_counts=True)[1] > 30).sum())
        return float(np.median(counts))

    apart = {"jitter": 0.0, "diameter": (0.2, 0.24), **PLAIN}
    assert colors(SceneRule(shared=("color", "polarity"), **apart)) == 1
    assert colors(SceneRule(**apart)) > 4


def test_noise_has_the_standard_deviation_of_the_rule() -> None:
    for field in ("grain", "clouds"):
        rule = SceneRule(instances=(1, 1), contrast=(0.0, 0.0), chroma=0.0, **(PLAIN | {field: 0.1}))
        grounds = np.stack([scene.image for scene in draw_scenes(0, range(40), rule=rule)]) / 255
        assert grounds.std() == pytest.approx(0.1, rel=0.1), field
        assert grounds.mean() == pytest.approx(0.5, abs=0.02), field


def test_polarity_has_both_signs_within_a_scene() -> None:
    rule = SceneRule(light=0.5, **PLAIN)
    both = 0
    for scene in draw_scenes(0, range(50), rule=rule):
        gray = scene.image.mean(axis=2)
        brighter = gray[scene.mask > 0] > np.median(gray[scene.mask == 0])
        both += 0.05 < brighter.mean() < 0.95
    assert both > 35


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instances", (0, 3)),
        ("instances", (5, 17)),
        ("instances", (5, 4)),
        ("cells", 0),
        ("jitter", 0.6),
        ("shift", -0.1),
        ("diameter", (0.4, 0.3)),
        ("rotation", 2.0),
        ("contrast", (0.2, 0.8)),
        ("chroma", float("nan")),
        ("light", 1.5),
        ("grain", -0.1),
        ("shared", ("class",)),
    ],
)
def test_scene_rule_out_of_range(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        SceneRule(**{field: value})  # type: ignore[arg-type]


# What simple statistics predict about the class.


@cache
def many() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn = list(draw_scenes(0, range(4000)))
    images = np.stack([scene.image for scene in drawn])
    masks = np.stack([scene.mask > 0 for scene in drawn])
    return images, masks, np.array([scene.label for scene in drawn])


def probe(features: np.ndarray, regularization: float = 0.1) -> float:
    """Accuracy of logistic regression on standardized features: 2,500 scenes to fit, 1,500 to test."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    flat, labels = features.reshape(len(features), -1), many()[2]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=60, tol=1e-2))
    model.fit(flat[:2500], labels[:2500])
    return float(model.score(flat[2500:], labels[2500:]))


def test_classes_are_balanced() -> None:
    counts = np.bincount(many()[2], minlength=len(CLASSES))
    assert counts.min() > 430 and counts.max() < 570


def test_color_does_not_predict_the_class() -> None:
    images = many()[0]
    histogram = np.stack(
        [np.stack([np.bincount(i[..., c].ravel() >> 5, minlength=8) for c in range(3)]) for i in images]
    )
    mean = images.mean(axis=(1, 2))
    assert probe(np.concatenate([mean, histogram.reshape(len(images), -1)], axis=1)) < CHANCE + 0.035


def test_place_and_extent_of_the_mask_do_not_predict_the_class() -> None:
    masks = many()[1]
    area = masks.mean(axis=(1, 2))
    columns = (masks.mean(axis=1) * np.arange(64)).mean(axis=1) / area
    rows = (masks.mean(axis=2) * np.arange(64)).mean(axis=1) / area
    assert probe(np.stack([area, columns, rows], axis=1)) < CHANCE + 0.035


def test_raw_pixels_hardly_predict_the_class() -> None:
    pixels = many()[0].reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert probe(pixels, 1e-3) < CHANCE + 0.05


def test_form_predicts_the_class() -> None:
    # Random rectified filters on 8 x 8 patches, averaged over the image: form without place or sign of the color.
    images = many()[0].astype(np.float32)
    patches = images.reshape(-1, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(images), 64, 192)
    patches -= patches.mean(axis=2, keepdims=True)
    patches /= patches.std(axis=2, keepdims=True) + 1
    filters = np.random.default_rng(0).normal(size=(192, 256)).astype(np.float32) / 14
    features = np.concatenate([np.maximum(some @ filters, 0).mean(axis=1) for some in np.split(patches, 20)])
    assert probe(features) > CHANCE + 0.15


def test_most_blocks_of_three_by_three_patches_contain_a_shape() -> None:
    masks = many()[1][:500].reshape(500, 8, 8, 8, 8).any(axis=(2, 4))
    blocks = np.lib.stride_tricks.sliding_window_view(masks, (3, 3), axis=(1, 2))
    assert blocks.any(axis=(3, 4)).mean() > 0.93


# The set on disk.


def read(folder: Path, split: str) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                members[member.name] = stream.read()
    return members


def test_write_scenes_content(tmp_path: Path) -> None:
    manifest = write_scenes(tmp_path / "set", images=60, seed=9, shard_size=25)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "classes.txt",
        "manifest.json",
        "train-0000.tar",
        "train-0001.tar",
        "val-0000.tar",
    ]
    on_disk = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert on_disk == json.loads(json.dumps(manifest))
    assert on_disk["classes"] == list(CLASSES) and on_disk["seed"] == 9
    for split, count, offset in (("train", 50, 0), ("val", 10, scenes.VALIDATION_START)):
        members = read(tmp_path / "set", split)
        assert len(members) == 3 * count == 3 * on_disk["splits"][split]["images"]
        labels = []
        for index in range(count):
            scene, key = draw_scene(9, offset + index), f"{split}-{index:08d}"
            image = np.asarray(Image.open(io.BytesIO(members[f"{key}.jpg"])))
            assert np.abs(image.astype(int) - scene.image).mean() < 6
            mask = Image.open(io.BytesIO(members[f"{key}.mask.png"]))
            assert mask.mode == "L" and np.array_equal(np.asarray(mask), scene.mask)
            assert members[f"{key}.cls"] == str(scene.label).encode()
            labels.append(scene.label)
        counts = np.bincount(labels, minlength=len(CLASSES)).tolist()
        assert list(on_disk["splits"][split]["images_per_class"].values()) == counts


def test_write_scenes_can_be_opened(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", images=30, seed=9, shard_size=10)
    source = open_dataset(tmp_path / "set", split="val")
    assert (len(source), source.classes, source.has_masks) == (5, CLASSES, True)
    expected = list(draw_scenes(9, range(scenes.VALIDATION_START, scenes.VALIDATION_START + 5)))
    for index, scene in enumerate(expected):
        sample = source[index]
        assert sample.label == scene.label and sample.mask is not None
        assert np.array_equal(decode_mask(sample.mask), scene.mask)
        assert np.abs(decode(sample.image).astype(int) - scene.image).mean() < 6


def test_write_scenes_does_not_depend_on_split_size_or_processes(tmp_path: Path) -> None:
    write_scenes(tmp_path / "small", images=24, seed=2, shard_size=8)
    write_scenes(tmp_path / "large", images=48, seed=2, shard_size=100)
    write_scenes(tmp_path / "two", images=24, seed=2, shard_size=8, processes=2)
    for split in ("train", "val"):
        small, large = read(tmp_path / "small", split), read(tmp_path / "large", split)
        assert small.items() < large.items()
    for path in sorted((tmp_path / "small").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize(
    "bad", [{"images": 0}, {"size": 8}, {"seed": -1}, {"val_share": 1.0}, {"shard_size": 0}, {"processes": 0}]
)
def test_write_scenes_out_of_range_writes_nothing(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(UserError):
        write_scenes(tmp_path / "set", **{"images": 4, "seed": 0} | bad)
    assert not (tmp_path / "set").exists()
