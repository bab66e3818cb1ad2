"""What a machine has: memory, cores, GPUs, and how fast these compute. This one is asked, others are of `cards`."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import psutil

from pi_gguf.common.cards import Card, parse_cards
from pi_gguf.common.progress import local_process_count, process_count
from pi_gguf.errors import OptionError

_CPU_EFFICIENCY, _AMX_EFFICIENCY, _GPU_EFFICIENCY = 0.5, 0.25, 0.35
"""Share of a plain matrix product's speed that training reaches. AMX multiplies at 0.6 to 1.1 T operations/s, and what
is done between the products does not keep up: 135 M parameters train at 0.37 of it at 2048 tokens and 0.24 at 8192
(`benchmarks/training-cpu.json`)."""

_TORCH_BY_NUMPY, _AVX512_BF16_BY_NUMPY, _AMX_BY_NUMPY = 0.88, 2.3, 3.7
"""Speed of torch's product by that of numpy's of 32-bit matrices: of such matrices on a CPU with AVX2, and of bf16 ones
on a CPU with AMX or avx512_bf16 (measured, docs/log.md)."""


@dataclass(frozen=True)
class Machine:
    """What a run is for: the machine it runs on, or one that is not here; with the others that share the run.

    Args:
        device: cpu or cuda.
        processes: all that share a run; with `cuda` one a card.
        nodes: machines, each with as many of the processes.
        card: of which each process has one; None of this machine, which is asked and measured.
    """

    device: str
    processes: int = 1
    nodes: int = 1
    card: Card | None = None

    @classmethod
    def here(cls, device: str) -> Machine:
        """Return this machine, with the processes that torchrun started."""
        processes = process_count()
        return cls(device, processes, max(1, processes // local_process_count()))

    @classmethod
    def elsewhere(cls, cards: str) -> Machine:
        """Return a machine that is not here, from words like `8xH100-80GB`.

        Raises:
            OptionError: no such cards.
        """
        nodes, each, card = parse_cards(cards)
        return cls("cuda", nodes * each, nodes, card)

    @property
    def each(self) -> int:
        """How many of the processes are on one of the machines."""
        return self.processes // self.nodes

    @property
    def name(self) -> str:
        """What it is called: cards as they are given, `this machine` of this one."""
        if self.card is None:
            return "this machine"
        return f"{f'{self.nodes}x' if self.nodes > 1 else ''}{self.each}x{self.card.name}"

    @property
    def free_bytes(self) -> int:
        """The free memory of one process."""
        if self.card:
            return self.card.free_bytes
        return free_memory(self.device) // (self.each if self.device == "cpu" else 1)

    @property
    def fast_bf16(self) -> bool:
        """Whether bf16 is faster than f32."""
        return self.card is not None or fast_bf16(self.device)

    @property
    def operations_a_second(self) -> float:
        """What one process computes in training."""
        return self.card.operations_a_second if self.card else operations_a_second(self.device)


def free_memory(device: str) -> int:
    """Return the free memory of `cpu` or `cuda`, in bytes; of a GPU no more than this process may take."""
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        left = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
        return int(min(free, left))
    return int(psutil.virtual_memory().available)


def fast_bf16(device: str) -> bool:
    """Tell whether bf16 is faster than f32 on the device."""
    if device == "cuda":
        import torch

        return bool(torch.cuda.is_bf16_supported())
    return "avx512_bf16" in _cpu_flags() or _has_amx()


def _has_amx() -> bool:
    return "amx_bf16" in _cpu_flags()


def is_another_makers_x86() -> bool:
    """Tell whether Linux says of the CPU that it is an x86 and not Intel's."""
    return "vendor_id" in _cpu_flags() and "GenuineIntel" not in _cpu_flags()


@cache
def _cpu_flags() -> str:
    """Return what Linux says of the CPU; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def efficiency(device: str) -> float:
    """Return the share of a plain matrix product's speed that training reaches."""
    if device == "cuda":
        return _GPU_EFFICIENCY
    return _AMX_EFFICIENCY if _has_amx() else _CPU_EFFICIENCY


@cache
def operations_a_second(device: str) -> float:
    """Measure a matrix product on the device for a moment, and take training's usual share of it."""
    if device == "cpu":  # without torch, whose import takes seconds
        a = np.ones((1024, 1024), dtype=np.float32)
        fast = _AMX_BY_NUMPY if _has_amx() else _AVX512_BF16_BY_NUMPY
        by_numpy = fast if fast_bf16(device) else _TORCH_BY_NUMPY
        return by_numpy * efficiency(device) * _speed(lambda: a @ a, 1024)
    import torch

    b = torch.ones(4096, 4096, dtype=torch.bfloat16 if fast_bf16(device) else torch.float32, device=device)
    return efficiency(device) * _speed(lambda: b @ b, 4096, torch.cuda.synchronize)


def _speed(product: Callable[[], object], side: int, wait: Callable[[], None] = lambda: None) -> float:
    """Return operations a second of a product of square matrices.

    Args:
        wait: until the device is done.
    """

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            product()
        wait()
        return time.perf_counter() - started

    run(3)
    return 10 * 2 * side**3 / run(10)


def _has_driver() -> bool:
    """Tell whether there is what torch needs to find a GPU: CUDA's driver, or ROCm's device."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def torch_device(device: str) -> str:
    """Return `cpu` or `cuda` for `auto`, `cpu` or `cuda`.

    Raises:
        OptionError: `cuda` and none is there, or another word.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device must be auto, cpu or cuda, got {device}")
    found = device != "cpu" and _has_driver()  # else torch, whose import takes seconds, need not be asked
    if found:
        import torch

        found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise OptionError("device cuda: torch finds no CUDA GPU", "use --device cpu")
    return "cuda" if found else "cpu"


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(device: str = "cpu") -> int | None:
    """Return the most memory so far: of a GPU by torch, otherwise of this process; None where that is not known."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
