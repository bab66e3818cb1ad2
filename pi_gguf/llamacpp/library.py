"""The only door to llama.cpp: its library, its log, ggml's own library, and calls in a thread of their own.

llama_cpp is imported here and, for what it does not show, in `common.private`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

from pi_gguf.common.private import ggml_library


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


def last_error() -> str:
    """Return the first line of the log that tells of an error, or an empty string; without breaks."""
    lines = [" ".join(line.split()) for line in log if "error" in line.lower() or "failed" in line.lower()]
    return lines[0] if lines else ""


@cache
def ggml_base() -> Any:
    """Open the library of ggml's quantizers; its functions release Python's lock."""
    llama_cpp_library()
    library = ggml_library()
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in ("ggml_bf16_to_fp32_row", "ggml_fp16_to_fp32_row"):
        getattr(library, name).argtypes, getattr(library, name).restype = [pointer, pointer, count], None
    return library


def last_line(text: str) -> str:
    """Return the line that tells why llama.cpp ended: its last assertion, else the last of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "terminate called" in line or "what():" in line]
    return re.sub(r"\S*/(?=[\w.-]+:\d+: )", "", (asserted or lines or [""])[-1])[:200]  # no folders of who compiled it
