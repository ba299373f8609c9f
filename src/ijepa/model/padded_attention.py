"""Attention over packed sequences by torch's own kernels, which want a dense batch: all are padded to one length.

Which row of the dense batch is which token follows from `cu_seqlens` on the device, so that nothing is read back from
it; with `Sequences.limit` shapes are the same at every step. Padding rows hold zeros, padding keys are masked. To pad
and to take the padding away are each other's inverses, and each other's gradients: both are one gather.

The kernels are cuDNN's, xFormers' memory-efficient one and plain matrix products; sequences that fill their limit, as
whole images do, take them without padding or mask. FlashAttention needs none of this (`ijepa.model.attention`).
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
"""Masks are padded to a multiple of so many keys: kernels read them by 16 bytes."""


def padded_attention(qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None, kernel: str) -> Tensor:
    """Attend as `ijepa.model.attention.attention` does, by one of `KERNELS`."""
    sequences = len(keys.cu_seqlens) - 1
    # Only a limit bounds every length: rows beyond the last sequence may make up for a shorter one by accident.
    if rows is None and keys.limit and len(qkv) == sequences * keys.limit:
        q, k, v = qkv.unflatten(0, (sequences, keys.limit)).permute(2, 0, 3, 1, 4)
        return _kernel(q, k, v, None, kernel).transpose(1, 2).flatten(0, 1)
    back, held, there, real = _places(keys.cu_seqlens, keys.longest, len(qkv))
    if rows is None:
        padded = _Gather.apply(qkv, there, real, back, held).unflatten(0, (sequences, -1))
        q, k, v = padded.permute(2, 0, 3, 1, 4)  # (3, S, H, L, d)
    else:
        k, v = _Gather.apply(qkv[:, 1:], there, real, back, held).unflatten(0, (sequences, -1)).permute(2, 0, 3, 1, 4)
    mask = real.view(sequences, 1, 1, -1).clone()
    mask[..., 0] = True  # the softmax of an empty sequence is finite, and its gradient nought
    if rows is not None:
        back, held, there, real = _places(queries.cu_seqlens, queries.longest, len(rows))
        asked = qkv[:, 0].index_select(0, rows)
        q = _Gather.apply(asked, there, real, back, held).unflatten(0, (sequences, -1)).transpose(1, 2)
    out = _kernel(q, k, v, mask.expand(-1, -1, q.shape[2], -1), kernel)
    return _Gather.apply(out.transpose(1, 2).flatten(0, 1), back, held, there, real)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> Tensor:
    with sdpa_kernel(KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _places(cu_seqlens: Tensor, longest: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each token its row of the padded batch, and whether it has one; for each row its token, and the same."""
    width = -(-longest // _GRANULE) * _GRANULE
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
    offset = token - starts.index_select(0, sequence)
    held = token < ends[-1]
    row = starts[:, None] + torch.arange(width, device=cu_seqlens.device)
    real = row < ends[:, None]
    back = torch.where(held, sequence * width + offset, 0)
    return back, held, row.clamp(max=max(tokens - 1, 0)).flatten(), real.flatten()


class _Gather(torch.autograd.Function):
    """Rows `index` of x, zeros where not `valid`; the gradient is the same with the inverse, and needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, valid: Tensor, inverse: Tensor, inverse_valid: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, inverse_valid)
        return _take(x, index, valid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _take(grads[0], *ctx.saved_tensors), None, None, None, None


def _take(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    return x.index_select(0, index).masked_fill(~valid.view(-1, *[1] * (x.dim() - 1)), 0)
