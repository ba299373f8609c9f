"""Learning rate, weight decay and EMA momentum as functions of the step: no state, so nothing to resume."""

from dataclasses import dataclass

from ijepa.config.recipe import Lengths, OptimizerSection, ScheduleSection
from ijepa.utils.schedules import half_cosine


@dataclass(frozen=True)
class Rates:
    """The values of all schedules at one step."""

    lr_encoder: float
    lr_predictor: float
    weight_decay: float
    momentum: float


def rates_at(step: int, lengths: Lengths, optimizer: OptimizerSection, schedule: ScheduleSection) -> Rates:
    """Return the rates of step `step`, counted from 0, of `lengths.total`.

    Warm-up is linear, from `warmup_from` times the peak to the peak at its last step. With `decay: cosine` the rate
    then falls to `lr_end` along half a cosine; with `wsd` it stays constant and falls linearly over the cooldown
    (Hägele et al., arXiv 2405.18392). Momentum changes linearly over the whole run, weight decay along half a cosine.
    """
    part = step / max(lengths.total, 1)
    momentum = schedule.momentum_start + (schedule.momentum_end - schedule.momentum_start) * part
    decay_end = optimizer.weight_decay if optimizer.weight_decay_end is None else optimizer.weight_decay_end
    weight_decay = decay_end + (optimizer.weight_decay - decay_end) * half_cosine(part)
    return Rates(
        lr_encoder=_learning_rate(step, optimizer.lr_encoder, lengths, schedule),
        lr_predictor=_learning_rate(step, optimizer.lr_predictor, lengths, schedule),
        weight_decay=weight_decay,
        momentum=momentum,
    )


def _learning_rate(step: int, peak: float, lengths: Lengths, schedule: ScheduleSection) -> float:
    if step < lengths.warmup:
        return peak * (schedule.warmup_from + (1 - schedule.warmup_from) * (step + 1) / lengths.warmup)
    if schedule.decay == "cosine":
        part = (step - lengths.warmup) / max(lengths.total - lengths.warmup, 1)
        return schedule.lr_end + (peak - schedule.lr_end) * half_cosine(part)
    left = (lengths.total - step) / max(lengths.cooldown, 1)
    return schedule.lr_end + (peak - schedule.lr_end) * min(left, 1.0)
