"""The door to GGUF files: read metadata and tensor lists, write headers, and name tensors.

In: a path. Out: a `GgufInfo`; or, from metadata and tensors, the part of a file before its data. The gguf library is
imported nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import GgufError
from pi_gguf.gguf_header import ALIGNMENT, Header, read_header
from pi_gguf.rope import RopeScaling

if TYPE_CHECKING:
    import numpy as np

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
    """What a GGUF file states: its scalar metadata, the length of its arrays, and its tensors."""

    path: Path
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    tensors: list[TensorInfo]

    @property
    def arch(self) -> str:
        return str(self.metadata.get("general.architecture"))

    @property
    def rope(self) -> RopeScaling:
        return RopeScaling.from_gguf(self.metadata, str(self.path))

    @property
    def quantization(self) -> str:
        import gguf

        try:
            return str(gguf.LlamaFileType(self.metadata["general.file_type"]).name.split("_", 1)[1])
        except (KeyError, ValueError, IndexError):
            return "unknown"

    def hyperparameter(self, name: str) -> int:
        """Return a positive integer key of the architecture.

        Raises:
            GgufError: it is missing or below 1.
        """
        value = self.metadata.get(f"{self.arch}.{name}")
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
    )


def tensors_of(header: Header) -> list[TensorInfo]:
    """Return the tensors that a header describes.

    Raises:
        GgufError: an unknown type, or a tensor that goes beyond the end of the file.
    """
    import gguf

    size, tensors = header.path.stat().st_size, []
    for t in header.tensors:
        try:
            kind = gguf.GGMLQuantizationType(t.type)
        except ValueError as error:
            reason = f"{t.name} is of type {t.type}"
            raise GgufError(f"{header.path}: truncated or not a GGUF file ({reason})", _AGAIN) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(t.sides) * block_bytes // block
        if header.data_offset + t.offset + nbytes > size:
            raise GgufError(f"{header.path}: truncated or not a GGUF file ({t.name} goes beyond the end)", _AGAIN)
        tensors.append(TensorInfo(t.name, tuple(reversed(t.sides)), kind.name, nbytes))
    return tensors


def read_array(path: Path, key: str) -> list[Any]:
    """Read an array of a file's metadata; an empty one when it is not there."""
    with _reader(path) as reader:
        field = reader.fields.get(key)
        return list(field.contents()) if field is not None and len(field.data) else []


def read_values(path: Path) -> dict[str, np.ndarray]:
    """Read the values of all F32 tensors of a file, by name, in the shapes that torch has."""
    import numpy as np

    with _reader(path) as reader:
        return {t.name: np.array(t.data, np.float32) for t in reader.tensors if t.tensor_type.name == "F32"}


@contextmanager
def _reader(path: Path) -> Iterator[Any]:
    """Open a file with gguf, and turn what can go wrong inside into a `GgufError`."""
    import gguf

    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_file = False
    if not is_file:
        raise GgufError(f"{path}: no such file", "check the spelling")
    try:
        yield gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeDecodeError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GgufError(f"{path}: truncated or not a GGUF file ({reason})", "copy or convert the file again") from error


def padded(nbytes: int) -> int:
    """Return the bytes that a tensor takes in a file, up to where the next one may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def write_header(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    """Write what comes before the data of a GGUF file.

    Args:
        metadata: keys and values; whole numbers are stored as 32-bit unsigned ones, but for numpy's own types.
        tensors: in the order of their data.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, arch)
    add = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        np.uint16: writer.add_uint16, np.int32: writer.add_int32,
    }  # fmt: skip
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    for t in tensors:
        writer.add_tensor_info(
            t.name, t.shape, np.dtype(np.float32), t.nbytes, gguf.GGMLQuantizationType(tensor_types()[t.type])
        )
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


@cache
def tensor_types() -> dict[str, int]:
    """Return ggml's number of each tensor type, by name such as `Q4_K`."""
    import gguf

    return {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}


def tensor_nbytes(kind: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor's data; its rows must be whole blocks of the type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor_types()[kind])]
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return int(rows * (shape[-1] // block) * size)


def quantization_version() -> int:
    """Return the version of the formats of quantized blocks, which every file states."""
    import gguf

    return int(gguf.GGML_QUANT_VERSION)


def tensor_namer(arch: str, n_layers: int) -> Callable[[str], str | None]:
    """Return the function from Hugging Face's name of a tensor to GGUF's, None where it has none."""
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, n_layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))
