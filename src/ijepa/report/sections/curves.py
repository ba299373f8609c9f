"""The logs of a run as small charts: training, feature diagnostics, schedules, speed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa.interop.weights import shipped_folder, shipped_weights
from ijepa.report.charts import COLORS, Line, line_chart, smoothing_window
from ijepa.report.formatting import format_number
from ijepa.report.images import Picture
from ijepa.report.run_data import Columns, MissingInput, RunData, read_columns


@dataclass(frozen=True)
class Panel:
    """One chart. `values` has the color, the label and the last value of each line; the label is empty for one line."""

    title: str
    caption: str
    values: list[tuple[str, str, str]]
    chart: Picture


@dataclass(frozen=True)
class PanelGroup:
    """Charts under one heading."""

    title: str
    panels: list[Panel]
    text: str = ""


@dataclass(frozen=True)
class CurveSection:
    """Groups of charts; `diagnose_command` if nothing was measured during training."""

    groups: list[PanelGroup]
    diagnose_command: str | None


@dataclass(frozen=True)
class _Definition:
    """A chart of the log columns `lines` (label by key)."""

    title: str
    lines: dict[str, str]
    caption: str
    smooth: bool = False
    log: bool = False


_SKILL = _Definition(
    "Skill",
    {"skill": "skill"},
    "1 − loss / (loss of predicting the mean target of each position). At 0 the predictor has learned nothing but "
    "positions, at 1 its predictions are perfect.",
    smooth=True,
)
_TARGET_STD = _Definition(
    "Standard deviation of targets",
    {"target_std": "target_std"},
    "Standard deviation of the targets over patches, before they are normalized. If it approaches 0, the features "
    "collapse.",
    smooth=True,
)
_ACCURACY = _Definition(
    "Accuracy",
    {"linear": "linear probe", "knn": "kNN"},
    "Accuracy of saved checkpoints on validation scenes, by the protocols of the demo. Step 0 has initial weights.",
)
_LEARNING = (
    _Definition(
        "Loss",
        {"loss": "loss"},
        "Smooth-L1 distance between predicted and true features of masked blocks. Do not judge a run by the loss "
        "alone: it also falls when the targets become easier to predict.",
        smooth=True,
    ),
    _SKILL,
    _Definition(
        "Gradient norm",
        {"grad_norm": "norm"},
        "Norm of the complete gradient. If it rises and stays high, lower the learning rate.",
        smooth=True,
        log=True,
    ),
)
_DIAGNOSTICS = (
    _Definition(
        "RankMe",
        {"rankme": "original", "rankme_centred": "centered"},
        "Effective number of directions that image features use; centered: after subtraction of their mean. In "
        "healthy runs it falls early and then recovers. A value near 1 is a collapse.",
    ),
    _Definition(
        "kNN during training",
        {"knn": "accuracy"},
        "Leave-one-out accuracy of nearest neighbors on a fixed batch. Labels are used for this metric only.",
    ),
    _Definition(
        "Standard deviation of features",
        {"std": "std"},
        "Standard deviation of pooled features over images. If it approaches 0, the features collapse.",
    ),
    _Definition(
        "Variance explained by position",
        {"position_r2": "R²"},
        "Share of the variance of patch features that the position of the patch explains. Near 1, the features do "
        "not depend on the image.",
    ),
    _Definition(
        "Mean cosine of images",
        {"mean_cosine": "cosine"},
        "Mean cosine between the pooled features of two images. At 1, the encoder does not distinguish images.",
    ),
    _Definition(
        "Decay of eigenvalues",
        {"alpha_req": "alpha"},
        "alpha-ReQ, the exponent at which the eigenvalues of the features decay. Far above 1, a few directions have "
        "almost all of the variance.",
    ),
    _Definition(
        "Spread of patches",
        {"patch_spread": "spread"},
        "Standard deviation of patch features around the mean of their image. If it approaches 0, all patches of an "
        "image have the same features.",
    ),
    _Definition(
        "Before the final norm",
        {"std_before_norm": "std"},
        "Standard deviation of the input of the final LayerNorm. The norm would hide a collapse of its input.",
    ),
)
_SCHEDULES = (
    _Definition(
        "Learning rates",
        {"lr_encoder": "encoder", "lr_predictor": "predictor"},
        "Learning rates of the context encoder and of the predictor.",
    ),
    _Definition(
        "EMA momentum",
        {"momentum": "momentum"},
        "Weight of the old target encoder in each step of its moving average.",
    ),
)
_WEIGHT_DECAY = _Definition(
    "Weight decay",
    {"weight_decay": "weight decay"},
    "Decoupled weight decay of matrices; biases, norms and the mask token have none.",
)
_SPEED = (
    _Definition(
        "Images per second",
        {"images_per_second": "images/s"},
        "Training throughput between two log entries, without the time for diagnostics.",
        smooth=True,
    ),
    _Definition(
        "Waiting for data",
        {"data_wait": "share"},
        "Share of the time that training waited for images. If it is above a few percent, raise data.workers.",
        smooth=True,
    ),
)


def curve_section(run: RunData) -> CurveSection:
    """Return the charts that the logs of a run fill."""
    groups, name = training_panels(run), run.recipe.name
    if not groups:
        raise MissingInput("the run has no metrics", f"ijepa pretrain {name}")
    if name in shipped_weights() and (panels := longer_panels(shipped_folder(name))):
        text = "The run whose encoder is part of the package."
        groups.append(PanelGroup("Same recipe, longer training", panels, text))
    return CurveSection(groups, None if run.diagnostics else f"ijepa pretrain {name} --diagnose-every 500")


def training_panels(run: RunData) -> list[PanelGroup]:
    """Return the charts of a run by group, without empty groups; unknown diagnostics have a chart each."""
    known = {key for definition in _DIAGNOSTICS for key in definition.lines} | {"step"}
    others = (
        _Definition(key, {key: key}, "Measured on a fixed batch.") for key in sorted(run.diagnostics.keys() - known)
    )
    decay_changes = len(np.unique(run.metrics.get("weight_decay", np.zeros(0)))) > 1
    groups = (
        PanelGroup("Learning", _panels(run.metrics, *_LEARNING)),
        PanelGroup(
            "Feature diagnostics",
            _panels(run.diagnostics, *_DIAGNOSTICS, *others) + _panels(run.metrics, _TARGET_STD),
        ),
        PanelGroup("Schedules", _panels(run.metrics, *_SCHEDULES, *[_WEIGHT_DECAY] * decay_changes)),
        PanelGroup("Speed", _panels(run.timings, *_SPEED)),
    )
    return [group for group in groups if group.panels]


def longer_panels(folder: Path) -> list[Panel]:
    """Return the charts of weights that are part of the package: how their recipe continues after more steps."""
    metrics, accuracy = read_columns(folder / "metrics.jsonl"), read_columns(folder / "accuracy.jsonl")
    return _panels(accuracy, _ACCURACY) + _panels(metrics, _SKILL, _TARGET_STD)


def _panels(columns: Columns, *definitions: _Definition) -> list[Panel]:
    """Return a panel for each definition that has a number in at least one of its columns."""
    panels = []
    for each in definitions:
        lines = []
        for key, label in each.lines.items():
            values = columns.get(key, np.zeros(0))
            known = np.isfinite(values)
            if known.any():
                lines.append(Line(label, columns["step"][known], values[known]))
        if not lines:
            continue
        caption, window = each.caption, smoothing_window(len(lines[0].x))
        if each.smooth and window > 1:
            caption += f" Faint: single steps; strong: mean over {window} of them."
        panels.append(
            Panel(
                each.title,
                caption,
                [
                    (color, line.label if len(lines) > 1 else "", format_number(line.y[-1]))
                    for line, color in zip(lines, COLORS, strict=False)
                ],
                line_chart(each.title, lines, smooth=each.smooth, log=each.log),
            )
        )
    return panels
