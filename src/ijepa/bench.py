"""What this machine does: the training step by parts, masks, attention. Ratios from one interleaved run.

Figures are CPU-seconds of this process, since machines are shared and noisy; beside a step stand the matrix products
of its own shapes, measured in the same run, so that a slow machine is not taken for slow code.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.batch import Batch, Sequences
from ijepa.masks import MaskRule, draw_masks
from ijepa.model.attention import attention
from ijepa.model.flops import batch_flops
from ijepa.model.jepa import IJEPA
from ijepa.model.vision_transformer import patchify
from ijepa.packing import Packer
from ijepa.randomness import Stream, words
from ijepa.recipe import Recipe
from ijepa.training.optimizer import apply_step, make_optimizer, set_rates
from ijepa.training.parallel import computing, resolve
from ijepa.training.schedules import Rates

Echo = Callable[[str], None]


def bench_step(
    recipe: Recipe, *, micro: int, steps: int, threads: int | None = None, echo: Echo = print
) -> dict[str, Any]:
    """Measure a training step of `micro` images: CPU-seconds an image, by parts.

    Each round takes one whole step, one step cut into its parts, and the matrix products of the predictor's shape.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve(recipe)
    device = torch.device(resolved.device)
    shape = recipe.model
    model = IJEPA(shape, recipe.seed).to(device)
    optimizer = make_optimizer(model, recipe.optimizer)
    set_rates(optimizer, Rates(1e-4, 1e-4, 0.05, 0.996))
    packer = Packer(recipe.mask, shape.grid, recipe.seed, micro, shape.encoder.depth, shape.encoder.drop_path)
    pixels = _pixels(micro, shape.image_hw)
    parts: dict[str, list[float]] = {}
    gflop, rates = [], []
    for number in range(steps + 1):
        positions = np.arange(number * micro, (number + 1) * micro)
        found = {"packing": _cpu(packer, positions, pixels)}
        batch = packer(positions, pixels).to(device)
        with computing(device, resolved.autocast):
            found["target encoder"] = _cpu(_targets, model, batch)
        found["whole step"] = _cpu(_whole, model, optimizer, batch, resolved.autocast)
        with computing(device, resolved.autocast):
            begun = time.process_time()
            outcome = model(batch)
            found["forward"] = time.process_time() - begun
        found["backward"] = _cpu(outcome.loss.backward)
        found["optimiser and EMA"] = _cpu(apply_step, model, optimizer, 0.996, None)
        product = _product_rate(sum(batch.predictor.lengths), shape.predictor.width, resolved.autocast, device)
        if number:  # the first round warms up
            for name, seconds in found.items():
                parts.setdefault(name, []).append(seconds / micro)
            gflop.append(batch_flops(shape, batch).total / 1e9 / micro)
            rates.append(product)
    median = {name: statistics.median(values) for name, values in parts.items()}
    work = statistics.mean(gflop)
    result = {
        "bench": "step",
        "recipe": recipe.name,
        "micro": micro,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "autocast": resolved.autocast,
        "cpu_seconds_an_image": {name: round(value, 5) for name, value in median.items()},
        "gflop_an_image": round(work, 3),
        "gflop_a_cpu_second": round(work / median["whole step"], 1),
        "matrix_product_gflop_a_cpu_second": round(statistics.median(rates), 1),
    }
    for name, value in median.items():
        echo(f"{name:<18} {1000 * value:9.2f} ms of CPU an image")
    echo(f"{work:.1f} GFLOP an image: {result['gflop_a_cpu_second']} GFLOP a CPU-second; matrix products of the "
         f"predictor's shape alone reach {result['matrix_product_gflop_a_cpu_second']} here")  # fmt: skip
    return result


def _targets(model: IJEPA, batch: Batch) -> None:
    model.encode_targets(patchify(batch.pixels, model.target_encoder.patch_size), len(batch.context.lengths))


def _whole(model: IJEPA, optimizer: torch.optim.Optimizer, batch: Batch, autocast: bool) -> None:
    with computing(batch.pixels.device, autocast):
        outcome = model(batch)
    outcome.loss.backward()
    apply_step(model, optimizer, 0.996, None)


def _product_rate(tokens: int, width: int, autocast: bool, device: torch.device) -> float:
    """GFLOP a CPU-second of the forward and both backward products of the predictor's first MLP layer."""
    dtype = torch.bfloat16 if autocast else torch.float32
    x, weight = (
        torch.randn(tokens, width, device=device, dtype=dtype),
        torch.randn(4 * width, width, device=device, dtype=dtype),
    )
    y = F.linear(x, weight)
    seconds = _cpu(lambda: [F.linear(x, weight), y @ weight, y.t() @ x])
    return 3 * 2 * tokens * width * 4 * width / max(seconds, 1e-9) / 1e9


def bench_masks(*, images: int = 256, repeats: int = 20, echo: Echo = print) -> dict[str, Any]:
    """Measure drawing the masks of `images` images at 14 x 14."""
    rule = MaskRule()
    times = [
        _cpu(draw_masks, rule, (14, 14), 0, np.arange(number * images, (number + 1) * images))
        for number in range(repeats)
    ]
    milliseconds = 1000 * statistics.median(times)
    echo(f"{milliseconds:.2f} ms of CPU for the masks of {images} images at 14 x 14")
    return {"bench": "masks", "images": images, "grid": [14, 14], "cpu_milliseconds": round(milliseconds, 3)}


def bench_attention(*, images: int = 16, repeats: int = 5, echo: Echo = print) -> dict[str, Any]:
    """Measure packed attention, forward and backward, beside a loop over sequences and torch's own padded kernel."""
    batch = Packer(MaskRule(), (14, 14), 0, images, 1)(np.arange(images), torch.empty(0))
    rows = []
    for name, sequences in (("context", batch.context), ("predictor", batch.predictor)):
        for dtype in (torch.bfloat16, torch.float32):
            qkv = torch.randn(sum(sequences.lengths), 3, 6, 64, dtype=dtype, requires_grad=True)
            ways = {"packed": _packed, "loop": _loop, "padded": _padded}
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats + 1):
                for way, run in ways.items():
                    times[way].append(_cpu(_there_and_back, run, qkv, sequences))
            median = {way: statistics.median(values[1:]) for way, values in times.items()}
            ratios = {way: round(value / median["packed"], 2) for way, value in median.items()}
            rows.append({"sequences": name, "dtype": str(dtype).removeprefix("torch."),
                         "cpu_milliseconds": round(1000 * median["packed"], 2), "times_packed": ratios})  # fmt: skip
            echo(f"{name:<10} {rows[-1]['dtype']:<9} packed {1000 * median['packed']:7.1f} ms; "
                 f"loop {ratios['loop']:.2f} x, padded {ratios['padded']:.2f} x")  # fmt: skip
    return {"bench": "attention", "images": images, "rows": rows}


def _there_and_back(run: Callable[[Tensor, Sequences], Tensor], qkv: Tensor, sequences: Sequences) -> None:
    run(qkv, sequences).float().sum().backward()


def _packed(qkv: Tensor, sequences: Sequences) -> Tensor:
    return attention(qkv, sequences, sequences)


def _loop(qkv: Tensor, sequences: Sequences) -> Tensor:
    out = []
    for part in qkv.split(sequences.lengths):
        q, k, v = part.transpose(0, 2).unbind(1)  # (H, L, d)
        out.append(((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v)
    return torch.cat([o.transpose(0, 1) for o in out])


def _padded(qkv: Tensor, sequences: Sequences) -> Tensor:
    lengths = sequences.lengths
    padded = torch.nn.utils.rnn.pad_sequence(list(qkv.split(lengths)), batch_first=True)  # (S, L, 3, H, d)
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
    valid = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    return out.transpose(1, 2)[valid]


def _pixels(images: int, size: tuple[int, int]) -> Tensor:
    """Random images (B, 3, H, W) uint8."""
    count = 3 * size[0] * size[1]
    drawn = words(0, Stream.CROP, np.arange(images), count)
    return torch.from_numpy((drawn >> 24).astype(np.uint8)).view(images, 3, *size)


def _cpu(run: Callable[..., Any], *arguments: Any) -> float:
    begun = time.process_time()
    run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - begun
