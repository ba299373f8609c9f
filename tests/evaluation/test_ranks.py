"""Several processes give the result that one gives, to the last digit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ijepa.evaluation.ranks import Ranks
from tests.training.ranks import spawn

PROTOCOLS = {
    "cached": ("linear", "base: demo\ntrain_images: 40\nepochs: 2\nforward_batch: 7\nlrs: [0.01]\nbatch: 16"),
    "augmented": ("linear", "base: dinov2\ntrain_images: 40\nepochs: 2\nforward_batch: 7\nlrs: [0.01, 0.1]\nbatch: 16"),
    "patches": ("linear", "base: attentive\ntrain_images: 30\nepochs: 1\nforward_batch: 7\nbatch: 16"),
    "neighbours": ("knn", "base: demo\nforward_batch: 7"),
}
EVALUATE = """
import json, os, sys
from pathlib import Path
import torch
from ijepa.errors import Refused
from ijepa.evaluation.run import evaluate
torch.set_num_threads(1)
if os.environ["WORLD_SIZE"] != "1":
    torch.distributed.init_process_group("gloo")
folder, scenes, chosen = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for name, (kind, _) in chosen.items():
    evaluate(kind, "scenes", f"{scenes}/train-*.tar", f"{scenes}/val-*.tar",
             protocol=str(folder / f"{name}.yaml"), output=folder / name)
if os.environ["WORLD_SIZE"] != "1":
    try:
        evaluate("segmentation", "scenes", scenes, scenes, output=folder)
    except Refused as error:
        sys.exit("without torchrun" not in str(error))
    sys.exit("two processes segmented")
"""


@pytest.fixture(scope="module")
def results(scenes, tmp_path_factory) -> dict[int, Path]:
    """The folder of results by the number of processes that made them."""
    found = {}
    for size in (1, 2):
        found[size] = folder = tmp_path_factory.mktemp(f"by-{size}")
        for name, (_, text) in PROTOCOLS.items():
            (folder / f"{name}.yaml").write_text(f"{text}\nname: {name}\n")
        said = spawn(size, [sys.executable, "-c", EVALUATE, str(folder), str(scenes), json.dumps(PROTOCOLS)])
        assert [code for code, _ in said] == [0] * size, said
    return found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_processes_change_no_digit(results, name):
    one, several = (json.loads(next((results[size] / name).glob("*.json")).read_text()) for size in (1, 2))
    assert one.pop("seconds") > 0 and several.pop("seconds") > 0
    assert one == several
    assert len({row["top1"] for row in one["rows"]}) > 1  # else equality would say little


def test_every_row_is_one_processes():
    rows = [Ranks(rank, 3).rows(50, 8) for rank in range(3)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(50))
    assert rows[1][:8].tolist() == list(range(8, 16))
    assert Ranks(2, 3).rows(7, 8).tolist() == []
