"""Perplexity of targets over windows of texts, the paper's table 1.

In: targets and texts. Out: a report, one row a window, ready for a table or JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from pi_gguf import bundled
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.options import PerplexityKeywords, SuiteOptions
from pi_gguf.evaluate.suite import Suite
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.perplexity import measure_documents, position_rows, rows_by_window
from pi_gguf.measure.plots import plot_perplexity
from pi_gguf.measure.results import PerplexityReport
from pi_gguf.models.options import TargetOptions
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


def _heldout() -> dict[str, str]:
    documents = bundled.novels("heldout")
    say(f"no --text: the {len(documents)} held-out novels of the bundled sample are read")
    return documents
