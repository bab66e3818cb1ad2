"""The paper's two evaluations at length: sliding-window perplexity and passkey retrieval.

In: targets and texts. Out: a report, one row a window, ready for a table or JSON. The paper's windows are not shared
but for a document's first one, which gives all its tokens in one pass: a later window begins elsewhere, and what a
model makes of a token depends on where its window begins. `by_position` is that first pass alone, exact and cheap.

Source: arXiv 2306.15595, sections 3.2 and 3.3.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Unpack

from pi_gguf import bundled
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
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import OptionError
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.passkey import k_max, passkey_cells
from pi_gguf.measure.perplexity import measure_documents, position_rows, rows_by_window
from pi_gguf.measure.plots import plot_passkeys, plot_perplexity
from pi_gguf.measure.results import PasskeyReport, PerplexityReport
from pi_gguf.suite import Suite, check_counts
from pi_gguf.texts import read_texts


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
        rows += rows_by_window(name, found)
        by_position += position_rows(name, largest, [part["first_pass"] for part in found[largest]])
    record = suite.record(text_sha256=hashed)
    report = PerplexityReport(suite.names, list(documents), stride, samples, rows, by_position, record)
    if common.plot:
        curves = {Path(name).name: [row for row in rows if row.model == name] for name in suite.names}
        plot_perplexity(curves, common.plot)
    return report


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


def _heldout() -> dict[str, str]:
    documents = bundled.novels("heldout")
    say(f"no --text: the {len(documents)} held-out novels of the bundled sample are read")
    return documents
