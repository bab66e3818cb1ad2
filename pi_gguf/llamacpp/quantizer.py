"""llama.cpp's quantization types and its quantizer.

In: rows of weights as 32-bit floats, or a whole GGUF file. Out: quantized bytes, or another file; and back,
from quantized bytes to floats.
"""

from __future__ import annotations

import ctypes
import difflib
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pi_gguf.common.machine import cores
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import tensor_types
from pi_gguf.llamacpp.library import ggml_base, last_error, llama_cpp_library, log

UNQUANTIZED = ("F32", "F16", "BF16")


NEED_IMPORTANCE_MATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
"""File types that llama.cpp writes with an importance matrix only."""


TENSORS_NEED_IMPORTANCE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
"""Types of a single tensor for which the same holds."""


@cache
def quantizations() -> dict[str, int]:
    """Return every file type of the installed llama.cpp by name, such as `Q4_K_M`."""
    prefix = re.compile(r"LLAMA_FTYPE_(?:ALL|MOSTLY)_(\w+)")
    llama_cpp = llama_cpp_library().llama_cpp
    found = {name: prefix.fullmatch(name) for name in dir(llama_cpp)}
    return {match[1]: int(getattr(llama_cpp, name)) for name, match in found.items() if match}


_SPELLINGS = {
    "FP32": "F32", "FLOAT32": "F32", "FP16": "F16", "FLOAT16": "F16", "HALF": "F16", "BFLOAT16": "BF16",
    "NOT_QUANTIZED": "F16", "FAST_QUANTIZED": "Q8_0", "QUANTIZED": "Q4_K_M", "MXFP4": "MXFP4_MOE",
    "Q8": "Q8_0", "INT8": "Q8_0", "Q6": "Q6_K", "Q5": "Q5_K_M", "Q4": "Q4_K_M", "INT4": "Q4_K_M", "Q3": "Q3_K_M",
    "Q2": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K_XL": "Q3_K_L",
}  # fmt: skip
"""What other tools call file types. Those that are named like a tensor type are as llama-quantize has them."""


def spelled(name: str, known: Collection[str]) -> str | None:
    """Return the name that llama.cpp has for what people write: in any case, with other or without separators.

    Args:
        name: as it was written, e.g. `q4_k_m`, `Q4-K-M`, `q4km`, `fp16`.
        known: names that there are.
    """
    given = re.sub(r"[\s.-]+", "_", name.strip()).upper()
    given = given.removeprefix("GGML_TYPE_").removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
    bare = {other.replace("_", ""): other for other in sorted(known)}
    mixture = re.sub(r"_[SML]$|(?<=Q4_0)(_[48]){2}$", "", given)  # Q6_K_L and the like, Q4_0 ordered for a CPU
    for name in (given, mixture):
        for candidate in (name, _SPELLINGS.get(name), bare.get(name.replace("_", ""))):
            if candidate in known:
                return candidate
    return None


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint with the names that are most like one that is not known; empty where none is."""
    close = difflib.get_close_matches(name.upper(), sorted(known), 3, 0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


def check_quantization(name: str, *, importance: bool = False) -> str:
    """Return llama.cpp's name of a quantization, and say so where another one was written.

    Args:
        name: file type, e.g. q4_k_m.
        importance: whether there is an importance matrix.

    Raises:
        OptionError: otherwise, with the list; or it needs an importance matrix, or has no use for one.
    """
    known = spelled(name, quantizations())
    if known is None:
        raise OptionError(
            f"quant must be one of {', '.join(sorted(quantizations()))}, got {name}",
            nearest(name, quantizations()) or "Q4_K_M is a good choice for most, Q8_0 is close to exact",
        )
    if known != name.upper():
        say(f"note: {name} is taken for {known}")
    if known in NEED_IMPORTANCE_MATRIX and not importance:
        raise OptionError(
            f"quant {name}: llama.cpp writes it with an importance matrix only",
            "make one with pi-gguf imatrix and give it with --imatrix, or take Q2_K or a larger type",
        )
    if known in UNQUANTIZED and importance:
        raise OptionError(f"imatrix is for quantized files, quant is {name}", "give --quant Q4_K_M or another")
    return known


def mixture(
    header: Path, quant: str, *, overrides: Sequence[tuple[str, str]] = (), importance: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Ask llama.cpp which type each tensor of a file gets; nothing is quantized.

    Args:
        header: GGUF file whose tensors are F32; their data is not read and may be a hole.
        quant: file type, e.g. Q4_K_M.
        overrides: pairs of a pattern, searched for in the tensor's name, and a tensor type; the first that is found.
        importance: importance matrices by tensor; llama.cpp chooses otherwise where it has some.

    Returns:
        Tensor type by tensor.

    Raises:
        GgufError: llama.cpp refuses.
    """
    llama_cpp = llama_cpp_library()
    structures = llama_cpp.llama_cpp
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = quantizations()[quant], 1, True
    if overrides:
        rows = [(pattern.encode(), tensor_types()[kind]) for pattern, kind in overrides]
        params.tt_overrides = (structures.llama_model_tensor_override * (len(rows) + 1))(*rows)
    if importance:
        params.imatrix = _importance_list(importance)
    log.clear()
    result = llama_cpp.llama_model_quantize(os.fsencode(header), b"", ctypes.byref(params))
    said = re.findall(
        r"\[ *\d+/ *\d+\] +(\S+) +- \[[^\]]*\], type = +(\w+), size = [ \d.]+MiB(?: -> [ \d.]+MiB \((\w+)\))?",
        "".join(log),
    )
    if result != 0 or not said:
        raise GgufError(f"{quant}: llama.cpp does not say how it quantizes this model ({last_error()})")
    return {name: (new or old).upper() for name, old, new in said}


def _importance_list(importance: Mapping[str, np.ndarray]) -> Any:
    """Return llama.cpp's list of importance matrices; the arrays must outlive it."""
    kind = llama_cpp_library().llama_cpp.llama_model_imatrix_data
    entries = (kind * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def widened(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Return weights as float32.

    Args:
        rows: weights (rows, columns): float32, or 16-bit floats as uint16.
        dtype: what they are: F32, F16 or BF16.
    """
    if dtype == "F32":
        return rows
    widen = ggml_base().ggml_bf16_to_fp32_row if dtype == "BF16" else ggml_base().ggml_fp16_to_fp32_row
    wide = np.empty(rows.shape, np.float32)
    widen(rows.ctypes.data, wide.ctypes.data, rows.size)
    return wide


def quantize_rows(kind: str, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None) -> None:
    """Quantize rows of weights; several threads may do so at once.

    Args:
        kind: tensor type, e.g. Q4_K.
        rows: weights (rows, columns), float32.
        out: uint8 of the quantized rows' size, written to.
        importance: weight of each column, float32; none when None.
    """
    count, columns = rows.shape
    weights = None if importance is None else importance.ctypes.data
    written = ggml_base().ggml_quantize_chunk(
        tensor_types()[kind], rows.ctypes.data, out.ctypes.data, 0, count, columns, weights
    )
    assert written == out.nbytes, (kind, rows.shape, written, out.nbytes)


class _TypeTraits(ctypes.Structure):
    """ggml's `ggml_type_traits`, as far as it is needed."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleaved", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
    )  # fmt: skip


@cache
def _traits(kind: str) -> Any:
    """Return what ggml knows of a tensor type; None of one that it has no longer, or not yet."""
    find = ggml_base().ggml_get_type_traits
    find.argtypes, find.restype = [ctypes.c_int], ctypes.POINTER(_TypeTraits)
    number = tensor_types()[kind]
    return find(number).contents if number < llama_cpp_library().GGML_TYPE_COUNT else None


def reads_as_floats(kind: str) -> bool:
    """Tell whether weights of a tensor type can be read as floats."""
    traits = _traits(kind)
    return kind == "F32" or bool(traits and traits.to_float)


def dequantize(kind: str, data: np.ndarray) -> np.ndarray:
    """Return weights as 32-bit floats, the very numbers that llama.cpp multiplies with; threads may do so at once.

    Args:
        kind: tensor type, e.g. Q4_K.
        data: uint8, whole blocks of it.
    """
    if kind == "F32":
        return data.view("<f4")
    traits = _traits(kind)
    widen = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    out = np.empty(data.size // traits.nbytes * traits.block, np.float32)
    widen(data.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize_file(
    source: Path,
    target: Path,
    quant: str,
    *,
    n_tensors: int,
    requantize: bool,
    importance: Mapping[str, np.ndarray],
    keys: Mapping[str, int | str],
) -> None:
    """Have llama.cpp quantize a file, beside this thread.

    Args:
        source: GGUF file to read.
        target: GGUF file to write.
        quant: file type, e.g. Q4_K_M.
        n_tensors: of the source, for the progress bar.
        requantize: whether the source may be quantized already.
        importance: weight of each column by tensor, float32 (matrices, columns).
        keys: metadata to add.

    Raises:
        GgufError: llama.cpp did not do it.
    """
    llama_cpp = llama_cpp_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = quantizations()[quant], cores(), requantize
    if importance:
        params.imatrix = _importance_list(importance)
    if keys:
        params.kv_overrides = _key_list(keys)
    log.clear()
    result: list[int] = []
    worker = threading.Thread(
        target=lambda: result.append(
            llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
        ),
        daemon=True,  # Ctrl-C ends the process without waiting for it
    )
    with progress_bar(f"quantize {quant}", n_tensors, "tensors") as bar:
        worker.start()
        done = 0
        while worker.is_alive():
            worker.join(0.1)
            now = sum(1 for line in list(log) if re.match(r"\[ *\d+/ *\d+\]", line))
            bar(now - done)
            done = now
    if result != [0]:
        raise GgufError(
            f"{source}: llama.cpp did not quantize it ({last_error()})",
            f"pi-gguf inspect {source} shows what it states; or copy or convert it again",
        )


def _key_list(keys: Mapping[str, int | str]) -> Any:
    """Return llama.cpp's list of keys to add; its texts hold 127 bytes."""
    structures = llama_cpp_library().llama_cpp
    entries = (structures.llama_model_kv_override * (len(keys) + 1))()
    for entry, (key, value) in zip(entries, keys.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = structures.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag, entry.value.val_str = structures.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return entries
