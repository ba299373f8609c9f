"""float8 layers against float32 layers: outputs and gradients of each layer, and a hundred steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ijepa.config.recipe import OptimizerSection
from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer
from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.float8 import FrozenLinear, cpu_scales_rows, to_e4m3, to_float8, why_no_float8
from ijepa.model.ijepa import IJEPA
from ijepa.model.linear import Linear
from ijepa.training.optimizer import apply_step, make_optimizer, set_rates
from ijepa.training.schedules import Rates

pytest.importorskip("torchao")

needs_rowwise = pytest.mark.skipif(
    not cpu_scales_rows(), reason=f"torch {torch.__version__} has no rowwise float8 on a CPU"
)
SCALINGS = ["tensorwise", pytest.param("rowwise", marks=needs_rowwise)]

SHAPE = ModelConfig(
    image_size=(64, 64),
    patch_size=8,
    encoder=EncoderConfig(width=32, depth=2, heads=2, drop_path=0.2, initial="xavier"),
    predictor=PredictorConfig(width=16, depth=2, heads=2, initial="xavier"),
)


def sqnr(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Signal-to-noise ratio in decibels."""
    wanted, found = wanted.detach(), found.detach()
    gap = (wanted - found.to(wanted.dtype)).square().sum()
    return float(10 * torch.log10(wanted.square().sum() / gap.clamp(min=1e-30)))


def batch_of(step: int, images: int = 4):
    # On a GPU float8 gradients of weights need a multiple of 16 tokens; a CPU emulates the units and does not need it.
    packer = Packer(MaskRule(min_context=4), SHAPE.grid, 0, images, SHAPE.encoder.depth, SHAPE.encoder.drop_path)
    draw = np.random.default_rng(step)
    low = draw.integers(0, 256, (images, 3, 8, 8), dtype=np.uint8)  # coarse images, so that there is something to learn
    pixels = torch.from_numpy(low.repeat(8, 2).repeat(8, 3))
    return packer(np.arange(step * images, (step + 1) * images), pixels)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("weight_gradient", ["fp8", "bf16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_to_float8_layers_are_20_db_above_their_noise_forward_and_backward(scaling, weight_gradient, autocast):
    exact, cast = IJEPA(SHAPE, seed=1), IJEPA(SHAPE, seed=1)
    to_float8(cast, scaling, weight_gradient)
    draw = torch.Generator().manual_seed(0)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        fine, coarse = (model.context_encoder.blocks[1].get_submodule(name) for model in (exact, cast))
        assert type(coarse).__name__ == "Float8Linear" and coarse.weight.dtype == torch.float32
        x, d_y = (torch.randn(48, size, generator=draw) for size in (fine.in_features, fine.out_features))
        x_fine, x_coarse = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = coarse(x_coarse)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        wanted = torch.nn.functional.linear(x_fine, fine.weight, fine.bias)
        wanted.backward(d_y)
        y.backward(d_y.to(y.dtype))
        assert 20 < sqnr(wanted, y) < 50, name
        assert 20 < sqnr(x_fine.grad, x_coarse.grad) < 50, name
        gradient = sqnr(fine.weight.grad, coarse.weight.grad)
        assert gradient > (40 if weight_gradient == "bf16" else 20), name


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_linear_is_20_db_above_its_noise(scaling, dtype):
    layer = Linear(32, 64)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    frozen = FrozenLinear(layer, scaling)
    y = frozen(x)
    assert y.dtype == dtype and not y.requires_grad
    wanted = torch.nn.functional.linear(x.float(), layer.weight, layer.bias)
    assert 20 < sqnr(wanted, y.float()) < 50
    assert (frozen(torch.zeros_like(x)).float() - layer.bias).abs().max() < 0.02


@pytest.mark.parametrize("larger", [1.3, 4, 32])
def test_padding_that_sets_the_scale_costs_no_precision(larger):
    """If padding holds the largest magnitude of a tensor, the other tokens lose range only, and float8 has enough."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=draw)
    layer = torch.nn.Linear(48, 32)
    wanted, coarse = layer(x), FrozenLinear(layer)
    with_padding = torch.cat([x, larger * x.abs().max() * torch.ones(16, 48)])
    alone, beside = sqnr(wanted, coarse(x)), sqnr(wanted, coarse(with_padding)[:64])
    assert beside > 20 and abs(beside - alone) < 1


def test_to_e4m3_uses_the_whole_range_for_each_scale():
    x = torch.tensor([[1.0, -2.0], [300.0, 1e-4]])
    whole, factor = to_e4m3(x, "tensorwise")
    assert whole.float().abs().max() == 448 and factor.shape == () and float(factor) == pytest.approx(300 / 448)
    rows, factors = to_e4m3(x, "rowwise")
    assert rows.float().abs().amax(1).tolist() == [448, 448] and factors.shape == (2, 1)


def test_frozen_linear_casts_its_weights_only_after_they_changed():
    model = IJEPA(SHAPE, seed=1)
    names = dict(model.named_parameters())
    state = set(model.state_dict())
    to_float8(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in names.items()}
    assert set(model.state_dict()) == state and not any(
        "predictor" in n for n, m in model.named_modules() if "Float8" in type(m).__name__
    )
    frozen = [m for m in model.target_encoder.modules() if isinstance(m, FrozenLinear)]
    assert len(frozen) == 8
    before, version = frozen[0].weight8.clone(), frozen[0].version
    batch = batch_of(0)
    model(batch)
    model(batch)
    assert frozen[0].version == version
    optimizer = make_optimizer(model, OptimizerSection())
    set_rates(optimizer, Rates(1e-2, 1e-2, 0.0, 0.5))
    model(batch).loss.backward()
    apply_step(model, optimizer, 0.5, None)
    assert torch.equal(frozen[0].weight8.view(torch.uint8), before.view(torch.uint8))
    model(batch)
    wanted, scale = to_e4m3(frozen[0].weight.detach(), "tensorwise")
    assert torch.equal(frozen[0].weight8.view(torch.uint8), wanted.view(torch.uint8)) and frozen[0].scale == scale
    assert not torch.equal(frozen[0].weight8.view(torch.uint8), before.view(torch.uint8))


def test_to_float8_skips_layers_whose_width_is_not_a_multiple_of_16():
    shape = replace(SHAPE, encoder=EncoderConfig(width=24, depth=1, heads=2))
    model = IJEPA(shape)
    to_float8(model)
    kinds = {
        name: type(m).__name__ for name, m in model.context_encoder.named_modules() if "Linear" in type(m).__name__
    }
    assert set(kinds.values()) == {"Linear"}


def train(float8: bool, steps: int) -> list[float]:
    model = IJEPA(SHAPE, seed=1)
    if float8:
        to_float8(model)
    optimizer = make_optimizer(model, OptimizerSection())
    losses = []
    for step in range(steps):
        set_rates(optimizer, Rates(1e-3, 1e-3, 0.05, 0.99))
        with torch.autocast("cpu", torch.bfloat16):
            outcome = model(batch_of(step))
        outcome.loss.backward()
        apply_step(model, optimizer, 0.99, None)
        losses.append(float(outcome.loss.detach()))
    return losses


@pytest.mark.slow
def test_loss_stays_within_one_percent_of_that_in_bfloat16_for_100_steps():
    plain, float8 = np.array(train(False, 100)), np.array(train(True, 100))
    assert plain[-10:].mean() < 0.9 * plain[:10].mean()  # it learns
    means = [each.reshape(10, 10).mean(1) for each in (plain, float8)]
    assert np.abs(means[1] / means[0] - 1).max() < 0.01
    assert np.abs(float8 - plain).max() > 0


@pytest.mark.parametrize(("capability", "missing"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_why_no_float8_names_a_gpu_without_units(monkeypatch, capability, missing):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    reason = why_no_float8(torch.device("cuda"))
    assert "Some GPU" in reason if missing else reason is None


def test_why_no_float8_of_scales_per_row_on_a_gpu_without_autocast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "bfloat16" in why_no_float8(torch.device("cuda"), "rowwise", autocast=False)
    assert why_no_float8(torch.device("cuda"), "rowwise", autocast=True) is None
    assert why_no_float8(torch.device("cuda"), "tensorwise", autocast=False) is None


def test_why_no_float8_of_scales_per_row_on_a_cpu(monkeypatch):
    """torch 2.11 fails with an internal assertion; later versions compute it."""

    def failing(*operands, scale_a, **more):
        raise RuntimeError("INTERNAL ASSERT FAILED: _scaled_mm only supports per-tensor scaling for CPU backend")

    if cpu_scales_rows():
        assert why_no_float8(torch.device("cpu"), "rowwise", autocast=False) is None
        monkeypatch.setattr(torch, "_scaled_mm", failing)
    assert "torch" in why_no_float8(torch.device("cpu"), "rowwise")
    assert why_no_float8(torch.device("cpu"), "tensorwise") is None


def test_why_no_float8_names_the_missing_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "ijepa-pretrain[fp8]" in why_no_float8(torch.device("cpu"))
