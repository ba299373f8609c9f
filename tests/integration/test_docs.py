"""Every command that README and docs show is parsed, and run where that takes no training; Python blocks are run."""

import importlib
import json
import re
import shlex

import click
import pytest
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.config.recipe import Recipe
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S):
            found.append((page.name, block))
    return found


def commands() -> list[tuple[str, str]]:
    found = []
    for page, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append((page, shlex.join(words)))
    return found


def parse(command: click.Command, name: str, words: list[str], parent: click.Context | None = None) -> None:
    """Parse as click would, without running anything."""
    context = command.make_context(name, list(words), parent=parent)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        inner_name, inner, inner_words = command.resolve_command(context, rest)
        parse(inner, inner_name, inner_words, context)


def test_there_is_something_to_check():
    assert len(commands()) > 10 and len(blocks("python")) > 1


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:60])
def test_shown_commands_parse(page, line):
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "torchrun":
        parse(cli, "ijepa", words[words.index("ijepa") + 1 :])
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        parse(script.main, words[1], words[2:])
    elif words[0] == "pip":
        assert "ijepa-pretrain" in line
    else:
        assert words[0] == "ijepa", f"{page} shows {line}: how is that checked?"
        parse(cli, "ijepa", words[1:])


def runnable() -> list[list[str]]:
    """The words after `ijepa` of each shown command that can run without training; `pretrain` with --dry-run."""
    found = []
    for _, line in commands():
        words = shlex.split(line)
        words = words[words.index("ijepa") + 1 :] if "ijepa" in words else []
        if words[:1] == ["pretrain"]:
            found.append([word for word in words if word != "--dry-run"] + ["--dry-run"])
        elif words[:1] == ["plan"] or words[:2] in (["data", "index"], ["data", "check"]):
            found.append(words)
    return found


@pytest.mark.parametrize("words", runnable(), ids=lambda words: " ".join(words)[:60])
def test_shown_commands_that_need_no_training_run(words, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/huge").mkdir(parents=True)
    (tmp_path / "runs/huge/recipe.yaml").write_text(Recipe.load("vit-huge-16-in22k").dump())
    for name in ("IMAGES", "SHARDS", "runs/demo-scenes"):
        (tmp_path / name).symlink_to(scenes)
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.exception or result.output
    assert result.output.strip()


def test_there_are_commands_to_run():
    assert {words[0] for words in runnable()} == {"pretrain", "plan", "data"} and len(runnable()) > 12


@pytest.mark.parametrize(("page", "block"), blocks("bash"), ids=lambda value: str(value)[:30])
def test_what_shown_scripts_start_parses(page, block):
    started = [line for line in block.replace("\\\n", " ").splitlines() if " -m ijepa " in line]
    assert started, f"{page}: a script that starts nothing of ours"
    for line in started:
        parse(cli, "ijepa", shlex.split(line.rstrip(" &").split(" -m ijepa ")[1]))


@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=lambda value: str(value)[:40])
def test_shown_python_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(block, page, "exec")
    # interop.md's blocks build on one another: tests/interop/test_examples.py runs them.
    if "runs/mine" not in block and "images=12_000" not in block and page != "interop.md":
        exec(code, {})


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", ["camvid", "tiny-imagenet-100"])
def test_tables_of_small_sets_are_what_the_files_say(name):
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["protocols"]
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert f"results/{name}.json" in page
    for title, entry in found.items():
        level = "-" if entry["level"] is None else str(entry["level"])
        figures = [f"{100 * entry['rows'][row][entry['figure']]:.1f}" for row in ("scenes", "random ViT-S", "pixels")]
        line = " | ".join([f"| `{title}`", level, *figures, f"{100 * entry['chance']:.1f} |"])
        assert line in page, line
