"""Small pieces of Markdown."""

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def counted(number: int, word: str, several: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {word if number == 1 else several}"


def duration(seconds: float) -> str:
    """Return a length of time in the unit in which it is readable."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.2f} {unit}"
    return f"{seconds:.1f} seconds"
