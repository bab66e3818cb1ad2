"""Cohere Command-R and Aya: one norm before attention and feed-forward side by side, scaled logits."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import Config, Family, Stated, common_fields, common_keys


def _keys(config: Config) -> dict[str, Any]:
    return {
        **common_keys(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "logit_scale": float(config.logit_scale),
    }


def _fields(stated: Stated) -> dict[str, Any]:
    return {
        **common_fields(stated),
        "layer_norm_eps": stated.number("attention.layer_norm_epsilon"),
        "logit_scale": stated.number("logit_scale"),
        "use_qk_norm": stated.has("attn_q_norm.weight"),
    }


COHERE = Family(
    "cohere",
    "command-r",
    "Command-R, Aya 23",
    _keys,
    handles={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_qk_norm": lambda config: (config.num_hidden_layers >= 64,),  # Command-R+ has it, and llama.cpp only there
    },
    split_width=True,
    fields=_fields,
)
