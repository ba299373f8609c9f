"""From a command's words to a result on disk: find the weights and the data, add the baselines, run one protocol.

Beside every trained encoder stand, by the same protocol, the encoder as pretraining initialised it and raw pixels: what
an architecture knows before it has learned, and what the images give away by themselves.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ijepa.data.open import open_dataset
from ijepa.data.overlap import refuse_overlap
from ijepa.data.sources.base import Source
from ijepa.distributed.launch import join_evaluation, local_device
from ijepa.distributed.process_group import World
from ijepa.evaluation.classification import knn, linear_probe
from ijepa.evaluation.features.extract import Encoder, PixelEncoder, Progress, weights_hash
from ijepa.evaluation.features.precision import Autocast, name_of, resolved
from ijepa.evaluation.protocols import load_protocol
from ijepa.evaluation.results.store import file_for
from ijepa.evaluation.segmentation import evaluate as segmentation
from ijepa.evaluation.video import propagation
from ijepa.evaluation.video.dataset import find_videos
from ijepa.interop.heads import Head
from ijepa.interop.weights import Weights, Which, resolve_weights
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.environment import machine
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import write_json

_RUNNERS: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": linear_probe.evaluate_linear,
    "knn": knn.evaluate_knn,
    "segmentation": segmentation.evaluate_segmentation,
}


def evaluate(
    kind: str,
    weights: str | Mapping[str, str],
    train: str | None,
    test: str,
    *,
    protocol: str | None = None,
    which: Which = "target",
    seed: int = 0,
    baselines: bool = True,
    heads: int | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    train_list: str | None = None,
    test_list: str | None = None,
    devkit: str | None = None,
    labels: str | None = None,
    save_head: Path | None = None,
    autocast: Autocast | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate weights by one protocol and write the result; under torchrun, together.

    Args:
        kind: `linear`, `knn` or `segmentation`.
        weights: WEIGHTS, or several by the name that their row shall have; the first decides the baselines.
        train, test: paths of the labelled sets; protocols of level 0 have no train set, and leave it aside.
        protocol: a name or a YAML file; the kind's default if None.
        which: the encoder of a run that is evaluated.
        seed: of held-out splits and initial heads.
        baselines: also evaluate the initial encoder and raw pixels.
        heads: attention heads of weights that do not say how many they have.
        output: the result's folder; the run's `evaluations` if None, or the current folder where there is no run.
        progress: told a line now and then.
        train_list, test_list: files of image names, which choose a part of a set; see `data.sources.subset`.
        devkit: where ImageNet's validation classes are, if not beside the images.
        labels: label map of the masks, in the place of the protocol's and the sets' own.
        save_head: file for a linear probe's head, as `interop.heads` writes it.
        autocast: precision of the encoders, in the place of the protocol's.

    Returns:
        The result and its file.

    Raises:
        UserError: one line, before anything is written.
        RunError: an image cannot be decoded, features are not finite, or the result cannot be saved.
    """
    sets = _Sets(train, test, train_list, test_list, devkit)
    with join_evaluation() as ranks:
        task = _prepare(
            kind, weights, protocol, which, baselines, output, heads=heads, labels=labels, autocast=autocast
        )
        if getattr(task.protocol, "level", None) == 0:  # looks at one set alone
            sets = replace(sets, train=None, train_list=None)
        elif train is None:
            raise UserError("--train", f"is missing, and protocol {task.protocol.name} reads it", "give it")
        source, scored = sets.open(labelled=kind != "segmentation")
        if source is not None:
            refuse_overlap(source, scored)
        kept: dict[str, Any] = {}
        if save_head is not None and source is not None:
            _check_file(save_head)
            kept["keep"] = partial(_keep_head, save_head, source, ranks)
        result = _RUNNERS[kind](
            task.encoders,
            source,
            scored,
            task.protocol,
            seed=seed,
            cache=task.folder / ".features",
            progress=progress if ranks.rank == 0 else None,
            ranks=ranks,
            **kept,
        )
        for role, noted in sets.noted().items():
            result["data"][role] |= noted
        return _saved(kind, task, result, ranks)


@dataclass(frozen=True)
class _Sets:
    """Both sets as they were named; `train` is None where there is none."""

    train: str | None
    test: str
    train_list: str | None
    test_list: str | None
    devkit: str | None

    def open(self, *, labelled: bool) -> tuple[Source | None, Source]:
        """Return train and test; `labelled` where images' own classes are wanted."""
        opened = partial(open_dataset, devkit=self.devkit, require_labels=labelled)
        train = None
        if self.train is not None:
            train = opened(self.train, where="--train", split="train", names=self.train_list)
        return train, opened(self.test, where="--test", split="val", names=self.test_list)

    def noted(self) -> dict[str, dict[str, str]]:
        """Return what a result says of where each set came from."""
        named = (("train", self.train, self.train_list), ("test", self.test, self.test_list))
        return {
            role: {"path": path} | ({} if listed is None else {"list": listed})
            for role, path, listed in named
            if path is not None
        }


def evaluate_videos(
    weights: str | Mapping[str, str],
    data: str,
    *,
    protocol: str | None = None,
    which: Which = "target",
    seed: int = 0,
    baselines: bool = True,
    heads: int | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    autocast: Autocast | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate weights by carrying labels through the videos at `data` and write the result; else as `evaluate`."""
    with join_evaluation() as ranks:
        task = _prepare("propagation", weights, protocol, which, baselines, output, heads=heads, autocast=autocast)
        result = propagation.evaluate_propagation(
            task.encoders,
            find_videos(Path(data)),
            task.protocol,
            seed=seed,
            progress=progress if ranks.rank == 0 else None,
            ranks=ranks,
        )
        result["data"]["test"]["path"] = data
        return _saved("propagation", task, result, ranks)


@dataclass(frozen=True)
class _Task:
    """What is evaluated by which protocol, and where the result goes."""

    weights: Mapping[str, Weights]
    which: Which
    protocol: Any
    folder: Path
    encoders: dict[str, Encoder]
    dtype: torch.dtype
    """What encoders compute in."""


def _prepare(
    kind: str,
    weights: str | Mapping[str, str],
    protocol: str | None,
    which: Which,
    baselines: bool,
    output: Path | None,
    *,
    heads: int | None = None,
    **instead: Any,
) -> _Task:
    """Return what is evaluated; `instead` are fields that take the place of the protocol's, where they are not None."""
    named = {"trained": weights} if isinstance(weights, str) else dict(weights)
    chosen = load_protocol(kind, protocol)
    chosen = chosen.model_copy(update={key: value for key, value in instead.items() if value is not None})
    found = {name: resolve_weights(path, heads=heads) for name, path in named.items()}
    first = next(iter(found.values()))
    folder = output or (first.run / "evaluations" if first.run else Path())
    _check_folder(folder)
    encoders: dict[str, Encoder] = {name: each.encoder(which) for name, each in found.items()}
    if baselines:
        shape = first.recipe.model
        encoders["random"] = FrozenEncoder.initial(shape, first.recipe.seed)
        encoders["pixels"] = PixelEncoder(shape.image_size, shape.patch_size)
    place = local_device()
    dtype = resolved(chosen.autocast, place)
    for encoder in encoders.values():
        if isinstance(encoder, nn.Module):
            encoder.to(place)
        if isinstance(encoder, FrozenEncoder):
            encoder.compute_in(dtype)
    return _Task(found, which, chosen, folder, encoders, dtype)


def _saved(kind: str, task: _Task, result: dict[str, Any], ranks: World) -> tuple[dict[str, Any], Path]:
    """Add to a result what tells the weights apart, and let the first process write it."""
    result["weights"] = {name: found.label for name, found in task.weights.items()}
    result["notes"] = [*result.get("notes", []), *(note for found in task.weights.values() for note in found.notes)]
    modules = {name: encoder for name, encoder in task.encoders.items() if isinstance(encoder, nn.Module)}
    result["weights_sha256"] = {name: weights_hash(encoder) for name, encoder in modules.items()}
    result["which"] = task.which
    result |= {key: value for key, value in machine().items() if key in ("commit", "devices", "cpu")}
    result["precision"] = name_of(task.dtype)
    other = "" if task.which == "target" else f"-{task.which}"  # which must not take the target's place
    stem = f"{kind}-{task.protocol.name}{other}"
    file = task.folder / f"{stem}.json"
    if ranks.rank:
        return result, file
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        file = file_for(task.folder, stem, result)
        write_json(file, result)
    except OSError as error:
        raise RunError(f"{file}: the result cannot be saved: {error.strerror}") from error
    return result, file


def _keep_head(file: Path, train: Source, ranks: World, weight: Tensor, bias: Tensor) -> None:
    if ranks.rank == 0:
        names = train.classes if train.classes is not None else [str(number) for number in range(len(bias))]
        Head(weight, bias, tuple(names)).write(file)


def _check_file(file: Path) -> None:
    if file.exists():
        raise UserError(f"--save-head {file}", "exists already", "give another file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--save-head {file}", f"{file.absolute().parent} is no folder")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that could not be made or written, before hours are spent on what should go there."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError("--output", f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError("--output", f"{there} cannot be written")


def table(result: dict[str, Any]) -> str:
    """Return a result as a table of text, with the protocol and the chance level in its title."""
    rows = result["rows"]
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    level = "" if result.get("level") is None else f", level {result['level']}"
    precision = f", {result['precision']}" if "precision" in result else ""
    title = f"{result['kind']}, protocol {result['protocol']['name']}{level}{precision}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("encoder")
    for key in keys:
        shown.add_column(key, justify="right")
    for row in rows:
        shown.add_row(row["encoder"], *(f"{100 * row[key]:.2f}" for key in keys))
    console = Console(width=110, force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
        if any(row.get("per_class") for row in rows):
            console.print(_by_class(result))
    chance = result.get("chance")
    notes = "".join(f"note: {note}\n" for note in result.get("notes", []))
    return captured.get() + ("" if chance is None else f"chance: {100 * chance:.2f}\n") + notes


def _by_class(result: dict[str, Any]) -> Table:
    """Return IoU by class, a column an encoder; a class that is nowhere has none."""
    rows, names = result["rows"], result["data"]["classes"]
    shown = Table(title="IoU by class", title_justify="left")
    shown.add_column("class")
    for row in rows:
        shown.add_column(row["encoder"], justify="right")
    for number, name in enumerate(names):
        values = [row["per_class"][number] for row in rows]
        shown.add_row(name, *("-" if value is None else f"{100 * value:.2f}" for value in values))
    return shown
