"""Granite 3: a Llama with four multipliers."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import INTERLEAVED_ROTARY, Config, Family, rms_keys


def _keys(config: Config) -> dict[str, Any]:
    return {
        **rms_keys(config),
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


GRANITE = Family(
    "granite", "granite", "Granite 3", _keys, INTERLEAVED_ROTARY, {"hidden_act": ("silu",)}, rope_finetuned=True
)
