"""A parsed HTML page: its tags, its text, and its elements by class."""

from html.parser import HTMLParser

_VOID = {"meta", "img", "br", "hr", "input", "link"}
Attributes = dict[str, str | None]


class Page(HTMLParser):
    """Parses a page. Fails if tags are not closed in order, or an attribute occurs twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, Attributes]] = []
        self.pieces: list[tuple[tuple[str, ...], str]] = []
        """Text with the names of the tags and the ids around it."""
        self._around: list[tuple[str, ...]] = [()]
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in _VOID:
            self.open.append(tag)
            self._around.append((*self._around[-1], tag, *(f"#{value}" for name, value in attrs if name == "id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()
        self._around.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append((self._around[-1], data))

    def of(self, name: str) -> list[Attributes]:
        """Return the attributes of every tag of that name."""
        return [attributes for tag, attributes in self.tags if tag == name]

    def text(self, *around: str) -> list[str]:
        """Return the pieces of text inside all of `around`: tag names, or ids that start with #."""
        return [piece.strip() for names, piece in self.pieces if set(around) <= set(names) and piece.strip()]

    def words(self, *around: str) -> str:
        """Return the text inside all of `around` with single spaces."""
        return " ".join(" ".join(self.text(*around)).split())

    @property
    def alts(self) -> list[str]:
        """The alternative texts of images and of mask overlays."""
        return [attributes["alt"] or "" for attributes in self.of("img")] + [
            attributes["aria-label"] or "" for attributes in self.of("svg")
        ]

    @property
    def sections(self) -> list[str]:
        """The ids of the sections that the page has."""
        return [str(attributes["id"]) for attributes in self.of("section")]

    @property
    def missing(self) -> set[str]:
        """The ids of what the page left out."""
        return {str(attributes["id"]) for _, attributes in self.tags if attributes.get("class") == "missing"}
