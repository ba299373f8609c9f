"""A folder while it is being packed: who may write there, what is finished, and what a kill left behind.

    OUT/.packing/  the plan, a record of every finished shard, expanded archives, and a lock

One packing holds the lock; another is refused. A shard counts as finished if it lies there with the size that its
record states, and the record is written after it. What a killed process was writing has a name of its own and is
removed at the next start. A folder with a manifest is whole: at most `.packing` is still to be removed.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ijepa.prepare.shard_writer import ShardPlan
from ijepa.utils.errors import UserError
from ijepa.utils.files import atomic_file, read_json, write_errors
from ijepa.utils.lock import exclusive

WORK, ARCHIVES = ".packing", "archives"


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """Hold `out` for one packing, and give its `.packing`; leave nothing of it where nothing was begun.

    Raises:
        UserError: a folder that is packed already or holds anything but a packing under way, or one that another
            process is packing.
    """
    _check(out)
    work, new = out / WORK, not out.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(out, f"cannot be created ({error.strerror})", "give a folder you may write to") from None
    with exclusive(work / "lock", out, "is being packed", "wait until it ends"):
        _check(out)  # it may have become whole since
        sweep(out)
        try:
            yield work
        finally:
            if not (work / "plan.json").is_file() and not (out / "manifest.json").is_file():
                (work / "lock").unlink(missing_ok=True)
                for folder in (work / ARCHIVES, work, *([out] if new else [])):
                    with suppress(OSError):  # expanded archives are kept, and what they lie in
                        folder.rmdir()


def _check(out: Path) -> None:
    under_way = (out / WORK).is_dir()
    if (out / "manifest.json").is_file() and not under_way:
        raise UserError(out, "is packed already", "give another folder, or remove it first")
    if out.exists() and (not out.is_dir() or (not under_way and any(out.iterdir()))):
        raise UserError(out, "is not empty", "give a new folder, or remove it first")


def already_whole(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a packing that was killed after writing it, and remove what is left beside the shards.

    Raises:
        UserError: it was packed with other settings.
    """
    if not (out / "manifest.json").is_file():
        return None
    manifest = read_json(out / "manifest.json")
    if manifest.get("packed") != settings:
        raise UserError(out, "is packed already, with other settings", "give another folder, or remove it first")
    clean(out)
    return manifest


def clean(out: Path) -> None:
    """Remove what only a packing under way needs."""
    sweep(out)
    shutil.rmtree(out / WORK, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove files that a killed process had not finished."""
    for folder in (out, out / WORK, out / WORK / ARCHIVES):
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)


def go_on(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with that of the packing under way.

    Raises:
        UserError: that one packs other images, or with other settings.
    """
    file = out / WORK / "plan.json"
    if file.is_file():
        before = read_json(file)
        for key, value in plan.items():
            if before.get(key) != value:
                shown = "other images" if key == "sources" else f"{key} = {before.get(key)}, not {value}"
                raise UserError(out, f"a packing with {shown} is under way there", "give another folder, or remove it")
        return
    with write_errors(file), atomic_file(file) as stream:
        stream.write(json.dumps(plan).encode())


def record(out: Path, plan: ShardPlan) -> Path:
    """Return where the record of a finished shard lies."""
    return out / WORK / f"{plan.name}.json"


def finished(out: Path, plan: ShardPlan) -> bool:
    """Whether a shard is there as its record says."""
    file, shard = record(out, plan), out / plan.name
    if not file.is_file() or not shard.is_file():
        return False
    return bool(shard.stat().st_size == read_json(file)["entry"]["bytes"])
