"""An answer and the document it is about -> what the answer quotes, and where in the document that stands.

Letter by letter where it stands so. Otherwise with white space, case, accents and points, quotation marks and hyphens
left aside, and then by likeness. Needs rapidfuzz, of the extra `documents`, for the last, and says once that
it is missing.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from pi_gguf.common.progress import say
from pi_gguf.documents.formats import Document

LIKENESS = 0.8
"""Share of characters in common from which on a passage is near: sentences of other novels reach 0.7 by chance."""

_LEAST_LIKE = 20
"""Width of a quotation that is searched for by likeness, at least: a shorter one is like some passage by chance."""

_MOST_LIKE = 1000
"""Characters of a quotation that is searched for by likeness, at most: the search, in which Python's other threads
stand still, takes as long as these and the document's together say, multiplied."""

_MOST_SEARCHED = 50
"""Quotations of an answer that are searched for by likeness, at most."""

_LEAST_WORDS, _LEAST_WIDTH = 3, 12
"""Of a quotation; what has less of both is a name or a word in quotation marks."""

_REACH = 2000
"""Characters that an ellipsis leaves out, at most, white space not counted."""

_LONGEST_WORD = 30
"""What has more characters without a space is of a script that has none."""

_LEFT_OUT = {"Zs", "Zl", "Zp", "Cc", "Cf", "Pd", "Pi", "Pf"}
_LEFT_OUT_MARKS = set("\"'`´*_~-−„‚「」『』ـ")
"""What is not compared: white space, hyphens, quotation marks and Markdown's."""

_ENDS = ".,;:!?。，、"

_MARKED = r"(?<![0-9A-Za-z])(?=\"\S)" + "|".join(  # a straight mark after a number is inches
    rf"{opening}(?:(?!\n[ \t]*\n)[^{opening}{closing}])+{closing}"
    for opening, closing in (('"', '"'), *map(tuple, ("“”", "„“", "„”", "«»", "»«", "「」", "『』")))
)
_LINES = r"^[ \t]{0,3}>.*(?:\n[ \t]{0,3}>.*)*"
"""What stands in quotation marks, and lines that Markdown shows as quoted."""

_QUOTED = re.compile(f"{_LINES}|{_MARKED}", re.MULTILINE)

_MARKED_WITH_SOURCE = re.compile(rf"({_MARKED})(?:\s*[(\[—–-][^\n]*)?")

_ELLIPSIS = re.compile(r"\s*(?:\[\s*(?:\.{3}|…)\s*\]|\.{3,}|…)\s*")


@dataclass(frozen=True)
class Quote:
    """A quotation of an answer, and the passage of the document that it is.

    Args:
        text: what is quoted, without its marks.
        answer_start: character of the answer with which it begins.
        answer_end: the one after its last.
        found: exact: the document has these characters, but for white space; near: it has a like passage; none.
        similarity: share of the characters that quotation and passage have in common, 0 to 1; 0 if there is none.
        start: character of the document's text with which the passage begins; None if there is none.
        end: the one after its last.
        place: where that is, as `Document.place_of` says.
    """

    text: str
    answer_start: int
    answer_end: int
    found: Literal["exact", "near", "none"]
    similarity: float = 0.0
    start: int | None = None
    end: int | None = None
    place: str | None = None


def find_quotes(answer: str, document: Document) -> list[Quote]:
    """Find what an answer quotes in the document it is about.

    Quotations are what stands in quotation marks of any kind, from three words or a width of 12 characters on (one of
    Chinese, Japanese or Korean is two wide), and lines that begin with `>`. Of passages that are equally like one, the
    first is taken; where an ellipsis leaves something out, what stands before and after it is searched for in turn.
    Of more than 1,000 characters, and behind the first 50 that are searched for by likeness, only those are found that
    stand in the document but for what is left aside.

    Args:
        answer: what a model wrote.
        document: what it was asked about.

    Returns:
        One for each quotation, in their order.

    Example:
        >>> text = "Call me Ishmael. Some years ago - never mind how long precisely - I went to sea."
        >>> quotes = find_quotes("He says “never mind how long”.", Document("moby.txt", "txt", text))
        >>> [(quote.found, text[quote.start : quote.end]) for quote in quotes]
        [('exact', 'never mind how long')]
    """
    quotations = list(_quotations(answer))
    if not quotations:
        return []
    folded, searches = _Folded(document.text), _Searches(_MOST_SEARCHED)
    found = []
    for start, end, text in quotations:
        passage = _find(text, folded, searches)
        if passage is None:
            found.append(Quote(text, start, end, "none"))
            continue
        first, last, similarity = passage
        same = "".join(text.split()) == "".join(document.text[first:last].split())
        place = document.place_of(first, last)
        found.append(Quote(text, start, end, "exact" if same else "near", similarity, first, last, place))
    return found


def _quotations(answer: str) -> Iterator[tuple[int, int, str]]:
    """Yield begin, end and words of what is quoted and long enough."""
    for match in _QUOTED.finditer(answer):
        start, end = match.span()
        if match[0].lstrip().startswith(">"):
            text = "\n".join(line.strip().removeprefix(">").strip() for line in match[0].splitlines()).strip()
            if marked := _MARKED_WITH_SOURCE.fullmatch(text):
                text = marked[1][1:-1]
        else:
            start, end = start + 1, end - 1
            text = answer[start:end]
        text = text.strip()
        if len(text.split()) >= _LEAST_WORDS or _width(text) >= _LEAST_WIDTH:
            yield start, end, text


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


class _Folds(dict[str, str]):
    """What of a character is compared: without case, accents and points; nothing of white space, marks and hyphens."""

    def __missing__(self, character: str) -> str:
        left_out = unicodedata.category(character) in _LEFT_OUT or character in _LEFT_OUT_MARKS
        parts = unicodedata.normalize("NFKD", "" if left_out else character)
        folded = unicodedata.normalize("NFKC", "".join(part for part in parts if not _is_accent(part))).casefold()
        return self.setdefault(character, folded)


def _is_accent(character: str) -> bool:
    """Tell accents and points, without which a word is the same one, from vowels and voicing of other scripts."""
    kind = unicodedata.combining(character)
    return 10 <= kind < 36 or kind >= 200


class _Folded:
    """A text as it is compared, and where in it each character was.

    Args:
        text: as it is.
    """

    def __init__(self, text: str) -> None:
        self.original = text
        folds = _Folds()
        parts = list(map(folds.__getitem__, text))
        self.text = "".join(parts)
        self._ends = array("Q", accumulate(map(len, parts)))

    def range(self, start: int, end: int) -> tuple[int, int]:
        """Return where a range of the folded text, which is not empty, stands in the original."""
        first, last = bisect_right(self._ends, start), bisect_right(self._ends, end - 1) + 1
        while last < len(self.original) and _is_accent(self.original[last]):
            last += 1
        return first, last


@dataclass
class _Searches:
    """How many parts of quotations may still be searched for by likeness."""

    left: int


def _find(quotation: str, folded: _Folded, searches: _Searches) -> tuple[int, int, float] | None:
    """Return begin and end of the passage that is quoted, and how much of it is the same."""
    start = folded.original.find(quotation)
    if start >= 0:
        return start, start + len(quotation), 1.0
    parts = [_Folded(part).text for part in _ELLIPSIS.split(quotation)]
    parts = [part for part in parts if part]
    if not parts:
        return None
    longest = parts.index(max(parts, key=len))
    found = _find_part(parts[longest], folded.text, searches)
    start, end, similarity = found or (0, 0, 0.0)
    for part in reversed(parts[:longest]) if found else ():
        low = max(0, start - _REACH)
        found = found and _find_part(part, folded.text[low:start], searches, last=True)
        start, similarity = (low + found[0], min(similarity, found[2])) if found else (start, 0.0)
    for part in parts[longest + 1 :] if found else ():
        found = found and _find_part(part, folded.text[end : end + _REACH], searches)
        end, similarity = (end + found[1], min(similarity, found[2])) if found else (end, 0.0)
    if not found:
        return None
    start, end = folded.range(start, end)
    return *(_whole_words(folded.original, start, end) if similarity < 1 else (start, end)), similarity


def _find_part(part: str, text: str, searches: _Searches, last: bool = False) -> tuple[int, int, float] | None:
    """Return begin and end of a folded quotation in a folded text, and how much of it is the same there.

    Args:
        part: of the quotation, without an ellipsis; not empty.
        text: that is searched.
        searches: by likeness, that are left.
        last: the last of several equal passages is wanted, not the first.
    """
    search = text.rfind if last else text.find
    for same in (part, part.rstrip(_ENDS)):  # a comma or a point before the mark may be the answer's own
        start = search(same) if same else -1
        if start >= 0:
            return start, start + len(same), 2 * len(same) / (len(part) + len(same))
    if searches.left <= 0 or len(part) > _MOST_LIKE or _width(part) < _LEAST_LIKE:
        return None
    searches.left -= 1
    return _find_like(part, text)


@cache
def _can_compare() -> bool:
    """Tell whether rapidfuzz is installed, and say once if it is not: an answer is worth more than its quotations."""
    if importlib.util.find_spec("rapidfuzz") is None:
        say("only quotations that are word for word are found; others: pip install 'pi-gguf[documents]'")
        return False
    return True


def _find_like(part: str, text: str) -> tuple[int, int, float] | None:
    """Return the passage that is most like a folded quotation, as `_find_part` does."""
    if not _can_compare():
        return None
    from rapidfuzz import fuzz
    from rapidfuzz.distance import Indel

    best = fuzz.partial_ratio_alignment(part, text, score_cutoff=100 * LIKENESS)
    if best is None:
        return None
    start, end = best.dest_start, best.dest_end  # as long as the quotation; the passage may have words more or fewer
    some = min(len(part) // 2, 100)
    like = Indel.normalized_similarity
    start = max(range(max(0, start - some), start + some + 1), key=lambda at: like(part, text[at:end]))
    end = max(range(end - some, min(len(text), end + some) + 1), key=lambda at: like(part, text[start:at]))
    similarity = like(part, text[start:end])
    return (start, end, similarity) if similarity >= LIKENESS else None


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Widen a range that begins or ends inside a word, where words have spaces between them."""

    def inside(at: int) -> bool:
        around = text[at - 1 : at + 1]
        return 0 < at < len(text) and around.isalnum() and _width(around) == 2

    first, last = start, end
    while inside(first) and start - first < _LONGEST_WORD:
        first -= 1
    while inside(last) and last - end < _LONGEST_WORD:
        last += 1
    return (start if inside(first) else first), (end if inside(last) else last)
