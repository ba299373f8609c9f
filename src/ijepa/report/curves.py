"""A run's curves as small multiples: what training did, and how to read it.

A curve of any length becomes a few hundred points: the running mean as a line, single steps as a thin line, or as the
range between the lowest and the highest of neighbouring steps where there are too many to draw.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ijepa.report.drawing import COLORS, RULE, draw, tick
from ijepa.report.markup import figure, number
from ijepa.report.run_data import Columns, Numbers, Record, read_columns

MOST_POINTS = 400
"""Points of a drawn line."""


@dataclass(frozen=True)
class Line:
    """One quantity over steps; `x` and `y` are (n,) and `y` has NaN where nothing was measured."""

    label: str
    x: Numbers
    y: Numbers

    @property
    def known(self) -> tuple[Numbers, Numbers]:
        """The points that are there."""
        there = np.isfinite(self.y)
        return self.x[there], self.y[there]

    @property
    def last(self) -> float:
        """The last value that was measured."""
        return float(self.known[1][-1])


@dataclass(frozen=True)
class Panel:
    """One small plot: `caption` says what is seen and how to read it; noisy curves get a running mean."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    noisy: bool = False
    log: bool = False

    def html(self) -> str:
        """Return the panel as a figure."""
        swatches = len(self.lines) > 1
        values = "".join(
            f"<span>{_swatch(i) if swatches else ''}{escape(line.label) + ' ' if swatches else ''}"
            f"<b>{number(line.last)}</b></span>"
            for i, line in enumerate(self.lines, start=1)
        )
        head = f'<div class="plot-head"><h4>{escape(self.title)}</h4><div class="values">{values}</div></div>'
        return figure(head + "\n" + self.svg(), escape(self.caption), kind="plot")

    def svg(self) -> str:
        """Return the plot alone."""

        def paint(axes: Any) -> None:
            from matplotlib.ticker import MaxNLocator

            for line, color in zip(self.lines, COLORS, strict=False):
                _draw_line(axes, line, color, noisy=self.noisy)
            if self.log and all((line.known[1] > 0).all() for line in self.lines):
                axes.set_yscale("log")
            else:
                axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
                axes.yaxis.set_major_formatter(lambda value, _: tick(value))
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: tick(value))
            axes.grid(axis="y", color=RULE, linewidth=0.6)

        return draw(paint, (3.5, 1.9), (0.14, 0.14, 0.975, 0.95), self._words())

    def _words(self) -> str:
        told = []
        for line in self.lines:
            x, y = line.known
            ends = f"{number(y[0])} at step {number(x[0])}, {number(y[-1])} at step {number(x[-1])}"
            told.append(f"{line.label}: {ends}, lowest {number(y.min())}, highest {number(y.max())}")
        return f"{self.title} over training steps. " + "; ".join(told)


def longer_panels(folder: Path) -> list[Panel]:
    """Return the panels of weights that come with the package: where the curves of their recipe go when it runs on."""
    metrics, accuracy = read_columns(folder / "metrics.jsonl"), read_columns(folder / "accuracy.jsonl")
    names = {"linear": "linear probe", "knn": "kNN"}
    panels = (
        _panel(accuracy, "Accuracy", names, _ACCURACY),
        _panel(metrics, "Skill", {"skill": "skill"}, _SKILL, noisy=True),
        _panel(metrics, "Spread of the targets", {"target_std": "target_std"}, _SPREAD, noisy=True),
    )
    return [panel for panel in panels if panel is not None]


def training_panels(record: Record) -> dict[str, list[Panel]]:
    """Return the panels that a run's files fill, by group; whatever else diagnostics hold gets a panel of its own."""
    metrics, timings, measured = record.metrics, record.timings, record.diagnostics
    decays = len(np.unique(metrics.get("weight_decay", np.zeros(0)))) > 1
    groups = {
        "Learning": [
            _panel(metrics, "Loss", {"loss": "loss"}, _LOSS, noisy=True),
            _panel(metrics, "Skill", {"skill": "skill"}, _SKILL, noisy=True),
            _panel(metrics, "Gradient norm", {"grad_norm": "norm"}, _GRADIENT, noisy=True, log=True),
        ],
        "Health of the features": [
            *(_panel(measured, title, keys, text) for title, keys, text in _measured(measured)),
            _panel(metrics, "Spread of the targets", {"target_std": "target_std"}, _SPREAD, noisy=True),
        ],
        "Schedules": [
            _panel(metrics, "Learning rates", {"lr_encoder": "encoder", "lr_predictor": "predictor"}, _RATES),
            _panel(metrics, "EMA momentum", {"momentum": "momentum"}, _MOMENTUM),
            _panel(metrics, "Weight decay", {"weight_decay": "weight decay"}, _DECAY) if decays else None,
        ],
        "Speed": [
            _panel(timings, "Images per second", {"images_per_second": "images/s"}, _SPEED, noisy=True),
            _panel(timings, "Waiting for data", {"data_wait": "share"}, _WAIT, noisy=True),
        ],
    }
    there = {name: [panel for panel in panels if panel is not None] for name, panels in groups.items()}
    return {name: panels for name, panels in there.items() if panels}


def running_mean(values: Numbers, window: int) -> Numbers:
    """Return the mean of the `window` values around each of (n,), of those that are there at the ends and in gaps."""
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    place = np.arange(len(values))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + (window + 1) // 2, len(values))
    count = counts[high] - counts[low]
    mean: Numbers = np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)
    return mean


def _panel(
    columns: Columns, title: str, keys: dict[str, str], caption: str, *, noisy: bool = False, log: bool = False
) -> Panel | None:
    """Return a panel of those keys that have a number somewhere, None where no key has."""
    there = {key: label for key, label in keys.items() if key in columns and np.isfinite(columns[key]).any()}
    lines = tuple(Line(label, columns["step"], columns[key]) for key, label in there.items())
    if not lines:
        return None
    if noisy and len(lines[0].x) >= 2 * _window(len(lines[0].x)) > 2:
        caption += f" Faint: single steps; strong: mean over {_window(len(lines[0].x))} of them."
    return Panel(title, caption, lines, noisy, log)


def _measured(columns: Columns) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield title, keys and caption for everything that was measured on the way."""
    yield from _MEASURED
    told = {key for _, keys, _ in _MEASURED for key in keys} | {"step"}
    for key in sorted(columns.keys() - told):
        yield key, {key: key}, "Measured on the way, on a fixed batch."


def _window(points: int) -> int:
    return max(points // 50, 1)


def _swatch(place: int) -> str:
    return f'<i class="swatch" style="background: var(--c{place})"></i>'


def _draw_line(axes: Any, line: Line, color: str, *, noisy: bool) -> None:
    x, y = line.known
    few = len(x) <= 40
    if not noisy or few:
        chosen = _thinned(len(x))
        axes.plot(x[chosen], y[chosen], color=color, linewidth=1.6, marker="o" if few else None, markersize=3.2)
        return
    if len(x) <= MOST_POINTS:
        axes.plot(x, y, color=color, linewidth=0.7, alpha=0.35)
    else:
        edges = np.linspace(0, len(x), MOST_POINTS // 2 + 1).astype(int)[:-1]
        low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
        axes.fill_between(x[edges], low, high, color=color, alpha=0.22, linewidth=0)
    chosen = _thinned(len(x))
    axes.plot(x[chosen], running_mean(y, _window(len(x)))[chosen], color=color, linewidth=1.6)


def _thinned(count: int) -> Numbers:
    """Return which of `count` points are drawn, the last one among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(int))


_LOSS = (
    "Smooth-L1 distance between predicted and true features of hidden blocks. It says little by itself: it also falls "
    "while the targets become easier to predict."
)
_SKILL = (
    "1 − loss / (loss of predicting each position's mean target). At 0 nothing but position has been learned, at 1 the "
    "prediction is perfect."
)
_ACCURACY = "Of kept checkpoints on validation scenes, by the demo's protocols; at step 0 as initialised."
_SPREAD = (
    "Standard deviation of the targets over patches, before their normalisation. On its way to 0 it is a collapse."
)
_GRADIENT = "Norm of the whole gradient, log scale. Spikes that do not come back ask for a lower learning rate."
_RATES = "Learning rates of the context encoder and of the predictor."
_MOMENTUM = "Weight of the old target encoder in each step of its moving average."
_DECAY = "Decoupled weight decay of matrices; biases, norms and the mask token have none."
_SPEED = "Training throughput between two readings. What was measured on the way is not counted."
_WAIT = "Share of the time in which computing waited for images. Above a few per cent, data.workers is too low."
_MEASURED: tuple[tuple[str, dict[str, str], str], ...] = (
    (
        "RankMe",
        {"rankme": "as it is", "rankme_centred": "centred"},
        "Effective number of directions that the features of images use; centred: after their mean is taken out. "
        "It falls early in healthy runs and recovers. Near 1 it is a collapse.",
    ),
    (
        "kNN on the way",
        {"knn": "accuracy"},
        "Leave-one-out accuracy of nearest neighbours on a fixed batch. Labels are read for this figure alone.",
    ),
    (
        "Spread of the features",
        {"std": "std"},
        "Standard deviation of pooled features over images. On its way to 0 it is a collapse.",
    ),
    (
        "Explained by position",
        {"position_r2": "R²"},
        "Share of the patch features' variance that a patch's place explains: near 1 the image does not matter.",
    ),
    (
        "Likeness of images",
        {"mean_cosine": "cosine"},
        "Mean cosine between the pooled features of two images: at 1 all images look alike to the encoder.",
    ),
    (
        "Decay of the spectrum",
        {"alpha_req": "alpha"},
        "alpha-ReQ, the exponent by which the features' eigenvalues fall. Far above 1 a few directions hold them all.",
    ),
    (
        "Spread of the patches",
        {"patch_spread": "spread"},
        "Deviation of patch features around their image's mean. On its way to 0 all places of an image look alike.",
    ),
    (
        "Before the last norm",
        {"std_before_norm": "std"},
        "Deviation of what goes into the final LayerNorm, which would hide that it vanishes.",
    ),
)
