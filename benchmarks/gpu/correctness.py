"""Every fast path compared with float32 on the same device: the loss, and the noise of the whole gradient."""

from collections.abc import Callable
from typing import Any

import torch
from step import Choice, batches, build
from timing import free

from ijepa.training.model_setup import token_budget
from ijepa.training.runtime import autocast_context

LOSS = {"float32": 1e-4, "bf16": 1e-2, "fp8": 3e-2}
"""Relative gap of the loss that counts as agreement."""
NOISE = {"float32": 60.0, "bf16": 20.0, "fp8": 10.0}
"""Sufficient signal-to-noise ratio of the gradient in decibels. A float8 layer has 25; noise adds up over layers."""


def correctness(
    choices: dict[str, Choice], device: torch.device, *, tiny: bool, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Two layers of the full width, four images; `keep` receives the results so far after every choice."""
    exact = Choice(autocast=False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {}
    wanted: tuple[float, torch.Tensor] | None = None
    for name, choice in {"float32": exact, **choices}.items():
        recipe = choice.recipe(4, tiny=tiny)
        if not tiny:
            shape = recipe.model
            shape = shape.model_copy(
                update={
                    "encoder": shape.encoder.model_copy(update={"depth": 2}),
                    "predictor": shape.predictor.model_copy(update={"depth": 3}),
                }
            )
            recipe = recipe.model_copy(update={"model": shape})
        try:
            free(device)
            model = build(recipe, choice, device)
            budget = token_budget(recipe, 4, device) if wanted else None
            (batch,) = batches(recipe, 4, 1, device, budget)
            with autocast_context(device, choice.autocast):
                outcome = model(batch)
            outcome.loss.backward()
            flat = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
            loss = float(outcome.loss.detach().double())
            if wanted is None:
                wanted = loss, flat
                continue
            kind = "fp8" if choice.fp8 != "none" else "bf16" if choice.autocast else "float32"
            gap = abs(loss / wanted[0] - 1)
            noise = float(10 * torch.log10(wanted[1].square().sum() / (flat - wanted[1]).square().sum()))
            found[name] = {
                "loss_gap": gap,
                "gradient_decibels": noise,
                "agrees": gap < LOSS[kind] and noise > NOISE[kind],
            }
        except Exception as error:
            if wanted is None:
                raise
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        keep(found)
    return found
