"""`ijepa archive`: a run as a folder that can be published, verified and loaded.

    OUT/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors
        recipe.yaml  run.json  metrics.jsonl  timings.jsonl  diagnostics.jsonl  evaluations/*.json  report.html
        README.md (the model card)  SHA256SUMS

The same run gives the same bytes. The folder is complete or absent, and every command accepts it as WEIGHTS. Tensors
are copied one at a time, also those of a sharded checkpoint. `sha256sum -c SHA256SUMS` verifies the folder too.
"""

import shutil
import stat
from collections import Counter
from pathlib import Path

from ijepa.checkpoint.run_dir import Run
from ijepa.interop.exchange import check_output
from ijepa.interop.tensors import write_tensors
from ijepa.interop.weights import Weights, resolve_weights
from ijepa.release.model_card import About, model_card
from ijepa.report.page import write_report
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_dir, irregular, read_json, sha256_of, write_errors, write_text
from ijepa.utils.progress import Progress, no_progress

SUMS = "SHA256SUMS"
_COPIED = ("run.json", "metrics.jsonl", "timings.jsonl", "diagnostics.jsonl", "report.html")


def write_archive(
    run_folder: Path, out: Path, about: About, *, unfinished: bool = False, progress: Progress = no_progress
) -> Path:
    """Write the release of the last checkpoint of a run into the new folder `out`.

    Args:
        run_folder: the folder of the run.
        out: a folder that does not exist yet.
        about: facts for the model card that no file of the run has.
        unfinished: also release a run that is not finished.
        progress: receives a line for each step.

    Raises:
        UserError: `run_folder` is not a run, has no checkpoint, is not finished or has a link among its files, or `out`
            exists.
        RunError: a file cannot be written.
    """
    found = resolve_weights(run_folder)
    if found.run is None:
        raise UserError(run_folder, "is not a run", "give the folder that `ijepa pretrain` wrote")
    run = Run(found.run)
    step = int(read_json(found.folder / "state.json")["step"])
    total = found.recipe.lengths(int(run.info()["images"])).total
    if step < total and not unfinished:
        raise UserError(run_folder, f"is at step {step} of {total}", "let it finish, or add --unfinished")
    results = sorted(run.evaluations.glob("*.json"))
    for path in (run.evaluations, *(run.folder / name for name in _COPIED), *results):
        _is_own_file(path)
    has_report = _update_report(found, run, progress)
    check_output(out)
    with write_errors(out), atomic_dir(out) as partial:
        for part in found.parts:
            progress(f"writing {part.replace('_', ' ')}")
            write_tensors(partial, part, found.tensors(part))
        write_text(partial / "recipe.yaml", found.recipe.dump())
        for name in _COPIED:
            if _is_own_file(run.folder / name):
                shutil.copyfile(run.folder / name, partial / name)
        if results:
            (partial / "evaluations").mkdir()
        for file in results:
            shutil.copyfile(file, partial / "evaluations" / file.name)
        card = model_card(found, about, step=step, total=total, results=results, has_report=has_report)
        write_text(partial / "README.md", card)
        progress("computing checksums")
        sums = "".join(f"{sha256_of(partial / name)}  {name}\n" for name in _regular_files(partial))
        write_text(partial / SUMS, sums)
    return out


def verify_archive(folder: Path, progress: Progress = no_progress) -> int:
    """Compare the files of an archive with its checksums, and its weights with its recipe; return the number of files.

    Raises:
        UserError: `folder` is not an archive.
        RunError: a file is missing, changed, unexpected or not regular, or the weights do not fit the recipe.
    """
    if not (folder / SUMS).is_file():
        raise UserError(folder, f"has no {SUMS}", "give a folder that `ijepa archive` wrote")
    existing = set(_regular_files(folder)) - {SUMS}
    listed = _read_sums(folder / SUMS)
    for name in sorted(listed.keys() | existing):
        if name not in existing:
            raise RunError(f"{folder / name}: is missing")
        if name not in listed:
            raise RunError(f"{folder / name}: is not in {SUMS}")
    for name, expected in listed.items():
        progress(f"checking {name}")
        if sha256_of(folder / name) != expected:
            raise RunError(f"{folder / name}: has changed since the archive was written")
    found = resolve_weights(folder)
    for part in found.parts:
        found.tensors(part)  # raises UserError if names or shapes are not those of the recipe
    return len(listed)


def _update_report(found: Weights, run: Run, progress: Progress) -> bool:
    """Write the report of the run if there is none or an old one; return whether there is one afterwards."""
    page = run.folder / "report.html"
    sources = [found.folder / "state.json", *run.evaluations.glob("*.json")]
    if page.is_file() and all(page.stat().st_mtime >= file.stat().st_mtime for file in sources):
        return True
    progress("writing the report")
    try:
        write_report(run.folder)
    except RunError as error:  # a release without a report is still useful
        progress(f"no new report was written: {error}")
    return page.is_file()


def _is_own_file(path: Path) -> bool:
    """Return whether a run has this file.

    Raises:
        UserError: it is a link, whose target may be private, or something else that is not a file or folder.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    kind = irregular(mode)
    if kind is not None and not stat.S_ISDIR(mode):
        raise UserError(path, f"is {kind}, not a regular file", "replace it with a regular file, or remove it")
    return kind is None


def _regular_files(folder: Path) -> list[str]:
    """Return the relative names of all files in an archive; raise RunError if one is not a regular file."""
    found = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        kind = irregular(mode)
        if kind is None:
            found.append(path.relative_to(folder).as_posix())
        elif not stat.S_ISDIR(mode):
            raise RunError(f"{path}: is {kind}, and an archive has regular files only")
    return found


def _read_sums(file: Path) -> dict[str, str]:
    """Return the SHA-256 by file name; raise RunError if the file is not a list of checksums, or has a name twice."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        text = ""
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
    pairs = [line.partition("  ") for line in text.removesuffix("\n").split("\n")]
    if any(len(value) != 64 or not name or name.startswith(("/", "..")) for value, _, name in pairs):
        raise RunError(f"{file}: is not a list of checksums")
    name, times = Counter(name for _, _, name in pairs).most_common(1)[0]
    if times > 1:
        raise RunError(f"{file}: lists {name} {times} times")
    return {name: value for value, _, name in pairs}
