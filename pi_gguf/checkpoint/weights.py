"""Tensors of a safetensors file, read piece by piece and never mapped: a file that shrinks while it is read ends in an
error, where a mapped one ends the process.

In: a path. Out: tensors of torch, by name.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_KINDS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""torch's names of the format's types."""

_READ_BYTES = 2**24


class WeightFile:
    """An open file whose header safetensors has checked; whoever opens it closes it.

    Raises:
        CheckpointError: it cannot be read, or is not as it was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._changed(error) from error
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            self._begin = 8 + length
            self._header: dict[str, Any] = json.loads(self._file.read(length))
        except (OSError, ValueError, struct.error) as error:
            self.close()
            raise self._changed(error) from error

    def close(self) -> None:
        self._file.close()

    def _changed(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._path}: cannot be read any more ({error})", "let it be while it is read")

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        import torch

        try:
            entry = self._header[name]
            kind, shape, (begin, end) = getattr(torch, _KINDS[entry["dtype"]]), entry["shape"], entry["data_offsets"]
            if end - begin != kind.itemsize * math.prod(shape):
                raise ValueError(f"{end - begin} bytes")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self._path}: {name} is not as it was ({error})", "convert again") from error
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._read(name, data.numpy().data, self._begin + begin)
        return data.view(kind).reshape(shape)

    def _read(self, name: str, into: memoryview, at: int) -> None:
        done = 0
        try:
            while done < len(into):
                got = os.preadv(self._file.fileno(), [into[done : done + _READ_BYTES]], at + done)
                if not got:
                    raise CheckpointError(
                        f"{self._path}: {name} ends early: the file was cut while it was read", "download it again"
                    )
                done += got
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: {name} cannot be read ({error.strerror})", "check the disk"
            ) from error
