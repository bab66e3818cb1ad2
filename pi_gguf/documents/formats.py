"""A document of the user's -> its text, and where in it pages, chapters and headings begin.

txt and Markdown are taken as they are; PDF is read by pdfium, HTML by `markup`, docx and epub by `archives`. What a
file is, its content says, not its name. Nothing is fetched, nothing in it is run, and nothing is left out unsaid.
"""

from __future__ import annotations

import bisect
import io
import re
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pi_gguf.common.files import human_bytes, open_plain
from pi_gguf.common.progress import say
from pi_gguf.documents.archives import LIMIT, Archive, write_docx, write_epub
from pi_gguf.documents.markup import Place, Written, documents_extra, write_html
from pi_gguf.errors import TextError, one_line
from pi_gguf.texts import not_utf8

KINDS = "a txt, md, html, pdf, docx or epub file"

_WHITE = re.compile(r"\s*")

_PDFIUM = threading.Lock()
"""pdfium is not to be called by two threads at once."""


class Passage(NamedTuple):
    """A stretch of a document's text: characters from `start` to before `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A document as a model reads it.

    Args:
        name: of its file, without folders.
        format: txt, md, html, pdf, docx or epub.
        text: all of it, not blank; lines end in a line feed.
        places: where pages, chapters and parts under headings begin, sorted.
    """

    name: str
    format: str
    text: str
    places: tuple[Place, ...] = ()

    def places_in(self, start: int, end: int) -> list[Place]:
        """Return the pages, chapters and parts under headings in which characters of a range lie, sorted.

        Args:
            start: first character.
            end: the one after the last.
        """
        first = bisect.bisect_right(self.places, start, key=lambda place: place.start)
        last = bisect.bisect_left(self.places, end, key=lambda place: place.start)
        found: dict[str, Place] = {}
        for place in (self.places[i] for i in range(first - 1, -1, -1)):
            found.setdefault(place.kind, place)
            if place.kind != "heading":  # a page or a chapter holds what comes after it, to the next
                break
        return [*sorted(found.values(), key=lambda place: place.start), *self.places[first:last]]

    def place_of(self, start: int, end: int) -> str:
        """Say where a range lies, for people.

        Args:
            start: first character.
            end: the one after the last.

        Example:
            >>> Document("a", "pdf", "one\\n\\ntwo", (Place(0, "page", "1"), Place(5, "page", "2"))).place_of(5, 8)
            'page 2'
            >>> Document("a", "md", "# The Bridge\\n\\nIt fell.", (Place(0, "heading", "The Bridge"),)).place_of(14, 22)
            'The Bridge, characters 14-22'
        """
        places = self.places_in(start, end)
        pages = [place.label for place in places if place.kind == "page"]
        if pages:
            return f"page {pages[0]}" if len(pages) == 1 else f"pages {pages[0]}-{pages[-1]}"
        labels = dict.fromkeys(place.label for place in places if place.start <= start)
        return ", ".join([*labels, f"characters {start}-{end}"])

    def passages(self, least: int = 200, most: int = 1000) -> list[Passage]:
        """Cut the text into passages of whole paragraphs; they hold all of it but the white space between them.

        Short paragraphs are put together, but never over the begin of a chapter or a heading; one that is too long is
        cut after a line or a sentence.

        Args:
            least: characters that a passage has, where its neighbours let it.
            most: characters that it has at most.
        """
        word = re.compile(r"\s*")
        places = [place for place in self.places if place.kind != "page"]
        begins = {match.end() for place in places if (match := word.match(self.text, place.start))}
        found: list[Passage] = []
        for start, end in self._paragraphs(begins, least, most):
            last = found[-1] if found and start not in begins else None
            if last and last.end - last.start < least and end - last.start <= most:
                found[-1] = Passage(last.start, end)
            else:
                found.append(Passage(start, end))
        return found

    def _paragraphs(self, begins: set[int], least: int, most: int) -> Iterator[Passage]:
        """Yield paragraphs, and parts of those that are longer than `most`."""
        gaps = (match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", self.text))
        for start, end in pairwise(sorted({0, len(self.text), *gaps, *begins})):
            end = start + len(self.text[start:end].rstrip())
            start = end - len(self.text[start:end].lstrip())
            while end - start > most:
                cut = self._cut(start, least, most)
                yield Passage(start, start + len(self.text[start:cut].rstrip()))
                start = _WHITE.match(self.text, cut, end).end()  # type: ignore[union-attr]
            if start < end:
                yield Passage(start, end)

    def _cut(self, start: int, least: int, most: int) -> int:
        """Return where to cut what begins at `start`: after a sentence, a line or a word, or at `most`."""
        window = self.text[start : start + most]
        for pattern in (r"""[.!?]["'”’»)\]]*\s|[。！？][”』」）]*""", r"\n", r"\s"):
            ends = [match.end() for match in re.finditer(pattern, window) if match.end() >= min(least, most // 2)]
            if ends:
                return start + ends[-1]
        return start + most


def read_document(source: str | Path) -> Document:
    """Read a document.

    Args:
        source: a file of txt, md, html, pdf, docx or epub; - is standard input.

    Raises:
        TextError: it cannot be read, is none of these, broken, encrypted or without text, or has more than 256 MiB.
        OptionError: the libraries for PDF, HTML, docx and epub are not installed.

    Example:
        >>> book = read_document("walden.epub")  # doctest: +SKIP
        >>> book.format, book.places[0].label  # doctest: +SKIP
        ('epub', 'Economy')
    """
    if str(source) == "-":
        return _read(io.BytesIO(_bounded(sys.stdin.buffer, "standard input")), "standard input", "standard input", "")
    try:
        path = Path(source).expanduser()
        with open_plain(path) as file:
            return _read(file, str(path), path.name, path.suffix.lower())
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise TextError(f"{source}: cannot be read ({reason})", f"give {KINDS}") from error


def read_data(data: bytes, name: str) -> Document:
    """Read a document of which the bytes are here; its name says what plain text is.

    Raises:
        TextError: as `read_document`.
        OptionError: the libraries for PDF, HTML, docx and epub are not installed.
    """
    return _read(io.BytesIO(data), name, name, Path(name).suffix.lower())


def _read(file: BinaryIO, path: str, name: str, suffix: str) -> Document:
    head = file.read(4096)
    file.seek(0)
    if b"%PDF-" in head[:1024]:
        format, (text, places) = "pdf", _read_pdf(file, path)
    elif head.startswith(b"PK"):
        format, (text, places) = _read_archive(file, path)
    elif head.startswith(b"\xd0\xcf\x11\xe0"):
        raise TextError(f"{path}: an encrypted or an old Office file", "save it as docx without a password")
    elif head.startswith(b"{\\rtf"):
        raise TextError(f"{path}: is RTF, which is not read", "save it as docx or txt")
    elif suffix in (".html", ".htm", ".xhtml") or _is_html(head):
        format, (text, places) = "html", _read_html(_bounded(file, path), path)
    else:
        text, places = _plain(_bounded(file, path), path), []
        format = "md" if suffix in (".md", ".markdown") else "txt"
        if format == "md":
            places = _markdown_headings(text)
    if not text.strip():
        raise TextError(f"{path}: the document is empty", f"give {KINDS} with text in it")
    if len(text) > LIMIT:
        raise TextError(f"{path}: more than {LIMIT:,} characters", "give a part of it")
    return Document(name, format, text, tuple(places))


def _bounded(file: BinaryIO, path: str) -> bytes:
    data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise TextError(f"{path}: more than {human_bytes(LIMIT)}", "give a part of it")
    return data


def _plain(data: bytes, path: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _markdown_headings(text: str) -> list[Place]:
    """Return the headings with number signs, outside of code."""
    found: list[Place] = []
    fence = ""
    for line in re.finditer(r"^ {0,3}(?:(```+|~~~+)|#{1,6}[ \t]+(.*)$)", text, re.MULTILINE):
        if line[1]:
            fence = "" if fence and line[1].startswith(fence) else fence or line[1]
        elif not fence and (title := line[2].rstrip(" \t#")):
            found.append(Place(line.start(), "heading", title))
    return found


# PDF


def _read_pdf(file: BinaryIO, path: str) -> tuple[str, list[Place]]:
    """Read the pages in pdfium's order: columns one after another, right-to-left lines as they are read."""
    with documents_extra():
        import pypdfium2
    written, places, length, empty = io.StringIO(), [], 0, 0
    with _PDFIUM:
        try:
            pdf = pypdfium2.PdfDocument(file)
        except pypdfium2.PdfiumError as error:
            if "password" in str(error).lower():
                raise TextError(f"{path}: an encrypted PDF", "save it without a password") from error
            raise TextError(f"{path}: a broken PDF ({one_line(error)})", "save or download it again") from error
        try:
            for number in range(len(pdf)):
                text = _page_text(pdf, number, path)
                empty += not text
                if text:
                    length += written.write("\n\n" * bool(length))
                    places.append(Place(length, "page", str(number + 1)))
                    length += written.write(text)
                if length > LIMIT:
                    break
            pages = len(pdf)
        finally:
            pdf.close()
    if not length:
        raise TextError(
            f"{path}: no text on any of its {pages} pages, as of a scanned PDF", f"ocrmypdf {path} with-text.pdf"
        )
    if empty:
        say(f"note: {path}: {empty} of {pages} pages have no text (pictures or blank)")
    return written.getvalue(), places


def _page_text(pdf: Any, number: int, path: str) -> str:
    from pypdfium2 import PdfiumError

    try:
        page = pdf[number]
        words = page.get_textpage()
        text = str(words.get_text_range())
        words.close()
        page.close()
    except PdfiumError as error:
        raise TextError(
            f"{path}: page {number + 1} is broken ({one_line(error)})", "save or download it again"
        ) from error
    # pdfium writes U+FFFE for a hyphen at the end of a line, and goes on with the rest of the word
    for mark, plain in (("\r\n", "\n"), ("\ufffe", ""), ("\xad", ""), ("\x00", "")):
        text = text.replace(mark, plain)
    return text.strip()


# Markup


def _is_html(head: bytes) -> bool:
    # Atomic groups: no other way of cutting comments is tried, of which there are two to the power of their number.
    start = rb"(?:\xef\xbb\xbf)?(?>\s+|<\?xml[^>]*\?>|<!--(?>.*?-->))*+<(?:!doctype\s+html|html)\b"
    return re.match(start, head, re.IGNORECASE | re.DOTALL) is not None


def _read_html(data: bytes, path: str) -> tuple[str, list[Place]]:
    written = Written()
    try:
        write_html(data, written)
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not {error.encoding.upper()} at byte {error.start}", "convert it with iconv -t UTF-8"
        ) from error
    except LookupError as error:
        raise TextError(
            f"{path}: {one_line(error)}", "convert it with iconv -t UTF-8, and correct its charset"
        ) from error
    return written.text, written.places


_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    LookupError,
    ValueError,
    SyntaxError,
)
"""Raised by broken archives and what is in them; lxml's errors of syntax are Python's."""


def _read_archive(file: BinaryIO, path: str) -> tuple[str, tuple[str, list[Place]]]:
    written = Written()
    try:
        archive = Archive(file, path)
        if "word/document.xml" in archive.names:
            format = "docx"
            write_docx(archive, written)
        elif "META-INF/container.xml" in archive.names:
            format = "epub"
            write_epub(archive, written, path)
        else:
            raise TextError(f"{path}: a zip archive, but neither docx nor epub", f"give {KINDS}")
    except _BROKEN as error:
        raise TextError(f"{path}: a broken archive ({one_line(error)})", "save or download it again") from error
    return format, (written.text, written.places)
