"""A sharded checkpoint is written beside training: it holds what was there when it was asked for."""

from threading import Event

import pytest
import torch

from ijepa.checkpoint import saver
from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.reader import Stored
from ijepa.checkpoint.saver import Saver, write_shards
from ijepa.distributed.process_group import World
from ijepa.utils.errors import RunError
from tests.unit.checkpoint.test_format import built

SHARDED = World("zero2", mesh=object())  # type: ignore[arg-type]
NAME = "context_encoder.blocks.0.attn.qkv.weight"


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled")
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    begun, go = Event(), Event()

    def waiting(*arguments):
        begun.set()
        assert go.wait(60)
        write_shards(*arguments)

    monkeypatch.setattr(saver, "write_shards", waiting)
    (model, optimizer), saving = built(), Saver(tmp_path, 2, SHARDED)
    weight = model.state_dict()[NAME]
    before = weight.clone()
    saving.save(5, model, optimizer, {})  # comes back although nothing is written yet
    assert begun.wait(60) and not list_checkpoints(tmp_path)
    weight.zero_()
    go.set()
    saving.finish()
    (folder,) = list_checkpoints(tmp_path)
    assert torch.equal(Stored(folder).rows(NAME), before) and before.any()


def test_a_checkpoint_that_could_not_be_written_fails_the_next_call(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_shards", full)
    saving = Saver(tmp_path, 2, SHARDED)
    saving.save(5, *built(), {})
    with pytest.raises(RunError, match="No space left on device"):
        saving.save(6, *built(), {})
    assert not any(tmp_path.iterdir())
