"""Processes that do not fit the recipe or the machine are refused."""

import pytest
import torch

from ijepa.distributed.launch import join_training
from ijepa.training.loop import pretrain
from ijepa.utils.errors import UserError
from tests.helpers.runs import recipe, source


@pytest.mark.parametrize(
    ("strategy", "world", "where"),
    [
        ("zero2", None, "parallel.strategy = zero2"),
        ("none", "2", "parallel.strategy = none"),
        ("zero2", "3", "batch.global = 8"),
        ("zero2", "8", "batch.micro = 2"),
    ],
)
def test_choose_strategy_refuses_what_does_not_fit_the_ranks(scenes, tmp_path, monkeypatch, strategy, world, where):
    if world:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", world)
    chosen = recipe(scenes, parallel={"strategy": strategy}, batch={"global": 8, "micro": 2})
    with pytest.raises(UserError) as caught:
        pretrain(chosen, source(scenes), tmp_path / "run")
    assert caught.value.where == where and not (tmp_path / "run").exists()


def test_join_training_refuses_more_ranks_than_gpus(scenes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 GPUs"):
        join_training(recipe(scenes, batch={"global": 8, "micro": 2}), {}).__enter__()
