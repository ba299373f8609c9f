import math

import pytest
import torch
from torch import Tensor, nn

from ijepa.evaluation.classification.attentive_heads import AttentiveHead, AttentiveHeads, QueryHead
from ijepa.utils.errors import UserError

GRID = ((1e-3, 0.0), (1e-2, 0.3))


def batch(seed=0, n=30, patches=9, width=12) -> tuple[Tensor, Tensor]:
    """The class is the channel in which the first patch is large; the mean of all patches hardly shows it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, patches, width, generator=generator) + 1
    y = torch.randint(3, (n,), generator=generator)
    x[torch.arange(n), 0, y] += 12
    return x, y


def as_published(head: AttentiveHead, x: Tensor) -> Tensor:
    """The block as published: keys and values of every patch, and the attention of torch."""
    width = x.shape[2]
    attention = nn.MultiheadAttention(width, head.attention_heads, batch_first=True)
    attention.in_proj_weight.data = torch.cat([head.q.weight, head.kv.weight])
    attention.in_proj_bias.data = torch.cat([head.q.bias, head.kv.bias])
    attention.out_proj.weight.data, attention.out_proj.bias.data = head.proj.weight, head.proj.bias
    query = head.query.expand(len(x), 1, -1)
    patches = head.norm1(x)
    z = query + attention(query, patches, patches)[0]
    z = z + head.fc2(nn.functional.gelu(head.fc1(head.norm2(z))))
    return head.linear(z)[:, 0]


def query_as_published(head: QueryHead, x: Tensor) -> Tensor:
    """CAPI's AttnPoolClassifier as published: keys and values of every patch."""
    images, patches, width = x.shape
    query = head.query.expand(images, 1, -1).unflatten(2, (head.attention_heads, -1)).transpose(1, 2)
    key, value = head.kv(x).view(images, patches, 2, head.attention_heads, -1).permute(2, 0, 3, 1, 4)
    return head.linear(nn.functional.scaled_dot_product_attention(query, key, value).reshape(images, width))


@pytest.mark.parametrize(("kind", "slow"), [(AttentiveHead, as_published), (QueryHead, query_as_published)])
def test_heads_agree_with_the_published_blocks(kind, slow):
    x, _ = batch()
    heads = AttentiveHeads(12, 3, GRID, kind=kind, attention_heads=4)
    generator = torch.Generator().manual_seed(1)
    for head in heads.heads:
        for values in head.parameters():
            values.data = torch.randn(values.shape, generator=generator) * 0.5
    logits = heads.logits(x)
    for number, head in enumerate(heads.heads):
        torch.testing.assert_close(logits[:, number], slow(head, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [AttentiveHead, QueryHead])
def test_heads_do_not_influence_each_other(kind):
    settings = {"kind": kind, "attention_heads": 2, "betas": (0.9, 0.95), "seed": 5, "clip": 0.1, "final_decay": 1e-3}
    together = AttentiveHeads(12, 3, GRID, **settings)
    alone = [AttentiveHeads(12, 3, [setting], **settings) for setting in GRID]
    for step in range(6):
        for heads in (together, *alone):
            heads.step(*batch(step), 0.5, step / 6)
    x, _ = batch(99)
    for number, other in enumerate(alone):
        torch.testing.assert_close(together.logits(x)[:, number], other.logits(x)[:, 0], atol=1e-4, rtol=1e-3)
    assert (together.logits(x)[:, 0] - together.logits(x)[:, 1]).abs().max() > 0.01, "the two heads differ"


def test_clip_and_final_decay_agree_with_a_plain_loop():
    """Clipping and AdamW of torch, and the cosine schedule of V-JEPA for the weight decay."""
    made = AttentiveHeads(12, 3, [(1e-2, 0.3)], attention_heads=2, clip=0.05, final_decay=1e-6, seed=5)
    other = AttentiveHeads(12, 3, [(1e-2, 0.3)], attention_heads=2, seed=5)
    (plain,) = other.heads
    decayed = [values for name, values in plain.named_parameters() if "bias" not in name and values.ndim > 1]
    rest = [values for values in plain.parameters() if not any(values is one for one in decayed)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0}], lr=1e-2)
    for step in range(5):
        x, y = batch(step)
        made.step(x, y, 1.0, step / 5)
        optimizer.param_groups[0]["weight_decay"] = 1e-6 + (0.3 - 1e-6) * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(other._logits(x)[:, 0], y).backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05, "clipping has an effect"
        optimizer.step()
    for (name, values), expected in zip(made.heads[0].named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", [AttentiveHead, QueryHead])
def test_heads_learn_what_a_single_patch_shows(kind):
    heads = AttentiveHeads(12, 3, [(1e-2, 0.0)], kind=kind, attention_heads=2)
    for step in range(150):
        heads.step(*batch(step), 1.0)
    x, y = batch(999, n=200)
    assert float((heads.class_ranks(x, y, 0) == 0).double().mean()) > 0.9


def test_attention_heads_must_divide_the_width():
    with pytest.raises(UserError) as err:
        AttentiveHeads(12, 3, GRID, attention_heads=5)
    assert err.value.where == "attention_heads = 5"
