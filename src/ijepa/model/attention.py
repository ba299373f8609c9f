"""One attention over packed sequences: every query sees the keys of its own sequence and no other.

`attention(q, k, v, queries, keys)` takes tokens of all sequences behind one another, q (Tq, H, d) and k, v
(Tk, H, d), with `Sequences` that say where each one starts. On CUDA it is FlashAttention-2's variable-length kernel
and nothing is padded. Elsewhere sequences of like length are gathered into dense batches, padded to a multiple of
32 tokens (a CPU's bfloat16 softmax takes twice as long at other lengths), and worked off with plain batched matrix
products: faster here than torch's fused CPU kernel, than a loop over sequences, and than a block mask.
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


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences) -> Tensor:
    """Softmax attention within each packed sequence, scaled by 1 / sqrt(d).

    Args:
        q: (Tq, H, d) queries of all sequences.
        k: (Tk, H, d) keys; v likewise.
        queries: where each sequence's queries start; S sequences.
        keys: where each sequence's keys start; the same S sequences.

    Returns:
        (Tq, H, d), in q's dtype.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        # Positional only: the keywords changed between torch 2.11 and 2.13.
        return varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest)  # type: ignore[return-value]
    return _Bucketed.apply(q, k, v, bucket(queries.lengths, keys.lengths))


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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        scale = q.shape[-1] ** -0.5
        q, k, v = (
            x.contiguous().index_select(0, rows.to(x.device))
            for x, rows in ((q * scale, layout.gather_queries), (k, layout.gather_keys), (v, layout.gather_keys))
        )
        out = torch.empty_like(q)
        saved = []
        for part in layout.buckets:
            q_s, k_s, v_s = (_heads(x, part) for x in (q[part.queries], k[part.keys], v[part.keys]))
            scores = q_s @ k_s.transpose(-2, -1)  # (S, H, Lq, Lk)
            if part.bias is not None:
                scores += part.bias.to(scores)
            p = scores.softmax(-1)
            o_s = p @ v_s
            _heads_view(out[part.queries], part).copy_(o_s)
            saved += [q_s, k_s, v_s, o_s, p]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale = layout, scale
        return out.index_select(0, layout.inverse_queries.to(q.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        device = grads[0].device
        d_out = grads[0].contiguous().index_select(0, layout.gather_queries.to(device))
        d_out.index_fill_(0, layout.padding_queries.to(device), 0)
        d_q = torch.empty_like(d_out)
        d_k = d_out.new_empty(len(layout.gather_keys), *d_out.shape[1:])
        d_v = torch.empty_like(d_k)
        for number, part in enumerate(layout.buckets):
            q_s, k_s, v_s, o_s, p = ctx.saved_tensors[5 * number : 5 * number + 5]
            do_s = _heads(d_out[part.queries], part)
            _heads_view(d_v[part.keys], part).copy_(p.transpose(-2, -1) @ do_s)
            # Softmax's backward needs sum_k(p * dp) for each query: the dot product of out and its gradient.
            dots = (o_s.float() * do_s).sum(-1, keepdim=True).to(p.dtype)
            d_scores = (do_s @ v_s.transpose(-2, -1)).sub_(dots).mul_(p)
            _heads_view(d_q[part.queries], part).copy_((d_scores @ k_s).mul_(ctx.scale))
            _heads_view(d_k[part.keys], part).copy_(d_scores.transpose(-2, -1) @ q_s)
        inverse_q, inverse_k = layout.inverse_queries.to(device), layout.inverse_keys.to(device)
        return d_q.index_select(0, inverse_q), d_k.index_select(0, inverse_k), d_v.index_select(0, inverse_k), None


def _heads_view(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), a view."""
    return rows.unflatten(0, (part.shape[0], -1)).transpose(1, 2)


def _heads(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), contiguous: strided operands make a CPU's matrix product several times slower."""
    return _heads_view(rows, part).contiguous()
