"""Attention over packed sequences: every query attends to the keys of its own sequence.

`attention(qkv, queries, keys)` takes the concatenated tokens of all sequences, (T, 3, H, d), and `Sequences` that mark
where each one starts.

* On CUDA it is the variable-length kernel of FlashAttention-2 (Dao, arXiv 2307.08691), and nothing is padded. Other
  kernels can be chosen (`ijepa.model.padded_attention`).
* Elsewhere, sequences of similar length are gathered into dense buckets and computed with batched matrix products. This
  is faster than torch's fused CPU kernel and than a block mask, and in bfloat16 also than a loop over sequences.

Queries, keys and values stay in one tensor, so that their gradient is written once and never concatenated from three.
docs/internals.md has the measurements.

Symbols: T tokens, Tq queries, S sequences, H heads of width d, Lq queries and Lk keys per sequence of a bucket, P
padded rows of all buckets.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ijepa.masking.batch import Sequences
from ijepa.masking.masks import Integers
from ijepa.masking.packing import sequence_starts

Backend = Literal["auto", "flash", "cudnn", "efficient", "math"]

_GRANULE, _WIDE_GRANULE = 32, 8
"""Lengths in buckets are rounded up to multiples of these: in bfloat16, whose softmax on a CPU takes 1.5 times as long
at other lengths, and in wider types."""

_WIDEST_HEAD = 256
"""FlashAttention-2 has kernels up to this head width."""


def flash_takes(head_width: int) -> bool:
    """Return whether FlashAttention-2 has a kernel for heads of this width."""
    return head_width % 8 == 0 and head_width <= _WIDEST_HEAD


def attention(
    qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return softmax attention within each packed sequence, scaled by 1 / sqrt(d).

    Args:
        qkv: (T, 3, H, d) queries, keys and values of all tokens; the last rows may belong to no sequence.
        queries: where the queries of each sequence start; S sequences.
        keys: where the keys of each sequence start; the same S sequences.
        rows: (Tq,) tokens whose queries are used, the last ones may belong to no sequence; None for all tokens.
        backend: `flash` is FlashAttention-2 over packed sequences, in 16 bits on CUDA only. `cudnn`, `efficient` and
            `math` are torch's kernels over padded ones. `auto` is `flash` in 16 bits on CUDA, or `math` if only the
            head width rules out flash; elsewhere buckets.

    Returns:
        (Tq or T, H, d), in qkv's dtype; zeros in rows that belong to no sequence.

    Raises:
        ValueError: `flash` in other than 16 bits on CUDA.
    """
    flash = qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16)
    if backend == "auto" and flash and not flash_takes(qkv.shape[-1]):
        backend = "math"
    if backend in ("cudnn", "efficient", "math"):
        from ijepa.model.padded_attention import padded_attention

        return padded_attention(qkv, queries, keys, rows, backend)
    if backend == "flash" and not flash:
        raise ValueError(f"FlashAttention computes in 16 bits on CUDA, not {qkv.dtype} on {qkv.device.type}")
    if flash:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = qkv.unbind(1)  # (T, H, d) each
        q = q if rows is None else q.index_select(0, rows)
        # Positional only: the keywords changed between torch 2.11 and 2.13.
        return varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest)  # type: ignore[return-value]
    granule = _GRANULE if qkv.dtype.itemsize == 2 else _WIDE_GRANULE
    return _BucketedAttention.apply(qkv, make_layout(queries.lengths, keys.lengths, granule), rows)


@dataclass(frozen=True)
class Bucket:
    """S sequences of the same padded lengths Lq and Lk."""

    queries: slice  # of the padded query rows, S * Lq of them
    keys: slice  # of the padded key rows, S * Lk of them
    sequences: int  # S
    bias: Tensor | None  # (S, 1, 1, Lk): 0 for a key, -inf for padding; None if nothing is padded


@dataclass(frozen=True)
class Layout:
    """Order of packed tokens in buckets."""

    gather_queries: Tensor  # (P,) the token in each padded query row; any token for padding
    inverse_queries: Tensor  # (Tq,) the padded row of each query
    padding_queries: Tensor  # the padded query rows that hold no query
    gather_keys: Tensor  # (P,) the token in each padded key row; any token for padding
    inverse_keys: Tensor  # (T,) the padded row of each key
    buckets: tuple[Bucket, ...]  # in the order of their rows


@lru_cache(maxsize=8)
def make_layout(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], granule: int) -> Layout:
    """Sort sequences by their lengths, rounded up to `granule`, and cut the order into buckets of 1, 2, 4, ... of them.

    Bucket sizes are powers of two because oneDNN compiles and keeps a kernel for every shape: arbitrary sizes would be
    new shapes at every step. The layout is cached because all layers of a step use the same one.
    """
    lengths = [np.asarray(each, dtype=np.int64) for each in (query_lengths, key_lengths)]
    equal = all(len(set(each.tolist())) == 1 for each in lengths)  # one dense batch without padding
    padded = lengths if equal else [-(-each // granule) * granule for each in lengths]
    order = np.lexsort(padded[::-1])  # by query length, then key length
    queries, keys = (
        _padded_rows(real[order], long[order], sequence_starts(real)[order])
        for real, long in zip(lengths, padded, strict=True)
    )
    bias = torch.from_numpy(np.where(keys < 0, -np.inf, 0).astype(np.float32))  # (P,)
    buckets, done = [], (0, 0)
    shapes = Counter(zip(padded[0].tolist(), padded[1].tolist(), strict=True))
    for (long_queries, long_keys), count in sorted(shapes.items()):
        while count:
            size = 1 << count.bit_length() - 1  # the largest power of two up to `count`
            count -= size
            ends = (done[0] + size * long_queries, done[1] + size * long_keys)
            mask = bias[done[1] : ends[1]].view(size, 1, 1, long_keys)  # (S * Lk,) -> (S, 1, 1, Lk)
            rows = slice(done[0], ends[0]), slice(done[1], ends[1])
            buckets.append(Bucket(*rows, size, mask if mask.any() else None))
            done = ends
    return Layout(
        gather_queries=torch.from_numpy(queries.clip(min=0)),
        inverse_queries=_inverse(queries),
        padding_queries=torch.from_numpy(np.flatnonzero(queries < 0)),
        gather_keys=torch.from_numpy(keys.clip(min=0)),
        inverse_keys=_inverse(keys),
        buckets=tuple(buckets),
    )


def _padded_rows(lengths: Integers, padded: Integers, starts: Integers) -> Integers:
    """Return the token in each padded row (P,), sequence by sequence; -1 for padding."""
    offset = np.arange(padded.sum()) - np.repeat(sequence_starts(padded), padded)  # (P,), place within the sequence
    return np.where(offset < np.repeat(lengths, padded), np.repeat(starts, padded) + offset, -1)


def _inverse(rows: Integers) -> Tensor:
    """Return the padded row of each token (T,), given the token in each padded row (P,)."""
    real = np.flatnonzero(rows >= 0)
    inverse = np.empty(len(real), dtype=np.int64)
    inverse[rows[real]] = real
    return torch.from_numpy(inverse)


class _BucketedAttention(torch.autograd.Function):
    """Written out, so that gathering costs one pass in each direction and scores are never copied."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, rows: Tensor | None) -> Tensor:
        scale = qkv.shape[-1] ** -0.5
        from_queries, from_keys = layout.gather_queries.to(qkv.device), layout.gather_keys.to(qkv.device)
        if rows is not None:
            from_queries = rows.index_select(0, from_queries)
        # (P, H, d) each, in the order of the buckets
        q, k, v = (qkv[:, i].index_select(0, index) for i, index in enumerate((from_queries, from_keys, from_keys)))
        out = torch.empty_like(q)
        saved = []
        for part in layout.buckets:
            q_s, k_s, v_s = (_heads(x, part) for x in (q[part.queries], k[part.keys], v[part.keys]))  # (S, H, L, d)
            scores = q_s.mul_(scale) @ k_s.transpose(-2, -1)  # (S, H, Lq, Lk)
            if part.bias is not None:
                scores += part.bias.to(scores)
            p = scores.softmax(-1)
            _heads_view(out[part.queries], part).copy_(p @ v_s)
            saved += [q_s, k_s, v_s, p]
        ctx.save_for_backward(rows, *saved)
        ctx.layout, ctx.scale, ctx.shape = layout, scale, qkv.shape
        asked = len(qkv) if rows is None else len(rows)
        return _unpad(out, layout.inverse_queries, qkv.new_empty(asked, *qkv.shape[2:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        rows, *saved = ctx.saved_tensors
        device = grads[0].device
        d_out = grads[0].contiguous().index_select(0, layout.gather_queries.to(device))  # (Tq, H, d) -> (P, H, d)
        d_out.index_fill_(0, layout.padding_queries.to(device), 0)  # padding rows hold the gradient of another token
        d_q = torch.empty_like(d_out)  # (P, H, d)
        d_kv = d_out.new_empty(len(layout.gather_keys), 2, *d_out.shape[1:])  # (P, 2, H, d)
        for number, part in enumerate(layout.buckets):
            q_s, k_s, v_s, p = saved[4 * number : 4 * number + 4]
            d_k, d_v = d_kv[part.keys].unbind(1)
            do_s = _heads(d_out[part.queries], part)  # (S, H, Lq, d)
            _heads_view(d_v, part).copy_(p.transpose(-2, -1) @ do_s)
            d_scores = torch._softmax_backward_data(do_s @ v_s.transpose(-2, -1), p, -1, p.dtype)  # (S, H, Lq, Lk)
            # q_s holds the scaled queries, so only the gradient of q needs the scale.
            _heads_view(d_q[part.queries], part).copy_((d_scores @ k_s).mul_(ctx.scale))
            _heads_view(d_k, part).copy_(d_scores.transpose(-2, -1) @ q_s)
        d_qkv = d_out.new_empty(ctx.shape)  # (T, 3, H, d)
        _unpad(d_kv, layout.inverse_keys, d_qkv[:, 1:])
        if rows is None:
            _unpad(d_q, layout.inverse_queries, d_qkv[:, 0])
        else:
            d_q = d_q.index_select(0, layout.inverse_queries.to(device))
            d_qkv[:, 0].zero_().index_copy_(0, rows[: len(d_q)], d_q)
        return d_qkv, None, None


def _unpad(rows: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (T, ...) with the padded rows (P, ...) in the order of `inverse`, then with zeros, and return it."""
    out[: len(inverse)] = rows.index_select(0, inverse.to(rows.device))
    out[len(inverse) :].zero_()
    return out


def _heads_view(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), a view."""
    return rows.unflatten(0, (part.sequences, -1)).transpose(1, 2)


def _heads(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), contiguous: strided operands make a CPU's matrix product several times slower."""
    return _heads_view(rows, part).contiguous()
