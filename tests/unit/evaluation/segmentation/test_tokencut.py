from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa.data.open import open_dataset
from ijepa.evaluation.protocols import load_protocol
from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.evaluation.segmentation import tokencut as t
from ijepa.evaluation.segmentation.dataset import Classes
from ijepa.evaluation.segmentation.evaluate import evaluate_segmentation
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import UserError
from tests.helpers.encoders import MeanColor, Noise, write_pairs

RULE: dict[str, Any] = {"name": "t", "method": "tokencut", "image_size": 32, "batch": 3}


class Signed(MeanColor):
    """Colors minus gray, so that different colors have a low cosine."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return super().__call__(pixels) - 75


def scene(number: int, void: bool = False) -> np.ndarray:
    """Return a mask with one rectangle of class 1 or 2, in whole patches of 8 pixels."""
    rng = np.random.default_rng(number)
    top, left = rng.integers(0, 3, 2)
    mask = np.zeros((32, 32), np.uint8)
    mask[8 * top : 8 * top + 16, 8 * left : 8 * left + 8] = rng.integers(1, 3)
    if void:
        mask[:, 24:] = 255
    return mask


def normalized_cut(joined: np.ndarray, side: np.ndarray) -> float:
    across = joined[side][:, ~side].sum()
    return float(across / joined[side].sum() + across / joined[~side].sum())


def test_cut_finds_the_smallest_normalized_cut() -> None:
    draw = np.random.default_rng(0)
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    features = np.eye(2)[groups] + draw.normal(0, 0.05, (10, 2))
    found, seed = t.cut(torch.from_numpy(features), 0.5, 1e-5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    joined = np.where(unit @ unit.T > 0.5, 1.0, 1e-5)
    sides = [np.array(side, bool) for side in product((0, 1), repeat=10) if 0 < sum(side) < 10]
    best = min(sides, key=lambda side: normalized_cut(joined, side))
    assert (found == best).all() or (found == ~best).all()
    assert found[seed] and (found == (groups == 0)).all(), "the smaller group has the larger entries"


def rotated(real: Any, seed: int) -> Any:
    """Return numpy's `eigh` with other signs and bases of repeated eigenvalues, as a different library may have."""
    draw = np.random.default_rng(seed)

    def eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = real(matrix)
        for value in np.unique(values.round(9)):
            same = np.flatnonzero(values.round(9) == value)
            rotation, _ = np.linalg.qr(draw.normal(size=(len(same), len(same))))
            vectors[:, same] = vectors[:, same] @ (rotation * draw.choice([-1, 1], len(same)))
        return values + draw.normal(0, 1e-15, values.shape), vectors + draw.normal(0, 1e-14, vectors.shape)

    return eigh


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0]),  # the largest entries are equal but for their sign
        ([1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1]),  # two patches share the largest entry
        ([0, 1, 2] * 3, [1, 0, 0] * 3),  # the second eigenvalue is repeated
        ([*range(12)], [1] + [0] * 11),  # the second eigenvalue is repeated 11 times
        ([0] * 12, [1] + [0] * 11),
        ([0], [1]),
    ],
)
def test_cut_does_not_depend_on_the_eigensolver(
    monkeypatch: pytest.MonkeyPatch, groups: list[int], expected: list[int]
) -> None:
    features = torch.eye(12)[torch.tensor(groups)]
    real = np.linalg.eigh
    for seed in range(10):
        monkeypatch.setattr(np.linalg, "eigh", rotated(real, seed))
        found, largest = t.cut(features, 0.2, 1e-5)
        assert largest == 0 and found.astype(int).tolist() == expected


def evaluate(root: Path, encoder: Any, **scenes: bool) -> EvaluationResult:
    source = open_dataset(write_pairs(root, [scene(number, **scenes) for number in range(12)]))
    rule = SegmentationProtocol.read(RULE, "test")
    return evaluate_segmentation({"toy": encoder}, source, source, rule)


@pytest.mark.parametrize("void", [False, True])
def test_tokencut_finds_objects_that_differ_from_the_ground(tmp_path: Path, void: bool) -> None:
    result = evaluate(tmp_path, Signed(), void=void)
    (row,) = result.rows
    assert row["iou_images"] == row["miou"] == row["pixel_accuracy"] == 1 and row["ci"] == [1, 1]
    assert row["with_objects"] == 12
    if void:
        # The gray void is in the foreground too, and all foreground patches have equal entries. The first one decides
        # which box counts: that of the object if it begins in the top row and does not touch the void column.
        found = np.array([mask[0, :16].any() for mask in (scene(number) for number in range(12))])
        assert 0 < found.sum() < 12
        assert row["corloc"] == pytest.approx(found.mean())
        assert row["corloc_ci"][0] <= found.mean() <= row["corloc_ci"][1] < 1
    else:
        assert row["corloc"] == 1 and row["corloc_ci"] == [1, 1]
    assert result.level == 0 and result.data.classes == ("ground", "foreground")
    assert len(row["per_class"]) == 2 and None not in row["per_class"]


def test_ground_of_finds_background_classes_by_name(tmp_path: Path) -> None:
    """In CamVid, class 0 is sky, and everything else would be one object."""
    named = Classes(3, ("sky", "road", "car"), (255,))
    rule = load_protocol("segmentation", "tokencut").tokencut
    with pytest.raises(UserError, match="sky, road, car"):
        t.ground_of(named, rule)
    assert t.ground_of(named, rule.model_copy(update={"ground": ("sky", "road")})) == [0, 1]
    assert t.ground_of(Classes(2, ("0", "1"), ()), rule) == [0]
    assert t.ground_of(Classes(2, ("cat", "background"), ()), rule) == [1]
    plain = evaluate(tmp_path / "plain", Signed()).rows
    root = write_pairs(tmp_path / "named", [scene(number) for number in range(12)])
    (root / "labels.yaml").write_text("name: turned\nclasses: {one: 1, two: 2, background: 0}\n")
    source = open_dataset(root)
    settings = SegmentationProtocol.read(RULE, "test")
    assert evaluate_segmentation({"toy": Signed()}, None, source, settings).rows == plain


def test_tokencut_of_random_features_finds_little(tmp_path: Path) -> None:
    (row,) = evaluate(tmp_path, Noise()).rows
    assert row["corloc"] < 0.5 and row["miou"] < 0.6
    assert row["iou_images_ci"][0] <= row["iou_images"] <= row["iou_images_ci"][1]


def test_boxes_of_connected_parts_of_each_class() -> None:
    mask = np.zeros((6, 8), int)
    mask[1:3, 1:4] = 1
    mask[3:5, 2:5] = 2
    mask[0, 7] = 1
    assert sorted(t.boxes(mask)) == [(0, 7, 1, 8), (1, 1, 3, 4), (3, 2, 5, 5)]
    parts = np.array([[1, 1, 0, 1], [0, 1, 0, 1]], bool)
    assert t.box_of(parts, 5, 8) == (0, 0, 16, 16)
    assert t.box_of(parts, 3, 8) == (0, 24, 16, 32)


def test_box_iou() -> None:
    assert t.box_iou((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert t.box_iou((0, 0, 4, 4), (2, 2, 6, 6)) == pytest.approx(4 / 28)
    assert t.box_iou((0, 0, 2, 2), (3, 3, 5, 5)) == 0


@pytest.mark.parametrize("name", ["tokencut", "demo-tokencut"])
def test_presets(name: str) -> None:
    rule = load_protocol("segmentation", name)
    assert (rule.level, rule.tokencut.tau, rule.tokencut.eps) == (0, 0.2, 1e-5)
