"""A run's state on disk, complete or absent: tensors in safetensors, the rest in JSON, no pickle.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors
                  optimizer.safetensors (moments, by parameter name; each position's mean target)  state.json
    step-00001000/shard-00001-model-00001-of-00001.safetensors ... (the same tensors, a file a rank)  state.json
    damaged-step-00002000/ (what `--resume last-good` has skipped)

The first form is one process's, also where several hold the same weights; the second is that of sharded weights,
written by `ijepa.checkpoint.saver`. Both are read alike, by any number of ranks.

A checkpoint is written into a folder beside, flushed, and renamed: a folder named `step-...` is whole. Because every
random draw is a function of the step, the step is all the state that data, masks and schedules have.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ijepa.checkpoint.reader import (
    EARLIER,
    FILES,
    FORMAT,
    PARTS,
    Stored,
    checkpoint_name,
    describe,
    listed_files,
    read_state,
    seal,
    step_of,
    verify_file,
)
from ijepa.distributed.local_tensors import as_sharded, local, rows_of
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.model.ijepa import IJEPA
from ijepa.model.parameter_groups import trained
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import fsync_path, write_text


class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


def named_checkpoints(folder: Path) -> list[Path]:
    """Return everything in `folder` that is named like a checkpoint, whether it is one or not, earliest first."""
    if not folder.is_dir():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, earliest first."""
    return [path for path in named_checkpoints(folder) if path.is_dir()]


def latest_name(folder: Path) -> str | None:
    """Return the name of the latest complete checkpoint in `folder`, None if there is none."""
    saved = list_checkpoints(folder)
    return saved[-1].name if saved else None


def save_checkpoint(
    folder: Path, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Save the state after `step` steps into `folder` and drop all but the latest `keep` checkpoints.

    Raises:
        RunError: when the disk refuses; earlier checkpoints are untouched and nothing half-written stays.
    """
    tensors = _by_file(named_tensors(model, optimizer))
    with refusing_disk(folder, step):
        beside = begin(folder, step)
        for part, each in tensors.items():
            _save(beside / f"{part}.safetensors", each)
        listed = SINGLE_PROCESS.map_items(FILES, lambda name: describe(beside / name))
        return complete(folder, step, {**state, "files": dict(zip(FILES, listed, strict=True))}, keep)


def begin(folder: Path, step: int) -> Path:
    """Make the empty folder in which a step's checkpoint is written, beside its place; remove what kills have left.

    One checkpoint at a time is under way in `folder`, and no rank writes to it before this has returned.
    """
    for left in [*folder.glob(".step-*.partial")]:
        shutil.rmtree(left, ignore_errors=True)
    beside = folder / f".{checkpoint_name(step)}.partial"
    beside.mkdir(parents=True)
    return beside


def complete(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state.json` beside a step's tensors, put the checkpoint in its place, and drop all but the latest.

    `state["files"]` lists the files of tensors.
    """
    whole, beside = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.partial"
    write_text(beside / "state.json", seal({"format": FORMAT, "step": step, **state}))
    fsync_path(beside)
    if whole.exists():
        _drop(whole)
    beside.rename(whole)
    fsync_path(folder)
    for old in list_checkpoints(folder)[:-keep]:
        with suppress(OSError):
            _drop(old)
    return whole


def _drop(old: Path) -> None:
    """Remove a checkpoint, which is none from the first moment on: a kill leaves what `begin` removes."""
    aside = old.rename(old.with_name(f".{old.name}.old.partial"))
    shutil.rmtree(aside, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is neither resumed nor counted; an earlier one of its step goes.

    Raises:
        RunError: the disk refuses.
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


def verify_checkpoint(path: Path, settings: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Compare a checkpoint with its checksums and with the run, and return its `state.json`. Every rank calls it.

    The ranks share the files, and each hashes its share in threads. A core computes SHA-256 at 1.9 GB/s (measured on
    an AMD EPYC, Zen 5, with SHA instructions). ViT-H's checkpoint has 10.4 GB: that is 5.5 s of computing, thus 0.7 s
    on eight ranks, and 2.7 s on one process with cores enough, whose largest file has half of the bytes. A disk that
    reads less than that sets the time.

    Args:
        path: the checkpoint's folder.
        settings: what determines the run's result, by key; keys that the checkpoint does not state are not compared.
        world: the ranks.

    Raises:
        UserError: on every rank, the first file that is missing or damaged, or a checkpoint of another run.
    """
    state = world.run_on_rank0(lambda: read_state(path))
    there = state.get("recipe", {})
    for key in sorted(settings.keys() & there.keys()):
        if there[key] != settings[key]:
            raise UserError(path / "state.json", f"is of a run with {key} = {there[key]}, not {settings[key]}", EARLIER)
    world.map_items(sorted(listed_files(state)), lambda name: verify_file(path, state, name))
    return state


@contextmanager
def refusing_disk(folder: Path, step: int) -> Iterator[None]:
    """Turn what a disk says into one line, and leave nothing half-written.

    Raises:
        RunError: naming the checkpoint, the reason, and the last good one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder / f".{checkpoint_name(step)}.partial", ignore_errors=True)
        left = list_checkpoints(folder)
        kept = f"; the last good checkpoint is {left[-1].name}" if left else ""
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{folder / checkpoint_name(step)}: checkpoint not saved: {reason}{kept}") from None


@torch.no_grad()
def load_checkpoint(path: Path, model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimiser, in place, and return its `state.json`.

    Of a model that is spread over ranks, each rank reads its own part, however many there were when it was saved.

    Raises:
        UserError: when a file is missing, damaged, or of other shapes.
    """
    stored, like = Stored(path), named_tensors(model, optimizer)
    stored.check({name: tuple(tensor.shape) for name, tensor in like.items()})
    for name, tensor in model.state_dict().items():
        local(tensor).copy_(stored.rows(name, rows_of(tensor)))
    for name, parameter, held in trained(model, optimizer):
        device, rows = held.device, rows_of(parameter)
        optimizer.state[held] = {
            "step": stored.rows(f"step.{name}").to(device),
            "exp_avg": stored.rows(f"exp_avg.{name}", rows).to(device),
            "exp_avg_sq": stored.rows(f"exp_avg_sq.{name}", rows).to(device),
        }
    return stored.state


def load_part(module: nn.Module, folder: Path, part: str) -> None:
    """Load one of the model's parts from a checkpoint or a weights folder into a module that is not spread.

    Raises:
        UserError: naming the first key that is missing, unknown, or of another shape.
    """
    file = folder / f"{part}.safetensors"
    verify_part(folder, part, set())
    if file.exists() or not (folder / "state.json").exists():
        load_module(module, file)
        return
    stored, prefix = Stored(folder), f"{part}."
    like = module.state_dict()
    stored.check({prefix + name: tuple(tensor.shape) for name, tensor in like.items()}, prefix)
    module.load_state_dict({name: stored.rows(prefix + name) for name in like})


def verify_part(folder: Path, part: str, verified: set[str]) -> None:
    """Compare the files in which a part of the model lies with the checksums of the checkpoint, if it is one.

    Files named in `verified` are left out; those that have been compared are added to it.

    Raises:
        UserError: the first file that is missing or damaged.
    """
    if not (folder / "state.json").exists():
        return
    state = read_state(folder)
    names, own = listed_files(state).keys(), f"{part}.safetensors"
    new = sorted(({own} if own in names else {*names}) - verified)
    SINGLE_PROCESS.map_items(new, lambda name: verify_file(folder, state, name))
    verified.update(new)


def load_module(module: nn.Module, file: Path) -> None:
    """Load a module's weights from one safetensors file.

    Raises:
        UserError: naming the first key that is missing, unknown, or of another shape.
    """
    tensors = read_tensors(file)
    check_shapes(file, {name: tuple(like.shape) for name, like in module.state_dict().items()}, tensors)
    module.load_state_dict(tensors)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: where it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(file, "does not exist", f"the checkpoint is not whole; {EARLIER}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(file, f"not a whole safetensors file ({error})", EARLIER) from None


def check_shapes(file: Path, wanted: dict[str, tuple[int, ...]], tensors: Mapping[str, Shaped]) -> None:
    """Refuse tensors that are not exactly those wanted, by name and shape."""
    for name in sorted({*wanted, *tensors}):
        if name not in tensors:
            raise UserError(file, f"{name} is missing", "the file belongs to another model")
        if name not in wanted:
            raise UserError(file, f"{name} is unknown", "the file belongs to another model")
        if tuple(tensors[name].shape) != wanted[name]:
            raise UserError(
                file,
                f"{name} has shape {tuple(tensors[name].shape)}, the recipe's model {wanted[name]}",
                "use the recipe the file was trained with",
            )


def named_tensors(model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name; sharded where the weights are."""
    tensors = dict(model.state_dict())
    for name, parameter, held in trained(model, optimizer):
        state = optimizer.state.get(held) or {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(held),
            "exp_avg_sq": torch.zeros_like(held),
        }
        tensors[f"step.{name}"] = state["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = as_sharded(state[key].detach(), parameter)
    return tensors


def _by_file(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Distribute tensors over the files of a checkpoint by one process."""
    files: dict[str, dict[str, Tensor]] = {part: {} for part in (*PARTS, "optimizer")}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part in PARTS:
            files[part][key] = tensor
        else:
            files["optimizer"][name] = tensor
    return files


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    with file.open("rb+") as written:
        os.fsync(written.fileno())
