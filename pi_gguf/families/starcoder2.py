"""StarCoder 2: layer norms, biases everywhere, plain feed-forward."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import Config, Family, Stated, common_fields, common_keys, full_attention


def _keys(config: Config) -> dict[str, Any]:
    return {**common_keys(config), "attention.layer_norm_epsilon": float(config.norm_epsilon)}


def _fields(stated: Stated) -> dict[str, Any]:
    return {**common_fields(stated), "norm_epsilon": stated.number("attention.layer_norm_epsilon")}


STARCODER2 = Family(
    "starcoder2",
    "starcoder2",
    "StarCoder 2",
    _keys,
    handles={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,), "sliding_window": full_attention},
    split_width=True,
    fields=_fields,
)
