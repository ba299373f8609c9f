"""Number of cores that a process may use, with and without CPU affinity."""

import os

from ijepa.utils.cores import available_cores


def test_available_cores_are_those_of_the_cpu_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3, 5}, raising=False)
    assert available_cores() == 3


def test_available_cores_without_cpu_affinity_are_those_of_the_machine(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1
