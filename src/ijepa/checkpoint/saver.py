"""Saving a run's state from all of its ranks, beside training.

Weights that every rank holds are written by rank 0 as one process writes them. Sharded ones are written by
torch.distributed.checkpoint into its safetensors storage, each rank its own part, without gathering anything:
training waits for a copy of that part in memory, and a thread writes it while the next steps run; then the ranks
share the work of computing the files' checksums. What is then renamed into its place is complete: `state.json` names
every file with its size and its SHA-256.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ijepa.checkpoint.format import begin, complete, named_tensors, refusing_disk, save_checkpoint
from ijepa.checkpoint.reader import describe
from ijepa.distributed.local_tensors import as_sharded, local
from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA


class Saver:
    """Saves into `folder`, keeps the latest `keep`, and has at most one checkpoint under way.

    `saved` is called by rank 0 with the step of each checkpoint that is complete.
    """

    def __init__(self, folder: Path, keep: int, world: World, saved: Callable[[int], None] = lambda step: None) -> None:
        self.folder, self.keep, self.world, self.saved = folder, keep, world, saved
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save the state after `step`; sharded weights are only copied now. Every rank calls it.

        Raises:
            RunError: this checkpoint, or the last one if that was still under way, could not be written.
        """
        self.finish()
        if self.world.mesh is None:
            self._write(lambda: self.world.run_on_rank0(lambda: self._plain(step, model, optimizer, state)))
            return
        copies = {name: self._copy(tensor) for name, tensor in named_tensors(model, optimizer).items()}
        self._thread = Thread(target=self._write, args=(lambda: self._sharded(step, copies, state),), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until what is under way is saved.

        Raises:
            RunError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _write(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._failure = error
        if self._thread is None and self._failure is not None:
            raise self._failure

    def _plain(self, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        save_checkpoint(self.folder, step, model, optimizer, state, self.keep)
        self.saved(step)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, or this rank's part of it, into host memory."""
        part = local(tensor.detach()).to("cpu", copy=True)
        return as_sharded(part, tensor, self.world.cpu_mesh)

    def _sharded(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        world = replace(self.world, host=self.world.files)
        with refusing_disk(self.folder, step):
            beside = world.run_on_rank0(lambda: begin(self.folder, step))
            write_shards(beside, tensors, world)
            names = world.run_on_rank0(lambda: sorted(file.name for file in beside.glob("*.safetensors")))
            # File n is the one that rank n has written, so each rank reads its own from its page cache.
            files = dict(zip(names, world.map_items(names, lambda name: describe(beside / name)), strict=True))
            world.run_on_rank0(lambda: self._complete(step, {**state, "files": files}))

    def _complete(self, step: int, state: dict[str, Any]) -> None:
        complete(self.folder, step, state, self.keep)
        self.saved(step)


def write_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write every rank's part of some tensors into `folder` with torch.distributed.checkpoint.

    Raises:
        OSError: the first that any rank met.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=world.host)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first if isinstance(first, OSError) else OSError(str(first)) from None
