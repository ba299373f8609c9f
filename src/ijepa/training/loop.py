"""Pretraining: batches in, weights out, with logs, checkpoints and measurements on the way."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.run_dir import claim, fixed_settings, note_checkpoint, settings
from ijepa.checkpoint.saver import Saver
from ijepa.config.recipe import Recipe
from ijepa.data.loading.loader import Loader, LoaderConfig
from ijepa.data.loading.shuffle import Order
from ijepa.data.sources.base import Source
from ijepa.distributed.launch import join_training
from ijepa.distributed.process_group import StopFlag, World
from ijepa.distributed.stragglers import StragglerDetector
from ijepa.distributed.watchdog import Watchdog
from ijepa.masking.packing import Packer
from ijepa.model.ijepa import IJEPA
from ijepa.training.device_prefetch import GarbageCollection
from ijepa.training.interrupts import Interrupted, caught_signals, stop_request
from ijepa.training.limits import Counts, FailureLimits
from ijepa.training.metrics import Monitor
from ijepa.training.model_setup import compiles, token_budget
from ijepa.training.optimizer import make_optimizer
from ijepa.training.parallelize import parallelize
from ijepa.training.profiler import Profile, Window
from ijepa.training.resume import Resume, find_start
from ijepa.training.runtime import DEFAULT_NUMERICS, Numerics, Resolved, setup_device
from ijepa.training.step import TrainingStep

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Callback:
    """A measurement: `measure(model)` after every `every` steps, at the start and at the end.

    If the state of a step is saved, it is saved first. So a measurement that fails costs no step, and one that a kill
    has cut off is made by the resume.
    """

    every: int
    measure: Callable[[IJEPA], dict[str, float]]
    remarks: Callable[[], Sequence[str]] = tuple
    """Returns lines to show, once the measurement has been written to the run's files."""


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
    numerics: Numerics = DEFAULT_NUMERICS,
) -> IJEPA:
    """Pretrain by a recipe on a data set into a run's folder, or resume the run from its last checkpoint.

    Args:
        recipe: what to train.
        source: the images.
        output: the run's folder.
        resume: what to do with a run that exists. Its checkpoint is compared with its checksums. If it is damaged,
            "last-good" resumes the latest undamaged one, and renames those after it.
        callbacks: measurements.
        quiet: whether nothing is shown.
        info: added to `run.json`.
        profile: steps that are traced into RUN/profile.
        initial: weights of a new run by their names in the model; the others are drawn.
        numerics: dtype and kernels.

    Raises:
        UserError: before anything is written: a folder with another run, or one that another process writes; other data
            than those of the run; a damaged checkpoint; a recipe that this machine does not support.
        Interrupted: by a signal; the state is saved.
        RunError: too many unreadable images or void steps in a row, or a full disk.
    """
    recipe.lengths(len(source))  # refuse a schedule that does not fit before processes wait for each other
    facts = {**settings(recipe), "data": source.fingerprint, "--resume": resume}
    del facts["data.path"]  # each machine may have its own copy
    with join_training(recipe, facts) as world, ExitStack() as held:
        world.run_on_rank0(lambda: held.enter_context(claim(output)))
        trainer = Trainer(recipe, source, output, world, resume, quiet, info or {}, profile, initial, numerics)
        trainer.run(callbacks)
    return trainer.model


class Trainer:
    """Trains in a folder that this process holds; for the arguments, see `pretrain`."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        output: Path,
        world: World,
        resume: Resume,
        quiet: bool,
        info: dict[str, Any],
        profile: Window | None,
        initial: Mapping[str, Callable[[], Tensor]] | None,
        numerics: Numerics,
    ) -> None:
        self.recipe, self.world, self.lengths = recipe, world, recipe.lengths(len(source))
        start = find_start(world, recipe, source, output, resume)
        run, self.resolved, device = start.run, start.resolved, setup_device(start.resolved, recipe.deterministic)
        distributed = parallelize(recipe, device, world, autocast=self.resolved.autocast, numerics=numerics)
        self.model = distributed.model
        self.optimizer = make_optimizer(self.model, recipe.optimizer, fused=numerics.fused_optimizer)
        start.load(world, self.model, self.optimizer, initial)
        self.start = start.step
        about = {"images": len(source), "fingerprint": source.fingerprint}
        about |= {"ranks": world.size, "strategy": world.strategy, "resolved": asdict(self.resolved)}
        self.measured, problems = world.run_on_rank0(lambda: start.write(recipe, {**about, **info}))
        self.monitor = Monitor(
            run,
            total=self.lengths.total,
            start=self.start,
            log_every=recipe.log_every,
            quiet=quiet,
            rank=world.rank,
            stragglers=StragglerDetector(world, self.model, device),
        )
        if world.rank == 0:
            start.log(problems)
        order = Order(recipe.seed, len(source), recipe.data.order, recipe.data.block, recipe.data.window)
        self.limits = FailureLimits(recipe, source, order, world, Counts(**start.state.get("counts", {})))
        self.watchdog = Watchdog(
            world,
            recipe.parallel.timeout,
            lambda: next((path.name for path in reversed(list_checkpoints(run.checkpoints))), None),
            compiles=compiles(recipe, device),
        )
        world.lift_timeouts()  # from here on, the watchdog decides
        self.profile = Profile(profile, run.folder / "profile", device, world.rank)
        self.saver = Saver(run.checkpoints, recipe.checkpoint.keep, world, lambda step: note_checkpoint(run, step))
        self.loader = make_loader(recipe, source, order, self.resolved, world)
        self.take_step = TrainingStep(
            recipe,
            self.lengths,
            len(source),
            self.resolved,
            distributed,
            self.optimizer,
            report=self.watchdog.report,
            count_replaced=self.limits.count_replaced,
        )

    def run(self, callbacks: Sequence[Callback]) -> None:
        """Train to the end, and save and measure on the way."""
        total, flag = self.lengths.total, StopFlag(self.world)
        # The watchdog closes last, because the others may wait for a device, and a lost rank must still be named.
        with (
            closing(self.watchdog),
            closing(self.monitor),
            closing(self.profile),
            closing(self.loader.iterate(self.start, total)) as batches,  # type: ignore[type-var]
            caught_signals() as signals,
            self.watchdog.leave_on_collective_error(),
            GarbageCollection() as garbage,
        ):
            self._measure(callbacks, self.start, self.measured)
            for step in range(self.start + 1, total + 1):
                self.profile.before(step)
                if self.monitor.add(self.take_step(step - 1, batches)):
                    self._flush()
                self.profile.after(step)
                lost, orphaned = self.monitor.output_lost, self.watchdog.orphaned
                stop = flag.exchange(stop_request(signals, output_lost=lost, launcher_lost=orphaned))
                if stop or step == total or step % self.recipe.checkpoint.every == 0:
                    self._save(step)
                if stop or step == total:
                    self.saver.finish()  # otherwise a thread saves during the next steps
                if stop and step < total:
                    raise Interrupted(stop, step)
                garbage.run(step)
                self._measure(callbacks, step)

    def _save(self, step: int) -> None:
        self._flush()  # then the device has finished the step, and saving does not wait for it
        self.monitor.sync()
        state = {
            "recipe": fixed_settings(self.recipe),
            "resolved": asdict(self.resolved),
            "counts": self.limits.state(),
        }
        # The watchdog ignores saving, because its collectives have the limit `parallel.timeout`.
        self.watchdog.report(step, "saving")
        self.saver.save(step, self.model, self.optimizer, state)

    def _measure(self, callbacks: Sequence[Callback], step: int, done: int = 0) -> None:
        """Call the callbacks that are due after `step`, except the first `done`, whose measurements exist already."""
        due = [callback for callback in callbacks if step % callback.every == 0 or step == self.lengths.total]
        for callback in due[done:]:
            self._flush()
            self.watchdog.report(step, "diagnosing")
            self.monitor.diagnose(step, lambda call=callback: call.measure(self.model))  # type: ignore[misc]
            for line in callback.remarks() if self.world.rank == 0 else ():
                _LOG.info(line)

    def _flush(self) -> None:
        """Write the metrics of pending steps, and stop the run if they exceed a limit."""
        self.limits.check(self.monitor.flush())


def make_loader(recipe: Recipe, source: Source, order: Order, resolved: Resolved, world: World) -> Loader:
    """Return the loader of a rank's micro-batches."""
    encoder, data = recipe.model.encoder, recipe.data
    config = LoaderConfig(
        seed=recipe.seed,
        image_size=recipe.model.image_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        global_batch=recipe.batch.total,
        micro_batch=resolved.micro,
        rank=world.rank,
        world_size=world.size,
        workers=resolved.workers,
        prefetch=data.prefetch,
        timeout=recipe.parallel.timeout / 3,  # before other ranks give up waiting for this one
        crops_per_decode=data.crops_per_decode,
    )
    packer = Packer(
        recipe.mask,
        recipe.model.grid,
        recipe.seed,
        recipe.batch.total,
        encoder.depth,
        encoder.drop_path,
        token_budget(recipe, resolved.micro, torch.device(resolved.device)),
    )
    return Loader(source, config, packer, order, on_restart=_LOG.info)
