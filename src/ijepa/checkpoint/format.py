"""A run's state on disk, complete or absent: tensors in safetensors, the rest in JSON, no pickle.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors
                  optimizer.safetensors (moments, by parameter name; the mean target of each position)  state.json
    step-00001000/shard-00001-model-00001-of-00001.safetensors ... (the same tensors, one file per rank)  state.json
    damaged-step-00002000/ (skipped by `--resume last-good`)

The first form is written by one process, also if several hold the same weights; the second is that of sharded weights,
written by `ijepa.checkpoint.saver`. Any number of ranks reads both.

A checkpoint is written into a hidden folder, flushed and renamed, so a folder named `step-...` is complete. Every
random draw is a function of the step, so data, masks and schedules have no state but the step.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ijepa.checkpoint.reader import CheckpointReader
from ijepa.checkpoint.state import FILES, FORMAT, PARTS, checkpoint_name, describe, seal, step_of
from ijepa.checkpoint.verify import verify_part
from ijepa.distributed.local_tensors import as_sharded, local_rows, to_local
from ijepa.distributed.process_group import SINGLE_PROCESS
from ijepa.model.ijepa import IJEPA
from ijepa.model.parameter_groups import trained
from ijepa.utils.errors import RunError
from ijepa.utils.files import fsync_path, write_text


def named_checkpoints(folder: Path) -> list[Path]:
    """Return everything in `folder` that is named like a checkpoint, whether it is one or not, earliest first."""
    if not folder.is_dir():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, earliest first."""
    return [path for path in named_checkpoints(folder) if path.is_dir()]


def save_checkpoint(
    folder: Path, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Save the state after `step` steps into `folder` and remove all but the latest `keep` checkpoints.

    Raises:
        RunError: the disk is full or fails; earlier checkpoints are untouched and nothing incomplete stays.
    """
    files: dict[str, dict[str, Tensor]] = {name: {} for name in FILES}
    for name, tensor in named_tensors(model, optimizer).items():
        part, _, key = name.partition(".")
        file, key = (f"{part}.safetensors", key) if part in PARTS else (FILES[-1], name)
        files[file][key] = tensor.detach().contiguous()
    with remove_on_error(folder, step):
        partial = begin(folder, step)
        for file, tensors in files.items():
            safetensors.torch.save_file(tensors, partial / file, {"format": "pt"})
            fsync_path(partial / file)
        listed = SINGLE_PROCESS.map_items(FILES, lambda name: describe(partial / name))
        return complete(folder, step, {**state, "files": dict(zip(FILES, listed, strict=True))}, keep)


def begin(folder: Path, step: int) -> Path:
    """Make the hidden, empty folder for a step's checkpoint; remove what kills have left.

    Only one checkpoint at a time is written in `folder`, and no rank writes before this has returned.
    """
    # Of any step: after a kill the run may resume from an earlier one and never come to that step again.
    for left in [*folder.glob(".step-*.partial")]:
        shutil.rmtree(left, ignore_errors=True)
    partial = _partial(folder, step)
    partial.mkdir(parents=True)
    return partial


def complete(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state.json` next to a step's tensors, rename the checkpoint, and remove all but the latest `keep`.

    `state["files"]` lists the files of tensors.
    """
    whole, partial = folder / checkpoint_name(step), _partial(folder, step)
    # The state comes last, so a folder without it is incomplete, whatever the rename did in a crash.
    write_text(partial / "state.json", seal({"format": FORMAT, "step": step, **state}))
    fsync_path(partial)
    if whole.exists():
        _remove(whole)
    partial.rename(whole)
    fsync_path(folder)
    for old in list_checkpoints(folder)[:-keep]:
        with suppress(OSError):  # the new checkpoint is good, and the next one tries again
            _remove(old)
    return whole


def _partial(folder: Path, step: int) -> Path:
    return folder / f".{checkpoint_name(step)}.partial"


def _remove(old: Path) -> None:
    """Rename a checkpoint first, so that a kill leaves something that `begin` removes, and not an incomplete one."""
    hidden = old.rename(old.with_name(f".{old.name}.old.partial"))
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def remove_on_error(folder: Path, step: int) -> Iterator[None]:
    """Remove an incomplete checkpoint if the disk is full or fails.

    Raises:
        RunError: naming the checkpoint, the reason, and the last good checkpoint.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_partial(folder, step), ignore_errors=True)
        left = list_checkpoints(folder)
        kept = f"; the last good checkpoint is {left[-1].name}" if left else ""
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{folder / checkpoint_name(step)}: checkpoint not saved: {reason}{kept}") from None


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to `damaged-...`, so that it is neither resumed nor counted; replace an earlier one.

    Raises:
        RunError: it cannot be renamed.
    """
    aside = path.with_name(f"damaged-{path.name}")
    try:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
        path.rename(aside)
    except OSError as error:
        raise RunError(f"{path}: cannot be renamed to {aside.name}: {error.strerror}") from None


@torch.no_grad()
def load_checkpoint(path: Path, model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer, in place, and return its `state.json`.

    If the model is sharded, each rank reads its own rows, however many ranks have saved them.

    Raises:
        UserError: a file is missing, damaged, or of other shapes.
    """
    # Shapes are compared before anything is copied, so a refused checkpoint changes nothing.
    reader, like = CheckpointReader(path), named_tensors(model, optimizer)
    reader.check({name: tuple(tensor.shape) for name, tensor in like.items()})
    for name, tensor in model.state_dict().items():
        to_local(tensor).copy_(reader.rows(name, local_rows(tensor)))
    for name, parameter, held in trained(model, optimizer):
        device, rows = held.device, local_rows(parameter)
        optimizer.state[held] = {
            "step": reader.rows(f"step.{name}").to(device),
            "exp_avg": reader.rows(f"exp_avg.{name}", rows).to(device),
            "exp_avg_sq": reader.rows(f"exp_avg_sq.{name}", rows).to(device),
        }
    return reader.state


def load_part(module: nn.Module, folder: Path, part: str) -> None:
    """Load one part of the model from a checkpoint into a module that is not sharded.

    Raises:
        UserError: a file is missing or damaged, or the first name that is missing, unknown, or of another shape.
    """
    verify_part(folder, part, set())
    reader, prefix, like = CheckpointReader(folder, part), f"{part}.", module.state_dict()
    reader.check({prefix + name: tuple(tensor.shape) for name, tensor in like.items()}, prefix)
    module.load_state_dict({name: reader.rows(prefix + name) for name in like})


def named_tensors(model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all tensors of a run by name; sharded if the weights are."""
    tensors = dict(model.state_dict())
    for name, parameter, held in trained(model, optimizer):
        # AdamW creates its state in the first step; before that, zeros stand for it.
        state = optimizer.state.get(held) or {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(held),
            "exp_avg_sq": torch.zeros_like(held),
        }
        tensors[f"step.{name}"] = state["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = as_sharded(state[key].detach(), parameter)
    return tensors
