"""Where in a document a model looked while it wrote an answer.

In: an open model, what it read and what it answered. Out: each passage's share. Scores of the answer's tokens are
computed once more in a context beside the model's own, into which what it has read is copied: its cache stays as it is.
H heads, T tokens of the answer, P passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil

from pi_gguf.common.files import human_bytes
from pi_gguf.errors import GgufError, OptionError, ResourceError
from pi_gguf.llamacpp.watch import ScoreWatch, Watch
from pi_gguf.runtime.session import Cancelled, Session, never

_SINKS = 16
"""First tokens of what is read, at which heads look that look at nothing."""


class Speller(Protocol):
    """What knows the bytes of tokens."""

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of a token."""


class Looker(Protocol):
    """What looking needs of an open `Model`."""

    path: Path
    flash_attn: bool

    @property
    def session(self) -> Speller:
        """What knows the bytes of tokens."""

    def looking_bytes(self) -> int:
        """Return what `beside` takes of memory, about."""

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        """Return token ids."""

    def beside(self, watch: Watch, known: int) -> AbstractContextManager[Session]:
        """Give a session beside the model's own, watched, that has read the first `known` tokens."""


def check_scores(model: Looker) -> None:
    """Raise an error where what a model looks at cannot be known.

    Raises:
        OptionError: it was opened with flash attention.
    """
    if model.flash_attn:
        raise OptionError(
            "flash attention makes no scores: where the model looked cannot be known",
            "open it with --no-flash-attn, and the V cache not quantized",
        )


def token_bounds(pieces: Sequence[bytes], text: str, starts: Sequence[int]) -> list[int]:
    """Return with which token each passage begins, and after them how many tokens there are.

    A token belongs where its last byte stands: many begin with the space before a word.

    Args:
        pieces: the bytes of each token of the text; SentencePiece puts a space before it.
        text: what was tokenized.
        starts: the character with which each passage begins, sorted.

    Raises:
        GgufError: the tokens are not those bytes.
    """
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    lead = int(ends[-1]) - len(text.encode())
    if lead not in (0, 1):
        raise GgufError("the vocabulary does not keep a text as it is: where its tokens stand is not known")
    before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    return [*(int(i) for i in np.searchsorted(ends - lead, before[list(starts)], side="right")), len(pieces)]


def answer_ids(model: Looker, text: str) -> list[int]:
    """Return the tokens of an answer, where SentencePiece puts a space before a text, too."""
    ids = model.tokenize(text, add_special=False, special=False)
    if text.startswith(" ") and sum(len(model.session.piece(i)) for i in ids) > len(text.encode()):
        ids = model.tokenize(text[1:], add_special=False, special=False)
    return ids


def look(
    model: Looker, ids: Sequence[int], answer: Sequence[int], bounds: Sequence[int], *, cancelled: Cancelled = never
) -> np.ndarray:
    """Return which share of what a model looks at in a document each passage has, while it writes an answer.

    Args:
        model: it has read `ids`, or the first of them.
        ids: document and question; what is not read yet is read.
        answer: the tokens that it wrote after them.
        bounds: the token of `ids` with which each passage begins, and the one after the last passage.
        cancelled: asked before each batch whether to stop.

    Returns:
        float64 (P,), adds up to 1.

    Raises:
        GgufError: the model has no attention that could be seen.
        ResourceError: there is no memory for the context beside.
        Stopped: it was cancelled.
    """
    needed, free = model.looking_bytes(), psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"{model.path}: seeing where it looks takes {human_bytes(needed)}, {human_bytes(free)} of memory free",
            "open a smaller window",
        )
    text = [*ids, *answer]
    looks = _Looks(text, len(ids), bounds)
    with model.beside(looks.watch, len(ids) - 1) as beside:
        looks.session = beside
        for _ in beside.read(text[:-1], len(answer), cancelled=cancelled):
            looks.watch.check()
    total = looks.sums.sum()
    if not total > 0:
        raise GgufError(f"{model.path}: no attention on the document was seen")
    return np.asarray(looks.sums / total)


class _Looks:
    """Adds up, layer by layer, what the heads see that write an answer.

    Args:
        text: what is read, and the answer.
        asked: tokens before the answer.
        bounds: as `look` has them.
    """

    def __init__(self, text: Sequence[int], asked: int, bounds: Sequence[int]) -> None:
        self._text, self._asked = np.asarray(text), asked
        self._bounds = np.maximum(bounds, _SINKS)
        self.sums = np.zeros(len(bounds) - 1)
        self.session: Session
        self.watch = ScoreWatch(self._add)

    def _add(self, scores: np.ndarray) -> None:
        begin, tokens = len(self.session.ids), scores.shape[1]
        end = self._bounds[-1]
        if not in_order(scores, begin):
            return
        skipped = max(0, self._asked - 1 - begin)  # what is read of the question
        if skipped >= tokens:
            return
        seen = scores[:, skipped:, :end]
        next_tokens = self._text[begin + skipped + 1 : begin + tokens + 1]
        self.sums += weigh(seen, self._text[:end] == next_tokens[:, None], self._bounds)


def in_order(scores: np.ndarray, begin: int) -> bool:
    """Tell whether a layer's cache has the tokens in the order in which they were read.

    Not so one with a sliding window, of which only what is near was copied; it does not look far anyway.

    Args:
        scores: attention (H, tokens, places of the cache).
        begin: how many tokens were read before these.
    """
    tokens, places = scores.shape[1:]
    return bool(places >= begin + tokens and scores[:, 0, begin].any() and not scores[:, 0, begin + 1 :].any())


def weigh(seen: np.ndarray, copied: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return what heads see of each passage, weighted by what each sees of the token that is written next.

    Heads that copy from far look there (arXiv 2404.15574, retrieval heads); most others look at what is near. A token
    that the document has often says little of where it is from.

    Args:
        seen: attention, float32 (H, T, tokens of the document).
        copied: where the document has the token that is written next (T, tokens).
        bounds: of the passages (P + 1,).

    Returns:
        float64 (P,), in no unit.
    """
    weights = np.einsum("htd,td->ht", seen, copied.astype(np.float32)) / np.maximum(copied.sum(-1), 1)
    found, some = np.zeros(len(bounds) - 1), np.diff(bounds) > 0
    if some.any():
        sums = np.add.reduceat(seen, bounds[:-1][some], axis=-1)
        found[some] = np.einsum("ht,htp->p", weights, sums, dtype=np.float64)
    return found
