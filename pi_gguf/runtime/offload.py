"""What fits: types of the KV cache that fit the memory, and layers that fit a GPU.

In: what a file states, and how many bytes are free. Out: types and numbers, and why. Nothing is opened here.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from dataclasses import dataclass

from pi_gguf.common.files import human_bytes
from pi_gguf.common.private import ggml_devices
from pi_gguf.gguf.file import GgufInfo
from pi_gguf.llamacpp.cache import CACHE_BLOCK, QUANTIZED_CACHES, head_size, is_one_tensor, predict_kv_cache
from pi_gguf.llamacpp.library import ggml_base

KV_CHOICES = (("f16", "f16"), ("q8_0", "f16"), ("q8_0", "q8_0"))
"""Types of K and V, from the exact to the small. With K in q8_0 a CPU reads long texts and writes faster; V in it needs
flash attention, which more than halves the speed of reading (benchmarks/kv_cache.json)."""

_LAYER = re.compile(r"blk\.(\d+)\.")
_GPU = 1
"""ggml's number for devices with memory of their own."""

_SPARE = 256 * 2**20
"""Bytes of a GPU left to whatever else llama.cpp and the driver take."""


@dataclass(frozen=True)
class KvChoice:
    """Types of the KV cache.

    Args:
        type_k: of K.
        type_v: of V.
        why: for people; empty where it is the exact one.
    """

    type_k: str
    type_v: str
    why: str = ""


def usual_k(info: GgufInfo, *, plain: bool) -> str:
    """Return the type of K where none is asked for, and V is of f16.

    Args:
        info: of the file.
        plain: whether a CPU computes attention, and not flash attention: scores of K in q8_0 are products of whole
            numbers there. Heads must be of whole blocks.
    """
    whole = head_size(info, "key_length") % CACHE_BLOCK == 0
    return "q8_0" if plain and whole and not is_one_tensor(info) else "f16"


def choose_kv(info: GgufInfo, n_ctx: int, free_bytes: int, *, gpu: bool, flash_attn: bool | None = None) -> KvChoice:
    """Return the usual types, or the next with which cache and weights fit; the smallest where none do.

    Args:
        info: of the file.
        n_ctx: tokens to open it for.
        free_bytes: of memory.
        gpu: whether a GPU computes.
        flash_attn: False leaves out a V in fewer bits, which needs it.
    """
    weights = sum(tensor.nbytes for tensor in info.tensors)
    fits = all(head_size(info, name) % CACHE_BLOCK == 0 for name in ("key_length", "value_length"))
    usual = usual_k(info, plain=not (gpu or flash_attn)), "f16"
    choices = [
        pair for pair in KV_CHOICES[KV_CHOICES.index(usual) :]
        if (flash_attn is not False or pair[1] not in QUANTIZED_CACHES)
        and (pair[0] == pair[1] or not is_one_tensor(info))
    ]  # fmt: skip
    choices = choices if fits else choices[:1]
    type_k, type_v = next(
        (pair for pair in choices if predict_kv_cache(info, n_ctx, *pair) + weights <= free_bytes), choices[-1]
    )
    if (type_k, type_v) == usual:
        return KvChoice(type_k, type_v)
    large, small = (predict_kv_cache(info, n_ctx, *pair) for pair in (usual, (type_k, type_v)))
    slow = "; a CPU reads at half its speed with it" if type_v in QUANTIZED_CACHES else ""
    return KvChoice(
        type_k, type_v,
        f"KV cache: K in {type_k}, V in {type_v}, {human_bytes(small)}, as {human_bytes(large)} with K in {usual[0]} "
        f"and V in f16 beside the weights do not fit the {human_bytes(free_bytes)} that are free{slow}; pi-gguf eval "
        "matrix measures what it costs",
    )  # fmt: skip


@dataclass(frozen=True)
class Offload:
    """Layers on a GPU.

    Args:
        layers: how many, the output matrix as one, counted from the last; -1 for all.
        why: for people; empty where all fit.
    """

    layers: int
    why: str = ""


def choose_layers(info: GgufInfo, n_ctx: int, kv: tuple[str, str], n_ubatch: int, free_bytes: int) -> Offload:
    """Return as many layers as fit a GPU with their part of the cache and what llama.cpp computes in.

    Args:
        info: of the file.
        n_ctx: tokens to open it for.
        kv: types of K and V.
        n_ubatch: tokens computed at a time.
        free_bytes: of the GPU's memory.
    """
    of_layer: Counter[int] = Counter()
    others = 0
    for tensor in info.tensors:
        match = _LAYER.match(tensor.name)
        if match:
            of_layer[int(match[1])] += tensor.nbytes
        elif not tensor.name.startswith("token_embd"):
            others += tensor.nbytes
    if not others or all(not t.name.startswith("output.weight") for t in info.tensors):  # the embedding is the head
        others += sum(t.nbytes for t in info.tensors if t.name.startswith("token_embd"))
    count = info.hyperparameter("block_count")
    cache = predict_kv_cache(info, n_ctx, *kv) // max(1, count)
    heads = info.hyperparameter("attention.head_count")
    computing = 4 * n_ubatch * (n_ctx * (heads + 1) + info.hyperparameter("embedding_length") * 16)
    left = free_bytes - computing - _SPARE
    sizes = [others, *(of_layer[i] + cache for i in range(count - 1, -1, -1))]
    layers = 0
    for size in sizes:
        left -= size
        if left < 0:
            break
        layers += 1
    if layers == len(sizes):
        return Offload(-1)
    need = sum(sizes) + computing + _SPARE
    return Offload(
        layers,
        f"{layers} of {len(sizes)} layers on the GPU: all, with cache and buffers, take about {human_bytes(need)}, "
        f"{human_bytes(free_bytes)} are free; a smaller --n-ctx or --kv leaves room for more",
    )


def gpu_memory() -> int | None:
    """Return the free bytes of the first GPU that llama.cpp sees, by ggml's device functions; None without one."""
    memory, devices = ggml_base(), ggml_devices()
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    devices.ggml_backend_dev_count.restype = size
    devices.ggml_backend_dev_get.argtypes, devices.ggml_backend_dev_get.restype = [size], pointer
    memory.ggml_backend_dev_type.argtypes, memory.ggml_backend_dev_type.restype = [pointer], ctypes.c_int
    memory.ggml_backend_dev_memory.argtypes = [pointer, ctypes.POINTER(size), ctypes.POINTER(size)]
    memory.ggml_backend_dev_memory.restype = None
    for number in range(devices.ggml_backend_dev_count()):
        device = devices.ggml_backend_dev_get(number)
        if memory.ggml_backend_dev_type(device) == _GPU:
            free, total = size(), size()
            memory.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            return int(free.value)
    return None
