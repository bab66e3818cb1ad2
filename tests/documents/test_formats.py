"""Documents: the text of each format, where pages and chapters begin, and files that are broken or hostile."""

from __future__ import annotations

import doctest
import io
import random
import socket
import struct
import sys
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from document_files import HEBREW, JAPANESE, book, write_pdf, write_zip

from pi_gguf.documents import archives, formats
from pi_gguf.documents.formats import Document, read_document
from pi_gguf.documents.markup import Place
from pi_gguf.errors import OptionError, TextError

WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
COMPATIBILITY = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'


def labels(document: Document) -> list[tuple[str, str, str]]:
    """Return kind and label of each place, and the first words that stand there."""
    return [(p.kind, p.label, document.text[p.start :].split("\n")[0]) for p in document.places]


def refused(path, message: str) -> str:
    """Return the hint with which a document is refused."""
    with pytest.raises(TextError, match=message) as error:
        read_document(path)
    assert "\n" not in str(error.value) and "\n" not in error.value.hint
    return error.value.hint


# Text


def test_text_is_taken_as_it_is_but_for_line_ends_and_a_mark_at_its_start(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff# one\r\ntwo\rthree ".encode())
    assert read_document(tmp_path / "a.txt") == Document("a.txt", "txt", "# one\ntwo\nthree ")


def test_markdown_has_headings_but_not_in_code(tmp_path):
    (tmp_path / "a.md").write_text("# One #\ntext\n```sh\n# no\n```\n## Two **2**\n#no\n\n   ### Three\n")
    document = read_document(str(tmp_path / "a.md"))
    assert document.format == "md"
    assert labels(document) == [
        ("heading", "One", "# One #"),
        ("heading", "Two **2**", "## Two **2**"),
        ("heading", "Three", "   ### Three"),
    ]


@pytest.mark.parametrize("data", [b"plain words", b"<!doctype html><p>plain words", None])
def test_standard_input_is_recognized_by_its_content(tmp_path, monkeypatch, data):
    data = data or write_pdf(tmp_path / "a.pdf", [["plain words"]]).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    document = read_document("-")
    assert (document.name, document.text) == ("standard input", "plain words")


# HTML


def html(tmp_path, page: str | bytes) -> Document:
    (tmp_path / "a.html").write_bytes(page.encode() if isinstance(page, str) else page)
    return read_document(tmp_path / "a.html")


def test_html_keeps_paragraphs_lists_tables_and_nothing_unseen(tmp_path):
    document = html(
        tmp_path,
        "<!doctype html><head><title>T</title><style>p{}</style></head><h1>One  <i>of</i>\n two</h1>"
        "<p>Hello&nbsp;w&ouml;rld <b>bold</b>er<br>next<p>co&shy;op<script>alert(1)</script>"
        "<ol start=3><li>three<li><p>four</p></ol><ul><li>u</ul>"
        "<table><tr><th>a<th><th>c<tr><td><p>d</p></td><td>e</td></tr></table>"
        "<pre>  x\n   y</pre><ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp>字</ruby><h2> </h2>tail",
    )
    assert document.text == (
        "One of two\n\nHello wörld bolder\nnext\n\ncoop\n\n3. three\n4. four\n\n- u\n\na\t\tc\nd\te\n\n"
        "  x\n   y\n\n漢字\n\ntail"
    )
    assert document.places == (Place(0, "heading", "One of two"),)


def test_paragraphs_in_cells_stay_paragraphs(tmp_path):
    assert html(tmp_path, "<table><tr><td><p>a</p><p>b</p></td><td>c</table>d").text == "a\n\nb\tc\n\nd"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>Grüße</p>".encode(), "Grüße"),
        ("\ufeff<p>猫</p>".encode("utf-16-le"), "猫"),
        ('<meta charset="shift_jis"><p>猫である'.encode("shift_jis"), "猫である"),
        ("<meta http-equiv=Content-Type content='text/html; charset=ISO-8859-1'><p>“ü”".encode("cp1252"), "“ü”"),
        ('<?xml version="1.0" encoding="koi8-r"?><p>да</p>'.encode("koi8-r"), "да"),
    ],
)
def test_html_is_read_in_the_encoding_that_it_names(tmp_path, page, text):
    assert html(tmp_path, page).text == text


def test_html_in_another_encoding_than_it_names_is_refused(tmp_path):
    (tmp_path / "a.html").write_bytes("<p>Grüße".encode("cp1252"))
    assert "iconv" in refused(tmp_path / "a.html", "not UTF-8 at byte 5")
    (tmp_path / "a.html").write_bytes(b"<meta charset='klingon'><p>a")
    refused(tmp_path / "a.html", "unknown encoding: klingon")


def test_html_is_recognized_without_its_suffix(tmp_path):
    (tmp_path / "page").write_text(" <!-- saved -->\n<HTML><p>words")
    assert (read_document(tmp_path / "page").format, read_document(tmp_path / "page").text) == ("html", "words")


# PDF


def test_the_pages_of_a_pdf_in_english_and_japanese(tmp_path):
    document = read_document(write_pdf(tmp_path / "a.pdf", [["One is hyphen-", "ated here."], [], ["Three", "four"]]))
    assert document.text == "One is hyphenated here.\n\nThree\nfour"
    assert labels(document) == [("page", "1", "One is hyphenated here."), ("page", "3", "Three")]
    assert document.place_of(0, 3) == "page 1"
    assert document.place_of(20, 30) == "pages 1-3"
    document = read_document(write_pdf(tmp_path / "b.pdf", [[JAPANESE]], "HeiseiMin-W3"))
    assert document.text == JAPANESE


def test_right_to_left_lines_of_a_pdf_are_in_the_order_of_reading(tmp_path):
    # A PDF has the glyphs from left to right, whatever the script.
    assert read_document(write_pdf(tmp_path / "a.pdf", [[HEBREW[::-1]]], "DejaVuSans")).text == HEBREW


def test_soft_hyphens_of_a_pdf_are_left_out(tmp_path):
    assert read_document(write_pdf(tmp_path / "a.pdf", [["co\xadop"]], "DejaVuSans")).text == "coop"


def test_pdfs_are_read_by_many_threads(tmp_path):
    paths = [
        write_pdf(tmp_path / "a.pdf", [["words"] * 30] * 3),
        write_pdf(tmp_path / "b.pdf", [[JAPANESE]], "HeiseiMin-W3"),
    ] * 100
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda path: read_document(path).text, paths))
    assert texts[:2] == ["\n\n".join(["\n".join(["words"] * 30)] * 3), JAPANESE] and texts == texts[:2] * 100


def test_columns_of_a_pdf_are_read_one_after_another(tmp_path):
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate, Paragraph

    words = [f"w{number}" for number in range(800)]
    template = BaseDocTemplate(str(tmp_path / "a.pdf"))
    frames = [Frame(left, 300, 220, 450, id=str(left)) for left in (50, 320)]
    template.addPageTemplates(PageTemplate(frames=frames))
    template.build([Paragraph(" ".join(words), getSampleStyleSheet()["Normal"])])
    assert read_document(tmp_path / "a.pdf").text.split() == words


def test_pages_without_text_are_said_and_a_scanned_pdf_is_refused(tmp_path, capsys):
    from PIL import Image
    from reportlab.pdfgen import canvas

    Image.new("L", (60, 60), 128).save(tmp_path / "scan.png")
    for name, first in (("mixed.pdf", "words"), ("scanned.pdf", "")):
        drawing = canvas.Canvas(str(tmp_path / name))
        drawing.drawString(50, 700, first)
        drawing.showPage()
        drawing.drawImage(str(tmp_path / "scan.png"), 0, 0, 500, 700)
        drawing.save()
    assert read_document(tmp_path / "mixed.pdf").text == "words"
    assert "1 of 2 pages have no text" in capsys.readouterr().err
    assert refused(tmp_path / "scanned.pdf", "no text on any of its 2 pages").startswith("ocrmypdf")


def test_an_encrypted_pdf_is_refused_but_not_one_that_opens_without_a_password(tmp_path):
    import pypdf

    write_pdf(tmp_path / "plain.pdf", [["words"]])
    for user in ("", "secret"):
        writer = pypdf.PdfWriter(clone_from=tmp_path / "plain.pdf")
        writer.encrypt(user, "owner", algorithm="RC4-128")
        writer.write(tmp_path / f"{user}.pdf")
    assert read_document(tmp_path / ".pdf").text == "words"
    assert "password" in refused(tmp_path / "secret.pdf", "encrypted")


# docx


def test_a_docx_of_python_docx(tmp_path):
    import docx

    written = docx.Document()
    written.add_heading("The Bridge", 1)
    written.add_paragraph("It fell\tat night.\nReally.").add_run(" Bold").bold = True
    own = written.styles.add_style("Clause", docx.enum.style.WD_STYLE_TYPE.PARAGRAPH)
    own.base_style = written.styles["Heading 2"]
    written.add_paragraph("§ 1", style="Clause")
    table = written.add_table(2, 3)
    for cell, text in zip(table._cells, ("a", "", "c", "d", "e", "f"), strict=True):
        cell.text = text
    written.add_paragraph(f"{HEBREW} {JAPANESE}")
    written.save(tmp_path / "a.docx")
    (tmp_path / "a.docx").rename(tmp_path / "wrong.pdf")
    document = read_document(tmp_path / "wrong.pdf")
    assert document.format == "docx"
    assert document.text == (
        f"The Bridge\n\nIt fell at night.\nReally. Bold\n\n§ 1\n\na\t\tc\nd\te\tf\n\n{HEBREW} {JAPANESE}"
    )
    assert labels(document) == [("heading", "The Bridge", "The Bridge"), ("heading", "§ 1", "§ 1")]
    assert document.place_of(12, 19) == "The Bridge, characters 12-19"


def test_a_docx_has_its_notes_and_what_changes_left(tmp_path):
    run = "<w:r><w:t>{}</w:t></w:r>".format
    body = (
        "<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr>"
        f"{run('kept ')}<w:del><w:r><w:delText>gone</w:delText></w:r></w:del><w:ins>{run('new')}</w:ins>"
        f"<w:moveFrom>{run('moved')}</w:moveFrom><w:r><w:footnoteReference w:id='2'/></w:r></w:p>"
        f"<w:p><mc:AlternateContent {COMPATIBILITY}><mc:Choice>{run('box')}</mc:Choice>"
        f"<mc:Fallback>{run('box')}</mc:Fallback></mc:AlternateContent></w:p>"
        "<w:p><w:pPr><w:outlineLvl w:val='0'/></w:pPr><w:r><w:t>Part</w:t></w:r></w:p>"
    )
    notes = (
        f"<w:footnote w:type='separator' w:id='-1'><w:p/></w:footnote>"
        f"<w:footnote w:id='2'><w:p>{run('A note.')}</w:p></w:footnote>"
    )
    path = write_zip(
        tmp_path / "a.docx",
        {
            "word/document.xml": f"<w:document {WORD}><w:body>{body}</w:body></w:document>",
            "word/footnotes.xml": f"<w:footnotes {WORD}>{notes}</w:footnotes>",
        },
    )
    assert read_document(path).text == "kept new[2]\n\nbox\n\nPart\n\n[2] A note."
    assert labels(read_document(path)) == [("heading", "Part", "Part")]


def test_long_documents_are_read_whole(tmp_path):
    words = "猫である。" * 150_000
    run = f"<w:p><w:r><w:t>{words}</w:t></w:r></w:p>" * 12
    path = write_zip(tmp_path / "a.docx", {"word/document.xml": f"<w:document {WORD}>{run}</w:document>"})
    assert read_document(path).text == "\n\n".join([words] * 12)
    assert html(tmp_path, f"<!doctype html>{f'<p>{words}</p>' * 12}").text == "\n\n".join([words] * 12)


# epub


def test_an_epub_3_has_chapters_where_its_contents_say(tmp_path):
    pages = {
        "cover page.xhtml": "<p>Cover</p>",
        "one.xhtml": "<h1>1</h1><p>It began&nbsp;here.</p><div id='b2'><p>Then.</p><h2>Aside</h2><p>x</p></div>",
        "more.xhtml": "<p>More of it.</p>",
    }
    contents = (
        "<li><a href='cover%20page.xhtml'>Cover</a></li><li><a href='one.xhtml'>The <b>First</b></a>"
        "<ol><li><a href='one.xhtml#b2'>The Second</a></li><li><a href='one.xhtml#b2'>Again</a></li></ol></li>"
    )
    document = read_document(write_zip(tmp_path / "a.epub", book(pages, contents)))
    assert document.format == "epub"
    assert document.text == "Cover\n\n1\n\nIt began here.\n\nThen.\n\nAside\n\nx\n\nMore of it."
    assert labels(document) == [
        ("chapter", "Cover", "Cover"),
        ("chapter", "The First", "1"),
        ("heading", "1", "1"),
        ("chapter", "The Second", "Then."),
        ("heading", "Aside", "Aside"),
    ]
    at = document.text.index("Then")
    assert document.place_of(at, at + 4) == f"The Second, characters {at}-{at + 4}"
    at = document.text.index("More")
    assert document.place_of(at, at + 4) == f"The Second, Aside, characters {at}-{at + 4}"


def test_an_epub_2_has_the_chapters_of_its_ncx(tmp_path):
    contents = "<navPoint><navLabel><text>Eins</text></navLabel><content src='a.html'/></navPoint>"
    document = read_document(write_zip(tmp_path / "a.epub", book({"a.html": "<p>Text"}, contents, ncx=True)))
    assert labels(document) == [("chapter", "Eins", "Text")]


def test_an_epub_with_locked_pages_is_refused_but_not_one_with_locked_fonts(tmp_path):
    entries = book({"a.xhtml": "<p>Text"}, "")
    locked = "<encryption><e:CipherReference xmlns:e='http://www.w3.org/2001/04/xmlenc#' URI='{}'/></encryption>"
    fonts = entries | {"META-INF/encryption.xml": locked.format("OPS/font.otf")}
    assert read_document(write_zip(tmp_path / "fonts.epub", fonts)).text == "Text"
    pages = entries | {"META-INF/encryption.xml": locked.format("OPS/a.xhtml")}
    refused(write_zip(tmp_path / "pages.epub", pages), "OPS/a.xhtml is encrypted")


# Hostile


def test_what_is_no_document_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "blank.html").write_text("<script>1</script>")
    (tmp_path / "a.doc").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    (tmp_path / "a.rtf").write_text("{\\rtf1 hello}")
    (tmp_path / "a.bin").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(tmp_path / "blank.txt", "the document is empty")
    refused(tmp_path / "blank.html", "the document is empty")
    assert "docx" in refused(tmp_path / "a.doc", "an encrypted or an old Office file")
    assert "docx" in refused(tmp_path / "a.rtf", "RTF")
    refused(tmp_path / "a.bin", "not UTF-8 at byte 0")
    refused(write_zip(tmp_path / "a.docx", {"a.txt": "words"}), "neither docx nor epub")
    refused(tmp_path, "Is a directory")
    refused(tmp_path / "none", "No such file")
    refused("/dev/zero", "a pipe or a device")
    refused("a\0b", "cannot be read")


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    bomb = bytes(2**28 + 1)
    refused(write_zip(tmp_path / "bomb.docx", {"word/document.xml": bomb}), "256.0 MiB that a document may have")
    # One that states less is not unpacked beyond that.
    path = write_zip(tmp_path / "lies.docx", {"word/document.xml": bomb[: 2**22]})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 2**22), struct.pack("<I", 100)))
    refused(path, "broken archive")
    refused(write_zip(tmp_path / "a.docx", {"word/document.xml": "<a/>", "word/styles.xml": bomb[: 2**23]}), "4.0 MiB")
    # The entries of a book count together, also where one of them is read twice.
    entries = book({"a.xhtml": f"<p>{'word ' * 400}</p>"}, "")
    monkeypatch.setattr(archives, "LIMIT", 4500)
    assert read_document(write_zip(tmp_path / "once.epub", entries)).format == "epub"
    entries["OPS/book.opf"] = entries["OPS/book.opf"].replace('<itemref idref="i0"/>', '<itemref idref="i0"/>' * 2)
    refused(write_zip(tmp_path / "twice.epub", entries), "unpacks to")


def test_a_text_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LIMIT", 10)
    (tmp_path / "a.txt").write_text("eleven char")
    refused(tmp_path / "a.txt", "more than 10 B")
    refused(write_pdf(tmp_path / "a.pdf", [["eleven characters"], ["more"]]), "more than 10 characters")


def test_entities_and_references_to_other_files_bring_nothing(tmp_path):
    (tmp_path / "secret.txt").write_text("SECRET")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    site = f"http://127.0.0.1:{server.getsockname()[1]}"
    kind = (
        f'<!DOCTYPE x SYSTEM "{site}/a.dtd" [<!ENTITY s SYSTEM "file://{tmp_path}/secret.txt">'
        f'<!ENTITY n SYSTEM "{site}/a.xml"><!ENTITY % p SYSTEM "{site}/p.dtd"> %p;]>'
    )
    body = f"<w:document {WORD}><w:p><w:r><w:t>a &s;&n; b</w:t></w:r></w:p></w:document>"
    page = f"{kind}<html><head><link rel=stylesheet href='{site}/a.css'></head><body>a &s; <img src='{site}/a.png'>b"
    (tmp_path / "a.html").write_text(page)
    label = "<navPoint><navLabel><text>A &s;</text></navLabel><content src='a.xhtml'/></navPoint>"
    toc = f'{kind}<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/">{label}</ncx>'
    paths = [
        write_zip(tmp_path / "a.docx", {"word/document.xml": kind + body}),
        write_zip(tmp_path / "a.epub", book({"a.xhtml": ""}, "", ncx=True) | {"OPS/a.xhtml": page, "OPS/toc.ncx": toc}),
        tmp_path / "a.html",
    ]
    for path in paths:
        document = read_document(path)
        text = document.text
        assert "SECRET" not in str(document) and [p.label for p in document.places] == ["A &s;"] * (
            path.suffix == ".epub"
        )
        assert "a " in text and text.endswith("b")
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    laughs = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "aaaaaaaaaa">{laughs}]>' + body.replace("&s;&n;", "&e9;")
    refused(write_zip(tmp_path / "laughs.docx", {"word/document.xml": bomb}), "broken archive")


@pytest.mark.parametrize("kind", ["pdf", "docx", "epub", "html"])
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    import docx

    if kind == "docx":
        written = docx.Document()
        written.add_heading("Words", 1)
        written.save(tmp_path / "a.docx")
    elif kind == "epub":
        write_zip(tmp_path / "a.epub", book({"a.xhtml": "<h1>Words</h1>"}, "<li><a href='a.xhtml'>A</a></li>"))
    elif kind == "pdf":
        write_pdf(tmp_path / "a.pdf", [["Words"]] * 3)
    else:
        (tmp_path / "a.html").write_text("<!doctype html><h1>Words</h1><table><tr><td><ol><li>a</table>" * 9)
    whole = (tmp_path / f"a.{kind}").read_bytes()
    assert "Words" in read_document(tmp_path / f"a.{kind}").text
    draw = random.Random(0)
    outcomes = set()
    for trial in range(150):
        data = bytearray(whole[: draw.randrange(10, len(whole))] if trial % 3 == 0 else whole)
        for _ in range(draw.randrange(0, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / f"b.{kind}").write_bytes(data)
        try:
            document = read_document(tmp_path / f"b.{kind}")
            assert document.text.strip()
            document.passages()
            outcomes.add("read")
        except TextError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("data", [b"", b"<", b"<a/>", bytes(9), None])
@pytest.mark.parametrize("entry", ["META-INF/container.xml", "OPS/book.opf", "OPS/nav.xhtml"])
def test_a_book_with_a_broken_entry_is_refused_unless_it_is_the_contents(tmp_path, entry, data):
    entries: dict = book({"a.xhtml": "<h1>Words</h1>"}, "<li><a href='a.xhtml'>A</a></li>")
    entries[entry] = data
    if data is None:
        del entries[entry]
    path = write_zip(tmp_path / "a.epub", entries)
    if entry == "OPS/nav.xhtml":
        assert read_document(path).text == "Words"
    else:
        refused(path, f"{entry}|broken|neither docx nor epub|empty")


def test_a_book_that_lacks_a_page_is_refused(tmp_path):
    entries = book({"a.xhtml": "Words", "b.xhtml": "More"}, "")
    del entries["OPS/b.xhtml"]
    refused(write_zip(tmp_path / "a.epub", entries), "lacks OPS/b.xhtml")


def test_an_encrypted_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.docx", {"word/document.xml": "<a/>"})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "password" in refused(path, "word/document.xml is encrypted")


@pytest.mark.parametrize(
    ("library", "kind"), [("pypdfium2", "pdf"), ("lxml", "html"), ("lxml", "docx"), ("lxml", "epub")]
)
def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch, library, kind):
    (tmp_path / "a.html").write_text("<p>a")
    write_pdf(tmp_path / "a.pdf", [["a"]])
    write_zip(tmp_path / "a.docx", {"word/document.xml": f"<w:document {WORD}/>"})
    write_zip(tmp_path / "a.epub", book({"a.xhtml": "a"}, ""))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OptionError, match=f"^{library} is not installed") as error:
        read_document(tmp_path / f"a.{kind}")
    assert error.value.hint == "pip install 'pi-gguf[documents]'"


# Places and passages


def test_places_of_a_range():
    places = (
        Place(0, "heading", "Preface"),
        Place(10, "chapter", "One"),
        Place(15, "heading", "Aside"),
        Place(30, "chapter", "Two"),
    )
    document = Document("a", "epub", "x" * 50, places)
    at = [[p.label for p in document.places_in(*r)] for r in ((5, 6), (10, 12), (16, 20), (16, 31), (29, 30), (30, 30))]
    assert at == [["Preface"], ["One"], ["One", "Aside"], ["One", "Aside", "Two"], ["One", "Aside"], ["Two"]]
    assert Document("a", "txt", "words").place_of(1, 3) == "characters 1-3"


@pytest.mark.parametrize("alphabet", ["ab. \n", "猫。 \n", "word \n\n"])
def test_passages_hold_all_of_a_text_once(alphabet):
    draw = random.Random(alphabet)
    for _ in range(60):
        text = "".join(draw.choices(alphabet, k=draw.randrange(1, 900)))
        places = tuple(Place(i, "heading", "h") for i in sorted(draw.sample(range(len(text)), min(3, len(text)))))
        document = Document("a", "md", text, places)
        passages = document.passages(20, 100)
        assert all(a.end <= b.start for a, b in pairwise(passages))
        assert all(0 < b - a <= 100 for a, b in passages)
        assert "".join("".join(text[a:b].split()) for a, b in passages) == "".join(text.split())
        for place in places:
            assert not any(a < place.start < b for a, b in passages)


def test_passages_end_with_sentences_and_short_paragraphs_go_together():
    text = "One.\n\nTwo.\n\n" + "A sentence of six words here. " * 40 + "\n\n" + "猫である。" * 300
    document = Document("a", "txt", text)
    passages = [text[a:b] for a, b in document.passages()]
    assert all(passage.endswith((".", "。")) for passage in passages)
    assert all(200 <= len(passage) <= 1000 for passage in passages[1:-1])
    assert next(text[a:b] for a, b in document.passages(8, 20)) == "One.\n\nTwo."


def test_a_short_sentence_is_no_passage_of_its_own():
    document = Document("a", "txt", "Hi. " + "word " * 390)
    assert [b - a >= 200 for a, b in document.passages()] == [True, True]


def test_zip_entries_outside_the_book_are_never_written(tmp_path):
    entries = book({"../../evil.xhtml": "<p>Words"}, "")
    path = write_zip(tmp_path / "a.epub", entries | {"../evil.xhtml": "<p>Words"})
    before = sorted(tmp_path.parent.iterdir())
    assert read_document(path).text == "Words"
    assert sorted(tmp_path.parent.iterdir()) == before
    assert zipfile.is_zipfile(path)


def test_the_examples_are_true():
    assert doctest.testmod(formats) == doctest.TestResults(failed=0, attempted=2)


@pytest.mark.usefixtures("never_a_hang")
def test_a_stack_of_comments_or_number_signs_is_read(tmp_path):
    """What is tried one way and another would take hours."""
    for text in ("<!-- a -->\n" * 300 + "text", "# " + "#" * 1_000_000 + "x"):
        path = tmp_path / "a.md"
        path.write_text(text)
        assert read_document(path).format == "md"
    path.write_text("<!-- a -->\n" * 30 + "<!DOCTYPE html><p>It is.</p>")
    assert read_document(path).format == "html"


def test_an_entry_that_unpacks_to_more_than_it_states_is_refused(tmp_path):
    """Its size is stated as 10 bytes; in lzma all of it would be unpacked before anything is said."""
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.docx"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("word/document.xml", b"0" * 5_000_000)
        data = path.read_bytes()
        path.write_bytes(data.replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
        tracemalloc.start()
        with pytest.raises(TextError):
            read_document(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3_000_000, method
