"""Rows without end: tokenized documents, of one source or of several by their shares, packed in a new order each turn.

In: corpora, or none for the bundled model's own mixture. Out: rows of a length that is asked for. It knows nothing of
the steps that read them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.progress import say
from pi_gguf.data.packing import Row, describe_lengths, pack, pack_alone
from pi_gguf.data.tokens import TOKEN, Corpus
from pi_gguf.errors import TextError

MASKED_TOKENS = 8192
"""Rows of isolated documents are no longer than this: their mask has T x T elements, 64 MiB here and 1 GiB at 32768,
and keeps flash attention from being used. In a longer window a row is one document, which needs no mask."""


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Args:
        checkpoint: whose tokenizer makes tokens of the bundled mixture.
        corpora: tokenized documents, each of which gets its share of the tokens by its weight; none for the bundled
            model's own mixture.
        seed: of the order.
        packing: `isolate`, where rows above `MASKED_TOKENS` hold one document each, or `join`.
        longest_first: pack documents in order of falling length, and take the first rows only.
        no_mask: no row may hold documents that a mask must keep apart.
        recall: share of the tokens that are recall tasks, beside the corpora.
    """

    checkpoint: Checkpoint
    corpora: Sequence[Corpus]
    seed: int
    packing: str = "join"
    longest_first: bool = False
    no_mask: bool = False
    recall: float = 0.0

    def rows(self, stage: int, window: int, need: int) -> Iterator[Row]:
        """Yield rows without end, in each of which something is predicted.

        Args:
            stage: whose order it is.
            window: tokens of a full row.
            need: rows that will be taken; so many are the first ones with `longest_first`.

        Raises:
            TextError: no row can be made of a source.
        """
        alone = self.packing == "isolate" and (self.no_mask or window > MASKED_TOKENS)
        pack_rows, seed = pack_alone if alone else pack, self.seed + 1 + 1000 * stage
        if not self.corpora:
            found = pack_rows(_mixture(self.checkpoint, seed, window), window)
        else:
            shares = [share * (1 - self.recall) for share in shares_of(self.corpora)]
            first = [math.ceil(share * need) if self.longest_first else None for share in shares]
            each = [_turns(*some, alone, window, self.seed, stage) for some in zip(self.corpora, first, strict=True)]
            if self.recall:
                each.append(pack_rows(_recall_tasks(self.checkpoint, seed, window), window))
                shares.append(self.recall)
            found = each[0] if len(each) == 1 else _by_shares(each, shares)
        for row in found:
            pieces = _joined(row) if self.packing == "join" else row
            if any(len(piece) > 1 for piece in pieces):  # otherwise nothing in it is predicted
                yield pieces


def _mixture(checkpoint: Checkpoint, seed: int, window: int) -> Iterator[np.ndarray]:
    """Yield documents of the bundled model's training mixture as `TOKEN`."""
    return _with_answers(checkpoint, bundled.training_mixture(seed, window), window)


def _recall_tasks(checkpoint: Checkpoint, seed: int, window: int) -> Iterator[np.ndarray]:
    """Yield recall tasks of the sample as `TOKEN`, as long as the window by the model's own tokenizer."""
    novel = max(bundled.novels("train").values(), key=len)[:20000]
    tokens = len(checkpoint.load_tokenizer()(novel, verbose=False)["input_ids"])
    texts = bundled.training_mixture(seed, window, recall_share=1, characters_per_token=0.9 * len(novel) / tokens)
    return _with_answers(checkpoint, texts, window)


def _with_answers(checkpoint: Checkpoint, documents: Iterable[str], window: int) -> Iterator[np.ndarray]:
    """Yield documents as `TOKEN`, the answers of recall tasks weighed by the window."""
    tokenizer: Any = checkpoint.load_tokenizer()
    end = [] if tokenizer.eos_token_id is None else [(tokenizer.eos_token_id, 1.0)]
    weight = max(1.0, window / bundled.TOKENS_PER_WEIGHT)
    for texts in _together(documents):
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


def describe_corpus(corpus: Corpus, window: int, weights: float) -> str:
    """Return what is said of a corpus: how much it holds, and its share of what is drawn.

    Args:
        window: tokens of the longest training sequence.
        weights: of all corpora together.
    """
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
