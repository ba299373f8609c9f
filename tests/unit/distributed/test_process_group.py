"""Collectives of evaluation, and evaluations on one and two processes, which have the same result."""

import json
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.results.schema import HEADLINE
from ijepa.utils.errors import RunError
from tests.helpers.ranks import spawn
from tests.helpers.videos import write_video

PROTOCOLS = {
    "cached": ("linear", "base: demo\ntrain_images: 40\nepochs: 2\nforward_batch: 7\nlrs: [0.01]\nbatch: 16"),
    "augmented": ("linear", "base: dinov2\ntrain_images: 40\nepochs: 2\nforward_batch: 7\nlrs: [0.01, 0.1]\nbatch: 16"),
    "patches": ("linear", "base: attentive\ntrain_images: 30\nepochs: 1\nforward_batch: 7\nbatch: 16"),
    "neighbors": ("knn", "base: demo\ntrain_images: 60\nforward_batch: 7"),
    "bank": ("segmentation", "base: demo\ntrain_images: 20\ntest_images: 7\nbatch: 3"),
    "clusters": (
        "segmentation",
        "base: demo-kmeans\ntest_images: 8\nbatch: 3\nkmeans: {overcluster: 20, restarts: 1, seeds: 1}",
    ),
    "trained": ("segmentation", "base: demo-linear\ntrain_images: 9\ntest_images: 7\nbatch: 3\nlinear: {steps: 3}"),
    "videos": ("propagation", "base: demo\nshort_side: 32"),
}
FEW = {"neighbors", "videos"}
"""Protocols of the fast tests."""
EVALUATE = """
import json, os, sys
from pathlib import Path
import torch
from ijepa.utils.errors import RunError
from ijepa.evaluation.run import evaluate, evaluate_videos
torch.set_num_threads(1)
if os.environ["WORLD_SIZE"] != "1":
    torch.distributed.init_process_group("gloo")
folder, scenes, videos, chosen = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
try:
    evaluate_videos("scenes", str(videos / "broken"), protocol=str(folder / "videos.yaml"), output=folder / "none")
except RunError as error:
    print(error, file=sys.stderr)
for name, (kind, _) in chosen.items():
    rule = {"protocol": str(folder / f"{name}.yaml"), "output": folder / name}
    if kind == "propagation":
        evaluate_videos("scenes", str(videos / "whole"), baselines=False, **rule)
    else:
        several = kind in ("linear", "knn")
        evaluate(kind, "scenes", f"{scenes}/train-*.tar", f"{scenes}/val-*.tar", baselines=several, **rule)
"""


@pytest.fixture
def results(request) -> dict[int, Path]:
    """Return the folders of results by the number of processes; all protocols for a slow test, else two."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("all_results" if slow else "few_results")


@pytest.fixture(scope="module")
def few_results(scenes, tmp_path_factory) -> dict[int, Path]:
    return evaluated(scenes, tmp_path_factory, FEW)


@pytest.fixture(scope="module")
def all_results(scenes, tmp_path_factory) -> dict[int, Path]:
    return evaluated(scenes, tmp_path_factory, PROTOCOLS.keys() - FEW)


def evaluated(scenes: Path, tmp_path_factory, names: Collection[str]) -> dict[int, Path]:
    found, videos, chosen = {}, tmp_path_factory.mktemp("videos"), {name: PROTOCOLS[name] for name in sorted(names)}
    for name in ("a", "b", "c"):
        write_video(videos / "whole", name, frames=4)
        write_video(videos / "broken", name, frames=3)
    (videos / "broken/images/b/00001.png").write_bytes(b"no image")
    for size in (1, 2):
        found[size] = folder = tmp_path_factory.mktemp(f"by-{size}")
        for name, (_, text) in PROTOCOLS.items():
            (folder / f"{name}.yaml").write_text(f"{text}\nname: {name}\n")
        given = [str(folder), str(scenes), str(videos), json.dumps(chosen)]
        said = spawn(size, [sys.executable, "-c", EVALUATE, *given])
        assert [code for code, _ in said] == [0] * size, said
        assert all("images/b/00001.png: " in text for _, text in said), "all processes report the error of one"
        assert not (folder / "none").exists()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PROTOCOLS]
)
def test_evaluation_is_identical_for_one_and_two_processes(results, name):
    one, several = (json.loads(next((results[size] / name).glob("*.json")).read_text()) for size in (1, 2))
    assert one.pop("seconds") > 0 and several.pop("seconds") > 0
    for each in (one, several):
        each["cpu"].pop("gemm", None)  # measured, like the seconds
    assert one == several
    assert (
        len(one["rows"]) == 1 or len({row[HEADLINE[one["kind"]]] for row in one["rows"]}) > 1
    )  # otherwise equality would prove little


def test_batch_rows_are_disjoint_and_complete():
    rows = [World(rank=rank, size=3).batch_rows(50, 8) for rank in range(3)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(50))
    assert rows[1][:8].tolist() == list(range(8, 16))
    assert World(rank=2, size=3).batch_rows(7, 8).tolist() == []


def test_map_in_turns_on_one_process_yields_everything():
    def make(numbers):
        for number in numbers:
            if number == 3:
                raise RunError("no more")
            yield (torch.tensor(number),)

    assert [int(x) for (x,) in SINGLE_PROCESS.map_in_turns(3, make)] == [0, 1, 2]
    with pytest.raises(RunError, match="no more"):
        list(SINGLE_PROCESS.map_in_turns(4, make))
