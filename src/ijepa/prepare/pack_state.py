"""The state of an unfinished packing, in OUT/.packing: who packs, with which settings, and which shards are finished.

* `lock`: the process that packs, see `utils.lock`
* `plan.json`: images and settings; the same command resumes, a different one is an error
* `SHARD.json`: record of a finished shard, written after it; a shard without a record is written again
* `archives/`: plain tars that compressed archives were expanded into
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ijepa.prepare.shard_writer import ShardPlan, write_file
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json
from ijepa.utils.lock import exclusive

WORK, ARCHIVES = ".packing", "archives"


@contextmanager
def lock(out: Path) -> Iterator[Path]:
    """Hold `out` for one packing, and yield its `.packing`; if no packing was started, remove that at the end.

    Raises:
        UserError: `out` is packed already or holds anything but an unfinished packing, or another process packs it.
    """
    _check(out)
    work, new = out / WORK, not out.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(out, f"cannot be created ({error.strerror})", "give a folder you may write to") from None
    with exclusive(work / "lock", out, "is being packed", "wait until it ends"):
        _check(out)  # the other process may have finished in the meantime
        remove_partial_files(out)
        try:
            yield work
        finally:
            if not (work / "plan.json").is_file() and not (out / "manifest.json").is_file():
                (work / "lock").unlink(missing_ok=True)
                for folder in (work / ARCHIVES, work, *([out] if new else [])):
                    with suppress(OSError):  # expanded archives stay, and the folders that contain them
                        folder.rmdir()


def _check(out: Path) -> None:
    unfinished = (out / WORK).is_dir()
    if (out / "manifest.json").is_file() and not unfinished:
        raise UserError(out, "is already packed", "choose a different folder, or remove it first")
    if out.exists() and (not out.is_dir() or (not unfinished and any(out.iterdir()))):
        raise UserError(out, "is not empty", "give a new folder, or remove it first")


def finished_manifest(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a packing that was killed after writing it, and remove its state.

    Raises:
        UserError: it was packed with other settings.
    """
    if not (out / "manifest.json").is_file():
        return None
    manifest = read_json(out / "manifest.json")
    if manifest.get("packed") != settings:
        raise UserError(
            out, "is already packed, with different settings", "choose a different folder, or remove it first"
        )
    remove_state(out)
    return manifest


def remove_state(out: Path) -> None:
    """Remove everything that only an unfinished packing needs."""
    remove_partial_files(out)
    shutil.rmtree(out / WORK, ignore_errors=True)


def remove_partial_files(out: Path) -> None:
    """Remove files that a killed process had not finished."""
    for folder in (out, out / WORK, out / WORK / ARCHIVES):
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)


def resume(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with that of the unfinished packing.

    Raises:
        UserError: that one packs other images, or with other settings.
    """
    file = out / WORK / "plan.json"
    if not file.is_file():
        write_file(file, json.dumps(plan).encode())
        return
    before = read_json(file)
    for key, value in plan.items():
        if before.get(key) != value:
            shown = "different images" if key == "sources" else f"{key} = {before.get(key)}, not {value}"
            raise UserError(out, f"contains an unfinished pack with {shown}", "choose a different folder, or remove it")


def record(out: Path, plan: ShardPlan) -> Path:
    """Return the path of the record of a finished shard."""
    return out / WORK / f"{plan.name}.json"


def is_finished(out: Path, plan: ShardPlan) -> bool:
    """Whether a shard exists, with the size that its record states."""
    file, shard = record(out, plan), out / plan.name
    if not file.is_file() or not shard.is_file():
        return False
    return bool(shard.stat().st_size == read_json(file)["entry"]["bytes"])
