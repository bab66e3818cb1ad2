"""HTML -> its text, and where in it headings begin; the writer that docx and epub have in common with it.

It is parsed in one go, without a tree in memory. Nothing is fetched and nothing is run: of scripts, styles and
entities of other files nothing remains. Needs lxml, of the extra `documents`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pi_gguf.errors import OptionError

LABEL = 200
"""Characters of a heading that its label keeps."""

_PIECE = 2**20
"""Given to the parser at once: it takes 20 MB at most."""


@dataclass(frozen=True)
class Place:
    """Where a page, a chapter or a part under a heading begins.

    Args:
        start: character of the text with which it begins.
        kind: what it is; of a PDF pages, of an epub chapters and the headings in them, of all else headings.
        label: number of the page, from 1, or the words of the heading.
    """

    start: int
    kind: Literal["page", "chapter", "heading"]
    label: str


@contextmanager
def documents_extra() -> Iterator[None]:
    """Import a library of the extra `documents`.

    Raises:
        OptionError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        name = (error.name or "a library").partition(".")[0]
        raise OptionError(f"{name} is not installed", "pip install 'pi-gguf[documents]'") from error


class Written:
    """Text that grows by words; between them the least of white space that all that was asked for allows."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self.places: list[Place] = []
        self._length = 0
        self._gap = ""
        self._cells: list[bool] = []  # of each row that is open: whether it has a cell
        self._at_start = False  # of a cell or an item: nothing was written in it yet
        self._waiting: list[tuple[Literal["chapter", "heading"], str]] = []  # places that begin with the next word
        self._heading: io.StringIO | None = None

    @property
    def text(self) -> str:
        return self._text.getvalue()

    def words(self, text: str) -> None:
        """Add text in which white space says no more than that there is some."""
        words = text.replace("\xad", "").split()
        if text[:1].isspace():
            self._space()
        if words:
            self.verbatim(" ".join(words))
            if text[-1].isspace():
                self._space()

    def verbatim(self, text: str) -> None:
        """Add text as it is."""
        if not text:
            return
        gap = self._gap if self._length else ""
        self._text.write(gap + text)
        self._length += len(gap) + len(text)
        self._gap, self._at_start = "", False
        self.places += [Place(self._length - len(text), kind, label) for kind, label in self._waiting]
        self._waiting = []
        if self._heading is not None:
            self._heading.write(f" {text}" if gap else text)

    def _space(self) -> None:
        self._gap = self._gap or " "

    def end_line(self, lines: int = 1) -> None:
        """End the line; with 2, the paragraph."""
        if not self._at_start:
            self._gap = "\n" * max(lines, self._gap.count("\n"))

    def begin_item(self, mark: str) -> None:
        self.words(mark)
        self._at_start = True

    def begin_row(self) -> None:
        self._cells.append(False)

    def begin_cell(self) -> None:
        """Set a tab between two cells, whatever ended in the one before."""
        if self._cells and self._cells[-1]:
            self._gap = self._gap + "\t" if self._at_start else "\t"
        if self._cells:
            self._cells[-1] = True
        self._at_start = True

    def end_row(self) -> None:
        if self._cells:
            self._cells.pop()
        self._gap, self._at_start = "\n", False

    def begin_chapter(self, label: str) -> None:
        self._waiting.append(("chapter", label))

    def begin_heading(self) -> None:
        self.end_heading()
        self._waiting.append(("heading", ""))
        self._heading = io.StringIO()

    def end_heading(self) -> None:
        """Give the place that began last the words since then as label, or forget it if there were none."""
        if self._heading is None:
            return
        label, self._heading = self._heading.getvalue().strip(), None
        if ("heading", "") in self._waiting:
            self._waiting.remove(("heading", ""))
        else:
            at = max(i for i, place in enumerate(self.places) if place.kind == "heading")
            self.places[at] = Place(self.places[at].start, "heading", label[:LABEL])


# HTML


class Target(Protocol):
    """What lxml tells of a document while it reads it."""

    def start(self, tag: str, attributes: Mapping[str, str]) -> None: ...
    def end(self, tag: str) -> None: ...
    def data(self, text: str) -> None: ...
    def close(self) -> None: ...


_PARAGRAPHS = {
    "p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "blockquote", "pre", "table", "caption",
    "section", "article", "header", "footer", "main", "nav", "aside", "address", "figure", "figcaption", "fieldset",
    "form", "hr", "details", "summary", "body",
}  # fmt: skip
_LINES = {"br", "li", "dt", "dd", "option", "legend"}
_UNSEEN = {"head", "script", "style", "template", "noscript", "svg", "rt", "rp"}
_HEADINGS = {f"h{level}" for level in range(1, 7)}


class _Html:
    """Writes the text of HTML: items of lists with their number, cells with tabs between, without ruby's readings.

    Args:
        written: what it is added to.
        anchors: labels of the chapters that begin at elements of these identifiers.
    """

    def __init__(self, written: Written, anchors: Mapping[str, str]) -> None:
        self._written = written
        self._anchors = dict(anchors)
        self._unseen = 0
        self._verbatim = 0
        self._lists: list[int | None] = []  # number of the last item; None where they have none

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        written = self._written
        if self._unseen or tag in _UNSEEN:
            self._unseen += tag in _UNSEEN
            return
        if tag in _PARAGRAPHS:
            written.end_line(2)
        elif tag in _LINES:
            written.end_line()
        for name in (attributes.get("id"), attributes.get("name")):
            if name and name in self._anchors:
                written.begin_chapter(self._anchors.pop(name))
        if tag in _HEADINGS:
            written.begin_heading()
        elif tag == "pre":
            self._verbatim += 1
        elif tag in ("ul", "ol"):
            first = attributes.get("start", "1")
            self._lists.append(None if tag == "ul" else int(first) - 1 if re.fullmatch(r"\d{1,9}", first) else 0)
        elif tag == "li" and self._lists:
            self._begin_item()
        elif tag == "tr":
            written.begin_row()
        elif tag in ("td", "th"):
            written.begin_cell()

    def _begin_item(self) -> None:
        last = self._lists[-1]
        if last is not None:
            self._lists[-1] = last + 1
        self._written.begin_item("- " if last is None else f"{last + 1}. ")

    def end(self, tag: str) -> None:
        written = self._written
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        if self._unseen or tag in _UNSEEN:
            return
        if tag in _HEADINGS:
            written.end_heading()
        elif tag == "pre":
            self._verbatim -= 1
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif tag == "tr":
            written.end_row()
        if tag in _PARAGRAPHS:
            written.end_line(2)
        elif tag in _LINES and tag != "br":
            written.end_line()

    def data(self, text: str) -> None:
        if self._unseen:
            return
        if self._verbatim:
            self._written.verbatim(text.replace("\r\n", "\n").replace("\r", "\n"))
        else:
            self._written.words(text)

    def close(self) -> None:
        self._written.end_heading()
        self._written.end_line(2)


def write_html(data: bytes, written: Written, anchors: Mapping[str, str] | None = None) -> None:
    """Add the text of an HTML page.

    Args:
        data: the page; in UTF-8 if it names no encoding.
        anchors: labels of the chapters that begin at elements of these identifiers.

    Raises:
        UnicodeError, LookupError: it is not in its encoding, or that is unknown.
    """
    text = decode(data)
    if not text.strip():
        return
    with documents_extra():
        from lxml import etree
    feed(etree.HTMLParser, text, _Html(written, anchors or {}))


def decode(data: bytes) -> str:
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding)
    named = re.search(rb"""(?:charset|<\?xml[^>]*encoding)\s*=\s*["']?\s*([\w.:-]+)""", data[:4096], re.IGNORECASE)
    encoding = named[1].decode("ascii").lower() if named else "utf-8"
    # Browsers read these names so: the smaller set is part of the larger.
    wider = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030"}
    return data.decode(wider.get(encoding, encoding))


def feed(parser: Any, data: str | bytes, target: Target, **options: Any) -> None:
    """Parse; an entity of the document's own is replaced, of those of others nothing is read."""
    reading = parser(target=target, no_network=True, **options)
    for start in range(0, len(data), _PIECE):
        reading.feed(data[start : start + _PIECE])
    reading.close()
