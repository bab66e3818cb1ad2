"""Text for fine-tuning: documents -> token rows of one window each, and the positions they are trained at.

In: documents as token ids. Out: rows that `extend` trains on. It knows nothing of the model or of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

Token = TypeVar("Token")


def pack(documents: Iterable[list[Token]], window: int) -> Iterator[list[Token]]:
    """Pack documents into rows of `window` tokens.

    A document that fits a row is never cut; longer ones fill what the others leave free. When there is nothing to
    fill with, a row ends short.

    Args:
        documents: tokens of each document.
        window: tokens of a full row.
    """
    row: list[Token] = []
    rest: list[Token] = []
    for document in documents:
        if len(document) > window:
            rest += document
            full = max(0, len(rest) // window - 1)  # what stays fills the rows of shorter documents
            for start in range(0, full * window, window):
                yield rest[start : start + window]
            rest = rest[full * window :]
        elif len(row) + len(document) <= window:
            row = row + document
        else:
            free = window - len(row)
            yield row + rest[:free]
            rest, row = rest[free:], document
    for left in (row, rest):
        for start in range(0, len(left), window):
            yield left[start : start + window]


def pose_positions(window: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the positions of one row under PoSE: two chunks, the second moved on by a random skip.

    Over many draws every distance up to `context` occurs. A row as long as the context gets 0, 1, 2, ...

    Args:
        window: tokens in the row.
        context: the window to train for, in tokens; at least `window`.
        rng: source of randomness.

    Returns:
        int64 array of `window` strictly rising positions in [0, context).

    Source: arXiv 2309.10400, section 3.2, with two chunks.
    """
    positions = np.arange(window)
    split = int(rng.integers(1, window)) if window > 1 else 0
    positions[split:] += int(rng.integers(0, context - window + 1))
    return positions
