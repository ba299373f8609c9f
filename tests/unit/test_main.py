"""The `ijepa` command: an error ends it with one line and an exit code."""

import sys

import pytest

from ijepa.__main__ import main
from ijepa.config.recipe import Recipe
from tests.helpers.commands import ijepa


def test_debug_shows_the_traceback():
    found = ijepa("pretrain", "vit-smal-16", "--debug")
    assert found.returncode != 0 and "Traceback" in found.stderr


def test_unexpected_error_is_one_line(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(sys, "argv", ["ijepa", "pretrain", "vit-tiny-64"])
    monkeypatch.setattr(Recipe, "load", broken)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1 and found[0].startswith("ijepa: ZeroDivisionError: division by zero; run again with --debug")
    monkeypatch.setattr(sys, "argv", ["ijepa", "pretrain", "vit-tiny-64", "--debug"])
    with pytest.raises(ZeroDivisionError):
        main()
