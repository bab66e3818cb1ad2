"""docx and epub -> their text, and where in it chapters and headings begin.

Both are zip archives of marked-up files. No more is unpacked than a document may have, into memory only.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO
from urllib.parse import unquote

from pi_gguf.common.files import human_bytes
from pi_gguf.documents.markup import LABEL, Written, decode, documents_extra, feed, write_html
from pi_gguf.errors import TextError

LIMIT = 2**28
"""Bytes of a document's text, and of what is unpacked of an archive, at most."""

_LISTS = 2**22
"""Bytes of a table of contents or of styles, at most: those are held as trees."""


class Archive:
    """The entries of a zip archive, unpacked to so many bytes in all.

    Args:
        file: the archive.
        name: what errors call it.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._zip = zipfile.ZipFile(file)
        self._name = name
        self._left = LIMIT
        self.names = frozenset(self._zip.namelist())

    def read(self, entry: str, most: int = LIMIT) -> bytes:
        """Unpack an entry.

        Args:
            entry: its name.
            most: bytes.

        Raises:
            TextError: there is none, it is encrypted, or too much would be unpacked.
        """
        if entry not in self.names:
            raise TextError(f"{self._name}: broken, it lacks {entry}", "save or download it again")
        info = self._zip.getinfo(entry)
        if info.flag_bits & 1:
            raise TextError(f"{self._name}: {entry} is encrypted", "save it without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TextError(f"{self._name}: {entry} is compressed as no docx or epub is", "save it again")
        self._left -= info.file_size
        if self._left < 0 or info.file_size > most:
            raise TextError(
                f"{self._name}: {entry} unpacks to {human_bytes(info.file_size)}, of {human_bytes(min(most, LIMIT))} "
                "that a document may have",
                "give a part of it",
            )
        with self._zip.open(info) as data:
            unpacked = data.read(info.file_size)  # no more than it states is unpacked; its checksum is verified
            if data.read(1):
                raise TextError(f"{self._name}: {entry} unpacks to more than it states", "save or download it again")
            return unpacked

    def tree(self, entry: str) -> Any:
        """Unpack and parse a small XML entry."""
        with documents_extra():
            from lxml import etree
        parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
        return etree.fromstring(self.read(entry, _LISTS), parser)


def _children(tree: Any, name: str) -> list[Any]:
    """Return all elements of a local name, in their order."""
    return list(tree.iter(f"{{*}}{name}"))


# docx

_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_WORD_STRICT = "{http://purl.oclc.org/ooxml/wordprocessingml/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"


def _attribute(attributes: Mapping[str, str], name: str) -> str:
    return attributes.get(_WORD + name) or attributes.get(_WORD_STRICT + name) or ""


class _Docx:
    """Writes the text of a Word document; what tracked changes deleted is not among it.

    Args:
        written: what it is added to.
        headings: identifiers of the styles of headings.
    """

    def __init__(self, written: Written, headings: frozenset[str]) -> None:
        self._written = written
        self._headings = headings
        self._text = False
        self._unseen = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        written = self._written
        if self._unseen or tag == _FALLBACK or _local(tag) == "moveFrom":
            self._unseen += 1
            return
        match _local(tag):
            case "t":
                self._text = True
            case "tab":
                written.words(" ")  # the definition of a stop, too, but that stands before a paragraph's text
            case "br" | "cr":
                written.end_line()
            case "noBreakHyphen":
                written.verbatim("-")
            case "tr":
                written.begin_row()
            case "tc":
                written.begin_cell()
            case "pStyle" if _attribute(attributes, "val") in self._headings:
                written.begin_heading()
            case "outlineLvl" if _attribute(attributes, "val") in set("012345678"):
                written.begin_heading()
            case "footnoteReference" | "endnoteReference":
                written.words(f"[{_mark(tag)}{_attribute(attributes, 'id')}]")
            case "footnote" | "endnote" if not _attribute(attributes, "type"):
                written.words(f"[{_mark(tag)}{_attribute(attributes, 'id')}] ")

    def end(self, tag: str) -> None:
        if self._unseen:
            self._unseen -= 1
            return
        match _local(tag):
            case "t":
                self._text = False
            case "p":
                self._written.end_heading()
                self._written.end_line(2)
            case "tr":
                self._written.end_row()
            case "tbl":
                self._written.end_line(2)

    def data(self, text: str) -> None:
        if self._text and not self._unseen:
            self._written.words(text)

    def close(self) -> None:
        self._written.end_line(2)


def _local(tag: str) -> str:
    """Return the name of an element of Word's, "" for others."""
    return tag.partition("}")[2] if tag.startswith((_WORD, _WORD_STRICT)) else ""


def _mark(tag: str) -> str:
    return "e" if "endnote" in tag else ""


def write_docx(archive: Archive, written: Written) -> None:
    """Add the text of a Word document, its notes at the end; numbers that Word itself counts are not in the file."""
    with documents_extra():
        from lxml import etree
    headings = _heading_styles(archive.tree("word/styles.xml")) if "word/styles.xml" in archive.names else frozenset()
    for part in ("word/document.xml", "word/footnotes.xml", "word/endnotes.xml"):
        if part == "word/document.xml" or part in archive.names:
            options = {"resolve_entities": False, "load_dtd": False}
            feed(etree.XMLParser, archive.read(part), _Docx(written, headings), **options)


def _heading_styles(styles: Any) -> frozenset[str]:
    """Return the identifiers of Word's own styles of headings, and of those that are based on them."""
    found: set[str] = set()
    bases: dict[str, str] = {}
    for style in _children(styles, "style"):
        name = "".join(_attribute(child.attrib, "val") for child in _children(style, "name")[:1])
        base = "".join(_attribute(child.attrib, "val") for child in _children(style, "basedOn")[:1])
        identifier = _attribute(style.attrib, "styleId")
        bases[identifier] = base
        if re.fullmatch(r"heading [1-9]", name, re.IGNORECASE):
            found.add(identifier)
    while more := {style for style, base in bases.items() if base in found} - found:
        found |= more
    return frozenset(found)


# epub

_CONTAINER = "META-INF/container.xml"


def write_epub(archive: Archive, written: Written, name: str) -> None:
    """Add the text of a book in the order in which it is read, with the chapters of its table of contents.

    Raises:
        TextError: it lacks a file, or is encrypted.
    """
    package = next((e.get("full-path", "") for e in _children(archive.tree(_CONTAINER), "rootfile")), "")
    book = archive.tree(package)
    items = {item.get("id"): item for item in _children(book, "item")}
    spine = [items[ref.get("idref")] for ref in _children(book, "itemref") if ref.get("idref") in items]
    pages = [_resolve(package, item.get("href", ""))[0] for item in spine]
    locked = set(pages) & _encrypted(archive)
    if locked:
        raise TextError(f"{name}: {min(locked)} is encrypted, as of books with DRM", "give a book without")
    chapters = _chapters(archive, package, items.values())
    for page in pages:
        anchors = dict(chapters.get(page, {}))
        if "" in anchors:
            written.begin_chapter(anchors.pop(""))
        write_html(archive.read(page), written, anchors)


def _resolve(base: str, reference: str) -> tuple[str, str]:
    """Return the entry that a reference of the entry `base` leads to, and the place in it."""
    path, _, fragment = reference.partition("#")
    joined = posixpath.join(posixpath.dirname(base), unquote(path)) if path else base
    return posixpath.normpath(joined), unquote(fragment)


def _encrypted(archive: Archive) -> set[str]:
    """Return the entries that only a key opens; obfuscated fonts are among them."""
    listed = "META-INF/encryption.xml"
    if listed not in archive.names:
        return set()
    return {_resolve("", e.get("URI", ""))[0] for e in _children(archive.tree(listed), "CipherReference")}


def _chapters(archive: Archive, package: str, items: Any) -> dict[str, dict[str, str]]:
    """Return the labels of the table of contents, by entry, by place in it: of EPUB 3's, or else of EPUB 2's."""
    found: dict[str, dict[str, str]] = {}

    def add(base: str, reference: str, label: str) -> None:
        if reference and label.strip():
            entry, fragment = _resolve(base, reference)
            found.setdefault(entry, {}).setdefault(fragment, " ".join(label.split())[:LABEL])

    for item in items:
        entry = _resolve(package, item.get("href", ""))[0]
        if entry in archive.names and "nav" in (item.get("properties") or "").split():
            with documents_extra():
                from lxml import etree
            page = etree.fromstring(decode(archive.read(entry, _LISTS)).encode(), etree.HTMLParser(encoding="utf-8"))
            navs = [
                nav
                for nav in (() if page is None else page.iter("nav"))
                if "toc" in (nav.get("epub:type") or "toc").split()
            ]
            for link in (link for nav in navs[:1] for link in nav.iter("a")):
                add(entry, link.get("href") or "", "".join(link.itertext()))
    for item in () if found else items:
        entry = _resolve(package, item.get("href", ""))[0]
        if entry in archive.names and item.get("media-type") == "application/x-dtbncx+xml":
            for point in _children(archive.tree(entry), "navPoint"):
                label, content = next(point.iter("{*}text"), None), next(point.iter("{*}content"), None)
                if label is not None and content is not None:
                    add(entry, content.get("src", ""), "".join(label.itertext()))
    return found
