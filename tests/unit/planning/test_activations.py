"""Planned bytes of activations, compared with what autograd saves and with all bytes allocated in a step."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ijepa.model import vision_transformer
from ijepa.model.ijepa import IJEPA
from ijepa.planning.activations import activations
from tests.helpers.plans import batch, model
from tests.reference.memory import Alive, Saved


def copies(built: IJEPA) -> int:
    """Bytes of the bfloat16 copies of weights, which a plan does not count as activations."""
    named = [*built.context_encoder.named_parameters(), *built.predictor.named_parameters()]
    return 2 * sum(p.numel() for name, p in named if name.endswith("weight") and "norm" not in name)


def flash(qkv, queries, keys, rows=None, backend="auto"):
    """Torch's FlashAttention for CPUs over sequences of equal lengths; it saves the same tensors as on a GPU."""
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
def test_activations_saved_are_what_autograd_saves(autocast, drop_path):
    shape = model(drop_path)
    built, (packed, tokens) = IJEPA(shape), batch(shape, drop_path)
    with Saved(built) as saved, computing(autocast):
        built(packed)
    found = saved.bytes - copies(built) * autocast
    planned = activations(shape, tokens, "none", autocast=autocast, with_scores=True)
    assert planned.saved.sum() == pytest.approx(found, rel=0.02)


def test_activations_saved_with_flash_attention(monkeypatch):
    monkeypatch.setattr(vision_transformer, "attention", flash)
    shape = model()
    built, (packed, tokens) = IJEPA(shape), batch(shape)
    with Saved(built) as saved, computing(True):
        built(packed)
    planned = activations(shape, tokens, "none")
    assert planned.saved.sum() == pytest.approx(saved.bytes - copies(built), rel=0.02)
    assert planned.saved.sum() < activations(shape, tokens, "none", with_scores=True).saved.sum()


@pytest.mark.parametrize("autocast", [True, False])
def test_activations_saved_and_passing_are_the_peak_of_the_forward_pass(autocast):
    shape = model()
    built, (packed, tokens) = IJEPA(shape), batch(shape)
    with Alive() as alive, computing(autocast):
        built(packed)
    planned = activations(shape, tokens, "none", autocast=autocast, with_scores=True)
    assert (planned.saved + planned.passing).sum() == pytest.approx(alive.peak - copies(built) * autocast, rel=0.03)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activations_with_checkpointing_are_what_torch_checkpoint_keeps(kind, monkeypatch):
    """torch.utils.checkpoint on the context encoder's blocks saves as much memory as the plan says."""
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
            output = built(packed)
            sizes[name] = alive.now
            output.loss.backward()
        built.zero_grad(set_to_none=True)
    layer_tokens = shape.encoder.depth * tokens.context.sum()
    width = shape.encoder.width
    # Per token and layer, `none` saves the inputs of two norms, and 2 d + 4 d + 8 d in linear layers and attention.
    saving = {"selective": 4 * width * (2 + 14 - (1 + 4 + 2 + 4)), "full": 4 * width * (2 + 14 - 1)}[kind]
    assert sizes["none"] - sizes[kind] == pytest.approx(layer_tokens * saving, rel=0.05)
    each = activations(shape, tokens, "none", autocast=False), activations(shape, tokens, kind, autocast=False)
    assert each[1].saved.sum() < each[0].saved.sum()
    predictor = shape.predictor.width / width * (tokens.blocks + tokens.context[:, None]).sum() * shape.predictor.depth
    assert (each[0].saved - each[1].saved).sum() == pytest.approx((layer_tokens + predictor) * saving, rel=0.15)


def test_activations_peak_has_a_margin_that_shrinks_with_the_number_of_images():
    shape = model(0.4)
    planned = activations(shape, batch(shape, 0.4)[1], "none")
    mean = (planned.saved + planned.passing).mean()
    assert planned.peak(4) > 4 * mean
    assert planned.peak(400) / 400 < planned.peak(4) / 4
