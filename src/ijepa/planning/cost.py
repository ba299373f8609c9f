"""How long a run takes and what it draws: images a second, days, device-hours, energy, CO2.

Operations are those that are executed. A share of peak is of the dense *bfloat16* peak, under float8 too, so that
figures compare. Power is taken as greatest: the module's for the GPUs alone, the server's for the whole, times what the
site needs beside its computers. Real runs draw less; none of it is a measurement.
"""

from dataclasses import dataclass, replace

from ijepa.planning.hardware import Gpu, Grid

_DAY = 86_400


@dataclass(frozen=True)
class Course:
    """A run's speed and, where its length is known, its cost.

    Attributes:
        images_per_second: by all devices.
        share_of_peak: executed operations over the dense bfloat16 peak.
        tflops_executed, tflops_plain: TFLOP/s of a device: executed, and as the method is written.
        step_seconds: of one step.
        days, device_hours: of the run.
        gpus_mwh: energy at the modules' greatest power, MWh.
        site_mwh: energy at the servers' greatest power, with the site's share, MWh.
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


def course(
    gpu: Gpu,
    devices: int,
    *,
    executed: float,
    plain: float,
    batch: int,
    images: int | None,
    grid: Grid,
    pue: float,
    images_per_second: float | None = None,
    share_of_peak: float = 0.35,
) -> Course:
    """Plan a run's course, at a rate if one is given, else at a share of peak.

    Args:
        gpu: the device.
        devices: how many.
        executed: operations an image and step that are executed.
        plain: the same as the method is written.
        batch: images a step.
        images: images of the whole run, None where unknown.
        grid: the electricity.
        pue: a site's power over its computers'.
        images_per_second: by all devices.
        share_of_peak: of the dense bfloat16 peak.
    """
    peak = 1e12 * gpu.bf16_tflops * devices
    rate = images_per_second or share_of_peak * peak / executed
    speed = Course(
        images_per_second=rate,
        share_of_peak=rate * executed / peak,
        tflops_executed=rate * executed / devices / 1e12,
        tflops_plain=rate * plain / devices / 1e12,
        step_seconds=batch / rate,
    )
    if images is None:
        return speed
    days = images / rate / _DAY
    hours = 24 * days * devices
    site = hours * gpu.server_w * pue / 1e6
    return replace(
        speed,
        days=days,
        device_hours=hours,
        gpus_mwh=hours * gpu.tdp_w / 1e6,
        site_mwh=site,
        tonnes=site * grid.grams / 1e3,
    )
