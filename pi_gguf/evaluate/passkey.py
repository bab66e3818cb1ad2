"""Passkey retrieval by distance, and k_max.

Source: arXiv 2306.15595, section 3.3.
"""

from __future__ import annotations

import itertools
from typing import Any, Unpack

from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.evaluate.options import RetrievalKeywords, SuiteOptions
from pi_gguf.evaluate.suite import Suite, check_counts
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.passkey import k_max, passkey_cells
from pi_gguf.measure.plots import plot_passkeys
from pi_gguf.measure.results import PasskeyReport
from pi_gguf.models.options import ServerOptions


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
