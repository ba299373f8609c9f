"""The complete error line of typical bad input, compared with messages.txt.

messages.txt lists commands, each followed by its exit code and its error line. After a change of a message, or to add a
command (a line that starts with `$ ijepa`), run `python -m tests.integration.test_messages` and review the difference.
"""

import contextlib
import io
import os
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import pytest

from ijepa.__main__ import main
from ijepa.data.open import open_dataset
from ijepa.prepare.scenes.scenes import write_scenes

FILE = Path(__file__).with_name("messages.txt")
PROMPT = "$ ijepa"
TINY_RUN = (
    "pretrain vit-tiny-64 --data.path data --output run --steps 2 --batch.global 4 --data.workers 0 "
    "--schedule.warmup 1 --model.encoder.width 32 --model.encoder.depth 1 --model.encoder.heads 2 "
    "--model.predictor.depth 1 --precision.autocast none --diagnose-every 0"
)


def read_messages() -> dict[str, str]:
    """Return what is expected of each command: exit code and error line."""
    blocks = FILE.read_text().strip().split("\n\n")
    parts = (block.removeprefix(PROMPT).partition("\n") for block in blocks)
    return {command.strip(): expected for command, _, expected in parts}


def make_inputs() -> None:
    """Write the files that the commands name into the current folder."""
    write_scenes("data", images=24, seed=0, size=64, val_share=0.25)
    for folder in ("empty", "texts", "cut", "plain", "bad"):
        Path(folder).mkdir()
    shard = Path("data/train-0000.tar").read_bytes()
    Path("cut/train-0000.tar").write_bytes(shard[: len(shard) // 2])
    Path("texts/a.txt").write_text("not an image")
    image = open_dataset("data", split="train")[0].image
    for file in ("plain/a.jpg", "bad/a.jpg"):
        Path(file).write_bytes(image)
    Path("bad/b.jpg").write_bytes(image[:300])
    Path("photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    Path("mine.yaml").write_text("{base: vit-tiny-64, precision: {autocast: bf61}}")
    Path("list.yaml").write_text("- vit-tiny-64")
    Path("circle.yaml").write_text("base: circle.yaml")
    Path("result.json").write_text('{"kind": "linear"}')
    Path("broken.json").write_text('{"kind":')
    Path("list.csv").write_text("path,label\nplain/a.jpg,1\nplain/b.jpg,2\n")
    ended, _ = run(TINY_RUN)
    assert ended == 0


def run(command: str) -> tuple[int, list[str]]:
    """Run a command in this process; return its exit code and the `ijepa:` lines of its error stream."""
    errors = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["ijepa", *shlex.split(command)]),
        mock.patch.object(warnings, "showwarning"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    here = str(Path.cwd())
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("ijepa: ")]
    return int(ended.value.code or 0), [line.replace(here, "HERE") for line in lines]


def describe(command: str) -> str:
    """Return exit code and error line of a command as messages.txt has them."""
    code, lines = run(command)
    return "\n".join([f"exit {code}", *lines])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    with contextlib.chdir(folder):
        make_inputs()
    return folder


@pytest.mark.parametrize(("command", "expected"), read_messages().items())
def test_error_line_of(command: str, expected: str, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    before = sorted(str(path) for path in inputs.rglob("*"))
    assert describe(command) == expected
    assert sorted(str(path) for path in inputs.rglob("*")) == before, "bad input wrote something"


def test_messages_are_one_line_each() -> None:
    for command, expected in read_messages().items():
        code, line = expected.splitlines()
        assert code in ("exit 1", "exit 2") and line.startswith("ijepa: "), command


def record() -> None:
    """Write messages.txt again, with the present messages of its commands."""
    commands = list(read_messages())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_inputs()
        found = [f"{PROMPT} {command}".rstrip() + "\n" + describe(command) for command in commands]
    FILE.write_text("\n\n".join(found) + "\n")


if __name__ == "__main__":
    if not os.environ.get("IJEPA_CACHE"):
        os.environ["IJEPA_CACHE"] = tempfile.mkdtemp()
    record()
