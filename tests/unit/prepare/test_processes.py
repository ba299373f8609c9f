import os
import signal

import pytest

from ijepa.prepare.processes import run_jobs
from ijepa.utils.errors import RunError


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_run_jobs_yields_results_in_order(processes):
    found = list(run_jobs(square, range(20), processes))
    assert [value for value, _ in found] == [number * number for number in range(20)]
    assert (os.getpid() in {pid for _, pid in found}) == (processes == 1)


def test_run_jobs_raises_run_error_if_a_process_is_killed():
    with pytest.raises(RunError, match="killed"):
        list(run_jobs(killed, range(8), 2))
