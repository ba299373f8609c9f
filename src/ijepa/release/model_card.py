"""The model card of a release, in the hub's format: a YAML header for machines, then the page.

Every figure comes from the run's own files or from the planning tables, and says so; what nobody has recorded is said
to be unknown. The same run and the same words give the same page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ijepa.checkpoint.run_dir import Run
from ijepa.config.recipe import Recipe
from ijepa.interop.weights import Weights
from ijepa.planning.hardware import Grid, find_country, gpus, grids
from ijepa.planning.size import count_parameters
from ijepa.release.evaluations import data_name, evaluation_section, index_entries, of_release
from ijepa.release.loading import loading_section
from ijepa.release.markup import counted, duration, markdown_table
from ijepa.utils.names import printable

_ANYWHERE = "World"
"""The table's entry for electricity of nobody knows where."""


@dataclass(frozen=True)
class About:
    """What no file of a run says.

    Attributes:
        licence: the hub's name of a licence.
        country: whose electricity the run drew.
        watts: power of one device with its share of the machine, where the table of GPUs does not say.
        dataset: what the data are called; else their path's last part.
    """

    licence: str = "apache-2.0"
    country: str = _ANYWHERE
    watts: float | None = None
    dataset: str | None = None


def card(found: Weights, about: About, *, step: int, total: int, results: Sequence[Path], report: bool) -> str:
    """Return README.md of the release of `found`, a run's checkpoint after `step` of `total` steps.

    Args:
        found: the checkpoint.
        about: what no file of the run says.
        step, total: how far it has come, and the run's length.
        results: files of evaluations, of which those of these weights are shown.
        report: whether the release has a report.
    """
    assert found.run is not None
    run = Run(found.run)
    info, recipe = run.info(), found.recipe
    shown, others = of_release(found, results)
    name = printable(found.run.resolve().name)
    energy = _energy(info, run, about)
    header: dict[str, Any] = {
        "license": about.licence,
        "library_name": "ijepa",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["ijepa", "self-supervised-learning", "vision-transformer"],
        "datasets": [_data(info, about)],
    }
    if energy is not None:
        header["co2_eq_emissions"] = energy.header()
    if entries := [entry for each in shown for entry in index_entries(each)]:
        header["model-index"] = [{"name": name, "results": entries}]
    method = (
        "Pretrained by I-JEPA (Assran et al., arXiv 2301.08243): it predicts, in representation space, what masked "
        "parts of an image mean. No labels were used."
    )
    parts = [
        f"# {name}",
        f"{recipe.description} {method}".strip(),
        _model(recipe),
        _training(recipe, info, run, about, step, total, report),
        "## Energy\n\n" + (energy.text() if energy else _UNKNOWN),
        evaluation_section(shown, others),
        _USE,
        loading_section(recipe.model),
        f"## Licence\n\n{about.licence}. The data have terms of their own.",
    ]
    return "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n\n".join(parts) + "\n"


def _model(recipe: Recipe) -> str:
    model, size = recipe.model, count_parameters(recipe)
    encoder, predictor = model.encoder, model.predictor
    rows = [
        ("architecture", f"Vision Transformer, {encoder.width} wide, {encoder.depth} layers, {encoder.heads} heads"),
        (
            "input",
            f"{model.image_size[0]} x {model.image_size[1]} pixels, patches of {model.patch_size}, no class token",
        ),
        ("parameters of an encoder", f"{size.encoder:,}"),
        ("both encoders", f"{2 * size.encoder:,}"),
        ("predictor", f"{size.predictor:,}; {predictor.width} wide, {predictor.depth} layers"),
        ("file to use", "`target_encoder.safetensors`: the moving average, which the paper evaluates"),
    ]
    return "## Model\n\n" + markdown_table(("", ""), rows)


def _training(recipe: Recipe, info: dict[str, Any], run: Run, about: About, step: int, total: int, report: bool) -> str:
    seconds = _seconds(run)
    images = step * recipe.batch.total
    fingerprint = str(info.get("fingerprint") or (info.get("data") or {}).get("fingerprint", ""))[:16]
    country, _ = find_country(about.country)
    parts = "its encoder" if recipe.init.parts == "encoder" else "all its parts"
    rows = [
        ("data", f"{_data(info, about)}, {info.get('images', 0):,} images (fingerprint `{fingerprint}`)"),
        ("begun from", f"{parts} of {info['init']}" if "init" in info else "random weights"),
        ("augmentation", f"random resized crops of {_range(recipe.data.crop_scale)} of the area, nothing else"),
        ("length", f"{step:,} of {total:,} steps of {recipe.batch.total:,} images: {images:,} images"),
        ("hardware", f"{_hardware(info)}; {counted(int(info.get('ranks', 1)), 'process', 'processes')}"),
        ("country", "not stated" if country == _ANYWHERE else country),
        ("time", f"{duration(seconds)} of training" if seconds else "not recorded"),
        ("throughput", f"{images / seconds:,.0f} images a second" if seconds else "not recorded"),
        ("year", str(info.get("date", "not recorded"))[:4] if info.get("date") else "not recorded"),
        ("precision", f"autocast {recipe.precision.autocast}, float8 {recipe.precision.fp8}"),
        ("optimiser", f"AdamW {recipe.optimizer.betas}, lr {recipe.optimizer.lr_encoder:g} / "
         f"{recipe.optimizer.lr_predictor:g} (encoder / predictor), weight decay {recipe.optimizer.weight_decay:g}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in info.get("versions", {}).items())),
        ("commit", f"`{info.get('commit')}`"),
        ("seed", str(info.get("seed"))),
    ]  # fmt: skip
    curves = "`metrics.jsonl` and `report.html`" if report else "`metrics.jsonl`"
    more = f"Every number is in `recipe.yaml`; the curves are in {curves}."
    if step < total:
        more = f"**The run had not come to its end: step {step:,} of {total:,}.** {more}"
    return "## Training\n\n" + markdown_table(("", ""), rows) + f"\n\n{more}"


@dataclass(frozen=True)
class _Energy:
    """An upper bound: device-hours times watts times the site's factor."""

    hours: float
    watts: float
    source: str
    country: str
    grid: Grid
    hardware: str

    @property
    def kilowatt_hours(self) -> float:
        return self.hours * self.watts * grids().pue / 1e3

    @property
    def grams(self) -> float:
        return self.kilowatt_hours * self.grid.grams

    def text(self) -> str:
        return (
            f"At most {self.kilowatt_hours:,.3g} kWh and {self.grams / 1e3:,.3g} kg of CO2 equivalent: "
            f"{self.hours:,.3g} device-hours at {self.watts:,.0f} W ({self.source}), times {grids().pue} for the site, "
            f"at {self.grid.grams:g} g/kWh ({self.country}, {self.grid.year}). An upper bound, not a measurement."
        )

    def header(self) -> dict[str, Any]:
        """The same as the hub reads it, in grams."""
        return {
            "emissions": float(f"{self.grams:.3g}"),
            "source": f"an upper bound: device-hours at {self.watts:.0f} W ({self.source}), {self.grid.grams:g} g/kWh",
            "training_type": "pre-training",
            "geographical_location": self.country,
            "hardware_used": self.hardware,
        }


def _energy(info: dict[str, Any], run: Run, about: About) -> _Energy | None:
    """Return the estimate, None where nobody knows the hardware's power or the time."""
    hours = _seconds(run) / 3600 * int(info.get("ranks", 1))
    names = " ".join(info.get("devices", [])).lower()
    known = next((gpu for key, gpu in gpus().items() if key in names), None)
    watts = about.watts or (known.server_w if known else None)
    if watts is None or not hours:
        return None
    source = "stated" if about.watts else f"a {known.name if known else ''} server's greatest power over its GPUs"
    return _Energy(hours, watts, source, *find_country(about.country), _hardware(info))


_UNKNOWN = "Not estimated: the table of GPUs does not know this hardware's power; `ijepa archive --watts W` states it."

_USE = """## Intended use and limits

Features of images for classification by a linear layer, retrieval, segmentation by nearest neighbours, and as a start
of further training. The encoder knows what its data showed, with their biases; it was not tested for decisions about
people, and it does not generate images. Features of one release do not compare with those of another."""


def _data(info: dict[str, Any], about: About) -> str:
    return about.dataset or data_name((info.get("data") or {}).get("path"))


def _hardware(info: dict[str, Any]) -> str:
    """Every kind of device once, with its number."""
    names = [str(name) for name in info.get("devices", ["unknown"])]
    return ", ".join(
        name if names.count(name) == 1 else f"{names.count(name)} x {name}" for name in dict.fromkeys(names)
    )


def _seconds(run: Run) -> float:
    file = run.timings_file
    if not file.is_file():
        return 0.0
    return sum(json.loads(line)["seconds"] for line in file.read_text().splitlines() if line.endswith("}"))


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g}-{bounds[1]:g}"
