"""Where a run begins: from nothing, or from a checkpoint of the run that the folder holds. Nothing is written here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ijepa.checkpoint.format import named_checkpoints, verify_checkpoint
from ijepa.checkpoint.run_dir import Run, decisive, noted_checkpoint, open_run
from ijepa.config.recipe import Recipe
from ijepa.data.sources.base import Source
from ijepa.distributed.process_group import World
from ijepa.training.runtime import Resolved, resolve
from ijepa.utils.errors import UserError

Resume = Literal["auto", "last-good", "never"]
"""What to do with a run that exists: go on from its latest checkpoint, from the latest whole one, or refuse it."""


def open_for(
    recipe: Recipe, source: Source, output: Path, resume: Resume, ranks: int
) -> tuple[Run, bool, list[Path], Resolved]:
    """Return the run, whether it exists, its checkpoints, the latest first, and what `auto` is; write nothing."""
    run, exists = open_run(output, recipe, resume=resume != "never")
    earlier = run.info() if exists else None
    if earlier is not None and not {"images", "resolved"} <= earlier.keys():
        raise UserError(run.info_file, "is not what a run writes there", "restore it, or give another --output")
    if earlier is not None and earlier["images"] != len(source):
        raise UserError(
            run.info_file,
            f"the run was started on {earlier['images']} images, data.path holds {len(source)}",
            "give the same data",
        )
    if earlier is not None and earlier.get("fingerprint", source.fingerprint) != source.fingerprint:
        raise UserError(
            run.info_file,
            "the run was started on other data: names, sizes or order of the files are not those of data.path",
            "give the same data, or another --output",
        )
    found = named_checkpoints(run.checkpoints)[::-1]
    if earlier is not None and not found and (first := noted_checkpoint(earlier)) is not None:
        raise UserError(
            run.checkpoints,
            f"holds no checkpoint, but the run has saved some, the first after step {first}",
            "bring them back (is the disk mounted?), or give another --output",
        )
    resolved = resolve(recipe, earlier["resolved"] if earlier else None, ranks)
    return run, exists, found, resolved


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    name: str
    problem: str


def choose_checkpoint(
    world: World, recipe: Recipe, found: Sequence[Path], resume: Resume
) -> tuple[Path | None, list[Skipped]]:
    """Return the checkpoint to go on from, None where there is none yet, and those that are skipped.

    All ranks verify together, so they choose the same one.

    Raises:
        UserError: the latest is damaged and `resume` is not "last-good", or all are.
    """
    skipped: list[Skipped] = []
    for path in found:
        try:
            verify_checkpoint(path, decisive(recipe), world)
            return path, skipped
        except UserError as error:
            if resume != "last-good":
                raise
            skipped.append(Skipped(path.name, f"{Path(error.where).name} {error.problem}"))
    if skipped:
        raise UserError(found[0].parent, f"holds no whole checkpoint: in {skipped[0].name}, {skipped[0].problem}")
    return None, []
