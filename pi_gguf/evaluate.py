"""Evaluation at length: sliding-window perplexity and passkey retrieval, on a GGUF file or a Hugging Face model.

In: a model and texts. Out: a report, one row a window, ready for a table or JSON. Both backends go through
`LanguageModel`, so a figure differs between them only by what the models compute.

Source: arXiv 2306.15595, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pi_gguf import bundled
from pi_gguf.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, TextError
from pi_gguf.passkey import EVALUATION_FILLER, INTRODUCTION, QUESTION, draw_key, key_sentence
from pi_gguf.plots import check_plot, plot_passkeys, plot_perplexity
from pi_gguf.progress import progress_bar, say
from pi_gguf.provenance import provenance, sha256
from pi_gguf.scoring import LanguageModel
from pi_gguf.texts import read_texts

WINDOWS = (2048, 4096, 8192, 16384, 32768)
FOUND_SHARE = 0.2
"""A distance counts as reached when at least this share of its keys is found."""


def doublings(original: int, context: int) -> list[int]:
    """Return the original window and each doubling of it, the last one cut to `context`, in tokens."""
    windows = [original]
    while windows[-1] < context:
        windows.append(min(2 * windows[-1], context))
    return windows


@dataclass(frozen=True)
class PerplexityRow:
    """Perplexity at one window; `standard_error` is of the perplexity, `tokens` how many were scored."""

    window: int
    perplexity: float
    standard_error: float
    tokens: int


@dataclass(frozen=True)
class PerplexityReport:
    model: str
    texts: list[str]
    stride: int
    samples: int | None
    rows: list[PerplexityRow]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PasskeyCell:
    """How many of `keys` were found in a prompt of `window` tokens, `distance` tokens before its end.

    `exact_distance` is from the key's sentence to the end as built: whole filler lines, and never before the
    introduction, so that a distance of the whole window is some 60 tokens less.
    """

    window: int
    distance: int
    exact_distance: int
    found: int
    keys: int


@dataclass(frozen=True)
class PasskeyReport:
    """All cells; `k_max` is the largest distance at which at least 20 % were found, 0 if none."""

    model: str
    cells: list[PasskeyCell]
    k_max: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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


def evaluate_perplexity(
    model: str | LanguageModel,
    *,
    text: Sequence[str] = (),
    windows: Sequence[int] = WINDOWS,
    stride: int = 256,
    samples: int | None = None,
    max_tokens: int = 32768,
    context: int | None = None,
    method: str = "linear",
    plot: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> PerplexityReport:
    """Measure perplexity at several windows, with the paper's sliding window.

    Every window scores its last STRIDE tokens only; the first window of a document scores all of them. With
    --samples, a few stretches of STRIDE tokens a document are scored instead, the same ones at every window.

    Args:
        model: GGUF file, Hugging Face folder, Hub id or bundled:tiny.
        text: text file or folder of them; the held-out novels of the bundled sample when left out. Repeatable.
        windows: context lengths, in tokens.
        stride: tokens that a window moves on, and scores.
        samples: stretches to score in each document, evenly spaced; all of the document when left out.
        max_tokens: documents are cut here, in tokens; not with --samples.
        context: extend a Hugging Face model to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        plot: file to draw perplexity by window to, e.g. perplexity.png.
        seed: recorded; nothing is random here.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval perplexity model.gguf --text book.txt --windows 2048,8192,32768
    """
    _check_windows(windows)
    largest = max(windows)
    if not 0 < stride <= min(windows) - 1:
        raise OptionError(f"stride must be from 1 to {min(windows) - 1}, below the smallest window, got {stride}")
    if samples is not None and samples < 1:
        raise OptionError(f"samples must be at least 1, got {samples}")
    check_plot(plot)
    documents = read_texts(text) if text else _heldout()
    with opened(model, n_ctx=largest, context=context, method=method, device=device) as lm:
        rows = perplexity_rows(lm, documents, windows=windows, stride=stride, samples=samples, max_tokens=max_tokens)
        record = provenance(seed=seed, device=device, text_sha256=sha256(list(documents.values())))
        report = PerplexityReport(lm.name, list(documents), stride, samples, rows, record)
    if plot:
        plot_perplexity({Path(report.model).name: rows}, plot)
    return report


def perplexity_rows(
    lm: LanguageModel,
    documents: dict[str, str],
    *,
    windows: Sequence[int],
    stride: int,
    samples: int | None,
    max_tokens: int = 0,
    largest: int | None = None,
) -> list[PerplexityRow]:
    """Measure perplexity of an open model on documents by name; the rest as `evaluate_perplexity`.

    Args:
        largest: stretches begin after so many tokens; the largest window when None.

    Raises:
        TextError: a document is shorter than that.
    """
    largest = largest or max(windows)
    tokenized = {name: lm.tokenize(body) for name, body in documents.items()}
    for name, ids in tokenized.items():
        if len(ids) < largest:
            raise TextError(
                f"{name}: {len(ids)} tokens, fewer than the largest window of {largest}",
                "give longer texts or smaller --windows",
            )
    rows = []
    for window in windows:
        jobs = [
            job
            for ids in tokenized.values()
            for job in (
                sliding_windows(ids[: max(max_tokens, largest)], window, stride, lm.bos)
                if samples is None
                else sampled_windows(ids, window, largest, stride, samples, lm.bos)
            )
        ]
        rows.append(_perplexity(lm, window, jobs))
    return rows


def sliding_windows(ids: list[int], window: int, stride: int, bos: list[int]) -> list[tuple[list[int], int]]:
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


def sampled_windows(
    ids: list[int], window: int, largest: int, stride: int, samples: int, bos: list[int]
) -> list[tuple[list[int], int]]:
    """Cut windows that end at the same evenly spaced places whatever their length; each scores `stride` tokens."""
    room = len(ids) - largest
    if room < stride * (samples - 1):
        raise TextError(
            f"{len(ids)} tokens hold no {samples} separate stretches of {stride} after a window of {largest}",
            "give longer texts or fewer --samples",
        )
    ends = [largest + room * i // max(1, samples - 1) for i in range(samples)] if samples > 1 else [len(ids)]
    return [(bos + ids[end - window + len(bos) : end], stride) for end in ends]


def _perplexity(lm: LanguageModel, window: int, jobs: list[tuple[list[int], int]]) -> PerplexityRow:
    import numpy as np

    losses = []
    with progress_bar(f"perplexity at {window}", len(jobs), "windows") as advance:
        for ids, last in jobs:
            losses.append(-lm.score(ids, last)[0])
            advance(1, text=f"{math.exp(np.concatenate(losses).mean()):.3f}")
    nll = np.concatenate(losses)
    perplexity = math.exp(nll.mean())
    error = perplexity * float(nll.std(ddof=1)) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    return PerplexityRow(window, perplexity, error, len(nll))


def evaluate_passkey(
    model: str | LanguageModel,
    *,
    windows: Sequence[int] = WINDOWS,
    distances: int = 32,
    keys: int = 10,
    context: int | None = None,
    method: str = "linear",
    plot: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> PasskeyReport:
    """Measure passkey retrieval: a five-digit key hidden in filler text, asked for at the end.

    Prompts fill each window; the key lies at evenly spaced distances from the end, up to the whole window. k_max is
    the largest distance at which at least 20 % of the keys are found.

    Args:
        model: GGUF file, Hugging Face folder, Hub id or bundled:tiny.
        windows: prompt lengths, in tokens.
        distances: places of the key in each window.
        keys: keys tried at each place.
        context: extend a Hugging Face model to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        plot: file to draw the share found, by window and distance, to, e.g. passkey.png.
        seed: of the keys drawn.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval passkey model.gguf --windows 2048,8192,32768
    """
    _check_windows(windows)
    for name, value in (("distances", distances), ("keys", keys)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    check_plot(plot)
    with opened(model, n_ctx=max(windows), context=context, method=method, device=device) as lm:
        cells: list[PasskeyCell] = []
        grid = [(window, window * i // distances) for window in windows for i in range(1, distances + 1)]
        # Within a window the key moves from the end to the start, so that most of a prompt is shared with the next.
        with progress_bar("passkey", len(grid) * keys, "keys") as advance:
            for window, distance in grid:
                prompts, rng, found = PasskeyPrompts(lm, window), random.Random(f"{seed} {window} {distance}"), 0
                for _ in range(keys):
                    ids, last, exact = prompts.make(draw_key(rng, for_evaluation=True), distance)
                    found += bool(lm.score(ids, last)[1].all())
                    advance(1, text=f"window {window}")
                cells.append(PasskeyCell(window, distance, exact, found, keys))
        report = PasskeyReport(lm.name, cells, k_max(cells), provenance(seed=seed, device=device))
    if plot:
        plot_passkeys(report, plot)
    return report


def k_max(cells: Sequence[PasskeyCell]) -> int:
    """Return the largest distance, in tokens, at which at least 20 % of the keys were found; 0 if none."""
    return max((c.distance for c in cells if c.found >= FOUND_SHARE * c.keys), default=0)


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

    def make(self, key: str, distance: int) -> tuple[list[int], int, int]:
        """Return the ids of a prompt with its answer, the number of answer tokens at its end, and the exact distance.

        Args:
            key: the passkey.
            distance: tokens from the key's sentence to the end; as near as filler lines allow.

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
        ids = self._start + self._filler * (lines - after_lines) + sentence + self._filler * after_lines + asked
        exact = len(sentence) + len(self._filler) * after_lines + len(asked)
        return ids, len(asked) - len(self._question), exact


@contextmanager
def opened(
    model: str | LanguageModel,
    *,
    n_ctx: int | None,
    context: int | None = None,
    method: str = "linear",
    device: str = "auto",
    type_k: str = "f16",
    type_v: str = "f16",
) -> Iterator[LanguageModel]:
    """Open a GGUF file or a Hugging Face MODEL for `n_ctx` tokens, its own window when None, and close it; an open
    model passes through."""
    if isinstance(model, LanguageModel):
        yield model
        return
    lm: LanguageModel
    if Path(model).suffix == ".gguf":
        from pi_gguf.runtime import Model

        if context is not None:
            raise OptionError("context is for Hugging Face models; a GGUF file holds its scaling")
        lm = Model(model, n_ctx=n_ctx, device=device, type_k=type_k, type_v=type_v)
    else:
        from pi_gguf.hf_model import HfModel

        if (type_k, type_v) != ("f16", "f16"):
            raise OptionError(f"type-k and type-v are for GGUF files, {model} is none", "leave them out")
        checkpoint = load_checkpoint(model)
        lm = HfModel(checkpoint, device=device, rope=None if context is None else checkpoint.extended(context, method))
    if n_ctx is not None and n_ctx > lm.window:
        say(f"note: {model} has a window of {lm.window} tokens and is read to {n_ctx}")
    try:
        yield lm
    finally:
        lm.close()


def _heldout() -> dict[str, str]:
    documents = bundled.novels("heldout")
    say(f"no --text: the {len(documents)} held-out novels of the bundled sample are read")
    return documents


def _check_windows(windows: Sequence[int]) -> None:
    if not windows or min(windows) < 2:
        raise OptionError(f"windows must be token counts above 1, got {list(windows)}")
