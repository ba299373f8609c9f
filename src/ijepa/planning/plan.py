"""A recipe on given hardware: what fits into memory, how long the run takes, what it costs. Needs no GPU."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ijepa.config.recipe import Recipe
from ijepa.planning.cost import Cost, estimate_cost
from ijepa.planning.hardware import Gpu, Grid, find_country, find_gpu, gpus, grids
from ijepa.planning.memory import USABLE, Memory, plan_memory
from ijepa.planning.size import RecipeSize, measure_recipe
from ijepa.utils.errors import UserError

NODE = 8
"""GPUs of a node; with hsdp they share one copy of the model, unless the recipe sets `parallel.shard`."""


@dataclass(frozen=True)
class GpuPlan:
    """A recipe on one type of GPU.

    Attributes:
        key: Short name of the GPU.
        gpu: Its figures.
        memory: Memory with each strategy.
        chosen: Memory with the recipe's strategy.
        cost: Speed and cost of the run.
    """

    key: str
    gpu: Gpu
    memory: tuple[Memory, ...]
    chosen: Memory
    cost: Cost

    def as_json(self) -> dict[str, Any]:
        """Return every figure as plain values."""
        return {
            "gpu": {"key": self.key, **self.gpu.model_dump()},
            "memory": [asdict(memory) for memory in self.memory],
            "strategy": self.chosen.strategy,
            "cost": asdict(self.cost),
        }


@dataclass(frozen=True)
class Plan:
    """A recipe on given hardware.

    Attributes:
        recipe: The recipe.
        size: Its size.
        devices: Number of GPUs.
        images: Images of the whole run; None if its length is unknown.
        rate_given: Whether the throughput was given; else it follows from a share of peak.
        country: Country of the electricity.
        grid: That electricity.
        asked: The plan for the GPU that was asked for.
        comparison: Plans for every GPU of the table, at the same share of peak.
    """

    recipe: Recipe
    size: RecipeSize
    devices: int
    images: int | None
    rate_given: bool
    country: str
    grid: Grid
    asked: GpuPlan
    comparison: tuple[GpuPlan, ...]

    def as_json(self) -> dict[str, Any]:
        """Return every figure as plain values: bytes, FLOP, seconds, or the unit that the name states."""
        size = self.size
        tokens = {"patches": size.tokens.patches, "context": size.context_tokens, "target_block": size.target_tokens}
        flops = {"plain": size.plain, "full": size.full, "executed": size.executed}
        electricity = {**self.grid.model_dump(), **grids().model_dump(exclude={"countries"})}
        return {
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
            "parameters": asdict(size.parameters),
            "tokens": tokens,
            "flops_per_image": {name: {**asdict(part), "total": part.total} for name, part in flops.items()},
            "images": self.images,
            "steps": size.lengths.total if size.lengths else None,
            "devices": self.devices,
            "rate_given": self.rate_given,
            "usable_memory": USABLE,
            "electricity": {"country": self.country, **electricity},
            "plan": self.asked.as_json(),
            "comparison": [each.as_json() for each in self.comparison],
        }


def make_plan(
    recipe: Recipe,
    *,
    gpu: str = "h100",
    devices: int = 8,
    images_per_second: float | None = None,
    share_of_peak: float = 0.35,
    country: str = "World",
    images: int | None = None,
) -> Plan:
    """Plan a recipe on `devices` GPUs of one type.

    Args:
        recipe: The recipe.
        gpu: Short name in the table of GPUs.
        devices: Number of GPUs.
        images_per_second: Throughput of all GPUs together; if given, the share of peak follows from it.
        share_of_peak: Executed operations / dense bfloat16 peak.
        country: Name in the table of electricity.
        images: Size of the data set; None: the number that the recipe states.

    Raises:
        UserError: Unknown names, a number of GPUs that does not divide the batch, or an impossible throughput.
    """
    found, (place, grid) = find_gpu(gpu), find_country(country)
    _check(recipe, devices, images_per_second, share_of_peak)
    size = measure_recipe(recipe, images)

    def plan_gpu(key: str, rate: float | None, share: float) -> GpuPlan:
        one, group = gpus()[key], _group(recipe, devices)
        memory = plan_memory(recipe, size, devices=devices, group=group, capacity=1e9 * one.memory_gb)
        wanted = "zero2" if recipe.parallel.strategy == "auto" else recipe.parallel.strategy
        chosen = next((each for each in memory if each.strategy == wanted), memory[0])  # one GPU has only `none`
        cost = estimate_cost(recipe, size, one, devices, grid=grid, images_per_second=rate, share_of_peak=share)
        return GpuPlan(key, one, memory, chosen, cost)

    asked = plan_gpu(gpu.lower(), images_per_second, share_of_peak)
    reached = asked.cost.share_of_peak
    if reached > 1:
        raise UserError(
            f"--images-per-second {images_per_second:g}",
            f"is {reached:.1f} times the bfloat16 peak of {devices} x {found.name}",
            "a good rate is about a third of the peak",
        )
    # The other GPUs are compared at the share of peak that this one reaches.
    comparison = tuple(asked if key == asked.key else plan_gpu(key, None, reached) for key in gpus())
    total = size.lengths.total * recipe.batch.total if size.lengths else None
    return Plan(recipe, size, devices, total, images_per_second is not None, place, grid, asked, comparison)


def _check(recipe: Recipe, devices: int, rate: float | None, share: float) -> None:
    batch = recipe.batch.total
    if devices < 1:
        raise UserError(f"--gpus {devices}", "must be 1 or more")
    if batch % devices:
        fits = max(number for number in range(1, devices + 1) if batch % number == 0)
        raise UserError(f"--gpus {devices}", f"does not divide batch.global = {batch}", f"for example, {fits} does")
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"--images-per-second {rate:g}", "must be a number above 0")
    if not 0 < share <= 1:
        raise UserError(f"--share-of-peak {share:g}", "must be above 0 and at most 1", "large models reach 0.3 to 0.55")


def _group(recipe: Recipe, devices: int) -> int:
    """Return the number of GPUs that share one copy of the model with hsdp."""
    shard = recipe.parallel.shard
    if shard == "auto":
        return math.gcd(devices, NODE)
    if devices % shard:
        raise UserError(f"parallel.shard = {shard}", f"does not divide {devices} GPUs", "choose a divisor")
    return shard
