"""RUN/report.html: what a run learned, on one page that needs no network and no other file.

Numbers come from the run's files alone, pictures from its latest weights and its data. What is missing is left out,
and a line says which command would fill it.
"""

import html
import json
from pathlib import Path
from typing import Any

from ijepa.data.sources import Source, open_source
from ijepa.errors import Refused
from ijepa.evaluation.features import Encoder
from ijepa.files import write_text
from ijepa.interop.weights import load_encoder
from ijepa.model.encoder import Encoder as FrozenEncoder
from ijepa.recipe import Recipe
from ijepa.report import pictures
from ijepa.report.curves import draw, training_panels
from ijepa.report.pictures import Picture
from ijepa.training.checkpoint import list_checkpoints
from ijepa.training.run import Run

MAIN = {"linear": ("linear probe", "top1"), "knn": ("kNN", "top1"), "segmentation": ("segmentation", "miou")}


def write_report(folder: Path, *, data: str | None = None) -> Path:
    """Write a run's page and return its path.

    Args:
        folder: the run.
        data: images for the pictures, if not those that its evaluations or its recipe name.

    Raises:
        Refused: where the folder holds no run, or matplotlib is missing.
    """
    run = Run(folder)
    if not run.recipe_file.is_file() or not run.metrics_file.is_file():
        raise Refused(folder, "holds no run with metrics", "give a folder that `ijepa pretrain` wrote")
    recipe, info = run.recipe(), run.info()
    metrics, timings = _lines(run.metrics_file), _lines(run.timings_file)
    results = [json.loads(file.read_text()) for file in sorted(run.evaluations.glob("*.json"))]
    curves = draw(training_panels(metrics, timings, _lines(run.diagnostics_file)))
    shown, hints = _pictures(run, recipe, results, data)
    if not results:
        hints.append(
            f"No evaluations yet: <code>ijepa evaluate linear {html.escape(str(folder))} --train ... --test ...</code>"
        )
    sections = [
        _headline(recipe, info, metrics),
        _overview(results),
        _section("Curves", f"<figure>{curves}<figcaption>{_CURVES}</figcaption></figure>"),
        *(_section(p.title, _figure(p)) for p in shown),
        *(_result(result) for result in results),
        "".join(f'<p class="hint">{hint}</p>' for hint in hints),
        _section("Recipe", _details("every number of the run", recipe.dump())),
        _section("Run", _details("command, versions, devices", json.dumps(info, indent=1))),
    ]
    page = folder / "report.html"
    write_text(page, _PAGE.format(title=html.escape(recipe.name), style=_STYLE, body="\n".join(filter(None, sections))))
    return page


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _pictures(
    run: Run, recipe: Recipe, results: list[dict[str, Any]], data: str | None
) -> tuple[list[Picture], list[str]]:
    """Return the pictures that can be made, and why others cannot."""
    paths = next((r["data"] for r in results if r["data"]["train"].get("path")), None)
    train_path = data or (paths["train"]["path"] if paths else recipe.data.path)
    test_path = data or (paths["test"]["path"] if paths else recipe.data.path)
    if train_path is None or test_path is None:
        return [], ["No pictures: the run names no data. <code>ijepa report RUN --data IMAGES</code>"]
    try:
        train: Source = open_source(train_path, where="--data", split="train")
        test: Source = open_source(test_path, where="--data", split="val" if paths and not data else "train")
    except Refused as error:
        return [], [f"No pictures: {html.escape(str(error))}"]
    shown = [pictures.mask_picture(recipe, train)]
    if not list_checkpoints(run.checkpoints):
        return shown, ["No pictures of features: the run has no checkpoint yet."]
    trained = load_encoder(run.folder)
    initial = FrozenEncoder.initial(recipe.model, recipe.seed)
    both: dict[str, Encoder] = {"trained": trained, "as initialised": initial}
    size = recipe.model.image_hw
    shown.append(pictures.feature_picture(both, test, size))
    hints = []
    if train.labels is not None and test.labels is not None:
        shown.append(pictures.retrieval_picture(both, train, test, size))
    else:
        hints.append("No neighbours: the data has no labels.")
    if train.has_masks and test.has_masks and size[0] == size[1]:
        shown.append(pictures.segmentation_picture(trained, train, test, size[0]))
    else:
        hints.append("No segmentation: the data has no masks.")
    return shown, hints


def _headline(recipe: Recipe, info: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    last = metrics[-1] if metrics else None
    facts = [f"{info.get('images', '?')} images", f"batch {recipe.batch.total}", f"seed {recipe.seed}"]
    if last:
        facts = [f"{last['step']} steps", f"{last['step'] * recipe.batch.total:,} images seen", *facts]
        facts += [f"loss {_number(last['loss'], '.4f')}", f"skill {_number(last['skill'], '.3f')}"]
    return (
        f"<header><h1>{html.escape(recipe.name)}</h1><p>{html.escape(recipe.description)}</p>"
        f"<p class='facts'>{' · '.join(html.escape(fact) for fact in facts)}</p></header>"
    )


def _overview(results: list[dict[str, Any]]) -> str:
    """One table of the main figure of every result, a row an encoder."""
    if not results:
        return ""
    names = list(dict.fromkeys(row["encoder"] for result in results for row in result["rows"]))
    head = "".join(
        f"<th>{MAIN[r['kind']][0]}<br><small>{html.escape(r['protocol']['name'])}</small></th>" for r in results
    )
    body = []
    for name in names:
        cells = []
        for result in results:
            row = next((row for row in result["rows"] if row["encoder"] == name), None)
            cells.append(f"<td>{100 * row[MAIN[result['kind']][1]]:.1f}</td>" if row else "<td>-</td>")
        body.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return _section("How good is it?", table + _BASELINES)


def _result(result: dict[str, Any]) -> str:
    keys = [key for key, value in result["rows"][0].items() if isinstance(value, float)]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    body = "".join(
        f"<tr><th>{html.escape(row['encoder'])}</th>{''.join(f'<td>{100 * row[k]:.2f}</td>' for k in keys)}</tr>"
        for row in result["rows"]
    )
    protocol, level, chance = result["protocol"], result.get("level"), result.get("chance")
    facts = [html.escape(protocol.get("description", ""))]
    facts += [f"Level {level}."] if level is not None else []
    facts += [f"Chance {100 * chance:.1f}."] if chance is not None else []
    bars = _classes(result) if result["kind"] == "segmentation" else ""
    title = f"{MAIN[result['kind']][0]}: protocol {protocol['name']}"
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _section(title.capitalize(), f"{table}<p>{' '.join(facts)}</p>{bars}")


def _classes(result: dict[str, Any]) -> str:
    """Per-class IoU of the first encoder as bars."""
    first = result["rows"][0]
    names = result["data"].get("classes") or []
    bars = []
    for number, value in enumerate(first.get("per_class") or []):
        if value is not None:
            name = names[number] if number < len(names) else str(number)
            bar = f"<td class='bar'><span style='width:{100 * value:.1f}%'></span></td>"
            bars.append(f"<tr><th>{html.escape(str(name))}</th>{bar}<td>{100 * value:.1f}</td></tr>")
    return (
        f"<table class='bars'><caption>IoU by class, {html.escape(first['encoder'])}</caption>{''.join(bars)}</table>"
    )


def _figure(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    return f'<figure><img src="{picture.uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


_CURVES = "Light lines are single steps, dark ones running means."
_BASELINES = (
    "<p>Accuracy and mean IoU in per cent, each by the protocol named; the encoder as it was initialised and raw "
    "pixels beside it.</p>"
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #666d76; --line: #d9dde2; --page: #fff; --mark: #4c72b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --soft: #9aa2ac; --line: #3a4048; --page: #16191d; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0 0 .25rem; font-size: 2rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
.facts, figcaption, .hint, small, p small { color: var(--soft); font-size: .9rem; }
figure { margin: 0; } figcaption { margin-top: .5rem; max-width: 46rem; }
img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); font-weight: 400; }
thead th { color: var(--soft); vertical-align: bottom; } tbody th { text-align: left; }
tbody tr:first-child th, tbody tr:first-child td { font-weight: 600; }
.bars tr:first-child th, .bars tr:first-child td { font-weight: 400; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding: .75rem 0 .25rem; }
.bar { width: 18rem; } .bar span { display: block; height: .7rem; background: var(--mark); border-radius: 2px; }
pre { font-size: .8rem; overflow-x: auto; } summary { cursor: pointer; color: var(--soft); }
"""
