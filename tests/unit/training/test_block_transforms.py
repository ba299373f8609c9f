"""Attention kernels, activation checkpointing and compilation keep the plain model's loss and gradients."""

import numpy as np
import pytest
import torch

from ijepa.config.recipe import EncoderSection, ModelSection, PredictorSection
from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer, layer_rates
from ijepa.masking.token_budget import Budget
from ijepa.training.block_transforms import call_compiled, checkpoint_activations, compile_blocks, set_attention
from tests.helpers.models import randomized
from tests.helpers.sequences import sequences

RULE = MaskRule(min_context=4)
SHAPE = ModelSection(
    image_size=(64, 64),
    patch_size=8,
    encoder=EncoderSection(width=32, depth=4, heads=4, drop_path=0.4),
    predictor=PredictorSection(width=16, depth=4, heads=2),
)
RATES = layer_rates(4, 0.4)
BUDGET = Budget.for_masks(RULE, (8, 8), 4, RATES, deviations=4, granule=16)


def batch_of(step: int, budget: Budget | None = BUDGET):
    pixels = np.random.default_rng(step).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    return Packer(RULE, (8, 8), 0, 8, 4, 0.4, budget)(np.arange(4 * step, 4 * step + 4), torch.from_numpy(pixels))


def outcome_of(model, batch):
    outcome = model(batch)
    outcome.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return outcome.loss.item(), gradients


def agree(model, plain, batches, tolerance=1e-10):
    for batch in batches:
        (loss, gradients), (wanted, expected) = outcome_of(model, batch), outcome_of(plain, batch)
        assert loss == pytest.approx(wanted, rel=tolerance)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() < tolerance * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_set_attention_changes_rounding_only(budget):
    model, plain = randomized(SHAPE), randomized(SHAPE)
    set_attention(model, "math")
    agree(model, plain, [batch_of(0, budget)])


@pytest.mark.parametrize("what", ["selective", "full"])
@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_checkpoint_activations_keeps_gradients(what, kernel):
    model, plain = randomized(SHAPE), randomized(SHAPE)
    for each in (model, plain):
        set_attention(each, kernel)
    checkpoint_activations(model, what)
    agree(model, plain, [batch_of(0), batch_of(1, None)], tolerance=1e-14)


def saved_bytes(model) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch_of(0))
    return sum(sizes.values())


def test_checkpoint_activations_full_saves_fewer_tensors():
    plain, full = randomized(SHAPE), randomized(SHAPE)
    checkpoint_activations(full, "full")
    assert saved_bytes(full) < 0.6 * saved_bytes(plain)


@pytest.mark.parametrize("what", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_compile_blocks_keeps_results_and_compiles_once(what):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, plain = randomized(SHAPE), randomized(SHAPE)
    for each in (model, plain):
        set_attention(each, "math")
    checkpoint_activations(model, what)
    counter = CompileCounterWithBackend("eager")
    compile_blocks(model, counter)
    agree(model, plain, [batch_of(0), batch_of(1)])
    warm = counter.frame_count
    assert 0 < warm < 12
    for step in range(2, 12):
        model(batch_of(step)).loss.backward()
    assert counter.frame_count == warm
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_block_gets_no_lengths_if_it_has_a_limit():
    bounded, unbounded = sequences((3, 2), 0, 4), sequences((3, 2), 0, 0)
    given = call_compiled(lambda *arguments: arguments, {}, torch.zeros(5, 8), bounded, unbounded, None)
    assert (given[1].lengths, given[1].longest) == ((), 4) and given[1].cu_seqlens is bounded.cu_seqlens
    assert given[2] is unbounded
