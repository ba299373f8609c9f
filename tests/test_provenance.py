from pathlib import Path

import pytest

from ijepa import provenance


def test_a_checkout_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins and an evaluation is saved where git is not installed."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "src/ijepa").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src/ijepa/provenance.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert provenance.commit() is None
