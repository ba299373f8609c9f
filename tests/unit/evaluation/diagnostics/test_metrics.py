import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ijepa.data.open import open_dataset
from ijepa.evaluation.diagnostics import metrics as d
from ijepa.utils.errors import RunError, UserError
from tests.helpers.encoders import MeanColor
from tests.reference.segmentation import position_r2 as position_r2_reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagnose(*args: Any, **settings: Any) -> dict[str, Any]:
    found, health = d.measure_features(*args, **settings)
    return {**found, "verdict": d.verdict(health)}


class TestRankMe:
    @pytest.mark.parametrize("width", [2, 16, 64])
    def test_of_orthonormal_columns_is_their_number(self, width: int) -> None:
        q, _ = torch.linalg.qr(randn(100, width))
        assert d.rankme(q) == pytest.approx(width, rel=1e-4)

    def test_counts_directions_by_their_share(self) -> None:
        """Singular values 3 and 1 have shares 3/4 and 1/4."""
        q, _ = torch.linalg.qr(randn(50, 2))
        expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
        assert d.rankme(q * torch.tensor([3.0, 1.0])) == pytest.approx(expected, rel=1e-4)

    def test_centered_ignores_a_common_mean(self) -> None:
        q, _ = torch.linalg.qr(randn(200, 8) - randn(200, 8).mean(0))
        assert d.rankme(q + 100, centered=True) == pytest.approx(d.rankme(q, centered=True), rel=1e-6)
        assert d.rankme(q + 100) < 1.1

    def test_of_zeros_is_one(self) -> None:
        assert d.rankme(torch.zeros(10, 4)) == pytest.approx(1, abs=1e-4)


class TestMoments:
    def test_position_r2_of_position_only_is_one(self) -> None:
        assert d.Moments.of(randn(1, 16, 8).expand(20, -1, -1)).position_r2 == pytest.approx(1)

    def test_position_r2_of_noise_is_one_over_n(self) -> None:
        assert d.Moments.of(randn(200, 16, 8)).position_r2 == pytest.approx(1 / 200, abs=0.002)

    def test_position_r2_agrees_with_the_reference(self) -> None:
        features = randn(30, 9, 5) + 2 * randn(1, 9, 5, seed=1) + 50
        assert d.Moments.of(features).position_r2 == pytest.approx(position_r2_reference(features.numpy()), rel=1e-9)

    def test_position_r2_of_constant_features_is_zero(self) -> None:
        assert d.Moments.of(torch.full((4, 9, 5), 3.7)).position_r2 == 0

    def test_batches_add_up_to_the_whole(self) -> None:
        features = randn(30, 9, 5) + randn(1, 9, 5, seed=1)
        moments = d.Moments()
        for part in features.split(7):
            moments.add(part)
        whole = d.Moments.of(features)
        assert moments.position_r2 == pytest.approx(whole.position_r2, rel=1e-12)
        assert moments.patch_spread == pytest.approx(whole.patch_spread, rel=1e-12)
        assert moments.rms == pytest.approx(float(features.square().mean().sqrt()), rel=1e-12)
        torch.testing.assert_close(moments.pooled, features.mean(1))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_of_a_constructed_spectrum(alpha: float) -> None:
    q, _ = torch.linalg.qr(randn(100, 20) - randn(100, 20).mean(0))
    q = torch.linalg.qr(q - q.mean(0))[0]
    values = torch.arange(1, 21, dtype=torch.float64) ** (-alpha / 2)
    assert d.alpha_req(q * values) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_of_too_few_directions_is_nan() -> None:
    assert math.isnan(d.alpha_req(torch.ones(10, 4)))
    assert math.isnan(d.alpha_req(randn(10, 1) * torch.ones(1, 4, dtype=torch.float64)))


def test_mean_cosine_agrees_with_all_pairs() -> None:
    x = randn(12, 5) + 1
    pairs = [float(torch.cosine_similarity(x[i], x[j], dim=0)) for i in range(12) for j in range(12) if i != j]
    assert d.mean_cosine(x) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def test_patch_spread_of_equal_patches_is_zero_and_of_opposite_ones_is_one() -> None:
    same = randn(5, 1, 4).expand(-1, 6, -1)
    assert d.Moments.of(same).patch_spread == pytest.approx(0, abs=1e-12)
    assert d.Moments.of(torch.cat([same, -same], 1)).patch_spread == pytest.approx(1)


class TestLeaveOneOutKnn:
    def test_separated_classes_are_found(self) -> None:
        labels = torch.arange(60) % 3
        features = torch.eye(3, dtype=torch.float64)[labels] * 5 + 0.1 * randn(60, 3)
        assert d.leave_one_out_knn(features, labels) == 1

    def test_noise_is_at_chance(self) -> None:
        labels = torch.arange(1200) % 4
        assert d.leave_one_out_knn(randn(1200, 16), labels) == pytest.approx(0.25, abs=0.05)

    def test_leaves_the_sample_itself_out(self) -> None:
        """Each sample is similar to itself only: if it voted, the accuracy would be 1."""
        assert d.leave_one_out_knn(torch.eye(4, dtype=torch.float64), torch.arange(4)) == 0

    def test_any_integer_is_a_label(self) -> None:
        features, labels = randn(60, 3), torch.arange(60) % 3
        names = torch.tensor([7, 2**31 - 1, 2**40])
        assert d.leave_one_out_knn(features, names[labels]) == d.leave_one_out_knn(features, labels)


def health(**changed: float) -> d.Health:
    healthy = {"rankme_centred": 60.0, "relative_std": 0.4, "position_r2": 0.1, "patch_spread": 0.6}
    return d.Health(images=500, width=192, **{**healthy, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "healthy"),
        ({"relative_std": 1e-4}, "collapsed: all images"),
        ({"rankme_centred": 1.2}, "collapsed into one direction"),
        ({"rankme_centred": 3.0}, "watch: few directions"),
        ({"position_r2": 0.95}, "watch: position only"),
        ({"patch_spread": 0.001}, "watch: flat"),
    ],
)
def test_verdict(changed: dict[str, float], words: str) -> None:
    assert d.verdict(health(**changed)).startswith(words)


class TestMeasureFeatures:
    def test_collapsed_and_healthy_encoder(self, scenes) -> None:
        source = open_dataset(scenes, split="train")

        class Dead(MeanColor):
            def __call__(self, pixels: Tensor) -> Tensor:
                return torch.ones(len(pixels), 36, 24) + 1e-5 * randn(len(pixels), 36, 24).float()

        class Alive(MeanColor):
            def __call__(self, pixels: Tensor) -> Tensor:
                return super().__call__(pixels) @ randn(3, 24).float() + 20 * randn(len(pixels), 36, 24).float()

        dead = diagnose(Dead(), source, images=40, image_size=48, seed=0)
        assert dead["verdict"].startswith("collapsed: all images")
        alive = diagnose(Alive(), source, images=40, image_size=48, seed=0)
        assert alive["verdict"].startswith("healthy")
        assert alive["data"]["images"] == 40
        assert alive == diagnose(Alive(), source, images=40, image_size=48, seed=0)
        assert all(isinstance(value, float) for value in alive["numbers"].values())

    def test_constant_features_give_valid_json(self, scenes) -> None:
        class Constant(MeanColor):
            def __call__(self, pixels: Tensor) -> Tensor:
                return torch.ones(len(pixels), 36, 24)

        found = diagnose(Constant(), open_dataset(scenes, split="train"), images=20, image_size=48, seed=0)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["numbers"]["alpha_req"] is None
        assert found["numbers"]["rankme"] == pytest.approx(1, abs=1e-4)
        assert found["verdict"].startswith("collapsed")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_features_that_are_not_finite_are_refused(self, scenes, value: float) -> None:
        class Broken(MeanColor):
            def __call__(self, pixels: Tensor) -> Tensor:
                return torch.full((len(pixels), 36, 24), value)

        with pytest.raises(RunError):
            diagnose(Broken(), open_dataset(scenes, split="train"), images=20, image_size=48, seed=0)
        with pytest.raises(RunError):
            d.Moments().add(torch.full((2, 36, 24), value))

    def test_refuses_a_size_the_patch_does_not_divide(self, scenes) -> None:
        with pytest.raises(UserError) as err:
            diagnose(MeanColor(), open_dataset(scenes, split="train"), images=4, image_size=(50, 48), seed=0)
        assert err.value.where == "--image-size"

    def test_refuses_a_single_image(self, scenes) -> None:
        with pytest.raises(UserError) as err:
            diagnose(MeanColor(), open_dataset(scenes, split="train"), images=1, image_size=48, seed=0)
        assert err.value.where == "--data"
