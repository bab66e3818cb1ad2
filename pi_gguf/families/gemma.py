"""Gemma 1, 2 and 3 (text): norm weights around zero, tied embeddings, soft caps (2), sliding layers (2, 3)."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import NORM_PLUS_ONE, Config, Family, Stated, rms_fields, rms_keys


def _gemma2_keys(config: Config) -> dict[str, Any]:
    return {
        **rms_keys(config),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3_keys(config: Config) -> dict[str, Any]:
    keys = {**rms_keys(config), "attention.sliding_window": config.sliding_window}
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _gemma2_fields(stated: Stated) -> dict[str, Any]:
    return {
        **rms_fields(stated),
        "attn_logit_softcapping": stated.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": stated.number("final_logit_softcapping", 30.0),
        "sliding_window": stated.whole("attention.sliding_window"),
    }


def _gemma3_fields(stated: Stated) -> dict[str, Any]:
    fields = {**rms_fields(stated), "sliding_window": stated.whole("attention.sliding_window")}
    cap = stated.number("final_logit_softcapping", 0.0)
    return {**fields, "final_logit_softcapping": cap or None}


_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def _attention_scale(layers_of_27b: int) -> Any:
    """llama.cpp has no key for `query_pre_attn_scalar`: it is the head size, but for the model of 27 billion."""
    return lambda config: (
        config.hidden_size // config.num_attention_heads
        if config.num_hidden_layers == layers_of_27b
        else config.head_dim,
    )


def _full_every(n: int) -> Any:
    """Every n-th layer sees the whole window, the others slide; llama.cpp knows no other pattern."""
    return lambda config: (
        ["sliding_attention" if (i + 1) % n else "full_attention" for i in range(config.num_hidden_layers)],
    )


def _positive(name: str) -> Any:
    """llama.cpp caps what Gemma 2 computes in any case."""
    return lambda config: (getattr(config, name) or "a positive number",)


_GELU = ("gelu_pytorch_tanh", "gelu")

GEMMA = Family(
    "gemma", "gemma", "Gemma, CodeGemma", rms_keys, NORM_PLUS_ONE,
    {"hidden_act": _GELU, "attention_bias": (False,)}, fields=rms_fields,
)  # fmt: skip
GEMMA2 = Family(
    "gemma2", "gemma2", "Gemma 2", _gemma2_keys, NORM_PLUS_ONE,
    {
        "query_pre_attn_scalar": _attention_scale(_GEMMA2_27B_LAYERS),
        "layer_types": _full_every(2),
        "hidden_activation": _GELU,
        "attn_logit_softcapping": _positive("attn_logit_softcapping"),
        "final_logit_softcapping": _positive("final_logit_softcapping"),
        "attention_bias": (False,),
    },
    fields=_gemma2_fields,
)  # fmt: skip
GEMMA3 = Family(
    "gemma3_text", "gemma3", "Gemma 3, text", _gemma3_keys, NORM_PLUS_ONE,
    {
        "query_pre_attn_scalar": _attention_scale(_GEMMA3_27B_LAYERS),
        "layer_types": _full_every(6),
        "hidden_activation": _GELU,
        "attn_logit_softcapping": (None,),
        "attention_bias": (False,),
    },
    fields=_gemma3_fields,
)  # fmt: skip
