"""Documents made by other software than what reads them: PDF by reportlab, zip archives by zipfile."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HEBREW = "בראשית ברא אלהים את השמים ואת הארץ"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。"


def write_pdf(path: Path, pages: Sequence[Sequence[str]], font: str = "Helvetica") -> Path:
    """Write lines on pages; `font` is a standard one, or `DejaVuSans` of a file."""
    import matplotlib
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.cidfonts import UnicodeCIDFont
    from reportlab.pdfbase.ttfonts import TTFont
    from reportlab.pdfgen import canvas

    if font == "DejaVuSans":
        pdfmetrics.registerFont(TTFont(font, str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")))
    elif font == "HeiseiMin-W3":
        pdfmetrics.registerFont(UnicodeCIDFont(font))
    drawing = canvas.Canvas(str(path))
    for lines in pages:
        drawing.setFont(font, 11)
        for number, line in enumerate(lines):
            drawing.drawString(60, 780 - 15 * number, line)
        drawing.showPage()
    drawing.save()
    return path


def write_zip(path: Path, entries: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def book(pages: Mapping[str, str], contents: str, *, ncx: bool = False) -> dict[str, str]:
    """Return the entries of an epub.

    Args:
        pages: bodies of its pages, by name, in the order in which they are read.
        contents: its table of contents, as EPUB 3's or EPUB 2's markup has it.
        ncx: EPUB 2.
    """
    table = (
        '<item id="toc" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
        if ncx
        else '<item id="toc" href="nav.xhtml" properties="nav" media-type="application/xhtml+xml"/>'
    )
    items = "".join(f'<item id="i{n}" href="{p}" media-type="application/xhtml+xml"/>' for n, p in enumerate(pages))
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(pages)))
    navigation = (
        f'<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{contents}</navMap></ncx>'
        if ncx
        else '<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><body>'
        f'<nav epub:type="toc"><ol>{contents}</ol></nav></body></html>'
    )
    return {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OPS/book.opf"/></rootfiles></container>',
        "OPS/book.opf": '<package xmlns="http://www.idpf.org/2007/opf">'
        f"<manifest>{table}{items}</manifest><spine>{spine}</spine></package>",
        "OPS/toc.ncx" if ncx else "OPS/nav.xhtml": navigation,
    } | {
        f"OPS/{name}": '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml">'
        f"<head><title/></head><body>{body}</body></html>"
        for name, body in pages.items()
    }
