"""One attention over packed sequences: every query sees the keys of its own sequence and no other.

`attention(qkv, queries, keys)` takes the tokens of all sequences behind one another, (T, 3, H, d), with `Sequences`
that say where each one starts. On CUDA it is FlashAttention-2's variable-length kernel and nothing is padded; other
kernels can be chosen (`ijepa.model.padded_attention`). Elsewhere sequences of like length are gathered into dense
batches, padded to a multiple of 32 tokens (a CPU's bfloat16 softmax takes half as long again at other lengths; 8 in
float32), and worked off with plain batched matrix products: faster than torch's fused CPU kernel and than a block mask,
in bfloat16 also than a loop over sequences. Queries, keys and values stay in one tensor, so that their gradient is
written once and never put together from three.
docs/internals.md has the figures.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.masking.batch import Sequences

Backend = Literal["auto", "flash", "cudnn", "efficient", "math"]

_GRANULE, _WIDE_GRANULE = 32, 8
"""Sequences are padded to a multiple of so many tokens outside FlashAttention: in bfloat16, and in wider types."""

_WIDEST_HEAD = 256
"""FlashAttention-2 has kernels up to this width of a head."""

Integers = npt.NDArray[np.int64]


def flash_takes(head_width: int) -> bool:
    """Return whether FlashAttention-2 has a kernel for heads of this width."""
    return head_width % 8 == 0 and head_width <= _WIDEST_HEAD


def attention(
    qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Softmax attention within each packed sequence, scaled by 1 / sqrt(d).

    Args:
        qkv: (T, 3, H, d) queries, keys and values of all tokens; the last rows may belong to no sequence.
        queries: where each sequence's queries start; S sequences.
        keys: where each sequence's keys start; the same S sequences.
        rows: (Tq,) the tokens whose queries are asked, the last of them for no sequence; None for all.
        backend: `flash` is FlashAttention-2 over packed sequences, in 16 bits on CUDA only; `cudnn`, `efficient` and
            `math` are torch's kernels over padded ones; `auto` is flash where it runs, `math` where only the heads'
            width is not flash's, else the buckets below.

    Returns:
        (Tq or T, H, d), in qkv's dtype; zeros in rows that belong to no sequence.
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

        q, k, v = qkv.unbind(1)
        q = q if rows is None else q.index_select(0, rows)
        # Positional only: the keywords changed between torch 2.11 and 2.13.
        return varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest)  # type: ignore[return-value]
    granule = _GRANULE if qkv.dtype.itemsize == 2 else _WIDE_GRANULE
    return _Bucketed.apply(qkv, bucket(queries.lengths, keys.lengths, granule), rows)


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


@lru_cache(maxsize=8)
def bucket(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], granule: int) -> Layout:
    """Sort sequences by their lengths, padded to `granule`, and cut the order into buckets of 1, 2, 4, ... sequences.

    Powers of two, because oneDNN compiles and keeps a kernel for every shape it meets: numbers of sequences as they
    come would be new ones at every step.
    """
    lengths = [np.asarray(each, dtype=np.int64) for each in (query_lengths, key_lengths)]
    alike = all(len(set(each.tolist())) == 1 for each in lengths)  # one dense batch, nothing padded
    padded = lengths if alike else [-(-each // granule) * granule for each in lengths]
    order = np.lexsort(padded[::-1])
    queries, keys = (
        _rows(each[order], long[order], _starts(each)[order]) for each, long in zip(lengths, padded, strict=True)
    )
    bias = torch.from_numpy(np.where(keys < 0, -np.inf, 0).astype(np.float32))
    buckets, done = [], (0, 0)
    shapes = Counter(zip(padded[0].tolist(), padded[1].tolist(), strict=True))
    for (long_queries, long_keys), count in sorted(shapes.items()):
        while count:
            size = 1 << count.bit_length() - 1
            count -= size
            ends = (done[0] + size * long_queries, done[1] + size * long_keys)
            mask = bias[done[1] : ends[1]].view(size, 1, 1, long_keys)
            rows = slice(done[0], ends[0]), slice(done[1], ends[1])
            buckets.append(Bucket(*rows, (size, long_queries, long_keys), mask if mask.any() else None))
            done = ends
    return Layout(
        gather_queries=torch.from_numpy(queries.clip(min=0)),
        inverse_queries=_inverse(queries),
        padding_queries=torch.from_numpy(np.flatnonzero(queries < 0)),
        gather_keys=torch.from_numpy(keys.clip(min=0)),
        inverse_keys=_inverse(keys),
        buckets=tuple(buckets),
    )


def _rows(lengths: Integers, padded: Integers, starts: Integers) -> Integers:
    """The token in each padded row, sequence by sequence; -1 for padding."""
    offset = np.arange(padded.sum()) - np.repeat(_starts(padded), padded)
    return np.where(offset < np.repeat(lengths, padded), np.repeat(starts, padded) + offset, -1)


def _starts(lengths: Integers) -> Integers:
    return np.cumsum(lengths) - lengths


def _inverse(rows: Integers) -> Tensor:
    held = np.flatnonzero(rows >= 0)
    inverse = np.empty(len(held), dtype=np.int64)
    inverse[rows[held]] = held
    return torch.from_numpy(inverse)


class _Bucketed(torch.autograd.Function):
    """Forward and backward written out, so that gathering costs one pass each way and scores are never copied."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, rows: Tensor | None) -> Tensor:
        scale = qkv.shape[-1] ** -0.5
        from_queries, from_keys = layout.gather_queries.to(qkv.device), layout.gather_keys.to(qkv.device)
        wanted = qkv[:, 0] if rows is None else rows
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
        return _spread(out, layout.inverse_queries, qkv.new_empty(len(wanted), *qkv.shape[2:]))

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
        _spread(d_kv, layout.inverse_keys, d_qkv[:, 1:])
        if rows is None:
            _spread(d_q, layout.inverse_queries, d_qkv[:, 0])
        else:
            d_q = d_q.index_select(0, layout.inverse_queries.to(device))
            d_qkv[:, 0].zero_().index_copy_(0, rows[: len(d_q)], d_q)
        return d_qkv, None, None


def _spread(rows: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with `rows` in the order of `inverse`, and with zeros behind them."""
    out[: len(inverse)] = rows.index_select(0, inverse.to(rows.device))
    out[len(inverse) :].zero_()
    return out


def _heads_view(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), a view."""
    return rows.unflatten(0, (part.shape[0], -1)).transpose(1, 2)


def _heads(rows: Tensor, part: Bucket) -> Tensor:
    """(S * L, H, d) -> (S, H, L, d), contiguous: strided operands make a CPU's matrix product several times slower."""
    return _heads_view(rows, part).contiguous()
