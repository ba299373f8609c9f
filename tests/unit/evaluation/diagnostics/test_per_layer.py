import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.diagnostics.metrics import measure_features, verdict
from ijepa.evaluation.diagnostics.per_layer import (
    context_views,
    diagnose,
    final_norm,
    lidar,
    per_layer_diagnostics,
    record_norm_inputs,
)
from ijepa.evaluation.features.sampling import choose, crops
from ijepa.model.encoder import FrozenEncoder
from tests.conftest import TINY

RECIPE = Recipe.read(TINY, "tiny")
SIZE = RECIPE.model.image_size


@pytest.fixture(scope="module")
def encoder() -> FrozenEncoder:
    return FrozenEncoder.initial(RECIPE.model, 0)


def test_lidar_counts_directions_that_differ_between_images() -> None:
    """Images differ in 5 of 20 directions, views of one image in all of them."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.zeros(2000, 1, 20, dtype=torch.float64)
    centers[..., :5] = torch.randn(2000, 1, 5, generator=generator, dtype=torch.float64) * 30
    views = centers + torch.randn(2000, 4, 20, generator=generator, dtype=torch.float64)
    assert lidar(views) == pytest.approx(5, rel=0.02)
    assert lidar(views + 1000) == pytest.approx(lidar(views), rel=1e-6)


def test_lidar_agrees_with_the_definition() -> None:
    views = np.random.default_rng(0).normal(size=(30, 5, 6)) + np.random.default_rng(1).normal(size=(30, 1, 6)) * 2
    means = views.mean(1)
    between, within = np.zeros((6, 6)), np.zeros((6, 6))
    for image in range(30):
        difference = means[image] - means.mean(0)
        between += np.outer(difference, difference) / 30
        for view in range(5):
            difference = views[image, view] - means[image]
            within += np.outer(difference, difference) / 150
    values = np.linalg.eigvals(np.linalg.inv(within + 1e-4 * np.eye(6)) @ between).real
    p = values / values.sum() + 1e-7
    assert lidar(torch.from_numpy(views)) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-6)


def test_per_layer_diagnostics_read_the_input_of_the_norm(scenes: Path, encoder: FrozenEncoder) -> None:
    source = open_dataset(scenes, split="train")
    chosen = choose(len(source), 20, 0)
    depth = len(encoder.vit.blocks)
    rows = per_layer_diagnostics(encoder, source, chosen, SIZE, depth)
    assert [row["layer"] for row in rows] == list(range(1, depth + 1))
    with record_norm_inputs(final_norm(encoder)) as inputs:
        outputs = encoder.forward_blocks(crops(source, chosen, SIZE), depth)
    assert len(inputs) == depth
    for row, tokens, output in zip(rows, inputs, outputs, strict=True):
        assert row["std_before_norm"] == pytest.approx(float(tokens.double().std(0, correction=0).mean()), rel=1e-5)
        torch.testing.assert_close(encoder.vit.norm(tokens), output.flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert not encoder.vit.norm._forward_pre_hooks


def test_context_views_encode_each_context_separately(scenes: Path, encoder: FrozenEncoder) -> None:
    source = open_dataset(scenes, split="train")
    chosen = choose(len(source), 6, 0)
    views = context_views(encoder, source, chosen, SIZE, RECIPE.mask, 3, seed=1)
    assert views.shape == (1, 6, 3, encoder.embed_dim)
    alone = context_views(encoder, source, chosen[2:3], SIZE, RECIPE.mask, 3, seed=1)
    torch.testing.assert_close(views[:, 2:3], alone, atol=1e-4, rtol=1e-4)
    assert (views[0, :, 0] - views[0, :, 1]).abs().max() > 1e-4
    both = context_views(encoder, source, chosen, SIZE, RECIPE.mask, 3, seed=1, layers=2)
    torch.testing.assert_close(both[1:], views, atol=0, rtol=0)
    assert (both[0] - both[1]).abs().max() > 1e-4


def test_diagnose_adds_to_measure_features(scenes: Path, encoder: FrozenEncoder) -> None:
    source = open_dataset(scenes, split="train")
    found = diagnose(encoder, source, images=20, image_size=SIZE, seed=0, rule=RECIPE.mask, views=3, layers=True)
    plain, _ = measure_features(encoder, source, images=20, image_size=SIZE, seed=0)
    assert found["numbers"].items() > plain["numbers"].items()
    assert found["numbers"]["lidar"] >= 1
    assert found["numbers"]["lidar"] == found["layers"][-1]["lidar"]
    for key in ("rankme", "rankme_centred", "std", "position_r2", "mean_cosine", "alpha_req", "patch_spread"):
        assert found["layers"][-1][key] == pytest.approx(plain["numbers"][key], rel=1e-4), key
    assert len({row["lidar"] for row in found["layers"]}) == len({row["alpha_req"] for row in found["layers"]}) > 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    without = diagnose(encoder, source, images=20, image_size=SIZE, seed=0, rule=RECIPE.mask, views=0)
    assert "lidar" not in without["numbers"]
    assert "layers" not in without


def test_diagnose_judges_the_input_of_the_norm_and_lidar(
    scenes: Path, encoder: FrozenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(scenes, split="train")
    settings = {"images": 20, "image_size": SIZE, "seed": 0, "rule": RECIPE.mask, "views": 2}
    hidden = FrozenEncoder.initial(RECIPE.model, 0)
    with torch.no_grad():  # tokens differ by a thousandth, which the norm rescales
        hidden.vit.pos_embed.mul_(1e-3)
        hidden.vit.patch_embed.proj.weight.mul_(1e-3)
        hidden.vit.patch_embed.proj.bias.fill_(1.0)[::2] = -1.0
        for block in hidden.vit.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    hidden.vit.norm.bias.data[::2], hidden.vit.norm.bias.data[1::2] = 1.0, -1.0  # removes the common part
    hidden.vit.norm.weight.data.fill_(1.0)
    found = diagnose(hidden, source, **settings)
    assert found["numbers"]["relative_std"] > 0.01, "nothing is visible after the norm"
    assert found["verdict"].startswith("collapsed before the final norm")
    _, health = measure_features(hidden, source, images=20, image_size=SIZE, seed=0)
    assert not verdict(health).startswith("collapsed before")
    monkeypatch.setattr("ijepa.evaluation.diagnostics.per_layer.lidar", lambda views: 1.2)
    assert diagnose(encoder, source, **settings)["verdict"].startswith(
        "watch: different images look similar: LiDAR 1.2"
    )
