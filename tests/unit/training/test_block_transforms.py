"""Attention kernels, activation checkpointing and compilation keep the plain model's loss and gradients."""

import numpy as np
import pytest
import torch

from ijepa.config.recipe import EncoderSection, ModelSection, PredictorSection
from ijepa.masking.batch import Sequences
from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer, layer_rates
from ijepa.masking.token_budget import Budget
from ijepa.model.attention import attention
from ijepa.model.ijepa import IJEPA, whole_images
from ijepa.model.linear import Linear
from ijepa.training.block_transforms import call_compiled, checkpoint_activations, compile_blocks, set_attention
from tests.reference.dense import attend

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


def stirred(dtype=torch.float64) -> IJEPA:
    model = IJEPA(SHAPE, seed=1).to(dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=dtype))
    return model


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


def sequences(lengths, empty=0, limit=0):
    ends = np.concatenate([[0], np.cumsum([*lengths, *[0] * empty])]).astype(np.int32)
    return Sequences(torch.arange(int(ends[-1])), torch.from_numpy(ends), tuple(lengths), limit)


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize(
    ("lengths", "empty", "limit", "beyond"),
    # The last case has as many rows as two sequences of the longest one's length.
    [((5, 9, 1), 0, 0, 3), ((7, 7), 0, 7, 0), ((5, 12), 3, 16, 0), ((61, 62), 0, 0, 1)],
)
def test_attention_kernels_equal_the_definition(kernel, lengths, empty, limit, beyond):
    where = sequences(lengths, empty, limit)
    total = sum(lengths) + beyond
    qkv = torch.randn(total, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = attention(qkv, where, where, backend=kernel)
    start, parts = 0, []
    for length in lengths:
        parts.append(attend(qkv[start : start + length].flatten(1), 2))
        start += length
    wanted = torch.cat([*parts, torch.zeros(beyond, 16, dtype=torch.float64)])
    torch.testing.assert_close(out.flatten(1), wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((out.flatten(1) * weight).sum(), qkv, retain_graph=True)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), qkv)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_attention_does_not_pad_whole_images(monkeypatch):
    monkeypatch.setattr(torch, "searchsorted", lambda *given, **options: pytest.fail("padded"))
    where = whole_images(torch.empty(21, 5), 3)
    qkv = torch.randn(21, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    out, plain = (attention(qkv, where, where, backend=kernel) for kernel in ("math", "auto"))
    torch.testing.assert_close(out, plain)


def test_flash_attention_is_refused_on_a_cpu():
    where = sequences((4,))
    with pytest.raises(ValueError, match="16 bits on CUDA"):
        attention(torch.zeros(4, 3, 1, 8), where, where, backend="flash")


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_set_attention_changes_rounding_only(budget):
    model, plain = stirred(), stirred()
    set_attention(model, "math")
    agree(model, plain, [batch_of(0, budget)])


@pytest.mark.parametrize("what", ["selective", "full"])
@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_checkpoint_activations_keeps_gradients(what, kernel):
    model, plain = stirred(), stirred()
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
    plain, full = stirred(), stirred()
    checkpoint_activations(full, "full")
    assert saved_bytes(full) < 0.6 * saved_bytes(plain)


@pytest.mark.parametrize("what", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_compile_blocks_keeps_results_and_compiles_once(what):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, plain = stirred(), stirred()
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


def test_compiled_layer_equals_the_plain_layer():
    """Inductor does not know the operation of a CPU's layer in bfloat16, so a compiled layer must not contain it."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    layer, x = Linear(32, 48), torch.randn(7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = torch.compile(layer, backend=keep)(x), layer(x)
    assert len(graphs) == 1 and "linear" in graphs[0] and "mkldnn" not in graphs[0] and "autograd" not in graphs[0]
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
