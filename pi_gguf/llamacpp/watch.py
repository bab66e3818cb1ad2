"""See what a model multiplies its weights with, or where it looks, while llama.cpp evaluates it."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import numpy as np

from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import tensor_types
from pi_gguf.llamacpp.library import ggml_base, llama_cpp_library


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
    library = ggml_base()
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
            f"the installed llama.cpp lays out a tensor's {', '.join(wrong)} otherwise than it is read here",
            "install the llama-cpp-python of constraints.txt",
        )
    return products


class Watch(ABC):
    """Sees results while llama.cpp evaluates a model.

    Raises:
        OptionError: the installed llama.cpp is laid out otherwise.
    """

    def __init__(self) -> None:
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
            return self._result(address, ask)
        except BaseException as error:  # nothing may pass through llama.cpp's own code
            self._error, self.stopping = error, True
            return ask

    @abstractmethod
    def _result(self, address: int, ask: bool) -> bool:
        """Tell whether a result is of interest, and see it when it is there, that is, without `ask`."""


Receive = Callable[[str, "np.ndarray", "np.ndarray | None", int], None]


class ProductWatch(Watch):
    """Sees what a model multiplies its weights with.

    Args:
        names: weights to watch, by their names in the file.
        receive: called for each product with the weight's name; its inputs, float32 (tokens, slots, columns); for a
            weight of several matrices which of them each took, int (tokens, used), where the k-th has the input of
            slot k modulo the slots, None for a single matrix; and how many matrices there are.
    """

    def __init__(self, names: Container[str], receive: Receive) -> None:
        super().__init__()
        self._names, self._receive = names, receive

    def _result(self, address: int, ask: bool) -> bool:
        result = _Tensor.from_address(address)
        if result.op not in (self._one, self._chosen):
            return False
        weight = _Tensor.from_address(result.src[0])
        name = _weight_name(weight.name.decode(errors="replace"))
        if name not in self._names:
            return False
        if not ask:
            self._see(name, result, weight)
        return True

    def _see(self, name: str, result: _Tensor, weight: _Tensor) -> None:
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


class ScoreWatch(Watch):
    """Sees where the heads of a model look; without flash attention only, which makes no scores.

    Args:
        receive: called for each layer with its attention, float32 (heads, tokens, places of the cache); each row adds
            up to one, or to less where a head may look nowhere.
    """

    def __init__(self, receive: Callable[[np.ndarray], None]) -> None:
        super().__init__()
        self._receive = receive

    def _result(self, address: int, ask: bool) -> bool:
        name = _Tensor.from_address(address).name
        if not name.startswith(b"kq_soft_max"):
            return False
        if not ask:
            self._receive(_values(address, np.dtype(np.float32), "F32", name.decode(errors="replace"))[0])
        return True


def _values(address: int, dtype: np.dtype[Any], kind: str, name: str) -> np.ndarray:
    """Return a tensor's values from wherever they lie, in four dimensions, the fastest last."""
    tensor, library = _Tensor.from_address(address), ggml_base()
    if tensor.type != tensor_types()[kind]:
        raise GgufError(f"{name}: llama.cpp multiplies it with values that are not {kind}", "take an F16 or F32 file")
    data = np.empty(library.ggml_nbytes(address), np.uint8)
    library.ggml_backend_tensor_get(address, data.ctypes.data, 0, data.nbytes)
    return np.ndarray(tuple(tensor.ne)[::-1], dtype, data, strides=tuple(tensor.nb)[::-1])


def _weight_name(name: str) -> str:
    """Return the name in the file: a copy on another device is DEVICE#NAME#NUMBER."""
    return name.split("#")[1] if "#" in name else name
