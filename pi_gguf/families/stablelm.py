"""StableLM: layer norms, partial rotation, optional norms of each head of Q and K."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import Config, Family, Stated, common_fields, common_keys


def _keys(config: Config) -> dict[str, Any]:
    return {
        **common_keys(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "use_parallel_residual": bool(config.use_parallel_residual),
    }


def _fields(stated: Stated) -> dict[str, Any]:
    return {
        **common_fields(stated),
        "layer_norm_eps": stated.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": stated.flag("use_parallel_residual", not stated.has("ffn_norm.weight")),
        "use_qkv_bias": stated.has("attn_q.bias"),
        "qk_layernorm": stated.has("attn_q_norm.weight"),
    }


STABLELM = Family(
    "stablelm",
    "stablelm",
    "StableLM 2, 3B",
    _keys,
    handles={"hidden_act": ("silu",)},
    split_width=True,
    needs_head=True,
    fields=_fields,
)
