"""What a run's figures say together over time, in plain language: single figures do not show a collapse that sets in.

Read from `metrics.jsonl` (a loss a step) and `diagnostics.jsonl` (figures every so many steps) of a run's folder. Of
long files, rows spread evenly over them are read, so that the millionth step costs what the ten-thousandth does.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa.evaluation.diagnostics import CONSTANT, POSITIONAL
from ijepa.logs import spread_rows

FALL = 0.7
"""A figure below this share of its highest value has fallen."""

RECENT = 3
"""Diagnoses that a trend takes, and in all of which a level has to show."""


def warnings_of(steps: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings, each a sentence with what to change, from records of steps and of diagnoses in order.

    Fewer than three diagnoses say nothing. What has been bad from the beginning shows no trend: the last three are
    looked at by themselves, too.
    """
    if len(figures) < RECENT:
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
    return said + _levels(steps, figures, bool(said))


def _levels(steps: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], fallen: bool) -> list[str]:
    """Return what the last figures say by themselves; of a collapse only what no trend has `fallen` to say."""
    said = []
    targets = [float(step["target_std"]) for step in steps if isinstance(step.get("target_std"), int | float)]
    last = targets[-max(1, len(targets) // 10) :]
    if targets and sum(last) / len(last) < CONSTANT:
        said.append(
            f"targets are constant: their deviation is {sum(last) / len(last):.2g}, so that there is nothing to "
            "predict; raise schedule.momentum_start or lower optimizer.lr_encoder, from the start"
        )
    std, rank, position = (_recent(figures, key) for key in ("std", "rankme_centred", "position_r2"))
    if not fallen and std and max(std) < CONSTANT:
        said.append(
            f"images are all alike: the deviation of their features is {std[-1]:.2g} and has been for {RECENT} "
            "measurements; lower optimizer.lr_encoder or raise the momentum, from the start"
        )
    elif not fallen and rank and max(rank) < 2:
        said.append(
            f"features have one direction: centred RankMe is {rank[-1]:.1f} and has been for {RECENT} measurements; "
            "check the masks, then lower the learning rate or raise the momentum"
        )
    if position and min(position) > POSITIONAL:
        said.append(
            f"position explains the features: {position[-1]:.0%} of them, and little of the image; usual in the first "
            "steps: if it stays so, lower model.encoder.position_scale or raise the learning rate"
        )
    return said


def _recent(figures: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return a figure of the last diagnoses; none where one of them lacks it."""
    values = [record.get(key) for record in figures[-RECENT:]]
    return [] if None in values else [float(value) for value in values if value is not None]


def run_warnings(run: Path) -> list[str]:
    """Return `warnings_of` a run's folder; none where it holds no figures yet."""
    return warnings_of(spread_rows(run / "metrics.jsonl"), spread_rows(run / "diagnostics.jsonl"))


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
