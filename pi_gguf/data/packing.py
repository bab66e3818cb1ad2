"""Text for fine-tuning: documents -> token rows of one window each, and the positions they are trained at.

In: documents as arrays of tokens. Out: rows that `extend` trains on; a row is a list of the pieces of documents
that it is made of. It knows nothing of the model or of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

Row = list[np.ndarray]
"""The pieces of a row, in order: tokens of a document each. A piece is trained as a sequence of its own."""

Piece = TypeVar("Piece", np.ndarray, range)
"""What is packed: tokens, or the places where they lie."""


def pack(documents: Iterable[Piece], window: int) -> Iterator[list[Piece]]:
    """Pack documents into rows of `window` tokens.

    A document that fits a row is never cut; longer ones fill what the others leave free. When there is nothing to
    fill with, a row ends short. Pieces are views of the documents: no token is copied.

    Args:
        documents: tokens of each document, or their places.
        window: tokens of a full row.
    """
    row: list[Piece] = []
    rest: list[Piece] = []
    for document in documents:
        if len(document) > window:
            rest.append(document)
            full = max(0, _size(rest) // window - 1)  # what stays fills the rows of shorter documents
            for _ in range(full):
                taken, rest = _take(rest, window)
                yield taken
        elif _size(row) + len(document) <= window:
            row.append(document)
        else:
            filler, rest = _take(rest, window - _size(row))
            yield row + filler
            row = [document]
    if row:
        yield row
    while rest:
        taken, rest = _take(rest, window)
        yield taken


def pack_alone(documents: Iterable[Piece], window: int) -> Iterator[list[Piece]]:
    """Cut documents into rows of `window` tokens, each of one document; a row of less than half of it is left out.

    Args:
        documents: tokens of each document, or their places.
        window: tokens of a full row.
    """
    for document in documents:
        for start in range(0, len(document), window):
            piece = document[start : start + window]
            if 2 * len(piece) >= window:
                yield [piece]


def _size(row: list[Piece]) -> int:
    return sum(map(len, row))


def _take(pieces: list[Piece], n: int) -> tuple[list[Piece], list[Piece]]:
    """Split pieces after their first `n` tokens."""
    taken: list[Piece] = []
    for i, piece in enumerate(pieces):
        if n < len(piece):
            if n:
                taken.append(piece[:n])
            rest = pieces[i:]
            rest[0] = piece[n:]
            return taken, rest
        taken.append(piece)
        n -= len(piece)
    return taken, []


def pose_positions(window: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the positions of one sequence under PoSE: two chunks, the second moved on by a random skip.

    Over many draws every distance up to `context` occurs. The skip is the larger of two draws: by one alone the largest
    sixteenth of the distances, where a window ends, would be seen in one sequence of thirty (docs/log.md). A sequence
    as long as the context gets 0, 1, 2, ...

    Args:
        window: tokens in the sequence.
        context: the window to train for, in tokens; at least `window`.
        rng: source of randomness.

    Returns:
        int64 array of `window` strictly rising positions in [0, context).

    Source: arXiv 2309.10400, section 3.2, with two chunks, whose skip is one draw.
    """
    positions = np.arange(window)
    split = int(rng.integers(1, window)) if window > 1 else 0
    positions[split:] += int(rng.integers(0, context - window + 1, size=2).max())
    return positions


def describe_lengths(lengths: Iterable[int], window: int) -> str:
    """Return how many documents and tokens there are at each length, in powers of two up to the window.

    Example:
        <=512: 3 documents, 1,201 tokens; <=1024: 1 document, 800 tokens
    """
    classes: dict[int, list[int]] = {}
    for length in lengths:
        power = 1 << max(0, int(length) - 1).bit_length()
        classes.setdefault(min(power, window) if length <= window else window + 1, []).append(int(length))
    return "; ".join(
        f"{f'<={bound}' if bound <= window else f'>{window}'}: {len(found):,} document{'s' if len(found) > 1 else ''}, "
        f"{sum(found):,} tokens"
        for bound, found in sorted(classes.items())
    )
