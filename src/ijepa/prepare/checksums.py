"""Whether packed shards are still the bytes that were packed: their SHA-256 against the manifest's."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json
from ijepa.utils.progress import Progress, ProgressMeter, no_progress


def changed_shards(
    folder: Path, split: str | None = None, *, threads: int = 1, progress: Progress = no_progress
) -> tuple[int, list[str]]:
    """Return how many shards the manifest lists (of `split`, or of all), and a line for each that is not as listed.

    Raises:
        UserError: no manifest of `ijepa data pack` or `ijepa data scenes`, or no such split in it.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise UserError("--checksums", f"{file} is not there", "give a folder that `ijepa data pack` wrote")
    try:
        splits = {name: part["shards"] for name, part in read_json(file)["splits"].items()}
        listed = [each for name, shards in splits.items() if split in (None, name) for each in shards]
        wanted = {str(each["name"]): (int(each["bytes"]), str(each["sha256"])) for each in listed}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(file, "is no manifest of shards", "give a folder that `ijepa data pack` wrote") from None
    if not wanted:
        raise UserError(file, f"lists no shards of {split}", f"its splits are {', '.join(splits)}")
    meter, done = ProgressMeter(progress, "read", sum(size for size, _ in wanted.values()), "GB", 1e9), 0
    lines = []
    with ThreadPoolExecutor(threads) as pool:  # hashing lets other threads run
        for name, found in zip(wanted, pool.map(lambda name: _digest(folder / name), wanted), strict=True):
            size, digest = wanted[name]
            if found != digest:
                lines.append(f"{name}: {found}, in the manifest {digest}")
            done += size
            meter.update(done)
    return len(wanted), lines


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error.strerror)
