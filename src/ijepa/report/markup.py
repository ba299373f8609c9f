"""HTML in small pieces: escaped text, tables, figures, sections, and the line that stands where one is missing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Section:
    """A part of the page; `body` is HTML."""

    key: str
    title: str
    body: str

    def html(self) -> str:
        """Return the section, with its anchor."""
        return f'<section id="{self.key}">\n<h2>{escape(self.title)}</h2>\n{self.body}\n</section>'


@dataclass(frozen=True)
class Gap:
    """A part that the page lacks: what is missing, and the command that would fill it, both plain text."""

    key: str
    title: str
    missing: str
    command: str

    def html(self) -> str:
        """Return the line that stands in the section's place."""
        return (
            f'<p class="gap" id="{self.key}"><strong>{escape(self.title)}</strong> left out: {escape(self.missing)}. '
            f"To fill it: <code>{escape(self.command)}</code></p>"
        )


Part = Section | Gap


def figure(body: str, caption: str, *, kind: str = "") -> str:
    """Return a figure; `body` and `caption` are HTML, `kind` is a class of the style sheet."""
    named = f' class="{kind}"' if kind else ""
    return f"<figure{named}>\n{body}\n<figcaption>{caption}</figcaption>\n</figure>"


def scrolling(body: str, label: str) -> str:
    """Return what may be wider than a small screen in a frame that scrolls, with the keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{body}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", kind: str = "") -> str:
    """Return a table of HTML cells; the first cell of every row is its header."""
    named = f' class="{kind}"' if kind else ""
    title = f"<caption>{caption}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f"<table{named}>{title}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def facts(pairs: Iterable[tuple[str, str]], *, kind: str = "facts") -> str:
    """Return names and values as a list of definitions; values are HTML."""
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">{body}</dl>'


def details(summary: str, body: str) -> str:
    """Return something that opens on demand; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def percent(share: float, digits: int = 1) -> str:
    """Return a share as a number of per cent, without the sign."""
    return f"{100 * share:.{digits}f}"


def number(value: float) -> str:
    """Return a number as short as it can be read: four significant digits, whole ones in full."""
    if value != value:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"
