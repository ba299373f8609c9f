"""The language check: which text counts as prose, and what it prints."""

from tools.check_language import main, python_prose, read_rules

SOURCE = '''"""Is beside it.

More of
which lies here."""
colour = "colour"  # a colour
message = f"{colour} is no " "folder here"
'''


def test_python_prose_keeps_comments_and_strings_in_their_places():
    lines = python_prose(SOURCE).split("\n")
    assert lines[0].strip() == "Is beside it." and lines[4].strip() == "a colour"
    assert lines[4].index("colour") == SOURCE.split("\n")[4].rindex("colour")
    assert "colour" not in lines[5] and "is no" in lines[5]


def test_main_prints_file_line_and_replacement(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "a.md").write_text("A `colour`.\n\n```\ncolour\n```\n[licence](licence.md)\n")
    (tmp_path / "CONTRIBUTING.md").write_text("| colour | color |\n")
    assert main(["a.py", "a.md", "CONTRIBUTING.md"]) == 1
    found = [line.split(" -> ")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(found) == [
        "a.md:6: licence",
        "a.py:1: beside",
        "a.py:3: of which",
        "a.py:5: colour",
        "a.py:6: is no folder",
    ]
    assert main(["CONTRIBUTING.md"]) == 0


def test_every_rule_is_a_pattern_with_a_replacement():
    assert all(replacement.strip() for _, replacement in read_rules())
