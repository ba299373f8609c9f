"""The folder of a run: its files, its recipe, and which process writes it.

RUN/recipe.yaml  run.json  metrics.jsonl  timings.jsonl  checkpoints/step-00001000/  evaluations/*.json  report.html
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ijepa.config.recipe import Recipe
from ijepa.utils.environment import machine
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json, write_errors, write_json, write_text
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
"""Keys that may change when a run is resumed, because none of them changes what is computed."""

_FIRST = "first_checkpoint"
"""Key of `run.json`: the step of the first complete checkpoint."""


class Run:
    """Paths of one run's folder.

    Attributes:
        recipe_file: the resolved recipe.
        info_file: command, versions, commit, devices, seed, and resolved `auto` values.
        metrics_file: one object per step, with values that the seed determines.
        timings_file: speed and memory.
        diagnostics_file: measurements of callbacks.
        checkpoints: folder of checkpoints.
        evaluations: folder of evaluation results.
        lock_file: exists while a process trains in the folder, or after it was killed; see `claim`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.info_file = folder / "run.json"
        self.metrics_file = folder / "metrics.jsonl"
        self.timings_file = folder / "timings.jsonl"
        self.diagnostics_file = folder / "diagnostics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.evaluations = folder / "evaluations"
        self.lock_file = folder / ".ijepa.lock"

    def recipe(self) -> Recipe:
        """Return the recipe of the run."""
        return Recipe.load(self.recipe_file)

    def info(self) -> dict[str, Any]:
        """Return `run.json`."""
        return read_json(self.info_file)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process, and create it if it is missing; remove it again if no run was started.

    Raises:
        UserError: another process holds the folder, it does not hold a run, or it cannot be created. Nothing is
            written or removed then.
    """
    run = Run(folder)
    if not run.lock_file.exists():  # if it exists, another process may just be starting a run
        _holds_run(run)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]  # innermost first
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(folder, f"cannot be created ({error.strerror})", "choose a different --output") from None
        with exclusive(run.lock_file, folder, "is being written", "wait until it ends, or choose a different --output"):
            try:
                yield
            finally:
                run.lock_file.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # not empty, because a run was started
            for each in missing:
                each.rmdir()


def _holds_run(run: Run) -> bool:
    """Whether the folder holds a run.

    Raises:
        UserError: it holds something else.
    """
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and {*folder.iterdir()} <= {*_leftovers(run), run.lock_file}):
        return False
    if not run.recipe_file.is_file() or not run.info_file.is_file():
        raise UserError(folder, "is not empty and is not a run", "choose a different --output")
    return True


def open_run(folder: Path, recipe: Recipe, *, resume: bool) -> tuple[Run, bool]:
    """Return the run in `folder`, and whether it exists already; write nothing.

    Raises:
        UserError: the folder holds something else, a run with another recipe, or a run that must not be resumed.
    """
    run = Run(folder)
    if not _holds_run(run):
        return run, False
    if not resume:
        raise UserError(folder, "already contains a run", "choose a different --output, or add --resume auto")
    saved, given = fixed_settings(run.recipe()), fixed_settings(recipe)
    for key in sorted({*saved, *given}):
        if saved.get(key) != given.get(key):
            raise UserError(
                run.recipe_file,
                f"the run was started with {key} = {saved.get(key)}, not {given.get(key)}",
                "choose a different --output, or the recipe of the run",
            )
    return run, True


def start_run(run: Run, recipe: Recipe, info: dict[str, Any]) -> None:
    """Create the folder with `run.json`, and then its recipe, which makes it a run.

    Raises:
        RunError: the disk is full or fails.
    """
    with write_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        for left in _leftovers(run):
            left.unlink()
        # The recipe comes last: only with it the folder counts as a run, so a kill in between leaves no broken run.
        write_json(run.info_file, {**machine(), "date": date.today().isoformat(), "seed": recipe.seed, **info})
        write_text(run.recipe_file, recipe.dump())


def _leftovers(run: Run) -> set[Path]:
    """Return what a start leaves that was killed before the recipe was written."""
    return {*run.folder.glob("run.json"), *run.folder.glob(".run.json.*"), *run.folder.glob(".recipe.yaml.*")}


def note_checkpoint(run: Run, step: int) -> None:
    """Write into `run.json`, once, that the run has a checkpoint, so that losing all of them is noticed."""
    info = run.info()
    if _FIRST not in info:
        write_json(run.info_file, {**info, _FIRST: step})


def noted_checkpoint(info: dict[str, Any]) -> int | None:
    """Return the step of the first checkpoint in `run.json`, None before there is one."""
    step = info.get(_FIRST)
    return step if isinstance(step, int) else None


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key."""
    return _flatten(yaml.safe_load(recipe.dump()))


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings, by dotted key, that determine a run's result; the seed is one of them."""
    return {key: value for key, value in settings(recipe).items() if key not in _FREE}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
