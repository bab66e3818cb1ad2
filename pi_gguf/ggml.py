"""The door to llama.cpp's libraries: its log, its quantization types, and the quantizer itself.

In: rows of weights as 32-bit floats, or a whole GGUF file. Out: quantized bytes, or another file. llama_cpp is imported
nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import GgufError, OptionError
from pi_gguf.files import check_free_disk, check_writable, replace_when_complete
from pi_gguf.gguf_file import read_gguf, tensor_types
from pi_gguf.progress import progress_bar, say

if TYPE_CHECKING:
    import numpy as np

NEED_IMPORTANCE_MATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
"""File types that llama.cpp writes with an importance matrix only."""

log: list[str] = []
"""What llama.cpp has said, in pieces of lines."""

_callbacks: list[Any] = []  # ctypes callbacks must outlive the library's use of them


@cache
def llama_cpp_library() -> Any:
    """Import llama_cpp, and collect what it says in `log`."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: Any) -> None:
        log.append(text.decode(errors="replace"))
        del log[:-100_000]

    _callbacks.append(collect)
    llama_cpp.llama_log_set(collect, None)
    return llama_cpp


def last_error() -> str:
    """Return the first line of the log that tells of an error, or an empty string."""
    lines = [line.strip() for line in log if "error" in line.lower() or "failed" in line.lower()]
    return lines[0] if lines else ""


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def quantizations() -> dict[str, int]:
    """Return every file type of the installed llama.cpp by name, such as `Q4_K_M`."""
    prefix = re.compile(r"LLAMA_FTYPE_(?:ALL|MOSTLY)_(\w+)")
    llama_cpp = llama_cpp_library().llama_cpp
    found = {name: prefix.fullmatch(name) for name in dir(llama_cpp)}
    return {match[1]: int(getattr(llama_cpp, name)) for name, match in found.items() if match}


def check_quantization(name: str) -> str:
    """Return `name` in upper case if llama.cpp has that quantization.

    Raises:
        OptionError: otherwise, with the list; or it needs an importance matrix.
    """
    if name.upper() not in quantizations():
        raise OptionError(f"quant must be one of {', '.join(sorted(quantizations()))}, got {name}")
    if name.upper() in NEED_IMPORTANCE_MATRIX:
        raise OptionError(
            f"quant {name}: llama.cpp writes it with an importance matrix only, which is not made here",
            "take Q2_K or a larger type",
        )
    return name.upper()


def apply_adapters(llama: Any, paths: Sequence[str | Path]) -> None:
    """Apply GGUF adapters to an opened model; llama.cpp frees them together with it.

    Args:
        llama: llama_cpp's `Llama`.
        paths: of the adapters.

    Raises:
        GgufError: a file is no adapter, or not of this model.
    """
    llama_cpp = llama_cpp_library()
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(paths))()
    for i, path in enumerate(paths):
        read_gguf(Path(path))
        log.clear()
        adapters[i] = llama_cpp.llama_adapter_lora_init(llama.model, str(path).encode())
        if not adapters[i]:
            raise GgufError(
                f"{path}: llama.cpp does not apply it to {llama.model_path} ({last_error()})",
                "it must be an adapter of this very model, written with --adapter-only",
            )
    scales = (ctypes.c_float * len(paths))(*[1.0] * len(paths))
    llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, len(paths), scales)


# Quantizing tensor by tensor


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
    result = llama_cpp.llama_model_quantize(str(header).encode(), b"", ctypes.byref(params))
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


@cache
def _ggml() -> Any:
    """Open the library of ggml's quantizers; its functions release Python's lock."""
    llama_cpp_library()
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    library = load_shared_library("ggml-base", libggml_base_path)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in ("ggml_bf16_to_fp32_row", "ggml_fp16_to_fp32_row"):
        getattr(library, name).argtypes, getattr(library, name).restype = [pointer, pointer, count], None
    return library


def quantize_rows(
    kind: str, rows: np.ndarray, dtype: str, out: np.ndarray, importance: np.ndarray | None = None
) -> None:
    """Quantize rows of weights; several threads may do so at once.

    Args:
        kind: tensor type, e.g. Q4_K.
        rows: weights (rows, columns): float32, or 16-bit floats as uint16.
        dtype: what they are: F32, F16 or BF16.
        out: uint8 of the quantized rows' size, written to.
        importance: weight of each column, float32; none when None.
    """
    import numpy as np

    library = _ggml()
    count, columns = rows.shape
    if dtype != "F32":
        widen = library.ggml_bf16_to_fp32_row if dtype == "BF16" else library.ggml_fp16_to_fp32_row
        wide = np.empty(rows.shape, np.float32)
        widen(rows.ctypes.data, wide.ctypes.data, rows.size)
        rows = wide
    weights = None if importance is None else importance.ctypes.data
    written = library.ggml_quantize_chunk(
        tensor_types()[kind], rows.ctypes.data, out.ctypes.data, 0, count, columns, weights
    )
    assert written == out.nbytes, (kind, rows.shape, written, out.nbytes)


# Quantizing a file


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    quant: str = "Q4_K_M",
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Quantize a GGUF file with llama.cpp.

    Args:
        source: GGUF file to read; best F32, F16 or BF16.
        target: GGUF file to write.
        quant: any type llama.cpp has, e.g. Q8_0, Q5_K_M or Q4_K_M.
        overwrite: replace the file that is there.
        seed: taken like everywhere; nothing is random here.
        device: taken like everywhere; llama.cpp quantizes on the CPU.

    Returns:
        The path written.

    Example:
        pi-gguf quantize model-f16.gguf model-q4_k_m.gguf --quant Q4_K_M
    """
    source, target, quant = Path(source), Path(target), check_quantization(quant)
    info = read_gguf(source)
    check_writable(target, overwrite)
    if target.exists() and target.samefile(source):
        raise OptionError(f"{target}: source and target are the same file", "give another target")
    llama_cpp = llama_cpp_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = quantizations()[quant]
    params.nthread = cores()
    params.allow_requantize = info.quantization not in ("F32", "F16", "BF16")
    if params.allow_requantize:
        say(f"note: {source} is {info.quantization} already; quantizing twice loses more than once")
    check_free_disk(target.parent, sum(t.nbytes for t in info.tensors) // 8)
    with (
        replace_when_complete(target) as partial,
        progress_bar(f"quantize {quant}", len(info.tensors), "tensors") as bar,
    ):
        log.clear()
        result: list[int] = []
        worker = threading.Thread(
            target=lambda: result.append(
                llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
            ),
            daemon=True,  # Ctrl-C ends the process without waiting for it
        )
        worker.start()
        done = 0
        while worker.is_alive():
            worker.join(0.1)
            now = sum(1 for line in list(log) if re.match(r"\[ *\d+/ *\d+\]", line))
            bar(now - done)
            done = now
        if result != [0]:
            check_free_disk(target.parent, sum(t.nbytes for t in info.tensors) // 2)
            raise GgufError(f"{source}: llama.cpp did not quantize it ({last_error()})")
    return target
