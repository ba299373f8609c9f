"""A run on disk: which recipe it holds, what it was started with, where its parts lie, and which process writes it.

RUN/recipe.yaml  run.json  metrics.jsonl  timings.jsonl  checkpoints/step-00001000/  evaluations/*.json  report.html
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ijepa.config.recipe import Recipe
from ijepa.utils.environment import machine
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import read_json, write_json, write_text
from ijepa.utils.lock import exclusive

_FREE = {
    "name",
    "description",
    "data.workers",
    "data.prefetch",
    "data.path",
    "data.images",
    "data.replaced_limit",
    "batch.micro",
    "checkpoint.every",
    "checkpoint.keep",
    "log_every",
    "optimizer.nonfinite_limit",
    "parallel.strategy",
    "parallel.shard",
    "parallel.timeout",
}
"""Keys that may change between a run and its resumption: none of them changes what is computed."""

_FIRST = "first_checkpoint"
"""Key of `run.json`: the step of the first complete checkpoint."""


@dataclass(frozen=True)
class Run:
    """Paths of one run's folder."""

    folder: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.folder / "recipe.yaml"

    @property
    def info_file(self) -> Path:
        """Command, versions, commit, devices, seed, and what `auto` became."""
        return self.folder / "run.json"

    @property
    def metrics_file(self) -> Path:
        """One object a step, of what the seed determines."""
        return self.folder / "metrics.jsonl"

    @property
    def timings_file(self) -> Path:
        """Speed and memory."""
        return self.folder / "timings.jsonl"

    @property
    def diagnostics_file(self) -> Path:
        """What callbacks measured on the way."""
        return self.folder / "diagnostics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Folder of evaluation results."""
        return self.folder / "evaluations"

    @property
    def lock_file(self) -> Path:
        """There while a process trains in the folder, or after it was killed; see `claim`."""
        return self.folder / ".ijepa.lock"

    def recipe(self) -> Recipe:
        """Return the recipe the folder holds."""
        return Recipe.load(self.recipe_file)

    def info(self) -> dict[str, Any]:
        """Return `run.json`."""
        return read_json(self.info_file)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process, and create it if it is missing; leave no trace where no run was started.

    Raises:
        UserError: another process holds it, it holds something else than a run, or it cannot be created. Nothing is
            written or removed then.
    """
    run = Run(folder)
    if not run.lock_file.exists():  # where it does exist, another start may be under way
        _check_place(run)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(folder, f"cannot be created ({error.strerror})", "give another --output") from None
        with exclusive(run.lock_file, folder, "is being written", "wait until it ends, or give another --output"):
            try:
                yield
            finally:
                run.lock_file.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # not empty: a run was started
            for each in missing:
                each.rmdir()


def _check_place(run: Run) -> bool:
    """Whether a run exists in the folder already.

    Raises:
        UserError: it holds something else.
    """
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and {*folder.iterdir()} <= {*_begun(run), run.lock_file}):
        return False
    if not run.recipe_file.is_file() or not run.info_file.is_file():
        raise UserError(folder, "is not empty and holds no run", "give another --output")
    return True


def open_run(folder: Path, recipe: Recipe, *, resume: bool) -> tuple[Run, bool]:
    """Return the run in `folder` and whether it exists already; nothing is written.

    Raises:
        UserError: when the folder holds something else, another recipe, or a run that must not be resumed.
    """
    run = Run(folder)
    if not _check_place(run):
        return run, False
    if not resume:
        raise UserError(folder, "already holds a run", "give another --output, or --resume auto to go on with it")
    there, here = decisive(run.recipe()), decisive(recipe)
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise UserError(
                run.recipe_file,
                f"the run was started with {key} = {there.get(key)}, not {here.get(key)}",
                "give another --output, or the run's own recipe",
            )
    return run, True


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Return the settings, by dotted key, that determine a run's result; the seed is one of them."""
    return {key: value for key, value in settings(recipe).items() if key not in _FREE}


def note_checkpoint(run: Run, step: int) -> None:
    """Write into `run.json` that the run has a checkpoint, once; a run that has lost all of them is then noticed."""
    info = run.info()
    if _FIRST not in info:
        write_json(run.info_file, {**info, _FIRST: step})


def noted_checkpoint(info: dict[str, Any]) -> int | None:
    """Return the step of the first checkpoint that `run.json` notes, None before there was one."""
    step = info.get(_FIRST)
    return step if isinstance(step, int) else None


def start_run(run: Run, recipe: Recipe, info: dict[str, Any]) -> None:
    """Make the folder with `run.json` and its recipe, which comes last and makes it a run.

    Raises:
        RunError: when the disk refuses.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        for left in _begun(run):
            left.unlink()
        write_json(run.info_file, {**machine(), "date": date.today().isoformat(), "seed": recipe.seed, **info})
        write_text(run.recipe_file, recipe.dump())
    except OSError as error:
        raise RunError(f"{run.folder}: cannot be written: {error.strerror}") from None


def _begun(run: Run) -> set[Path]:
    """What a start leaves that was cut short before the recipe was written."""
    return {*run.folder.glob("run.json"), *run.folder.glob(".run.json.*"), *run.folder.glob(".recipe.yaml.*")}


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key."""
    return _flat(yaml.safe_load(recipe.dump()))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
