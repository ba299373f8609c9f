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

from ijepa.evaluation.comparison import FIGURES, read_result
from ijepa.interop.weights import Weights
from ijepa.planning.hardware import find_country, gpus, grids
from ijepa.planning.size import plan
from ijepa.recipe import Recipe
from ijepa.training.run import Run


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
    country: str = "World"
    watts: float | None = None
    dataset: str | None = None


def card(found: Weights, about: About, *, step: int, total: int, results: Sequence[Path]) -> str:
    """Return README.md of the release of `found`, a run's checkpoint after `step` of `total` steps."""
    assert found.run is not None
    run = Run(found.run)
    info, recipe = run.info(), found.recipe
    evaluations = [read_result(file) for file in results]
    name = found.run.resolve().name
    header = {
        "license": about.licence,
        "library_name": "ijepa",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["ijepa", "self-supervised-learning", "vision-transformer"],
        "model-index": [{"name": name, "results": [entry for each in evaluations for entry in _entries(each)]}],
    }
    if not header["model-index"][0]["results"]:  # type: ignore[index]
        del header["model-index"]
    parts = [
        f"# {name}",
        f"{recipe.description} Pretrained by I-JEPA (Assran et al., arXiv 2301.08243): it predicts, in representation "
        "space, what masked parts of an image mean. No labels were used.",
        _model(recipe),
        _training(recipe, info, run, about, step, total),
        _energy(info, run, about),
        _evaluations(evaluations),
        _USE,
        _loading(name),
        f"## Licence\n\n{about.licence}. The data have terms of their own.",
    ]
    return "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n\n".join(parts) + "\n"


def _model(recipe: Recipe) -> str:
    model, size = recipe.model, plan(recipe, 1).parameters
    encoder, predictor = model.encoder, model.predictor
    rows = [
        ("architecture", f"Vision Transformer, {encoder.width} wide, {encoder.depth} layers, {encoder.heads} heads"),
        ("input", f"{model.image_hw[0]} x {model.image_hw[1]} pixels, patches of {model.patch_size}, no class token"),
        ("parameters of an encoder", f"{size.encoder:,}"),
        ("both encoders", f"{2 * size.encoder:,}"),
        ("predictor", f"{size.predictor:,}; {predictor.width} wide, {predictor.depth} layers"),
        ("file to use", "`target_encoder.safetensors`: the moving average, which the paper evaluates"),
    ]
    return "## Model\n\n" + _table(("", ""), rows)


def _training(recipe: Recipe, info: dict[str, Any], run: Run, about: About, step: int, total: int) -> str:
    seconds = _seconds(run)
    images = step * recipe.batch.total
    data = info.get("data") or {}
    shown = about.dataset or Path(str(data.get("path", "unknown"))).name
    rows = [
        ("data", f"{shown}, {info.get('images', 0):,} images (fingerprint `{str(data.get('fingerprint', ''))[:16]}`)"),
        ("augmentation", f"random resized crops of {_range(recipe.data.crop_scale)} of the area, nothing else"),
        ("length", f"{step:,} of {total:,} steps of {recipe.batch.total:,} images: {images:,} images"),
        ("hardware", f"{', '.join(info.get('devices', ['unknown']))}; {info.get('ranks', 1)} processes"),
        ("time", f"{seconds / 3600:.2f} hours of training" if seconds else "not recorded"),
        ("throughput", f"{images / seconds:,.0f} images a second" if seconds else "not recorded"),
        ("year", str(info.get("date", "not recorded"))[:4] if info.get("date") else "not recorded"),
        ("precision", f"autocast {recipe.precision.autocast}, float8 {recipe.precision.fp8}"),
        ("optimiser", f"AdamW {recipe.optimizer.betas}, lr {recipe.optimizer.lr_encoder:g} / "
         f"{recipe.optimizer.lr_predictor:g} (encoder / predictor), weight decay {recipe.optimizer.weight_decay:g}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in info.get("versions", {}).items())),
        ("commit", f"`{info.get('commit')}`"),
        ("seed", str(info.get("seed"))),
    ]  # fmt: skip
    more = "Every number is in `recipe.yaml`; the curves are in `metrics.jsonl` and `report.html`."
    if step < total:
        more = f"**The run had not come to its end: step {step:,} of {total:,}.** {more}"
    return "## Training\n\n" + _table(("", ""), rows) + f"\n\n{more}"


def _energy(info: dict[str, Any], run: Run, about: About) -> str:
    hours = _seconds(run) / 3600 * int(info.get("ranks", 1))
    names = " ".join(info.get("devices", [])).lower()
    known = next((gpu for key, gpu in gpus().items() if key in names), None)
    watts = about.watts or (known.server_w if known else None)
    if watts is None or not hours:
        text = (
            "Not estimated: the table of GPUs does not know this hardware's power; `ijepa archive --watts W` states it."
        )
        return f"## Energy\n\n{text}"
    country, grid = find_country(about.country)
    energy = hours * watts * grids().pue / 1e3
    source = "stated" if about.watts else f"a {known.name if known else ''} server's greatest power over its GPUs"
    return (
        "## Energy\n\n"
        f"At most {energy:,.3g} kWh and {energy * grid.grams / 1e3:,.3g} kg of CO2 equivalent: {hours:,.2f} "
        f"device-hours at {watts:,.0f} W ({source}), times {grids().pue} for the site, at {grid.grams:g} g/kWh "
        f"({country}, {grid.year}). An upper bound, not a measurement."
    )


def _evaluations(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return "## Evaluation\n\nNone was made of this run."
    tables = []
    for result in evaluations:
        figures = [key for key in FIGURES if any(isinstance(row.get(key), float) for row in result["rows"])]
        rows = [
            (row["encoder"], *(f"{100 * row[key]:.2f}" if isinstance(row.get(key), float) else "-" for key in figures))
            for row in result["rows"]
        ]
        level = "" if result.get("level") is None else f", level {result['level']}"
        test = result["data"].get("test", {})
        title = (
            f"**{result['kind']}, protocol `{result['protocol']['name']}`{level}**, {test.get('n')} test images, in %"
        )
        notes = "".join(f"\n\n{note}" for note in result.get("notes", []))
        tables.append(f"{title}\n\n{_table(('encoder', *(FIGURES[key] for key in figures)), rows)}{notes}")
    said = "A table is one protocol; numbers of different protocols do not compare."
    return f"## Evaluation\n\n{said}\n\n" + "\n\n".join(tables)


_USE = """## Intended use and limits

Features of images for classification by a linear layer, retrieval, segmentation by nearest neighbours, and as a start
of further training. The encoder knows what its data showed, with their biases; it was not tested for decisions about
people, and it does not generate images. Features of one release do not compare with those of another."""


def _loading(name: str) -> str:
    return f"""## How to load it

```python
import ijepa

encoder = ijepa.load_encoder("{name}")  # (B, 3, H, W) bytes -> (B, N, D)
```

For other libraries, `ijepa export {name} OUT --format transformers` (or `timm`, `official`, `onnx`), then

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("OUT", add_pooling_layer=False)
```

```python
import timm

model = timm.create_model("local-dir:OUT", pretrained=True)
```"""


def _entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the hub's index reads of a result: the trained encoder's figures alone."""
    row = result["rows"][0]
    test = result["data"].get("test", {})
    metrics = [
        {"type": "accuracy" if key == "top1" else key, "name": f"{FIGURES[key]} (%)", "value": round(100 * row[key], 2)}
        for key in FIGURES
        if isinstance(row.get(key), float)
    ]
    task = "image-segmentation" if result["kind"] == "segmentation" else "image-classification"
    where = Path(str(test.get("path") or "unknown")).name
    named = {"type": task, "name": f"{result['kind']}, protocol {result['protocol']['name']}"}
    return [{"task": named, "dataset": {"type": where, "name": where}, "metrics": metrics}]


def _seconds(run: Run) -> float:
    file = run.timings_file
    if not file.is_file():
        return 0.0
    return sum(json.loads(line)["seconds"] for line in file.read_text().splitlines() if line.endswith("}"))


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g}-{bounds[1]:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
