"""Logs are truncated, checked for damage and gaps, and sampled."""

import io
import json
from itertools import pairwise

import pytest

from ijepa.checkpoint import logs
from ijepa.checkpoint.logs import count_rows, sample_rows, spread_rows, truncate_log

METRICS = {"every_step": True}


def line(step: object, **more: object) -> bytes:
    return json.dumps({"step": step, "loss": 0.5, **more}).encode() + b"\n"


def rows(*steps: int) -> bytes:
    return b"".join(line(step) for step in steps)


def steps_in(file) -> list[int]:
    return [json.loads(text)["step"] for text in file.read_bytes().splitlines()]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("tail", [b"", b'{"step": 7, "lo', b"\0" * 300, b"7\n\xff\n", rows(7, 8, 9)])
def test_truncate_log_cuts_later_rows_in_place(file, tail):
    whole = rows(*range(1, 7))
    file.write_bytes(whole + tail)
    node = file.stat().st_ino
    assert truncate_log(file, 6, **METRICS) == ""
    assert file.read_bytes() == whole and file.stat().st_ino == node  # in place, nothing is copied
    assert truncate_log(file, 2, **METRICS) == "" and file.read_bytes() == rows(1, 2)
    assert truncate_log(file, 0, **METRICS) == "" and file.read_bytes() == b""


DAMAGE = {
    "no UTF-8": b'{"step": 2, "\xe9": 1}\n',
    "number": b"7\n",
    "list": b"[2]\n",
    "empty": b"{}\n",
    "NUL": b"\0\0\n",
}
DAMAGE |= {"null": line(None), "torn": b'{"step": 2, "lo\n', "no step": b'{"loss": 1}\n', "true": line(True)}
DAMAGE |= {"a damaged number": line(5), "beyond": line(10**9), "deep": b"[" * 100_000 + b"\n"}


@pytest.mark.parametrize("damaged", DAMAGE.values(), ids=DAMAGE)
def test_truncate_log_removes_and_reports_a_damaged_line(file, damaged):
    file.write_bytes(line(1) + damaged + rows(3, 4, 5))
    problem = truncate_log(file, 4, **METRICS)
    assert problem == f"{file}: 1 damaged or misplaced line removed; step 2 is missing"
    assert steps_in(file) == [1, 3, 4] and not list(file.parent.glob(".*"))


@pytest.mark.parametrize("damaged", DAMAGE.values(), ids=DAMAGE)
def test_truncate_log_reports_a_damaged_last_line_as_missing(file, damaged):
    file.write_bytes(rows(1, 2, 3) + damaged + rows(5))
    assert truncate_log(file, 4, **METRICS) == f"{file}: step 4 is missing"
    assert steps_in(file) == [1, 2, 3]


@pytest.mark.parametrize(
    ("there", "problem"),
    [
        ((1, 2, 3), "steps 4 to 6 are missing"),
        ((1, 3, 4, 6), "steps 2, 5 are missing"),
        ((4, 5, 6), "steps 1 to 3 are missing"),
        ((), "steps 1 to 6 are missing"),
    ],
)
def test_truncate_log_names_missing_rows_and_keeps_the_others(file, there, problem):
    file.write_bytes(rows(*there))
    assert truncate_log(file, 6, **METRICS) == f"{file}: {problem}"
    assert steps_in(file) == list(there)


def test_truncate_log_treats_a_missing_file_as_empty(file):
    assert truncate_log(file, 6, **METRICS) == f"{file}: steps 1 to 6 are missing"
    assert truncate_log(file, 6) == f"{file}: rows after step 0 up to step 6 are missing"
    assert truncate_log(file, 6, repeats=True) == truncate_log(file, 0, **METRICS) == ""


def test_truncate_log_keeps_repeated_steps_once(file):
    file.write_bytes(rows(1, 2, 3, 2, 3, 4, 3, 4, 5))
    assert truncate_log(file, 4, **METRICS) == f"{file}: 4 damaged or misplaced lines removed"
    assert steps_in(file) == [1, 2, 3, 4]


def test_truncate_log_of_logs_without_every_step(file):
    file.write_bytes(rows(2, 4, 6, 8))
    assert truncate_log(file, 6) == "" and steps_in(file) == [2, 4, 6]
    assert truncate_log(file, 5) == f"{file}: rows after step 4 up to step 5 are missing"
    file.write_bytes(rows(0, 0, 3, 3, 6))
    assert truncate_log(file, 3, repeats=True) == "" and steps_in(file) == [0, 0, 3, 3]
    assert count_rows(file, 3) == 2 and count_rows(file, 4) == 0


class Counting(io.BytesIO):
    """A file that counts the bytes that are read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.read_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.read_bytes += len(data)
        return data


LONG = b"".join(
    b'{"step": %d, "loss": %.6f, "filler": "%s"}\n' % (step, 1 - step * 1e-6, b"x" * 200) for step in range(80_000)
)


def test_sample_rows_of_a_long_file_are_few_and_evenly_spread():
    log = Counting(LONG)
    found = [row["step"] for row in sample_rows(log)]
    assert len(LONG) > 4 * logs._SAMPLED and log.read_bytes <= logs._SAMPLED
    assert found == sorted(set(found)) and found[0] == 0 and found[-100:] == list(range(79_900, 80_000))
    assert max(after - before for before, after in pairwise(found)) < 80_000 / 500
    tenth = len(found) // 10
    assert sum(found[:tenth]) / tenth == pytest.approx(4_000, rel=0.05)


def test_spread_rows_of_a_short_file_skips_damaged_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert spread_rows(file) == []
    file.write_bytes(rows(1, 2) + b"7\n\xff\n{}\n" + rows(3) + b'{"step": 4')
    assert [row["step"] for row in spread_rows(file)] == [1, 2, 3]
