"""Tokens to text: what is held back, what ends it, and texts that repeat themselves."""

from __future__ import annotations

import random

import pytest

import pi_gguf
from pi_gguf.runtime.text import PERIOD, REPEATED, TIMES, repeats, until_it_repeats


def spoken(tokens, why="length"):
    """Yield tokens and return why they ended."""
    yield from tokens
    return why


def taken(tokens):
    """Return what comes, and why it ends."""
    found, stream = [], until_it_repeats(spoken(tokens))
    while True:
        try:
            found.append(next(stream))
        except StopIteration as end:
            return found, end.value


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16, 17, 40, PERIOD])
def test_a_stretch_over_and_over_ends_a_text(period):
    draw = random.Random(period)
    before = [draw.randrange(1000) for _ in range(100)]
    stretch = list(range(1000, 1000 + period))
    found, why = taken(before + stretch * 400)
    assert why == "repeats" and found[:100] == before
    assert len(found) == 100 + max(TIMES * period, REPEATED)


def test_other_texts_come_whole():
    draw = random.Random(0)
    longer = list(range(PERIOD + 1)) * 8
    changing = [token for i in range(60) for token in (7, 8, 9, 100 + i)]
    few = [3] * (REPEATED - 1)
    for tokens in (longer, changing, few, [draw.randrange(3) for _ in range(2000)], []):
        assert taken(tokens) == (tokens, "length")


def test_it_is_the_end_of_a_text_that_counts():
    assert not repeats([5] * 200 + [6])
    assert repeats([6] + [5] * REPEATED)


def test_what_it_takes_from_is_closed():
    tokens = spoken([1] * 1000)
    assert len(list(until_it_repeats(tokens))) == REPEATED and list(tokens) == []


def test_a_greedy_answer_that_repeats_is_ended_and_a_drawn_one_is_not(f32_gguf, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One two three.")
    with pi_gguf.open(f32_gguf) as model, model.read(path) as book:
        (*_, token) = model.tokenize(" the", add_special=False)
        answers = []
        for settings in ({}, {"temperature": 1.0}, {"grammar": 'root ::= "a"+'}):
            bias = {} if "grammar" in settings else {token: 100.0}
            parts = book.ask("Who?", max_tokens=REPEATED + 8, logit_bias=bias, **settings)
            while True:
                try:
                    next(parts)
                except StopIteration as end:
                    answers.append(end.value)
                    break
    whole = ("length", REPEATED + 8)
    assert [(one.ended, one.tokens) for one in answers] == [("repeats", REPEATED), whole, whole]
