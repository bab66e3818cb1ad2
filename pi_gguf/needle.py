"""A needle in a haystack: one sentence hidden in long prose, and asked for at the end.

In: targets and prose. Out: a report, one cell a window and depth. Prompts are to be continued, not answered, so that
base models can be asked.

Source: the test is Kamradt's of 2023; a number of seven digits by a word is RULER's, arXiv 2404.06654, section 3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pi_gguf import bundled
from pi_gguf.errors import OptionError
from pi_gguf.files import writes
from pi_gguf.haystack import Item, ask, fit, hide, sentences
from pi_gguf.kept import Kept
from pi_gguf.plots import check_plot, plot_needle
from pi_gguf.progress import progress_bar
from pi_gguf.provenance import provenance, sha256
from pi_gguf.results import NeedleCell, NeedleReport
from pi_gguf.scoring import LanguageModel
from pi_gguf.targets import check_targets, choose_windows, identity, opened
from pi_gguf.texts import read_texts

INTRODUCTION = "The pages below tell secret numbers of things. Keep them in mind: one is asked for at the end.\n\n"


@writes("keep", "plot")
def evaluate_needle(
    *models: str | LanguageModel,
    windows: Sequence[int] | None = None,
    depths: int = 10,
    needles: int = 1,
    text: Sequence[str] = (),
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
) -> NeedleReport:
    """Measure retrieval of a needle in a haystack: a sentence hidden in prose, asked for at the end.

    Prose fills each window; the needle lies at evenly spaced depths from its start to its end. It is found when the
    greedy answer has its number.

    Args:
        models: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or URL of an OpenAI-compatible server; several
            make one table.
        windows: lengths of prompt and answer together, in tokens; when left out 2048 and its doublings,
            up to the models' window and 32768.
        depths: places of the needle in each window, from the start to the end; 1 is the start.
        needles: needles tried at each place, one at a time.
        text: text file, folder of them, or of the Hub pg19, proof-pile or owner/name:split, read one after another; the
            held-out novels of the bundled sample when left out. Repeatable.
        context: extend Hugging Face models to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        type_k: K cache of GGUF files: f32, f16, q8_0 or q4_0.
        type_v: V cache of GGUF files.
        tokenizer: MODEL whose tokenizer a server's model has; of URLs only.
        keep: file that keeps each finished place, in JSON lines; the same command goes on from it.
        plot: file to draw the share found, by window and depth, to, e.g. needle.png; of one model.
        overwrite: replace the plot that is there.
        seed: of the needles drawn.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval needle model.gguf --plot needle.png
    """
    options: dict[str, Any] = {
        "context": context, "method": method, "tokenizer": tokenizer, "type_k": type_k, "type_v": type_v,
        "device": device,
    }  # fmt: skip
    check_targets(models, **options)
    for name, value in (("depths", depths), ("needles", needles)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    check_plot(plot, overwrite, of_one=models)
    windows = choose_windows(windows, models, **options)
    documents = read_texts(text) if text else bundled.novels("heldout")
    prose, hashed = sentences(documents.values()), sha256(list(documents.values()))
    places = [round(i / max(1, depths - 1), 4) for i in range(depths)]
    kept = Kept(keep)
    names, cells = [], []
    for model in models:
        settings = {**identity(model, **options), "texts": hashed, "needles": needles, "seed": seed}
        with opened(model, n_ctx=max(windows), **options) as lm:
            for window in sorted({min(windows), max(windows)}):  # what cannot work is said before long work
                fit(lm, needle_item(random.Random(seed), prose, [0.0]), window)
            names.append(lm.name)
            grid = {(w, d): {**settings, "window": w, "depth": d} for w in windows for d in places}
            todo = [place for place, item in grid.items() if kept.get(item) is None]
            with progress_bar("needle", len(todo) * needles, "needles") as advance:
                # Deepest first: what two prompts share lies before both needles, and is read once.
                for window, depth in reversed(todo):
                    rng, found = random.Random(f"{seed} {window} {depth}"), 0
                    for _ in range(needles):
                        found += ask(lm, needle_item(rng, prose, [depth]), window) == 1
                        advance(1, text=f"window {window}")
                    kept.put(grid[window, depth], found)
            cells += [NeedleCell(w, d, kept.get(item), needles, lm.name) for (w, d), item in grid.items()]
    report = NeedleReport(
        names,
        list(documents),
        cells,
        provenance(seed=seed, device=device, type_k=type_k, type_v=type_v, text_sha256=hashed),
    )
    if plot:
        plot_needle(report, plot)
    return report


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
