"""The paper's theory on a model's own weights: attention scores as a function of distance, and how far interpolating
between trained distances can go wrong against going beyond them.

In: a Hugging Face model. Out: a report, and figure 2 of the paper as a plot. P pairs of a query and a key, D rotated
dimensions of a head, s a distance in tokens.

Source: arXiv 2306.15595, sections 2.2 and 2.3. A score is a(s) = Re sum_j h_j exp(i s theta_j), h_j = q_j conj(k_j).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import numpy as np

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.provenance import provenance
from pi_gguf.errors import OptionError, UnsupportedError
from pi_gguf.evaluate.options import BoundsKeywords, SuiteOptions
from pi_gguf.evaluate.suite import check_counts
from pi_gguf.measure.plots import check_plot, plot_bounds
from pi_gguf.measure.results import BoundsReport

_TOKENS = 1024
"""Of a held-out novel, whose queries and keys are taken."""


@writes("plot")
@flat(SuiteOptions)
def evaluate_bounds(
    model: str, *, context: int = 32768, pairs: int = 256, **options: Unpack[BoundsKeywords]
) -> BoundsReport:
    """Follow the attention scores of a model's own queries and keys beyond its window, and between its positions.

    It runs on the CPU. The plot is figure 2 of the paper.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny, as it is before it is extended.
        context: how far to follow them, in tokens; above the model's window.
        pairs: of a query and a key, drawn over layers, heads and positions of a text.

    Example:
        pi-gguf eval bounds bundled:tiny --plot bounds.png
    """
    common = take(SuiteOptions, options)
    check_plot(common.plot, common.overwrite)
    checkpoint = load_checkpoint(model)
    rope = checkpoint.rope
    window = rope.max_position_embeddings
    if rope.is_extended or rope.own is not None or rope.rope_type != "default":
        raise UnsupportedError(f"{model}: bounds is for a model before it is extended", "give the base")
    if context <= window:
        raise OptionError(f"context must be above the window of {window} tokens, got {context}")
    check_counts({"pairs": pairs})
    h, dim = _draw_products(checkpoint, pairs, common.seed)  # (P, D / 2)
    theta = rope.rope_theta ** (-2 * np.arange(dim // 2) / dim)
    bound = dim / (32 * math.log(rope.rope_theta))
    ratio = 2 * _partial_sums(np.arange(context), theta) / bound
    report = BoundsReport(
        model=checkpoint.source,
        rope_theta=rope.rope_theta,
        rotary_dim=dim,
        window=window,
        context=context,
        pairs=pairs,
        bound=bound,
        bound_exact=_bound_exact(theta),
        bound_ratio=float(np.median(ratio)),
        bound_ratio_least=float(ratio.min()),
        **_follow(h, theta, window, context),
        provenance=provenance(seed=common.seed, device="cpu"),
    )
    if common.plot:
        plot_bounds(report, common.plot)
    return report


def _bound_exact(theta: np.ndarray) -> float:
    """Return the bound of the error halfway between two positions, by the largest |h|."""
    return float((theta**2).sum()) / 8


def _follow(h: np.ndarray, theta: np.ndarray, window: int, context: int) -> dict[str, Any]:
    """Return what a report says of the pairs' scores inside the window, beyond it and between positions."""
    whole, middle = _scores(h, theta, np.arange(window)), _scores(h, theta, np.arange(window - 1) + 0.5)
    inside, beyond = abs(whole).max(0), abs(_scores(h, theta, np.arange(window, context))).max(0)
    divided = abs(_scores(h, theta, np.arange(context) / (context / window))).max(0)
    error = abs(middle - (whole[1:] + whole[:-1]) / 2).max(0)
    worst = int((beyond / inside).argmax())
    return {
        "extrapolated": float(np.median(beyond / inside)),
        "extrapolated_worst": float((beyond / inside).max()),
        "interpolated": float((divided / inside).max()),
        "error_share": float((error / (_bound_exact(theta) * abs(h).max(1))).max()),
        "figure": _figure(lambda s: _scores(h, theta, s)[:, worst] / inside[worst], window, context),
    }


def _scores(h: np.ndarray, theta: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Return a(s) of each pair, (S, P)."""
    parts = np.array_split(distances, len(distances) // 4096 + 1)
    return np.concatenate([(np.exp(1j * np.outer(part, theta)) @ h.T).real for part in parts])


def _partial_sums(distances: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return sum over k of |A_k+1(s)|, A_k = sum of the first k terms of exp(i s theta_j), for each distance."""
    parts = np.array_split(distances, len(distances) // 4096 + 1)
    return np.concatenate([abs(np.exp(1j * np.outer(part, theta)).cumsum(1)).sum(1) for part in parts])


def _draw_products(checkpoint: Any, pairs: int, seed: int) -> tuple[np.ndarray, int]:
    """Return q_j conj(k_j) of random queries and keys of the model on a text, complex (P, D / 2), and D.

    Raises:
        UnsupportedError: the model rotates in another way than by pairs of its own queries and keys.
    """
    import torch

    model: Any = checkpoint.load_model(dtype=torch.float32)
    tokenizer: Any = checkpoint.load_tokenizer()
    text = next(iter(bundled.novels("heldout").values()))[: 16 * _TOKENS]
    ids = tokenizer(text, verbose=False)["input_ids"][: min(_TOKENS, checkpoint.rope.max_position_embeddings)]
    with _recorded(model, checkpoint.source) as calls, torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(pairs):
        rotated = slice(checkpoint.rotary_dim)  # of a head; some families pass the rest through
        query, key, rotated_query, rotated_key = (x[..., rotated].double() for x in calls[rng.integers(len(calls))])
        head = int(rng.integers(query.shape[1]))
        at_key = head * key.shape[1] // query.shape[1]
        n, m = sorted(rng.integers(0, len(ids), size=2).tolist())
        q, k = query[0, head, m].numpy(), key[0, at_key, n].numpy()
        half = len(q) // 2
        products = [
            (q[:half] + 1j * q[half:]) * (k[:half] - 1j * k[half:]),
            (q[::2] + 1j * q[1::2]) * (k[::2] - 1j * k[1::2]),
        ]
        theta = checkpoint.rope.rope_theta ** (-np.arange(half) / half)
        score = float(rotated_query[0, head, m] @ rotated_key[0, at_key, n])
        ours = [float((h * np.exp(1j * (m - n) * theta)).sum().real) for h in products]
        fits = [abs(a - score) <= 1e-3 * max(1.0, float(np.linalg.norm(q) * np.linalg.norm(k))) for a in ours]
        if not any(fits):
            raise UnsupportedError(
                f"{checkpoint.source}: its scores are not those of rotated pairs", "give another model"
            )
        found.append(products[fits.index(True)])
    return np.array(found), 2 * half


@contextmanager
def _recorded(model: Any, name: str) -> Iterator[list[tuple[Any, Any, Any, Any]]]:
    """Keep what the model rotates, (1, heads, T, D) queries and keys before and after, while this is open."""
    module = sys.modules[type(model).__module__]
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedError(
            f"{name}: where this family rotates is not known", "give a Llama, Mistral, Qwen or the like"
        )
    calls: list[tuple[Any, Any, Any, Any]] = []

    def recording(query: Any, key: Any, *more: Any, **options: Any) -> Any:
        result = rotate(query, key, *more, **options)
        calls.append((query, key, *result))
        return result

    module.apply_rotary_pos_emb = recording  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        module.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


def _figure(score: Any, window: int, context: int) -> dict[str, list[list[float]]]:
    """Return curves of one pair, thinned out to what a plot shows."""
    factor = context / window
    beyond = np.unique(
        np.concatenate([np.arange(0, window, max(1, window // 512)), np.linspace(window, context - 1, 2048)])
    )
    neighbours = np.arange(window // 2, window // 2 + 4)
    between = np.arange(neighbours[0] * factor, neighbours[-1] * factor + 1) / factor
    return {
        "beyond": [np.floor(beyond).tolist(), score(np.floor(beyond)).tolist()],
        "trained": [neighbours.tolist(), score(neighbours).tolist()],
        "between": [between.tolist(), score(between).tolist()],
    }
