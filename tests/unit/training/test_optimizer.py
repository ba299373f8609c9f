"""The optimizer step and the moving average."""

import pytest
import torch

from ijepa.config.recipe import EncoderSection, ModelSection, OptimizerSection, PredictorSection
from ijepa.model.ijepa import IJEPA
from ijepa.training.optimizer import (
    apply_step,
    make_optimizer,
    move_average,
    move_by_differences,
    set_rates,
)
from ijepa.training.schedules import Rates

SHAPE = ModelSection(
    image_size=48,
    patch_size=8,
    encoder=EncoderSection(width=16, depth=1, heads=2),
    predictor=PredictorSection(width=16, depth=1, heads=2),
)
RATES = Rates(lr_encoder=1e-2, lr_predictor=2e-2, weight_decay=0.5, momentum=0.9)


def prepared(fill: float = 0.01) -> tuple[IJEPA, torch.optim.Optimizer]:
    model = IJEPA(SHAPE)
    optimizer = make_optimizer(model, OptimizerSection())
    set_rates(optimizer, RATES)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, fill)
    return model, optimizer


def snapshot(model, optimizer):
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    return [p.clone() for p in model.parameters()] + moments


def test_make_optimizer_holds_each_trained_parameter_once():
    model, optimizer = prepared()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained)
    assert not {id(p) for p in model.target_encoder.parameters()} & set(held)


def test_apply_step_equals_adamw_by_hand():
    """AdamW's first step is lr * (g / (|g| + eps) + decay * w), for any size of g."""
    model, optimizer = prepared(0.01)
    weight = model.predictor.predictor_embed.weight
    bias = model.context_encoder.norm.bias
    before, target = weight.clone(), model.target_encoder.norm.bias.clone()
    norm, void = apply_step(model, optimizer, RATES.momentum, None)
    count = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert norm.item() == pytest.approx(0.01 * count**0.5, rel=1e-5)
    assert void.item() == 0
    torch.testing.assert_close(weight, before * (1 - 2e-2 * 0.5) - 2e-2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias, torch.full_like(bias, -1e-2), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model.target_encoder.norm.bias, target + 0.1 * (bias - target))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_apply_step_with_non_finite_gradient_changes_nothing(poison, clip):
    model, optimizer = prepared()
    apply_step(model, optimizer, RATES.momentum, clip)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.01)
    model.predictor.mask_token.grad.view(-1)[3] = poison
    before = snapshot(model, optimizer)
    _, void = apply_step(model, optimizer, RATES.momentum, clip)
    assert void.item() == 1
    for was, now in zip(before, snapshot(model, optimizer), strict=True):
        assert torch.equal(was, now)
    for group in optimizer.param_groups:  # the next step is a normal one
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.01)
    _, void = apply_step(model, optimizer, RATES.momentum, clip)
    assert void.item() == 0
    assert not torch.equal(before[0], next(model.parameters()))


def test_apply_step_clips_the_total_norm():
    model, optimizer = prepared(1.0)
    weight = model.context_encoder.norm.bias
    apply_step(model, optimizer, 1.0, clip_norm=1e-3)
    count = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert optimizer.state[weight]["exp_avg"].mean().item() == pytest.approx(0.1 * 1e-3 / count**0.5, rel=1e-3)


@pytest.mark.parametrize("weight", [0.004, 0.0, 0.6, 1.0])
def test_move_by_differences_equals_move_average(weight, monkeypatch):
    sizes = [(3, 5), (), (0, 5), (7,), (1024,), (2,)]
    draw = torch.Generator().manual_seed(0)
    averages, current = ([torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes] for _ in range(2))
    moving = torch.tensor(weight)
    wanted = [a + moving.double() * (c - a) for a, c in zip(averages, current, strict=True)]
    plain, versions = [a.clone() for a in averages], [a._version for a in averages]
    held: list[int] = []
    subtract = torch._foreach_sub
    monkeypatch.setattr(torch, "_foreach_sub", lambda a, b: held.append(sum(t.nbytes for t in a)) or subtract(a, b))
    move_by_differences(zip(averages, current, strict=True), moving, chunk_bytes=200)
    assert held == [184, 8192, 16]  # a tensor larger than a chunk is a chunk
    move_average(plain, current, moving)
    for ours, also, formula in zip(averages, plain, wanted, strict=True):
        torch.testing.assert_close(ours, formula, rtol=0, atol=1e-15)
        torch.testing.assert_close(also, formula, rtol=0, atol=1e-15)
    assert all(a._version > before for a, before in zip(averages, versions, strict=True))


def test_move_by_differences_marks_float8_weights_as_changed():
    from ijepa.model.float8 import FrozenLinear
    from ijepa.model.linear import Linear

    layer = FrozenLinear(Linear(16, 16).requires_grad_(False))
    assert not layer.moved
    move_by_differences([(layer.weight, torch.ones(16, 16))], torch.tensor(0.5))
    assert layer.moved
