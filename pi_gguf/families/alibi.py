"""MPT and BLOOM: positions are biases that grow with distance (ALiBi), so there is nothing to interpolate."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import GROUPED_QKV, Config, Family, Stated


def _bloom_keys(config: Config) -> dict[str, Any]:
    return {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "vocab_size": config.vocab_size,
    }


def _mpt_keys(config: Config) -> dict[str, Any]:
    attention = config.attn_config
    keys = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.expansion_ratio * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "attention.max_alibi_bias": float(attention.alibi_bias_max),
        "vocab_size": config.vocab_size,
    }
    if attention.clip_qkv is not None:
        keys["attention.clamp_kqv"] = float(attention.clip_qkv)
    return keys


def _bloom_fields(stated: Stated) -> dict[str, Any]:
    return {
        "n_layer": stated.whole("block_count"),
        "hidden_size": stated.whole("embedding_length"),
        "n_head": stated.whole("attention.head_count"),
        "layer_norm_epsilon": stated.number("attention.layer_norm_epsilon"),
    }


def _mpt_fields(stated: Stated) -> dict[str, Any]:
    width = stated.whole("embedding_length")
    return {
        "n_layers": stated.whole("block_count"),
        "d_model": width,
        "n_heads": stated.whole("attention.head_count"),
        "expansion_ratio": stated.whole("feed_forward_length", 4 * width) // width,
        "layer_norm_epsilon": stated.number("attention.layer_norm_epsilon"),
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(stated.number("attention.max_alibi_bias")),
            "clip_qkv": stated.number("attention.clamp_kqv", 0.0) or None,
        },
    }


BLOOM = Family(
    "bloom", "bloom", "BLOOM", _bloom_keys, {"query_key_value": GROUPED_QKV},
    {"apply_residual_connection_post_layernorm": (False,)}, alibi=True,
    rename=lambda name: name.removeprefix("transformer."), window="seq_length", default_window=2048,
    fields=_bloom_fields,
)  # fmt: skip
MPT = Family(
    "mpt", "mpt", "MPT", _mpt_keys, handles={
        "no_bias": (True,), "expansion_ratio": (4,),
        "logit_scale": (None,), "attn_config.alibi": (True,), "attn_config.qk_ln": (False,),
        "attn_config.prefix_lm": (False,), "attn_config.softmax_scale": (None,),
    }, alibi=True, window="max_seq_len", fields=_mpt_fields,
)  # fmt: skip
