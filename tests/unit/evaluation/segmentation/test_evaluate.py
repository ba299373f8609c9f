import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.evaluation.context import EvaluationContext
from ijepa.evaluation.protocols import load_protocol, presets
from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.evaluation.segmentation import evaluate as s
from ijepa.evaluation.segmentation.memory import planned_memory
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import RunError, UserError
from tests.helpers.encoders import MeanColor, Noise, block_mask, png, write_pairs

RETRIEVAL: dict[str, Any] = {"name": "r", "method": "retrieval", "image_size": 32, "retrieval": {"neighbors": [1, 5]}}
KMEANS: dict[str, Any] = {
    "name": "k",
    "method": "kmeans",
    "image_size": 32,
    "kmeans": {"overcluster": 12, "restarts": 3, "seeds": 2, "mask_size": 20},
}
SOFT: dict[str, Any] = {"name": "h", "method": "hummingbird", "image_size": 32, "hummingbird": {"neighbors": 5}}
LINEAR: dict[str, Any] = {
    "name": "l",
    "method": "linear",
    "image_size": 32,
    "linear": {"steps": 100, "lr": 0.1, "dropout": 0, "batch": 8},
}


def protocol(base: dict[str, Any], **changed: Any) -> SegmentationProtocol:
    return SegmentationProtocol.read({**base, **changed}, "test")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    root = tmp_path_factory.mktemp("pairs")
    train = write_pairs(root / "train", [block_mask(i) for i in range(30)])
    test = write_pairs(root / "test", [block_mask(100 + i) for i in range(20)])
    return open_dataset(train), open_dataset(test)


def evaluate(pairs: tuple[Source, Source], rule: SegmentationProtocol, encoder: Any = None) -> EvaluationResult:
    return s.evaluate_segmentation({"toy": encoder or MeanColor()}, *pairs, rule)


@pytest.mark.parametrize("base", [RETRIEVAL, KMEANS, SOFT, LINEAR], ids=lambda base: base["method"])
class TestAllMethods:
    def test_features_that_determine_the_class_score_one(self, pairs: Any, base: dict[str, Any]) -> None:
        result = evaluate(pairs, protocol(base))
        (row,) = result.rows
        # Shares and logits that are interpolated between patches round the blocks' corners.
        least = 0.8 if base in (SOFT, LINEAR) else 1 - 1e-9
        assert row["miou"] >= least
        assert row["pixel_accuracy"] >= least
        assert min(row["per_class"]) >= least
        assert result.level == {"kmeans": 0, "linear": 2}.get(base["method"], 1)
        # Only the section of the method is part of the result.
        methods = {"kmeans", "retrieval", "hummingbird", "linear"}
        assert methods & result.protocol.keys() == {base["method"]}
        assert result.protocol_name == base["name"]

    def test_random_features_score_at_chance(self, pairs: Any, base: dict[str, Any]) -> None:
        """Four classes of the same size: a quarter of the pixels is right, and IoU is 1 / 7."""
        (row,) = evaluate(pairs, protocol(base), Noise()).rows
        assert row["pixel_accuracy"] == pytest.approx(0.25, abs=0.08)
        assert row["miou"] == pytest.approx(1 / 7, abs=0.05)
        low, high = row["ci"]
        assert low <= row["miou"] <= high
        if base is not KMEANS:  # clusters are matched to the true classes, so that chance is higher
            assert low <= 1 / 7 <= high

    def test_two_evaluations_differ_in_seconds_only(self, pairs: Any, base: dict[str, Any]) -> None:
        first, second = (evaluate(pairs, protocol(base)).model_copy(update={"seconds": 0}) for _ in range(2))
        assert first == second

    def test_a_class_that_does_not_occur_has_no_iou(self, pairs: Any, base: dict[str, Any]) -> None:
        (row,) = evaluate(pairs, protocol(base, classes=5)).rows
        if base is not KMEANS:  # with five clusters, one is always given to the fifth class
            assert row["per_class"][4] is None
            assert row["miou_absent_zero"] == pytest.approx(0.8 * row["miou"])
        else:
            assert row["per_class"][4] == 0

    def test_ignored_labels_are_not_scored(self, tmp_path: Path, base: dict[str, Any]) -> None:
        masks = [block_mask(i) for i in range(40)]
        for mask in masks:
            mask[:8, :16] = 255
        train = open_dataset(write_pairs(tmp_path / "train", masks[:20]))
        test = open_dataset(write_pairs(tmp_path / "test", masks[20:]))
        (row,) = evaluate((train, test), protocol(base, classes=4)).rows
        # One cluster has the gray ignored blocks, so that two classes share a cluster; retrieval has no clusters.
        assert row["miou"] == pytest.approx(1) if base is RETRIEVAL else row["miou"] > (0.5 if base is KMEANS else 0.75)

    def test_constant_features_score_as_the_most_frequent_class(self, pairs: Any, base: dict[str, Any]) -> None:
        """The prediction of a collapsed encoder is one class everywhere, and no library warns."""

        class Constant(MeanColor):
            def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
                return torch.ones_like(super().__call__(pixels))

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = evaluate(pairs, protocol(base), Constant())
        (row,) = result.rows
        assert sum(iou > 0 for iou in row["per_class"]) == 1
        assert 0 < row["miou"] <= result.chance + 1e-12 < 0.1

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_features_that_are_not_finite_are_refused(self, pairs: Any, base: dict[str, Any], value: float) -> None:
        class Broken(MeanColor):
            def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
                return torch.full_like(super().__call__(pixels), value)

        with pytest.raises(RunError, match="finite"):
            evaluate(pairs, protocol(base), Broken())

    def test_an_unreadable_image_is_named(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        root = write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)])
        (root / "images/002.png").write_bytes((root / "images/002.png").read_bytes()[:200])
        with pytest.raises(RunError, match=r"002\.png: ") as caught:
            evaluate((pairs[0], open_dataset(root)), protocol(base, classes=4))
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)

    def test_refuses_a_patch_that_does_not_divide(self, pairs: Any, base: dict[str, Any]) -> None:
        with pytest.raises(UserError) as err:
            evaluate(pairs, protocol(base), MeanColor(5))
        assert "image_size = 32" in err.value.where

    def test_refuses_a_set_without_masks(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
        with pytest.raises(UserError) as err:
            evaluate((pairs[0], open_dataset(tmp_path)), protocol(base))
        assert err.value.where == "--test"

    def test_refuses_a_mask_of_another_size(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        root = write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)])
        (root / "masks/002.png").write_bytes(png(block_mask(2)[:, :24]))
        with pytest.raises(UserError, match=r"002\.png.*24 x 32"):
            evaluate((pairs[0], open_dataset(root)), protocol(base, classes=4))

    def test_refuses_a_label_out_of_range(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        masks = [block_mask(i) for i in range(4)]
        masks[1][3, 5] = 17
        source = open_dataset(write_pairs(tmp_path / "set", masks))
        with pytest.raises(UserError, match=r"001\.png: label 17"):
            evaluate((pairs[0], source), protocol(base, classes=4))

    def test_refuses_a_broken_mask(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        root = write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)])
        (root / "masks/003.png").write_bytes((root / "masks/003.png").read_bytes()[:60])
        with pytest.raises(UserError, match=r"--test: .*003\.png") as caught:
            evaluate((pairs[0], open_dataset(root)), protocol(base, classes=4))
        assert "\n" not in str(caught.value)


def test_images_are_resized_by_the_filter_of_the_protocol(pairs: Any) -> None:
    seen: dict[str, list[torch.Tensor]] = {"bilinear": [], "bicubic": []}

    class Watching(MeanColor):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            seen[interpolation].append(pixels)
            return super().__call__(pixels)

    for interpolation in seen:
        evaluate(pairs, protocol(RETRIEVAL, image_size=48, interpolation=interpolation), Watching())
    for bilinear, bicubic in zip(*seen.values(), strict=True):
        assert (bilinear.float() - bicubic.float()).abs().mean() > 0.5


def test_the_train_set_is_refused_as_test_set_except_at_level_0(pairs: Any) -> None:
    with pytest.raises(UserError) as err:
        evaluate((pairs[1], pairs[1]), protocol(RETRIEVAL))
    assert err.value.where == "--test"
    assert evaluate((pairs[1], pairs[1]), protocol(KMEANS)).level == 0


def test_overclustering_matches_several_clusters_to_a_class(pairs: Any) -> None:
    (row,) = evaluate(pairs, protocol(KMEANS)).rows
    assert row["miou_overclustered"] == pytest.approx(1)
    assert len(row["seeds"]) == 2


def test_level_0_needs_no_train_set_and_other_levels_do(pairs: Any) -> None:
    alone = evaluate((None, pairs[1]), protocol(KMEANS))
    assert alone.data.train.n == 0
    assert alone.rows == evaluate(pairs, protocol(KMEANS)).rows
    for base in (RETRIEVAL, SOFT, LINEAR):
        with pytest.raises(UserError) as err:
            evaluate((None, pairs[1]), protocol(base))
        assert err.value.where == "--train"


def test_the_number_of_clustered_patches_is_limited(pairs: Any) -> None:
    result = evaluate(pairs, protocol(KMEANS, kmeans={**KMEANS["kmeans"], "patches": 16 * 7 + 5}))
    assert result.data.test.n == 7
    assert result.rows[0]["features"]["patches"] == 16 * 7
    both = s.evaluate_segmentation(
        {"coarse": MeanColor(8), "fine": MeanColor(4)},
        None,
        pairs[1],
        protocol(KMEANS, kmeans={**KMEANS["kmeans"], "patches": 64 * 7}),
    )
    assert [row["features"]["patches"] for row in both.rows] == [16 * 7, 64 * 7]


@pytest.mark.parametrize("base", [RETRIEVAL, KMEANS, SOFT, LINEAR], ids=lambda base: base["method"])
def test_planned_memory_is_reported_and_agrees_with_the_result(pairs: Any, base: dict[str, Any]) -> None:
    told: list[str] = []
    rule = protocol(base)
    row = s.evaluate_segmentation({"toy": MeanColor()}, *pairs, rule, EvaluationContext(progress=told.append)).rows[0]
    assert told[0].startswith("segmentation: toy: about 0.")
    planned = planned_memory(rule, support=30, samples=20, width=3, patch_size=8, classes=4)
    if base is KMEANS:
        assert planned["features"] == row["features"]["bytes"]
    elif base is not LINEAR:
        assert planned["bank"] == row["bank"]["bytes"]


def test_a_bank_of_limited_size_scores_as_well(pairs: Any) -> None:
    (row,) = evaluate(pairs, protocol(RETRIEVAL, retrieval={"neighbors": [1], "bank_patches": 90})).rows
    assert row["bank"]["patches"] == 90
    assert row["miou"] == pytest.approx(1)


@pytest.mark.parametrize("base", [RETRIEVAL, SOFT], ids=lambda base: base["method"])
def test_faiss_search_reports_its_recall(pairs: Any, base: dict[str, Any]) -> None:
    settings = base[base["method"]]
    exact = evaluate(pairs, protocol(base)).rows[0]
    for probes in (2, 500):
        rule = {**settings, "search": "faiss", "lists": 20, "probes": probes}
        (row,) = evaluate(pairs, protocol({**base, base["method"]: rule})).rows
        assert row["bank"]["lists"] == 20
        assert 0 < row["bank"]["recall"] <= 1
        assert probes == 2 or row["bank"]["recall"] > 0.9
        assert row["miou"] == pytest.approx(exact["miou"], abs=0.05 if probes == 2 else 1e-3)
    assert "recall" not in exact["bank"]


def test_faiss_search_names_the_extra_that_is_missing(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa.utils.extras.find_spec", lambda name: None)
    with pytest.raises(UserError) as err:
        evaluate(pairs, protocol(RETRIEVAL, retrieval={"search": "faiss"}))
    assert "search = faiss" in err.value.where and "[faiss]" in err.value.hint


def test_k_and_distance_are_chosen_on_the_held_out_part_only(pairs: Any, tmp_path: Path) -> None:
    """Wrong masks of the test set change the score, but not the choice."""
    wrong = [(block_mask(100 + i) + 1) % 4 for i in range(20)]
    root = write_pairs(tmp_path / "wrong", [block_mask(100 + i) for i in range(20)])
    for number, mask in enumerate(wrong):
        (root / f"masks/{number:03d}.png").write_bytes(png(mask))
    (right,), (row,) = (evaluate((pairs[0], test), protocol(RETRIEVAL)).rows for test in (pairs[1], open_dataset(root)))
    assert row["miou"] < 0.01 < right["miou"]
    for key in ("k", "distance", "miou_held_out", "bank"):
        assert row[key] == right[key]


@pytest.mark.parametrize("name", presets("segmentation"))
def test_descriptions_of_presets_state_the_level(name: str) -> None:
    rule = load_protocol("segmentation", name)
    assert f"(level {rule.level})" in rule.description
