import pytest
import torch

from ijepa.evaluation.features import standardize
from ijepa.evaluation.features.standardize import RunningMeanStd, mean_and_std


@pytest.mark.parametrize("rows", [37, 16384])
def test_mean_and_std_in_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardize, "_ROWS", rows)
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
    x[:, 2] = 5
    mean, std = mean_and_std(x.half())
    expected = x.half().double().std(0, correction=0)
    expected[2] = 1  # a constant channel
    torch.testing.assert_close(mean.double(), x.half().double().mean(0), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(std.double(), expected, atol=1e-5, rtol=1e-6)


def test_running_mean_std_of_batches_is_that_of_all_rows() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 10.0, 1e3]) + 1e3
    running = RunningMeanStd()
    for batch in x.split([1, 99, 400]):
        running.add(batch)
    mean, std = running.mean_and_std()
    torch.testing.assert_close(mean, x.double().mean(0), atol=0, rtol=1e-12)
    torch.testing.assert_close(std, x.double().std(0, correction=0), atol=0, rtol=1e-9)
