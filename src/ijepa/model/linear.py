"""A linear layer that a CPU computes in bfloat16 as fast as its matrix units allow.

Under autocast on a CPU, `torch.nn.Linear` first spreads the bias over the output and then adds the product to it: two
more passes over the output than needed, and up to a sixth of the layer's time. Here oneDNN adds the bias while the
product is still in registers. Everywhere else this is `torch.nn.Linear`, of which it is a subclass so that weights,
sharding and float8 conversion see nothing new.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else the operation raises, as on a CPU without AVX-512
)

MOST_ROWS = 64
"""Tokens on a CPU come in multiples of a power of two, of this one at the most; see `pad_rows`."""


def pad_rows(x: Tensor) -> Tensor:
    """Append copies of the first row to x (T, ...), on a CPU, up to a multiple of a power of two: at most 3 % more.

    oneDNN compiles a kernel for every shape it meets and keeps up to 1024 of them, at about a millisecond and a
    megabyte each. Packed batches have another number of tokens at every step; so rounded, they have a few.
    """
    granule = min(MOST_ROWS, 1 << max(len(x).bit_length() - 6, 0))
    missing = -len(x) % granule if x.is_cpu else 0
    return torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (T, K) @ weight (N, K)^T + bias (N,), in autocast's dtype where it is enabled."""
    # Inductor has no rule for oneDNN's operation with these operands; it fuses a plain layer by its own.
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if _HAS_ONEDNN and x.is_cpu and bias is not None and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if dtype == torch.bfloat16:
            return _Linear.apply(x.to(dtype), weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Operands in x's dtype, bfloat16; gradients of weight and bias in theirs, float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(x.dtype), "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (d_y,) = grads
        d_x = d_y @ weight if ctx.needs_input_grad[0] else None
        return d_x, (d_y.t() @ x).float(), d_y.sum(0).float()
