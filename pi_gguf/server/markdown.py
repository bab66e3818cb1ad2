"""Markdown that a model wrote -> HTML that a page may show.

In: CommonMark with tables, any text at all. Out: HTML of a short list of tags. Nothing in it runs, is loaded, or names
anything of the page; what the text has as HTML is shown as text. Needs markdown-it-py and nh3, of the extra `serve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

from pi_gguf.errors import OptionError

LIMIT = 100_000
"""Characters that are rendered at most, in seconds at worst: as many as an answer of about 25,000 tokens has."""

SCHEMES = ("http://", "https://", "mailto:")

_TAGS = {
    "a", "blockquote", "br", "code", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip

_LAST_NUMBER = 999
"""With which a list begins; a greater one is a year, or what was asked for."""

_QUESTION_LEVEL = 2
"""Of the heading under which the page shows an answer: headings of the answer are below it."""


class _Markdown(MarkdownIt):
    """CommonMark with tables; a link leads to another site or to a letter, and HTML is text."""

    def validateLink(self, url: str) -> bool:
        return _leads_out(url)


def _leads_out(address: str) -> bool:
    return address.strip().lower().startswith(SCHEMES)


def _attribute(tag: str, name: str, value: str) -> str | None:
    """Keep no address that markdown-it does not ask about, as that of `[a]()`, the page's own."""
    return value if name != "href" or _leads_out(value) else None


def _image_note(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """Return what stands for an image, which is never loaded."""
    said = renderer.renderInlineAsText(tokens[index].children or [], options, env).strip()
    return escapeHtml(f"[image: {said}]" if said else "[image]")


@cache
def _markdown() -> MarkdownIt:
    markdown = _Markdown("commonmark", {"html": False, "maxNesting": 100}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", _image_note)
    return markdown


def _lower_headings(tokens: Sequence[Token]) -> None:
    """Give headings the levels below that of the question, without a gap, whatever the answer has."""
    above: list[int] = []
    for token in tokens:
        if token.type not in ("heading_open", "heading_close"):
            continue
        level = int(token.tag[1:])
        if token.type == "heading_open":
            above = [*(one for one in above if one < level), level]
        token.tag = f"h{min(6, _QUESTION_LEVEL + len(above))}"


def _numbers_as_text(tokens: Sequence[Token]) -> Iterator[Token]:
    """Yield tokens with lists that are none as text: an answer of "1984." is a number, as are those of many digits."""
    lists: list[bool] = []
    for i, token in enumerate(tokens):
        if token.type in ("ordered_list_open", "bullet_list_open"):
            lists.append(token.type == "ordered_list_open" and _is_number(tokens, i))
            if not lists[-1]:
                yield token
        elif token.type in ("ordered_list_close", "bullet_list_close"):
            if not lists.pop():
                yield token
        elif token.type == "list_item_open" and lists[-1]:
            yield from _number(tokens, i)
        elif token.type != "list_item_close" or not lists[-1]:
            yield token


def _is_number(tokens: Sequence[Token], i: int) -> bool:
    empty = [token.type for token in tokens[i + 1 : i + 4]] == [
        "list_item_open",
        "list_item_close",
        "ordered_list_close",
    ]
    return empty or int(tokens[i].attrGet("start") or 1) > _LAST_NUMBER


def _number(tokens: Sequence[Token], i: int) -> Iterator[Token]:
    """Put the number of an item before its text, or yield it as a paragraph where the item does not begin with one."""
    number = Token("text", "", 0, content=tokens[i].info + tokens[i].markup)
    if tokens[i + 1].type == "paragraph_open":
        number.content += " "
        tokens[i + 1].hidden = tokens[i + 3].hidden = False
        tokens[i + 2].children = [number, *(tokens[i + 2].children or [])]
    else:
        yield Token("paragraph_open", "p", 1)
        yield Token("inline", "", 0, children=[number])
        yield Token("paragraph_close", "p", -1)


def render(markdown: str) -> str:
    """Return Markdown as HTML that is safe to put into a page.

    Links lead to http, https and mailto addresses only and tell them nothing of this page; an image is its text in
    brackets; no class, id or style is left.

    Args:
        markdown: what a model wrote.

    Raises:
        OptionError: it is longer than `LIMIT`.

    Example:
        >>> render("It *is* <b>so</b>: ![a map](http://example.org/map.png)")
        '<p>It <em>is</em> &lt;b&gt;so&lt;/b&gt;: [image: a map]</p>\\n'
    """
    if len(markdown) > LIMIT:
        raise OptionError(
            f"markdown must have at most {LIMIT:,} characters, got {len(markdown):,}", "render it in parts"
        )
    parser = _markdown()
    tokens = list(_numbers_as_text(parser.parse(markdown)))
    _lower_headings(tokens)
    html: str = parser.renderer.render(tokens, parser.options, {})
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes={"*": set(), "a": {"href"}, "ol": {"start"}},
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        strip_comments=True,
    )
