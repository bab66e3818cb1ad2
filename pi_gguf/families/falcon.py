"""Falcon: one key-value head (7B) or several groups (new decoder); Q, K and V come group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pi_gguf.families.family import Config, Family, common_keys

if TYPE_CHECKING:
    import torch


def _kv_heads(config: Config) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _keys(config: Config) -> dict[str, Any]:
    return {
        **common_keys(config, feed_forward=config.ffn_hidden_size),
        "attention.head_count_kv": _kv_heads(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _ungroup(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Turn groups of (queries of the group, key, value) into all queries, all keys, all values."""
    import torch

    groups, size, rest = _kv_heads(config), config.hidden_size // config.num_attention_heads, tensor.shape[1:]
    qkv = tensor.reshape(groups, -1, size, *rest)
    return torch.cat([part.reshape(-1, *rest) for part in (qkv[:, :-2], qkv[:, -2], qkv[:, -1])])


FALCON = Family(
    "falcon", "falcon", "Falcon 7B, 40B, 180B", _keys, {"query_key_value": _ungroup},
    {"alibi": (False,), "bias": (False,), "parallel_attn": (True,), "activation": ("gelu",)}, default_window=2048,
)  # fmt: skip
