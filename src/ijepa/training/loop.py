"""Pretraining: batches in, weights out. One step is the whole story; the rest is keeping promises about it.

A step sums the gradients of its micro-batches (each image weighs 1 / global batch, so nothing is averaged after),
takes one optimiser step that a non-finite gradient voids, moves the target encoder, and hands its values, still on
the device, to the monitor.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from ijepa.checkpoint.format import latest_name, load_checkpoint, set_aside
from ijepa.checkpoint.reader import WITHOUT_CHECKSUMS
from ijepa.checkpoint.run_dir import (
    claim,
    decisive,
    note_checkpoint,
    settings,
    start_run,
)
from ijepa.checkpoint.saver import Saver
from ijepa.config.recipe import Lengths, Recipe
from ijepa.data.loading.loader import Loader, LoaderConfig
from ijepa.data.loading.shuffle import Order
from ijepa.data.sources.base import Source
from ijepa.distributed.launch import join_training, leave
from ijepa.distributed.local_tensors import place
from ijepa.distributed.process_group import StopFlag, World
from ijepa.distributed.stragglers import StragglerDetector
from ijepa.distributed.watchdog import Watchdog
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA, skill_of
from ijepa.training.device_prefetch import DevicePrefetcher, collecting
from ijepa.training.metrics import Monitor, StepRecord, cut_back
from ijepa.training.model_setup import compiles, token_budget
from ijepa.training.optimizer import apply_step, gradient_norm, make_optimizer, set_rates
from ijepa.training.parallelize import DistributedModel, build
from ijepa.training.profiler import Profile, Window
from ijepa.training.resume import Resume, choose_checkpoint, open_for
from ijepa.training.runtime import Resolved, computing, set_up
from ijepa.training.schedules import rates_at
from ijepa.training.signals import caught_signals
from ijepa.training.unreadable import too_many
from ijepa.utils.errors import RunError

_MEAN_WEIGHT = 0.02
"""Weight of a new batch in the running mean target of each position, which `skill` is measured against."""

_DTYPE: torch.dtype | None = None
"""Dtype of the weights; None is float32. Tests set float64, to tell rounding from mistakes."""


@dataclass(frozen=True)
class Callback:
    """Something to measure on the way: `measure(model)` after every `every` steps, and at the start and the end.

    A step whose state is saved is saved first: a measurement that fails costs no step, and one that a kill has cut off
    is made when the run goes on.
    """

    every: int
    measure: Callable[[IJEPA], dict[str, float]]
    remarks: Callable[[], Sequence[str]] = tuple
    """Lines to show after a measurement has been written, in the light of what the run's files then hold."""


_LAUNCHER_LOST, _OUTPUT_LOST = 1000, 2000
"""What ranks ask to stop for besides signals, as numbers above those of signals; an errno is added to the second."""


class Interrupted(RunError):
    """The run ended early, after a finished, saved step.

    Exit code 128 + signal; 1 if no signal was the cause, but the end of torchrun or of standard output.
    """

    def __init__(self, number: int, step: int) -> None:
        if number >= _OUTPUT_LOST:
            cause = f"standard output cannot be written ({os.strerror(number - _OUTPUT_LOST)}): stopped"
        elif number >= _LAUNCHER_LOST:
            cause = "torchrun has ended: stopped"
        else:
            cause, self.exit_code = f"stopped by {signal.Signals(number).name}", 128 + number
        super().__init__(f"{cause} after step {step}, state saved; the same command resumes")


@dataclass
class Counts:
    """What a run counts besides its metrics; saved with every checkpoint. The names are this rank's, all else is known
    to all ranks.
    """

    replaced: int = 0
    """Crops of an image that was unreadable."""
    seen: int = 0
    void_in_a_row: int = 0
    replaced_names: list[str] = field(default_factory=list)


def pretrain(
    recipe: Recipe,
    source: Source,
    output: Path,
    *,
    resume: Resume = "auto",
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    info: dict[str, Any] | None = None,
    profile: Window | None = None,
    initial: Mapping[str, Callable[[], Tensor]] | None = None,
) -> IJEPA:
    """Pretrain by a recipe on a data set into a run's folder; go on from its last checkpoint, if it has one.

    The checkpoint is compared with its checksums before. Where it is damaged, `resume="last-good"` goes on from the
    latest one that is whole, and renames those after it.

    `info` is written into `run.json`; the steps of `profile` are traced into RUN/profile. A new run begins with the
    weights `initial` gives, by their names in the model, and draws the others.

    Raises:
        UserError: before anything is written: a folder with another run, or one that another process writes; other data
            than the run was started on; a damaged checkpoint; a recipe that this machine cannot follow.
        Interrupted: a signal came; the state is saved.
        RunError: too many unreadable images or void steps in a row, or a full disk.
    """
    lengths = recipe.lengths(len(source))
    facts = {**settings(recipe), "data": source.fingerprint, "--resume": resume}
    world = join_training(recipe, {key: value for key, value in facts.items() if key != "data.path"})
    with ExitStack() as held:
        world.run_on_rank0(lambda: held.enter_context(claim(output)))
        model = _train(recipe, source, output, world, lengths, resume, callbacks, quiet, info, profile, initial)
    leave(world)
    return model


def _train(
    recipe: Recipe,
    source: Source,
    output: Path,
    world: World,
    lengths: Lengths,
    resume: Resume,
    callbacks: Sequence[Callback],
    quiet: bool,
    info: dict[str, Any] | None,
    profile: Window | None,
    initial: Mapping[str, Callable[[], Tensor]] | None,
) -> IJEPA:
    """Pretrain in a folder that this process holds; see `pretrain`."""
    run, exists, found, resolved = world.run_on_rank0(lambda: open_for(recipe, source, output, resume, world.size))
    saved, skipped = choose_checkpoint(world, recipe, found, resume)
    device = set_up(resolved, recipe.deterministic)
    spread = build(recipe, device, world, autocast=resolved.autocast, dtype=_DTYPE)
    model = spread.model
    optimizer = make_optimizer(model, recipe.optimizer)
    counts, start = Counts(), 0
    state: dict[str, Any] = {}
    if saved:
        state = world.raise_on_any_rank(lambda: load_checkpoint(saved, model, optimizer))
        start = int(state["step"])
        counts = Counts(**state["counts"])
    elif initial:
        world.raise_on_any_rank(lambda: place(model, initial))

    def begin() -> tuple[int, list[str]]:
        if not exists:
            about = {"images": len(source), "fingerprint": source.fingerprint}
            about |= {"ranks": world.size, "strategy": world.strategy, "resolved": resolved.as_json()}
            start_run(run, recipe, {**about, **(info or {})})
        for error in skipped:
            set_aside(run.checkpoints / error.name)
        return cut_back(run, start, state.get("metrics_bytes"))

    measured, lines = world.run_on_rank0(begin)
    monitor = Monitor(
        run,
        total=lengths.total,
        start=start,
        log_every=recipe.log_every,
        quiet=quiet,
        rank=world.rank,
        pace=StragglerDetector(world, model, device),
    )
    if saved and world.rank == 0:
        for error in skipped:
            monitor.say(f"skipped {error.name}, which is now damaged-{error.name}: {error.problem}")
        if state["format"] == WITHOUT_CHECKSUMS:
            monitor.say(f"{saved}: has no checksums, not verified")
        monitor.say(f"resuming {output} after step {start}")
    for line in lines if world.rank == 0 else ():
        monitor.say(line)
    latest = partial(latest_name, run.checkpoints)
    watch = Watchdog(world, recipe.parallel.timeout, latest, compiles=compiles(recipe, device))
    world.lift_timeouts()
    profiling = Profile(profile, run.folder / "profile", device, world.rank)
    # The watch closes last: what the others close may wait for a device, and a lost rank then still has to be named.
    with (
        closing(watch),
        closing(monitor),
        closing(profiling),
        caught_signals() as caught,
        watch.naming(),
        collecting() as garbage,
    ):
        loop = _Loop(recipe, lengths, resolved, source, spread, optimizer, monitor, watch, counts, profiling)
        flag = StopFlag(world)
        # Saving is not watched: what it exchanges goes through the group that keeps parallel.timeout as its limit.
        saver = Saver(
            run.checkpoints,
            recipe.checkpoint.keep,
            replace(world, host=world.files),
            lambda step: note_checkpoint(run, step),
        )
        for step in loop.steps(start, callbacks, measured):
            stop = flag.exchange(caught[0] if caught else _failing(monitor, watch))
            if step == lengths.total or step % recipe.checkpoint.every == 0 or stop:
                loop.read()  # the device has finished the step then: saving waits for nothing on it
                state = {
                    "recipe": decisive(recipe),
                    "resolved": resolved.as_json(),
                    "counts": _together(world, counts),
                    "metrics_bytes": monitor.sync(),
                }
                watch.at(step, "saving")
                saver.save(step, model, optimizer, state)
            if stop or step == lengths.total:
                saver.finish()
            if stop and step < lengths.total:
                raise Interrupted(stop, step)
            garbage.after(step)
    return model


def _failing(monitor: Monitor, watch: Watchdog) -> int:
    """Return what this rank asks to stop for, besides signals; 0 for nothing."""
    if monitor.output_lost:
        return _OUTPUT_LOST + monitor.output_lost
    return _LAUNCHER_LOST if watch.orphaned else 0


def _together(world: World, counts: Counts) -> dict[str, Any]:
    """Return the counts with the names of all ranks, for JSON."""
    names = dict.fromkeys(name for each in world.all_gather_object(counts.replaced_names) for name in each)
    return {**vars(counts), "replaced_names": list(names)[:100]}


@dataclass
class _Loop:
    recipe: Recipe
    lengths: Lengths
    resolved: Resolved
    source: Source
    spread: DistributedModel
    optimizer: torch.optim.Optimizer
    monitor: Monitor
    watch: Watchdog
    counts: Counts
    profiling: Profile

    def __post_init__(self) -> None:
        self.model, self.world = self.spread.model, self.spread.world
        self.named = set(self.counts.replaced_names)  # all of them: the counts keep the first hundred
        self.feed = DevicePrefetcher(torch.device(self.resolved.device))
        data = self.recipe.data
        self.order = Order(self.recipe.seed, len(self.source), data.order, data.block, data.window)

    def steps(self, start: int, callbacks: Sequence[Callback], measured: int) -> Iterator[int]:
        """Take the steps after `start`, yielding the number of each finished one, and then measure what is due.

        Of the measurements due after step `start` itself, the first `measured` are there already.
        """
        batches = self._loader().iterate(start, self.lengths.total)
        try:
            self._call(callbacks, start, measured)
            for step in range(start, self.lengths.total):
                self.profiling.before(step + 1)
                self._step(step, batches)
                if written := self.profiling.after(step + 1):
                    self.monitor.say(f"profile: {written}")
                yield step + 1
                self._call(callbacks, step + 1)
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()

    def _call(self, callbacks: Sequence[Callback], step: int, measured: int = 0) -> None:
        due = [callback for callback in callbacks if step % callback.every == 0 or step == self.lengths.total]
        for callback in due[measured:]:
            self.read()
            self.watch.at(step, "diagnosing")
            self.monitor.diagnose(step, lambda call=callback: call.measure(self.model))  # type: ignore[misc]
            for line in callback.remarks() if self.world.rank == 0 else ():
                self.monitor.say(line)

    def _loader(self) -> Loader:
        recipe, encoder = self.recipe, self.recipe.model.encoder
        config = LoaderConfig(
            seed=recipe.seed,
            image_size=recipe.model.image_size,
            crop_scale=recipe.data.crop_scale,
            crop_ratio=recipe.data.crop_ratio,
            global_batch=recipe.batch.total,
            micro_batch=self.resolved.micro,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.resolved.workers,
            prefetch=recipe.data.prefetch,
            timeout=recipe.parallel.timeout / 3,  # before other ranks give up waiting for this one
            crops_per_decode=recipe.data.crops_per_decode,
        )
        packer = Packer(
            recipe.mask,
            recipe.model.grid,
            recipe.seed,
            recipe.batch.total,
            encoder.depth,
            encoder.drop_path,
            token_budget(recipe, self.resolved.micro, torch.device(self.resolved.device)),
        )
        return Loader(self.source, config, packer, self.order, on_restart=self.monitor.say)

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        recipe, whole = self.recipe, self.recipe.batch.total
        rates = rates_at(step, self.lengths, recipe.optimizer, recipe.schedule)
        set_rates(self.optimizer, rates)
        device = self.model.position_mean.device
        sums: list[tuple[Tensor, ...]] = []
        waited = flops = 0.0
        replaced = 0
        micros = whole // self.world.size // self.resolved.micro
        for micro in range(micros):
            self.watch.at(step + 1, "loading data")
            begun = time.perf_counter()
            with record_function("ijepa: wait for data"):
                batch = next(batches)
            waited += time.perf_counter() - begun
            self.watch.at(step + 1, "computing")
            replaced += self._replaced(batch)
            flops += batch_flops(recipe.model, batch).total
            forward = computing(device, self.resolved.autocast)
            with record_function("ijepa: forward and backward"):
                outcome = self.spread.backward(self.feed(batch), forward, last=micro == micros - 1)
            sums.append((outcome.loss.detach(), outcome.baseline, outcome.target_sums, outcome.position_sums))
        norm = gradient_norm(self.model, self.optimizer)
        mine = [torch.stack(part).sum(0) for part in zip(*sums, strict=True)]
        mine.append(norm.new_full((), replaced))
        # The step's one reduction besides the gradients': figures, and the norm of sharded gradients.
        *figures, square = self.world.all_reduce_sum([*mine, norm.square() / self.world.copies])
        loss, baseline, target_sums, position_sums, bad = figures
        norm = norm if self.world.size == 1 else square.sqrt()
        with record_function("ijepa: optimiser and EMA"):
            norm, void = apply_step(self.model, self.optimizer, rates.momentum, recipe.optimizer.clip_norm, norm)
        self._move_position_mean(step, position_sums / whole, void)
        values = torch.stack([loss, skill_of(loss, baseline), norm, _mean_std(target_sums), void, bad])
        record = StepRecord(
            step + 1, (step + 1) * whole / len(self.source), rates, values, whole, flops * self.world.size, waited
        )
        if self.monitor.add(record):
            self.read()

    def read(self) -> None:
        """Have the monitor read and write what is pending, and act on it.

        Raises:
            RunError: too many void steps in a row, or too many unreadable images.
        """
        for row in self.monitor.flush():
            self._check_images(row)
            self._watch(row)

    @torch.no_grad()
    def _move_position_mean(self, step: int, mean: Tensor, void: Tensor) -> None:
        weight = max(_MEAN_WEIGHT, 1 / (step + 1)) * (1 - void)
        self.model.position_mean.lerp_(torch.nan_to_num(mean), weight)

    def _replaced(self, batch: Batch) -> int:
        """Name the unreadable images of a batch, and return how many of its crops should have shown one."""
        if not batch.replaced:
            return 0
        new = [name for name in dict.fromkeys(batch.replaced) if name not in self.named]
        self.named.update(new)
        self.counts.replaced_names += new[: max(0, 100 - len(self.counts.replaced_names))]
        for name in new:
            self.monitor.say(f"unreadable, replaced by the next image of its epoch: {name}")
        places = np.array(batch.positions) // self.recipe.data.crops_per_decode
        return int((self.order.indices(places) != np.array(batch.indices)).sum())

    def _check_images(self, row: dict[str, Any]) -> None:
        """Stop if too many images have been unreadable. All ranks have the same counts, so all stop after this step."""
        counts, data = self.counts, self.recipe.data
        counts.seen += self.recipe.batch.total
        if "replaced" not in row:
            return
        counts.replaced += row["replaced"]
        bad, seen = (count // data.crops_per_decode for count in (counts.replaced, counts.seen))
        if too_many(bad, seen, len(self.source), data.replaced_limit, shuffled=data.order == "global"):
            names = _together(self.world, counts)["replaced_names"]
            raise RunError(
                f"{bad} of {seen} images are unreadable, more than data.replaced_limit = {data.replaced_limit}; "
                f"the first: {', '.join(names[:5])}"
            )

    def _watch(self, row: dict[str, Any]) -> None:
        """Stop after too many void steps in a row, naming the samples of the last."""
        if not row.get("void"):
            self.counts.void_in_a_row = 0
            return
        self.counts.void_in_a_row += 1
        if self.counts.void_in_a_row > self.recipe.optimizer.nonfinite_limit:
            whole, crops = self.recipe.batch.total, self.recipe.data.crops_per_decode
            places = range((row["step"] - 1) * whole // crops, row["step"] * whole // crops)  # crops divide a batch
            indices = list(dict.fromkeys(self.order.indices(places).tolist()))
            names = ", ".join(self.source.name(index) for index in indices[:8])
            more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
            raise RunError(
                f"{self.counts.void_in_a_row} steps in a row had a non-finite gradient (each was void), the last is "
                f"step {row['step']} with {names}{more}; lower the learning rates or set --precision.autocast none, "
                f"which takes a new --output"
            )


def _mean_std(sums: Tensor) -> Tensor:
    """Mean over channels of the standard deviation over tokens, from (3, D) counts, sums and sums of squares."""
    count, total, squares = sums.double()
    return (squares / count - (total / count).square()).clamp(min=0).sqrt().mean().float()
