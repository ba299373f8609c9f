"""The GPUs and electricity grids that a plan knows: two small tables, with the source of each figure."""

from functools import lru_cache
from importlib import resources
from typing import Any

import yaml
from pydantic import Field

from ijepa.utils.config import BaseConfig
from ijepa.utils.errors import UserError, did_you_mean


class Gpu(BaseConfig):
    """One type of GPU, from gpus.yaml."""

    name: str
    """The vendor's name."""
    bf16_tflops: float = Field(gt=0)
    """Dense bfloat16 peak, TFLOP/s."""
    fp8_tflops: float | None = Field(gt=0)
    """Dense float8 peak, TFLOP/s; None if the GPU has no float8."""
    memory_gb: float = Field(gt=0)
    """Device memory, 10^9 bytes."""
    tdp_w: float = Field(gt=0)
    """Maximum power of the module, watts."""
    server_w: float = Field(gt=0)
    """Maximum power of the vendor's server divided by its GPUs, watts; includes the module's own power."""
    source: str
    """Source of the figures."""


class Grid(BaseConfig):
    """The electricity of a country."""

    grams: float = Field(ge=0)
    """g CO2 equivalent per kWh generated."""
    year: int
    """The year that the figure averages."""


class Grids(BaseConfig):
    """The electricity of all countries, and the overhead of a data center, from grids.yaml."""

    source: str
    """Source of the countries' figures."""
    pue: float = Field(ge=1)
    """Power usage effectiveness: power of a data center / power of its computers."""
    pue_source: str
    """Source of that figure."""
    countries: dict[str, Grid]
    """Grids by English name, each word with a capital letter."""


@lru_cache(maxsize=1)
def gpus() -> dict[str, Gpu]:
    """Return every GPU of the table by its short name."""
    return {name: Gpu.read(values, f"gpus.yaml: {name}") for name, values in _read("gpus.yaml").items()}


@lru_cache(maxsize=1)
def grids() -> Grids:
    """Return the table of electricity."""
    return Grids.read(_read("grids.yaml"), "grids.yaml")


def find_gpu(name: str) -> Gpu:
    """Return the GPU with this short name, in any case.

    Raises:
        UserError: The table has no such GPU.
    """
    found = gpus().get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}", "not in the table of GPUs", did_you_mean(name.lower(), gpus()))
    return found


def find_country(name: str) -> tuple[str, Grid]:
    """Return a country's name as the table writes it, and its electricity; `name` may be in any case.

    Raises:
        UserError: The table has no such country.
    """
    countries = grids().countries
    wanted = " ".join(name.split()).title()
    if wanted not in countries:
        raise UserError(f"--country {name}", "not in the table of countries", did_you_mean(wanted, countries))
    return wanted, countries[wanted]


def _read(file: str) -> dict[str, Any]:
    return yaml.safe_load((resources.files("ijepa") / "planning" / file).read_text())
