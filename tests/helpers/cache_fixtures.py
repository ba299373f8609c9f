from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an index cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("IJEPA_CACHE", str(folder))
    return folder
