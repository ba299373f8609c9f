"""Packed attention compared with other ways to attend within sequences of different lengths, forward and backward.

* `loop`: one sequence after the other, plain matrix products.
* `sdpa loop`: one sequence after the other, `scaled_dot_product_attention`.
* `sdpa padded`: one dense batch, padded to its longest sequence, with a boolean mask.

Everything that depends on the lengths alone (index tensors, masks) is computed before the measurement, because the
layers of a model share it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.bench.timing import interleaved, medians, ratio
from ijepa.masking.batch import Sequences
from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import pack
from ijepa.model.attention import attention

Method = Callable[[Tensor], Tensor]


def bench_attention(
    *, images: int = 16, grid: tuple[int, int] = (14, 14), heads: int = 6, head_width: int = 64, repeats: int = 7
) -> dict[str, Any]:
    """Measure all methods on the context's and the predictor's sequences of `images` images.

    Returns:
        For each kind of sequences and dtype: `ms` of CPU time of one layer's forward and backward by method, `ratio` to
        the time of `ours`, and `gap`, the largest difference from `ours` in output or gradient.
    """
    batch = pack(draw_masks(MaskRule(), grid, 0, np.arange(images)), torch.empty(images, 0), images)
    results = [
        {
            "sequences": kind,
            "count": len(sequences.lengths),
            "lengths": [min(sequences.lengths), sequences.longest],
            **_compare(sequences, heads, head_width, dtype, repeats),
        }
        for kind, sequences in (("context", batch.context), ("predictor", batch.predictor))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    settings = {"images": images, "grid": list(grid), "heads": heads, "head_width": head_width, "repeats": repeats}
    return {**settings, "threads": torch.get_num_threads(), "results": results}


def _compare(sequences: Sequences, heads: int, width: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    tokens = sum(sequences.lengths)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 3, heads, width, generator=draw).to(dtype).requires_grad_()
    gradient = torch.randn(tokens, heads, width, generator=draw).to(dtype)
    methods: dict[str, Method] = {
        "ours": lambda x: attention(x, sequences, sequences),
        "loop": lambda x: _one_by_one(x, sequences, _plain),
        "sdpa loop": lambda x: _one_by_one(x, sequences, F.scaled_dot_product_attention),
        "sdpa padded": _padded(sequences),
    }

    def run(method: Method) -> tuple[Tensor, Tensor]:
        output = method(qkv)
        (d_qkv,) = torch.autograd.grad(output, qkv, gradient)
        return output.detach(), d_qkv

    results = {name: run(method) for name, method in methods.items()}
    seconds = interleaved({name: partial(run, method) for name, method in methods.items()}, repeats)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: 1e3 * median for name, median in medians(seconds).items()},
        "ratio": {name: ratio(seconds, name, "ours") for name in methods},
        "gap": {
            name: max(float((a - b).abs().max()) for a, b in zip(pair, results["ours"], strict=True))
            for name, pair in results.items()
        },
    }


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, L, d) each."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v


def _one_by_one(qkv: Tensor, sequences: Sequences, attend: Callable[..., Tensor]) -> Tensor:
    parts = []
    for each in qkv.split(list(sequences.lengths)):
        q, k, v = each.permute(1, 2, 0, 3)  # (L, 3, H, d) -> 3 x (H, L, d)
        parts.append(attend(q, k, v).transpose(0, 1))
    return torch.cat(parts)


def _padded(sequences: Sequences) -> Method:
    lengths = torch.tensor(sequences.lengths)
    offset = torch.arange(sequences.longest)
    valid = offset < lengths[:, None]  # (S, L)
    token = ((lengths.cumsum(0) - lengths)[:, None] + offset).where(valid, torch.zeros(()).long())
    rows = valid.flatten().nonzero().squeeze(1)
    mask = valid[:, None, None]

    def attend(qkv: Tensor) -> Tensor:
        dense = qkv.index_select(0, token.flatten()).unflatten(0, token.shape)  # (S, L, 3, H, d)
        q, k, v = dense.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (S, H, L, d)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    return attend
