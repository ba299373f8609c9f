"""The files that a run writes, on full disks."""

import os

import pytest
import torch

from ijepa.checkpoint.run_dir import Run
from ijepa.training.metrics import VALUES, Monitor, StepRecord, truncate_logs
from ijepa.training.schedules import Rates
from ijepa.utils.errors import RunError


def test_monitor_raises_run_error_on_a_full_disk(tmp_path):
    """Every write to Linux's /dev/full fails as on a full disk, including the one of closing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    monitor = Monitor(Run(tmp_path / "run"), total=4, start=0, log_every=1, quiet=True)
    rates = Rates(lr_encoder=1.0, lr_predictor=1.0, weight_decay=0.0, momentum=1.0)
    monitor.add(StepRecord(1, 0.1, rates, torch.ones(len(VALUES)), 8, 1.0, 0.0))
    with pytest.raises(RunError, match="metrics.jsonl"):
        monitor.flush()
    with pytest.raises(RunError, match="No space left"):
        monitor.close()


def test_truncate_logs_on_a_full_disk_keeps_the_file(whole, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    damaged = b"7\n" + (whole / "metrics.jsonl").read_bytes()  # to remove a line, the file is written again
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="metrics.jsonl"):
        truncate_logs(Run(tmp_path), 3)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == damaged
