"""Finds words and phrases that the style guide replaces, in documentation and in the prose of the source.

`python tools/check_language.py [PATH ...]` prints `file:line: word -> replacement` and exits with 1 if it finds any.
The rules are in forbidden_words.txt. Code is not searched: in Python only comments, docstrings and strings of several
words are; in YAML keys, in Markdown code, link targets and the tables of CONTRIBUTING.md (which list words) are not.
"""

import io
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEARCHED = ("*.md", "docs/*.md", "src/**/*.py", "src/**/*.yaml", "src/**/*.j2")
# What is not prose, by ending or name of a file; "" is for all files.
_CODE = {
    "": r"`[^`]*`|https?://\S+|\]\([^)]*\)",
    ".md": r"^```.*?^```",
    ".yaml": r"^ *[\w.-]+:",
    "CONTRIBUTING.md": r"^\|[^\n]*$",
}
_STRINGS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def read_rules() -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield (pattern, replacement) of every rule; a space in a pattern also matches a line break."""
    for line in (Path(__file__).parent / "forbidden_words.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, replacement = line.split(" => ")
            flexible = pattern.replace(" ", r"\s{1,40}")
            yield re.compile(rf"\b(?:{flexible})\b", re.I), replacement


def prose(path: Path) -> str:
    """Return the text of a file in which everything but prose is blank, with every line where it was."""
    text = path.read_text()
    if path.suffix == ".py":
        text = python_prose(text)
    for key in (path.suffix, path.name, ""):
        if key in _CODE:
            text = re.sub(_CODE[key], _blank, text, flags=re.M | re.S)
    return text


def python_prose(text: str) -> str:
    """Return comments and strings in their places, without quotes, comment signs and the fields of f-strings."""
    lines = [" " * len(line) for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _STRINGS and " " in token.string.strip():  # one word alone is a key or a name
            words = re.sub(r"[\"#]|\{[^{}]*\}", _blank, token.string)
            row, column = token.start
            for number, part in enumerate(words.split("\n"), start=row - 1):
                lines[number] = lines[number][:column] + part + lines[number][column + len(part) :]
                column = 0
    return "\n".join(lines)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"\S", " ", match[0])


def main(names: list[str]) -> int:
    """Check the named files, or all; return the exit code."""
    paths = [Path(name) for name in names] or sorted({path for each in SEARCHED for path in ROOT.glob(each)})
    rules, found = list(read_rules()), 0
    for path in paths:
        text = prose(path)
        for pattern, replacement in rules:
            for match in pattern.finditer(text):
                line, word = text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())
                print(f"{os.path.relpath(path)}:{line}: {word} -> {replacement}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
