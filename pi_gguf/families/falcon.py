"""Falcon: one key-value head (7B) or several groups (new decoder); Q, K and V come group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pi_gguf.families.family import Config, Family, Stated, Transform, common_fields, common_keys

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


def _fields(stated: Stated) -> dict[str, Any]:
    fields = common_fields(stated)
    heads, groups, norms = (
        fields["num_attention_heads"],
        fields["num_key_value_heads"],
        1 + stated.has("attn_norm_2.weight"),
    )
    new = norms == 2 or groups not in (1, heads)
    return {
        "num_hidden_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": heads,
        "new_decoder_architecture": new,
        "multi_query": groups == 1,
        "layer_norm_epsilon": stated.number("attention.layer_norm_epsilon"),
        **({"num_kv_heads": groups, "num_ln_in_parallel_attn": norms} if new else {}),
    }


def _ungroup(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Turn groups of (queries of the group, key, value) into all queries, all keys, all values."""
    import torch

    groups, size, rest = _kv_heads(config), config.hidden_size // config.num_attention_heads, tensor.shape[1:]
    qkv = tensor.reshape(groups, -1, size, *rest)
    return torch.cat([part.reshape(-1, *rest) for part in (qkv[:, :-2], qkv[:, -2], qkv[:, -1])])


def _group(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Undo `_ungroup`."""
    import torch

    groups, size, rest = _kv_heads(config), config.hidden_size // config.num_attention_heads, tensor.shape[1:]
    heads = tensor.reshape(-1, size, *rest)
    queries = heads[: -2 * groups].reshape(groups, -1, size, *rest)
    keys, values = heads[-2 * groups :].reshape(2, groups, 1, size, *rest)
    return torch.cat([queries, keys, values], 1).reshape(tensor.shape)


FALCON = Family(
    "falcon", "falcon", "Falcon 7B, 40B, 180B", _keys, {"query_key_value": Transform(_ungroup, _group)},
    {"alibi": (False,), "bias": (False,), "parallel_attn": (True,), "activation": ("gelu",)}, default_window=2048,
    fields=_fields,
)  # fmt: skip
