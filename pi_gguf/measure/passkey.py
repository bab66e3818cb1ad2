"""Passkeys found by an open model, and k_max.

Source: arXiv 2306.15595, section 3.3.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from pi_gguf.bundled.passkey import EVALUATION_FILLER, INTRODUCTION, QUESTION, draw_key, key_sentence
from pi_gguf.common.progress import Advance
from pi_gguf.errors import OptionError
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.results import PasskeyCell

FOUND_SHARE = 0.2
"""A distance counts as reached when at least this share of its keys is found, there and at every shorter one."""


def passkey_cells(
    lm: LanguageModel,
    *,
    windows: Sequence[int],
    distances: int,
    keys: int,
    growing: bool = False,
    seed: int = 0,
    kept: Kept | None = None,
) -> list[PasskeyCell]:
    """Ask an open model for passkeys, as `evaluate_passkey` does; what is kept is not asked again.

    Raises:
        OptionError: a window is too small for the task.
    """
    kept, largest = kept or Kept(None), max(windows)
    places = [(w, w * i // distances) for w in ((largest,) if growing else windows) for i in range(1, distances + 1)]
    # In an order in which each prompt shares much of its start with the one before: all of the same key's
    # shorter prompt, or what lies before a key that moves from the end to the start.
    order = (
        [(place, n) for n in range(keys) for place in places]
        if growing
        else list(itertools.product(places, range(keys)))
    )
    items = {(place, n): {"window": place[0], "distance": place[1], "key": n} for place, n in order}
    drawn = {place: _keys(f"{seed} growing" if growing else f"{seed} {place[0]} {place[1]}", keys) for place in places}
    prompts = {window: PasskeyPrompts(lm, window) for window in dict.fromkeys(w for w, _ in places)}

    def ask(question: tuple[tuple[int, int], int], advance: Advance) -> dict[str, Any]:
        place, n = question
        window, distance = place
        ids, last, exact = prompts[window].make(drawn[place][n], distance, fill=not growing)
        answer = {"exact_distance": exact, "found": lm.predicts(ids, last)}
        advance(1, text=f"distance {distance} of {window}")
        return answer

    answered = kept.values("passkey", "keys", items, ask)
    cells = []
    for window, distance in places:
        answers = [answered[(window, distance), n] for n in range(keys)]
        found = sum(answer["found"] for answer in answers)
        exact = answers[0]["exact_distance"]
        cells.append(PasskeyCell(distance if growing else window, distance, exact, found, keys, lm.name))
    return cells


def _keys(seed: str, keys: int) -> list[str]:
    rng = random.Random(seed)
    return [draw_key(rng, for_evaluation=True) for _ in range(keys)]


def k_max(cells: Sequence[PasskeyCell], *, growing: bool = False) -> int:
    """Return the largest distance, in tokens, up to which at least 20 % of the keys were found at every one; 0 if none.

    Where prompts filled windows it is counted in each of them, and the largest is returned.
    """
    reached = [0]
    for window in {0 if growing else cell.window for cell in cells}:
        asked = sorted((c for c in cells if growing or c.window == window), key=lambda c: c.distance)
        found = itertools.takewhile(lambda c: c.found >= FOUND_SHARE * c.keys, asked)
        reached += [cell.distance for cell in found]
    return max(reached)


class PasskeyPrompts:
    """Builds prompts of one window in tokens, so that length and distance are exact to a filler line.

    Args:
        lm: gives the tokenizer.
        window: tokens of prompt and answer together, at most.
    """

    def __init__(self, lm: LanguageModel, window: int) -> None:
        self._lm, self._window = lm, window
        self._start = lm.tokenize(INTRODUCTION)
        self._filler = lm.tokenize(EVALUATION_FILLER, add_special=False)
        self._question = lm.tokenize(QUESTION, add_special=False)

    def make(self, key: str, distance: int, *, fill: bool = True) -> tuple[list[int], int, int]:
        """Return the ids of a prompt with its answer, the number of answer tokens at its end, and the exact distance.

        Args:
            key: the passkey.
            distance: tokens from the key's sentence to the end; as near as filler lines allow.
            fill: put filler before the key until the window is full; else the key comes first.

        Raises:
            OptionError: the window is too small for the task.
        """
        sentence = self._lm.tokenize(key_sentence(key), add_special=False)
        asked = self._lm.tokenize(f"{QUESTION} {key}", add_special=False)
        if asked[: len(self._question)] != self._question:
            raise OptionError(f"{self._lm.name}: the tokenizer joins the question and the key; no passkey test")
        lines = (self._window - len(self._start) - len(sentence) - len(asked)) // len(self._filler)
        if lines < 1:
            raise OptionError(f"windows must be at least {self._window - lines * len(self._filler)} tokens here")
        after = (distance - len(sentence) - len(asked)) / len(self._filler)
        after_lines = min(lines, max(0, round(after)))
        before = self._filler * (lines - after_lines) if fill else []
        ids = self._start + before + sentence + self._filler * after_lines + asked
        exact = len(sentence) + len(self._filler) * after_lines + len(asked)
        return ids, len(asked) - len(self._question), exact
