"""Qwen2 and Qwen3, dense and with experts: half-split rotation, biases on Q, K, V (2) or norms of Q and K (3)."""

from __future__ import annotations

from typing import Any

from pi_gguf.families.family import Config, Family, Stated, expert_fields, expert_keys, rms_fields, rms_keys


def _expert_keys(config: Config) -> dict[str, Any]:
    return {
        **rms_keys(config),
        **expert_keys(config),
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _shared_expert_keys(config: Config) -> dict[str, Any]:
    return {**_expert_keys(config), "expert_shared_feed_forward_length": config.shared_expert_intermediate_size}


def _expert_fields(stated: Stated) -> dict[str, Any]:
    inner = stated.whole("expert_feed_forward_length")
    return {**rms_fields(stated), **expert_fields(stated), "moe_intermediate_size": inner}


def _shared_expert_fields(stated: Stated) -> dict[str, Any]:
    return {
        **_expert_fields(stated),
        "shared_expert_intermediate_size": stated.whole("expert_shared_feed_forward_length"),
        "qkv_bias": stated.has("attn_q.bias"),
    }


_HANDLES = {"hidden_act": ("silu",), "use_sliding_window": (False,)}
_EXPERTS = {**_HANDLES, "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}

_NO_BIAS = {"attention_bias": (False,)}

QWEN2 = Family(
    "qwen2", "qwen2", "Qwen1.5, Qwen2, Qwen2.5", rms_keys, handles=_HANDLES, split_width=True, fields=rms_fields
)
QWEN2_MOE = Family(
    "qwen2_moe", "qwen2moe", "Qwen1.5-MoE, Qwen2-57B-A14B", _shared_expert_keys,
    handles={**_EXPERTS, "norm_topk_prob": (False,)}, split_width=True, needs_head=True,
    fields=_shared_expert_fields, experts=True,
)  # fmt: skip
QWEN3 = Family("qwen3", "qwen3", "Qwen3", rms_keys, handles={**_HANDLES, **_NO_BIAS}, fields=rms_fields)
QWEN3_MOE = Family(
    "qwen3_moe", "qwen3moe", "Qwen3-30B-A3B, Qwen3-235B-A22B", _expert_keys,
    handles={**_EXPERTS, **_NO_BIAS, "norm_topk_prob": (True,)}, fields=_expert_fields, experts=True,
)  # fmt: skip
