"""What several rooms' tests share: a small set of scenes and a recipe small enough to train in seconds."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# oneDNN keeps few kernels, and is full of them early: what still grows then is something else.
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ijepa.prepare.scenes.scenes import write_scenes

# torchvision from the package index fails to import with a CPU build of torch, because its operators do not load; timm
# and transformers then fail too. They import once the names exist. Define them only after the import has failed: a
# library that loads later and registers the same name aborts the process.
try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

pytest_plugins = ["tests.helpers.run_fixtures", "tests.helpers.weights_fixtures"]

TINY = {
    "name": "tiny",
    "steps": 8,
    "model": {
        "image_size": 48,
        "patch_size": 8,
        "encoder": {"width": 32, "depth": 2, "heads": 2, "drop_path": 0.2, "initial": "xavier"},
        "predictor": {"width": 16, "depth": 2, "heads": 2},
    },
    "mask": {"min_context": 4},
    "batch": {"global": 8, "micro": 4},
    "schedule": {"warmup": "2 steps"},
    "data": {"workers": 0},
    "checkpoint": {"every": 3, "keep": 2},
    "precision": {"autocast": "none"},
    "log_every": 2,
}


_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Every test begins with torch's own number of threads, which bits depend on: runs that go on bring theirs."""
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session", autouse=True)
def _index_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["IJEPA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 training and 20 validation scenes as shards."""
    out = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(out, images=80, seed=1, size=48, val_share=0.25, shard_size=32)
    return out
