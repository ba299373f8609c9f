"""Initial weights: their standard deviations, the factor of residual layers, and the numbers themselves."""

from statistics import NormalDist

import pytest
import torch

from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.ijepa import IJEPA
from ijepa.model.init import initial_rows
from ijepa.utils.random import Stream, name_position
from tests.reference.philox import philox_slow

SHAPE = ModelConfig(
    image_size=(64, 64),
    patch_size=8,
    encoder=EncoderConfig(width=192, depth=4, heads=4),
    predictor=PredictorConfig(width=96, depth=3, heads=4, initial="xavier"),
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return dict(IJEPA(SHAPE, seed=3).named_parameters())


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("context_encoder.patch_embed.proj.weight", 0.02),
        ("context_encoder.blocks.0.attn.qkv.weight", 0.02),
        ("context_encoder.blocks.3.mlp.fc1.weight", 0.02),
        ("context_encoder.blocks.0.attn.proj.weight", 0.02 / 2**0.5),
        ("context_encoder.blocks.0.mlp.fc2.weight", 0.02 / 2**0.5),
        ("context_encoder.blocks.3.attn.proj.weight", 0.02 / 8**0.5),
        ("context_encoder.blocks.3.mlp.fc2.weight", 0.02 / 8**0.5),
        ("predictor.predictor_embed.weight", (2 / (192 + 96)) ** 0.5),
        ("predictor.predictor_blocks.0.attn.qkv.weight", (2 / (96 + 288)) ** 0.5),
        ("predictor.predictor_blocks.2.mlp.fc1.weight", (2 / (96 + 384)) ** 0.5),
        ("predictor.predictor_blocks.2.mlp.fc2.weight", (2 / (96 + 384)) ** 0.5 / 6**0.5),
        ("predictor.predictor_blocks.2.attn.proj.weight", (2 / (96 + 96)) ** 0.5 / 6**0.5),
    ],
)
def test_init_weights_are_normal_with_the_expected_deviation(weights, name, std):
    draw = weights[name].detach().double().flatten() / std
    error = len(draw) ** -0.5
    assert abs(float(draw.mean())) < 5 * error
    assert float(draw.std()) == pytest.approx(1, abs=5 * error)
    for bound, share in ((1.0, 0.6827), (2.0, 0.9545)):
        assert float((draw.abs() < bound).double().mean()) == pytest.approx(share, abs=3 * error)


def test_init_weights_zeroes_biases_and_copies_the_target_encoder(weights):
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert bool((weight == 1).all()), name
        if name.startswith("target_encoder"):
            assert torch.equal(weight, weights[name.replace("target", "context")])
    assert float(weights["predictor.mask_token"].detach().std()) == pytest.approx(0.02, rel=0.3)


def slow(seed: int, name: str, place: int) -> float:
    """One draw in units of its deviation: Philox as the paper writes it, Python's own inverse of the normal."""
    position = name_position(name)
    counter = [place // 4, position & 0xFFFFFFFF, position >> 32, int(Stream.WEIGHTS)]
    return NormalDist().inv_cdf((philox_slow(counter, seed)[place % 4] + 0.5) / 2**32)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("blocks.0.attn.qkv.weight", 0.02),
        ("blocks.3.mlp.fc2.weight", 0.02 / 8**0.5),
    ],
)
def test_init_weights_agrees_with_the_slow_reference(weights, name, std):
    weight = weights[f"context_encoder.{name}"].detach()
    for place in (0, 1, 5, 1000, weight.numel() - 1):
        wanted = std * slow(3, f"encoder.{name}", place)
        assert weight.flatten()[place].item() == pytest.approx(wanted, rel=1e-6), place


def test_init_weights_do_not_change(weights):
    """A change here changes the run of every recipe: raise `VERSION` in utils/random.py."""
    found = {name: weights[name].detach().flatten()[:3].tolist() for name in RECORDED}
    for name, values in RECORDED.items():
        assert found[name] == pytest.approx(values, rel=1e-6), found


def test_initial_rows_are_independent_of_other_rows():
    whole = initial_rows("blocks.1.attn.proj.weight", (30, 7), (0, 30), 5)
    for start, stop in ((0, 1), (3, 11), (29, 30)):
        assert torch.equal(initial_rows("blocks.1.attn.proj.weight", (30, 7), (start, stop), 5), whole[start:stop])


RECORDED = {
    "context_encoder.patch_embed.proj.weight": [0.0238668062, 0.00446783332, -0.00338861556],
    "context_encoder.blocks.3.mlp.fc2.weight": [-0.00198915135, 0.00154526776, 0.0105543416],
    "predictor.mask_token": [-0.0186640527, -0.00139371888, 0.0401163697],
    "predictor.predictor_blocks.2.attn.proj.weight": [0.0165608581, -0.0948660523, 0.0455476642],
}
