"""What a run's figures say together over time, in plain language: single figures do not show a collapse that sets in.

Read from `metrics.jsonl` (a loss a step) and `diagnostics.jsonl` (figures every so many steps) of a run's folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FALL = 0.7
"""A figure below this share of its highest value has fallen."""


def warnings_of(steps: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings, each a sentence with what to change, from records of steps and of diagnoses in order.

    Fewer than three diagnoses say nothing of a trend.
    """
    if len(figures) < 3:
        return []
    losses = [float(step["loss"]) for step in steps if isinstance(step.get("loss"), int | float)]
    tenth = max(1, len(losses) // 10)
    falling = len(losses) > 1 and sum(losses[-tenth:]) < sum(losses[:tenth])
    said = []
    rank = _fall(figures, "rankme_centred")
    if rank is not None and falling:
        said.append(
            f"loss falls while rank falls: centred RankMe went from {rank[0]:.1f} to {rank[1]:.1f}, so that targets "
            "become easier to predict by saying less; raise schedule.momentum_start, lower optimizer.lr_encoder, "
            "or lengthen the warm-up, from a checkpoint before the fall"
        )
    elif rank is not None:
        said.append(
            f"rank falls: centred RankMe went from {rank[0]:.1f} to {rank[1]:.1f}, features narrow; check the masks "
            "and the learning rate"
        )
    deviation = _fall(figures, "std")
    if deviation is not None and deviation[1] < 0.1 * deviation[0]:
        said.append(
            f"images grow alike: the deviation of their features fell from {deviation[0]:.2g} to {deviation[1]:.2g}; "
            "lower optimizer.lr_encoder or raise the momentum"
        )
    cosine = [float(record["mean_cosine"]) for record in figures if record.get("mean_cosine") is not None]
    if cosine and cosine[-1] > 0.95 and cosine[-1] > min(cosine) + 0.1:
        said.append(
            f"all images point one way: their mean cosine rose from {min(cosine):.2f} to {cosine[-1]:.2f}; a common "
            "offset grows, or the encoder loses its input"
        )
    return said


def run_warnings(run: Path) -> list[str]:
    """Return `warnings_of` a run's folder; none where it holds no figures yet."""
    return warnings_of(_records(run / "metrics.jsonl"), _records(run / "diagnostics.jsonl"))


def new_warnings(run: Path) -> Callable[[], list[str]]:
    """Return a function that returns those of `run_warnings` that it has not returned before, for a run on its way.

    A warning whose figures alone have moved on is the same warning.
    """
    said: set[str] = set()

    def fresh() -> list[str]:
        found = {line.partition(":")[0]: line for line in run_warnings(run)}
        new = [f"warning: {line}" for head, line in found.items() if head not in said]
        said.update(found)
        return new

    return fresh


def _fall(figures: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Return a figure's highest and last value where it has fallen since."""
    values = [float(record[key]) for record in figures if record.get(key) is not None]
    return (max(values), values[-1]) if values and values[-1] < FALL * max(values) else None


def _records(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of lines; a last line that is still being written is left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
