"""Tasks in the manner of RULER: needles, a chain of variables and counts of words, by window.

In: targets. Out: a report, one row a task and window. Sizes are those of the paper's runs; wording, words and filler
are ours, there is no worked example, and five of its 13 tasks are here.

Source: arXiv 2404.06654, sections 3 and 4 and appendix B.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from string import ascii_lowercase, ascii_uppercase
from typing import Unpack

from pi_gguf import bundled
from pi_gguf.bundled.passkey import EVALUATION_FILLER
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import Advance
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.needle import needle_item
from pi_gguf.evaluate.options import RetrievalKeywords, SuiteOptions
from pi_gguf.evaluate.suite import Suite, check_counts
from pi_gguf.measure.haystack import Item, ask, fit, hide, sentences
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.plots import plot_ruler
from pi_gguf.measure.results import RulerReport, RulerRow
from pi_gguf.models.options import ServerOptions

THRESHOLD = 85.6
"""Percent: what Llama-2-7B-chat has at 4096 tokens over the paper's tasks."""

LEAST = 4096
"""Window to begin with, in tokens."""

KEYS = 4
"""Needles of a multi-key task."""

HOPS = 4
"""Assignments after the first one."""

COMMON, COMMON_TIMES, OTHERS_TIMES = 10, 30, 3
"""Common words, how often each is listed, and how often every other one."""

FREQUENT = 3
"""Most frequent words that are asked for; the word of rank r is written 1 / r^2 times as often as the first."""


@writes("keep", "plot")
@flat(ServerOptions, SuiteOptions)
def evaluate_ruler(
    *models: str | LanguageModel,
    tasks: str = "single,multikey,variables,common,frequent",
    items: int = 5,
    threshold: float = THRESHOLD,
    **options: Unpack[RetrievalKeywords],
) -> RulerReport:
    """Measure five tasks in the manner of RULER, and the effective length.

    Each item fills its window and scores the share of the expected words that the greedy answer has. The effective
    length is the longest window whose mean over the tasks is at least THRESHOLD. Wording and items are not RULER's own,
    so compare figures with each other rather than with published ones.

    Args:
        models: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or URL of an OpenAI-compatible server; several
            make one table.
        tasks: of single (a needle in prose), multikey (among needles of other things), variables (a chain of
            assignments), common (the 10 words most often in a list) and frequent (the 3 most frequent coded words).
        items: of each task at each window.
        threshold: mean score, in percent, that a window must reach to count as effective; the paper's when left out.

    Example:
        pi-gguf eval ruler model.gguf --windows 4096,8192
    """
    target, common = take(ServerOptions, options), take(SuiteOptions, options)
    suite = Suite(models, target, common)
    chosen = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if not set(chosen) <= set(TASKS):
        raise OptionError(f"tasks must be of {', '.join(TASKS)}, got {tasks}")
    check_counts({"items": items})
    if not 0 <= threshold <= 100:
        raise OptionError(f"threshold must be from 0 to 100 percent, got {threshold}")
    windows = suite.windows(least=LEAST)
    measured = suite.measure(
        lambda lm, kept: _rows(lm, kept, chosen, windows, items, common.seed),
        {"items": items, "seed": common.seed},
        n_ctx=max(windows),
    )
    rows = list(itertools.chain(*measured))
    means = {name: mean_scores([row for row in rows if row.model == name]) for name in suite.names}
    reached = {name: effective_length(means[name], threshold) for name in suite.names}
    report = RulerReport(suite.names, rows, threshold, reached, suite.record())
    if common.plot:
        plot_ruler({Path(name).name: means[name] for name in suite.names}, threshold, common.plot)
    return report


def _rows(
    lm: LanguageModel, kept: Kept, tasks: Sequence[str], windows: Sequence[int], items: int, seed: int
) -> list[RulerRow]:
    """Ask an open model for the items of each task at each window."""
    for task in tasks:
        for window in sorted({min(windows), max(windows)}):  # what cannot work is said before long work
            fit(lm, draw_item(task, window, 0, seed), window)

    def score(place: tuple[str, int], advance: Advance) -> float:
        task, window = place
        scores = []
        for i in range(items):
            scores.append(ask(lm, draw_item(task, window, i, seed), window))
            advance(1, text=f"{task}, window {window}")
        return 100 * mean(scores)

    grid = {(task, window): {"task": task, "window": window} for window in windows for task in tasks}
    found = kept.values("ruler", "items", grid, score, size=lambda _: items)
    return [RulerRow(task, window, value, items, lm.name) for (task, window), value in found.items()]


def mean_scores(rows: Sequence[RulerRow]) -> dict[int, float]:
    """Return the mean over the tasks by window, of one model."""
    return {w: mean(row.score for row in rows if row.window == w) for w in sorted({row.window for row in rows})}


def effective_length(means: Mapping[int, float], threshold: float) -> int:
    """Return the longest window whose mean is at least `threshold`, in tokens; 0 if none."""
    return max((window for window, score in means.items() if score >= threshold), default=0)


def draw_item(task: str, window: int, number: int, seed: int) -> Item:
    """Draw an item of a task; the same arguments give the same one."""
    return TASKS[task](random.Random(f"{seed} {task} {window} {number}"))


def _single(rng: random.Random) -> Item:
    return needle_item(rng, _prose(), [rng.random()])


def _multikey(rng: random.Random) -> Item:
    return needle_item(rng, _prose(), [rng.random() for _ in range(KEYS)])


def _variables(rng: random.Random) -> Item:
    """One variable gets a value, each later one that of the one before; all of them are asked for."""
    value, names = rng.randint(10000, 99999), _codes(rng, ascii_uppercase, 5, HOPS + 1)
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    facts = list(zip(sorted(rng.random() for _ in lines), lines, strict=True))
    introduction = "Variables get values in the text below, some of them from another variable.\n\n"
    question = f"\n\nThe {len(names)} variables that have the value {value}, at first hand or through others, are:"
    filler = EVALUATION_FILLER.strip()
    return Item("variables", lambda n: introduction + "\n".join(hide([filler] * n, facts)) + question, names)


def _common(rng: random.Random) -> Item:
    """A numbered list of real words, a few of them many times; these are asked for."""
    words, order = rng.sample(_words(), len(_words())), rng.random()
    question = f"\n\nThe {COMMON} words that stand in this list most often are:"

    def build(others: int) -> str:
        listed = words[:COMMON] * COMMON_TIMES + words[COMMON : COMMON + others] * OTHERS_TIMES
        random.Random(order).shuffle(listed)
        numbered = (f"{i}. {word}" for i, word in enumerate(listed, 1))
        return "A list of words, many of them more than once:\n\n" + " ".join(numbered) + question

    return Item("common", build, words[:COMMON], least=COMMON, most=len(words) - COMMON)


def _frequent(rng: random.Random) -> Item:
    """Words that mean nothing, by a Zipf law of exponent 2; the most frequent are asked for."""
    words, order = _codes(rng, ascii_lowercase, 6, 1000), rng.random()
    question = f"\n\nThe {FREQUENT} words that this message has most often are:"

    def build(times: int) -> str:
        written = [word for rank, word in enumerate(words, 1) for _ in range(times // rank**2)]
        random.Random(order).shuffle(written)
        return "A message in a secret language:\n\n" + " ".join(written) + question

    # From 18 on the third word is written more often than the fourth; beyond 1000^2 ranks would run out.
    return Item("frequent", build, words[:FREQUENT], least=18, most=len(words) ** 2)


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "single": _single,
    "multikey": _multikey,
    "variables": _variables,
    "common": _common,
    "frequent": _frequent,
}


@cache
def _prose() -> list[str]:
    return sentences(bundled.novels("heldout").values())


@cache
def _words() -> list[str]:
    """Return the real words that the novels have, of 4 to 9 small letters."""
    found = re.findall(r"(?<![\w'’-])[a-z]{4,9}(?![\w'’-])", " ".join(_prose()))
    return sorted(set(found))


def _codes(rng: random.Random, alphabet: str, length: int, count: int) -> list[str]:
    """Draw different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(alphabet, k=length))] = None
    return list(found)
