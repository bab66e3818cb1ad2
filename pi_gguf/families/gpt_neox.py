"""GPT-NeoX, Pythia: Q, K and V alternate head by head in one matrix; partial rotation; parallel residual."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import GROUPED_QKV, Config, Family, Stated, common_fields, common_keys


def _keys(config: Config) -> dict[str, Any]:
    return {
        **common_keys(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "use_parallel_residual": bool(config.use_parallel_residual),
    }


def _fields(stated: Stated) -> dict[str, Any]:
    fields = {name: value for name, value in common_fields(stated).items() if name != "num_key_value_heads"}
    return {
        **fields,
        "layer_norm_eps": stated.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": stated.flag("use_parallel_residual", True),
    }


GPT_NEOX = Family(
    "gpt_neox", "gptneox", "GPT-NeoX, Pythia", _keys, {"query_key_value": GROUPED_QKV},
    {"hidden_act": ("gelu",), "attention_bias": (True,)}, split_width=True, needs_head=True, fields=_fields,
)  # fmt: skip
