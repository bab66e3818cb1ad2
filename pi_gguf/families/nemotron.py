"""Nemotron 3, Minitron: layer norms with weights around zero, squared ReLU, partial rotation."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import NORM_PLUS_ONE, Config, Family, Stated, bias_fields, common_fields, common_keys


def _keys(config: Config) -> dict[str, Any]:
    return {**common_keys(config), "attention.layer_norm_epsilon": float(config.norm_eps)}


def _fields(stated: Stated) -> dict[str, Any]:
    epsilon = stated.number("attention.layer_norm_epsilon")
    return {**common_fields(stated), **bias_fields(stated), "norm_eps": epsilon}


NEMOTRON = Family(
    "nemotron", "nemotron", "Nemotron 3, Minitron", _keys, NORM_PLUS_ONE, {"hidden_act": ("relu2",)},
    split_width=True, needs_head=True, fields=_fields,
)  # fmt: skip
