"""The header of a GGUF file, byte for byte: read it, change some keys, and all the rest stays as it is.

In: a path. Out: a `Header`; changed, the bytes to put before the same data. Values are decoded when they are asked
for, so that a vocabulary of any size opens at once.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from pi_gguf.common.files import check_free_disk, human_bytes, is_file
from pi_gguf.common.progress import progress_bar
from pi_gguf.errors import GgufError, one_line

ALIGNMENT = 32
"""Every tensor of a file begins at a multiple of so many bytes, counted from the end of the header."""

MEASURED = "pi_gguf."
"""What the keys of a file's own measurements begin with."""

_MAGIC = b"GGUF"

_MOST_SIDES, _MOST_TENSORS, _MOST_STRINGS, _LONGEST_NAME, _LONGEST_VALUE = 4, 2**20, 2**22, 2**16, 2**28
"""No model comes near; beyond them a file is damaged, and reading it would take minutes or all memory."""

_BLOCK = 2**25
"""Bytes copied at once."""

TYPES = (
    "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY", "UINT64", "INT64",
    "FLOAT64",
)  # fmt: skip
"""Types of metadata in the order of their numbers."""

_FORMATS = {
    "UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "FLOAT32": "f", "BOOL": "?",
    "UINT64": "Q", "INT64": "q", "FLOAT64": "d",
}  # fmt: skip

_TYPE_OF_KEY = {
    "STRING": r"general\.(?!(file_type|quantization_version|alignment|tags|languages|sampling\..*|.*count|.*steps)$).*"
    r"|.*\.rope\.scaling\.type|tokenizer\.ggml\.(model|pre)|tokenizer\.chat_template.*|.*\.tensor_data_layout",
    "BOOL": r".*\.rope\.scaling\.finetuned|tokenizer\.ggml\.(add_\w+|remove_extra_whitespaces)"
    r"|.*\.(use_parallel_residual|expert_weights_norm|attention\.causal)",
    "UINT32": r"general\.(file_type|quantization_version|alignment|.*count|.*steps)"
    r"|tokenizer\.ggml\.\w+_(token_id|count)|.*\.(\w+_count|\w+_length|vocab_size|sliding_window)|.*\.attention\.(head_count_kv|\w+_length_(mla|swa))"
    r"|.*\.rope\.dimension_count_swa",
    "FLOAT32": r".*\.rope\.(freq_base(_swa)?|scale_linear|scaling\.(factor|alpha|attn_factor|yarn_\w+))"
    r"|.*\.attention\.(layer_norm_epsilon|layer_norm_rms_epsilon|clamp_kqv|max_alibi_bias|scale|output_scale)"
    r"|.*\.(\w+_softcapping|logit_scale|residual_scale|embedding_scale|expert_weights_scale)",
}


def type_of_key(key: str) -> str | None:
    """Return the type that a single value has under a key by GGUF's convention; None where none is known."""
    return next((kind for kind, pattern in _TYPE_OF_KEY.items() if re.fullmatch(pattern, key)), None)


@dataclass(frozen=True)
class Entry:
    """The value of a key as it stands in a file.

    Args:
        type: one of `TYPES`, in square brackets for an array of it, e.g. `UINT32` or `[STRING]`.
        data: the bytes behind the number of the type.
    """

    type: str
    data: bytes

    @classmethod
    def of(cls, value: Any, kind: str | None = None) -> Entry:
        """Encode a value.

        Args:
            kind: its type; as `write_header` has it when None.

        Raises:
            ValueError: the value does not fit the type.
        """
        kind = kind or _type_of(value)
        if kind[0] != "[":
            return cls(kind, _encode(value, kind))
        item = kind.strip("[]")
        if not isinstance(value, list) or item not in TYPES or item == "ARRAY":
            raise ValueError(f"no list of {item}")
        head = struct.pack("<IQ", TYPES.index(item), len(value))
        return cls(kind, head + b"".join(_encode(part, item) for part in value))

    @cached_property
    def value(self) -> Any:
        """The value, a list for an array; text that is not UTF-8 has replacement characters."""
        if self.type[0] != "[":
            return self.data[8:].decode(errors="replace") if self.type == "STRING" else self._numbers(self.data, 1)[0]
        if self.type != "[STRING]":
            return self._numbers(self.data[12:], self.length)
        return [text.decode(errors="replace") for text in self.texts]

    @cached_property
    def texts(self) -> list[bytes]:
        """The values of an array of text, as they lie in the file."""
        values, at = [], 12
        for _ in range(self.length):
            (length,) = struct.unpack_from("<Q", self.data, at)
            values.append(self.data[at + 8 : at + 8 + length])
            at += 8 + length
        return values

    @property
    def length(self) -> int:
        """How many values an array has; 1 for a single one."""
        return int(struct.unpack_from("<Q", self.data, 4)[0]) if self.type[0] == "[" else 1

    def _numbers(self, data: bytes, count: int) -> list[Any]:
        return list(struct.unpack(f"<{count}{_FORMATS[self.type.strip('[]')]}", data))


@dataclass(frozen=True)
class TensorPlace:
    """A tensor as a header describes it.

    Args:
        name: GGUF's.
        sides: of its shape, in the order of the file, the reverse of torch's.
        type: ggml's number of it.
        offset: where it begins, in bytes from the beginning of the data.
        elsewhere: the file that it really lies in, and where in it, when the header is of several; see `parts`.
    """

    name: str
    sides: tuple[int, ...]
    type: int
    offset: int
    elsewhere: tuple[Path, int] | None = None


@dataclass(frozen=True)
class Header:
    """What comes before the data of a GGUF file, kept as bytes, so that all that is not changed stays as it is.

    Args:
        path: of the file.
        version: of the format.
        entries: values by key, in the order of the file.
        tensors: in the order of the file.
        tensor_infos: the same, as bytes.
        data_offset: bytes before the data.
    """

    path: Path
    version: int
    entries: dict[str, Entry]
    tensors: list[TensorPlace]
    tensor_infos: bytes
    data_offset: int

    @property
    def metadata(self) -> dict[str, Any]:
        """Every key with a single value."""
        return {key: entry.value for key, entry in self.entries.items() if entry.type[0] != "["}

    @property
    def arch(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def fingerprint(self) -> str:
        """Return a hash over all that a header states but what was measured of the file (`pi_gguf.*`)."""
        digest = hashlib.sha256(self.tensor_infos)
        for key, entry in sorted(self.entries.items()):
            if not key.startswith(MEASURED):
                digest.update(f"{key} {entry.type} {len(entry.data)} ".encode() + entry.data)
        return digest.hexdigest()

    def changed(self, changes: Mapping[str, Entry | None], order: Sequence[str] = ()) -> Header:
        """Return the header with other values.

        Args:
            changes: values by key; None removes the key.
            order: keys as they usually follow each other. A new key goes behind the one that is before it there; where
                it is not named, behind the last key with the longest beginning in common.
        """
        keys = [key for key in self.entries if key not in changes or changes[key] is not None]
        new = [key for key, entry in changes.items() if key not in self.entries and entry is not None]
        for key in sorted(new, key=lambda key: order.index(key) if key in order else -1):
            keys.insert(_place(key, keys, order), key)
        entries = {**self.entries, **{key: entry for key, entry in changes.items() if entry is not None}}
        return replace(self, entries={key: entries[key] for key in keys})

    def to_bytes(self) -> bytes:
        """Return the header up to the first byte of data."""
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        parts = [_MAGIC, struct.pack("<IQQ", self.version, len(self.tensors), len(self.entries))]
        for key, entry in self.entries.items():
            number = TYPES.index("ARRAY" if entry.type[0] == "[" else entry.type)
            parts += [_encode(key, "STRING"), struct.pack("<I", number), entry.data]
        header = b"".join([*parts, self.tensor_infos])
        return header + bytes(-len(header) % alignment if self.tensors else 0)


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        GgufError: the file is missing, truncated, no GGUF, or its numbers are big-endian.
    """
    if not is_file(path):
        raise GgufError(f"{path}: no such file", "check the spelling")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _scan_header(path, data)
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError, OSError) as error:
        raise GgufError(
            f"{path}: truncated or not a GGUF file ({one_line(error)})", "copy or convert the file again"
        ) from error


def is_gguf(path: str | Path) -> bool:
    """Tell whether a file is a GGUF file: by its first bytes, whatever its name, or by a name that claims so."""
    path = Path(path)
    try:
        if is_file(path):
            with path.open("rb") as file:
                return file.read(4) == _MAGIC or path.suffix == ".gguf"
    except OSError:  # not to be read
        pass
    return path.suffix == ".gguf"


def _scan_header(path: Path, data: mmap.mmap) -> Header:
    if data[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, n_tensors, n_entries = struct.unpack_from("<IQQ", data, 4)
    if version % 2**16 == 0:
        raise GgufError(f"{path}: its numbers are big-endian, which is not read", "convert the checkpoint again")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}")
    if n_tensors > _MOST_TENSORS:
        raise ValueError(f"it has {n_tensors} tensors")
    at = 24
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        key, at = _scan_name(data, at, "a key")
        if key in entries:
            raise ValueError(f"{key} is there twice")
        entries[key], at = _scan_value(data, at, key)
    begin, tensors = at, []
    names: set[str] = set()
    for _ in range(n_tensors):
        tensor, at = _scan_tensor(data, at)
        if tensor.name in names:
            raise ValueError(f"{tensor.name} is there twice")
        names.add(tensor.name)
        tensors.append(tensor)
    alignment = entries["general.alignment"].value if "general.alignment" in entries else ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {str(alignment)[:20]}, no power of two")
    data_offset = -(-at // alignment) * alignment if tensors else at
    if data_offset > len(data):
        raise ValueError("the data of its tensors is missing")
    return Header(path, version, entries, tensors, data[begin:at], data_offset)


def _scan_name(data: mmap.mmap, at: int, what: str) -> tuple[str, int]:
    """Return a key or a name and where it ends."""
    (length,) = struct.unpack_from("<Q", data, at)
    if not 0 < length <= _LONGEST_NAME or at + 8 + length > len(data):
        raise ValueError(f"{what} has {length} bytes")
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length


def _scan_value(data: mmap.mmap, at: int, key: str) -> tuple[Entry, int]:
    """Return the value behind a key, from the number of its type on, and where it ends."""
    (number,) = struct.unpack_from("<I", data, at)
    kind, at = _type(number, key), at + 4
    end = at
    if kind == "ARRAY":
        number, count = struct.unpack_from("<IQ", data, at)
        kind, end = _type(number, key), at + 12
        if kind == "ARRAY":
            raise ValueError(f"{key} is an array of arrays")
        if kind == "STRING":
            if count > min(_MOST_STRINGS, len(data) // 8):
                raise ValueError(f"{key} has {count} values")
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", data, end)[0]
        else:
            end += count * struct.calcsize(_FORMATS[kind])
        kind = f"[{kind}]"
    else:
        end += 8 + struct.unpack_from("<Q", data, at)[0] if kind == "STRING" else struct.calcsize(_FORMATS[kind])
    if end > len(data):
        raise ValueError(f"{key} goes beyond the end")
    if end - at > _LONGEST_VALUE:
        raise ValueError(f"{key} has {end - at} bytes")
    return Entry(kind, data[at:end]), end


def _scan_tensor(data: mmap.mmap, at: int) -> tuple[TensorPlace, int]:
    """Return a tensor's description and where it ends."""
    name, at = _scan_name(data, at, "the name of a tensor")
    (n_sides,) = struct.unpack_from("<I", data, at)
    if n_sides > _MOST_SIDES:
        raise ValueError(f"{name} has {n_sides} sides")
    *sides, kind, offset = struct.unpack_from(f"<{n_sides}QIQ", data, at + 4)
    return TensorPlace(name, tuple(sides), kind, offset), at + 4 + 8 * n_sides + 12


def _type(number: int, key: str) -> str:
    if number >= len(TYPES):
        raise ValueError(f"{key} is of type {number}")
    return TYPES[number]


def write_changed(header: Header, target: Path) -> None:
    """Write a header and behind it the data of the file that it was read from, to the byte.

    Raises:
        GgufError: that file became shorter.
        ResourceError: not enough disk.
    """
    front = header.to_bytes()
    total = max(0, header.path.stat().st_size - header.data_offset)
    check_free_disk(target.parent, len(front) + total)
    started, done = time.monotonic(), 0
    with header.path.open("rb") as reader, target.open("wb") as writer, progress_bar("copy", total, "bytes") as advance:
        writer.write(front)
        writer.flush()
        reader.seek(header.data_offset)
        while done < total:
            count = _copy(reader, writer, header.data_offset + done, len(front) + done, min(_BLOCK, total - done))
            if not count:
                raise GgufError(f"{header.path}: became shorter while it was read", "run the same command again")
            done += count
            advance(count, text=f"{human_bytes(done / max(1e-9, time.monotonic() - started))}/s")


def tensors_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's tensors, their names, shapes and types included; other metadata are not.

    Raises:
        GgufError: as `read_header`.
    """
    header = read_header(path)
    digest = hashlib.sha256(header.tensor_infos)
    total = path.stat().st_size - header.data_offset
    with path.open("rb") as file, progress_bar(f"hash {path.name}", total, "bytes") as advance:
        file.seek(header.data_offset)
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _copy(reader: BinaryIO, writer: BinaryIO, at: int, to: int, count: int) -> int:
    """Copy some bytes within the kernel where it can, else through memory; return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader.fileno(), writer.fileno(), count, at, to)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                raise
    reader.seek(at)
    writer.seek(to)
    written = writer.write(reader.read(count))
    writer.flush()
    return written


def _place(key: str, keys: Sequence[str], order: Sequence[str]) -> int:
    """Return where a new key goes among the others."""
    before = order[: order.index(key)] if key in order else ()
    for known in reversed(before):
        if known in keys:
            return keys.index(known) + 1
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length]) + "."
        if there := [i for i, other in enumerate(keys) if other.startswith(prefix)]:
            return there[-1] + 1
    return len(keys)


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        return {str: "[STRING]", float: "[FLOAT32]"}.get(type(value[0]) if value else str, "[INT32]")
    return {bool: "BOOL", float: "FLOAT32", str: "STRING"}.get(type(value), "UINT32")


def _encode(value: Any, kind: str) -> bytes:
    if kind == "STRING":
        if not isinstance(value, str):
            raise ValueError("no text")
        text = value.encode()
        return struct.pack("<Q", len(text)) + text
    if kind == "BOOL" and not isinstance(value, bool):
        raise ValueError("neither true nor false")
    try:
        return struct.pack(f"<{_FORMATS[kind]}", value)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"no {kind}") from error
