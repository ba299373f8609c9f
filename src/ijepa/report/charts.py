"""Charts as SVG images, drawn with matplotlib in colors that are readable on a light and on a dark page."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.report.formatting import format_number, format_percent, format_tick
from ijepa.report.images import Picture, data_uri
from ijepa.report.run_data import Numbers

COLORS = ("#2f86d0", "#d9772b", "#2f9a68", "#9b74c8")
"""Colors of lines, in their order."""

MAX_POINTS = 400
"""Points of a drawn line."""

_GRAY = "#7b828a"
_MARKERS_UP_TO = 40
_MAX_LABEL = 28
"""Characters of a class name next to a bar."""

_STYLE = Path(__file__).parent / "templates/chart.mplstyle"


@dataclass(frozen=True)
class Line:
    """One quantity over steps: `x` and `y` (n,), finite, n > 0."""

    label: str
    x: Numbers
    y: Numbers


def draw(paint: Callable[[Any], None], size: tuple[float, float], alt: str) -> Picture:
    """Return a chart of `size` in inches; `paint` draws on the matplotlib axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(fname=_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(data_uri(buffer.getvalue(), "svg+xml"), alt)


def line_chart(title: str, lines: Sequence[Line], *, smooth: bool = False, log_scale: bool = False) -> Picture:
    """Return lines over training steps, in the order of COLORS.

    Args:
        title: what is measured, for the alternative text.
        lines: up to four of any length; a few hundred points are drawn.
        smooth: draw the running mean, and single steps faintly (if there are many, their range).
        log_scale: if all values are positive.
    """

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for line, color in zip(lines, COLORS, strict=False):
            _draw_line(axes, line, color, smooth=smooth)
        if log_scale and all((line.y > 0).all() for line in lines):
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
            axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: format_tick(value))
        axes.grid(axis="y")

    number = format_number
    ranges = "; ".join(
        f"{line.label}: {number(line.y[0])} at step {number(line.x[0])}, {number(line.y[-1])} at step "
        f"{number(line.x[-1])}, minimum {number(line.y.min())}, maximum {number(line.y.max())}"
        for line in lines
    )
    return draw(paint, (3.5, 1.9), f"{title} over training steps. {ranges}")


def smoothing_window(points: int) -> int:
    """Return over how many points a smooth line is averaged; 1 if single points are drawn."""
    return points // 50 if points >= 100 else 1


def running_mean(values: Numbers, window: int) -> Numbers:
    """Return the mean of the `window` values around each of (n,); there are fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + (window + 1) // 2, len(values))
    mean: Numbers = (sums[high] - sums[low]) / (high - low)
    return mean


def _draw_line(axes: Any, line: Line, color: str, *, smooth: bool) -> None:
    x, y, count = line.x, line.y, len(line.x)
    drawn = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(int))
    if not smooth or count <= _MARKERS_UP_TO:
        marker = "o" if count <= _MARKERS_UP_TO else None
        axes.plot(x[drawn], y[drawn], color=color, linewidth=1.6, marker=marker, markersize=3.2)
        return
    if count <= MAX_POINTS:
        axes.plot(x, y, color=color, linewidth=0.7, alpha=0.35)
    else:  # single steps are too many to draw: fill between their minimum and maximum
        edges = np.linspace(0, count, MAX_POINTS // 2 + 1).astype(int)[:-1]
        low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
        axes.fill_between(x[edges], low, high, color=color, alpha=0.22, linewidth=0)
    axes.plot(x[drawn], running_mean(y, smoothing_window(count))[drawn], color=color, linewidth=1.6)


def class_chart(names: Sequence[str], shares: Mapping[str, npt.NDArray[np.floating]]) -> Picture:
    """Return the IoU by class: bars for the first encoder, markers for the others; `shares` (classes,) may be NaN."""
    labels = [name if len(name) <= _MAX_LABEL else name[: _MAX_LABEL - 1] + "…" for name in names]
    (first, bars), *others = shares.items()
    place = np.arange(len(names))[::-1]

    def paint(axes: Any) -> None:
        handles = [axes.barh(place, np.nan_to_num(bars), height=0.62, color=COLORS[0])]
        for (_, values), marker, color in zip(others, "oDs^v", (*COLORS[1:], _GRAY, _GRAY), strict=False):
            handles += axes.plot(values, place, marker, color=color, markersize=4)
        axes.set_yticks(place, labels)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_xlim(0, max(1e-3, 1.05 * float(np.nanmax(list(shares.values())))))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.grid(axis="x")
        axes.legend(handles, list(shares), loc="lower left", bbox_to_anchor=(0, 1), ncols=5, handlelength=1.2)

    values = ", ".join(
        f"{name} {format_percent(share)}" for name, share in zip(labels, bars, strict=True) if share == share
    )
    return draw(paint, (5.2, 0.6 + 0.19 * len(names)), f"IoU in percent by class, {first} encoder: {values}")


def spectrum_chart(spectra: Mapping[str, Numbers], floor: float) -> Picture:
    """Return singular values as shares of the largest, on a log scale down to `floor`, one line for each encoder."""

    def paint(axes: Any) -> None:
        for (name, values), color in zip(spectra.items(), COLORS, strict=False):
            axes.plot(np.arange(1, len(values) + 1), values, color=color, linewidth=1.4, label=name)
        axes.set_yscale("log")
        axes.set_ylim(floor, 1.5)
        axes.grid(axis="y")
        axes.legend(loc="lower left")

    counts = "; ".join(
        f"{name}: {(values > 0.5).sum()} of {len(values)} are above one half, {(values > 0.01).sum()} above 1 percent"
        for name, values in spectra.items()
    )
    return draw(paint, (5.5, 2.4), f"Singular values as shares of the largest. {counts}")
