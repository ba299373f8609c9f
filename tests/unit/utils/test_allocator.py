import ctypes
import os
import sys

import pytest

from ijepa.utils.allocator import bound_kernel_caches, keep_freed_memory

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def test_bound_kernel_caches_keeps_what_the_environment_sets(monkeypatch):
    monkeypatch.setattr(os, "environ", {NAMES[0]: "7"})
    bound_kernel_caches()
    assert os.environ[NAMES[0]] == "7" and 0 < int(os.environ[NAMES[1]]) < 1024


def test_keep_freed_memory_does_nothing_on_another_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("a C library was loaded"))
    assert not keep_freed_memory()


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_keep_freed_memory_without_glibc(monkeypatch, error):
    def missing(name):
        raise error

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not keep_freed_memory()
