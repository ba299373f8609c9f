"""A run's curves as SVG: small multiples of everything that metrics, timings and diagnostics hold."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ijepa.errors import Refused

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
_MOST_POINTS = 1500


@dataclass(frozen=True)
class Panel:
    """One small plot: which keys of which rows, and how they are drawn."""

    title: str
    rows: Sequence[dict[str, Any]]
    keys: tuple[str, ...]
    log: bool = False
    smooth: bool = False


def draw(panels: Sequence[Panel], *, columns: int = 3) -> str:
    """Return the panels that have data as one inline SVG, text as text, colours that read on light and dark.

    Raises:
        Refused: where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise Refused("report", "matplotlib is not installed", "pip install 'ijepa-pretrain[report]'") from None
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if any(row.get(key) is not None for row in panel.rows for key in panel.keys)]
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4 * columns, 2.2 * rows), layout="constrained")
        for place, panel in enumerate(shown, 1):
            axes = figure.add_subplot(rows, columns, place)
            _panel(axes, panel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


GRAY = "#7a7f87"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ijepa",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": GRAY,
    "axes.labelcolor": GRAY,
    "axes.edgecolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}


def _panel(axes: Any, panel: Panel) -> None:
    for key, color in zip(panel.keys, COLORS, strict=False):
        points = [(row["step"], row[key]) for row in panel.rows if row.get(key) is not None]
        if not points:
            continue
        step, value = np.array(points, dtype=float).T
        if panel.smooth and len(value) > 40:
            thin = slice(None, None, max(len(step) // _MOST_POINTS, 1))
            axes.plot(step[thin], value[thin], color=color, alpha=0.25, linewidth=0.6)
            window = max(len(value) // 60, 2)
            value = np.convolve(value, np.ones(window) / window, mode="valid")
            step = step[window - 1 :]
        thin = slice(None, None, max(len(step) // _MOST_POINTS, 1))
        marker = "o" if len(step) < 30 else None
        axes.plot(step[thin], value[thin], color=color, linewidth=1.5, label=key, marker=marker, markersize=3)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.grid(alpha=0.2)
    if panel.log:
        axes.set_yscale("log")
    if len(panel.keys) > 1:
        axes.legend(frameon=False, fontsize=8)


def _inline(svg: str) -> str:
    """Keep the <svg> element alone, as wide as the page lets it be, without references to anything outside."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(
        r'(<svg[^>]*?) height="[^"]*"', r'\1 width="100%" role="img" aria-label="curves of the run"', svg, count=1
    )
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "").replace(
        ' xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )


def training_panels(
    metrics: Sequence[dict[str, Any]], timings: Sequence[dict[str, Any]], diagnostics: Sequence[dict[str, Any]]
) -> list[Panel]:
    """Return the panels of a run; whatever diagnostics hold gets a panel of its own."""
    panels = [
        Panel("loss (smooth-L1)", metrics, ("loss",), smooth=True),
        Panel("skill: 0 is position alone, 1 is perfect", metrics, ("skill",), smooth=True),
        Panel("standard deviation of the targets", metrics, ("target_std",), smooth=True),
        Panel("gradient norm", metrics, ("grad_norm",), log=True, smooth=True),
        Panel("learning rate", metrics, ("lr_encoder", "lr_predictor")),
        Panel("EMA momentum", metrics, ("momentum",)),
    ]
    titles = {
        "rankme": "RankMe: directions the features use",
        "knn": "kNN accuracy on the way (labels never train)",
        "position_r2": "share of features that position explains",
        "std": "standard deviation of features",
        "mean_cosine": "mean cosine between images",
        "rankme_centred": "RankMe, centred",
    }
    measured = sorted({key for row in diagnostics for key in row} - {"step"}, key=lambda key: (key not in titles, key))
    panels += [Panel(titles.get(key, key), diagnostics, (key,)) for key in measured]
    return [*panels, Panel("images a second", timings, ("images_per_second",))]
