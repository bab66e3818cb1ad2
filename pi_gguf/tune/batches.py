"""What a fine-tune reads: tokenized documents -> micro-batches of rows, their positions, and tensors padded alike.

In: documents and a training plan. Out: a data set whose item is one micro-batch. B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.errors import TextError
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.tune.packing import Row, describe_lengths, pack, pack_alone, pose_positions
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.tokens import Corpus

if TYPE_CHECKING:
    import torch

MASKED_TOKENS = 8192
"""Rows of isolated documents are no longer than this: their mask has T x T elements, 64 MiB here and 1 GiB at 32768,
and keeps flash attention from being used. In a longer window a row is one document, which needs no mask."""

TOKEN = [("id", "i4"), ("weight", "f4")]
"""What a piece is made of where answers weigh more: a token id, and how much predicting it counts in the loss. Other
pieces are ids, int32, whose weight is 1."""

_FULL = 500
"""Added to a seed's stage for the sequences of the whole window that are mixed in: their order is another."""


def training_batches(
    checkpoint: Checkpoint,
    training: TrainingPlan,
    corpus: Corpus | None,
    seed: int,
    *,
    packing: str = "join",
    longest_first: bool = False,
) -> list[list[Row]]:
    """Pack enough text for the run.

    Args:
        corpus: tokenized documents; None for the bundled model's own mixture.
        seed: of the order.
        packing: `isolate`, where rows above `MASKED_TOKENS` hold one document each, or `join`.
        longest_first: pack documents in order of falling length, and train on the first rows only, as many as the run
            has room for.

    Returns:
        Micro-batches in the order they are trained on; each a list of rows of at most the stage's window of ids or of
        `TOKEN`. The texts begin again, in a new order, when they are used up.

    Raises:
        TextError: no document is as long as a training sequence.
    """
    if corpus is not None:
        window = max(training.full_window, *(stage.window for stage in training.stages))
        check_lengths(corpus, window)
        lengths = corpus.lengths
        say(
            f"data: {len(lengths):,} documents, {lengths.sum():,} tokens; {(lengths >= window).sum():,} are as long as "
            f"the training window of {window}"
        )
    one_each = packing == "isolate" and not takes_block_mask(checkpoint)

    def rows(stage: int, window: int, need: int) -> Iterator[Row]:
        alone = packing == "isolate" and (one_each or window > MASKED_TOKENS)
        pack_rows = pack_alone if alone else pack
        if corpus is None:
            found = pack_rows(_mixture(checkpoint, seed + 1 + 1000 * stage, window), window)
        else:
            found = _turns(corpus, pack_rows, window, seed, stage, need if longest_first else None)
        for row in found:
            pieces = _joined(row) if packing == "join" else row
            if any(len(piece) > 1 for piece in pieces):  # otherwise nothing in it is predicted
                yield pieces

    counts = [stage.steps * training.accumulation for stage in training.stages]
    stages = [(i, stage) for i, stage in enumerate(training.stages) for _ in range(counts[i])]
    need: dict[int, int] = {}
    for (_, stage), whole in zip(stages, training.full_length, strict=True):
        need[stage.window] = need.get(stage.window, 0) + (0 if whole else stage.micro_batch)
    full = rows(_FULL, training.full_window, training.full_micro_batches * training.full_micro_batch)
    streams: dict[int, Iterator[Row]] = {}  # lengths that come in turn go on with their own rows
    batches: list[list[Row]] = []
    with progress_bar("pack", len(stages), "batches") as advance:
        for (i, stage), whole in zip(stages, training.full_length, strict=True):
            short = streams.setdefault(stage.window, rows(i, stage.window, need[stage.window]))
            taken = (full, training.full_micro_batch) if whole else (short, stage.micro_batch)
            batches.append(list(itertools.islice(*taken)))
            advance(1)
    return batches


def _mixture(checkpoint: Checkpoint, seed: int, window: int) -> Iterator[np.ndarray]:
    """Yield documents of the bundled mixture as `TOKEN`, the answers of recall tasks weighed by the window."""
    tokenizer: Any = checkpoint.load_tokenizer()
    end = [] if tokenizer.eos_token_id is None else [(tokenizer.eos_token_id, 1.0)]
    weight = max(1.0, window / bundled.TOKENS_PER_WEIGHT)
    for texts in _together(bundled.training_mixture(seed, window)):
        encoded = tokenizer(texts, verbose=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            answers = [at for match in bundled.ANSWER.finditer(text) for at in range(*match.span(1))]
            document = np.empty(len(ids) + len(end), TOKEN)
            document["id"][: len(ids)] = ids
            document["weight"][: len(ids)] = np.where(np.isin(np.array(offsets)[:, 0], answers), weight, 1.0)
            document[len(ids) :] = end
            yield document


def _together(texts: Iterable[str], characters: int = 2**17) -> Iterator[list[str]]:
    """Yield texts in groups of about so many characters, for the tokenizer's threads."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(map(len, group)) >= characters:
            yield group
            group = []
    if group:
        yield group


def check_lengths(corpus: Corpus, window: int) -> None:
    """Check that a document is as long as the longest training sequence.

    Raises:
        TextError: none is, with how many there are at each length.
    """
    lengths = corpus.lengths
    if (longest := int(lengths.max())) < window:
        raise TextError(
            f"{corpus.name}: the longest document has {longest} tokens, fewer than the training window of {window}; "
            f"{describe_lengths(lengths.tolist(), window)}",
            f"give longer texts or --train-window {max(2, longest)}",
        )


def takes_block_mask(checkpoint: Checkpoint) -> bool:
    """Tell whether the model can be given a mask of (T, T) elements a row in place of its own.

    transformers applies such a mask in every layer as it is: a sliding window would be lost, eager attention (which
    softcapping needs) adds its booleans as numbers, and a router's loss wants the mask of padding.
    """
    config = checkpoint.hf_config
    return (
        all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and getattr(config, "attn_logit_softcapping", None) is None
        and not getattr(config, "output_router_logits", False)
    )


def _turns(
    corpus: Corpus,
    pack_rows: Callable[[Iterable[np.ndarray], int], Iterator[Row]],
    window: int,
    seed: int,
    stage: int,
    first: int | None,
) -> Iterator[Row]:
    """Yield rows without end, all of them turn by turn, each turn in another order.

    Args:
        first: take so many rows only, of the longest documents; None for all.
    """
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    if first is not None:
        lengths = corpus.lengths
        order.sort(key=lambda i: -int(lengths[i]))
    packed = list(itertools.islice(pack_rows((corpus[i] for i in order), window), first))
    if pack_rows is pack_alone and first is None:
        used, tokens = sum(len(row[0]) for row in packed), int(corpus.lengths.sum())
        say(f"a row of {window} tokens holds one document: {used:,} of {tokens:,} tokens fill half of one or more")
    for turn in itertools.count():
        random.Random(f"{seed} {stage} {turn}").shuffle(packed)
        yield from packed


def _joined(row: Row) -> Row:
    return row if len(row) == 1 else [np.concatenate(row)]


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
    """Return a model's inputs, (B, T) each: ids, labels (-100 where padded), positions, mask; weights of the labels
    where they are not alike.

    Where a row has several pieces, the first token of each later one is no label, and the mask is boolean,
    (B, 1, T, T), true where a token sees another: those before it in its own piece. transformers takes that one as it
    is. It grows with the square of T, see `MASKED_TOKENS`.
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
        labels[i, :n], places[i, :n] = ids[i, :n], place
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
