"""Perplexity of an open model over windows of documents.

The paper's windows are not shared but for a document's first one, which gives all its tokens in one pass: a later
window begins elsewhere, and what a model makes of a token depends on where its window begins. `by_position` is that
first pass alone, exact and cheap.

Source: arXiv 2306.15595, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pi_gguf import bundled
from pi_gguf.common.progress import Advance
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import TextError
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.kl import position_ranges
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.results import PerplexityRow, PositionRow
from pi_gguf.texts import read_texts

_LARGEST_LOSS = 709.0
"""Nats; the perplexity of more is beyond a 64-bit number."""


@dataclass(frozen=True)
class Yardstick:
    """One text on which perplexities that are to be compared are measured: the same stretches of it at every window.

    Args:
        name: of the text.
        text: no more of it than is needed.
        largest: window, in tokens, that fits before the first stretch.
        stride: tokens of a stretch; there are `SAMPLES` of them.
    """

    SAMPLES: ClassVar[int] = 4

    name: str
    text: str
    largest: int
    stride: int

    @classmethod
    def of(cls, text: Sequence[str], smallest: int, largest: int) -> Yardstick:
        """Choose the longest of some texts, for windows from `smallest` to `largest` tokens.

        Args:
            text: files or folders; the held-out novels of the bundled sample when empty.
        """
        documents = read_texts(text) if text else bundled.novels("heldout")
        name, whole = max(documents.items(), key=lambda item: len(item[1]))
        stride = min(256, smallest - 1)
        return cls(name, whole[: 8 * (largest + cls.SAMPLES * stride)], largest, stride)

    def tokens_needed(self) -> int:
        return self.largest + self.SAMPLES * self.stride

    def perplexities(self, lm: LanguageModel, windows: Sequence[int]) -> dict[int, float]:
        """Measure perplexity by window, none of them above `largest`.

        Raises:
            TextError: the text is too short.
        """
        rows = perplexity_rows(
            lm, {self.name: self.text}, windows=windows, stride=self.stride, samples=self.SAMPLES, largest=self.largest
        )
        return {row.window: row.perplexity for row in rows}

    def record(self) -> dict[str, Any]:
        """Return what two measurements must have in common."""
        return {"text": self.name, "text_sha256": sha256([self.text]), "largest": self.largest, "stride": self.stride}


def perplexity_rows(
    lm: LanguageModel,
    documents: dict[str, str],
    *,
    windows: Sequence[int],
    stride: int,
    samples: int,
    largest: int,
) -> list[PerplexityRow]:
    """Measure perplexity of an open model on stretches of documents, as `evaluate_perplexity` with `samples` does.

    Args:
        largest: stretches begin after so many tokens.

    Raises:
        TextError: a document is shorter than that.
    """
    found = measure_documents(lm, documents, windows=windows, stride=stride, samples=samples, largest=largest)
    return rows_by_window(lm.name, found)


def measure_documents(
    lm: LanguageModel,
    documents: dict[str, str],
    *,
    windows: Sequence[int],
    stride: int,
    samples: int | None,
    max_tokens: int = 0,
    largest: int | None = None,
    kept: Kept | None = None,
) -> dict[int, list[dict[str, Any]]]:
    """Score documents at each window; what is kept is not measured again.

    Returns:
        By window, for each document: `scored`, the sum of its losses in nats, of their squares, and the tokens; and
        `first_pass`, the same by `position_ranges` of the largest window, without samples.

    Raises:
        TextError: a document is shorter than the largest window.
    """
    largest = largest or max(windows)
    kept = kept or Kept(None)
    need = max(max_tokens, largest) if samples is None else None
    tokenized = {name: _tokenize(lm, body, need) for name, body in documents.items()}
    for name, ids in tokenized.items():
        if len(ids) < largest:
            raise TextError(
                f"{name}: {len(ids)} tokens, fewer than the largest window of {largest}",
                "give longer texts or smaller --windows",
            )
    found: dict[int, list[dict[str, Any]]] = {}
    for window in windows:
        jobs = {
            name: sliding_windows(ids[: max(max_tokens, largest)], window, stride, lm.bos)
            if samples is None
            else sampled_windows(ids, window, largest, stride, samples, lm.bos)
            for name, ids in tokenized.items()
        }
        whole = window == largest and samples is None
        found[window] = _measure_window(lm, jobs, window, kept, by_position=whole)
    return found


Job = tuple[list[int], int]
"""Ids to read, and how many of the last to score."""


def _measure_window(
    lm: LanguageModel, jobs: dict[str, list[Job]], window: int, kept: Kept, *, by_position: bool
) -> list[dict[str, Any]]:
    """Score the jobs of each document.

    Args:
        by_position: whether what is scored first, a whole window, is summed by position, too.
    """
    losses, tokens = 0.0, 0

    def score(name: str, advance: Advance) -> dict[str, Any]:
        nonlocal losses, tokens
        nll: list[np.ndarray] = []
        for ids, last in jobs[name]:
            nll.append(-lm.score(ids, last)[0])
            losses, tokens = losses + float(nll[-1].sum()), tokens + last
            advance(1, text=f"{math.exp(min(losses / tokens, _LARGEST_LOSS)):.3f}")
        return {"scored": _sums(nll), "first_pass": _by_position(nll[0], window) if by_position else []}

    # By number, not name: the settings have a hash of all texts, and may lie in another folder the next time.
    items = {name: {"window": window, "document": i} for i, name in enumerate(jobs)}
    title = f"perplexity at {window}"
    return [*kept.values(title, "windows", items, score, size=lambda name: len(jobs[name])).values()]


def _tokenize(lm: LanguageModel, body: str, need: int | None) -> list[int]:
    """Return the tokens of a document; where no more than the first `need` are used, those at least."""
    if need is not None and len(body) > 16 * need:  # few tokens have so many characters
        ids = lm.tokenize(body[: 16 * need])
        if len(ids) > need:
            return ids
    return lm.tokenize(body)


def _sums(nll: Sequence[np.ndarray]) -> list[float]:
    return [float(sum(f(x) for x in nll)) for f in (lambda x: x.sum(), lambda x: (x**2).sum(), len)]


def _by_position(nll: np.ndarray, window: int) -> list[list[float]]:
    """Sum the losses of a first pass by range of positions; element i is of the token at position i + 1."""
    return [_sums([nll[max(0, begin - 1) : end - 1]]) for begin, end in _ranges(window)]


def _ranges(window: int) -> list[tuple[int, int]]:
    found = position_ranges(window)
    return found[:-1] or found


def rows_by_window(model: str, found: dict[int, list[dict[str, Any]]]) -> list[PerplexityRow]:
    scored = {window: [part["scored"] for part in parts] for window, parts in found.items()}
    return [PerplexityRow(window, *_perplexity(parts), model) for window, parts in scored.items()]


def position_rows(model: str, window: int, parts: Sequence[Sequence[Sequence[float]]]) -> list[PositionRow]:
    ranges = zip(_ranges(window), zip(*parts, strict=True), strict=False)  # no parts, no rows
    return [PositionRow(begin, end, *_perplexity(of_range), model) for (begin, end), of_range in ranges]


def _perplexity(parts: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    """Return perplexity, its standard error and the tokens, from the sums of each document.

    Over several documents the error is that of a ratio of sums, documents being drawn and not tokens.
    """
    total, squares, tokens = (sum(part[i] for part in parts) for i in range(3))
    mean, n = total / tokens, len(parts)
    if n > 1:
        variance = n / (n - 1) * sum((part[0] - mean * part[2]) ** 2 for part in parts) / tokens**2
    else:
        variance = max(0.0, squares / tokens - mean**2) / (tokens - 1) if tokens > 1 else math.nan
    perplexity = math.exp(min(mean, _LARGEST_LOSS))
    return perplexity, perplexity * math.sqrt(variance), int(tokens)


def sliding_windows(ids: list[int], window: int, stride: int, bos: list[int]) -> list[Job]:
    """Cut a document into windows: (ids, how many of the last to score); each token is scored once.

    Args:
        ids: the document, with its begin token if the model wants one.
        window: tokens of a window, the begin token included.
        stride: tokens scored by every window but the first.
        bos: begin token put in place of the first one of later windows; may be empty.
    """
    jobs = [(ids[:window], min(window, len(ids)) - 1)]
    end = window
    while end < len(ids):
        move = min(stride, len(ids) - end)
        end += move
        jobs.append((bos + ids[end - window + len(bos) : end], move))
    return jobs


def sampled_windows(ids: list[int], window: int, largest: int, stride: int, samples: int, bos: list[int]) -> list[Job]:
    """Cut windows that end at the same evenly spaced places whatever their length; each scores `stride` tokens."""
    room = len(ids) - largest
    if room < stride * (samples - 1):
        raise TextError(
            f"{len(ids)} tokens hold no {samples} separate stretches of {stride} after a window of {largest}",
            "give longer texts or fewer --samples",
        )
    ends = [largest + room * i // max(1, samples - 1) for i in range(samples)] if samples > 1 else [len(ids)]
    return [(bos + ids[end - window + len(bos) : end], stride) for end in ends]
