"""Texts as token ids on disk, made once: a run that goes on reads them again, it does not tokenize again.

In: texts and a checkpoint's tokenizer, and its chat template for conversations. Out: documents as views of a mapped
file, and which of their tokens count in the loss.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.hub import TOKENIZER_FILES
from pi_gguf.common.files import remove, replace_when_complete
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.common.provenance import package_version
from pi_gguf.errors import TextError
from pi_gguf.texts import LONGEST, Conversation, Texts
from pi_gguf.vocabulary.chats import ChatEncoder

CACHE_PREFIX = "tokens-"
"""Begins the name of a cache, a folder."""

TOKEN = [("id", "i4"), ("weight", "f4")]
"""What a piece is made of where tokens do not count alike: a token id, and how much predicting it counts in the loss; 0
where it is read only. Other pieces are ids, int32, whose weight is 1."""

_BATCH_CHARACTERS = 1 << 20
_PIECE_CHARACTERS = 1 << 22
_CHARACTERS = 16
"""More than a token has on average in any text."""


class Corpus:
    """Documents as token ids.

    Args:
        ids: of all documents, one after another, int32.
        offsets: where each begins, and the end, int64: one more than there are documents.
        name: what messages call them.
        bits: whether each token counts in the loss, eight to a byte as numpy packs them; None where all do.
        weight: share of the tokens that are drawn from it, beside other texts.
    """

    def __init__(
        self, ids: np.ndarray, offsets: np.ndarray, name: str, bits: np.ndarray | None = None, weight: float = 1.0
    ) -> None:
        self._ids, self._offsets, self.name, self._bits, self.weight = ids, offsets, name, bits, weight

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens(self.place(i))

    def place(self, i: int) -> range:
        """Return where a document's tokens lie."""
        return range(int(self._offsets[i]), int(self._offsets[i + 1]))

    def tokens(self, place: range) -> np.ndarray:
        """Return what lies there: a view of ids, or a copy as `TOKEN` where not all of the texts counts."""
        ids: np.ndarray = self._ids[place.start : place.stop]
        if self._bits is None:
            return ids
        found = np.empty(len(ids), TOKEN)
        found["id"], found["weight"] = ids, self._counted(place)
        return found

    @property
    def counted(self) -> int:
        """Tokens that count in the loss."""
        return int(self._offsets[-1] if self._bits is None else np.bitwise_count(self._bits).sum())

    def teaches(self, places: Iterable[range]) -> bool:
        """Tell whether a token counts that is not the first of its place."""
        return self._bits is None or any(self._counted(place)[1:].any() for place in places)

    def _counted(self, place: range) -> np.ndarray:
        assert self._bits is not None
        first = place.start // 8
        bits: np.ndarray = np.unpackbits(self._bits[first : -(-place.stop // 8)])
        return bits[place.start - 8 * first :][: len(place)]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        found: np.ndarray = self._offsets[1:] - self._offsets[:-1]
        return found


def encoder(checkpoint: Checkpoint) -> Callable[..., list[list[int]]]:
    """Return what turns texts into token ids, each with the end token behind it where the tokenizer has one.

    What is returned takes a list of texts, and whether each begins a document, and ends one.
    """
    tokenizer: Any = checkpoint.load_tokenizer()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(texts: list[str], *, begins: bool = True, ends: bool = True) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=begins, verbose=False)["input_ids"]
        return [ids + end for ids in encoded] if ends else list(encoded)

    return encode


def _encoded(encode: Callable[..., list[list[int]]], batch: list[str]) -> Iterator[Iterable[list[int]]]:
    """Yield the token ids of each text; of a long one, which is a batch's last, piece by piece."""
    long = len(batch[-1]) > _PIECE_CHARACTERS
    for ids in encode(batch[:-1] if long else batch) if not long or batch[1:] else ():
        yield [ids]
    if long:
        pieces = list(_pieces(batch[-1]))
        last = len(pieces) - 1
        yield (encode([piece], begins=i == 0, ends=i == last)[0] for i, piece in enumerate(pieces))


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where a line or a word begins."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        found = (text.rfind(blank, start + 1, limit) for blank in "\n ")
        cut = next((at for at in found if at > start), limit)
        yield text[start:cut]
        start = cut
    yield text[start:]


def load_corpus(checkpoint: Checkpoint, texts: Texts, folder: Path, tokens: int = 0, loss: str = "assistant") -> Corpus:
    """Return texts as tokens, from the cache in `folder`; it is made where it is missing or torn.

    The cache is of these texts, this tokenizer and, where there are conversations, this chat template and loss: its
    name is a hash of all. Of a document that alone has more than a run reads, the rest is left out.

    Args:
        tokens: that a run reads.
        loss: what counts of a conversation, `assistant` or `all`.

    Raises:
        TextError: a text cannot be read, or there is none.
        CheckpointError: there are conversations, and no chat template.
        ResourceError: the disk is full.
    """
    characters = 1 << (max(LONGEST, _CHARACTERS * tokens) - 1).bit_length()
    chats = ChatEncoder(checkpoint, loss) if texts.chats else None
    parts = [texts.sha256, _tokenizer_sha256(checkpoint), str(characters), *([chats.sha256] if chats else [])]
    path = folder / f"{CACHE_PREFIX}{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"
    partly = chats is not None and loss == "assistant"
    corpus = _open(path, texts, partly)
    if corpus is None:
        remove(path)
        with replace_when_complete(path) as partial:
            partial.mkdir()
            _write(texts, partial, _Documents(encoder(checkpoint), chats, characters), partly)
        corpus = _open(path, texts, partly)
        assert corpus is not None
    return corpus


def _tokenizer_sha256(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(package_version("tokenizers").encode())
    for name in TOKENIZER_FILES:
        if (checkpoint.tokenizer_dir / name).exists():
            digest.update(f"\0{name}\0".encode() + (checkpoint.tokenizer_dir / name).read_bytes())
    return digest.hexdigest()


def _open(path: Path, texts: Texts, partly: bool) -> Corpus | None:
    """Return the cache, or None where it is missing or its parts do not fit each other.

    Args:
        partly: not all of its tokens count.
    """
    try:
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
        size = (path / "ids.bin").stat().st_size
        bits = np.asarray(np.memmap(path / "counted.bin", np.uint8, mode="r")) if partly else None
    except (OSError, ValueError, EOFError):
        return None
    sound = offsets.ndim == 1 and len(offsets) > 1 and offsets[0] == 0 and bool((np.diff(offsets) > 0).all())
    if not sound or size != 4 * int(offsets[-1]) or (bits is not None and len(bits) != -(-int(offsets[-1]) // 8)):
        return None
    weight = 1.0 if texts.weight is None else texts.weight
    return Corpus(np.asarray(np.memmap(path / "ids.bin", np.int32, mode="r")), offsets, texts.name, bits, weight)


@dataclass(frozen=True)
class _Documents:
    """What turns documents into pieces: token ids, and whether each counts.

    Args:
        encode: of texts.
        chats: of conversations; None where there are none.
        characters: of a conversation's text, so many are taken at most.
    """

    encode: Callable[..., list[list[int]]]
    chats: ChatEncoder | None
    characters: int

    def pieces(self, batch: list[str] | list[Conversation]) -> Iterator[Iterable[tuple[np.ndarray, np.ndarray]]]:
        """Yield the pieces of each document of a batch."""
        rows = [document for document in batch if isinstance(document, Conversation)]
        if rows:
            assert self.chats is not None
            yield from ([whole] for whole in self.chats.encode(rows, self.characters))
            return
        for document in _encoded(self.encode, [text for text in batch if isinstance(text, str)]):
            yield ((np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in document)


class _Bits:
    """Writes whether tokens count, eight to a byte."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, np.zeros(0, bool)

    def add(self, counted: np.ndarray, *, last: bool = False) -> None:
        bits = np.concatenate([self._left, counted])
        whole = len(bits) if last else len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole]).tobytes())
        self._left = bits[whole:]


def _write(texts: Texts, folder: Path, documents: _Documents, partly: bool) -> None:
    offsets, without = [0], 0
    with (
        progress_bar("tokenize", texts.count, "documents") as advance,
        (folder / "ids.bin").open("wb") as file,
        (folder / "counted.bin").open("wb") as mask,
    ):
        bits = _Bits(mask)
        for batch in _batches(texts.read(documents.characters)):
            for document in documents.pieces(batch):
                length = 0
                for ids, counted in document:
                    if partly and not counted[1:].any() and isinstance(batch[0], Conversation):
                        without += 1
                        continue
                    file.write(ids.tobytes())
                    bits.add(counted)
                    length += len(ids)
                if length:
                    offsets.append(offsets[-1] + length)
            advance(len(batch), text=f"{offsets[-1] / 1e6:.1f} M tokens")
        bits.add(np.zeros(0, bool), last=True)
        for one in (file, mask):
            one.flush()
            os.fsync(one.fileno())
    if not partly:
        (folder / "counted.bin").unlink()
    if documents.chats:
        documents.chats.tell(texts.name)
    if without:
        say(f"{texts.name}: {without:,} conversations without an answer that counts are left out")
    if len(offsets) == 1:
        raise TextError(f"{texts.name}: there is no {'answer' if without else 'text'} in it")
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))


def _batches(documents: Iterator[str | Conversation]) -> Iterator[list[Any]]:
    """Gather documents of one kind until there is enough work for the tokenizer's threads."""
    batch: list[str | Conversation] = []
    size = 0
    for document in documents:
        if batch and type(document) is not type(batch[0]):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += document.size if isinstance(document, Conversation) else len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
