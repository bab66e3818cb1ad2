"""Markdown of answers: all of it is shown, nothing of it runs, is loaded or names what is the page's."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from pi_gguf.errors import OptionError
from pi_gguf.server.markdown import LIMIT, render

TAGS = {
    "a", "blockquote", "br", "code", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip


class Seen(HTMLParser):
    """The tags, attributes and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = handle_comment


def test_what_answers_are_made_of_is_rendered():
    seen = Seen(
        render("a *b* **c** `d` ~~e~~\n\n> q\n\n- x\n- y\n\n3. z\n\n|h|i|\n|-|-:|\n|1|2|\n\n```py\nk < 1\n```\n\n---")
    )
    assert {"em", "strong", "code", "s", "blockquote", "ul", "ol", "li", "table", "th", "td", "pre", "hr"} <= {
        *seen.tags
    }
    assert seen.attributes == [("ol", "start", "3")]
    assert "k < 1" in seen.text


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        (" 31418.\n", "<p>31418.</p>"),
        ("7)", "<p>7)</p>"),
        ("1984. It *was* so.", "<p>1984. It <em>was</em> so.</p>"),
        ("1984. a\n1985. b", "<p>1984. a</p><p>1985. b</p>"),
        ("12345. - a\n       - b", "<p>12345.</p><ul><li>a</li><li>b</li></ul>"),
        ("- 1984.\n- b", "<ul><li><p>1984.</p></li><li>b</li></ul>"),
        ("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
        ("999. a", '<ol start="999"><li>a</li></ol>'),
    ],
)
def test_an_answer_that_is_a_number_is_shown(markdown, html):
    assert render(markdown).replace("\n", "") == html


@pytest.mark.parametrize(
    ("markdown", "levels"),
    [
        ("# a\n\n# b", ["h3", "h3"]),
        ("### a\n\n##### b\n\n### c\n\n# d\n\n###### e", ["h3", "h4", "h3", "h3", "h4"]),
        ("# 1\n\n## 2\n\n### 3\n\n#### 4\n\n##### 5\n\n###### 6", ["h3", "h4", "h5", "h6", "h6", "h6"]),
        ("a\n===\n\nb\n---", ["h3", "h4"]),
    ],
)
def test_headings_are_below_the_question_without_a_gap(markdown, levels):
    html = render(markdown)
    assert Seen(html).tags == levels
    assert all(html.count(f"<{level}>") == html.count(f"</{level}>") for level in levels)


@pytest.mark.parametrize("address", ["http://example.org/a?b=c#d", "HTTPS://example.org", "mailto:who@example.org"])
def test_a_link_leads_out_and_tells_nothing(address):
    for markdown in (f"[x]({address})", f"<{address}>", f"[x][1]\n\n[1]: {address} 'title'"):
        seen = Seen(render(markdown))
        attributes = {name: value for _, name, value in seen.attributes}
        assert attributes.pop("href", "").lower() == address.lower()
        assert attributes == {"target": "_blank", "rel": "noopener noreferrer nofollow"}


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java&#10;script:alert(1)", "&#106;avascript:alert(1)",
        "\x01javascript:alert(1)", "data:text/html,<script>alert(1)</script>", "vbscript:x", "file:///etc/passwd",
        "blob:http://x/y", "//example.org", "/v1/documents", "v1/documents", "#question", "?a=b", "",
    ],
)  # fmt: skip
def test_another_address_is_no_link(address):
    for markdown in (f"[x]({address})", f"[x](<{address}>)", f"[x][1]\n\n[1]: <{address}>", f"<{address}>"):
        assert "href" not in {name for _, name, _ in Seen(render(markdown)).attributes}, markdown


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("![a map](http://example.org/map.png)", "[image: a map]"),
        ("![](https://example.org/?q=secret)", "[image]"),
        ("![a *b* `c` <img src=x>](http://example.org)", "[image: a b c <img src=x>]"),
        ("[![alt](http://example.org/a.png)](http://example.org)", "[image: alt]"),
        ("![a][1]\n\n[1]: http://example.org/a.png", "[image: a]"),
    ],
)
def test_an_image_is_a_note_and_is_never_loaded(markdown, text):
    seen = Seen(render(markdown))
    assert "img" not in seen.tags and "src" not in {name for _, name, _ in seen.attributes}
    assert seen.text.strip() == text


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<style>@import 'http://example.org'</style>",
    "<base href=http://example.org>",
    "<form action=http://example.org><input name=a autofocus></form>",
    "<meta http-equiv=refresh content='0;url=http://example.org'>",
    "<link rel=stylesheet href=http://example.org>",
    "<!-- a --><![CDATA[b]]><?php c ?><!DOCTYPE d>",
    "<p id=question class=send style='position:fixed' title=t onclick=alert(1)>x</p>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    '```html" onload="alert(1)\n</code></pre><script>alert(1)</script>\n```',
    "```\n</code></pre><img src=x onerror=alert(1)>\n```",
    "`</code><img src=x onerror=alert(1)>`",
    '[x](http://example.org/"onmouseover="alert(1))',
    '["><img src=x onerror=alert(1)>](http://example.org)',
    "[x](http://example.org '\"><script>alert(1)</script>')",
    "<http://example.org/<script>alert(1)</script>>",
    "|<script>alert(1)</script>|b|\n|:-:|-|\n|<img src=x onerror=alert(1)>|c|",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    "a\x00<scr\x00ipt>alert(1)</script>",
    "{onclick=alert(1)}\n# x {#question .send}",
]


@pytest.mark.parametrize("markdown", HOSTILE)
@pytest.mark.parametrize("around", ["{}", "- {}", "> {}", "# {}", "**{}**", "a\n\n{}\n\nb"])
def test_nothing_of_a_hostile_answer_is_more_than_text(markdown, around):
    seen = Seen(render(around.format(markdown)))
    assert {*seen.tags} <= TAGS
    for tag, name, value in seen.attributes:
        assert (tag, name) in {("a", "href"), ("a", "rel"), ("a", "target"), ("ol", "start")}, (tag, name)
        assert name != "href" or value.startswith("http://example.org")
    if "alert" in markdown and not markdown.startswith("["):
        assert "alert" in seen.text, "it is shown, not dropped"


@pytest.mark.parametrize(
    "markdown",
    ["[" * 50_000, "![" * 30_000, "*a " * 33_000, "_*" * 24_000 + "a" + "*_" * 24_000, "> " * 20_000 + "a",
     "- " * 20_000 + "a", "[a](" * 25_000, "``a`" * 25_000, "<a " * 33_000, "|a" * 20_000 + "\n" + "|-" * 20_000,
     "[a]: b\n" * 14_000],
    ids=lambda text: repr(text[:6]),
)  # fmt: skip
def test_an_answer_made_to_hang_ends(markdown, never_a_hang):
    assert {*Seen(render(markdown)).tags} <= TAGS


def test_quotations_are_left_as_they_are():
    assert Seen(render("""He says "it's -- so..." and “no”.""")).text.strip() == """He says "it's -- so..." and “no”."""


def test_what_is_too_long_is_refused():
    assert render("a" * LIMIT)
    with pytest.raises(OptionError, match=r"at most 100,000 characters, got 100,001"):
        render("a" * (LIMIT + 1))
