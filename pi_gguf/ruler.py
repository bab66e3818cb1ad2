"""Tasks in the manner of RULER: needles, a chain of variables and counts of words, by window.

In: targets. Out: a report, one row a task and window. Sizes are those of the paper's runs; wording, words and filler
are ours, there is no worked example, and five of its 13 tasks are here.

Source: arXiv 2404.06654, sections 3 and 4 and appendix B.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from pi_gguf import bundled
from pi_gguf.errors import OptionError
from pi_gguf.files import writes
from pi_gguf.haystack import Item, ask, fit, hide, sentences
from pi_gguf.kept import Kept
from pi_gguf.needle import needle_item
from pi_gguf.passkey import EVALUATION_FILLER
from pi_gguf.plots import check_plot, plot_ruler
from pi_gguf.progress import progress_bar
from pi_gguf.provenance import provenance
from pi_gguf.results import RulerReport, RulerRow
from pi_gguf.scoring import LanguageModel
from pi_gguf.targets import check_targets, choose_windows, identity, opened

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
def evaluate_ruler(
    *models: str | LanguageModel,
    windows: Sequence[int] | None = None,
    tasks: str = "single,multikey,variables,common,frequent",
    items: int = 5,
    threshold: float = THRESHOLD,
    context: int | None = None,
    method: str = "linear",
    type_k: str = "f16",
    type_v: str = "f16",
    tokenizer: str | None = None,
    keep: str | None = None,
    plot: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> RulerReport:
    """Measure five tasks in the manner of RULER, and the effective length.

    Each item fills its window and scores the share of the expected words that the greedy answer has. The effective
    length is the longest window whose mean over the tasks is at least THRESHOLD. Wording and items are not RULER's own,
    so compare figures with each other rather than with published ones.

    Args:
        models: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or URL of an OpenAI-compatible server; several
            make one table.
        windows: lengths of prompt and answer together, in tokens; when left out 4096 and its doublings,
            up to the models' window and 32768.
        tasks: of single (a needle in prose), multikey (among needles of other things), variables (a chain of
            assignments), common (the 10 words most often in a list) and frequent (the 3 most frequent coded words).
        items: of each task at each window.
        threshold: mean score, in percent, that a window must reach to count as effective; the paper's when left out.
        context: extend Hugging Face models to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        type_k: K cache of GGUF files: f32, f16, q8_0 or q4_0.
        type_v: V cache of GGUF files.
        tokenizer: MODEL whose tokenizer a server's model has; of URLs only.
        keep: file that keeps each finished task and window, in JSON lines; the same command goes on from it.
        plot: file to draw the mean score by window to, e.g. ruler.png.
        overwrite: replace the plot that is there.
        seed: of the items drawn.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval ruler model.gguf --windows 4096,8192
    """
    options: dict[str, Any] = {
        "context": context, "method": method, "tokenizer": tokenizer, "type_k": type_k, "type_v": type_v,
        "device": device,
    }  # fmt: skip
    check_targets(models, **options)
    chosen = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if not set(chosen) <= set(TASKS):
        raise OptionError(f"tasks must be of {', '.join(TASKS)}, got {tasks}")
    if items < 1:
        raise OptionError(f"items must be at least 1, got {items}")
    if not 0 <= threshold <= 100:
        raise OptionError(f"threshold must be from 0 to 100 percent, got {threshold}")
    check_plot(plot, overwrite)
    windows = choose_windows(windows, models, least=LEAST, **options)
    kept = Kept(keep)
    names, rows = [], []
    for model in models:
        settings = {**identity(model, **options), "items": items, "seed": seed}
        with opened(model, n_ctx=max(windows), **options) as lm:
            for task in chosen:
                for window in sorted({min(windows), max(windows)}):  # what cannot work is said before long work
                    fit(lm, draw_item(task, window, 0, seed), window)
            names.append(lm.name)
            grid = {(t, w): {**settings, "task": t, "window": w} for w in windows for t in chosen}
            todo = [key for key, item in grid.items() if kept.get(item) is None]
            with progress_bar("ruler", len(todo) * items, "items") as advance:
                for task, window in todo:
                    scores = []
                    for i in range(items):
                        scores.append(ask(lm, draw_item(task, window, i, seed), window))
                        advance(1, text=f"{task}, window {window}")
                    kept.put(grid[task, window], 100 * mean(scores))
            rows += [RulerRow(t, w, kept.get(item), items, lm.name) for (t, w), item in grid.items()]
    means = {name: mean_scores([row for row in rows if row.model == name]) for name in names}
    reached = {name: effective_length(means[name], threshold) for name in names}
    report = RulerReport(
        names, rows, threshold, reached, provenance(seed=seed, device=device, type_k=type_k, type_v=type_v)
    )
    if plot:
        plot_ruler({Path(name).name: means[name] for name in names}, threshold, plot)
    return report


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
