"""What a fine-tune reads: tokenized documents -> micro-batches of rows, their positions, and tensors padded alike.

In: documents and a training plan. Out: a data set whose item is one micro-batch. B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.data.packing import Row, pose_positions
from pi_gguf.data.rows import RowSource, check_lengths, describe_corpus, takes_block_mask
from pi_gguf.data.tokens import Corpus
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.tune.plan import TrainingPlan

if TYPE_CHECKING:
    import torch

_FULL = 500
"""Added to a seed's stage for the sequences of the whole window that are mixed in: their order is another."""


def training_batches(
    checkpoint: Checkpoint,
    training: TrainingPlan,
    corpus: Corpus | Sequence[Corpus] | None,
    seed: int,
    *,
    packing: str = "join",
    longest_first: bool = False,
    recall: float = 0.0,
) -> list[list[Row]]:
    """Pack enough text for the run.

    Args:
        corpus: tokenized documents, or several such, each of which gets its share of the tokens by its weight; None
            for the bundled model's own mixture.
        seed: of the order.
        packing: `isolate` or `join`, as `RowSource` has it.
        longest_first: pack documents in order of falling length, and train on the first rows only, as many as the run
            has room for.
        recall: share of the tokens that are recall tasks, beside the documents.

    Returns:
        Micro-batches in the order they are trained on; each a list of rows of at most the stage's window of ids or of
        `TOKEN`. The texts begin again, in a new order, when they are used up.

    Raises:
        TextError: no document is as long as a training sequence, or no sequence can be made of texts.
    """
    corpora = [corpus] if isinstance(corpus, Corpus) else list(corpus or ())
    if corpora:
        window = max(training.full_window, *(stage.window for stage in training.stages))
        check_lengths(corpora, window)
        for one in corpora:
            say(describe_corpus(one, window, sum(each.weight for each in corpora)))
    no_mask = training.attention_group is not None or not takes_block_mask(checkpoint)
    source = RowSource(checkpoint, corpora, seed, packing, longest_first, no_mask, recall)
    counts = [stage.steps * training.accumulation for stage in training.stages]
    stages = [(i, stage) for i, stage in enumerate(training.stages) for _ in range(counts[i])]
    need: dict[int, int] = {}
    for (_, stage), whole in zip(stages, training.full_length, strict=True):
        need[stage.window] = need.get(stage.window, 0) + (0 if whole else stage.micro_batch)
    full = source.rows(_FULL, training.full_window, training.full_micro_batches * training.full_micro_batch)
    streams: dict[int, Iterator[Row]] = {}  # lengths that come in turn go on with their own rows
    batches: list[list[Row]] = []
    with progress_bar("pack", len(stages), "batches") as advance:
        for (i, stage), whole in zip(stages, training.full_length, strict=True):
            short = streams.setdefault(stage.window, source.rows(i, stage.window, need[stage.window]))
            taken = (full, training.full_micro_batch) if whole else (short, stage.micro_batch)
            batches.append(list(itertools.islice(*taken)))
            advance(1)
    return batches


def batch_positions(i: int, rows: list[Row], rope: RopeScaling, training: TrainingPlan, seed: int) -> list[np.ndarray]:
    """Return the positions of the run's micro-batch `i`, one array a row: int64, float32 while the factor grows.

    Each piece of a row begins at 0 and has a skip of its own. The model keeps its final scaling all along: a smaller
    factor is made by positions that lie further apart.
    """
    rng = np.random.default_rng((seed, i))
    step = i // training.accumulation
    growing = step < training.factor_warmup_steps
    now = rope.grown((step + 1) / training.factor_warmup_steps) if growing else rope

    def positions(piece: np.ndarray) -> np.ndarray:
        drawn = pose_positions(len(piece), now.max_position_embeddings, rng)
        return rope.positions_as_under(now, drawn) if growing else drawn

    return [np.concatenate([positions(piece) for piece in row]) for row in rows]


class BatchDataset:
    """The run as a data set for a Trainer; an item is a whole micro-batch, as its rows grow fewer with the stages.

    Args:
        batches: rows by micro-batch.
        checkpoint: whose scaling is trained.
        training: the plan.
        seed: of the skips.
    """

    def __init__(self, batches: Sequence[list[Row]], checkpoint: Checkpoint, training: TrainingPlan, seed: int) -> None:
        self._batches, self._rope, self._training, self._seed = batches, checkpoint.rope, training, seed

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rows = self._batches[i]
        return padded(rows, batch_positions(i, rows, self._rope, self._training, self._seed))


def padded(rows: Sequence[Row], positions: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return a model's inputs, (B, T) each: ids, labels (-100 where padded or of weight 0), positions, mask; weights of
    the labels where others than 0 and 1 are among them.

    Where a row has several pieces, the first token of each later one is no label, and the mask is boolean,
    (B, 1, T, T), true where a token sees another: those before it in its own piece. transformers takes that one as it
    is. It grows with the square of T, see `data.rows.MASKED_TOKENS`.
    """
    import torch

    shape = (len(rows), max(map(len, positions)))
    ids, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    places, pieces = np.zeros(shape, positions[0].dtype), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    for i, (row, place) in enumerate(zip(rows, positions, strict=True)):
        n, tokens = len(place), np.concatenate(row)
        weighed = tokens.dtype.names is not None
        ids[i, :n], weights[i, :n] = (tokens["id"], tokens["weight"]) if weighed else (tokens, 1.0)
        labels[i, :n], places[i, :n] = np.where(weights[i, :n] > 0, ids[i, :n], -100), place
        pieces[i, :n] = np.repeat(np.arange(len(row)) + 1, [len(piece) for piece in row])
        labels[i, np.cumsum([len(piece) for piece in row[:-1]], dtype=np.int64)] = -100
    # The mask is given even when it is all ones: without one, transformers takes a skip in the positions for the
    # start of another document and lets nothing attend across it.
    mask = (pieces > 0).astype(np.int64)
    if pieces.max() > 1:
        mask = np.tril(pieces[:, None, :, None] == pieces[:, None, None, :])
    batch = {"input_ids": ids, "labels": labels, "position_ids": places, "attention_mask": mask}
    if weights.max() > 1:
        batch["label_weights"] = weights
    return {name: torch.from_numpy(array) for name, array in batch.items()}
