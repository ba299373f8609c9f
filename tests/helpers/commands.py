"""Commands in their own process, and flags of a short run."""

import subprocess
import sys
from pathlib import Path


def ijepa(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ijepa", *arguments], capture_output=True, text=True, cwd=cwd)


SMALL = [
    *("--output", "run", "--batch.global", "8", "--data.workers", "0", "--log_every", "1", "--schedule.warmup", "1"),
    *("--model.encoder.width", "32", "--model.encoder.depth", "1", "--model.predictor.depth", "1"),
    *("--model.encoder.heads", "2"),
]
"""Flags of a run of seconds into `run`."""


def is_user_error(found: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = found.stderr.strip().splitlines()
    assert found.returncode == 2, found.stderr
    assert len(lines) == 1 and lines[0].startswith("ijepa: "), found.stderr
    for word in words:
        assert word in lines[0], lines[0]
