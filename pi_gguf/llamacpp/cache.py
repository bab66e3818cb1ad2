"""What a KV cache holds and how large it is."""

from __future__ import annotations

from pi_gguf.gguf.file import GgufInfo

CACHE_TYPES = {"f32": (0, 4.0), "f16": (1, 2.0), "q8_0": (8, 34 / 32), "q4_0": (2, 18 / 32)}
"""KV cache types: ggml's number and bytes an element."""

QUANTIZED_CACHES = ("q8_0", "q4_0")
"""Those in blocks of a head's elements."""

CACHE_BLOCK = 32
"""Elements of a block."""


def kv_cache_bytes(*, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int, type_k: str, type_v: str) -> int:
    """Return the size of the KV cache: layers x heads x head size x (bytes of K + bytes of V) x tokens."""
    per_element = CACHE_TYPES[type_k][1] + CACHE_TYPES[type_v][1]
    return int(n_layers * n_kv_heads * head_dim * per_element * n_ctx)


def predict_kv_cache(info: GgufInfo, n_ctx: int, type_k: str, type_v: str) -> int:
    """Return the bytes that the KV cache of a GGUF file takes at `n_ctx` tokens."""
    layers, name = info.hyperparameter("block_count"), "attention.head_count_kv"
    if f"{info.arch}.{name}" not in info.header.entries:
        name = "attention.head_count"
    heads, each = info.hyperparameter(name), info.header.entries[f"{info.arch}.{name}"].value
    return kv_cache_bytes(
        n_layers=1,
        n_kv_heads=sum(each) if isinstance(each, list) else layers * heads,
        head_dim=head_size(info, "key_length"),
        n_ctx=n_ctx,
        type_k=type_k,
        type_v=type_v,
    )


def head_size(info: GgufInfo, name: str) -> int:
    """Return the elements of a head, by the name of its key: key_length or value_length."""
    if f"{info.arch}.attention.{name}" in info.header.entries:
        return info.hyperparameter(f"attention.{name}")
    return info.hyperparameter("embedding_length") // info.hyperparameter("attention.head_count")


def is_one_tensor(info: GgufInfo) -> bool:
    """Tell whether keys and values are one, as in DeepSeek's latent attention: llama.cpp keeps them in one type."""
    return f"{info.arch}.attention.key_length_mla" in info.metadata or info.arch == "deepseek4"
