"""Granite 3: a Llama with four multipliers."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import INTERLEAVED_ROTARY, Config, Family, Stated, bias_fields, rms_fields, rms_keys


def _keys(config: Config) -> dict[str, Any]:
    return {
        **rms_keys(config),
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _fields(stated: Stated) -> dict[str, Any]:
    fields = rms_fields(stated)
    return {
        **fields,
        **bias_fields(stated),
        "attention_multiplier": stated.number("attention.scale", 0.0) or fields["head_dim"] ** -0.5,
        "embedding_multiplier": stated.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": stated.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": stated.number("logit_scale", 0.0) or 1.0,
    }


GRANITE = Family(
    "granite", "granite", "Granite 3", _keys, INTERLEAVED_ROTARY, {"hidden_act": ("silu",)}, rope_finetuned=True,
    fields=_fields,
)  # fmt: skip
