"""pi-gguf: Position Interpolation for RoPE checkpoints, as quantized GGUF files that work at the new length.

Importing this loads nothing heavy; each name is fetched when it is first used.

Example:
    >>> import pi_gguf
    >>> with pi_gguf.open("tiny-32k.gguf") as model:  # doctest: +SKIP
    ...     print("".join(model.complete("It was")))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi_gguf.evaluate.bounds import evaluate_bounds as evaluate_bounds
    from pi_gguf.evaluate.compare import compare as compare
    from pi_gguf.evaluate.kl import evaluate_kl as evaluate_kl
    from pi_gguf.evaluate.matrix import evaluate_matrix as evaluate_matrix
    from pi_gguf.evaluate.needle import evaluate_needle as evaluate_needle
    from pi_gguf.evaluate.passkey import evaluate_passkey as evaluate_passkey
    from pi_gguf.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
    from pi_gguf.evaluate.report import evaluate_all as evaluate_all
    from pi_gguf.evaluate.ruler import evaluate_ruler as evaluate_ruler
    from pi_gguf.evaluate.short import evaluate_short as evaluate_short
    from pi_gguf.evaluate.summarize import evaluate_summaries as evaluate_summaries
    from pi_gguf.pipeline.convert import convert as convert
    from pi_gguf.pipeline.ollama import export_ollama as export_ollama
    from pi_gguf.pipeline.plan import plan as plan
    from pi_gguf.prove.card import card as card
    from pi_gguf.prove.certify import certify as certify
    from pi_gguf.prove.inspect import inspect as inspect
    from pi_gguf.prove.repair import repair as repair
    from pi_gguf.restore.unpack import unpack as unpack
    from pi_gguf.runtime.model import open_model as open
    from pi_gguf.tune.extend import extend as extend
    from pi_gguf.write.imatrix import compute_imatrix as compute_imatrix
    from pi_gguf.write.quantize import quantize as quantize

_PUBLIC = {
    "card": ("prove.card", "card"),
    "certify": ("prove.certify", "certify"),
    "compare": ("evaluate.compare", "compare"),
    "compute_imatrix": ("write.imatrix", "compute_imatrix"),
    "convert": ("pipeline.convert", "convert"),
    "evaluate_all": ("evaluate.report", "evaluate_all"),
    "evaluate_bounds": ("evaluate.bounds", "evaluate_bounds"),
    "evaluate_kl": ("evaluate.kl", "evaluate_kl"),
    "evaluate_matrix": ("evaluate.matrix", "evaluate_matrix"),
    "evaluate_needle": ("evaluate.needle", "evaluate_needle"),
    "evaluate_passkey": ("evaluate.passkey", "evaluate_passkey"),
    "evaluate_perplexity": ("evaluate.perplexity", "evaluate_perplexity"),
    "evaluate_ruler": ("evaluate.ruler", "evaluate_ruler"),
    "evaluate_short": ("evaluate.short", "evaluate_short"),
    "evaluate_summaries": ("evaluate.summarize", "evaluate_summaries"),
    "export_ollama": ("pipeline.ollama", "export_ollama"),
    "extend": ("tune.extend", "extend"),
    "inspect": ("prove.inspect", "inspect"),
    "open": ("runtime.model", "open_model"),
    "plan": ("pipeline.plan", "plan"),
    "quantize": ("write.quantize", "quantize"),
    "repair": ("prove.repair", "repair"),
    "unpack": ("restore.unpack", "unpack"),
}
__all__ = [
    "card",
    "certify",
    "compare",
    "compute_imatrix",
    "convert",
    "evaluate_all",
    "evaluate_bounds",
    "evaluate_kl",
    "evaluate_matrix",
    "evaluate_needle",
    "evaluate_passkey",
    "evaluate_perplexity",
    "evaluate_ruler",
    "evaluate_short",
    "evaluate_summaries",
    "export_ollama",
    "extend",
    "inspect",
    "open",
    "plan",
    "quantize",
    "repair",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pi_gguf' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(f"pi_gguf.{module}"), attribute)
