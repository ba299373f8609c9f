"""Bytes of activations beside those that autograd really saves, and beside all that is alive in a step."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from ijepa.model import vision_transformer
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA
from ijepa.planning.activations import activations
from tests.helpers.plans import batch, model
from tests.reference.memory import Alive, Saved


def copies(built: IJEPA) -> int:
    """Bytes of the bfloat16 copies of weights, which a plan counts apart from activations."""
    named = [*built.context_encoder.named_parameters(), *built.predictor.named_parameters()]
    return 2 * sum(p.numel() for name, p in named if name.endswith("weight") and "norm" not in name)


def flash(qkv, queries, keys, rows=None, backend="auto"):
    """Torch's FlashAttention for CPUs over sequences of equal lengths; what it saves is what a GPU's saves."""
    count = len(keys.lengths)
    q, k, v = qkv.unbind(1)
    q = q if rows is None else q.index_select(0, rows)
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def computing(autocast: bool):
    return torch.autocast("cpu", torch.bfloat16, enabled=autocast)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_saved_bytes_are_those_that_autograd_saves(autocast, drop_path):
    shape = model(drop_path)
    built, (packed, tokens) = IJEPA(shape), batch(shape, drop_path)
    with Saved(built) as saved, computing(autocast):
        built(packed)
    found = saved.bytes - copies(built) * autocast
    planned = activations(shape, tokens, "none", autocast=autocast, with_scores=True)
    assert planned.saved.sum() == pytest.approx(found, rel=0.02)


def test_saved_bytes_with_flash_attention(monkeypatch):
    monkeypatch.setattr(vision_transformer, "attention", flash)
    shape = model()
    built, (packed, tokens) = IJEPA(shape), batch(shape)
    with Saved(built) as saved, computing(True):
        built(packed)
    planned = activations(shape, tokens, "none")
    assert planned.saved.sum() == pytest.approx(saved.bytes - copies(built), rel=0.02)
    assert planned.saved.sum() < activations(shape, tokens, "none", with_scores=True).saved.sum()


@pytest.mark.parametrize("autocast", [True, False])
def test_the_forward_pass_ends_in_what_is_saved_and_what_passes(autocast):
    shape = model()
    built, (packed, tokens) = IJEPA(shape), batch(shape)
    with Alive() as alive, computing(autocast):
        built(packed)
    planned = activations(shape, tokens, "none", autocast=autocast, with_scores=True)
    assert (planned.saved + planned.passing).sum() == pytest.approx(alive.peak - copies(built) * autocast, rel=0.03)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointed_encoder_keeps_what_is_planned(kind, monkeypatch):
    """The context encoder's blocks are checkpointed by torch's own means; the difference to none is the plan's."""
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    products |= {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}

    def keep(context, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(keep)

    whole = vision_transformer.Block.forward

    def forward(self, *args):
        if all(self is not block for block in built.context_encoder.blocks):
            return whole(self, *args)
        chosen = {"context_fn": contexts} if kind == "selective" else {}
        return checkpoint(whole, self, *args, use_reentrant=False, **chosen)

    monkeypatch.setattr(vision_transformer, "attention", flash)
    shape = model()
    built, (packed, tokens) = IJEPA(shape), batch(shape)
    sizes = {}
    for name in ("none", kind):
        if name == kind:
            monkeypatch.setattr(vision_transformer.Block, "forward", forward)
        with Alive() as alive:  # in float32: no copies of weights
            outcome = built(packed)
            sizes[name] = alive.now
            outcome.loss.backward()
        built.zero_grad(set_to_none=True)
    seen = shape.encoder.depth * tokens.context.sum()
    width = shape.encoder.width
    # Of one token and layer, none saves two norms' inputs, and 2 d + 4 d + 8 d of linear layers and attention.
    saving = {"selective": 4 * width * (2 + 14 - (1 + 4 + 2 + 4)), "full": 4 * width * (2 + 14 - 1)}[kind]
    assert sizes["none"] - sizes[kind] == pytest.approx(seen * saving, rel=0.05)
    each = activations(shape, tokens, "none", autocast=False), activations(shape, tokens, kind, autocast=False)
    assert each[1].saved.sum() < each[0].saved.sum()
    inner = shape.predictor.width / width * (tokens.blocks + tokens.context[:, None]).sum() * shape.predictor.depth
    assert (each[0].saved - each[1].saved).sum() == pytest.approx((seen + inner) * saving, rel=0.15)


def test_a_batch_of_many_images_is_planned_with_a_margin():
    shape = model(0.4)
    planned = activations(shape, batch(shape, 0.4)[1], "none")
    mean = (planned.saved + planned.passing).mean()
    assert planned.peak(4) > 4 * mean
    assert planned.peak(400) / 400 < planned.peak(4) / 4


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_operations_agree_with_torch_to_one_per_cent(drop_path):
    shape = model(drop_path)
    built, (packed, _) = IJEPA(shape), batch(shape, drop_path)
    with FlopCounterMode(display=False) as counter:
        built(packed).loss.backward()
    assert batch_flops(shape, packed).total == pytest.approx(counter.get_total_flops(), rel=0.01)
