"""`ijepa archive`: a run as a folder that can be published, checked, and loaded.

    OUT/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors
        recipe.yaml  run.json  metrics.jsonl  timings.jsonl  diagnostics.jsonl  evaluations/*.json  report.html
        README.md (the model card)  SHA256SUMS

The same run gives the same bytes. The folder is complete or absent, and is WEIGHTS for every command. Tensors go from
file to file one at a time, also those of a sharded checkpoint; where there are evaluations, an encoder is loaded to
know its own by their hash. `sha256sum -c SHA256SUMS` checks it too.
"""

import hashlib
import shutil
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ijepa.checkpoint.run_dir import Run
from ijepa.interop.exchange import check_output
from ijepa.interop.tensors import write_tensors
from ijepa.interop.weights import Weights, resolve_weights
from ijepa.release.model_card import About, card
from ijepa.report.page import write_report
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_dir, irregular, read_json, write_errors, write_text

SUMS = "SHA256SUMS"
_KEPT = ("run.json", "metrics.jsonl", "timings.jsonl", "diagnostics.jsonl", "report.html")
_CHUNK = 2**22


def write_archive(
    run: Path, out: Path, about: About, *, unfinished: bool = False, progress: Callable[[str], None] | None = None
) -> Path:
    """Write the release of a run's last checkpoint into the new folder `out`.

    Args:
        run: the run.
        out: a folder that does not exist yet.
        about: what a card says that no file of the run does.
        unfinished: release a run that has not come to its end.
        progress: told a line now and then.

    Raises:
        UserError: no run, one without a checkpoint or not at its end, one with a link among its files, or `out` exists.
        RunError: the disk refuses.
    """
    found = resolve_weights(run)
    if found.run is None:
        raise UserError(run, "is no run", "give the folder that `ijepa pretrain` wrote")
    step, total = _reached(found)
    if step < total and not unfinished:
        raise UserError(run, f"has come to step {step} of {total}", "let it finish, or add --unfinished")
    folder = Run(found.run)
    results = sorted(folder.evaluations.glob("*.json"))
    for path in (folder.evaluations, *(folder.folder / name for name in _KEPT), *results):
        _own(path)
    tell = progress or (lambda line: None)
    report = _report(found, folder, tell)
    check_output(out)
    with write_errors(out), atomic_dir(out) as beside:
        for part in found.parts:
            tell(f"writing {part.replace('_', ' ')}")
            write_tensors(beside, part, found.tensors(part))
        write_text(beside / "recipe.yaml", found.recipe.dump())
        for name in _KEPT:
            if _own(folder.folder / name):
                shutil.copyfile(folder.folder / name, beside / name)
        if results:
            (beside / "evaluations").mkdir()
        for file in results:
            shutil.copyfile(file, beside / "evaluations" / file.name)
        words = card(found, about, step=step, total=total, results=results, report=report)
        write_text(beside / "README.md", words)
        tell("computing checksums")
        sums = {name: digest(beside / name) for name in _files(beside)}
        write_text(beside / SUMS, "".join(f"{value}  {name}\n" for name, value in sums.items()))
    return out


def verify_archive(folder: Path, progress: Callable[[str], None] | None = None) -> int:
    """Check an archive against its checksums and its weights against its recipe; return how many files it has.

    Raises:
        UserError: `folder` is no archive.
        RunError: a file is missing, changed, or more than there should be; there is a link, or something else that is
            neither a regular file nor a folder; or the weights are not the recipe's.
    """
    if not (folder / SUMS).is_file():
        raise UserError(folder, f"holds no {SUMS}", "give a folder that `ijepa archive` wrote")
    there = set(_files(folder)) - {SUMS}
    listed = _listed(folder)
    for name in sorted(set(listed) | there):
        if name not in there:
            raise RunError(f"{folder / name}: is missing")
        if name not in listed:
            raise RunError(f"{folder / name}: is not in {SUMS}")
    for name, wanted in listed.items():
        if progress is not None:
            progress(f"checking {name}")
        if digest(folder / name) != wanted:
            raise RunError(f"{folder / name}: has changed since the archive was written")
    found = resolve_weights(folder)
    for part in found.parts:
        found.tensors(part)
    return len(listed)


def digest(file: Path) -> str:
    """Return a file's SHA-256."""
    value = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_CHUNK):
            value.update(block)
    return value.hexdigest()


def _report(found: Weights, run: Run, tell: Callable[[str], None]) -> bool:
    """See to it that the run has a report that is not older than what it reports; say why, where it cannot have one."""
    page = run.folder / "report.html"
    sources = [found.folder / "state.json", *run.evaluations.glob("*.json")]
    if page.is_file() and all(page.stat().st_mtime >= file.stat().st_mtime for file in sources):
        return True
    tell("writing the report")
    try:
        write_report(run.folder)
    except RunError as error:  # a release without pictures is still one
        tell(f"without a new report: {error}")
    return page.is_file()


def _own(path: Path) -> bool:
    """Return whether a run has this file or folder.

    Raises:
        UserError: it is a link, whose target is no part of the run, or anything else that is not to be published.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    kind = irregular(mode)
    if kind is not None and not stat.S_ISDIR(mode):
        raise UserError(path, f"is {kind}, not a regular file", "replace it by what it stands for, or remove it")
    return kind is None


def _files(folder: Path) -> list[str]:
    """Return the files of an archive.

    Raises:
        RunError: one of them is not a regular file.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        kind = irregular(mode)
        if kind is None:
            found.append(path.relative_to(folder).as_posix())
        elif not stat.S_ISDIR(mode):
            raise RunError(f"{path}: is {kind}, and an archive holds regular files only")
    return found


def _listed(folder: Path) -> dict[str, str]:
    """Return the SHA-256 by file name, as the archive's list has them.

    Raises:
        RunError: it is not a list of checksums, or has a name twice.
    """
    try:
        text = (folder / SUMS).read_bytes().decode()
    except UnicodeDecodeError:
        text = ""
    except OSError as error:
        raise RunError(f"{folder / SUMS}: cannot be read: {error.strerror}") from None
    pairs = [line.partition("  ") for line in text.removesuffix("\n").split("\n")]
    if any(len(value) != 64 or not name or name.startswith(("/", "..")) for value, _, name in pairs):
        raise RunError(f"{folder / SUMS}: is not a list of checksums")
    name, times = Counter(name for _, _, name in pairs).most_common(1)[0]
    if times > 1:
        raise RunError(f"{folder / SUMS}: lists {name} {times} times")
    return {name: value for value, _, name in pairs}


def _reached(found: Weights) -> tuple[int, int]:
    """Return the checkpoint's step and the run's last one."""
    assert found.run is not None
    info = Run(found.run).info()
    step = int(read_json(found.folder / "state.json")["step"])
    return step, found.recipe.lengths(int(info["images"])).total
