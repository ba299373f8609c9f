import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.interop.weights import load_encoder
from ijepa.release.archive import verify_archive, write_archive
from ijepa.release.model_card import About
from ijepa.training.loop import Callback, Interrupted, pretrain
from ijepa.utils.errors import RunError, UserError


def test_write_archive_writes_all_files_and_weights_that_load(finished_run: Path, archive: Path) -> None:
    names = {path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file()}
    assert names == {
        "context_encoder.safetensors",
        "target_encoder.safetensors",
        "predictor.safetensors",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "timings.jsonl",
        "diagnostics.jsonl",
        "evaluations/knn-small.json",
        "report.html",
        "README.md",
        "SHA256SUMS",
    }
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    for which in ("target", "context"):
        assert torch.equal(load_encoder(archive, which)(pixels), load_encoder(finished_run, which)(pixels))
    assert verify_archive(archive) == len(names) - 1
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=archive, check=False)
    assert done.returncode == 0


def test_write_archive_writes_the_same_bytes_for_the_same_run(
    finished_run: Path, archive: Path, tmp_path: Path
) -> None:
    again = write_archive(finished_run, tmp_path / "again", About(country="Sweden", watts=65.0))
    assert (again / "SHA256SUMS").read_bytes() == (archive / "SHA256SUMS").read_bytes()


def test_write_archive_updates_an_old_report(run: Path, tmp_path: Path) -> None:
    page = run / "report.html"
    page.write_text("old")
    os.utime(page, (1, 1))
    out = write_archive(run, tmp_path / "out", About())
    assert "<!doctype html>" in (out / "report.html").read_text()
    assert "report.html" in (out / "README.md").read_text()
    with pytest.raises(UserError) as err:
        CliRunner().invoke(cli, ["report", str(out)], catch_exceptions=False, standalone_mode=False)
    assert err.value.where == str(out)
    verify_archive(out)


def test_write_archive_without_matplotlib_has_no_report_and_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines: list[str] = []
    out = write_archive(run, tmp_path / "out", About(), progress=lines.append)
    assert not (out / "report.html").exists() and "report.html" not in (out / "README.md").read_text()
    assert any("matplotlib" in line for line in lines)


def flip_bit(file: Path, place: int, bit: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= bit
    file.write_bytes(data)


def replace_bytes(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def link(file: Path) -> None:
    """Replace a file with a link to a file with the same content, which may change later."""
    file.symlink_to(file.rename(file.parents[1] / "elsewhere"))


SUMS = "SHA256SUMS"
DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "changed": ("predictor.safetensors", "changed", lambda a: flip_bit(a / "predictor.safetensors", -1)),
    "removed": ("evaluations/knn-small.json", "missing", lambda a: (a / "evaluations/knn-small.json").unlink()),
    "added": ("evil.py", "not in", lambda a: (a / "evil.py").write_text("print()")),
    "short sum": (SUMS, "list", lambda a: (a / SUMS).write_text("abc  README.md\n")),
    "not text": (SUMS, "list", lambda a: flip_bit(a / SUMS, 70, 0x80)),
    "empty": (SUMS, "list", lambda a: (a / SUMS).write_bytes(b"")),
    "changed sum": ("README.md", "changed", lambda a: flip_bit(a / SUMS, 0)),
    "changed name": ("ru\x01.json", "missing", lambda a: replace_bytes(a / SUMS, b"run.json", b"ru\x01.json")),
    "joined lines": ("README.md", "not in", lambda a: replace_bytes(a / SUMS, b"README.md\n", b"README.md\x0b")),
    "listed twice": (SUMS, "2 times", lambda a: replace_bytes(a / SUMS, b"", b"0" * 64 + b"  run.json\n")),
    "link out": ("predictor.safetensors", "link", lambda a: link(a / "predictor.safetensors")),
    "link inside": ("again.json", "link", lambda a: (a / "again.json").symlink_to("run.json")),
    "dead link": ("nowhere", "link", lambda a: (a / "nowhere").symlink_to("gone")),
    "link to a folder": ("more", "link", lambda a: (a / "more").symlink_to("/usr")),
    "linked list": (SUMS, "link", lambda a: link(a / SUMS)),
    "FIFO": ("queue", "FIFO", lambda a: os.mkfifo(a / "queue")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_archive_finds_every_damage(archive: Path, name: str) -> None:
    file, word, damage = DAMAGES[name]
    damage(archive)
    with pytest.raises(RunError, match=word) as err:
        verify_archive(archive)
    assert err.value.exit_code == 1 and str(err.value).startswith(f"{archive / file}: ")
    assert "\n" not in str(err.value)


def test_verify_archive_refuses_a_fifo_as_list_of_checksums(archive: Path) -> None:
    (archive / "SHA256SUMS").unlink()
    os.mkfifo(archive / "SHA256SUMS")
    command = [sys.executable, "-m", "ijepa", "archive", "--verify", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # reading it would hang
    assert done.returncode == 2 and "SHA256SUMS" in done.stderr


@pytest.mark.parametrize("name", ["timings.jsonl", "report.html", "evaluations/knn-small.json", "evaluations"])
def test_write_archive_refuses_links_among_the_files_of_the_run(run: Path, tmp_path: Path, name: str) -> None:
    (run / "report.html").touch()
    (run / name).rename(tmp_path / "private")
    (run / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError) as err:
        write_archive(run, tmp_path / "out", About())
    assert err.value.where == str(run / name) and not (tmp_path / "out").exists()


def test_write_archive_refuses_an_unfinished_run_unless_asked(finished_run: Path, tmp_path: Path, scenes: Path) -> None:
    calls = 0

    def stop(model: object) -> dict[str, float]:
        nonlocal calls
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        calls += 1
        return {}

    recipe, source = Recipe.load(finished_run, {"steps": "16"}), open_dataset(scenes, split="train")
    with pytest.raises(Interrupted):
        pretrain(recipe, source, tmp_path / "run", quiet=True, callbacks=[Callback(1, stop)])
    with pytest.raises(UserError) as err:
        write_archive(tmp_path / "run", tmp_path / "out", About())
    assert err.value.where == str(tmp_path / "run") and "--unfinished" in err.value.hint
    out = write_archive(tmp_path / "run", tmp_path / "out", About(), unfinished=True)
    text = (out / "README.md").read_text()
    assert "step 4 of 16" in text and "were not evaluated" in text


def test_write_archive_leaves_nothing_on_a_full_disk(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(RunError, match="No space left"):
        write_archive(finished_run, tmp_path / "out", About())
    assert not list(tmp_path.iterdir())


def test_archive_command_writes_and_verifies(finished_run: Path, tmp_path: Path) -> None:
    out, run = str(tmp_path / "release"), str(finished_run)
    for words in ([run, out], ["--verify", out]):
        done = CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False)
        assert done.exit_code == 0 and out in done.output
    assert "11 files" in done.output
    for words, where in (
        ([run], "OUT"),
        ([run, out], out),
        (["scenes", str(tmp_path / "x")], "scenes"),
        (["--verify", run], run),
        ([run, str(tmp_path / "y"), "--country", "Swedn"], "--country Swedn"),
    ):
        with pytest.raises(UserError) as err:
            CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False, standalone_mode=False)
        assert err.value.where == where
