"""One base, every way to reach a longer window, none of them trained: what scaling alone does.

In: a Hugging Face model. Out: a report, one row a way, with perplexity by window and passkeys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pi_gguf.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.evaluate import evaluate_passkey, evaluate_perplexity
from pi_gguf.files import writes
from pi_gguf.kept import Kept
from pi_gguf.plots import check_plot, plot_perplexity
from pi_gguf.progress import say
from pi_gguf.provenance import library_versions, provenance, sha256
from pi_gguf.results import ComparisonReport, ComparisonRow, PerplexityRow
from pi_gguf.targets import doublings
from pi_gguf.texts import read_texts

SUPERHOT_FACTOR = 4
"""Positions times 0.25, whatever the window: kaiokendev's SuperHOT."""


@writes("keep", "plot")
def compare(
    model: str,
    *,
    context: int = 32768,
    text: Sequence[str] = (),
    samples: int = 2,
    distances: int = 4,
    keys: int = 2,
    keep: str | None = None,
    plot: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> ComparisonReport:
    """Compare ways to reach a longer window without training.

    No scaling, Position Interpolation, SuperHOT's positions times 0.25, NTK-aware, YaRN and NoPE: perplexity and
    passkeys at the model's own window and at each doubling up to the new one. Ways that were trained are compared by
    benchmarks/methods.py.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny, as it is before it is extended.
        context: new window, in tokens, e.g. 32768.
        text: text file or folder of them; the held-out novels of the bundled sample when left out. Repeatable.
        samples: stretches to score in each document.
        distances: places of the passkey in each window.
        keys: passkeys tried at each place.
        keep: file that keeps each finished way, in JSON lines; the same command goes on from it.
        plot: file to draw perplexity by window to, e.g. compare.png.
        overwrite: replace the plot that is there.
        seed: of the keys drawn.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval compare bundled:tiny --context 8192 --plot compare.png
    """
    checkpoint = load_checkpoint(model)
    original = checkpoint.rope.max_position_embeddings
    if context <= original:
        raise OptionError(f"context must be above the window of {original} tokens, got {context}")
    check_plot(plot, overwrite)
    kept = Kept(keep)
    windows = doublings(original, context)
    settings = {
        "model": model, "weights": checkpoint.fingerprint(), "windows": windows, "samples": samples, "seed": seed,
        "texts": sha256(list(read_texts(text).values())) if text else "bundled", "distances": distances, "keys": keys,
        "device": device, "versions": library_versions(),
    }  # fmt: skip
    ways = [
        ("no scaling", "none", context),
        ("Position Interpolation", "linear", context),
        ("SuperHOT, positions times 0.25", "linear", SUPERHOT_FACTOR * original),
        ("NTK, fixed base", "ntk", context),
        ("YaRN", "yarn", context),
        ("NoPE", "nope", context),
    ]
    rows = []
    for name, method, scaled_to in ways:
        item = {**settings, "method": method, "context": scaled_to}
        if (found := kept.get(item)) is None:
            say(name)
            options: dict[str, Any] = {"context": scaled_to, "method": method, "seed": seed, "device": device}
            stride = min(256, original - 1)
            perplexity = evaluate_perplexity(
                model, text=text, windows=windows, stride=stride, samples=samples, **options
            )
            passkey = evaluate_passkey(model, windows=windows, distances=distances, keys=keys, **options)
            found = {
                "perplexity": [asdict(row) for row in perplexity.rows],
                "k_max": passkey.k_max[checkpoint.source],
                "found": sum(cell.found for cell in passkey.cells),
                "asked": sum(cell.keys for cell in passkey.cells),
            }
            kept.put(item, found)
        by_window = [PerplexityRow(**row) for row in found["perplexity"]]
        share = found["found"] / found["asked"]
        rows.append(ComparisonRow(name, method, scaled_to, by_window, found["k_max"], share, found["asked"]))
    if plot:
        plot_perplexity({row.name: row.perplexity for row in rows}, plot, original=original)
    return ComparisonReport(checkpoint.source, context, rows, provenance(seed=seed, device=device))
