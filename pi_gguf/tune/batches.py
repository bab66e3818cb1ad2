"""What a fine-tune reads: tokenized documents -> micro-batches of rows, their positions, and tensors padded alike.

In: documents and a training plan. Out: a data set whose item is one micro-batch. B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.errors import TextError
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.tune.packing import Row, describe_lengths, pack, pack_alone, pose_positions
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.tokens import TOKEN, Corpus

if TYPE_CHECKING:
    import torch

MASKED_TOKENS = 8192
"""Rows of isolated documents are no longer than this: their mask has T x T elements, 64 MiB here and 1 GiB at 32768,
and keeps flash attention from being used. In a longer window a row is one document, which needs no mask."""

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
) -> list[list[Row]]:
    """Pack enough text for the run.

    Args:
        corpus: tokenized documents, or several such, each of which gets its share of the tokens by its weight; None
            for the bundled model's own mixture.
        seed: of the order.
        packing: `isolate`, where rows above `MASKED_TOKENS` hold one document each, or `join`.
        longest_first: pack documents in order of falling length, and train on the first rows only, as many as the run
            has room for.

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
            say(_described(one, window, sum(each.weight for each in corpora)))
    one_each = packing == "isolate" and not takes_block_mask(checkpoint)

    def rows(stage: int, window: int, need: int) -> Iterator[Row]:
        alone = packing == "isolate" and (one_each or window > MASKED_TOKENS)
        pack_rows = pack_alone if alone else pack
        if not corpora:
            found = pack_rows(_mixture(checkpoint, seed + 1 + 1000 * stage, window), window)
        else:
            shares = shares_of(corpora)
            first = [math.ceil(share * need) if longest_first else None for share in shares]
            each = [_turns(*some, alone, window, seed, stage) for some in zip(corpora, first, strict=True)]
            found = each[0] if len(each) == 1 else _by_shares(each, shares)
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


def check_lengths(corpora: Sequence[Corpus], window: int) -> None:
    """Check that a document is as long as the longest training sequence.

    Raises:
        TextError: none is, with how many there are at each length.
    """
    lengths = np.concatenate([corpus.lengths for corpus in corpora])
    if (longest := int(lengths.max())) < window:
        raise TextError(
            f"{corpora[0].name}: the longest document has {longest} tokens, fewer than the training window of "
            f"{window}; {describe_lengths(lengths.tolist(), window)}",
            f"give longer texts or --train-window {max(2, longest)}",
        )


def _described(corpus: Corpus, window: int, weights: float) -> str:
    lengths, counted = corpus.lengths, corpus.counted
    counting = f" ({counted:,} of them count)" if counted < lengths.sum() else ""
    share = f"; {corpus.weight / weights:.1%} of what is drawn: {corpus.name}" if weights != corpus.weight else ""
    return (
        f"data: {len(lengths):,} documents, {lengths.sum():,} tokens{counting}; {(lengths >= window).sum():,} are as "
        f"long as the training window of {window}{share}"
    )


def shares_of(corpora: Sequence[Corpus]) -> list[float]:
    """Return the share of the tokens of each, by their weights."""
    whole = sum(corpus.weight for corpus in corpora)
    return [corpus.weight / whole for corpus in corpora]


def _by_shares(streams: Sequence[Iterator[Row]], shares: Sequence[float]) -> Iterator[Row]:
    """Yield rows without end, each from the stream that lags most behind its share of the tokens."""
    drawn = [0.0] * len(streams)
    while True:
        i = min(range(len(streams)), key=lambda i: drawn[i])
        row = next(streams[i])
        drawn[i] += sum(map(len, row)) / shares[i]
        yield row


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


def _turns(corpus: Corpus, first: int | None, alone: bool, window: int, seed: int, stage: int) -> Iterator[Row]:
    """Yield rows without end, all of them turn by turn, each turn in another order.

    Args:
        first: take so many rows only, of the longest documents; None for all.
        alone: a row holds one document.

    Raises:
        TextError: there is no row in which a token counts.
    """
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    lengths = corpus.lengths
    if first is not None:
        order.sort(key=lambda i: -int(lengths[i]))
    places = (corpus.place(i) for i in order)
    packed: list[list[range]] = []
    left_out = 0
    for row in pack_alone(places, window) if alone else pack(places, window):
        if corpus.teaches(row):
            packed.append(row)
        else:
            left_out += 1
        if len(packed) == first:
            break
    if left_out:
        say(f"{corpus.name}: {left_out:,} sequences of {window} tokens hold no answer and are left out")
    if alone and first is None:
        used, tokens = sum(len(row[0]) for row in packed), int(lengths.sum())
        say(f"a row of {window} tokens holds one document: {used:,} of {tokens:,} tokens fill half of one or more")
    if not packed:
        raise TextError(
            f"{corpus.name}: no sequence of {window} tokens can be made of it; "
            f"{describe_lengths(lengths.tolist(), window)}",
            "give a smaller --train-window, longer texts, or --packing join",
        )
    for turn in itertools.count():
        random.Random(f"{seed} {stage} {turn}").shuffle(packed)
        yield from ([corpus.tokens(place) for place in row] for row in packed)


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
    """Return a model's inputs, (B, T) each: ids, labels (-100 where padded or of weight 0), positions, mask; weights of
    the labels where others than 0 and 1 are among them.

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
