"""Memory that is freed on a CPU is kept for what is asked for next, where the C library is glibc.

Of itself glibc gives each large block back to the system at once, which then has to clear every page of the next: of a
training step on two cores a tenth of the time and more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""What glibc's mallopt may be told (malloc.h): how much free memory stays at the end of the heap, from which size on
blocks lie outside it, and how many may."""

_LARGEST = 2**25
"""The largest such size there is: where glibc itself ends, as it raises it with every larger block that is freed."""

_open = 0


@contextmanager
def kept_heap(device: str) -> Iterator[None]:
    """Keep freed memory while this is open; then give it back. It may be opened within itself."""
    global _open
    glibc = _glibc() if device == "cpu" else None
    if glibc is None:
        yield
        return
    if _open == 0:
        glibc.mallopt(_MMAP_MAX, 0)
        glibc.mallopt(_TRIM_THRESHOLD, -1)
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if _open == 0:
            glibc.mallopt(_MMAP_MAX, 2**16)
            glibc.mallopt(_MMAP_THRESHOLD, _LARGEST)
            glibc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
            glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process, where it is glibc."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
