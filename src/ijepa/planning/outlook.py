"""What a recipe asks for, before any of it is spent: parameters, operations, memory, days, energy. Needs no device.

`plan` counts what depends on the recipe alone and `describe` puts it into a few lines (`pretrain --dry-run`);
`outlook` lays it over given hardware (`ijepa plan`, whose page is planning/page.py).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ijepa.config.recipe import Recipe
from ijepa.planning.cost import Course, course
from ijepa.planning.hardware import Gpu, Grid, find_country, find_gpu, gpus, grids
from ijepa.planning.memory import USABLE, Memory, memories
from ijepa.planning.size import Plan, plan
from ijepa.utils.errors import UserError

__all__ = ["Outlook", "Plan", "Row", "describe", "outlook", "plan"]

NODE = 8
"""GPUs of a node; with hsdp those of one share a copy of the model, unless the recipe says otherwise."""


@dataclass(frozen=True)
class Row:
    """One kind of GPU: what fits on it under every strategy, and how a run goes.

    Attributes:
        key: short name.
        gpu: its data sheet.
        memory: one a strategy.
        chosen: that of the recipe's strategy.
        course: speed and cost.
    """

    key: str
    gpu: Gpu
    memory: tuple[Memory, ...]
    chosen: Memory
    course: Course


@dataclass(frozen=True)
class Outlook:
    """A recipe on given hardware.

    Attributes:
        recipe: what is planned.
        found: its size.
        devices: how many GPUs.
        images: of the whole run; None where its length is not known.
        given: whether the rate was given; else it is a share of peak.
        country: where the electricity is from.
        grid: that electricity.
        pue: a site's power over its computers'.
        row: the GPU asked for.
        rows: every GPU of the table, at one share of peak.
    """

    recipe: Recipe
    found: Plan
    devices: int
    images: int | None
    given: bool
    country: str
    grid: Grid
    pue: float
    row: Row
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Return every figure as plain values; bytes, operations, seconds and the units that names say."""
        size = self.found

        def memory(one: Memory) -> dict[str, Any]:
            fits = [asdict(fit) for fit in one.fits]
            return {"strategy": one.strategy, "shards": one.shards, **asdict(one.state), "fits": fits}

        def row(one: Row) -> dict[str, Any]:
            return {
                "gpu": {"key": one.key, **one.gpu.model_dump()},
                "memory": [memory(each) for each in one.memory],
                "strategy": one.chosen.strategy,
                "course": asdict(one.course),
            }

        return {
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
            "parameters": asdict(size.parameters),
            "tokens": {
                "patches": size.tokens.patches,
                "context": size.context_tokens,
                "target_block": size.target_tokens,
            },
            "flops_an_image": {
                name: {**asdict(part), "total": part.total}
                for name, part in (("plain", size.plain), ("full", size.full), ("executed", size.executed))
            },
            "images": self.images,
            "steps": size.lengths.total if size.lengths else None,
            "devices": self.devices,
            "rate_given": self.given,
            "usable_memory": USABLE,
            "electricity": {
                "country": self.country,
                **self.grid.model_dump(),
                "source": grids().source,
                "pue": self.pue,
                "pue_source": grids().pue_source,
            },
            "plan": row(self.row),
            "comparison": [row(one) for one in self.rows],
        }


def outlook(
    recipe: Recipe,
    *,
    gpu: str = "h100",
    devices: int = 8,
    images_per_second: float | None = None,
    share_of_peak: float = 0.35,
    country: str = "World",
    images: int | None = None,
) -> Outlook:
    """Plan a recipe on `devices` GPUs of a kind.

    Args:
        recipe: what to plan.
        gpu: a name of the table of GPUs.
        devices: how many.
        images_per_second: of all together; if given, `share_of_peak` follows from it.
        share_of_peak: executed operations over the dense bfloat16 peak.
        country: a name of the table of electricity.
        images: size of the data set, the recipe's own figure if not given.

    Raises:
        UserError: unknown names, a number of GPUs that does not divide the batch, rates that cannot be.
    """
    sheet, (place, grid) = find_gpu(gpu), find_country(country)
    _check(recipe, devices, images_per_second, share_of_peak)
    found = plan(recipe, images)
    whole = found.lengths.total * recipe.batch.total if found.lengths else None

    def row(key: str, one: Gpu, rate: float | None, share: float) -> Row:
        memory = memories(
            found,
            recipe.model,
            share=recipe.batch.total // devices,
            devices=devices,
            group=_group(recipe, devices),
            capacity=1e9 * one.memory_gb,
            autocast=recipe.precision.autocast != "none",
            float8=recipe.precision.fp8 != "none",
        )
        wanted = recipe.parallel.strategy
        if wanted == "auto":
            wanted = "zero2"
        chosen = next((m for m in memory if m.strategy == wanted), memory[0])  # one GPU has no choice
        run = course(
            one,
            devices,
            executed=found.executed.total,
            plain=found.plain.total,
            batch=recipe.batch.total,
            images=whole,
            grid=grid,
            pue=grids().pue,
            images_per_second=rate,
            share_of_peak=share,
        )
        return Row(key, one, memory, chosen, run)

    asked = row(gpu.lower(), sheet, images_per_second, share_of_peak)
    if asked.course.share_of_peak > 1:
        raise UserError(
            f"--images-per-second {images_per_second:g}",
            f"is {asked.course.share_of_peak:.1f} times the bfloat16 peak of {devices} x {sheet.name}",
            "a third of it is a good rate",
        )
    rows = tuple(
        asked if one == sheet else row(key, one, None, asked.course.share_of_peak) for key, one in gpus().items()
    )
    return Outlook(recipe, found, devices, whole, images_per_second is not None, place, grid, grids().pue, asked, rows)


def _check(recipe: Recipe, devices: int, rate: float | None, share: float) -> None:
    if devices < 1:
        raise UserError(f"--gpus {devices}", "must be 1 or more")
    if recipe.batch.total % devices:
        fits = max(d for d in range(1, devices + 1) if recipe.batch.total % d == 0)
        raise UserError(
            f"--gpus {devices}", f"does not divide batch.global = {recipe.batch.total}", f"{fits} does, for example"
        )
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"--images-per-second {rate:g}", "must be a number above 0")
    if not 0 < share <= 1:
        raise UserError(f"--share-of-peak {share:g}", "must be above 0 and at most 1", "large models reach .3 to .55")


def _group(recipe: Recipe, devices: int) -> int:
    """GPUs that share one copy of the model with hsdp."""
    shard = recipe.parallel.shard
    if shard == "auto":
        return math.gcd(devices, NODE)
    if devices % shard:
        raise UserError(f"parallel.shard = {shard}", f"does not divide {devices} GPUs", "choose a divisor")
    return shard


def describe(recipe: Recipe, images: int | None = None) -> str:
    """Return the resolved recipe and its plan as text."""
    found, whole = plan(recipe, images), recipe.batch.total
    grid = recipe.model.grid
    lines = [
        recipe.dump().rstrip(),
        "",
        f"parameters        {found.encoder / 1e6:.1f} M context + {found.encoder / 1e6:.1f} M target encoder, "
        f"{found.predictor / 1e6:.1f} M predictor",
        f"patches           {grid[0]} x {grid[1]}; {found.context_tokens:.1f} context, "
        f"{found.target_tokens:.1f} a target block",
        f"an image          {found.full.total / 1e9:.4g} GFLOP (target {found.full.target / 1e9:.4g}, context "
        f"{found.full.context / 1e9:.4g}, predictor {found.full.predictor / 1e9:.4g}), "
        f"{found.executed.total / 1e9:.4g} executed",
        f"a step            {whole} images, {found.executed.total * whole / 1e12:.4g} TFLOP",
        f"weights and state {found.state_bytes / 2**30:.2f} GiB on one device, activations not counted",
    ]
    if found.lengths:
        total = found.lengths.total
        lines.append(
            f"the run           {total} steps ({found.lengths.warmup} of warm-up), {total * whole / 1e6:.4g} M images, "
            f"{found.executed.total * total * whole / 1e18:.4g} EFLOP"
        )
    else:
        lines.append("the run           length unknown without the data: add --data.path or --data.images")
    return "\n".join(lines)
