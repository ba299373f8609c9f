"""The model card of a release in the format of the Hugging Face Hub: a YAML header for machines, then Markdown.

All numbers come from the files of the run or from the tables of `planning`. What is not recorded is stated as unknown.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ijepa.checkpoint.run_dir import Run
from ijepa.interop.weights import Weights
from ijepa.model.ijepa import IMAGENET_MEAN, IMAGENET_STD
from ijepa.planning.hardware import Grid, find_country, gpus, grids
from ijepa.planning.size import count_parameters
from ijepa.release.evaluations import data_name, released_results
from ijepa.report.run_data import read_columns
from ijepa.utils.names import printable
from ijepa.utils.progress import duration


@dataclass(frozen=True)
class About:
    """Facts that no file of a run has.

    Attributes:
        license: identifier of the license on the hub.
        country: where the electricity of the run was generated; World if unknown.
        watts: power of one device and its share of the machine; from the table of GPUs if None.
        dataset: name of the data set; the last part of its path if None.
    """

    license: str = "apache-2.0"
    country: str = "World"
    watts: float | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Energy:
    """An upper bound of energy and emissions: device-hours x watts x factor of the site x grams per kWh."""

    hours: float
    watts: float
    source: str
    grid: Grid
    pue: float

    @property
    def kilowatt_hours(self) -> float:
        """Energy of the site."""
        return self.hours * self.watts * self.pue / 1e3

    @property
    def grams(self) -> float:
        """CO2 equivalent."""
        return self.kilowatt_hours * self.grid.grams


def model_card(
    found: Weights, about: About, *, step: int, total: int, results: Sequence[Path], has_report: bool
) -> str:
    """Return the README.md of a release.

    Args:
        found: the checkpoint of a run.
        about: facts that no file of the run has.
        step: steps of the checkpoint.
        total: steps of the complete run.
        results: files of evaluations; the card has those of these weights.
        has_report: whether the release has a report.
    """
    assert found.run is not None
    run = Run(found.run)
    info, recipe = run.info(), found.recipe
    name = printable(found.run.resolve().name)
    data_set = about.dataset or data_name((info.get("data") or {}).get("path"))
    seconds = float(np.nansum(read_columns(run.timings_file).get("seconds", 0.0)))
    processes, hardware = int(info.get("ranks", 1)), _hardware(info)
    country, grid = find_country(about.country)
    energy = estimate_energy(info, seconds / 3600 * processes, about.watts, grid)
    released, others = released_results(found, results)
    header: dict[str, Any] = {
        "license": about.license,
        "library_name": "ijepa",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["ijepa", "self-supervised-learning", "vision-transformer"],
        "datasets": [data_set],
    }
    if energy is not None:
        source = f"an upper bound: device-hours at {energy.watts:.0f} W ({energy.source}), {grid.grams:g} g/kWh"
        header["co2_eq_emissions"] = {
            "emissions": float(f"{energy.grams:.3g}"),
            "source": source,
            "training_type": "pre-training",
            "geographical_location": country,
            "hardware_used": hardware,
        }
    if entries := [entry for each in released for entry in each.index_entries()]:
        header["model-index"] = [{"name": name, "results": entries}]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.loader, environment.undefined = PackageLoader("ijepa.release"), StrictUndefined
    environment.filters["integer"] = "{:,}".format
    return environment.get_template("README.md.j2").render(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        name=name,
        recipe=recipe,
        size=count_parameters(recipe),
        info=info,
        about=about,
        data=data_set,
        step=step,
        total=total,
        seconds=seconds,
        duration=duration,
        hardware=hardware,
        processes=processes,
        country=country,
        energy=energy,
        results=released,
        others=others,
        has_report=has_report,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def estimate_energy(info: dict[str, Any], hours: float, stated_watts: float | None, grid: Grid) -> Energy | None:
    """Return the estimate, or None if the power of the hardware or the time is unknown."""
    devices = " ".join(info.get("devices", [])).lower()
    gpu = next((gpu for key, gpu in gpus().items() if key in devices), None)
    watts = stated_watts or (gpu.server_w if gpu else None)
    if watts is None or not hours:
        return None
    source = "stated" if stated_watts or gpu is None else f"maximum power of a {gpu.name} server, per GPU"
    return Energy(hours, watts, source, grid, grids().pue)


def _hardware(info: dict[str, Any]) -> str:
    """Return the names of the devices, each with its number."""
    counts = Counter(map(str, info.get("devices", ["unknown"])))
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
