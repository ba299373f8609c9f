"""Gathering rows when ranks have different numbers of rows."""

import pytest
import torch

from ijepa.distributed.float8_gather import gather_rows


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_gather_rows_with_uneven_shares(ranks, monkeypatch):
    whole, parts = torch.arange(1, 33, dtype=torch.uint8).view(8, 4), []

    def gather(rows, part, group, async_op):
        parts.append(part)
        if len(parts) == ranks:
            rows.copy_(torch.cat(parts))

    for name in ("all_gather_single", "all_gather_into_tensor"):  # of torch 2.13 and of 2.11
        monkeypatch.setattr(torch.distributed, name, gather, raising=False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    each = -(-8 // ranks)
    for rank in range(ranks):
        out = torch.zeros_like(whole)
        _, held, rows = gather_rows(out, whole[rank * each : (rank + 1) * each], None)
        assert held is out
    assert torch.equal(rows[:8], whole) and (rows is out) == (8 % ranks == 0)
