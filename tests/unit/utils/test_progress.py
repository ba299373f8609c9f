import pytest

from ijepa.utils import progress
from ijepa.utils.progress import ProgressMeter, duration


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0s"), (45, "45s"), (59.7, "1m 0s"), (725, "12m 5s"), (12_000, "3h 20m"), (1_483_200, "17d 4h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_progress_meter_reports_every_few_seconds(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = ProgressMeter(lines.append, "read", 10_000_000_000, "GB", 1e9)
    for seconds, done in ((1, 1e9), (4.9, 2e9), (5, 2.5e9), (6, 3e9), (10, 5e9)):
        now[0] = seconds
        meter.update(done)
    assert lines == [
        "read: 2 of 10 GB, 0 per second, 0.2 minutes left",
        "read: 5 of 10 GB, 0 per second, 0.2 minutes left",
    ]
