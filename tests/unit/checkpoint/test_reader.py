import json

import pytest
import torch
from safetensors.torch import save_file

from ijepa.checkpoint.format import save_checkpoint
from ijepa.checkpoint.reader import CheckpointReader
from ijepa.checkpoint.state import FORMAT, describe, seal
from ijepa.utils.errors import UserError
from tests.helpers.checkpoints import built

WHOLE = torch.arange(30.0).view(10, 3)
CUTS = {1: (0, 4), 2: (4, 8), 3: (8, 10)}


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint with one tensor of ten rows in three files, each with the number of its first row."""
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    for number, (start, stop) in CUTS.items():
        about = {"w": {"saved_offsets": [start, 0]}}
        tensors = {"w": WHOLE[start:stop].clone()} | ({"count": torch.tensor(5)} if number == 1 else {})
        save_file(tensors, folder / f"shard-{number:05d}.safetensors", {"DCP_SHARDING_INFO": json.dumps(about)})
    files = {file.name: describe(file) for file in sorted(folder.iterdir())}
    (folder / "state.json").write_text(seal({"format": FORMAT, "step": 3, "files": files}))
    return folder


@pytest.mark.parametrize("rows", [(0, 10), (0, 4), (3, 5), (5, 9), (9, 10), (2, 10), (10, 10), (4, 4)])
def test_rows_are_read_across_files(sharded, rows):
    reader = CheckpointReader(sharded)
    assert reader.shapes == {"w": (10, 3), "count": ()}
    assert torch.equal(reader.rows("w", rows), WHOLE[slice(*rows)])
    assert torch.equal(reader.rows("w"), WHOLE) and reader.rows("count").item() == 5


def test_reader_of_a_part_gives_names_of_the_model(tmp_path):
    model, optimizer = built()
    path = save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=1)
    reader, tensors = CheckpointReader(path, "target_encoder"), model.state_dict()
    assert reader.shapes and all(name.startswith("target_encoder.") for name in reader.shapes)
    assert all(torch.equal(reader.rows(name), tensors[name]) for name in reader.shapes)


def test_reader_refuses_a_file_of_another_size(sharded):
    file = sharded / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError) as err:
        CheckpointReader(sharded)
    assert err.value.where == str(file)


@pytest.mark.parametrize("wanted", [{"w": (9, 3), "count": ()}, {"w": (10, 3)}, {"w": (10, 3), "count": (), "b": (1,)}])
def test_check_refuses_other_names_and_shapes(sharded, wanted):
    reader = CheckpointReader(sharded)
    reader.check({"w": (10, 3), "count": ()})
    with pytest.raises(UserError):
        reader.check(wanted)
