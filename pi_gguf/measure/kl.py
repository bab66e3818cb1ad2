"""KL divergence between two models that read the same tokens in step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np


def kl_divergence(reference: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the KL divergence of each token's prediction from the reference's, and whether their first choices agree.

    Args:
        reference: logits (T, V) of the model to agree with.
        logits: logits (T, V); where one has more columns, they are padding and left out.

    Returns:
        float64 (T,) in nats; bool (T,).
    """

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x -= x.max(1, keepdims=True)
        x -= np.log(np.exp(x).sum(1, keepdims=True))
        return x

    width = min(reference.shape[1], logits.shape[1])
    p, q = log_softmax(reference[:, :width]), log_softmax(logits[:, :width])
    return (np.exp(p) * (p - q)).sum(1), reference.argmax(1) == logits.argmax(1)


FIRST_RANGE = 1024
"""Tokens of the first range of positions; each later one is as long as all before it."""


def position_ranges(window: int) -> list[tuple[int, int]]:
    """Return ranges of positions, each as long as all before it, and all of them together at the end.

    Example:
        [(0, 1024), (1024, 2048), (2048, 4096), (0, 4096)] for a window of 4096.
    """
    edges = [0, FIRST_RANGE]
    while edges[-1] < window:
        edges.append(2 * edges[-1])
    edges = [*edges[:-1], window]
    found = list(itertools.pairwise(edges))
    return [*found, (0, window)] if len(found) > 1 else found


def in_step(a: Iterator[np.ndarray], b: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut two streams of chunks alike: pairs of chunks (T, V) of the same tokens."""
    first, second = next(a, None), next(b, None)
    while first is not None and second is not None:
        n = min(len(first), len(second))
        yield first[:n], second[:n]
        first = first[n:] if len(first) > n else next(a, None)
        second = second[n:] if len(second) > n else next(b, None)
