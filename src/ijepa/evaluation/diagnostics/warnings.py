"""Warnings from the curves of a run: "watch" for what may recover, "collapse" for what will not.

The curves are in `metrics.jsonl` (loss and standard deviation of the targets at each step) and `diagnostics.jsonl`
(metrics every N steps) of a run folder. Of long files, evenly spaced rows are read, so the cost does not grow with the
run.

In a healthy run RankMe falls first, to a third or less of its initial value, the mean cosine between images rises to
.95, and both recover later while accuracy rises. So a fall is a warning only if it continues in the second half of the
run so far, and it is never a collapse by itself. If the images have labels and the accuracy of kNN is well above zero,
it decides, and trends of other metrics give no warning: "watch" if it drops below its best, "collapse" if it stays
below. The limits are set by measured curves of healthy and of collapsed runs in
`tests/unit/evaluation/diagnostics/curves`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ijepa.checkpoint.logs import spread_rows
from ijepa.evaluation.diagnostics.metrics import CONSTANT, POSITIONAL
from ijepa.evaluation.diagnostics.online import KNN_IMAGES

FALL = 0.7
"""A metric below this share of its highest value in the second half of the run has fallen."""
VANISHED = 0.1
"""The same for the standard deviation between images, which falls to a quarter in healthy runs."""
ALIGNED = 0.98
"""Mean cosine between images above which they nearly share one direction; healthy runs reach .96."""
RECENT = 3
"""Number of last diagnoses that must all show a level."""
TREND = 8
"""Least number of diagnoses of a trend."""
KNN_ERRORS = 3.0
"""Standard errors by which two accuracies of kNN must differ."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One warning: its level, its topic, and a sentence with the numbers and what to change."""

    level: Literal["watch", "collapse"]
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.topic}: {self.text}"


def find_warnings(steps: Rows, diagnoses: Rows) -> list[Finding]:
    """Return what the curves show.

    Args:
        steps: rows of `metrics.jsonl`, in order.
        diagnoses: rows of `diagnostics.jsonl`, in order. Fewer than 3 give no finding, fewer than 8 no trend.
    """
    if len(diagnoses) < RECENT:
        return []
    found = _levels(steps, diagnoses)
    if len(diagnoses) < TREND or any(finding.level == "collapse" for finding in found):
        return found
    accuracy = _values(diagnoses, "knn")
    informative = len(accuracy) >= TREND and max(accuracy) > 2 * _margin(max(accuracy))
    return [*(_accuracy(accuracy) if informative else _trends(diagnoses)), *found]


def _levels(steps: Rows, diagnoses: Rows) -> list[Finding]:
    """Return what the last values show by themselves."""
    found = []
    targets = _values(steps, "target_std")
    last = targets[-max(1, len(targets) // 10) :]
    if targets and sum(last) / len(last) < CONSTANT:
        text = (
            f"the standard deviation of the targets is {sum(last) / len(last):.2g}, so there is nothing to predict; "
            "start again with a higher schedule.momentum_start or a lower optimizer.lr_encoder"
        )
        found.append(Finding("collapse", "targets are constant", text))
    std, rank, position = (_recent(diagnoses, key) for key in ("std", "rankme_centred", "position_r2"))
    if std and max(std) < CONSTANT:
        text = (
            f"the standard deviation between images is {std[-1]:.2g} in the last {RECENT} measurements; start again "
            "with a lower optimizer.lr_encoder or a higher schedule.momentum_start"
        )
        found.append(Finding("collapse", "all images have the same features", text))
    elif rank and max(rank) < 2:
        text = (
            f"centered RankMe is {rank[-1]:.1f} in the last {RECENT} measurements; check the masks, then start again "
            "with a lower optimizer.lr_encoder or a higher schedule.momentum_start"
        )
        found.append(Finding("collapse", "features have one direction", text))
    if position and min(position) > POSITIONAL:
        text = (
            f"position explains {position[-1]:.0%} of the variance of the features; this is usual in the first "
            "steps; if it stays so, lower model.encoder.position_scale or raise optimizer.lr_encoder"
        )
        found.append(Finding("watch", "position explains the features", text))
    return found


def _accuracy(values: Sequence[float]) -> list[Finding]:
    """Return whether the accuracy of kNN has dropped below its best value."""
    best, now = max(values), sum(values[-RECENT:]) / RECENT
    limit = min(best - _margin(best), FALL * best)
    if now >= limit:
        return []
    text = f"the accuracy of kNN on the diagnosis images fell from {best:.1%} to {now:.1%}; "
    if len(values) >= TREND + RECENT and max(values[len(values) // 2 :]) < limit:
        text += (
            "it has been low for half of the run; start again from before the fall with a lower optimizer.lr_encoder "
            "or a higher schedule.momentum_start"
        )
        return [Finding("collapse", "accuracy falls", text)]
    text += "it can fall early and recover; keep the checkpoint with the best accuracy"
    return [Finding("watch", "accuracy falls", text)]


def _margin(accuracy: float) -> float:
    """Return the difference from an accuracy that is significant."""
    # Standard error of a share, as if the accuracy were measured on independent images.
    return KNN_ERRORS * (accuracy * (1 - accuracy) / KNN_IMAGES) ** 0.5


def _trends(diagnoses: Rows) -> list[Finding]:
    """Return the falls that continue in the second half of the run so far."""
    found = []
    half = diagnoses[len(diagnoses) // 2 :]
    rank, std, cosine = (_values(half, key) for key in ("rankme_centred", "std", "mean_cosine"))
    if rank and rank[-1] < FALL * max(rank):
        text = (
            f"centered RankMe went from {max(rank):.1f} to {rank[-1]:.1f} in the second half of the run so far; "
            "in healthy runs it falls early and recovers; if it continues, compare a kNN or linear probe with an "
            "earlier checkpoint"
        )
        found.append(Finding("watch", "rank falls", text))
    if std and std[-1] < VANISHED * max(std):
        text = (
            f"the standard deviation between images fell from {max(std):.2g} to {std[-1]:.2g} in the second half of "
            "the run so far; if it continues, lower optimizer.lr_encoder or raise schedule.momentum_start"
        )
        found.append(Finding("watch", "images become similar", text))
    if cosine and min(cosine[-RECENT:]) > ALIGNED:
        text = (
            f"the mean cosine between images is {cosine[-1]:.3f}; if it does not fall again, compare a kNN or linear "
            "probe with an earlier checkpoint"
        )
        found.append(Finding("watch", "all images point in one direction", text))
    return found


def _values(rows: Rows, key: str) -> list[float]:
    """Return the values of a key in the rows that have a number there."""
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _recent(rows: Rows, key: str) -> list[float]:
    """Return the values of a key in the last rows, none if one of them lacks it."""
    values = _values(rows[-RECENT:], key)
    return values if len(values) == RECENT else []


def training_warnings(run: Path) -> list[str]:
    """Return the warnings about a run as lines, none if the folder has no curves yet."""
    return [str(finding) for finding in _read(run)]


def new_training_warnings(run: Path) -> Callable[[], list[str]]:
    """Return a function that returns the lines of `training_warnings` that it has not returned before.

    A finding with the same topic and level is the same finding, even if its numbers have changed.
    """
    known: set[tuple[str, str]] = set()

    def fresh() -> list[str]:
        new = [finding for finding in _read(run) if (finding.level, finding.topic) not in known]
        known.update((finding.level, finding.topic) for finding in new)
        return [str(finding) for finding in new]

    return fresh


def _read(run: Path) -> list[Finding]:
    return find_warnings(spread_rows(run / "metrics.jsonl"), spread_rows(run / "diagnostics.jsonl"))
