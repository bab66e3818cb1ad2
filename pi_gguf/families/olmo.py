"""OLMo 1 (norms without weights), 2 (norms after the layers) and OLMoE (experts)."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import (
    INTERLEAVED_ROTARY,
    Config,
    Family,
    Stated,
    common_fields,
    common_keys,
    expert_fields,
    expert_keys,
    rms_fields,
    rms_keys,
)


def _clamp(config: Config) -> dict[str, Any]:
    return {} if config.clip_qkv is None else {"attention.clamp_kqv": float(config.clip_qkv)}


def _olmo_keys(config: Config) -> dict[str, Any]:
    return {**common_keys(config), "attention.layer_norm_epsilon": 1e-5, **_clamp(config)}


def _olmo_fields(stated: Stated) -> dict[str, Any]:
    return {**common_fields(stated), "clip_qkv": stated.number("attention.clamp_kqv", 0.0) or None}


_HANDLES = {"hidden_act": ("silu",), "attention_bias": (False,)}
OLMO = Family("olmo", "olmo", "OLMo 1", _olmo_keys, INTERLEAVED_ROTARY, _HANDLES, split_width=True, fields=_olmo_fields)
OLMO2 = Family(
    "olmo2", "olmo2", "OLMo 2", rms_keys, handles=_HANDLES, split_width=True, needs_head=True, fields=rms_fields
)
OLMOE = Family(
    "olmoe", "olmoe", "OLMoE", lambda config: {**rms_keys(config), **expert_keys(config)},
    handles={**_HANDLES, "clip_qkv": (None,), "norm_topk_prob": (False,),
             "num_key_value_heads": lambda config: (config.num_attention_heads,)},
    split_width=True, needs_head=True, experts=True,
    fields=lambda stated: {**rms_fields(stated), **expert_fields(stated)},
)  # fmt: skip
