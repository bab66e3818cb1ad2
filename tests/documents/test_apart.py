"""Documents of strangers, read in a process of its own: the same text, and whatever breaks it breaks nothing here."""

from __future__ import annotations

import io
import zipfile

import pytest

from pi_gguf.documents import apart
from pi_gguf.documents.apart import plain_name, read_apart
from pi_gguf.documents.formats import read_data
from pi_gguf.errors import TextError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a.txt", "a.txt"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\book.pdf", "book.pdf"),
        ("..", "document"),
        ("", "document"),
        (".bashrc", "bashrc"),
        ("a\x00b\x1b[31m.txt", "ab[31m.txt"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("<img src=x onerror=alert(1)>.txt", "<img src=x onerror=alert(1)>.txt"),
        ("книга.epub", "книга.epub"),
        ("half\ud800.txt", "half.txt"),
        ("x" * 300 + ".epub", "x" * 115 + ".epub"),
        ("y" * 300, "y" * 120),
    ],
)
def test_a_name_is_what_can_be_shown_of_it(given, shown):
    assert plain_name(given) == shown


def test_the_text_is_that_of_a_plain_reading():
    text = "# One\n\nIt was the best of times.\n\n# Two\n\nIt was the worst of times.\n"
    for name in ("a.md", "a.txt"):
        assert read_apart(text.encode(), f"somewhere/{name}") == read_data(text.encode(), name)
    html = b"<!doctype html><title>t</title><h1>Head</h1><p>Body of it.</p>"
    apart, here = read_apart(html, "page.html"), read_data(html, "page.html")
    assert apart == here and apart.places[0].label == "Head"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "the document is empty"),
        ("a.txt", b"\xff\xfe\x00\x80", "not UTF-8"),
        ("a.pdf", b"%PDF-1.7\nnothing of it", "broken PDF"),
        ("a.docx", b"PK\x03\x04" + b"\0" * 40, "broken archive"),
        ("a.doc", b"\xd0\xcf\x11\xe0" + b"\0" * 40, "an old Office file"),
    ],
)
def test_what_cannot_be_read_is_said_as_elsewhere(name, data, said):
    with pytest.raises(TextError, match=said) as caught:
        read_apart(data, name)
    assert str(caught.value).startswith(f"{name}: ") and caught.value.hint


def bomb(name: str) -> bytes:
    """A docx whose text is a gigabyte of one letter."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        file.write(
            b'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>'
        )
        for _ in range(1024):
            file.write(b"a" * 2**20)
        file.write(b"</w:t></w:r></w:p></w:body></w:document>")
    return packed.getvalue()


def test_a_zip_bomb_is_refused():
    data = bomb("word/document.xml")
    assert len(data) < 2 * 2**20
    with pytest.raises(TextError):
        read_apart(data, "bomb.docx")


def test_a_reader_that_dies_is_an_error_of_the_document(monkeypatch):
    """The process that reads is another one; here it has no memory to live in."""
    monkeypatch.setattr(apart, "_MEMORY_BYTES", 2**25)
    with pytest.raises(TextError, match=r"ends the reader|too much memory"):
        read_apart(b"text " * 2**24, "a.txt")
