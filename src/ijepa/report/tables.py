"""The page's sections of numbers and words: the headline, the evaluations, the recipe and the run's facts.

Every number here stands in a file of the run; none is computed but sums of seconds and percentages of shares.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import yaml

from ijepa.report.drawing import COLORS, INK, RULE, SOFT, draw
from ijepa.report.markup import Gap, Part, Section, details, facts, figure, number, percent, scrolling, table
from ijepa.report.run_data import MAIN, Record, Result
from ijepa.utils.progress import duration

_SHARES = {
    "top1": "top-1",
    "top5": "top-5",
    "held_out": "top-1, held out",
    "miou": "mIoU",
    "miou_absent_zero": "mIoU, absent = 0",
    "miou_overclustered": "mIoU, overclustered",
    "miou_held_out": "mIoU, held out",
    "pixel_accuracy": "pixel accuracy",
    "corloc": "CorLoc",
    "jf": "J&F",
    "j": "J",
    "f": "F",
    "j_recall": "J, recall",
    "f_recall": "F, recall",
    "iou_images": "foreground IoU, mean of images",
}
"""Keys of rows that are shares, by what a table calls them."""

_CHANCE = {
    "linear": ("the commonest class", "the share of the commonest class"),
    "knn": ("the commonest class", "the share of the commonest class"),
    "segmentation": ("one class everywhere", "the mIoU of giving every pixel the commonest class"),
    "propagation": ("first mask left in place", "J&F of the first mask left in place"),
}
"""What chance is in each kind of evaluation, in a table's few words and in a sentence's."""

_DRAWN = {"propagation": "videos"}
"""What a kind's sets are made of and its intervals draw, where these are no images."""

_LONGEST = 28
"""Letters of a class's name that a plot has room for."""

_LEVELS = {
    0: "Level 0: labels only score",
    1: "Level 1: a labelled support set is looked up, nothing is trained",
    2: "Level 2: a linear layer is trained on a labelled set",
}
_ENCODERS = {
    "trained": "the run's target encoder",
    "random": "the same encoder as it was initialised",
    "pixels": "raw pixels, no encoder",
}


def headline(record: Record) -> str:
    """Return the page's head: name, description, and the run in a few facts."""
    recipe, metrics, info = record.recipe, record.metrics, record.info or {}
    pairs = []
    if metrics:
        step = int(metrics["step"][-1])
        pairs += [("steps", number(step)), ("images seen", number(step * recipe.batch.total))]
    if "images" in info:
        pairs.append(("images in the data", number(info["images"])))
    pairs += [(f"{name} at the end", number(float(metrics[name][-1]))) for name in ("loss", "skill") if name in metrics]
    if "seconds" in record.timings:
        pairs.append(("training time", duration(float(np.nansum(record.timings["seconds"])))))
    model = recipe.model
    shape = (
        f"ViT {model.encoder.width} × {model.encoder.depth}, {model.patch_size} px patches of "
        f"{model.image_size[1]} × {model.image_size[0]} px"
    )
    pairs += [("encoder", shape), ("batch", number(recipe.batch.total)), ("seed", str(recipe.seed))]
    described = f'<p class="lede">{escape(recipe.description)}</p>' if recipe.description else ""
    return f"<h1>{escape(recipe.name)}</h1>\n{described}\n{facts(pairs, kind='tiles')}"


def glance_section(record: Record) -> Part:
    """Return the figure that stands for each evaluation, a row an encoder."""
    title, results = "How good is it?", [result for result in record.results if result.kind in MAIN]
    if not results:
        return Gap("glance", title, "the run has no evaluations", _evaluate(record))
    names = list(dict.fromkeys(row["encoder"] for result in results for row in result.rows))
    keys = [MAIN[result.kind] for result in results]
    best = [max(row[key] for row in result.rows) for result, key in zip(results, keys, strict=True)]
    rows = []
    for name in names:
        cells = [f"{escape(name)}{_note(name, results)}"]
        for result, key, most in zip(results, keys, best, strict=True):
            row = result.row(name)
            shown = "–" if row is None else percent(row[key])
            cells.append(f"<strong>{shown}</strong>" if row is not None and row[key] == most else shown)
        rows.append(cells)
    if any("chance" in result.values for result in results):
        rows.append(["chance<small>an answer that sees nothing</small>", *map(_chance, results)])
    head = ["encoder"]
    for result, key in zip(results, keys, strict=True):
        kind, _, protocol = result.title.partition(", ")
        head.append(f"{escape(kind)}<small>{escape(protocol)}</small><small>{escape(_SHARES[key])}, %</small>")
    caption = (
        "One figure for each evaluation, in per cent; the best of each column is bold. Only a trained encoder that "
        "beats both the initial encoder and raw pixels has learned something of use. Protocols decide such numbers: "
        "compare "
        'down a column, not across. <a href="#evaluations">All figures</a>.'
    )
    return Section("glance", title, figure(scrolling(table(head, rows), title), caption))


def evaluation_section(record: Record) -> Part:
    """Return everything that the evaluations measured."""
    title = "Evaluations"
    if not record.results:
        return Gap("evaluations", title, "the run has no evaluations", _evaluate(record))
    return Section("evaluations", title, "\n".join(_result(result) for result in record.results))


def recipe_section(record: Record) -> Section:
    """Return the resolved recipe, and what the run noted about itself."""
    text = escape(record.run.recipe_file.read_text(encoding="utf-8"))
    body = [details("Every number of the run (recipe.yaml)", f"<pre>{text}</pre>")]
    if record.info is None:
        gap = Gap("run", "Facts of the run", "there is no run.json", f"ijepa pretrain {record.recipe.name}")
        body.append(gap.html())
    else:
        info = dict(record.info)
        command = " ".join(map(str, info.pop("command", [])))
        body.append("<h3>What the run noted (run.json)</h3>")
        body += [f'<pre class="command">{escape(command)}</pre>'] if command else []
        body.append(facts(_flat(info)))
    return Section("recipe", "Recipe and run", "\n".join(body))


def _result(result: Result) -> str:
    """Return one evaluation: table, protocol, data, and bars by class where there are some."""
    values, rows = result.values, result.rows
    parts = [f"<h3>{escape(result.title)}</h3>"]
    protocol = dict(values.get("protocol", {}))
    if protocol.get("description"):
        parts.append(f"<p>{escape(str(protocol['description']))}</p>")
    if rows:
        parts.append(figure(scrolling(_rows(rows), result.title), escape(_told(result))))
    else:
        parts.append(facts((key, number(value)) for key, value in values["numbers"].items()))
        parts.append(f"<p>{escape(str(values.get('verdict', '')))}</p>")
    if any(row.get("per_class") for row in rows):
        caption = (
            f"IoU by class: bars are the {escape(rows[0]['encoder'])} encoder, marks the others. A class that is "
            "neither in the truth nor in the prediction has none."
        )
        parts.append(figure(class_bars(result), caption, kind="bars"))
    if protocol:
        text = yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True)
        parts.append(details(f"Protocol {result.protocol}, every setting", f"<pre>{escape(text)}</pre>"))
    return "\n".join(parts)


def _rows(rows: list[dict[str, Any]]) -> str:
    """Return the table of one evaluation: shares in per cent with two digits, other numbers as they are."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float)))
    body = []
    for row in rows:
        cells = [escape(row["encoder"])]
        for key in keys:
            cell = "–" if key not in row else percent(row[key], 2) if key in _SHARES else number(row[key])
            if key in MAIN.values() and "ci" in row:
                cell += f"<small>{percent(row['ci'][0])} to {percent(row['ci'][1])}</small>"
            cells.append(cell)
        body.append([*cells, escape(_settings(row))])
    return table(["encoder", *(escape(_SHARES.get(key, key)) for key in keys), "chosen"], body, kind="worded")


def _settings(row: Mapping[str, Any]) -> str:
    """Return what a row holds besides its figures: chosen settings, and accuracies by k."""
    told = []
    for key, value in row.items():
        if key in ("encoder", "ci", "corloc_ci", "iou_images_ci", "per_class", "seeds") or isinstance(value, float):
            continue
        if key == "top1_by_k":
            told.append("top-1 by k " + ", ".join(f"{k}: {percent(share)}" for k, share in value.items()))
        elif isinstance(value, Mapping):
            told.append(", ".join(f"{_words(name)} {_value(part)}" for name, part in value.items()))
        else:
            told.append(f"{_words(key)} {_value(value)}")
    return "; ".join(told)


def _chance(result: Result) -> str:
    """Return the cell of an evaluation's chance, which says what answer reaches it."""
    chance = result.values.get("chance")
    return "–" if chance is None else f"{percent(chance)}<small>{escape(_CHANCE[result.kind][0])}</small>"


def _told(result: Result) -> str:
    """Return what one has to know to read the table, in sentences."""
    values, data = result.values, result.values.get("data", {})
    told, drawn = ["In per cent."], _DRAWN.get(result.kind, "images")
    if values.get("level") is not None:
        told.append(f"{_LEVELS.get(values['level'], 'Level ' + str(values['level']))}.")
    if any("ci" in row for row in result.rows):
        told.append(f"Below {_SHARES[MAIN[result.kind]]} its 95 % interval over test {drawn}.")
    if values.get("chance") is not None:
        told.append(f"Chance, {_CHANCE[result.kind][1]}: {percent(values['chance'])}.")
    sets = [
        f"{role} {number(data[role]['n'])} {drawn}" + (f" ({data[role]['path']})" if data[role].get("path") else "")
        for role in ("train", "test")
        if isinstance(data.get(role), Mapping) and data[role].get("n")
    ]
    told += [f"Data: {', '.join(sets)}."] if sets else []
    weights = values.get("weights") or {}
    told += [f"Weights: {', '.join(f'{name} is {label}' for name, label in weights.items())}."] if weights else []
    told += [f"{note[:1].upper()}{note[1:]}." for note in values.get("notes", [])]
    versions = values.get("versions") or {}
    told += [f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."] if versions else []
    return " ".join(told)


def class_bars(result: Result) -> str:
    """Return the IoU of every class as a plot: a bar for the first encoder, a mark for each of the others."""
    names = result.values["data"].get("classes") or []
    rows = [row for row in result.rows if row.get("per_class")]
    there = [i for i in range(len(rows[0]["per_class"])) if any(row["per_class"][i] is not None for row in rows)]
    place = np.arange(len(there))[::-1]
    shares = np.array([[np.nan if row["per_class"][i] is None else row["per_class"][i] for i in there] for row in rows])
    labels = [str(names[i]) if i < len(names) else str(i) for i in there]
    labels = [label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…" for label in labels]

    def paint(axes: Any) -> None:
        bars = axes.barh(place, np.nan_to_num(shares[0]), height=0.62, color=COLORS[0])
        handles = [bars]
        for values, mark, color in zip(shares[1:], "oDs^v", (*COLORS[1:], INK, SOFT), strict=False):
            handles += axes.plot(values, place, mark, color=color, markersize=4)
        axes.set_yticks(place, labels)
        axes.set_ylim(-0.7, len(there) - 0.3)
        axes.set_xlim(0, max(1e-3, 1.05 * float(np.nanmax(shares))))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        legend = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 5, "frameon": False, "borderaxespad": 0.2}
        axes.legend(handles, [row["encoder"] for row in rows], **legend, handlelength=1.2, columnspacing=1.4)

    told = ", ".join(f"{name} {number(round(100 * share, 1))}" for name, share in zip(labels, shares[0], strict=True))
    height = 0.55 + 0.19 * len(there)
    top = 1 - 0.27 / height
    words = f"IoU in per cent by class, {rows[0]['encoder']} encoder: {told}"
    return draw(paint, (5.2, height), (0.04 + 0.0125 * max(map(len, labels)), 0.26 / height, 0.975, top), words)


def _evaluate(record: Record) -> str:
    return f"ijepa evaluate linear {record.run.folder} --train PATH --test PATH"


def _note(name: str, results: Sequence[Result] = ()) -> str:
    """Return what an encoder is: in words of ours, or else what weights the results say it has."""
    labels = (result.values.get("weights", {}).get(name) for result in results)
    told = _ENCODERS.get(name) or escape(next(filter(None, labels), ""))
    return f"<small>{told}</small>" if told else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested facts as dotted names and values, as HTML."""
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat.append((prefix + key, escape(", ".join(map(str, value)))))
        else:
            flat.append((prefix + key, escape("none" if value is None else _value(value))))
    return flat


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
