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
from typing import Any

import numpy as np
import xxhash

from pi_gguf.common.files import (
    check_free_disk,
    disk_errors,
    human_bytes,
    open_plain,
    remove,
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
        return self.path.name.removesuffix(_SUFFIX).split("-")[-1][:12]

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key, "document": self.document, "model": self.model, "tokens": self.tokens,
            "bytes": self.nbytes, "used": self.used, "whole": self.whole,
        }  # fmt: skip


def states_folder(given: str | Path | None = None) -> Path | None:
    """Return where states are kept: as given, by `PI_GGUF_CACHE`, or in the user's cache folder; None without one."""
    if given is None:
        given = os.environ.get("PI_GGUF_CACHE") or None
    base = Path(given) if given is not None else user_cache()
    return base / "documents" if base else None


def user_states() -> States | None:
    """Return the user's own states; None for a user without a cache folder."""
    folder = states_folder()
    return States(folder) if folder else None


def file_digest(path: Path) -> str:
    """Return the checksum of a whole file; it is remembered for as long as size and times of the file stay."""
    status = path.stat()
    mark = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    base = user_cache()
    memo = base and base / "digests" / xxhash.xxh3_128_hexdigest(mark.encode())
    if memo:
        with contextlib.suppress(OSError, ValueError), open_plain(memo) as file:
            if re.fullmatch(r"[0-9a-f]{32}", known := file.read(33).decode()):
                return known
    digest = xxhash.xxh3_128()
    with path.open("rb") as file, progress_bar(f"checksum {path.name}", status.st_size, "bytes") as advance:
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

    def entries(self) -> list[Kept]:
        """Return what is kept, the last used first; what is no state, or is cut off, is left out."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"*{_SUFFIX}"):
                with contextlib.suppress(OSError, ValueError):
                    found.append(_open_head(path)[0])
        return sorted(found, key=lambda kept: -kept.used)

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
        mine, numbers = _digest(identity), np.asarray(ids, np.int32)
        path = self.folder / f"{mine[:16]}-{xxhash.xxh3_128_hexdigest(numbers.tobytes())}{_SUFFIX}"
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
            return _open_head(path)[0]
        except (OSError, ValueError, PiGgufError) as error:
            say(f"what was read of {document} is not kept: {error}")
            return None

    @contextlib.contextmanager
    def longest(self, identity: Mapping[str, str], ids: Sequence[int]) -> Iterator[Found | None]:
        """Give the sound state that has most of `ids` in common with what it has read; None without one."""
        wanted = np.asarray(ids, np.int32)
        with contextlib.ExitStack() as held:
            for path, _ in sorted(self._candidates(identity, wanted), key=lambda one: -one[1]):
                try:
                    found = held.enter_context(_opened(path))
                except (OSError, ValueError) as error:
                    say(f"{path}: not used and removed: {error}")
                    remove(path)
                    continue
                with contextlib.suppress(OSError):
                    os.utime(path)
                yield found
                return
            yield None

    def _candidates(self, identity: Mapping[str, str], wanted: np.ndarray) -> Iterator[tuple[Path, int]]:
        """Yield the states of this identity with how many ids they have in common with `wanted`."""
        for path in self.folder.glob(f"{_digest(identity)[:16]}-*{_SUFFIX}"):
            try:
                kept, ids = _open_head(path)
            except (OSError, ValueError):
                continue
            common = common_length(ids, wanted)
            if kept.identity == _digest(identity) and common >= WORTH_IT:
                yield path, common

    def named(self, name: str) -> list[Kept]:
        """Return the states of a document, by its name or the beginning of a key.

        Raises:
            OptionError: none is kept.
        """
        found = [kept for kept in self.entries() if name in (kept.document, kept.key) or kept.key.startswith(name)]
        if not found:
            raise OptionError(f"{name}: nothing of this name is kept", "pi-gguf documents list shows what is")
        return found

    def prune(self, limit: int, besides: Path | None = None) -> list[Kept]:
        """Remove the least recently used until all take no more than `limit` bytes; return what went."""
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


def identity_text(identity: Mapping[str, str]) -> str:
    return json.dumps(dict(sorted(identity.items())))


def _digest(identity: Mapping[str, str]) -> str:
    return str(xxhash.xxh3_128_hexdigest(identity_text(identity).encode()))


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


def _open_head(path: Path) -> tuple[Kept, np.ndarray]:
    """Read what a state's file says of itself, and its ids; its checksum is not looked at.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or is cut off.
    """
    with open_plain(path) as file:
        status = os.fstat(file.fileno())
        fixed = file.read(_FIXED)
        length = int.from_bytes(fixed[-8:], "little")
        if len(fixed) < _FIXED or not fixed.startswith(_MAGIC) or length > _LONGEST_HEAD:
            raise ValueError("it is no state of this version")
        head = json.loads(file.read(length))
        tokens, size = int(head["tokens"]), int(head["state"])
        if min(tokens, size) < 0 or status.st_size != _state_at(length, tokens) + size:
            raise ValueError("it is cut off")
        ids = np.frombuffer(file.read(4 * tokens), np.int32)
    kept = Kept(
        path, _digest(head["identity"]), str(head["document"]), str(head["model"]), tokens, size, status.st_size,
        status.st_mtime, bool(head["whole"]),
    )  # fmt: skip
    return kept, ids


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Found]:
    """Give a state whose every byte is as it was written."""
    kept, ids = _open_head(path)
    with open_plain(path) as file:
        mapped = mmap.mmap(file.fileno(), kept.nbytes, access=mmap.ACCESS_READ)  # closed with the last array of it
        if mapped[len(_MAGIC) : _FIXED - 8] != _checksum(mapped):
            raise ValueError("its checksum is wrong")
        yield Found(
            kept, ids.tolist(), np.frombuffer(mapped, np.uint8, kept.state_bytes, kept.nbytes - kept.state_bytes)
        )
