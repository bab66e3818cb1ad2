"""What a quantization or a quantized KV cache costs at depth: KL divergence from a reference, by position.

In: a GGUF file or a Hugging Face model, a reference, and texts. Out: a report, one row a range of positions. Both read
the same tokens side by side, a chunk at a time, so that [tokens, vocabulary] never exists as a whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np

from pi_gguf import bundled
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import progress_bar
from pi_gguf.common.provenance import provenance, sha256
from pi_gguf.errors import OptionError, TextError
from pi_gguf.evaluate.options import DivergenceKeywords, SuiteOptions
from pi_gguf.evaluate.suite import check_counts
from pi_gguf.measure.kl import in_step, kl_divergence, position_ranges
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.plots import check_plot, plot_divergence
from pi_gguf.measure.results import DivergenceReport, DivergenceRow
from pi_gguf.models.options import TargetOptions
from pi_gguf.models.targets import check_targets, opened
from pi_gguf.texts import read_texts


@writes("plot")
@flat(TargetOptions, SuiteOptions)
def evaluate_kl(
    model: str,
    *,
    against: str,
    window: int | None = None,
    documents: int = 1,
    **options: Unpack[DivergenceKeywords],
) -> DivergenceReport:
    """Measure KL divergence and top-1 agreement with a reference, by position up to a window.

    Cache types are the model's; the reference's are f16.

    Args:
        model: GGUF file, Hugging Face folder, Hub id or bundled:tiny.
        against: the reference: GGUF file, such as the F16 one, Hugging Face folder, Hub id or bundled:tiny.
        window: tokens that are read of each text; the model's own window when left out.
        documents: texts to read, the longest first.

    Example:
        pi-gguf eval kl model-Q4_K_M.gguf --against model-F16.gguf --type-k q8_0 --type-v q8_0
    """
    check_counts({"documents": documents})
    if window is not None and window < 2:
        raise OptionError(f"window must be at least 2 tokens, got {window}")
    target, common = take(TargetOptions, options), take(SuiteOptions, options)
    exact = replace(target, type_k="f16", type_v="f16")
    check_targets((model,), target)
    check_targets((against,), exact)
    check_plot(common.plot, common.overwrite)
    found = read_texts(common.text) if common.text else bundled.novels("heldout")
    texts = dict(sorted(found.items(), key=lambda item: -len(item[1]))[:documents])
    with (
        opened(model, target, n_ctx=window) as lm,
        opened(against, exact, n_ctx=window or lm.window) as reference,
    ):
        rows = _compared(lm, reference, texts, window or lm.window)
    record = provenance(seed=common.seed, device=target.device, text_sha256=sha256([*texts.values()]))
    report = DivergenceReport(lm.name, reference.name, target.type_k, target.type_v, [*texts], rows, record)
    if common.plot:
        plot_divergence(report, common.plot)
    return report


def _compared(lm: LanguageModel, reference: LanguageModel, texts: dict[str, str], window: int) -> list[DivergenceRow]:
    """Read texts with two open models side by side, and return a row a range of positions."""
    divergences, agreements = [], []
    with progress_bar("kl", len(texts) * window, "tokens") as advance:
        for name, body in texts.items():
            ids = _tokenized(lm, reference, name, body, window)
            parts = []
            predictions = (m.logits_chunks(ids[:-1], window - 1) for m in (reference, lm))
            for theirs, ours in in_step(*predictions):
                parts.append(kl_divergence(theirs, ours))
                advance(len(ours))
            divergences.append(np.concatenate([kl for kl, _ in parts]))
            agreements.append(np.concatenate([same for _, same in parts]))
    kl, same = np.array(divergences), np.array(agreements)
    # Column i is the prediction of the token at position i + 1.
    ranges = [(max(0, begin - 1), end - 1, begin, end) for begin, end in position_ranges(window)]
    return [_row(begin, end, kl[:, a:b].ravel(), same[:, a:b].ravel()) for a, b, begin, end in ranges]


def _tokenized(lm: LanguageModel, reference: LanguageModel, name: str, body: str, window: int) -> list[int]:
    """Return the first tokens of a text, which are the same for both models.

    Raises:
        OptionError: they are not.
        TextError: there are fewer.
    """
    ids, other = (m.tokenize(body[: 16 * window])[:window] for m in (lm, reference))
    if len(ids) < window:
        raise TextError(
            f"{name}: {len(ids)} tokens, fewer than the window of {window}", "give longer texts or a smaller --window"
        )
    if other != ids:
        at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), len(other))
        raise OptionError(
            f"{reference.name}: tokenizes {name} differently from {lm.name}, from token {at} on",
            "the reference must be of the same model",
        )
    return ids


def _row(begin: int, end: int, kl: np.ndarray, same: np.ndarray) -> DivergenceRow:
    median, p90, p99 = (float(value) for value in np.percentile(kl, (50, 90, 99)))
    return DivergenceRow(
        begin, end, float(kl.mean()), median, p90, p99, float(kl.max()), float(same.mean()), int(kl.size)
    )
