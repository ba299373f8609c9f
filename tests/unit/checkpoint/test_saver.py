"""A sharded checkpoint is written during the next steps, and has the weights of its own step."""

from threading import Event

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint import state_dict_saver

from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.reader import CheckpointReader
from ijepa.checkpoint.saver import Saver
from ijepa.distributed.process_group import World
from ijepa.utils.errors import RunError
from tests.helpers.checkpoints import built

SHARDED = World("zero2", mesh=object())  # type: ignore[arg-type]
NAME = "context_encoder.blocks.0.attn.qkv.weight"


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled")
def test_save_returns_before_the_shards_are_written(tmp_path, monkeypatch):
    begun, go = Event(), Event()

    def waiting(*arguments, **keywords):
        begun.set()
        assert go.wait(60)
        return save(*arguments, **keywords)

    save = state_dict_saver.save
    monkeypatch.setattr(state_dict_saver, "save", waiting)
    (model, optimizer), saver = built(), Saver(tmp_path, 2, SHARDED)
    weight = model.state_dict()[NAME]
    before = weight.clone()
    saver.save(5, model, optimizer, {})
    assert begun.wait(60) and not list_checkpoints(tmp_path)
    weight.zero_()
    go.set()
    saver.finish()
    (folder,) = list_checkpoints(tmp_path)
    assert torch.equal(CheckpointReader(folder).rows(NAME), before) and before.any()


def test_save_raises_the_error_of_the_checkpoint_before(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_dict_saver, "save", full)
    saver = Saver(tmp_path, 2, SHARDED)
    saver.save(5, *built(), {})
    with pytest.raises(RunError, match="No space left"):
        saver.save(6, *built(), {})
    assert not any(tmp_path.iterdir())


def test_saver_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        Saver(tmp_path, 2, World()).save(1, *built(), {})
    assert not any(tmp_path.iterdir())
