"""Weights folders that several test modules export and import."""

from pathlib import Path

import pytest

from tests.helpers.libraries import SHAPES, recipe, write_weights


@pytest.fixture(scope="module", params=SHAPES)
def ours(request, tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("ours") / request.param, recipe(request.param))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("tiny") / "tiny", recipe("tiny"))
