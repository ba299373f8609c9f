"""Saves a run's state from all of its ranks during training.

Weights that every rank holds are written by rank 0, as one process writes them. Sharded weights are written by
torch.distributed.checkpoint into its safetensors storage, each rank its own part, without gathering anything. Training
waits only for a copy of that part in host memory; a thread writes it during the next steps, and then the ranks share
the work of computing the files' checksums. The checkpoint is complete when it is renamed: `state.json` lists every
file with its size and its SHA-256.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ijepa.checkpoint.format import begin, complete, named_tensors, remove_on_error, save_checkpoint
from ijepa.checkpoint.state import describe
from ijepa.distributed.local_tensors import as_sharded, to_local
from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA


class Saver:
    """Saves into `folder`, keeps the latest `keep` checkpoints, and writes at most one at a time.

    `saved` is called on rank 0 with the step of each complete checkpoint. Everything that the ranks exchange goes
    through the group `world.files`.
    """

    def __init__(self, folder: Path, keep: int, world: World, saved: Callable[[int], None] = lambda step: None) -> None:
        self.folder, self.keep, self.saved = folder, keep, saved
        self.world = replace(world, host=world.files)
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save the state after `step`; sharded weights are only copied before this returns. Every rank calls it.

        Raises:
            RunError: this checkpoint, or the last one if it was not finished, could not be written.
        """
        self.finish()
        if self.world.mesh is None:
            self.world.run_on_rank0(lambda: self._save_whole(step, model, optimizer, state))
            return
        copies = {name: self._copy(tensor) for name, tensor in named_tensors(model, optimizer).items()}
        # A daemon, because a run that ends with an error must not wait for ranks that are lost.
        self._thread = Thread(target=self._save_shards, args=(step, copies, state), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the current checkpoint is saved.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _save_whole(self, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        save_checkpoint(self.folder, step, model, optimizer, state, self.keep)
        self.saved(step)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, or this rank's part of it, into host memory."""
        # `copy`: on a CPU `to` would return the same memory, which the next step changes.
        part = to_local(tensor.detach()).to("cpu", copy=True)
        return as_sharded(part, tensor, self.world.cpu_mesh)

    def _save_shards(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        world = self.world
        try:
            with remove_on_error(self.folder, step):
                partial = world.run_on_rank0(lambda: begin(self.folder, step))
                write_shards(partial, tensors, world)
                names = world.run_on_rank0(lambda: sorted(file.name for file in partial.glob("*.safetensors")))
                # Rank n describes file n, which it has written itself and reads from its page cache.
                listed = world.map_items(names, lambda name: describe(partial / name))
                files = dict(zip(names, listed, strict=True))
                world.run_on_rank0(lambda: self._complete(step, {**state, "files": files}))
        except BaseException as error:  # torch's CheckpointException is not an Exception
            self._failure = error

    def _complete(self, step: int, state: dict[str, Any]) -> None:
        complete(self.folder, step, state, self.keep)
        self.saved(step)


def write_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write every rank's part of some tensors into `folder` with torch.distributed.checkpoint.

    Raises:
        OSError: the first one on any rank.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=world.host)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first if isinstance(first, OSError) else OSError(str(first)) from None
