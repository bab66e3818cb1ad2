"""One base, every way to reach a longer window, none of them trained: what scaling alone does.

In: a Hugging Face model. Out: a report, one row a way, with perplexity by window and passkeys.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any, Unpack

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import library_versions, provenance, sha256
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.options import ComparisonKeywords, SuiteOptions
from pi_gguf.evaluate.passkey import evaluate_passkey
from pi_gguf.evaluate.perplexity import evaluate_perplexity
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.plots import check_plot, plot_perplexity
from pi_gguf.measure.results import ComparisonReport, ComparisonRow, PerplexityRow
from pi_gguf.models.options import TargetOptions
from pi_gguf.models.targets import doublings
from pi_gguf.texts import read_texts

SUPERHOT_FACTOR = 4
"""Positions times 0.25, whatever the window: kaiokendev's SuperHOT."""


WAYS = {
    "no scaling": ("none", 0),
    "Position Interpolation": ("linear", 0),
    "SuperHOT, positions times 0.25": ("linear", SUPERHOT_FACTOR),
    "NTK, fixed base": ("ntk", 0),
    "YaRN": ("yarn", 0),
    "NoPE": ("nope", 0),
}
"""Method and factor by name; 0 is the factor of the new window."""


@writes("keep", "plot")
@flat(TargetOptions, SuiteOptions)
def compare(
    model: str,
    *,
    context: int = 32768,
    samples: int = 2,
    distances: int = 4,
    keys: int = 2,
    **options: Unpack[ComparisonKeywords],
) -> ComparisonReport:
    """Compare ways to reach a longer window without training.

    No scaling, Position Interpolation, SuperHOT's positions times 0.25, NTK-aware, YaRN and NoPE: perplexity and
    passkeys at the model's own window and at each doubling up to the new one. Ways that were trained are compared by
    benchmarks/methods.py.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny, as it is before it is extended.
        context: new window, in tokens, e.g. 32768.
        samples: stretches to score in each document.
        distances: places of the passkey in each window.
        keys: passkeys tried at each place.

    Example:
        pi-gguf eval compare bundled:tiny --context 8192 --plot compare.png
    """
    device, common = take(TargetOptions, options).device, take(SuiteOptions, options)
    checkpoint = load_checkpoint(model)
    original = checkpoint.rope.max_position_embeddings
    if context <= original:
        raise OptionError(f"context must be above the window of {original} tokens, got {context}")
    check_plot(common.plot, common.overwrite)
    windows, text = doublings(original, context), common.text
    kept = Kept(common.keep).under({
        "model": model, "weights": checkpoint.fingerprint(), "windows": windows, "samples": samples,
        "seed": common.seed, "texts": sha256(list(read_texts(text).values())) if text else "bundled",
        "distances": distances, "keys": keys, "device": device, "versions": library_versions(),
    })  # fmt: skip

    def measure(name: str, method: str, scaled_to: int) -> dict[str, Any]:
        say(name)
        how: dict[str, Any] = {"windows": windows, "context": scaled_to, "method": method, "device": device}
        perplexity = evaluate_perplexity(model, text=text, stride=min(256, original - 1), samples=samples, **how)
        passkey = evaluate_passkey(model, distances=distances, keys=keys, seed=common.seed, **how)
        return {
            "perplexity": [asdict(row) for row in perplexity.rows],
            "k_max": passkey.k_max[checkpoint.source],
            "found": sum(cell.found for cell in passkey.cells),
            "asked": sum(cell.keys for cell in passkey.cells),
        }

    rows = []
    for name, (method, factor) in WAYS.items():
        scaled_to = factor * original or context
        found = kept.value({"method": method, "context": scaled_to}, partial(measure, name, method, scaled_to))
        by_window = [PerplexityRow(**row) for row in found["perplexity"]]
        share = found["found"] / found["asked"]
        rows.append(ComparisonRow(name, method, scaled_to, by_window, found["k_max"], share, found["asked"]))
    if common.plot:
        plot_perplexity({row.name: row.perplexity for row in rows}, common.plot, original=original)
    return ComparisonReport(checkpoint.source, context, rows, provenance(seed=common.seed, device=device))
