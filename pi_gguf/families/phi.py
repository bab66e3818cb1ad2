"""Phi: 1.5 and 2 with layer norms and partial rotation; 3 and later with fused projections, which GGUF keeps fused."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import (
    Config,
    Family,
    Stated,
    common_fields,
    common_keys,
    full_attention,
    rms_fields,
    rms_keys,
)


def _phi_keys(config: Config) -> dict[str, Any]:
    return {**common_keys(config), "attention.layer_norm_epsilon": float(config.layer_norm_eps)}


def _phi3_keys(config: Config) -> dict[str, Any]:
    return {**rms_keys(config), "attention.sliding_window": config.sliding_window or 0}


def _phi_fields(stated: Stated) -> dict[str, Any]:
    return {**common_fields(stated), "layer_norm_eps": stated.number("attention.layer_norm_epsilon")}


def _phi3_fields(stated: Stated) -> dict[str, Any]:
    return {**rms_fields(stated), "sliding_window": stated.keys.get("attention.sliding_window") or None}


PHI = Family(
    "phi",
    "phi2",
    "Phi 1, 1.5, 2",
    _phi_keys,
    handles={"qk_layernorm": (False,), "hidden_act": ("gelu_new", "gelu_pytorch_tanh", "gelu")},
    split_width=True,
    needs_head=True,
    fields=_phi_fields,
)
PHI3 = Family(
    "phi3",
    "phi3",
    "Phi 3, 3.5, 4",
    _phi3_keys,
    handles={"hidden_act": ("silu",), "sliding_window": full_attention},
    longrope_only=True,
    split_width=True,
    fields=_phi3_fields,
)
