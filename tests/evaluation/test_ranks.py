"""Evaluation by two processes on gloo gives the same files as by one, but for times."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa.errors import Failed
from ijepa.evaluation import ranks
from ijepa.evaluation.run import evaluate, evaluate_videos
from tests.evaluation.test_propagation import write_video
from tests.evaluation.test_run import sets, weights  # noqa: F401
from tests.training.ranks import spawn

RULES = {
    "linear": "base: demo\nname: small\nepochs: 1\nlrs: [1e-3]\nforward_batch: 16\n",
    "knn": "base: demo\nname: small\nneighbours: [5]\nk: 5\nforward_batch: 16\n",
    "segmentation": "base: demo\nname: small\nimage_size: 48\ntrain_images: 12\ntest_images: 7\nbatch: 3\n",
    "propagation": "base: demo\nname: small\nshort_side: 32\n",
}


@pytest.fixture
def single_thread():
    """Products are added up in another order by several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def told(folder: Path) -> dict[str, dict[str, Any]]:
    results = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    for result in results.values():
        assert result.pop("seconds") > 0
    return results


def test_two_processes_give_the_same_results(weights: Path, scenes: Path, tmp_path: Path, single_thread: None) -> None:  # noqa: F811
    train, test = sets(scenes)
    for name in ("a", "b", "c"):
        write_video(tmp_path / "videos", name, frames=4)
    jobs: list[dict[str, Any]] = []
    for kind, text in {**RULES, "augmented": RULES["linear"].replace("small", "augmented\naugment: true")}.items():
        rule = tmp_path / f"{kind}.yaml"
        rule.write_text(text)
        job = {"weights": str(weights), "protocol": str(rule), "baselines": kind == "knn"}
        if kind == "propagation":
            jobs.append({**job, "data": str(tmp_path / "videos")})
        else:
            jobs.append({**job, "kind": "linear" if kind == "augmented" else kind, "train": train, "test": test})
    broken = tmp_path / "bad"
    write_video(broken, "a")
    write_video(broken, "b")
    (broken / "images/b/00001.png").write_bytes(b"no image")
    bad = {**jobs[3], "data": str(broken), "output": str(tmp_path / "none")}
    for job in jobs:
        call = evaluate_videos if "data" in job else evaluate
        call(**{**job, "output": tmp_path / "one"})
    shared = [{**job, "output": str(tmp_path / "two")} for job in jobs]
    command = [sys.executable, "-m", "tests.evaluation.ranks", json.dumps([*shared[:2], bad, *shared[2:]])]
    ended = spawn(2, command)
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("images/b/00001.png: " in text for _, text in ended), "both say what one of them met"
    alone, together = told(tmp_path / "one"), told(tmp_path / "two")
    assert len(alone) == 5 and alone.keys() == together.keys()
    for name, result in alone.items():
        assert together[name] == result, name
    assert not (tmp_path / "none").exists()


def test_a_world_of_one_deals_to_itself() -> None:
    def make(numbers):
        for number in numbers:
            if number == 3:
                raise Failed("no more")
            yield (torch.tensor(number),)

    assert [int(x) for (x,) in ranks.dealt(3, make)] == [0, 1, 2]
    with pytest.raises(Failed, match="no more"):
        list(ranks.dealt(4, make))
    assert (ranks.size(), ranks.rank(), ranks.from_first(lambda: 7)) == (1, 0, 7)
