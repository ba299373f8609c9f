"""Where a run starts: from nothing, or from a checkpoint of the run that the folder holds."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ijepa.checkpoint.format import load_checkpoint, named_checkpoints, set_aside
from ijepa.checkpoint.run_dir import Run, fixed_settings, noted_checkpoint, open_run, start_run
from ijepa.checkpoint.verify import verify_checkpoint
from ijepa.config.recipe import Recipe
from ijepa.data.sources.base import Source
from ijepa.distributed.local_tensors import copy_shards
from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA
from ijepa.training.metrics import truncate_logs
from ijepa.training.runtime import Resolved, resolve
from ijepa.utils.errors import UserError

_LOG = logging.getLogger(__name__)

Resume = Literal["auto", "last-good", "never"]
"""What to do with a run that exists: resume its latest checkpoint, its latest undamaged one, or refuse it."""


@dataclass
class Start:
    """Where a run starts."""

    run: Run
    exists: bool
    resolved: Resolved
    checkpoint: Path | None = None
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Later checkpoints that cannot be used, and why."""
    state: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's `state.json`; empty for a new run."""

    @property
    def step(self) -> int:
        """The last step that is saved."""
        return int(self.state.get("step", 0))

    def load(
        self,
        world: World,
        model: IJEPA,
        optimizer: torch.optim.Optimizer,
        initial: Mapping[str, Callable[[], Tensor]] | None,
    ) -> None:
        """Load the checkpoint into model and optimizer, or for a new run the weights `initial`, by name."""
        checkpoint = self.checkpoint
        if checkpoint is not None:
            self.state = world.raise_on_any_rank(lambda: load_checkpoint(checkpoint, model, optimizer))
        elif initial:
            world.raise_on_any_rank(lambda: copy_shards(model, initial))

    def write(self, recipe: Recipe, info: dict[str, Any]) -> tuple[int, list[str]]:
        """Create a new run with `info` in its `run.json`, or truncate the logs of one that is resumed; on rank 0 only.

        Returns:
            How many measurements after the first step exist already, and what is wrong with the logs.
        """
        if not self.exists:
            start_run(self.run, recipe, info)
        for path, _ in self.skipped:
            set_aside(path)
        return truncate_logs(self.run, self.step)

    def log(self, problems: list[str]) -> None:
        """Log what is resumed, and what is wrong with the logs."""
        if self.checkpoint is not None:
            for path, problem in self.skipped:
                _LOG.info("skipped %s, renamed to damaged-%s: %s", path.name, path.name, problem)
            _LOG.info("resuming %s after step %d", self.run.folder, self.step)
        for line in problems:
            _LOG.info(line)


def find_start(world: World, recipe: Recipe, source: Source, output: Path, resume: Resume) -> Start:
    """Find out where a run in the folder `output` starts; write nothing. Every rank calls it.

    All ranks verify checkpoints together, so they choose the same one.

    Raises:
        UserError: the folder holds something else, a run of another recipe or on other data, or one that has lost its
            checkpoints; the latest checkpoint is damaged and `resume` is not "last-good", or all are.
    """
    start, found = world.run_on_rank0(lambda: _open(recipe, source, output, resume, world.size))
    for path in found:
        try:
            verify_checkpoint(path, fixed_settings(recipe), world)
        except UserError as error:
            if resume != "last-good":
                raise
            start.skipped.append((path, f"{Path(error.where).name} {error.problem}"))
        else:
            start.checkpoint = path  # the latest one that is complete
            return start
    if start.skipped:
        path, problem = start.skipped[0]
        raise UserError(path.parent, f"contains no complete checkpoint: in {path.name}, {problem}")
    return start


def _open(recipe: Recipe, source: Source, output: Path, resume: Resume, ranks: int) -> tuple[Start, list[Path]]:
    """Open the run, and return its checkpoints, latest first; see `find_start`."""
    run, exists = open_run(output, recipe, resume=resume != "never")
    if not exists:
        return Start(run, exists, resolve(recipe, None, ranks)), []
    info = run.info()
    if not {"images", "resolved"} <= info.keys():
        raise UserError(
            run.info_file, "is not a run.json that a run wrote", "restore it, or choose a different --output"
        )
    if info["images"] != len(source):
        raise UserError(
            run.info_file,
            f"the run was started on {info['images']} images, but data.path has {len(source)}",
            "give the same data",
        )
    if info.get("fingerprint", source.fingerprint) != source.fingerprint:
        raise UserError(
            run.info_file,
            "the run was started on different data: names, sizes or order of its files differ from data.path",
            "give the same data, or choose a different --output",
        )
    found = named_checkpoints(run.checkpoints)[::-1]
    if not found and (first := noted_checkpoint(info)) is not None:
        raise UserError(
            run.checkpoints,
            f"contains no checkpoint, but the run has saved some, the first after step {first}",
            "restore them (is the disk mounted?), or choose a different --output",
        )
    return Start(run, exists, resolve(recipe, info["resolved"], ranks)), found
