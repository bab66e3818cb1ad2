"""A GGUF file that is unpacked, or the parts of a split one: what it states, and where each tensor lies.

In: the path of a file, of a split one any part. Out: an `OpenedFile`; numbers of 32 bits are read at once, all others
stay on disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi_gguf.errors import GgufError, UnsupportedError
from pi_gguf.families.family import Stated
from pi_gguf.gguf.file import GgufInfo, TensorInfo, read_gguf, tensor_nbytes, tensors_of
from pi_gguf.gguf.header import Header
from pi_gguf.gguf.loadable import check_loadable
from pi_gguf.gguf.parts import complete
from pi_gguf.llamacpp.quantizer import reads_as_floats
from pi_gguf.llamacpp.trial import check_opens


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name, shape as torch has it, type, file, and where its data begins in it."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path
    offset: int

    def bytes_of(self, rows: int) -> int:
        """Return the bytes of so many rows of it, each of its last side."""
        return tensor_nbytes(self.type, (rows, self.shape[-1]))


@dataclass(frozen=True)
class OpenedFile:
    """A GGUF file, checked.

    Args:
        info: what it states, of a split file its first part.
        tensors: of all parts, by name.
        headers: of all parts.
    """

    info: GgufInfo
    tensors: dict[str, Stored]
    headers: list[Header]

    @property
    def path(self) -> Path:
        return self.info.path

    @property
    def stated(self) -> Stated:
        """What it states of its architecture; a list of one number for each layer as that number."""
        prefix, keys = f"{self.info.arch}.", {}
        for key, entry in self.info.header.entries.items():
            if key.startswith(prefix):
                value = entry.value
                alike = isinstance(value, list) and len(set(value)) == 1
                keys[key.removeprefix(prefix)] = value[0] if alike else value
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return Stated(str(self.path), self.info.arch, keys, shapes)

    def vector(self, name: str) -> list[float] | None:
        """Return the values of a small tensor of 32-bit floats; None where there is none.

        Raises:
            GgufError: it is of another type.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type != "F32" or len(tensor.shape) != 1:
            raise GgufError(f"{self.path}: {name} must be a list of F32, got {tensor.type} {list(tensor.shape)}")
        with open_parts() as parts:
            data = parts.read(tensor, 0, tensor.bytes_of(1))
        return [float(value) for value in data.view("<f4")]


class Parts:
    """The parts of a split file, opened as they are needed; several threads may read."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()

    def read(self, tensor: Stored, begin: int, nbytes: int) -> np.ndarray:
        """Return bytes of a tensor's data as uint8.

        Raises:
            GgufError: the file became shorter, or cannot be read.
        """
        data = np.empty(nbytes, np.uint8)
        view, done = data.data, 0
        try:
            with self._opening:
                if tensor.path not in self._files:
                    self._files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            while done < nbytes:
                place = tensor.offset + begin + done
                got = os.preadv(self._files[tensor.path], [view[done : done + 2**24]], place)
                if not got:
                    raise GgufError(f"{tensor.path}: became shorter while it was read", "run the same command again")
                done += got
        except OSError as error:
            raise GgufError(f"{tensor.path}: {tensor.name} cannot be read ({error.strerror})") from error
        return data

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


@contextmanager
def open_parts() -> Iterator[Parts]:
    parts = Parts()
    try:
        yield parts
    finally:
        parts.close()


def open_file(path: Path) -> OpenedFile:
    """Read and check a file, or all parts of a split one.

    Raises:
        GgufError: a file is missing or damaged, or llama.cpp does not live through it.
        UnsupportedError: tensors of a type that cannot be read as floats.
    """
    found = complete(path)
    tensors: dict[str, Stored] = {}
    for header in found.headers:
        for tensor, place in zip(tensors_of(header), header.tensors, strict=True):
            at = header.data_offset + place.offset
            tensors[tensor.name] = Stored(tensor.name, tensor.shape, tensor.type, header.path, at)
    info = read_gguf(found.first.path)
    check_loadable(info)
    _check_types(info, found.tensors)
    check_opens(info.header)
    return OpenedFile(info, tensors, found.headers)


def _check_types(info: GgufInfo, tensors: list[TensorInfo]) -> None:
    odd = next((tensor for tensor in tensors if not reads_as_floats(tensor.type)), None)
    if odd is not None:
        raise UnsupportedError(
            f"{info.path}: {odd.name} is {odd.type}, which is no type of weights", "take another file of the model"
        )
