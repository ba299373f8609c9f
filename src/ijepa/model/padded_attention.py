"""Attention over packed sequences with torch's own kernels, which need dense batches of sequences of one length.

The place of each token in the dense batch is computed from `cu_seqlens` on the device, so the host reads nothing back;
with `Sequences.limit` shapes are the same at every step. Padding rows are zero, and padding keys are masked. Padding
and unpadding are inverse to each other, and each is the gradient of the other; both are one gather.

The kernels are cuDNN's, the memory-efficient one of xFormers, and plain matrix products. Sequences that all have the
length `limit`, as whole images do, need no padding or mask. FlashAttention does without all of this
(`ijepa.model.attention`).

Symbols: S sequences, padded to L tokens each; otherwise those of `ijepa.model.attention`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa.masking.batch import Sequences

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_GRANULE = 8
"""Masks have a multiple of this number of keys: kernels read them in units of 16 bytes."""


def padded_attention(qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None, kernel: str) -> Tensor:
    """Compute `ijepa.model.attention.attention` with one of `KERNELS`."""
    sequences = len(keys.cu_seqlens) - 1
    # Without a limit, rows after the last sequence could make up for a shorter sequence by chance.
    if rows is None and keys.limit and len(qkv) == sequences * keys.limit:
        q, k, v = qkv.unflatten(0, (sequences, keys.limit)).permute(
            2, 0, 3, 1, 4
        )  # (S * L, 3, H, d) -> (3, S, H, L, d)
        return _kernel(q, k, v, None, kernel).transpose(1, 2).flatten(0, 1)  # (S, H, L, d) -> (S * L, H, d)
    row, has_row, token, real = _places(keys.cu_seqlens, keys.longest, len(qkv))
    packed = qkv if rows is None else qkv[:, 1:]  # (T, 3, H, d), or keys and values only (T, 2, H, d)
    padded = _Gather.apply(packed, token, real, row, has_row).unflatten(0, (sequences, -1))  # (S, L, 3 or 2, H, d)
    heads = padded.permute(2, 0, 3, 1, 4).unbind()  # 3 or 2 of (S, H, L, d)
    mask = real.view(sequences, 1, 1, -1).clone()  # (S, 1, 1, L)
    mask[..., 0] = True  # the softmax of an empty sequence is then finite, and its gradient is zero
    if rows is None:
        q = heads[0]
    else:
        asked = qkv[:, 0].index_select(0, rows)  # (Tq, H, d)
        row, has_row, token, real = _places(queries.cu_seqlens, queries.longest, len(rows))
        q = _Gather.apply(asked, token, real, row, has_row).unflatten(0, (sequences, -1)).transpose(1, 2)
    out = _kernel(q, heads[-2], heads[-1], mask.expand(-1, -1, q.shape[2], -1), kernel)  # (S, H, Lq, d)
    return _Gather.apply(out.transpose(1, 2).flatten(0, 1), row, has_row, token, real)  # (S * Lq, H, d) -> (Tq, H, d)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> Tensor:
    with sdpa_kernel(KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _places(cu_seqlens: Tensor, longest: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return how the T packed tokens map to the S * L rows of the padded batch, and back.

    Returns:
        For each token (T,), its row and whether it has one; for each row (S * L,), its token and whether it has one.
    """
    width = -(-longest // _GRANULE) * _GRANULE  # L
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()  # (S,)
    number = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, number, right=True).clamp(max=len(ends) - 1)  # (T,)
    offset = number - starts.index_select(0, sequence)
    has_row = number < ends[-1]
    row = torch.where(has_row, sequence * width + offset, 0)
    token = starts[:, None] + torch.arange(width, device=cu_seqlens.device)  # (S, L)
    real = token < ends[:, None]
    return row, has_row, token.clamp(max=max(tokens - 1, 0)).flatten(), real.flatten()


class _Gather(torch.autograd.Function):
    """Rows `index` of x, zeros where not `valid`; the gradient is a gather by the inverse, and needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, valid: Tensor, inverse: Tensor, inverse_valid: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, inverse_valid)
        return _take(x, index, valid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _take(grads[0], *ctx.saved_tensors), None, None, None, None


def _take(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    rows = x.index_select(0, index)
    return rows.masked_fill(~valid.view(-1, *[1] * (x.dim() - 1)), 0)  # valid: (R,) -> (R, 1, ...)
