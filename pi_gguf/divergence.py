"""What a quantization or a quantized KV cache costs at depth: KL divergence from a reference, by position.

In: a GGUF file or a Hugging Face model, a reference, and texts. Out: a report, one row a range of positions. Both read
the same tokens side by side, a chunk at a time, so that [tokens, vocabulary] never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pi_gguf import bundled
from pi_gguf.errors import OptionError, TextError
from pi_gguf.files import writes
from pi_gguf.plots import check_plot, plot_divergence
from pi_gguf.progress import progress_bar
from pi_gguf.provenance import provenance, sha256
from pi_gguf.results import DivergenceReport, DivergenceRow
from pi_gguf.scoring import in_step, kl_divergence, position_ranges
from pi_gguf.targets import check_targets, opened
from pi_gguf.texts import read_texts

if TYPE_CHECKING:
    import numpy as np


@writes("plot")
def evaluate_kl(
    model: str,
    *,
    against: str,
    window: int | None = None,
    text: Sequence[str] = (),
    documents: int = 1,
    type_k: str = "f16",
    type_v: str = "f16",
    context: int | None = None,
    method: str = "linear",
    plot: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> DivergenceReport:
    """Measure KL divergence and top-1 agreement with a reference, by position up to a window.

    Args:
        model: GGUF file, Hugging Face folder, Hub id or bundled:tiny.
        against: the reference: GGUF file, such as the F16 one, Hugging Face folder, Hub id or bundled:tiny.
        window: tokens that are read of each text; the model's own window when left out.
        text: text file or folder of them; the held-out novels of the bundled sample when left out. Repeatable.
        documents: texts to read, the longest first.
        type_k: K cache of a GGUF model: f32, f16, q8_0 or q4_0.
        type_v: V cache of a GGUF model; the reference's are f16.
        context: extend Hugging Face models to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        plot: file to draw it by position to, e.g. kl.png.
        overwrite: replace the plot that is there.
        seed: recorded; nothing is random here.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval kl model-Q4_K_M.gguf --against model-F16.gguf --type-k q8_0 --type-v q8_0
    """
    import numpy as np

    if documents < 1:
        raise OptionError(f"documents must be at least 1, got {documents}")
    if window is not None and window < 2:
        raise OptionError(f"window must be at least 2 tokens, got {window}")
    options: dict[str, Any] = {"context": context, "method": method, "device": device}
    check_targets((model,), servers=False, type_k=type_k, type_v=type_v, **options)
    check_targets((against,), servers=False, **options)
    check_plot(plot, overwrite)
    found = read_texts(text) if text else bundled.novels("heldout")
    chosen = sorted(found.items(), key=lambda item: -len(item[1]))[:documents]
    with (
        opened(model, n_ctx=window, type_k=type_k, type_v=type_v, **options) as lm,
        opened(against, n_ctx=window or lm.window, **options) as reference,
    ):
        window = window or lm.window
        divergences, agreements = [], []
        with progress_bar("kl", len(chosen) * window, "tokens") as advance:
            for name, body in chosen:
                ids = lm.tokenize(body[: 16 * window])[:window]
                if len(ids) < window:
                    raise TextError(
                        f"{name}: {len(ids)} tokens, fewer than the window of {window}",
                        "give longer texts or a smaller --window",
                    )
                if (other := reference.tokenize(body[: 16 * window])[:window]) != ids:
                    at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), len(other))
                    raise OptionError(
                        f"{against}: tokenizes {name} differently from {model}, from token {at} on",
                        "the reference must be of the same model",
                    )
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
        rows = [_row(begin, end, kl[:, a:b].ravel(), same[:, a:b].ravel()) for a, b, begin, end in ranges]
        record = provenance(seed=seed, device=device, text_sha256=sha256([body for _, body in chosen]))
        names = [name for name, _ in chosen]
        report = DivergenceReport(lm.name, reference.name, type_k, type_v, names, rows, record)
    if plot:
        plot_divergence(report, plot)
    return report


def _row(begin: int, end: int, kl: np.ndarray, same: np.ndarray) -> DivergenceRow:
    import numpy as np

    median, p90, p99 = (float(value) for value in np.percentile(kl, (50, 90, 99)))
    return DivergenceRow(
        begin, end, float(kl.mean()), median, p90, p99, float(kl.max()), float(same.mean()), int(kl.size)
    )
