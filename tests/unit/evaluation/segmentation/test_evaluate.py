import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ijepa.data.open import open_source
from ijepa.data.sources.base import Source
from ijepa.evaluation.protocols import load_protocol, presets
from ijepa.evaluation.segmentation import evaluate as s
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, find_classes, nearest_resize, patch_features
from ijepa.evaluation.segmentation.memory import planned_memory
from ijepa.evaluation.segmentation.patch_bank import PatchBank
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import RunError, UserError
from tests.helpers.encoders import MeanColour, Noise, block_mask, png, write_pairs

FOLDER = Path(s.__file__).parents[1] / "protocols/segmentation"
RETRIEVAL: dict[str, Any] = {"name": "r", "method": "retrieval", "image_size": 32, "retrieval": {"neighbours": [1, 5]}}
KMEANS: dict[str, Any] = {
    "name": "k",
    "method": "kmeans",
    "image_size": 32,
    "kmeans": {"overcluster": 12, "restarts": 3, "seeds": 2, "mask_size": 20},
}
SOFT: dict[str, Any] = {"name": "h", "method": "hummingbird", "image_size": 32, "hummingbird": {"neighbours": 5}}
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
    return open_source(train), open_source(test)


def evaluate(pairs: tuple[Source, Source], rule: SegmentationProtocol, encoder: Any = None) -> dict[str, Any]:
    return s.evaluate_segmentation({"toy": encoder or MeanColour()}, *pairs, rule, seed=0)


@pytest.mark.parametrize("base", [RETRIEVAL, KMEANS, SOFT, LINEAR], ids=lambda base: base["method"])
class TestAllMethods:
    def test_features_that_are_the_class_score_one(self, pairs: Any, base: dict[str, Any]) -> None:
        result = evaluate(pairs, protocol(base))
        (row,) = result["rows"]
        # Shares and logits that are interpolated between patches round the blocks' corners.
        least = 0.8 if base in (SOFT, LINEAR) else 1 - 1e-9
        assert row["miou"] >= least
        assert row["pixel_accuracy"] >= least
        assert min(row["per_class"]) >= least
        assert result["level"] == {"kmeans": 0, "linear": 2}.get(base["method"], 1)
        methods = {"kmeans", "retrieval", "hummingbird", "linear"}
        assert methods & result["protocol"].keys() == {base["method"]}, "the settings that count"
        assert result["protocol"]["name"] == base["name"]

    def test_features_that_know_nothing_are_at_chance(self, pairs: Any, base: dict[str, Any]) -> None:
        """Four classes alike in number: a quarter right, IoU 1 / 7."""
        (row,) = evaluate(pairs, protocol(base), Noise())["rows"]
        assert row["pixel_accuracy"] == pytest.approx(0.25, abs=0.08)
        assert row["miou"] == pytest.approx(1 / 7, abs=0.05)
        low, high = row["ci"]
        assert low <= row["miou"] <= high
        if base is not KMEANS:  # clusters are named by the truth, which lifts chance
            assert low <= 1 / 7 <= high

    def test_two_runs_are_equal_but_for_seconds(self, pairs: Any, base: dict[str, Any]) -> None:
        first, second = (evaluate(pairs, protocol(base)) for _ in range(2))
        assert first.pop("seconds") >= 0
        second.pop("seconds")
        assert json.dumps(first) == json.dumps(second)

    def test_a_class_that_is_nowhere_has_no_iou(self, pairs: Any, base: dict[str, Any]) -> None:
        (row,) = evaluate(pairs, protocol(base, classes=5))["rows"]
        if base is not KMEANS:  # with five clusters, one is always given to the fifth class
            assert row["per_class"][4] is None
            assert row["miou_absent_zero"] == pytest.approx(0.8 * row["miou"])
        else:
            assert row["per_class"][4] == 0

    def test_ignored_labels_are_not_scored(self, tmp_path: Path, base: dict[str, Any]) -> None:
        masks = [block_mask(i) for i in range(40)]
        for mask in masks:
            mask[:8, :16] = 255
        train = open_source(write_pairs(tmp_path / "train", masks[:20]))
        test = open_source(write_pairs(tmp_path / "test", masks[20:]))
        (row,) = evaluate((train, test), protocol(base, classes=4))["rows"]
        # A cluster goes to the grey of the ignored blocks and two classes share one: not so in retrieval.
        assert row["miou"] == pytest.approx(1) if base is RETRIEVAL else row["miou"] > (0.5 if base is KMEANS else 0.75)

    def test_features_that_are_constant_score_as_the_commonest_class(self, pairs: Any, base: dict[str, Any]) -> None:
        """A collapsed encoder's answer is one class everywhere, chance at best, and no warning from below."""

        class Constant(MeanColour):
            def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
                return torch.ones_like(super().__call__(pixels))

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = evaluate(pairs, protocol(base), Constant())
        (row,) = result["rows"]
        assert sum(iou > 0 for iou in row["per_class"]) == 1
        assert 0 < row["miou"] <= result["chance"] + 1e-12 < 0.1

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_features_that_are_not_finite_have_no_score(self, pairs: Any, base: dict[str, Any], value: float) -> None:
        class Broken(MeanColour):
            def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
                return torch.full_like(super().__call__(pixels), value)

        with pytest.raises(RunError, match="features are not finite numbers"):
            evaluate(pairs, protocol(base), Broken())

    def test_an_unreadable_image_is_named(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        root = write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)])
        (root / "images/002.png").write_bytes((root / "images/002.png").read_bytes()[:200])
        with pytest.raises(RunError, match=r"002\.png: ") as caught:
            evaluate((pairs[0], open_source(root)), protocol(base, classes=4))
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)

    def test_refuses_a_patch_that_does_not_divide(self, pairs: Any, base: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"image_size = 32: the patches of toy, 5 pixels, do not divide it"):
            evaluate(pairs, protocol(base), MeanColour(5))

    def test_refuses_a_set_without_masks(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
        with pytest.raises(UserError, match="--test: the images have no masks"):
            evaluate((pairs[0], open_source(tmp_path)), protocol(base))

    def test_refuses_a_mask_of_another_size(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        root = write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)])
        (root / "masks/002.png").write_bytes(png(block_mask(2)[:, :24]))
        with pytest.raises(UserError, match=r"002\.png: the image has 32 x 32 pixels and its mask 24 x 32"):
            evaluate((pairs[0], open_source(root)), protocol(base, classes=4))

    def test_refuses_a_label_out_of_range(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        masks = [block_mask(i) for i in range(4)]
        masks[1][3, 5] = 17
        source = open_source(write_pairs(tmp_path / "set", masks))
        with pytest.raises(UserError, match=r"001\.png: label 17 in the mask is out of range, classes are 0 to 3"):
            evaluate((pairs[0], source), protocol(base, classes=4))

    def test_refuses_a_broken_mask(self, pairs: Any, base: dict[str, Any], tmp_path: Path) -> None:
        root = write_pairs(tmp_path / "set", [block_mask(i) for i in range(4)])
        (root / "masks/003.png").write_bytes((root / "masks/003.png").read_bytes()[:60])
        with pytest.raises(UserError, match=r"--test: .*003\.png") as caught:
            evaluate((pairs[0], open_source(root)), protocol(base, classes=4))
        assert "\n" not in str(caught.value)


def test_images_are_resized_as_the_protocol_says(pairs: Any) -> None:
    seen: dict[str, list[torch.Tensor]] = {"bilinear": [], "bicubic": []}

    class Watching(MeanColour):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            seen[interpolation].append(pixels)
            return super().__call__(pixels)

    for interpolation in seen:
        evaluate(pairs, protocol(RETRIEVAL, image_size=48, interpolation=interpolation), Watching())
    for bilinear, bicubic in zip(*seen.values(), strict=True):
        assert (bilinear.float() - bicubic.float()).abs().mean() > 0.5


def test_a_set_is_not_looked_up_in_itself(pairs: Any) -> None:
    with pytest.raises(UserError, match="--test: is the train set"):
        evaluate((pairs[1], pairs[1]), protocol(RETRIEVAL))
    assert evaluate((pairs[1], pairs[1]), protocol(KMEANS))["level"] == 0, "level 0 looks nothing up"


def test_more_clusters_than_classes_are_named_many_to_one(pairs: Any) -> None:
    (row,) = evaluate(pairs, protocol(KMEANS))["rows"]
    assert row["miou_overclustered"] == pytest.approx(1)
    assert len(row["seeds"]) == 2


def test_level_zero_has_no_training_set_and_the_others_want_one(pairs: Any) -> None:
    alone = evaluate((None, pairs[1]), protocol(KMEANS))
    assert alone["data"]["train"] == {"n": 0}
    assert alone["rows"] == evaluate(pairs, protocol(KMEANS))["rows"]
    for base in (RETRIEVAL, SOFT, LINEAR):
        with pytest.raises(UserError, match=f"--train: is missing, and protocol {base['name']} is of level"):
            evaluate((None, pairs[1]), protocol(base))


def test_clustered_patches_are_bounded(pairs: Any) -> None:
    result = evaluate(pairs, protocol(KMEANS, kmeans={**KMEANS["kmeans"], "patches": 16 * 7 + 5}))
    assert result["data"]["test"]["n"] == 7
    assert result["rows"][0]["features"]["patches"] == 16 * 7
    both = s.evaluate_segmentation(
        {"coarse": MeanColour(8), "fine": MeanColour(4)},
        None,
        pairs[1],
        protocol(KMEANS, kmeans={**KMEANS["kmeans"], "patches": 64 * 7}),
        seed=0,
    )
    assert [row["features"]["patches"] for row in both["rows"]] == [16 * 7, 64 * 7], "all see the same images"


@pytest.mark.parametrize("base", [RETRIEVAL, KMEANS, SOFT, LINEAR], ids=lambda base: base["method"])
def test_what_memory_it_takes_is_told_before(pairs: Any, base: dict[str, Any]) -> None:
    told: list[str] = []
    rule = protocol(base)
    row = s.evaluate_segmentation({"toy": MeanColour()}, *pairs, rule, seed=0, progress=told.append)["rows"][0]
    assert told[0].startswith("segmentation: toy: about 0.")
    planned = planned_memory(rule, support=30, samples=20, width=3, patch_size=8, classes=4)
    if base is KMEANS:
        assert planned["features"] == row["features"]["bytes"]
    elif base is not LINEAR:
        assert planned["bank"] == row["bank"]["bytes"]


def test_no_preset_takes_more_than_it_should() -> None:
    """COCO-Stuff's 118,287 training and 5,000 validation images by a ViT-H/16, and twenty times as many of each."""
    for name in presets("segmentation"):
        rule = load_protocol("segmentation", name)
        sizes = {"width": 1280, "patch_size": 16, "classes": 27}
        most = [
            sum(planned_memory(rule, support=118287 * times, samples=5000 * times, **sizes).values()) / 1e9
            for times in (1, 20)
        ]
        assert most[0] < 30, name
        if rule.method in ("retrieval", "hummingbird"):
            assert most[1] < 30, name


def test_a_bank_of_limited_size_has_patches_of_every_image(pairs: Any) -> None:
    (row,) = evaluate(pairs, protocol(RETRIEVAL, retrieval={"neighbours": [1], "bank_patches": 90}))["rows"]
    assert row["bank"]["patches"] == 90
    assert row["miou"] == pytest.approx(1)


@pytest.mark.parametrize("base", [RETRIEVAL, SOFT], ids=lambda base: base["method"])
def test_an_inverted_index_says_its_recall(pairs: Any, base: dict[str, Any]) -> None:
    settings = base[base["method"]]
    exact = evaluate(pairs, protocol(base))["rows"][0]
    for probes in (2, 500):
        rule = {**settings, "search": "inverted", "lists": 20, "probes": probes}
        (row,) = evaluate(pairs, protocol({**base, base["method"]: rule}))["rows"]
        assert row["bank"]["lists"] == 20
        assert 0 < row["bank"]["recall"] <= 1
        assert probes == 2 or row["bank"]["recall"] > 0.9, "but for neighbours that are equal to the last digit"
        assert row["miou"] == pytest.approx(exact["miou"], abs=0.05 if probes == 2 else 1e-3)
    assert "recall" not in exact["bank"]


def test_neighbours_are_chosen_on_the_held_out_part_alone(pairs: Any, tmp_path: Path) -> None:
    """With every mask of the test set wrong, the score falls and the choice stays."""
    wrong = [(block_mask(100 + i) + 1) % 4 for i in range(20)]
    root = write_pairs(tmp_path / "wrong", [block_mask(100 + i) for i in range(20)])
    for number, mask in enumerate(wrong):
        (root / f"masks/{number:03d}.png").write_bytes(png(mask))
    (right,), (row,) = (
        evaluate((pairs[0], test), protocol(RETRIEVAL))["rows"] for test in (pairs[1], open_source(root))
    )
    assert row["miou"] < 0.01 < right["miou"]
    for key in ("k", "distance", "miou_held_out", "bank"):
        assert row[key] == right[key]


def test_a_bank_grows_by_the_rule_it_began_with(pairs: Any) -> None:
    train, _ = pairs
    classes = Classes(4, ("a", "b", "c", "d"), (255,))
    first, second = (Annotated(train, part, "--train", 32, 32) for part in np.split(np.arange(20), 2))
    bank = PatchBank(MeanColour(), first, classes, images=20)
    np.testing.assert_allclose(bank.keys.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(bank.keys.std(0, correction=0), 1, atol=1e-5)
    mean, size = bank.mean.clone(), bank.nbytes
    bank.extend(second)
    assert len(bank) == 320
    assert (bank.mean == mean).all()
    assert bank.nbytes == size == 320 * (3 * 4 + 64)


@pytest.mark.parametrize("patches", [None, 30])
def test_a_bank_is_standardised_by_all_patches_of_its_images(tmp_path: Path, patches: int | None) -> None:
    """Those that are ignored, and those that a bounded bank does not keep, count for mean and deviation."""
    masks = [block_mask(i) for i in range(10)]
    for mask in masks:
        mask[:16] = 255
    source = open_source(write_pairs(tmp_path / "half", masks))
    classes = Classes(4, ("a", "b", "c", "d"), (255,))
    images = Annotated(source, np.arange(10), "--train", 32, 32)
    bank = PatchBank(MeanColour(), images, classes, images=10, patches=patches, batch=3)
    every = np.concatenate([x.flatten(0, 1) for x, _ in patch_features(MeanColour(), images, classes, 3)])
    assert len(bank) < len(every) == 160
    np.testing.assert_allclose(bank.mean, every.mean(0), rtol=1e-5)
    np.testing.assert_allclose(1 / bank.scale, every.std(0), rtol=1e-5)


def test_scenes_have_ground_and_their_names(scenes: Path) -> None:
    source = open_source(scenes, split="train")
    found = find_classes([(source, "--train")], None, (255,))
    assert found.names[:2] == ("ground", "ring")
    assert found.count == found.scored == 9


def test_classes_are_counted_where_they_have_no_names(pairs: Any) -> None:
    assert find_classes([(pairs[0], "--train")], None, (255, 0)) == Classes(4, ("0", "1", "2", "3"), (255, 0))
    assert find_classes([(pairs[0], "--train")], None, (255, 0)).scored == 3


def test_nearest_resize_takes_the_pixel_at_the_new_centre() -> None:
    assert nearest_resize(np.arange(4)[None].repeat(4, 0), (2, 2)).tolist() == [[1, 3], [1, 3]]
    assert nearest_resize(np.array([[1, 2], [3, 4]]), (4, 4))[0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("name", presets("segmentation"))
def test_presets_are_valid_and_named_as_their_files(name: str) -> None:
    rule = SegmentationProtocol.read(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), name)
    assert rule.name == name
    assert f"(level {rule.level})" in rule.description
