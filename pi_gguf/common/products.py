"""Matrix products of torch in 32 bits on CPUs that are not Intel's.

torch multiplies by Intel's MKL, which takes slower code on other makers' CPUs: on an AMD with AVX2 two thirds of the
speed of oneDNN, which torch carries as well. While `fast_products` is open, oneDNN multiplies what it is faster at.
Values are those of torch to rounding, and the same from run to run.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from pi_gguf.common.machine import is_another_makers_x86
from pi_gguf.common.private import onednn_product

if TYPE_CHECKING:
    import torch

_LEAST = 2**26
"""Multiplications of the smallest product that is worth it: a smaller one gains less than half a millisecond, and
oneDNN takes some 15 MB for itself."""

_lock, _open = threading.Lock(), 0


@contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Multiply by oneDNN where torch has it and MKL is slow; else change nothing. It may be opened within itself."""
    global _open
    if device != "cpu" or not is_another_makers_x86():
        yield
        return
    import torch

    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        yield
        return
    with _lock:
        _register()
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1


@cache
def _register() -> Any:
    """Put our products in the place of torch's on the CPU, for good; while none is open, they hand on to torch's."""
    import torch

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one already, which is what is wanted
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    return library


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b, of (m, k) and (k, n)."""
    import torch

    if _suits(a, b):
        return onednn_product(a, b, None)
    return torch.mm(a, b, out=a.new_empty(0))


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
    """Return beta bias + alpha a b; bias of (n) or what spreads to (m, n)."""
    import torch

    plain = beta == alpha == 1 and bias.dtype == a.dtype and bias.shape == b.shape[1:] and bias.is_contiguous()
    if plain and _suits(a, b):
        return onednn_product(a, b, bias)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))


def _suits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN is faster: it would copy a transposed a."""
    import torch

    if not (_open and a.dtype == b.dtype == torch.float32 and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]):
        return False
    dense = a.is_contiguous() and (b.is_contiguous() or b.t().is_contiguous())
    return dense and a.shape[0] * b.numel() >= _LEAST
