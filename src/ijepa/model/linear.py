"""A linear layer that a CPU computes in bfloat16 as fast as its matrix units allow.

Under autocast on a CPU, `torch.nn.Linear` first fills the output with the bias and then adds the product: two more
passes over the output than needed, up to a sixth of the time of the layer. Here oneDNN adds the bias while the product
is still in registers. Everywhere else this is `torch.nn.Linear`. It is a subclass of it, so that sharding and float8
conversion treat it in the same way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # otherwise the operation fails, as on a CPU without AVX-512
)

_MOST_ROWS = 64


def pad_to_multiple(x: Tensor) -> Tensor:
    """Append copies of the first row to x (T, ...) on a CPU, up to a multiple of a power of two (at most 64).

    oneDNN compiles a kernel for every shape and keeps up to 1024 of them, at about a millisecond and a megabyte each.
    Packed batches have a different number of tokens at every step; rounded numbers repeat. At most 3 % are added.
    """
    granule = min(_MOST_ROWS, 1 << max(len(x).bit_length() - 6, 0))
    missing = -len(x) % granule if x.is_cpu else 0
    return torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (T, K) @ weight (N, K)^T + bias (N,), in autocast's dtype where it is enabled."""
    # Inductor cannot lower oneDNN's operation with these operands; it fuses the bias of a plain layer itself.
    onednn = not torch.compiler.is_compiling() and _HAS_ONEDNN and x.is_cpu and bias is not None
    if onednn and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return _Linear.apply(x.to(torch.bfloat16), weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Compute in x's dtype (bfloat16); the gradients of weight and bias are float32, as these are."""

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
