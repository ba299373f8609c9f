"""Time, energy and CO2 of a run: images per second, days, GPU-hours, MWh.

The share of peak is the model FLOPs utilization of PaLM (arXiv 2204.02311, appendix B), counted in the operations that
the method executes: what activation checkpointing computes again is not in it. The peak is the dense *bfloat16* peak,
also with float8, so that figures compare. Power is the maximum: of the modules for the GPUs alone, of the servers
times PUE for the data center. Real runs use less; these figures are not measurements.
"""

from dataclasses import dataclass, replace

from ijepa.config.recipe import Recipe
from ijepa.planning.hardware import Gpu, Grid, grids
from ijepa.planning.size import RecipeSize

_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Cost:
    """The speed of a run and, if its length is known, its cost.

    Attributes:
        images_per_second: Throughput of all devices together.
        share_of_peak: Executed operations / dense bfloat16 peak.
        tflops_executed: Executed operations of one device, TFLOP/s.
        tflops_plain: The same, counted as the method is written.
        step_seconds: Time of one step.
        days: Time of the run.
        device_hours: Time of the run times devices.
        gpus_mwh: Energy of the modules at maximum power, MWh.
        site_mwh: Energy of the servers at maximum power times PUE, MWh.
        tonnes: CO2 equivalent of `site_mwh`, t.
    """

    images_per_second: float
    share_of_peak: float
    tflops_executed: float
    tflops_plain: float
    step_seconds: float
    days: float | None = None
    device_hours: float | None = None
    gpus_mwh: float | None = None
    site_mwh: float | None = None
    tonnes: float | None = None


def estimate_cost(
    recipe: Recipe,
    size: RecipeSize,
    gpu: Gpu,
    devices: int,
    *,
    grid: Grid,
    images_per_second: float | None = None,
    share_of_peak: float = 0.35,
) -> Cost:
    """Estimate the cost of a run, from its throughput if that is given, else from the share of peak.

    Args:
        recipe: The recipe.
        size: Its size.
        gpu: Type of the devices.
        devices: Number of devices.
        grid: The electricity.
        images_per_second: Throughput of all devices together.
        share_of_peak: Share of the dense bfloat16 peak.
    """
    executed, plain = size.executed.total, size.plain.total
    peak = 1e12 * gpu.bf16_tflops * devices
    rate = images_per_second or share_of_peak * peak / executed
    speed = Cost(
        images_per_second=rate,
        share_of_peak=rate * executed / peak,
        tflops_executed=rate * executed / devices / 1e12,
        tflops_plain=rate * plain / devices / 1e12,
        step_seconds=recipe.batch.total / rate,
    )
    if size.lengths is None:
        return speed
    days = size.lengths.total * speed.step_seconds / _SECONDS_PER_DAY
    device_hours = 24 * days * devices
    site_mwh = device_hours * gpu.server_w * grids().pue / 1e6
    return replace(
        speed,
        days=days,
        device_hours=device_hours,
        gpus_mwh=device_hours * gpu.tdp_w / 1e6,
        site_mwh=site_mwh,
        tonnes=site_mwh * grid.grams / 1e3,  # MWh x g/kWh = kg
    )
