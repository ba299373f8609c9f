"""Packed attention beside the other ways of attending within sequences of unlike lengths, forward and backward.

* `loop`: one sequence after another, plain matrix products.
* `sdpa loop`: one sequence after another, `scaled_dot_product_attention`.
* `sdpa padded`: one dense batch, padded to its longest sequence, with a boolean mask.

Whatever depends on lengths alone (index tensors, masks) is made beforehand for every way: a model attends in many
layers by the same lengths.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.masking.batch import Sequences
from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import pack
from ijepa.model.attention import attention
from ijepa.utils.environment import machine

Way = Callable[[Tensor], Tensor]


def bench_attention(
    *,
    images: int = 16,
    grid: tuple[int, int] = (14, 14),
    heads: int = 6,
    head_width: int = 64,
    repeats: int = 7,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every way on the context's and the predictor's sequences of `images` images.

    Returns:
        For each kind of sequences and dtype: `ms` of CPU for one layer's forward and backward by way, `ratio` to
        ours, and `gap`, the largest difference from ours in output or gradient.
    """
    batch = pack(draw_masks(MaskRule(), grid, 0, np.arange(images)), torch.empty(images, 0), images)
    results = []
    for kind, sequences in (("context", batch.context), ("predictor", batch.predictor)):
        for dtype in (torch.bfloat16, torch.float32):
            result = _compare(sequences, heads, head_width, dtype, repeats)
            results.append({"sequences": kind, "count": len(sequences.lengths), **result})
            echo(f"{kind}, {len(sequences.lengths)} sequences of {_span(sequences)} tokens, {result['dtype']}:")
            for way, ratio in result["ratio"].items():
                echo(f"  {way:12s} {result['ms'][way]:8.1f} ms  {ratio:5.2f} x")
    settings = {"images": images, "grid": list(grid), "heads": heads, "head_width": head_width, "repeats": repeats}
    return {**machine(), **settings, "threads": torch.get_num_threads(), "results": results}


def _compare(sequences: Sequences, heads: int, width: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    tokens = sum(sequences.lengths)
    draw = torch.Generator().manual_seed(0)
    qkv, gradient = (
        torch.randn(tokens, *shape, generator=draw).to(dtype) for shape in ((3, heads, width), (heads, width))
    )
    qkv.requires_grad_()
    ways: dict[str, Way] = {
        "ours": lambda x: attention(x, sequences, sequences),
        "loop": lambda x: _one_by_one(x, sequences, _plain),
        "sdpa loop": lambda x: _one_by_one(x, sequences, F.scaled_dot_product_attention),
        "sdpa padded": _padded(sequences),
    }
    seconds = np.zeros((repeats + 1, len(ways)))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for turn in range(repeats + 1):
        for column, (name, way) in enumerate(ways.items()):
            begun = time.process_time()
            output = way(qkv)
            (d_qkv,) = torch.autograd.grad(output, qkv, gradient)
            seconds[turn, column] = time.process_time() - begun
            found[name] = output.detach(), d_qkv
    seconds = seconds[1:]  # the first turn warms up
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    ours = found["ours"]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ms": dict(zip(ways, (1e3 * np.median(seconds, axis=0)).tolist(), strict=True)),
        "ratio": dict(zip(ways, ratios.tolist(), strict=True)),
        "gap": {
            name: max(float((a - b).abs().max()) for a, b in zip(pair, ours, strict=True))
            for name, pair in found.items()
        },
    }


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, L, d) each."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v


def _one_by_one(qkv: Tensor, sequences: Sequences, attend: Callable[..., Tensor]) -> Tensor:
    parts = []
    for each in qkv.split(list(sequences.lengths)):
        q, k, v = each.permute(1, 2, 0, 3)  # (H, L, d) each
        parts.append(attend(q, k, v).transpose(0, 1))
    return torch.cat(parts)


def _padded(sequences: Sequences) -> Way:
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


def _span(sequences: Sequences) -> str:
    return f"{min(sequences.lengths)} to {sequences.longest}"
