"""A needle in a haystack: one sentence hidden in long prose, and asked for at the end.

In: targets and prose. Out: a report, one cell a window and depth. Prompts are to be continued, not answered, so that
base models can be asked.

Source: the test is Kamradt's of 2023; a number of seven digits by a word is RULER's, arXiv 2404.06654, section 3.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Unpack

from pi_gguf import bundled
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import Advance
from pi_gguf.common.provenance import sha256
from pi_gguf.evaluate.options import NeedleKeywords, SuiteOptions
from pi_gguf.evaluate.suite import Suite, check_counts
from pi_gguf.measure.haystack import Item, ask, fit, hide, sentences
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.plots import plot_needle
from pi_gguf.measure.results import NeedleCell, NeedleReport
from pi_gguf.models.options import ServerOptions
from pi_gguf.texts import read_texts

INTRODUCTION = "The pages below tell secret numbers of things. Keep them in mind: one is asked for at the end.\n\n"


@writes("keep", "plot")
@flat(ServerOptions, SuiteOptions)
def evaluate_needle(
    *models: str | LanguageModel, depths: int = 10, needles: int = 1, **options: Unpack[NeedleKeywords]
) -> NeedleReport:
    """Measure retrieval of a needle in a haystack: a sentence hidden in prose, asked for at the end.

    Prose fills each window, the texts one after another; the needle lies at evenly spaced depths from its start to its
    end. It is found when the greedy answer has its number. The plot, the share found by window and depth, is of one
    model.

    Args:
        models: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or URL of an OpenAI-compatible server; several
            make one table.
        depths: places of the needle in each window, from the start to the end; 1 is the start.
        needles: needles tried at each place, one at a time.

    Example:
        pi-gguf eval needle model.gguf --plot needle.png
    """
    target, common = take(ServerOptions, options), take(SuiteOptions, options)
    suite = Suite(models, target, common, draws_one=True)
    check_counts({"depths": depths, "needles": needles})
    windows = suite.windows()
    documents = read_texts(common.text) if common.text else bundled.novels("heldout")
    prose, hashed = sentences(documents.values()), sha256(list(documents.values()))
    places = [(w, round(i / max(1, depths - 1), 4)) for w in windows for i in range(depths)]
    cells = itertools.chain(
        *suite.measure(
            lambda lm, kept: _cells(lm, kept, prose, places, needles, common.seed),
            {"texts": hashed, "needles": needles, "seed": common.seed},
            n_ctx=max(windows),
        )
    )
    report = NeedleReport(suite.names, list(documents), list(cells), suite.record(text_sha256=hashed))
    if common.plot:
        plot_needle(report, common.plot)
    return report


def _cells(
    lm: LanguageModel, kept: Kept, prose: Sequence[str], places: Sequence[tuple[int, float]], needles: int, seed: int
) -> list[NeedleCell]:
    """Ask an open model for the needles at each place, a window and a depth."""
    windows = [window for window, _ in places]
    for window in sorted({min(windows), max(windows)}):  # what cannot work is said before long work
        fit(lm, needle_item(random.Random(seed), prose, [0.0]), window)

    def find(place: tuple[int, float], advance: Advance) -> int:
        window, depth = place
        rng, found = random.Random(f"{seed} {window} {depth}"), 0
        for _ in range(needles):
            found += ask(lm, needle_item(rng, prose, [depth]), window) == 1
            advance(1, text=f"window {window}")
        return found

    # Deepest first: what two prompts share lies before both needles, and is read once.
    items = {(w, d): {"window": w, "depth": d} for w, d in reversed(places)}
    found = kept.values("needle", "needles", items, find, size=lambda _: needles)
    return [NeedleCell(w, d, found[w, d], needles, lm.name) for w, d in places]


def needle_item(rng: random.Random, prose: Sequence[str], depths: Sequence[float]) -> Item:
    """Hide a needle at each depth, each of another thing, and ask for the first."""
    things = rng.sample(bundled.THINGS, len(depths))
    numbers = list(map(str, rng.sample(range(1_000_000, 10_000_000), len(depths))))
    told = [f"The secret number of the {thing} is" for thing in things]
    facts = [(depth, f"{begin} {number}.") for depth, begin, number in zip(depths, told, numbers, strict=True)]
    question = f"\n\nThe pages end here. What is the secret number of the {things[0]}? {told[0]}"
    return Item(
        task="a needle",
        build=lambda n: INTRODUCTION + " ".join(hide(prose[:n], facts)) + question,
        expected=numbers[:1],
        most=len(prose),
    )
