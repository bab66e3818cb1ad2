"""Prompts that fill a window: facts hidden among sentences, lines or words, as many of these as fit.

In: a task's `Item`, and an open `LanguageModel`. Out: its score. Whole prompts are tokenized, so that the length is
exact for every tokenizer, and what a server is sent as text is as long as what a file reads.
"""

from __future__ import annotations

import re
import textwrap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pi_gguf.errors import OptionError, TextError
from pi_gguf.measure.language_model import LanguageModel

_SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]["”’])) ')
_LONGEST = 400
"""Characters of a sentence; a longer one counts as several."""


@dataclass(frozen=True)
class Item:
    """A question about a text of any length.

    Args:
        task: name, for messages.
        build: makes the prompt of so many units; a unit more makes it longer.
        expected: what the answer must have.
        least: units that make sense, at least.
        most: units that there are.
    """

    task: str
    build: Callable[[int], str]
    expected: Sequence[str]
    least: int = 1
    most: int = 1_000_000


def sentences(documents: Iterable[str]) -> list[str]:
    """Cut documents into their sentences, in order, each on one line."""
    found: list[str] = []
    for text in documents:
        for sentence in _SENTENCE_END.split(" ".join(text.split())):
            short = len(sentence) <= _LONGEST
            found += [sentence] if short else textwrap.wrap(sentence, _LONGEST, break_on_hyphens=False)
    return found


def hide(units: Sequence[str], facts: Iterable[tuple[float, str]]) -> list[str]:
    """Put each fact between two units, at its depth in characters: 0 before all of them, 1 behind all."""
    ends = [0, *accumulate(map(len, units))]
    parts = list(units)
    for depth, fact in sorted(facts, reverse=True):
        parts.insert(bisect_left(ends, depth * ends[-1]), fact)
    return parts


def fit(lm: LanguageModel, item: Item, window: int) -> tuple[list[int], int]:
    """Return the ids of the longest prompt that leaves room for the answer, and that room, in tokens.

    Raises:
        OptionError: the window is too small for the task.
        TextError: there is too little text for it.
    """
    room = 2 * len(lm.tokenize(", ".join(item.expected), add_special=False)) + 8

    def tokens(units: int) -> int:
        return len(lm.tokenize(item.build(units))) + room

    high = item.least
    while high < item.most and tokens(high) <= window:
        high = min(2 * high, item.most)
    units = bisect_right(range(high + 1), window, lo=item.least, key=tokens) - 1
    if units < item.least:
        raise OptionError(f"windows must be at least about {tokens(item.least)} tokens for {item.task}, got {window}")
    if units == item.most:
        raise TextError(f"the text is too short for {item.task} at {window} tokens", "give smaller --windows")
    return lm.tokenize(item.build(units)), room


def ask(lm: LanguageModel, item: Item, window: int) -> float:
    """Return the share of what is expected that a greedy answer to a prompt of the whole window has."""
    return score(lm.generate(*fit(lm, item, window)), item.expected)


def score(answer: str, expected: Sequence[str]) -> float:
    """Return the share of the expected words that are in an answer, whole, in either case."""
    return sum(bool(re.search(rf"\b{re.escape(e)}\b", answer, re.IGNORECASE)) for e in expected) / len(expected)
