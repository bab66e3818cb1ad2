"""What a fine-tune reads: tokenized texts -> micro-batches of rows, their positions, and tensors padded alike.

In: documents and a training plan. Out: a data set whose item is one micro-batch. B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pi_gguf import bundled
from pi_gguf.checkpoint import Checkpoint
from pi_gguf.data import pack, pose_positions
from pi_gguf.errors import TextError
from pi_gguf.planning import TrainingPlan
from pi_gguf.progress import progress_bar
from pi_gguf.rope import RopeScaling

if TYPE_CHECKING:
    import numpy as np
    import torch

TOKEN = [("id", "i4"), ("weight", "f4")]
"""What a row is made of: a token id, and how much predicting it counts in the loss (1 but for answers)."""


def training_batches(
    checkpoint: Checkpoint, training: TrainingPlan, documents: dict[str, str] | None, seed: int
) -> list[list[np.ndarray]]:
    """Tokenize and pack enough text for the run.

    Args:
        documents: texts by name; None for the bundled model's own mixture.

    Returns:
        Micro-batches in the order they are trained on; each a list of rows of at most the stage's window of `TOKEN`.
        The texts begin again, in a new order, when they are used up.

    Raises:
        TextError: no document is as long as a training sequence.
    """
    import numpy as np

    tokenizer: Any = checkpoint.load_tokenizer()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: str) -> list[tuple[int, float]]:
        return [(i, 1.0) for i in [*tokenizer(text, verbose=False)["input_ids"], *end]]

    def encode_task(text: str, weight: float) -> list[tuple[int, float]]:
        encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
        answers = {at for match in bundled.ANSWER.finditer(text) for at in range(*match.span(1))}
        weights = [weight if start in answers else 1.0 for start, _ in encoded["offset_mapping"]]
        return [*zip(encoded["input_ids"], weights, strict=True), *((i, 1.0) for i in end)]

    tokenized: list[list[tuple[int, float]]] = []
    if documents is not None:
        names = sorted(documents)
        random.Random(seed).shuffle(names)
        with progress_bar("tokenize", len(names), "texts") as advance:
            for name in names:
                tokenized.append(encode(documents[name]))
                advance(1)
        window, longest = max(stage.window for stage in training.stages), max(map(len, tokenized))
        if longest < window:
            raise TextError(
                f"{names[0]}{' and others' if len(names) > 1 else ''}: the longest text has {longest} tokens, fewer "
                f"than the training window of {window}",
                f"give longer texts or --train-window {max(2, longest)}",
            )

    def rows(stage: int, window: int) -> Iterator[list[tuple[int, float]]]:
        if documents is None:
            mixture = bundled.training_mixture(seed + 1 + 1000 * stage, window)
            weight = max(1.0, window / bundled.TOKENS_PER_WEIGHT)
            yield from pack((encode_task(text, weight) for text in mixture), window)
        packed = list(pack(tokenized, window))
        for turn in itertools.count():
            random.Random(f"{seed} {stage} {turn}").shuffle(packed)
            yield from packed

    batches: list[list[np.ndarray]] = []
    streams: dict[int, Iterator[list[tuple[int, float]]]] = {}  # lengths that come in turn go on with their own rows
    with progress_bar("pack", training.steps * training.accumulation, "batches") as advance:
        for i, stage in enumerate(training.stages):
            stream = streams.setdefault(stage.window, rows(i, stage.window))
            for _ in range(stage.steps * training.accumulation):
                batches.append([np.array(row, TOKEN) for row in itertools.islice(stream, stage.micro_batch)])
                advance(1)
    return batches


def batch_positions(
    i: int, rows: list[np.ndarray], rope: RopeScaling, training: TrainingPlan, seed: int
) -> list[np.ndarray]:
    """Return the positions of the run's micro-batch `i`, one array a row: int64, float32 while the factor grows.

    The model keeps its final scaling all along: a smaller factor is made by positions that lie further apart.
    """
    import numpy as np

    rng = np.random.default_rng((seed, i))
    step = i // training.accumulation
    if step >= training.factor_warmup_steps:
        return [pose_positions(len(row), rope.max_position_embeddings, rng) for row in rows]
    now = rope.grown((step + 1) / training.factor_warmup_steps)
    return [rope.positions_as_under(now, pose_positions(len(row), now.max_position_embeddings, rng)) for row in rows]


class BatchDataset:
    """The run as a data set for a Trainer; an item is a whole micro-batch, as its rows grow fewer with the stages.

    Args:
        batches: rows of ids by micro-batch.
        rope: the scaling that is trained.
        training: the plan.
        seed: of the skips.
    """

    def __init__(
        self, batches: Sequence[list[np.ndarray]], rope: RopeScaling, training: TrainingPlan, seed: int
    ) -> None:
        self._batches, self._rope, self._training, self._seed = batches, rope, training, seed

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rows = self._batches[i]
        return padded(rows, batch_positions(i, rows, self._rope, self._training, self._seed))


def padded(rows: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return a model's inputs, (B, T) each: ids, labels (-100 where padded), positions, mask, weights of labels."""
    import numpy as np
    import torch

    shape = (len(rows), max(map(len, rows)))
    ids, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    places, mask = np.zeros(shape, positions[0].dtype), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    for i, (row, place) in enumerate(zip(rows, positions, strict=True)):
        n = len(row)
        ids[i, :n], labels[i, :n], places[i, :n], mask[i, :n] = row["id"], row["id"], place, 1
        weights[i, :n] = row["weight"]
    # The mask is given even when it is all ones: without one, transformers takes a skip in the positions for the
    # start of another document and lets nothing attend across it.
    batch = {"input_ids": ids, "labels": labels, "position_ids": places, "attention_mask": mask, "weights": weights}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
