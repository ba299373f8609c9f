"""An evaluation from the words of a command to a result on disk: weights, data, baselines, protocol.

Every trained encoder is compared, by the same protocol, with the encoder at its initial weights and with raw pixels:
what the architecture knows without training, and what the images show by themselves.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from ijepa.data.open import open_dataset
from ijepa.data.overlap import refuse_overlap
from ijepa.data.sources.base import Source
from ijepa.distributed.launch import join_evaluation, local_device
from ijepa.distributed.process_group import World
from ijepa.evaluation.classification import knn, linear_probe
from ijepa.evaluation.context import EvaluationContext
from ijepa.evaluation.features.extract import PatchEncoder, PixelEncoder, weights_hash
from ijepa.evaluation.features.precision import Autocast, name_of, resolved
from ijepa.evaluation.protocols import load_protocol
from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.evaluation.results.store import result_path
from ijepa.evaluation.segmentation import evaluate as segmentation
from ijepa.evaluation.video import propagation
from ijepa.evaluation.video.dataset import find_videos
from ijepa.interop.heads import Head
from ijepa.interop.weights import Weights, Which, resolve_weights
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.environment import machine
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import write_json
from ijepa.utils.progress import Progress

_EVALUATIONS: dict[str, Callable[..., EvaluationResult]] = {
    "linear": linear_probe.evaluate_linear,
    "knn": knn.evaluate_knn,
    "segmentation": segmentation.evaluate_segmentation,
}


class Options(TypedDict, total=False):
    """Options that every evaluation has.

    Keys:
        protocol: name of a protocol or a YAML file; None: the default of the kind.
        which: encoder of a run to evaluate; default: target.
        seed: of held-out splits, initial heads and other draws; default: 0.
        baselines: whether to evaluate the initial encoder and raw pixels too; default: True.
        heads: number of attention heads of weights that do not state it.
        output: folder for the result; None: `evaluations` of the run, or the current folder without a run.
        progress: called with lines about the progress.
        autocast: precision of the encoders; None: that of the protocol.
        labels: label map of the masks; None: that of the protocol or of the sets.
    """

    protocol: str | None
    which: Which
    seed: int
    baselines: bool
    heads: int | None
    output: Path | None
    progress: Progress | None
    autocast: Autocast | None
    labels: str | None


def evaluate(
    kind: str,
    weights: str | Mapping[str, str],
    train: str | None,
    test: str,
    *,
    train_list: str | None = None,
    test_list: str | None = None,
    devkit: str | None = None,
    save_head: Path | None = None,
    **options: Unpack[Options],
) -> tuple[EvaluationResult, Path]:
    """Evaluate weights by one protocol and write the result; under torchrun, on all processes together.

    Args:
        kind: `linear`, `knn` or `segmentation`.
        weights: WEIGHTS, or several by the names of their rows; the first ones determine the baselines.
        train, test: paths of the labeled sets. Protocols of level 0 ignore the train set.
        train_list, test_list: files of image names that select a part of a set, see `data.sources.subset`.
        devkit: where ImageNet's validation classes are, if not next to the images.
        save_head: file for the head of a linear probe, see `interop.heads`.
        options: see `Options`.

    Returns:
        The result and its file.

    Raises:
        UserError: bad input, found before anything is written.
        RunError: an image cannot be decoded, features are not finite, or the result cannot be saved.
    """
    with join_evaluation() as world:
        task = _prepare(kind, weights, world, options)
        if getattr(task.protocol, "level", None) == 0:
            train, train_list = None, None
        elif train is None:
            raise UserError("--train", f"is missing, but protocol {task.protocol.name} needs it", "add --train")
        opened = partial(open_dataset, devkit=devkit, require_labels=kind != "segmentation")
        support = None if train is None else opened(train, where="--train", split="train", names=train_list)
        scored = opened(test, where="--test", split="val", names=test_list)
        run = _EVALUATIONS[kind]
        if support is not None:
            refuse_overlap(support, scored)
            if save_head is not None:
                _check_head_file(save_head)
                run = partial(run, keep=partial(_save_head, save_head, support, world))
        result = run(task.encoders, support, scored, task.protocol, task.context)
        return _save(kind, task, result, {"train": (train, train_list), "test": (test, test_list)})


def evaluate_videos(
    weights: str | Mapping[str, str], data: str, **options: Unpack[Options]
) -> tuple[EvaluationResult, Path]:
    """Evaluate weights by label propagation in the videos at `data` and write the result; otherwise as `evaluate`."""
    with join_evaluation() as world:
        task = _prepare("propagation", weights, world, options)
        result = propagation.evaluate_propagation(task.encoders, find_videos(Path(data)), task.protocol, task.context)
        return _save("propagation", task, result, {"test": (data, None)})


@dataclass(frozen=True)
class _Task:
    """What is evaluated by which protocol, and the folder of the result."""

    weights: Mapping[str, Weights]
    which: Which
    protocol: Any
    folder: Path
    encoders: dict[str, PatchEncoder]
    context: EvaluationContext


def _prepare(kind: str, weights: str | Mapping[str, str], world: World, options: Options) -> _Task:
    """Return what is evaluated. Refuse an output folder that cannot be written before hours are spent."""
    named = {"trained": weights} if isinstance(weights, str) else dict(weights)
    changed = {key: options.get(key) for key in ("autocast", "labels") if options.get(key) is not None}
    protocol = load_protocol(kind, options.get("protocol")).model_copy(update=changed)
    found = {name: resolve_weights(path, heads=options.get("heads")) for name, path in named.items()}
    first = next(iter(found.values()))
    folder = options.get("output") or (first.run / "evaluations" if first.run else Path())
    _check_output(folder)
    which, device = options.get("which", "target"), local_device()
    context = EvaluationContext(
        seed=options.get("seed", 0),
        cache=folder / ".features",
        progress=options.get("progress") if world.rank == 0 else None,
        world=world,
        device=device,
        precision=resolved(protocol.autocast, device),
    )
    encoders: dict[str, PatchEncoder] = {name: each.encoder(which) for name, each in found.items()}
    if options.get("baselines", True):
        shape = first.recipe.model
        encoders["random"] = FrozenEncoder.initial(shape, first.recipe.seed)
        encoders["pixels"] = PixelEncoder(shape.image_size, shape.patch_size)
    for encoder in encoders.values():
        if isinstance(encoder, nn.Module):
            encoder.to(device)
        if isinstance(encoder, FrozenEncoder):
            encoder.compute_in(context.precision)
    return _Task(found, which, protocol, folder, encoders, context)


def _save(
    kind: str, task: _Task, result: EvaluationResult, sets: Mapping[str, tuple[str | None, str | None]]
) -> tuple[EvaluationResult, Path]:
    """Add to a result what identifies sets and weights, and write it on the first process.

    Args:
        kind: of the evaluation.
        task: what was evaluated.
        result: the result.
        sets: path and list of each set by its role; None where the user gave none.
    """
    described = {
        role: result.data.of(role).model_copy(update={"path": path} if names is None else {"path": path, "list": names})
        for role, (path, names) in sets.items()
        if path is not None
    }
    modules = {name: encoder for name, encoder in task.encoders.items() if isinstance(encoder, nn.Module)}
    environment = machine()
    added = {
        "data": result.data.model_copy(update=described),
        "weights": {name: found.label for name, found in task.weights.items()},
        "notes": (*result.notes, *(note for found in task.weights.values() for note in found.notes)),
        "weights_sha256": {name: weights_hash(encoder) for name, encoder in modules.items()},
        "which": task.which,
        "commit": environment["commit"],
        "devices": tuple(environment["devices"]),
        "cpu": environment["cpu"],
        "precision": name_of(task.context.precision),
    }
    result = result.model_copy(update=added)
    # A result of the context encoder must not replace that of the target encoder.
    stem = f"{kind}-{task.protocol.name}" + ("" if task.which == "target" else f"-{task.which}")
    file = task.folder / f"{stem}.json"
    if task.context.world.rank:
        return result, file
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        file = result_path(task.folder, stem, result)
        write_json(file, result.to_json())
    except OSError as error:
        raise RunError(f"{file}: the result cannot be saved: {error.strerror}") from error
    return result, file


def _save_head(file: Path, train: Source, world: World, weight: Tensor, bias: Tensor) -> None:
    if world.rank == 0:
        names = train.classes if train.classes is not None else [str(number) for number in range(len(bias))]
        Head(weight, bias, tuple(names)).write(file)


def _check_head_file(file: Path) -> None:
    if file.exists():
        raise UserError(f"--save-head {file}", "already exists", "choose a different file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--save-head {file}", f"{file.absolute().parent} is not a folder")


def _check_output(folder: Path) -> None:
    """Refuse a folder that could not be created or written."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError("--output", f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError("--output", f"{existing} cannot be written")
