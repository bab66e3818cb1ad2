"""Texts as token ids on disk, made once: a run that goes on reads them again, it does not tokenize again.

In: texts and a checkpoint's tokenizer. Out: documents as views of a mapped file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.hub import TOKENIZER_FILES
from pi_gguf.common.files import remove, replace_when_complete
from pi_gguf.common.progress import progress_bar
from pi_gguf.common.provenance import package_version
from pi_gguf.errors import TextError
from pi_gguf.texts import LONGEST, Texts

CACHE_PREFIX = "tokens-"
"""Begins the name of a cache, a folder."""

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
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, name: str) -> None:
        self._ids, self._offsets, self.name = ids, offsets, name

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        document: np.ndarray = self._ids[self._offsets[i] : self._offsets[i + 1]]
        return document

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


def load_corpus(checkpoint: Checkpoint, texts: Texts, folder: Path, tokens: int = 0) -> Corpus:
    """Return texts as tokens, from the cache in `folder`; it is made where it is missing or torn.

    The cache is of these texts and this tokenizer: its name is a hash of both. Of a document that alone has more than a
    run reads, the rest is left out.

    Args:
        tokens: that a run reads.

    Raises:
        TextError: a text cannot be read, or there is none.
        ResourceError: the disk is full.
    """
    characters = 1 << (max(LONGEST, _CHARACTERS * tokens) - 1).bit_length()
    key = hashlib.sha256(f"{texts.sha256} {_tokenizer_sha256(checkpoint)} {characters}".encode()).hexdigest()
    path = folder / f"{CACHE_PREFIX}{key[:16]}"
    corpus = _open(path, texts.name)
    if corpus is None:
        remove(path)
        with replace_when_complete(path) as partial:
            partial.mkdir()
            _write(checkpoint, texts, partial, characters)
        corpus = _open(path, texts.name)
        assert corpus is not None
    return corpus


def _tokenizer_sha256(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(package_version("tokenizers").encode())
    for name in TOKENIZER_FILES:
        if (checkpoint.tokenizer_dir / name).exists():
            digest.update(f"\0{name}\0".encode() + (checkpoint.tokenizer_dir / name).read_bytes())
    return digest.hexdigest()


def _open(path: Path, name: str) -> Corpus | None:
    """Return the cache, or None where it is missing or its parts do not fit each other."""
    try:
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
        size = (path / "ids.bin").stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    sound = offsets.ndim == 1 and len(offsets) > 1 and offsets[0] == 0 and bool((np.diff(offsets) > 0).all())
    if not sound or size != 4 * int(offsets[-1]):
        return None
    return Corpus(np.asarray(np.memmap(path / "ids.bin", np.int32, mode="r")), offsets, name)


def _write(checkpoint: Checkpoint, texts: Texts, folder: Path, characters: int) -> None:
    encode, offsets = encoder(checkpoint), [0]
    with progress_bar("tokenize", texts.count, "documents") as advance, (folder / "ids.bin").open("wb") as file:
        for batch in _batches(texts.read(characters)):
            for document in _encoded(encode, batch):
                length = 0
                for ids in document:
                    file.write(np.array(ids, np.int32).tobytes())
                    length += len(ids)
                if length:
                    offsets.append(offsets[-1] + length)
            advance(len(batch), text=f"{offsets[-1] / 1e6:.1f} M tokens")
        file.flush()
        os.fsync(file.fileno())
    if len(offsets) == 1:
        raise TextError(f"{texts.name}: there is no text in it")
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Gather documents until there is enough work for the tokenizer's threads."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
