"""One whole training step of a recipe, by parts, compared with matrix products of the same shapes on the machine.

The step is that of the training loop: both encoders, predictor, loss, backward, optimizer, moving average. Pixels are
random, and each step draws new masks. After each step the same process multiplies matrices of the model's shapes: the
forward product and both backward products. `share` is the operations per second of the step divided by those of the
products. It tells how much of the machine a step uses, even if the machine is slow or busy.

On a CPU, seconds are CPU time of the process over all threads. On a GPU they are synchronized wall time.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ijepa.config.recipe import Recipe
from ijepa.masking.packing import Packer
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA
from ijepa.training.model_setup import setup_model, token_budget
from ijepa.training.optimizer import apply_step, make_optimizer
from ijepa.training.runtime import autocast_context, resolve
from ijepa.utils.allocator import keep_freed_memory

PARTS = ("target forward", "context forward", "predictor forward", "loss and the rest", "backward", "optimizer, EMA")
_WARM_UP = 2
_MOST_ROWS = {"bfloat16": 8192, "float32": 2048}
"""Rows of the measured products: enough for the full rate, and less time than the step itself."""


def bench_step(recipe: Recipe, *, micro: int, steps: int, threads: int | None = None) -> dict[str, Any]:
    """Measure `steps` steps of `micro` images each, after two steps that warm up.

    Args:
        recipe: what to train; `micro` replaces its batch size.
        micro: images per step.
        steps: number of steps to measure.
        threads: CPU threads; None for torch's own number.

    Returns:
        Medians over steps: `seconds` per image (`total` and by part), `wall` seconds per image, `gflop` per image,
        `gflops` (10^9 operations per second), `gemm` (the same for matrix products, by dtype), `share` (of the products
        in the compute dtype), and `memory`, the peak in bytes.

    Raises:
        UserError: this machine cannot run the recipe.
    """
    resolved = resolve(recipe)
    device, dtype = torch.device(resolved.device), "bfloat16" if resolved.autocast else "float32"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        keep_freed_memory()
        rows = _measure(recipe, micro, steps, device, resolved.autocast)
    finally:
        torch.set_num_threads(before)
    return {
        "recipe": recipe.name,
        "micro": micro,
        "steps": steps,
        "threads": threads or before,
        "dtype": dtype,
        "clock": "CPU time" if device.type == "cpu" else "wall time",
        **_summary(rows, dtype),
        "memory": _peak_memory(device),
    }


def _measure(recipe: Recipe, micro: int, steps: int, device: torch.device, autocast: bool) -> list[dict[str, Any]]:
    """Return one row of figures per measured step."""
    shape = recipe.model
    model = IJEPA(shape, recipe.seed).to(device)
    setup_model(model, recipe, device, autocast=autocast)
    optimizer = make_optimizer(model, recipe.optimizer)
    budget, encoder = token_budget(recipe, micro, device), shape.encoder
    packer = Packer(recipe.mask, shape.grid, recipe.seed, micro, encoder.depth, encoder.drop_path, budget)
    pixels = torch.randint(
        256, (micro, 3, *shape.image_size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    products = {name: _products(recipe, micro, name, device) for name in ("float32", "bfloat16")[: 1 + autocast]}
    rows = []
    for step in range(_WARM_UP + steps):
        batch = packer(np.arange(step * micro, (step + 1) * micro), pixels).to(device)
        wall = time.perf_counter()
        with _clocked(model, device) as ticks:
            with autocast_context(device, autocast):
                output = model(batch)
            ticks.append(_now(device))
            output.loss.backward()
            ticks.append(_now(device))
            apply_step(model, optimizer, 0.996, recipe.optimizer.clip_norm)
            ticks.append(_now(device))
        wall = time.perf_counter() - wall
        start, target_0, target_1, context_0, context_1, predictor_0, predictor_1, forward, backward, end = ticks
        modules = target_1 - target_0, context_1 - context_0, predictor_1 - predictor_0
        parts = (*modules, forward - start - sum(modules), backward - forward, end - backward)
        rows.append(
            {
                "wall": wall / micro,
                "parts": [part / micro for part in parts],
                "gflop": batch_flops(shape, batch).total / micro / 1e9,
                "gemm": {name: _rate(each, device) for name, each in products.items()},
            }
        )
    return rows[_WARM_UP:]


@contextmanager
def _clocked(model: IJEPA, device: torch.device) -> Iterator[list[float]]:
    """Yield a list of times: now, and then before and after each of target encoder, context encoder and predictor."""
    ticks = [_now(device)]

    def tick(*_: object) -> None:
        ticks.append(_now(device))

    parts: list[nn.Module] = [model.target_encoder, model.context_encoder, model.predictor]
    handles = [part.register_forward_pre_hook(tick) for part in parts]
    handles += [part.register_forward_hook(tick) for part in parts]
    try:
        yield ticks
    finally:
        for handle in handles:
            handle.remove()


def _products(recipe: Recipe, micro: int, dtype: str, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of matrices that the first layers of the MLPs multiply, forward and backward."""
    model = recipe.model
    patches = model.grid[0] * model.grid[1]
    pairs = []
    for part, tokens in ((model.encoder, micro * patches), (model.predictor, 2.5 * micro * patches)):
        rows, hidden = min(int(tokens), _MOST_ROWS[dtype]), round(part.width * part.mlp_ratio)
        x, w, d_y = (  # (T, D), (4D, D), (T, 4D)
            torch.randn(*size).to(device, getattr(torch, dtype))
            for size in ((rows, part.width), (hidden, part.width), (rows, hidden))
        )
        pairs += [(x, w.t()), (d_y, w), (d_y.t(), x)]
    return pairs


def _rate(pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Return GFLOP per second of the products."""
    start = _now(device)
    for a, b in pairs:
        a @ b
    seconds = _now(device) - start
    return sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs) / seconds / 1e9


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _summary(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    parts = np.array([row["parts"] for row in rows])
    total, gflop = parts.sum(1), np.array([row["gflop"] for row in rows])
    rate = gflop / total
    return {
        "seconds": {
            "total": float(np.median(total)),
            **dict(zip(PARTS, np.median(parts, axis=0).tolist(), strict=True)),
        },
        "wall": float(np.median([row["wall"] for row in rows])),
        "gflop": float(gflop.mean()),
        "gflops": float(np.median(rate)),
        "gemm": {name: float(np.median([row["gemm"][name] for row in rows])) for name in rows[0]["gemm"]},
        "share": float(np.median(rate / [row["gemm"][dtype] for row in rows])),
    }
