"""The full training step of a recipe with one choice of kernels, by parts, at the largest micro-batch that fits.

A step is `images` images in as many micro-batches as needed, then optimizer and moving average. The batches are already
on the device; copying them there is not measured.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from timing import Clock, free, peak_memory, published_peak

from ijepa.config.recipe import Recipe
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from ijepa.masking.token_budget import Budget
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA
from ijepa.training.block_transforms import compile_blocks
from ijepa.training.model_setup import setup_model, token_budget
from ijepa.training.optimizer import apply_step, make_optimizer, set_rates
from ijepa.training.runtime import autocast_context
from ijepa.training.schedules import Rates

TINY = {
    "model.image_size": 64,
    "model.patch_size": 8,
    "model.encoder.width": 64,
    "model.encoder.depth": 3,
    "model.encoder.heads": 2,
    "model.predictor.width": 32,
    "model.predictor.depth": 3,
    "model.predictor.heads": 2,
    "mask.min_context": 4,
}


@dataclass(frozen=True)
class Choice:
    """One way to compute the step."""

    autocast: bool = True
    fp8: str = "none"
    weight_gradient: str = "fp8"
    compile: bool = False
    attention: str = "auto"
    activation_checkpointing: str = "none"

    def recipe(self, images: int, *, tiny: bool) -> Recipe:
        values: dict[str, Any] = {
            "batch.global": images,
            "precision.autocast": "bf16" if self.autocast else "none",
            "precision.fp8": self.fp8,
            "precision.fp8_weight_gradient": self.weight_gradient,
            "precision.attention": self.attention,
            "activation_checkpointing": self.activation_checkpointing,
            "parallel.strategy": "none",
            "batch.pad_to_budget": True,
            "compile": False,  # `build` compiles, by the backend that the device allows
        }
        return Recipe.load("vit-huge-16-in22k", {**values, **(TINY if tiny else {})})


def build(recipe: Recipe, choice: Choice, device: torch.device) -> IJEPA:
    """A model with weights drawn on the device: speed does not depend on them, and drawing ours takes minutes."""
    torch.manual_seed(0)
    with patch("ijepa.model.ijepa.init_weights"), torch.device(device):
        model = IJEPA(recipe.model).to(device)  # its constants are made on the host, whatever the default device
    with torch.no_grad():
        for name, parameter in [*model.context_encoder.named_parameters(), *model.predictor.named_parameters()]:
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
        model.target_encoder.load_state_dict(model.context_encoder.state_dict())
    apply_choice(model, recipe, choice, device)
    return model


def apply_choice(model: IJEPA, recipe: Recipe, choice: Choice, device: torch.device) -> None:
    setup_model(model, recipe, device, autocast=choice.autocast)
    if choice.compile:  # on a CPU the graphs alone are exercised: its compiler would take minutes
        compile_blocks(model, "inductor" if device.type == "cuda" else "eager")


def batches(recipe: Recipe, micro: int, count: int, device: torch.device, budget: Budget | None) -> list[Batch]:
    encoder = recipe.model.encoder
    packer = Packer(
        recipe.mask, recipe.model.grid, 0, recipe.batch.total, encoder.depth, encoder.drop_path, budget=budget
    )
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (micro, 3, *recipe.model.image_size), dtype=np.uint8))
    return [packer(np.arange(i * micro, (i + 1) * micro), pixels).to(device) for i in range(count)]


def measure(choice: Choice, device: torch.device, *, images: int, steps: int, tiny: bool) -> dict[str, Any]:
    """Measure at `images` a micro-batch, or half as many until it fits."""
    micro = images
    while True:
        try:
            return _measure(choice, device, images, micro, steps, tiny)
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        micro //= 2  # outside the handler: the traceback holds the tensors
        free(device)


def _measure(choice: Choice, device: torch.device, images: int, micro: int, steps: int, tiny: bool) -> dict[str, Any]:
    free(device)
    recipe = choice.recipe(images, tiny=tiny)
    model = build(recipe, choice, device)
    optimizer = make_optimizer(model, recipe.optimizer)
    budget = token_budget(recipe, micro, device)
    a_step = images // micro
    made = batches(recipe, micro, 4 * a_step, device, budget)
    work = [batch_flops(recipe.model, batch).total / micro for batch in made]
    earlier, graphs = _graphs(), []
    rows: list[dict[str, float]] = []
    for step in range(3 + steps):
        if step == 3:
            graphs.append(_graphs() - earlier)
        set_rates(optimizer, Rates(1e-4, 1e-4, 0.05, 0.996))
        clock = Clock(device)
        clock.mark("begin")
        with _watched(model, clock) as watch:
            for number in range(a_step):
                with autocast_context(device, choice.autocast):
                    outcome = model(made[(step * a_step + number) % len(made)])
                watch(outcome)
                outcome.loss.backward()
                clock.mark("context backward")
        apply_step(model, optimizer, 0.996, None)
        clock.mark("optimizer, EMA")
        parts: dict[str, float] = {}
        for name, seconds in clock.seconds():
            parts[name] = parts.get(name, 0.0) + seconds
        rows.append(parts)
    graphs.append(_graphs() - earlier)
    taken = sorted(rows[3:], key=lambda row: sum(row.values()))[steps // 2]
    seconds = sum(taken.values())
    flops = float(np.mean(work)) * images / seconds
    peak = published_peak(device)
    tokens = {
        name: [len(getattr(made[0], name).index), sum(getattr(made[0], name).lengths)]
        for name in ("context", "targets", "predictor")
    }
    return {
        "choice": vars(choice),
        "images": images,
        "micro": micro,
        "images_per_second": images / seconds,
        "seconds": seconds,
        "parts": taken,
        "flops_per_second": flops,
        "share_of_bf16_peak": flops / peak if peak else None,
        "gflop_per_image": float(np.mean(work)) / 1e9,
        "memory": peak_memory(device),
        "tokens_padded_and_real": tokens,
        "graphs_warm_and_at_the_end": graphs,
        "loss": float(outcome.loss.detach()),
    }


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))


@contextmanager
def _watched(model: IJEPA, clock: Clock) -> Any:
    """Marks after each part; calling what this yields with the outcome divides the backward pass too."""
    contexts: list[torch.Tensor] = []
    parts = {"target forward": model.target_encoder, "context forward": model.context_encoder}
    handles = [
        module.register_forward_pre_hook(lambda *_: clock.mark("loss and the rest"))
        for module in (*parts.values(), model.predictor)
    ]
    for name, module in parts.items():
        handles.append(module.register_forward_hook(lambda *_, name=name: clock.mark(name)))
    handles.append(model.predictor.register_forward_hook(lambda *_: clock.mark("predictor forward")))
    handles.append(model.context_encoder.register_forward_hook(lambda _m, _a, out: contexts.append(out[0])))

    def watch(outcome: Any) -> None:
        clock.mark("loss and the rest")
        contexts.pop().register_hook(lambda gradient: clock.mark("predictor backward"))

    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
