"""One attention over packed sequences: every query sees the keys of its own sequence and no other.

`attention(qkv, queries, keys)` takes the tokens of all sequences behind one another, (T, 3, H, d), with `Sequences`
that say where each one starts. On CUDA it is FlashAttention-2's variable-length kernel and nothing is padded.
Elsewhere sequences of like length are gathered into dense batches, padded to a multiple of 32 tokens (a CPU's bfloat16
softmax takes half as long again at other lengths), and worked off with plain batched matrix products: faster here
than torch's fused CPU kernel, than a loop over sequences, and than a block mask. Queries, keys and values stay in one
tensor, so that their gradient is written once and never put together from three.
docs/internals.md has the figures.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ijepa.batch import Sequences

GRANULE = 32
"""Sequences are padded to a multiple of so many tokens where attention is not computed by FlashAttention."""


def attention(qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None = None) -> Tensor:
    """Softmax attention within each packed sequence, scaled by 1 / sqrt(d).

    Args:
        qkv: (T, 3, H, d) queries, keys and values of all tokens.
        queries: where each sequence's queries start; S sequences.
        keys: where each sequence's keys start; the same S sequences, T tokens.
        rows: (Tq,) the tokens whose queries are asked; None for all.

    Returns:
        (Tq, H, d), in qkv's dtype.
    """
    if qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = qkv.unbind(1)
        q = q if rows is None else q.index_select(0, rows)
        # Positional only: the keywords changed between torch 2.11 and 2.13.
        return varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest)  # type: ignore[return-value]
    return _Bucketed.apply(qkv, bucket(queries.lengths, keys.lengths), rows)


@dataclass(frozen=True)
class Bucket:
    """S sequences of like length, as rows of the padded order: queries (S, Lq), keys (S, Lk)."""

    queries: slice
    keys: slice
    shape: tuple[int, int, int]  # S, Lq, Lk
    bias: Tensor | None  # (S, 1, 1, Lk): 0 for a key, -inf for padding; None where nothing is padded


@dataclass(frozen=True)
class Layout:
    """How packed tokens are laid out in buckets; P padded rows for T tokens, for queries and for keys.

    `gather` (P,) is the token that each padded row holds (any token for padding), `inverse` (T,) the padded row of
    each token, `padding` the padded rows that hold none.
    """

    gather_queries: Tensor
    inverse_queries: Tensor
    padding_queries: Tensor
    gather_keys: Tensor
    inverse_keys: Tensor
    buckets: tuple[Bucket, ...]


@lru_cache(maxsize=32)
def bucket(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> Layout:
    """Sort sequences into buckets by their padded lengths."""
    if len(set(query_lengths)) == len(set(key_lengths)) == 1:  # one dense batch, nothing padded
        padded_queries, padded_keys = torch.tensor(query_lengths), torch.tensor(key_lengths)
    else:
        padded_queries, padded_keys = (
            -(-torch.tensor(lengths) // GRANULE) * GRANULE for lengths in (query_lengths, key_lengths)
        )
    groups, member = torch.stack([padded_queries, padded_keys], 1).unique(dim=0, return_inverse=True)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    buckets, starts = [], [0, 0]
    for number, (long_queries, long_keys) in enumerate(groups.tolist()):
        chosen = (member == number).nonzero().squeeze(1)
        rows, valid = [], []
        for side, lengths, long in ((0, query_lengths, long_queries), (1, key_lengths, long_keys)):
            each = torch.tensor(lengths)
            token = (each.cumsum(0) - each)[chosen, None] + torch.arange(long)
            valid.append(torch.arange(long) < each[chosen, None])
            sides[side].append(torch.where(valid[-1], token, -1).flatten())
            rows.append(slice(starts[side], starts[side] + token.numel()))
            starts[side] += token.numel()
        bias = torch.zeros(valid[1].shape).masked_fill_(~valid[1], -torch.inf)[:, None, None]
        shape = (len(chosen), long_queries, long_keys)
        buckets.append(Bucket(rows[0], rows[1], shape, None if valid[1].all() else bias))
    row_queries, row_keys = torch.cat(sides[0]), torch.cat(sides[1])
    return Layout(
        gather_queries=row_queries.clamp(min=0),
        inverse_queries=_inverse(row_queries, sum(query_lengths)),
        padding_queries=(row_queries < 0).nonzero().squeeze(1),
        gather_keys=row_keys.clamp(min=0),
        inverse_keys=_inverse(row_keys, sum(key_lengths)),
        buckets=tuple(buckets),
    )


def _inverse(row: Tensor, tokens: int) -> Tensor:
    held = (row >= 0).nonzero().squeeze(1)
    return torch.empty(tokens, dtype=torch.int64).index_copy_(0, row[held], held)


class _Bucketed(torch.autograd.Function):
    """Forward and backward written out, so that gathering costs one pass each way and scores are never copied."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, rows: Tensor | None) -> Tensor:
        scale = qkv.shape[-1] ** -0.5
        from_queries, from_keys = layout.gather_queries.to(qkv.device), layout.gather_keys.to(qkv.device)
        if rows is not None:
            from_queries = rows.index_select(0, from_queries)
        q, k, v = (qkv[:, i].index_select(0, index) for i, index in enumerate((from_queries, from_keys, from_keys)))
        out = torch.empty_like(q)
        saved = []
        for part in layout.buckets:
            q_s, k_s, v_s = (_heads(x, part) for x in (q[part.queries], k[part.keys], v[part.keys]))
            scores = q_s.mul_(scale) @ k_s.transpose(-2, -1)  # (S, H, Lq, Lk)
            if part.bias is not None:
                scores += part.bias.to(scores)
            p = scores.softmax(-1)
            _heads_view(out[part.queries], part).copy_(p @ v_s)
            saved += [q_s, k_s, v_s, p]
        ctx.save_for_backward(rows, *saved)
        ctx.layout, ctx.scale, ctx.shape = layout, scale, qkv.shape
        return out.index_select(0, layout.inverse_queries.to(qkv.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        rows, *saved = ctx.saved_tensors
        device = grads[0].device
        d_out = grads[0].contiguous().index_select(0, layout.gather_queries.to(device))
        d_out.index_fill_(0, layout.padding_queries.to(device), 0)
        d_q = torch.empty_like(d_out)
        d_kv = d_out.new_empty(len(layout.gather_keys), 2, *d_out.shape[1:])
        for number, part in enumerate(layout.buckets):
            q_s, k_s, v_s, p = saved[4 * number : 4 * number + 4]
            d_k, d_v = d_kv[part.keys].unbind(1)
            do_s = _heads(d_out[part.queries], part)
            _heads_view(d_v, part).copy_(p.transpose(-2, -1) @ do_s)
            d_scores = torch._softmax_backward_data(do_s @ v_s.transpose(-2, -1), p, -1, p.dtype)
            _heads_view(d_q[part.queries], part).copy_((d_scores @ k_s).mul_(ctx.scale))
            _heads_view(d_k, part).copy_(d_scores.transpose(-2, -1) @ q_s)
        d_qkv = d_out.new_empty(ctx.shape)
        d_qkv[:, 1:] = d_kv.index_select(0, layout.inverse_keys.to(device))
        d_q = d_q.index_select(0, layout.inverse_queries.to(device))
        if rows is None:
            d_qkv[:, 0] = d_q
        else:
            d_qkv[:, 0].zero_().index_copy_(0, rows, d_q)
        return d_qkv, None, None


def _heads_view(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), a view."""
    return rows.unflatten(0, (part.shape[0], -1)).transpose(1, 2)


def _heads(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), contiguous: strided operands make a CPU's matrix product several times slower."""
    return _heads_view(rows, part).contiguous()
