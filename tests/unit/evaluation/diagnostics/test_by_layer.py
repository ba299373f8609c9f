import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.diagnostics.by_layer import (
    before_norm,
    context_views,
    diagnose_fully,
    layer_figures,
    lidar,
    norm_of,
)
from ijepa.evaluation.diagnostics.metrics import diagnose
from ijepa.evaluation.features.sampling import choose, crops
from ijepa.model.encoder import FrozenEncoder
from tests.conftest import TINY

RECIPE = Recipe.read(TINY, "tiny")
SIZE = RECIPE.model.image_size


@pytest.fixture(scope="module")
def encoder() -> FrozenEncoder:
    return FrozenEncoder.initial(RECIPE.model, 0)


def test_lidar_counts_directions_between_images() -> None:
    """Images apart along 5 of 20 directions alike, views within them along all: 5."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.zeros(2000, 1, 20, dtype=torch.float64)
    centres[..., :5] = torch.randn(2000, 1, 5, generator=generator, dtype=torch.float64) * 30
    views = centres + torch.randn(2000, 4, 20, generator=generator, dtype=torch.float64)
    assert lidar(views) == pytest.approx(5, rel=0.02)
    assert lidar(views + 1000) == pytest.approx(lidar(views), rel=1e-6)


def test_lidar_against_the_definition() -> None:
    views = np.random.default_rng(0).normal(size=(30, 5, 6)) + np.random.default_rng(1).normal(size=(30, 1, 6)) * 2
    means = views.mean(1)
    between, within = np.zeros((6, 6)), np.zeros((6, 6))
    for image in range(30):
        apart = means[image] - means.mean(0)
        between += np.outer(apart, apart) / 30
        for view in range(5):
            apart = views[image, view] - means[image]
            within += np.outer(apart, apart) / 150
    values = np.linalg.eigvals(np.linalg.inv(within + 1e-4 * np.eye(6)) @ between).real
    p = values / values.sum() + 1e-7
    assert lidar(torch.from_numpy(views)) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-6)


def test_what_goes_into_the_norm_is_seen_block_by_block(scenes: Path, encoder: FrozenEncoder) -> None:
    source = open_dataset(scenes, split="train")
    chosen = choose(len(source), 20, 0)
    depth = len(encoder.vit.blocks)
    rows = layer_figures(encoder, source, chosen, SIZE, depth)
    assert [row["layer"] for row in rows] == list(range(1, depth + 1))
    with before_norm(norm_of(encoder)) as raw:
        outputs = encoder.forward_blocks(crops(source, chosen, SIZE), depth)
    assert len(raw) == depth
    for row, tokens, output in zip(rows, raw, outputs, strict=True):
        assert row["std_before_norm"] == pytest.approx(float(tokens.double().std(0, correction=0).mean()), rel=1e-5)
        torch.testing.assert_close(encoder.vit.norm(tokens), output.flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert not encoder.vit.norm._forward_pre_hooks


def test_a_context_is_encoded_by_itself(scenes: Path, encoder: FrozenEncoder) -> None:
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


def test_a_full_diagnosis_is_the_plain_one_and_more(scenes: Path, encoder: FrozenEncoder) -> None:
    source = open_dataset(scenes, split="train")
    found = diagnose_fully(encoder, source, images=20, image_size=SIZE, seed=0, rule=RECIPE.mask, views=3, layers=True)
    plain = diagnose(encoder, source, images=20, image_size=SIZE, seed=0)
    assert found["numbers"].items() > plain["numbers"].items()
    assert found["numbers"]["lidar"] >= 1
    assert found["numbers"]["lidar"] == found["layers"][-1]["lidar"]
    for key in ("rankme", "rankme_centred", "std", "position_r2", "mean_cosine", "alpha_req", "patch_spread"):
        assert found["layers"][-1][key] == pytest.approx(plain["numbers"][key], rel=1e-4), key
    assert len({row["lidar"] for row in found["layers"]}) == len({row["alpha_req"] for row in found["layers"]}) > 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    without = diagnose_fully(encoder, source, images=20, image_size=SIZE, seed=0, rule=RECIPE.mask, views=0)
    assert "lidar" not in without["numbers"]
    assert "layers" not in without


def test_the_verdict_knows_what_the_norm_hides_and_what_views_say(
    scenes: Path, encoder: FrozenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(scenes, split="train")
    settings = {"images": 20, "image_size": SIZE, "seed": 0, "rule": RECIPE.mask, "views": 2}
    hidden = FrozenEncoder.initial(RECIPE.model, 0)
    with torch.no_grad():  # every token the same but for a thousandth, which the norm stretches again
        hidden.vit.pos_embed.mul_(1e-3)
        hidden.vit.patch_embed.proj.weight.mul_(1e-3)
        hidden.vit.patch_embed.proj.bias.fill_(1.0)[::2] = -1.0
        for block in hidden.vit.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    hidden.vit.norm.bias.data[::2], hidden.vit.norm.bias.data[1::2] = 1.0, -1.0  # takes the common part away
    hidden.vit.norm.weight.data.fill_(1.0)
    found = diagnose_fully(hidden, source, **settings)
    assert found["numbers"]["relative_std"] > 0.01, "behind the norm nothing shows"
    assert found["verdict"].startswith("collapsed before the final norm")
    assert not diagnose(hidden, source, images=20, image_size=SIZE, seed=0)["verdict"].startswith("collapsed before")
    monkeypatch.setattr("ijepa.evaluation.diagnostics.by_layer.lidar", lambda views: 1.2)
    assert diagnose_fully(encoder, source, **settings)["verdict"].startswith(
        "watch: images are hardly distinguished: LiDAR 1.2"
    )
