"""GPT-NeoX, Pythia: Q, K and V alternate head by head in one matrix; partial rotation; parallel residual."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import Config, Family, common_keys, ungroup_qkv


def _keys(config: Config) -> dict[str, Any]:
    return {
        **common_keys(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "use_parallel_residual": bool(config.use_parallel_residual),
    }


GPT_NEOX = Family(
    "gpt_neox", "gptneox", "GPT-NeoX, Pythia", _keys, {"query_key_value": ungroup_qkv},
    {"hidden_act": ("gelu",), "attention_bias": (True,)}, split_width=True, needs_head=True,
)  # fmt: skip
