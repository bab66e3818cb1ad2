"""Quantization by KV cache by depth: what each of them costs, in one table.

In: GGUF files of one model and a reference. Out: a report, one cell a file and cache type, with its KL divergence by
position.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.kl import evaluate_kl
from pi_gguf.evaluate.options import MatrixKeywords, SuiteOptions
from pi_gguf.gguf.file import read_gguf
from pi_gguf.llamacpp.cache import CACHE_TYPES
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.plots import check_plot, plot_matrix
from pi_gguf.measure.results import DivergenceReport, MatrixReport
from pi_gguf.models.options import TargetOptions
from pi_gguf.models.targets import identity
from pi_gguf.texts import read_texts


@writes("keep", "plot")
@flat(TargetOptions, SuiteOptions)
def evaluate_matrix(
    *models: str,
    against: str,
    cache_types: str = "f16,q8_0,q4_0",
    window: int | None = None,
    documents: int = 1,
    **options: Unpack[MatrixKeywords],
) -> MatrixReport:
    """Measure what quantizations and quantized KV caches cost at depth: KL divergence from a reference, by position.

    Args:
        models: GGUF files of one model.
        against: the reference: GGUF file, such as the F16 one, or Hugging Face folder.
        cache_types: of K and V alike, separated by commas: f32, f16, q8_0, q4_0.
        window: tokens that are read of each text; the first file's own window when left out.
        documents: texts to read, the longest first.

    Example:
        pi-gguf eval matrix f16.gguf q8.gguf q4.gguf --against my-llama-32k-hf --keep matrix.jsonl --plot matrix.png
    """
    if not models:
        raise OptionError("matrix needs GGUF files, got none")
    kinds = cache_types.split(",")
    for kind in kinds:
        if kind not in CACHE_TYPES:
            raise OptionError(f"cache-types must be some of {', '.join(CACHE_TYPES)}, got {kind!r}")
    device, common = take(TargetOptions, options).device, take(SuiteOptions, options)
    check_plot(common.plot, common.overwrite)
    kept = Kept(common.keep)
    infos = {model: read_gguf(Path(model)) for model in models}
    window = window or infos[models[0]].rope.max_position_embeddings
    texts = sha256(list(read_texts(common.text).values())) if common.text else "bundled"
    kept = kept.under({"against": against, "window": window, "texts": texts, "documents": documents})

    def measure(model: str, kind: str) -> dict[str, Any]:
        say(f"{model}, {kind} cache")
        report = evaluate_kl(
            model, against=against, window=window, text=common.text, documents=documents, type_k=kind, type_v=kind,
            device=device,
        )  # fmt: skip
        return asdict(report)

    found = [
        kept.value({**identity(model, device=device), "cache": kind}, partial(measure, model, kind))
        for model in infos
        for kind in kinds
    ]
    report = MatrixReport(against, [DivergenceReport.from_json(cell) for cell in found])
    if common.plot:
        plot_matrix(report, common.plot)
    return report
