"""The hardware and the electricity that a plan knows: small tables beside this file, each figure with its source."""

from functools import lru_cache
from importlib import resources
from typing import Any

import yaml
from pydantic import Field

from ijepa.utils.config import BaseConfig
from ijepa.utils.errors import UserError, did_you_mean


class Gpu(BaseConfig):
    """One kind of GPU; what each figure means stands in gpus.yaml."""

    name: str
    """The vendor's name."""
    bf16_tflops: float = Field(gt=0)
    """Dense bfloat16 peak, TFLOP/s."""
    fp8_tflops: float | None = Field(gt=0)
    """Dense float8 peak, TFLOP/s; None without."""
    memory_gb: float = Field(gt=0)
    """Device memory, 10^9 bytes."""
    bandwidth_gbs: float = Field(gt=0)
    """Device memory's bandwidth, 10^9 bytes/s."""
    tdp_w: float = Field(gt=0)
    """Greatest power of the module, watts."""
    server_w: float = Field(gt=0)
    """Greatest power of the vendor's server over its GPUs, watts; the module's own is in it."""
    source: str
    """Where the figures are from."""


class Grid(BaseConfig):
    """A country's electricity."""

    grams: float = Field(ge=0)
    """g CO2 equivalent per kWh generated."""
    year: int
    """Of which the figure is the mean."""


class Grids(BaseConfig):
    """All countries' electricity, and what a site needs beside its computers."""

    source: str
    """Where the countries' figures are from."""
    pue: float = Field(ge=1)
    """Power of a site over the power of its computers."""
    pue_source: str
    """Where that figure is from."""
    countries: dict[str, Grid]
    """By English name."""


@lru_cache(maxsize=1)
def gpus() -> dict[str, Gpu]:
    """Return every GPU of the table by its short name."""
    return {name: Gpu.read(values, f"gpus.yaml: {name}") for name, values in _read("gpus.yaml").items()}


@lru_cache(maxsize=1)
def grids() -> Grids:
    """Return the table of electricity."""
    return Grids.read(_read("grids.yaml"), "grids.yaml")


def find_gpu(name: str) -> Gpu:
    """Return the GPU called `name`, in any case.

    Raises:
        UserError: when the table has none of that name.
    """
    found = gpus().get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}", "not in the table of GPUs", did_you_mean(name.lower(), gpus()))
    return found


def find_country(name: str) -> tuple[str, Grid]:
    """Return a country's name as the table writes it, and its electricity; `name` in any case.

    Raises:
        UserError: when the table has none of that name.
    """
    known = {country.lower(): country for country in grids().countries}
    wanted = " ".join(name.lower().split())
    if wanted not in known:
        hint = did_you_mean(wanted, known)
        for lower, country in known.items():
            hint = hint.replace(f"did you mean {lower}?", f"did you mean {country}?")
        if hint.startswith("known"):
            hint = "known: " + ", ".join(grids().countries)
        raise UserError(f"--country {name}", "not in the table of countries", hint)
    return known[wanted], grids().countries[known[wanted]]


def _read(file: str) -> dict[str, Any]:
    return yaml.safe_load((resources.files("ijepa") / "planning" / file).read_text())
