"""One whole training step of a recipe, by parts, beside what the machine's matrix products reach at its shapes.

The step is the loop's: both encoders, predictor, loss, backward, optimiser, moving average; pixels are random, masks
are drawn anew for every step. After each step the same process multiplies matrices of the model's own shapes, the
forward product and both of the backward ones. `share` is the step's operations a second over theirs: it says how
much of the machine a step uses, also on a machine that is slow or busy.

On a CPU, seconds are the process's CPU time over all threads; on a GPU they are wall time, synchronised.
"""

import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa.config.recipe import Recipe
from ijepa.masking.packing import Packer
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA
from ijepa.training.model_setup import setup_model, token_budget
from ijepa.training.optimizer import apply_step, make_optimizer
from ijepa.training.runtime import autocast_context, resolve
from ijepa.utils.allocator import keep_freed_memory
from ijepa.utils.environment import machine
from ijepa.utils.random import Stream, words

PARTS = ("target forward", "context forward", "predictor forward", "loss and the rest", "backward", "optimiser, EMA")
_WARM_UP = 2
_MOST_ROWS = {"bfloat16": 8192, "float32": 2048}


def bench_step(
    recipe: Recipe, *, micro: int, steps: int, threads: int | None, echo: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure `steps` steps of `micro` images each, after two that warm up.

    Args:
        recipe: what to train; its batch size is replaced by `micro`.
        micro: images a step.
        steps: steps to measure.
        threads: CPU threads; None for torch's own number.
        echo: where lines go.

    Returns:
        Medians over steps: `seconds` an image (`total` and by part), `wall` seconds an image, `gflop` an image,
        `gflops` (10^9 operations a second), `gemm` (the same of matrix products by dtype), `share` of the compute
        dtype's products, and `memory`, the peak in bytes.

    Raises:
        UserError: where this machine cannot follow the recipe.
    """
    resolved = resolve(recipe)
    device = torch.device(resolved.device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        keep_freed_memory()
        rows = _measure(recipe, micro, steps, device, resolved.autocast)
    finally:
        torch.set_num_threads(before)
    result = {
        **machine(),
        "recipe": recipe.name,
        "micro": micro,
        "steps": steps,
        "threads": threads or before,
        "dtype": "bfloat16" if resolved.autocast else "float32",
        "clock": "CPU time" if device.type == "cpu" else "wall time",
        **_summary(rows, "bfloat16" if resolved.autocast else "float32"),
        "memory": _peak_memory(device),
    }
    _describe(result, echo)
    return result


def _measure(recipe: Recipe, micro: int, steps: int, device: torch.device, autocast: bool) -> list[dict[str, Any]]:
    shape = recipe.model
    model = IJEPA(shape, recipe.seed).to(device)
    setup_model(model, recipe, device, autocast=autocast)
    optimizer = make_optimizer(model, recipe.optimizer)
    budget, encoder = token_budget(recipe, micro, device), shape.encoder
    packer = Packer(recipe.mask, shape.grid, recipe.seed, micro, encoder.depth, encoder.drop_path, budget)
    height, width = shape.image_hw
    draw = words(recipe.seed, Stream.CROP, np.arange(micro), -(-3 * height * width // 4))
    pixels = torch.from_numpy(draw.view(np.uint8)[:, : 3 * height * width].reshape(micro, 3, height, width).copy())
    dtypes = ["float32", "bfloat16"] if autocast else ["float32"]
    products = [(name, product) for name in dtypes for product in _products(recipe, micro, name, device)]
    rows = []
    for step in range(_WARM_UP + steps):
        batch = packer(np.arange(step * micro, (step + 1) * micro), pixels).to(device)
        wall = time.perf_counter()
        with _watched(model, device) as ticks:
            with autocast_context(device, autocast):
                outcome = model(batch)
            ticks.append(_now(device))
            outcome.loss.backward()
            ticks.append(_now(device))
            apply_step(model, optimizer, 0.996, recipe.optimizer.clip_norm)
            ticks.append(_now(device))
        wall = time.perf_counter() - wall
        begin, t0, t1, c0, c1, p0, p1, forward, backward, end = ticks
        encoded = t1 - t0, c1 - c0, p1 - p0
        parts = (*encoded, forward - begin - sum(encoded), backward - forward, end - backward)
        gemm = {name: [0.0, 0.0] for name in dtypes}
        for name, (operations, product) in products:
            begun = _now(device)
            product()
            gemm[name][0] += operations
            gemm[name][1] += _now(device) - begun
        rows.append({
            "wall": wall / micro,
            "parts": [part / micro for part in parts],
            "gflop": batch_flops(shape, batch).total / micro / 1e9,
            "gemm": {name: operations / seconds / 1e9 for name, (operations, seconds) in gemm.items()},
        })  # fmt: skip
    return rows[_WARM_UP:]


@contextmanager
def _watched(model: IJEPA, device: torch.device) -> Any:
    """Clock readings: now, then before and after each of target encoder, context encoder and predictor."""
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


def _products(
    recipe: Recipe, micro: int, dtype: str, device: torch.device
) -> list[tuple[float, Callable[[], torch.Tensor]]]:
    """Each product of the MLPs' first layers with its operations: (T, D) x (D, 4D), and the two of its backward."""
    model = recipe.model
    patches = model.grid[0] * model.grid[1]
    products: list[tuple[float, Callable[[], torch.Tensor]]] = []
    for part, tokens in ((model.encoder, micro * patches), (model.predictor, 2.5 * micro * patches)):
        rows, hidden = min(int(tokens), _MOST_ROWS[dtype]), round(part.width * part.mlp_ratio)
        x, w, d_y = (
            torch.randn(*size).to(device, getattr(torch, dtype))
            for size in ((rows, part.width), (hidden, part.width), (rows, hidden))
        )
        operations = 2.0 * rows * part.width * hidden
        products += [
            (operations, lambda x=x, w=w: x @ w.t()),  # type: ignore[misc]
            (operations, lambda d_y=d_y, w=w: d_y @ w),  # type: ignore[misc]
            (operations, lambda d_y=d_y, x=x: d_y.t() @ x),  # type: ignore[misc]
        ]
    return products


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


def _describe(result: dict[str, Any], echo: Callable[[str], None]) -> None:
    seconds = result["seconds"]
    echo(f"{result['recipe']}, {result['micro']} images a step, {result['threads']} threads, {result['dtype']}:")
    echo(f"  {1e3 * seconds['total']:.2f} ms an image ({result['clock']}), wall {1e3 * result['wall']:.2f} ms")
    for part in PARTS:
        echo(f"    {part:18s} {1e3 * seconds[part]:8.2f} ms  {100 * seconds[part] / seconds['total']:4.1f} %")
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in result["gemm"].items())
    echo(f"  {result['gflop']:.1f} GFLOP an image, {result['gflops']:.0f} GFLOP/s; matrix products alone: {products}")
    echo(f"  {100 * result['share']:.0f} % of the matrix products' rate; memory {result['memory'] / 2**30:.2f} GiB")
