"""The door to GGUF files: read metadata and tensor lists, write headers, and name tensors.

In: a path. Out: a `GgufInfo`; or, from metadata and tensors, the part of a file before its data. The gguf library is
imported nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from pi_gguf.errors import GgufError
from pi_gguf.gguf.header import ALIGNMENT, Header, read_header
from pi_gguf.scaling.rope import RopeScaling

_AGAIN = "copy or convert the file again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: its name, shape as torch has it, type, e.g. Q4_K, and bytes of data."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file states: its scalar metadata, the length of its arrays, its tensors, and all as it lies there."""

    path: Path
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    tensors: list[TensorInfo]
    header: Header = field(repr=False)

    @property
    def arch(self) -> str:
        return str(self.metadata.get("general.architecture"))

    @property
    def rope(self) -> RopeScaling:
        return RopeScaling.from_gguf(self.metadata, str(self.path))

    @property
    def quantization(self) -> str:
        try:
            return str(gguf.LlamaFileType(self.metadata["general.file_type"]).name.split("_", 1)[1])
        except (KeyError, ValueError, IndexError):
            return "unknown"

    def hyperparameter(self, name: str) -> int:
        """Return a positive integer key of the architecture, the largest where it is given layer by layer.

        Raises:
            GgufError: it is missing or below 1.
        """
        entry = self.header.entries.get(f"{self.arch}.{name}")
        value = None if entry is None else entry.value
        if isinstance(value, list) and entry is not None and entry.type != "[STRING]":
            value = max(value, default=0)
        if not isinstance(value, int) or value < 1:
            got = "it is missing" if value is None else f"got {value!r}"
            raise GgufError(
                f"{self.path}: {self.arch}.{name} must be a positive integer, {got}",
                "write the file again from its checkpoint",
            )
        return value


def read_gguf(path: Path) -> GgufInfo:
    """Read a GGUF file's metadata and tensor list; the weights stay on disk.

    Raises:
        GgufError: the file is missing, truncated or no GGUF.
    """
    header = read_header(path)
    return GgufInfo(
        path,
        header.metadata,
        {key: entry.length for key, entry in header.entries.items() if entry.type[0] == "["},
        tensors_of(header),
        header,
    )


def tensors_of(header: Header) -> list[TensorInfo]:
    """Return the tensors that a header describes.

    Raises:
        GgufError: an unknown type, a shape that cannot be, or a tensor that goes beyond the end of the file.
    """
    size = header.path.stat().st_size
    names = {layout.number: name for name, layout in _layouts().items()}
    tensors = []
    for t in header.tensors:
        kind = names.get(t.type)
        elements, columns = math.prod(t.sides), (*t.sides, 1)[0]
        if kind is None:
            wrong = f"{t.name} is of type {t.type}, which there is none of" + (" any more" if t.type < 40 else "")
        elif not 0 < elements < 2**63:
            wrong = f"{t.name} is of shape {' x '.join(map(str, t.sides))}"
        elif columns % (layout := _layouts()[kind]).block:
            wrong = f"{t.name} has rows of {columns}, {kind} is in blocks of {layout.block}"
        else:
            nbytes = elements // layout.block * layout.nbytes
            tensors.append(TensorInfo(t.name, tuple(reversed(t.sides)), kind, nbytes))
            if header.data_offset + t.offset + nbytes <= size:
                continue
            wrong = f"{t.name} goes beyond the end"
        raise GgufError(f"{header.path}: truncated or not a GGUF file ({wrong})", _AGAIN)
    return tensors


def read_values(header: Header) -> dict[str, np.ndarray]:
    """Read the values of all F32 tensors of a file, by name, in the shapes that torch has."""
    values = {}
    with header.path.open("rb") as file:
        for t, place in zip(tensors_of(header), header.tensors, strict=True):
            if t.type == "F32":
                file.seek(header.data_offset + place.offset)
                values[t.name] = np.frombuffer(file.read(t.nbytes), "<f4").reshape(t.shape)
    return values


def padded(nbytes: int) -> int:
    """Return the bytes that a tensor takes in a file, up to where the next one may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def write_header(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    """Write what comes before the data of a GGUF file.

    Args:
        metadata: keys and values; whole numbers are stored as 32-bit unsigned ones, but for numpy's own types.
        tensors: in the order of their data.
    """
    writer = gguf.GGUFWriter(path, arch)
    add = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        np.uint16: writer.add_uint16, np.int32: writer.add_int32,
    }  # fmt: skip
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    for t in tensors:
        number: Any = tensor_types()[t.type]  # gguf has no name for the newest ones
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def write_values(path: Path, arch: str, metadata: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> None:
    """Write a whole file of F32 tensors, in the shapes that torch has."""
    tensors = [TensorInfo(name, array.shape, "F32", 4 * array.size) for name, array in values.items()]
    write_header(path, arch, metadata, tensors)
    with path.open("ab") as file:
        file.write(bytes(padded(file.tell()) - file.tell()))
        for array in values.values():
            data = array.astype("<f4").tobytes()
            file.write(data + bytes(padded(len(data)) - len(data)))


class _Layout(NamedTuple):
    """How a tensor type lies in a file: ggml's number of it, and the elements and bytes of a block."""

    number: int
    block: int
    nbytes: int


@cache
def _layouts() -> dict[str, _Layout]:
    found = {kind.name: _Layout(int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    return {**found, "Q8_1": _Layout(9, 32, 36), "Q2_0": _Layout(42, 64, 18)}  # where gguf is not as llama.cpp


@cache
def tensor_types() -> dict[str, int]:
    """Return ggml's number of each tensor type, by name such as `Q4_K`."""
    return {name: layout.number for name, layout in _layouts().items()}


def tensor_nbytes(kind: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor's data; its rows must be whole blocks of the type."""
    layout = _layouts()[kind]
    return math.prod(shape[:-1]) * (shape[-1] // layout.block) * layout.nbytes


def quantization_version() -> int:
    """Return the version of the formats of quantized blocks, which every file states."""
    return int(gguf.GGML_QUANT_VERSION)


def tensor_namer(arch: str, n_layers: int) -> Callable[[str], str | None]:
    """Return the function from Hugging Face's name of a tensor to GGUF's, None where it has none."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, n_layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))
