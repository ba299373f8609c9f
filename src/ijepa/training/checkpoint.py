"""A run's state on disk, complete or absent: tensors in safetensors, the rest in JSON, no pickle.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors
                  optimizer.safetensors (moments, by parameter name; each position's mean target)  state.json

A checkpoint is written into a folder beside, flushed, and renamed: a folder named `step-...` is whole. Because every
random draw is a function of the step, the step is all the state that data, masks and schedules have.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ijepa.errors import Failed, Refused
from ijepa.files import read_json, write_json
from ijepa.model.jepa import IJEPA

PARTS = ("context_encoder", "target_encoder", "predictor")
FORMAT = 1
_NAME = re.compile(r"step-(\d{8})$")


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, earliest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir())


def save_checkpoint(
    folder: Path, step: int, model: IJEPA, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Save the state after `step` steps into `folder` and drop all but the latest `keep` checkpoints.

    Raises:
        Failed: when the disk refuses; earlier checkpoints are untouched and nothing half-written stays.
    """
    whole, beside = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for part in PARTS:
            _save(beside / f"{part}.safetensors", getattr(model, part).state_dict())
        _save(beside / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
        write_json(beside / "state.json", {"format": FORMAT, "step": step, **state})
        _flush(beside)
        if whole.exists():
            shutil.rmtree(whole)
        beside.rename(whole)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        left = list_checkpoints(folder)
        kept = f"; the last good checkpoint is {left[-1].name}" if left else ""
        reason = getattr(error, "strerror", None) or str(error)
        raise Failed(f"{whole}: checkpoint not saved: {reason}{kept}") from None
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def load_checkpoint(path: Path, model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimiser, in place, and return its `state.json`.

    Raises:
        Refused: when a file is missing, damaged, or of other shapes.
    """
    state = read_json(path / "state.json")
    if state.get("format") != FORMAT:
        raise Refused(path / "state.json", f"format {state.get('format')}", f"this version reads format {FORMAT}")
    for part in PARTS:
        load_module(getattr(model, part), path / f"{part}.safetensors")
    file = path / "optimizer.safetensors"
    tensors = read_tensors(file)
    shapes = {"position_mean": model.position_mean}
    for name, parameter in _parameters(model, optimizer):
        for key in ("exp_avg", "exp_avg_sq"):
            shapes[f"{key}.{name}"] = parameter
        shapes[f"step.{name}"] = torch.tensor(0.0)
    check_shapes(file, {key: tuple(like.shape) for key, like in shapes.items()}, tensors)
    model.position_mean.copy_(tensors["position_mean"])
    for name, parameter in _parameters(model, optimizer):
        optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"].to(parameter.device),
            "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
        }
    return state


def load_module(module: nn.Module, file: Path) -> None:
    """Load a module's weights from one safetensors file.

    Raises:
        Refused: naming the first key that is missing, unknown, or of another shape.
    """
    tensors = read_tensors(file)
    check_shapes(file, {name: tuple(like.shape) for name, like in module.state_dict().items()}, tensors)
    module.load_state_dict(tensors)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        Refused: where it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise Refused(file, "does not exist", "the checkpoint is not whole; use an earlier one") from None
    except (SafetensorError, OSError) as error:
        raise Refused(file, f"not a whole safetensors file ({error})", "use an earlier checkpoint") from None


def check_shapes(file: Path, wanted: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those wanted, by name and shape."""
    for name in sorted({*wanted, *tensors}):
        if name not in tensors:
            raise Refused(file, f"{name} is missing", "the file belongs to another model")
        if name not in wanted:
            raise Refused(file, f"{name} is unknown", "the file belongs to another model")
        if tuple(tensors[name].shape) != wanted[name]:
            raise Refused(
                file,
                f"{name} has shape {tuple(tensors[name].shape)}, the recipe's model {wanted[name]}",
                "use the recipe the file was trained with",
            )


def _parameters(model: IJEPA, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in held]


def _optimizer_tensors(model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"position_mean": model.position_mean}
    for name, parameter in _parameters(model, optimizer):
        state = optimizer.state.get(parameter) or {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        tensors |= {f"{key}.{name}": value for key, value in state.items()}
    return tensors


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def _flush(folder: Path) -> None:
    """Make a folder's entries durable before anything relies on them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
