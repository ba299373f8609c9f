"""One training step: gradients of its micro-batches, one optimizer step, the moving average, and its metrics.

The gradients of micro-batches are summed and not averaged, because each image has the weight 1 / global batch. Nothing
here waits for the device.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from ijepa.config.recipe import Lengths, Recipe
from ijepa.masking.batch import Batch
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import skill_of
from ijepa.training.device_prefetch import DevicePrefetcher
from ijepa.training.metrics import StepRecord
from ijepa.training.optimizer import apply_step, gradient_norm, set_rates
from ijepa.training.parallelize import DistributedModel
from ijepa.training.runtime import Resolved, autocast_context
from ijepa.training.schedules import rates_at

_MEAN_WEIGHT = 0.02
"""Weight of a new batch in the running mean target of each position, which `skill` compares with."""


class TrainingStep:
    """Takes the steps of a run.

    Args:
        recipe: what is trained.
        lengths: the run's lengths in steps.
        images: size of the data set, for the epoch.
        resolved: device, autocast and micro-batch size.
        distributed: the model.
        optimizer: of the model.
        report: called with the step (from 1) and what this rank does next.
        count_replaced: returns how many crops of a batch show a replacement of an unreadable image.
    """

    def __init__(
        self,
        recipe: Recipe,
        lengths: Lengths,
        images: int,
        resolved: Resolved,
        distributed: DistributedModel,
        optimizer: torch.optim.Optimizer,
        *,
        report: Callable[[int, str], None],
        count_replaced: Callable[[Batch], int],
    ) -> None:
        self._recipe, self._lengths, self._images, self._resolved = recipe, lengths, images, resolved
        self._distributed, self._optimizer = distributed, optimizer
        self._report, self._count_replaced = report, count_replaced
        self._device = torch.device(resolved.device)
        self._prefetch = DevicePrefetcher(self._device)

    def __call__(self, number: int, batches: Iterator[Batch]) -> StepRecord:
        """Take the step `number`, counted from 0, with this rank's next micro-batches."""
        recipe, whole = self._recipe, self._recipe.batch.total
        model, world = self._distributed.model, self._distributed.world
        rates = rates_at(number, self._lengths, recipe.optimizer, recipe.schedule)
        set_rates(self._optimizer, rates)
        sums, replaced, flops, waited = self._accumulate_gradients(number + 1, batches)
        norm = gradient_norm(model, self._optimizer)
        # One reduction for all metrics and the norm of sharded gradients, which `copies` ranks count.
        *sums, squared = world.all_reduce_sum(
            [*sums, norm.new_full((), replaced), norm.square() / world.copies],
        )
        loss, baseline, target_sums, position_sums, bad = sums
        # On one process the norm is kept as it is, because the square root of its square may differ in the last bit.
        norm = norm if world.size == 1 else squared.sqrt()
        with record_function("ijepa: optimizer and EMA"):
            norm, void = apply_step(model, self._optimizer, rates.momentum, recipe.optimizer.clip_norm, norm)
        self._move_position_mean(number, position_sums / whole, void)
        # (len(VALUES),), in the order of VALUES
        values = torch.stack([loss, skill_of(loss, baseline), norm, _mean_std(target_sums), void, bad])
        epoch = (number + 1) * whole / self._images
        return StepRecord(number + 1, epoch, rates, values, whole, flops * world.size, waited)

    def _accumulate_gradients(self, step: int, batches: Iterator[Batch]) -> tuple[list[Tensor], int, float, float]:
        """Add the gradients of this rank's micro-batches.

        Returns:
            Sums over them: loss and baseline (), target sums (3, D) and position sums (N, D); replaced crops; FLOPs;
            and seconds of waiting for data.
        """
        outputs: list[tuple[Tensor, ...]] = []
        replaced, waited, flops = 0, 0.0, 0.0
        micros = self._recipe.batch.total // self._distributed.world.size // self._resolved.micro
        for micro in range(micros):
            self._report(step, "loading data")
            begun = time.perf_counter()
            with record_function("ijepa: wait for data"):
                batch = next(batches)
            waited += time.perf_counter() - begun
            self._report(step, "computing")
            replaced += self._count_replaced(batch)
            flops += batch_flops(self._recipe.model, batch).total
            forward = autocast_context(self._device, self._resolved.autocast)
            with record_function("ijepa: forward and backward"):
                output = self._distributed.backward(self._prefetch(batch), forward, last=micro == micros - 1)
            outputs.append((output.loss.detach(), output.baseline, output.target_sums, output.position_sums))
        return [torch.stack(part).sum(0) for part in zip(*outputs, strict=True)], replaced, flops, waited

    @torch.no_grad()
    def _move_position_mean(self, number: int, mean: Tensor, void: Tensor) -> None:
        # The first steps have a larger weight, so that the mean starts as the plain average of batches.
        weight = max(_MEAN_WEIGHT, 1 / (number + 1)) * (1 - void)
        self._distributed.model.position_mean.lerp_(torch.nan_to_num(mean), weight)


def _mean_std(sums: Tensor) -> Tensor:
    """Return the mean over channels of the standard deviation over tokens.

    `sums` (3, D) holds the count of tokens, their sum and their sum of squares.
    """
    # In float64, because the difference of two large sums loses digits.
    count, total, squares = sums.double()
    return (squares / count - (total / count).square()).clamp(min=0).sqrt().mean().float()
