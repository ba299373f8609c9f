"""Pretraining: batches in, weights out. One step is the whole story; the rest is keeping promises about it.

A step sums the gradients of its micro-batches (each image weighs 1 / global batch, so nothing is averaged after),
takes one optimiser step that a non-finite gradient voids, moves the target encoder, and hands its values, still on
the device, to the monitor.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa.batch import Batch
from ijepa.data.loader import Loader
from ijepa.data.order import sample_indices
from ijepa.data.sources import Source
from ijepa.errors import Failed, Refused
from ijepa.model.flops import batch_flops
from ijepa.model.jepa import IJEPA
from ijepa.packing import Packer
from ijepa.recipe import Lengths, Recipe
from ijepa.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from ijepa.training.monitor import Monitor, StepRecord, cut_back
from ijepa.training.optimizer import apply_step, make_optimizer, set_rates
from ijepa.training.parallel import Resolved, computing, resolve, set_up
from ijepa.training.prepare import prepare, token_budget
from ijepa.training.run import open_run, start_run
from ijepa.training.schedules import rates_at

_MEAN_WEIGHT = 0.02
"""Weight of a new batch in the running mean target of each position, which `skill` is measured against."""


@dataclass(frozen=True)
class Callback:
    """Something to measure on the way: `measure(model)` after every `every` steps, and at the start and the end."""

    every: int
    measure: Callable[[IJEPA], dict[str, float]]


class Stopped(Failed):
    """A signal ended the run after a finished, saved step. Exit code 128 + signal."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, state saved; the same command resumes"
        )
        self.exit_code = 128 + number


@dataclass
class Counts:
    """What a run counts besides its metrics; saved with every checkpoint."""

    replaced: int = 0
    seen: int = 0
    void_in_a_row: int = 0
    replaced_names: list[str] = field(default_factory=list)


def pretrain(
    recipe: Recipe,
    source: Source,
    output: Path,
    *,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    info: dict[str, Any] | None = None,
) -> IJEPA:
    """Pretrain by a recipe on a data set into a run's folder; go on from its last checkpoint, if it has one.

    Raises:
        Refused: before anything is written: a folder with another run, a recipe this machine cannot follow.
        Stopped: a signal came; the state is saved.
        Failed: too many unreadable images or void steps in a row, or a full disk.
    """
    lengths = recipe.lengths(len(source))
    run, exists = open_run(output, recipe, resume=resume)
    earlier = run.info() if exists else None
    if earlier is not None and earlier["images"] != len(source):
        raise Refused(
            run.info_file,
            f"the run was started on {earlier['images']} images, data.path holds {len(source)}",
            "give the same data",
        )
    resolved = resolve(recipe, earlier["resolved"] if earlier else None)
    device = set_up(resolved, recipe.deterministic)
    model = IJEPA(recipe.model, recipe.seed).to(device)
    prepare(model, recipe, device)
    optimizer = make_optimizer(model, recipe.optimizer)
    saved = list_checkpoints(run.checkpoints)
    counts, start = Counts(), 0
    if saved:
        state = load_checkpoint(saved[-1], model, optimizer)
        counts, start = Counts(**state["counts"]), int(state["step"])
    if not exists:
        start_run(run, recipe, {"images": len(source), "resolved": resolved.as_json(), **(info or {})})
    cut_back(run, start)
    monitor = Monitor(run, total=lengths.total, start=start, log_every=recipe.log_every, quiet=quiet)
    if saved:
        monitor.say(f"resuming {output} after step {start}")
    try:
        with _signals() as caught:
            loop = _Loop(recipe, lengths, resolved, source, model, optimizer, monitor, counts)
            for step in loop.steps(start, callbacks):
                stop = caught[0] if caught else None
                if step == lengths.total or step % recipe.checkpoint.every == 0 or stop:
                    monitor.flush()
                    state = {"counts": vars(counts), "resolved": resolved.as_json()}
                    save_checkpoint(run.checkpoints, step, model, optimizer, state, recipe.checkpoint.keep)
                if stop and step < lengths.total:
                    raise Stopped(stop, step)
    finally:
        monitor.close()
    return model


@dataclass
class _Loop:
    recipe: Recipe
    lengths: Lengths
    resolved: Resolved
    source: Source
    model: IJEPA
    optimizer: torch.optim.Optimizer
    monitor: Monitor
    counts: Counts

    def steps(self, start: int, callbacks: Sequence[Callback]) -> Iterator[int]:
        """Take the steps after `start`, yielding the number of each finished one."""
        batches = self._loader().iterate(start, self.lengths.total)
        if start == 0:
            self._call(callbacks, 0)
        try:
            for step in range(start, self.lengths.total):
                self._step(step, batches)
                self._call(callbacks, step + 1)
                yield step + 1
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()

    def _call(self, callbacks: Sequence[Callback], step: int) -> None:
        for callback in callbacks:
            if step % callback.every == 0 or step == self.lengths.total:
                self.monitor.diagnose(step, lambda call=callback: call.measure(self.model))  # type: ignore[misc]

    def _loader(self) -> Loader:
        recipe, encoder = self.recipe, self.recipe.model.encoder
        return Loader(
            self.source,
            seed=recipe.seed,
            global_batch=recipe.batch.total,
            micro_batch=self.resolved.micro,
            image_size=recipe.model.image_hw,
            crop_scale=recipe.data.crop_scale,
            crop_ratio=recipe.data.crop_ratio,
            collate=Packer(
                recipe.mask,
                recipe.model.grid,
                recipe.seed,
                recipe.batch.total,
                encoder.depth,
                encoder.drop_path,
                token_budget(recipe, self.resolved.micro, self.model.position_mean.device),
            ),
            workers=self.resolved.workers,
            prefetch=recipe.data.prefetch,
        )

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        recipe, whole = self.recipe, self.recipe.batch.total
        rates = rates_at(step, self.lengths, recipe.optimizer, recipe.schedule)
        set_rates(self.optimizer, rates)
        device = self.model.position_mean.device
        sums: list[tuple[Tensor, ...]] = []
        waited = flops = 0.0
        for _ in range(whole // self.resolved.micro):
            begun = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begun
            self._count(batch)
            flops += batch_flops(recipe.model, batch).total
            with computing(device, self.resolved.autocast):
                outcome = self.model(batch.to(device, non_blocking=True))
            outcome.loss.backward()
            sums.append((outcome.loss.detach(), outcome.baseline, outcome.target_sums, outcome.position_sums))
        norm, void = apply_step(self.model, self.optimizer, rates.momentum, recipe.optimizer.clip_norm)
        loss, baseline, target_sums, position_sums = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
        self._move_position_mean(step, position_sums / whole, void)
        values = torch.stack([loss, 1 - loss / baseline, norm, _mean_std(target_sums), void])
        record = StepRecord(step + 1, (step + 1) * whole / len(self.source), rates, values, whole, flops, waited)
        for row in self.monitor.add(record):
            self._watch(row)

    @torch.no_grad()
    def _move_position_mean(self, step: int, mean: Tensor, void: Tensor) -> None:
        weight = max(_MEAN_WEIGHT, 1 / (step + 1)) * (1 - void)
        self.model.position_mean.lerp_(torch.nan_to_num(mean), weight)

    def _count(self, batch: Batch) -> None:
        counts = self.counts
        counts.seen += len(batch.positions)
        if batch.replaced:
            counts.replaced += len(batch.replaced)
            new = [name for name in batch.replaced if name not in counts.replaced_names]
            counts.replaced_names += new[: max(0, 100 - len(counts.replaced_names))]
            for name in new:
                self.monitor.say(f"unreadable, replaced by the next image of its epoch: {name}")
            share, limit = counts.replaced / counts.seen, self.recipe.data.replaced_limit
            # Below a few hundred images a share says little: one bad file would be more than a per cent.
            if share > limit and counts.seen >= min(len(self.source), 200) and counts.replaced > 1:
                raise Failed(
                    f"{counts.replaced} of {counts.seen} images are unreadable, more than data.replaced_limit = "
                    f"{limit}; the first: {', '.join(counts.replaced_names[:5])}"
                )

    def _watch(self, row: dict[str, Any]) -> None:
        """Stop after too many void steps in a row, naming the samples of the last."""
        if not row.get("void"):
            self.counts.void_in_a_row = 0
            return
        self.counts.void_in_a_row += 1
        if self.counts.void_in_a_row > self.recipe.optimizer.nonfinite_limit:
            whole = self.recipe.batch.total
            first = (row["step"] - 1) * whole
            indices = sample_indices(self.recipe.seed, range(first, first + whole), len(self.source)).tolist()
            names = ", ".join(self.source.name(index) for index in indices[:8])
            more = f" and {whole - 8} more" if whole > 8 else ""
            raise Failed(
                f"{self.counts.void_in_a_row} steps in a row had a non-finite gradient (each was void), the last is "
                f"step {row['step']} with {names}{more}; lower the learning rates or set --precision.autocast none"
            )


def _mean_std(sums: Tensor) -> Tensor:
    """Mean over channels of the standard deviation over tokens, from (3, D) counts, sums and sums of squares."""
    count, total, squares = sums.double()
    return (squares / count - (total / count).square()).clamp(min=0).sqrt().mean().float()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one acts at once."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
