import shutil
from pathlib import Path

import pytest

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.run import evaluate
from ijepa.release.archive import write_archive
from ijepa.release.model_card import About
from ijepa.training.loop import pretrain
from tests.conftest import TINY


@pytest.fixture(scope="session")
def finished_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one evaluation; tests do not change it."""
    folder = tmp_path_factory.mktemp("release") / "tiny-run"
    recipe = Recipe.read({**TINY, "data": {**TINY["data"], "path": str(scenes)}}, "test")
    info = {"data": {"path": str(scenes)}, "init": "earlier (step-00000003)"}
    pretrain(recipe, open_dataset(scenes, split="train"), folder, quiet=True, info=info)
    (folder / "small.yaml").write_text("base: demo\nname: small\nneighbors: [5]\nk: 5\n")
    evaluate("knn", str(folder), f"{scenes}/train-*.tar", f"{scenes}/val-*.tar", protocol=str(folder / "small.yaml"))
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which tests may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def archive(finished_run: Path, tmp_path: Path) -> Path:
    return write_archive(finished_run, tmp_path / "release", About(country="Sweden", watts=65.0))
