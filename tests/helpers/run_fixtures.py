"""A fixture for tests of training: an uninterrupted run."""

from pathlib import Path

import pytest

from ijepa.training.loop import pretrain
from tests.helpers.runs import recipe, source


@pytest.fixture(scope="session")
def whole(scenes, tmp_path_factory) -> Path:
    """Return an uninterrupted run, which other runs must equal."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(recipe(scenes), source(scenes), out, quiet=True)
    return out
