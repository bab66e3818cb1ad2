"""OLMo 1 (norms without weights), 2 (norms after the layers) and OLMoE (experts)."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import INTERLEAVED_ROTARY, Config, Family, common_keys, expert_keys, rms_keys


def _clamp(config: Config) -> dict[str, Any]:
    return {} if config.clip_qkv is None else {"attention.clamp_kqv": float(config.clip_qkv)}


def _olmo_keys(config: Config) -> dict[str, Any]:
    return {**common_keys(config), "attention.layer_norm_epsilon": 1e-5, **_clamp(config)}


_HANDLES = {"hidden_act": ("silu",), "attention_bias": (False,)}
OLMO = Family("olmo", "olmo", "OLMo 1", _olmo_keys, INTERLEAVED_ROTARY, _HANDLES, split_width=True)
OLMO2 = Family("olmo2", "olmo2", "OLMo 2", rms_keys, handles=_HANDLES, split_width=True, needs_head=True)
OLMOE = Family(
    "olmoe", "olmoe", "OLMoE", lambda config: {**rms_keys(config), **expert_keys(config)},
    handles={**_HANDLES, "clip_qkv": (None,), "norm_topk_prob": (False,),
             "num_key_value_heads": lambda config: (config.num_attention_heads,)},
    split_width=True, needs_head=True,
)  # fmt: skip
