"""The paper's two evaluations at length: sliding-window perplexity and passkey retrieval.

In: targets and texts. Out: a report, one row a window, ready for a table or JSON. The paper's windows are not shared
but for a document's first one, which gives all its tokens in one pass: a later window begins elsewhere, and what a
model makes of a token depends on where its window begins. `by_position` is that first pass alone, exact and cheap.

Source: arXiv 2306.15595, sections 3.2 and 3.3.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from pi_gguf import bundled
from pi_gguf.bundled.passkey import EVALUATION_FILLER, INTRODUCTION, QUESTION, draw_key, key_sentence
from pi_gguf.common.files import writes
from pi_gguf.common.options import (
    PerplexityKeywords,
    RetrievalKeywords,
    ServerOptions,
    SuiteOptions,
    TargetOptions,
    flat,
    take,
)
from pi_gguf.common.progress import Advance, say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import OptionError, TextError
from pi_gguf.kept import Kept
from pi_gguf.plots import plot_passkeys, plot_perplexity
from pi_gguf.results import PasskeyCell, PasskeyReport, PerplexityReport, PerplexityRow, PositionRow
from pi_gguf.scoring import LanguageModel, position_ranges
from pi_gguf.suite import Suite, check_counts
from pi_gguf.texts import read_texts

if TYPE_CHECKING:
    import numpy as np

FOUND_SHARE = 0.2
"""A distance counts as reached when at least this share of its keys is found, there and at every shorter one."""


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


@writes("keep", "plot")
@flat(TargetOptions, SuiteOptions)
def evaluate_perplexity(
    *models: str | LanguageModel,
    stride: int = 256,
    samples: int | None = None,
    max_tokens: int = 32768,
    **options: Unpack[PerplexityKeywords],
) -> PerplexityReport:
    """Measure perplexity at several windows, with the paper's sliding window.

    Every window scores its last STRIDE tokens only; the first window of a document scores all of them. With
    --samples, a few stretches of STRIDE tokens a document are scored instead, the same ones at every window.

    Args:
        models: GGUF file, Hugging Face folder, Hub id or bundled:tiny; several make one table.
        stride: tokens that a window moves on, and scores.
        samples: stretches to score in each document, evenly spaced; all of the document when left out.
        max_tokens: documents are cut here, in tokens; not with --samples.

    Example:
        pi-gguf eval perplexity model.gguf --text book.txt --windows 2048,8192,32768
    """
    target, common = take(TargetOptions, options), take(SuiteOptions, options)
    suite = Suite(models, target, common)
    windows = suite.windows()
    largest = max(windows)
    if not 0 < stride <= min(windows) - 1:
        raise OptionError(f"stride must be from 1 to {min(windows) - 1}, below the smallest window, got {stride}")
    if samples is not None and samples < 1:
        raise OptionError(f"samples must be at least 1, got {samples}")
    documents = read_texts(common.text, characters=2 * largest) if common.text else _heldout()
    hashed = sha256(list(documents.values()))
    how: dict[str, Any] = {"stride": stride, "samples": samples, "max_tokens": max_tokens}
    measured = suite.measure(
        lambda lm, kept: measure_documents(lm, documents, windows=windows, kept=kept, **how),
        {"texts": hashed, **how, "largest": largest},
        n_ctx=largest,
    )
    rows, by_position = [], []
    for name, found in zip(suite.names, measured, strict=True):
        rows += _rows(name, found)
        by_position += _position_rows(name, largest, [part["first_pass"] for part in found[largest]])
    record = suite.record(text_sha256=hashed)
    report = PerplexityReport(suite.names, list(documents), stride, samples, rows, by_position, record)
    if common.plot:
        curves = {Path(name).name: [row for row in rows if row.model == name] for name in suite.names}
        plot_perplexity(curves, common.plot)
    return report


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
    return _rows(lm.name, found)


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


def _rows(model: str, found: dict[int, list[dict[str, Any]]]) -> list[PerplexityRow]:
    scored = {window: [part["scored"] for part in parts] for window, parts in found.items()}
    return [PerplexityRow(window, *_perplexity(parts), model) for window, parts in scored.items()]


def _position_rows(model: str, window: int, parts: Sequence[Sequence[Sequence[float]]]) -> list[PositionRow]:
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


@writes("keep", "plot")
@flat(ServerOptions, SuiteOptions)
def evaluate_passkey(
    *models: str | LanguageModel,
    distances: int | None = None,
    keys: int | None = None,
    quick: bool = False,
    growing: bool = False,
    **options: Unpack[RetrievalKeywords],
) -> PasskeyReport:
    """Measure passkey retrieval: a five-digit key hidden in filler text, asked for at the end.

    Prompts fill each window; the key lies at evenly spaced distances from the end, up to the whole window. k_max is
    the paper's: the largest distance up to which at least 20 % of the keys are found at each. With --growing prompts
    are as long as the distance, the key at their start: each key is then read once for all its distances, where filling
    the window takes a reading of what is behind the key for each of them. The plot, the share found by window and
    distance, is of one model unless growing.

    Args:
        models: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or URL of an OpenAI-compatible server; several
            make one table.
        distances: places of the key in each window; 32 when left out.
        keys: keys tried at each place; 10 when left out.
        quick: 8 places and 2 keys when those are left out.
        growing: put the key first and ask after each distance, up to the largest window, instead of filling windows;
            about twenty times as fast with 32 distances, and without filler before the key.

    Example:
        pi-gguf eval passkey model.gguf --windows 2048,8192,32768
    """
    target, common = take(ServerOptions, options), take(SuiteOptions, options)
    suite = Suite(models, target, common, draws_one=not growing)
    how: dict[str, Any] = {
        "distances": (8 if quick else 32) if distances is None else distances,
        "keys": (2 if quick else 10) if keys is None else keys,
    }
    check_counts(how)
    windows = suite.windows()
    measured = suite.measure(
        lambda lm, kept: passkey_cells(lm, windows=windows, growing=growing, seed=common.seed, kept=kept, **how),
        {"growing": growing, "seed": common.seed},
        n_ctx=max(windows),
    )
    cells = list(itertools.chain(*measured))
    found = {name: k_max([cell for cell in cells if cell.model == name], growing=growing) for name in suite.names}
    report = PasskeyReport(suite.names, cells, found, growing, suite.record())
    if common.plot:
        plot_passkeys(report, common.plot)
    return report


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


def _heldout() -> dict[str, str]:
    documents = bundled.novels("heldout")
    say(f"no --text: the {len(documents)} held-out novels of the bundled sample are read")
    return documents
