import pytest
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.release import archive
from ijepa.utils.errors import UserError


def invoke(*words: object) -> str:
    done = CliRunner().invoke(cli, ["archive", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    return done.output


@pytest.mark.parametrize(
    ("words", "where"),
    [(("run",), "OUT"), (("run", "out", "--verify"), "--verify"), (("run", "out", "--country", "nowhere"), "nowhere")],
)
def test_archive_refuses_words_that_do_not_fit(words, where, monkeypatch):
    for name in ("write_archive", "verify_archive"):
        monkeypatch.setattr(archive, name, lambda *given, **options: pytest.fail("was called"))
    with pytest.raises(UserError) as err:
        invoke(*words)
    assert where in err.value.where


def test_archive_passes_its_options_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(archive, "write_archive", lambda run, out, about, **options: seen.append((about, options)))
    said = invoke(tmp_path, tmp_path / "out", "--license", "mit", "--dataset", "mine", "--watts", 300, "--unfinished")
    ((about, options),) = seen
    assert (about.license, about.dataset, about.watts, about.country) == ("mit", "mine", 300, "World")
    assert options["unfinished"] and str(tmp_path / "out") in said


def test_archive_verify_prints_the_number_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "verify_archive", lambda run, progress: 12)
    assert "12 files" in invoke(tmp_path, "--verify")
