"""The door to llama.cpp's libraries: its log, its quantization types, the quantizer, and what a model multiplies.

In: rows of weights as 32-bit floats, or a whole GGUF file. Out: quantized bytes, or another file. llama_cpp is imported
nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.common.machine import cores
from pi_gguf.common.private import ggml_library
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import tensor_types

if TYPE_CHECKING:
    import numpy as np

UNQUANTIZED = ("F32", "F16", "BF16")

NEED_IMPORTANCE_MATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
"""File types that llama.cpp writes with an importance matrix only."""

TENSORS_NEED_IMPORTANCE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
"""Types of a single tensor for which the same holds."""


class NativePath(str):
    """A path as the file system's bytes, where llama_cpp encodes a text: not every name of a file is UTF-8."""

    __slots__ = ()

    def encode(self, *_: str) -> bytes:
        return os.fsencode(str(self))


log: list[str] = []
"""What llama.cpp has said, in pieces of lines."""

_callbacks: list[Any] = []  # ctypes callbacks must outlive the library's use of them


@cache
def llama_cpp_library() -> Any:
    """Import llama_cpp, and collect what it says in `log`."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # children that look for a debugger outlive what they look at
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: Any) -> None:
        log.append(text.decode(errors="replace"))
        del log[:-100_000]
        if text.startswith((b"CUDA error", b"ROCm error")):  # the process ends with it, and the log with the process
            sys.stderr.write(log[-1])

    _callbacks.append(collect)
    llama_cpp.llama_log_set(collect, None)
    return llama_cpp


def compute(function: Callable[..., Any], *arguments: Any, interrupted: Callable[[], None] = lambda: None) -> Any:
    """Call what computes in llama.cpp, in the one thread where nothing else does, and return what it returns.

    llama.cpp configures the tiles of a CPU with AMX once a thread, torch leaves another configuration behind its
    products in 16 bits: where both take turns in a thread, llama.cpp dies or computes nonsense.

    Args:
        interrupted: called before waiting for the end of what runs, when this thread is interrupted; llama.cpp is never
            left while it computes.
    """
    running = _computing_thread().submit(function, *arguments)
    try:
        return running.result()
    except BaseException:
        interrupted()
        while not running.done():
            with contextlib.suppress(KeyboardInterrupt):
                wait([running])
        raise


@cache
def _computing_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "llama.cpp")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_computing_thread.cache_clear)  # threads are not forked along


def open_llama(path: str | Path, *, fast_buffers: bool, watch: ProductWatch | None = None, **options: Any) -> Any:
    """Open a file with llama-cpp-python's `Llama`, without its chat templates: it compiles each as soon as it opens.

    Args:
        fast_buffers: whether weights are held in the forms that are fast on this CPU; `Llama` has no argument for it.
        watch: sees what the weights are multiplied with; nor for this.
        options: as `Llama` has them.
    """

    class Llama(llama_cpp_library().Llama):  # type: ignore[misc]
        @property
        def model_params(self) -> Any:
            return self._model_params

        @model_params.setter
        def model_params(self, params: Any) -> None:
            params.use_extra_bufts = fast_buffers
            self._model_params = params

        @property
        def context_params(self) -> Any:
            return self._context_params

        @context_params.setter
        def context_params(self, params: Any) -> None:
            if watch:
                params.cb_eval = watch.callback
            self._context_params = params

        @property
        def metadata(self) -> dict[str, str]:
            return self._metadata

        @metadata.setter
        def metadata(self, metadata: dict[str, str]) -> None:
            self._metadata = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.chat_template")}

    return Llama(NativePath(path), **options)


def last_error() -> str:
    """Return the first line of the log that tells of an error, or an empty string; without breaks."""
    lines = [" ".join(line.split()) for line in log if "error" in line.lower() or "failed" in line.lower()]
    return lines[0] if lines else ""


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
        log.clear()
        adapters[i] = llama_cpp.llama_adapter_lora_init(llama.model, os.fsencode(path))
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


@cache
def _ggml() -> Any:
    """Open the library of ggml's quantizers; its functions release Python's lock."""
    llama_cpp_library()
    library = ggml_library()
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


# Watching what a model multiplies


class _Tensor(ctypes.Structure):
    """ggml's own record of a tensor, which no function of the library reads whole; `_products` compares the two."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_OBJECT_BYTES = 32
"""What ggml keeps beside each tensor."""


@cache
def _products() -> tuple[int, int]:
    """Return ggml's numbers of the product with a matrix and of that with chosen ones.

    Raises:
        OptionError: the installed library lays tensors out otherwise than `_Tensor`.
    """
    library = _ggml()
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_init.argtypes, library.ggml_init.restype = [_InitParams], pointer
    library.ggml_free.argtypes, library.ggml_free.restype = [pointer], None
    for name, arguments in {
        "ggml_new_tensor_2d": [pointer, ctypes.c_int, count, count],
        "ggml_new_tensor_3d": [pointer, ctypes.c_int, count, count, count],
        "ggml_mul_mat": [pointer] * 3,
        "ggml_mul_mat_id": [pointer] * 4,
        "ggml_transpose": [pointer] * 2,
        "ggml_set_name": [pointer, ctypes.c_char_p],
        "ggml_get_name": [pointer],
        "ggml_get_data": [pointer],
    }.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, pointer
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes, library.ggml_nbytes.restype = [pointer], ctypes.c_size_t
    library.ggml_op_name.argtypes, library.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    library.ggml_backend_tensor_get.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_backend_tensor_get.restype = None

    context = library.ggml_init(_InitParams(2**16, None, False))
    types = tensor_types()
    weights = library.ggml_new_tensor_3d(context, types["F32"], 5, 3, 2)
    inputs = library.ggml_new_tensor_3d(context, types["F32"], 5, 2, 4)
    chosen = library.ggml_new_tensor_2d(context, types["I32"], 2, 4)
    plain = library.ggml_mul_mat(context, weights, inputs)
    expert = library.ggml_mul_mat_id(context, weights, inputs, chosen)
    turned = library.ggml_transpose(context, weights)
    label = b"n" * 63
    library.ggml_set_name(weights, label)
    w, i, p, e, t = (_Tensor.from_address(a) for a in (chosen, inputs, plain, expert, turned))
    n = _Tensor.from_address(weights)
    fits = {
        "size": ctypes.sizeof(_Tensor) + _OBJECT_BYTES == library.ggml_tensor_overhead(),
        "type": (n.type, w.type) == (types["F32"], types["I32"]),
        "ne": (list(n.ne), list(i.ne)) == ([5, 3, 2, 1], [5, 2, 4, 1]),
        "nb": (list(n.nb), list(t.nb)) == ([4, 20, 60, 120], [20, 4, 60, 120]),
        "src": (p.src[0], p.src[1], e.src[2], p.src[2]) == (weights, inputs, chosen, None),
        "view_src": t.view_src == weights,
        "data": n.data is not None and n.data == library.ggml_get_data(weights),
        "name": n.name == label and weights + _Tensor.name.offset == library.ggml_get_name(weights),
        "op": [library.ggml_op_name(x.op) if 0 < x.op < 64 else None for x in (p, e)] == [b"MUL_MAT", b"MUL_MAT_ID"],
    }
    products = (p.op, e.op)
    library.ggml_free(context)
    wrong = [field for field, fit in fits.items() if not fit]
    if wrong:
        raise OptionError(
            f"imatrix: the installed llama.cpp lays out a tensor's {', '.join(wrong)} otherwise than it is read here",
            "install the llama-cpp-python of constraints.txt",
        )
    return products


Receive = Callable[[str, "np.ndarray", "np.ndarray | None", int], None]


class ProductWatch:
    """Sees what a model multiplies its weights with, while llama.cpp evaluates it.

    Args:
        names: weights to watch, by their names in the file.
        receive: called for each product with the weight's name; its inputs, float32 (tokens, slots, columns); for a
            weight of several matrices which of them each took, int (tokens, used), where the k-th has the input of
            slot k modulo the slots, None for a single matrix; and how many matrices there are.

    Raises:
        OptionError: the installed llama.cpp is laid out otherwise.
    """

    def __init__(self, names: Container[str], receive: Receive) -> None:
        self._names, self._receive = names, receive
        self._one, self._chosen = _products()
        self._error: BaseException | None = None
        self.stopping = False
        """Set it, and llama.cpp leaves out the rest of what it computes."""
        self.callback = llama_cpp_library().llama_cpp.ggml_backend_sched_eval_callback(self._called)

    def check(self) -> None:
        """Raise what went wrong inside llama.cpp's call."""
        if self._error is not None:
            raise self._error

    def _called(self, address: int, ask: bool, _: Any) -> bool:
        """Answer llama.cpp: first, whether a result is of interest; then, when it is there, whether to go on."""
        if self.stopping:
            return ask
        try:
            result = _Tensor.from_address(address)
            if result.op not in (self._one, self._chosen):
                return False
            weight = _Tensor.from_address(result.src[0])
            name = _weight_name(weight.name.decode(errors="replace"))
            if name not in self._names:
                return False
            if not ask:
                self._see(name, result, weight)
        except BaseException as error:  # nothing may pass through llama.cpp's own code
            self._error, self.stopping = error, True
            return ask
        return True

    def _see(self, name: str, result: _Tensor, weight: _Tensor) -> None:
        import numpy as np

        inputs = _values(result.src[1], np.dtype(np.float32), "F32", name)
        matrices = weight.ne[2] * weight.ne[3]
        columns = inputs.shape[-1]
        if result.op == self._chosen:
            self._receive(name, inputs[0], _values(result.src[2], np.dtype(np.int32), "I32", name)[0, 0], matrices)
        elif matrices == 1:
            self._receive(name, inputs.reshape(-1, 1, columns), None, 1)
        else:
            outer, inner, tokens, _ = inputs.shape
            matrix = (np.arange(outer)[:, None] % weight.ne[3]) * weight.ne[2] + np.arange(inner) % weight.ne[2]
            slots = inputs.transpose(2, 0, 1, 3).reshape(tokens, outer * inner, columns)
            self._receive(name, slots, np.broadcast_to(matrix.reshape(-1), slots.shape[:2]), matrices)


def _values(address: int, dtype: np.dtype[Any], kind: str, name: str) -> np.ndarray:
    """Return a tensor's values from wherever they lie, in four dimensions, the fastest last."""
    import numpy as np

    tensor, library = _Tensor.from_address(address), _ggml()
    if tensor.type != tensor_types()[kind]:
        raise GgufError(f"{name}: llama.cpp multiplies it with values that are not {kind}", "take an F16 or F32 file")
    data = np.empty(library.ggml_nbytes(address), np.uint8)
    library.ggml_backend_tensor_get(address, data.ctypes.data, 0, data.nbytes)
    return np.ndarray(tuple(tensor.ne)[::-1], dtype, data, strides=tuple(tensor.nb)[::-1])


def _weight_name(name: str) -> str:
    """Return the name in the file: a copy on another device is DEVICE#NAME#NUMBER."""
    return name.split("#")[1] if "#" in name else name
