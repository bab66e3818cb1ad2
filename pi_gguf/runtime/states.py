"""What a model has read, kept on disk, so that a long document is read once.

In: who read (an identity), token ids, and llama.cpp's state after them. Out: the state that has most ids in common. A
state is one file of its own length and checksum, both verified before llama.cpp sees it: it ends the process at a state
that is cut off, and takes flipped bits without a word. A state is as private as the document it was read from.

A file: 16 bytes of name and version, 16 of checksum of all that follows, 8 of the length of a JSON object, the object,
the ids (int32), zeros up to a multiple of 4096, the state.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from pi_gguf.common.files import (
    check_free_disk,
    disk_errors,
    human_bytes,
    one_writer,
    open_plain,
    remove,
    removed_if_damaged,
    replace_when_complete,
    user_cache,
)
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.errors import OptionError, PiGgufError, ResourceError

LIMIT = 20 * 10**9
"""Bytes that all kept states may take; the least recently used go first."""

WORTH_IT = 256
"""Common tokens below which a kept state is not looked at."""

_MAGIC = b"pi-gguf state 1\n"
_FIXED = len(_MAGIC) + 16 + 8
_PAGE = 4096
_LONGEST_HEAD = 2**20
_BLOCK = 2**22
_SUFFIX = ".state"
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.state")
_SHORTEST_KEY = 4


@dataclass(frozen=True)
class Kept:
    """A state on disk.

    Args:
        path: its file.
        identity: what must be the same for it to be used: model, adapters, cache types, llama.cpp.
        document: name of what was read.
        model: name of the model's file.
        tokens: how many were read.
        state_bytes: what llama.cpp keeps of them.
        nbytes: of the file.
        used: when it was written or used last, seconds since 1970.
        whole: whether it is the document to its end, and not what was read before an interruption.
    """

    path: Path
    identity: str
    document: str
    model: str
    tokens: int
    state_bytes: int
    nbytes: int
    used: float
    whole: bool

    @property
    def key(self) -> str:
        """What `pi-gguf documents` calls it."""
        reader, _, read = self.path.name.partition("-")
        return reader[:4] + read[:8]

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key, "document": self.document, "model": self.model, "tokens": self.tokens,
            "bytes": self.nbytes, "used": self.used, "whole": self.whole,
        }  # fmt: skip


def user_states(given: str | Path | None = None, limit: int = LIMIT) -> States | None:
    """Return the states in a folder, by `PI_GGUF_CACHE`, or in the user's cache; None, and it is said, without one."""
    base = given or os.environ.get("PI_GGUF_CACHE") or user_cache()
    if base:
        return States(Path(base) / "documents", limit)
    say("there is no cache folder, so that nothing that is read is kept: PI_GGUF_CACHE may name one")
    return None


def file_mark(path: Path) -> str:
    """Return what changes where a file is replaced, written to or removed."""
    try:
        status = path.stat()
    except OSError:
        return "gone"
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def file_digest(path: Path, mark: str) -> str:
    """Return the checksum of a file, remembered for its mark; the mark itself where the file was changed since then."""
    if mark != file_mark(path):
        return mark
    base = user_cache()
    memo = base and base / "digests" / xxhash.xxh3_128_hexdigest(mark.encode())
    if memo:
        with contextlib.suppress(OSError, ValueError), open_plain(memo) as file:
            if re.fullmatch(r"[0-9a-f]{32}", known := file.read(33).decode()):
                return known
    digest = xxhash.xxh3_128()
    with path.open("rb") as file, progress_bar(f"checksum {path.name}", path.stat().st_size, "bytes") as advance:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    if memo:
        with contextlib.suppress(OSError, ValueError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            partial = memo.with_name(f"{memo.name}.{os.getpid()}")
            partial.write_text(digest.hexdigest())
            partial.replace(memo)
    return digest.hexdigest()


class States:
    """The states in a folder. Several processes may use one.

    Args:
        folder: where they are kept; made when the first one is.
        limit: bytes that all of them may take.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    @property
    def library(self) -> Path:
        """Where the texts of documents that were given to a server are kept, beside the states."""
        return self.folder.with_name("library")

    def entries(self) -> list[Kept]:
        """Return what is kept, the last used first."""
        return sorted((kept for kept, _ in self._heads()), key=lambda kept: -kept.used)

    def _heads(self, reader: str = "*") -> Iterator[tuple[Kept, np.ndarray]]:
        """Yield the states of a reader with their ids; what is damaged is removed, what cannot be read left out."""
        paths: list[Path] = []
        with contextlib.suppress(OSError):
            paths += self.folder.glob(f"{reader}-*{_SUFFIX}")
        for path in paths:
            if not _NAME.fullmatch(path.name):
                continue
            head = None
            with removed_if_damaged(path), open_plain(path) as file:
                head = _read_head(file, path)
            if head:
                yield head

    def path_of(self, identity: Mapping[str, str], ids: Sequence[int]) -> Path:
        """Return where a state is, or would be kept."""
        numbers = np.asarray(ids, np.int32)
        return self.folder / f"{identity_digest(identity)[:16]}-{xxhash.xxh3_128_hexdigest(numbers.tobytes())}{_SUFFIX}"

    def keep(
        self, identity: Mapping[str, str], ids: Sequence[int], size: int, fill: Callable[[np.ndarray], int],
        *, document: str, model: str, whole: bool = True,
    ) -> Kept | None:  # fmt: skip
        """Keep a state; None where that cannot be, which is told: a document is then read again another time.

        Args:
            identity: what must be the same for it to be used.
            ids: what was read.
            size: of the state, in bytes.
            fill: writes the state into an array (size,) of bytes and returns how many it wrote.
            document: name of what was read.
            model: name of the model's file.
            whole: whether that is all of it.
        """
        path, numbers = self.path_of(identity, ids), np.asarray(ids, np.int32)
        head = {
            "identity": dict(identity), "document": document, "model": model, "tokens": len(numbers), "state": size,
            "whole": whole,
        }  # fmt: skip
        try:
            encoded = json.dumps(head).encode()
            need = _state_at(len(encoded), len(numbers)) + size
            if need > self.limit:
                raise ResourceError(f"it takes {human_bytes(need)} of {human_bytes(self.limit)}")
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.prune(self.limit - need, besides=path)
            check_free_disk(self.folder, need)
            with replace_when_complete(path) as partial:
                _write(partial, encoded, numbers, size, fill)
            with open_plain(path) as file:
                return _read_head(file, path)[0]
        except (OSError, ValueError, PiGgufError) as error:
            say(f"what was read of {document} is not kept: {error}")
            return None

    @contextlib.contextmanager
    def longest(self, identity: Mapping[str, str], ids: Sequence[int], window: int) -> Iterator[Found | None]:
        """Give the sound state that has most of `ids` in common with what it has read; None without one.

        Args:
            identity: what must be the same.
            ids: what is to be read.
            window: tokens that a state may have at most.
        """
        mine, wanted = identity_digest(identity), np.asarray(ids, np.int32)
        candidates = [
            (common, -kept.tokens, kept.path)
            for kept, ids in self._heads(mine[:16])
            if kept.identity == mine and kept.tokens <= window and (common := common_length(ids, wanted)) >= WORTH_IT
        ]
        with contextlib.ExitStack() as held:
            for _, _, path in sorted(candidates, reverse=True):
                found = None
                with removed_if_damaged(path):
                    found = held.enter_context(_opened(path))
                if found:
                    with contextlib.suppress(OSError):
                        os.utime(path)
                    yield found
                    return
            yield None

    def named(self, name: str) -> list[Kept]:
        """Return the states of a document and of its parts, by its name, or by four characters of a key or more.

        Raises:
            OptionError: none is kept.
        """
        every = self.entries()
        found = [kept for kept in every if name in (kept.document, kept.document.rpartition(", part ")[0])]
        if not found and len(name) >= _SHORTEST_KEY:
            found = [kept for kept in every if kept.key.startswith(name)]
        if not name or not found:
            raise OptionError(f"{name}: nothing of this name is kept", "pi-gguf documents list shows what is")
        return found

    def prune(self, limit: int, besides: Path | None = None) -> list[Kept]:
        """Remove the least recently used until all take no more than `limit` bytes; return what went.

        What a writer that was killed has left goes in any case.
        """
        for left in self.folder.glob(f"*{_SUFFIX}.partial"):
            with contextlib.suppress(PiGgufError, OSError), one_writer(left.with_suffix("")):
                pass
        gone, total = [], 0
        for kept in self.entries():
            if kept.path == besides:
                continue
            total += kept.nbytes
            if total > max(0, limit):
                remove(kept.path)
                gone.append(kept)
        return gone


@dataclass(frozen=True)
class Found:
    """A verified state: `state` (bytes) is valid inside the `with` that gave it; `ids` are what it has read."""

    kept: Kept
    ids: list[int]
    state: np.ndarray


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many ids two arrays have in common from their beginning."""
    length = min(len(one), len(other))
    different = np.nonzero(one[:length] != other[:length])[0]
    return int(different[0]) if len(different) else length


def identity_digest(identity: Mapping[str, str]) -> str:
    """Return the name of an identity, 32 letters; files of states begin with its first 16."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(dict(sorted(identity.items()))).encode()))


def _state_at(head_bytes: int, tokens: int) -> int:
    """Where the state begins in a file."""
    return -(-(_FIXED + head_bytes + 4 * tokens) // _PAGE) * _PAGE


def _write(path: Path, head: bytes, ids: np.ndarray, size: int, fill: Callable[[np.ndarray], int]) -> None:
    """Write a state's file; its room is taken first, as a full disk would end the process later."""
    at = _state_at(len(head), len(ids))
    with disk_errors(path), os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
        _reserve(file.fileno(), at + size)
        with mmap.mmap(file.fileno(), at + size) as mapped:
            mapped[: len(_MAGIC)] = _MAGIC
            mapped[_FIXED - 8 : _FIXED] = len(head).to_bytes(8, "little")
            mapped[_FIXED : _FIXED + len(head)] = head
            mapped[_FIXED + len(head) : _FIXED + len(head) + ids.nbytes] = ids.tobytes()
            state = np.frombuffer(mapped, np.uint8, size, at)
            try:
                wrote = fill(state)
            finally:
                del state
            if wrote != size:
                raise ResourceError(f"llama.cpp gave {wrote:,} of {size:,} bytes")
            mapped[len(_MAGIC) : _FIXED - 8] = _checksum(mapped)
            mapped.flush()


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, 2**20):
        os.write(descriptor, bytes(min(2**20, size - start)))


def _checksum(data: mmap.mmap) -> bytes:
    with memoryview(data) as whole, whole[_FIXED - 8 :] as rest:
        return xxhash.xxh3_128_digest(rest)


def _read_head(file: BinaryIO, path: Path) -> tuple[Kept, np.ndarray]:
    """Read what a state's file says of itself, and its ids; its checksum is not looked at.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or is cut off.
    """
    status = os.fstat(file.fileno())
    fixed = file.read(_FIXED)
    length = int.from_bytes(fixed[-8:], "little")
    if len(fixed) < _FIXED or not fixed.startswith(_MAGIC) or length > _LONGEST_HEAD:
        raise ValueError("it is no state of this version")
    try:
        head = json.loads(file.read(length))
        tokens, size = int(head["tokens"]), int(head["state"])
        kept = Kept(
            path, identity_digest(head["identity"]), str(head["document"]), str(head["model"]), tokens, size,
            status.st_size, status.st_mtime, bool(head["whole"]),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError("its header is damaged") from error
    if min(tokens, size) < 0 or status.st_size != _state_at(length, tokens) + size:
        raise ValueError("it is cut off")
    return kept, np.frombuffer(file.read(4 * tokens), np.int32)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Found]:
    """Give a state whose every byte is as it was written."""
    with open_plain(path) as file:
        kept, ids = _read_head(file, path)
        mapped = mmap.mmap(file.fileno(), kept.nbytes, access=mmap.ACCESS_READ)  # closed with the last array of it
        if mapped[len(_MAGIC) : _FIXED - 8] != _checksum(mapped):
            raise ValueError("its checksum is wrong")
        yield Found(
            kept, ids.tolist(), np.frombuffer(mapped, np.uint8, kept.state_bytes, kept.nbytes - kept.state_bytes)
        )
