"""Llama and what is built like it: interleaved rotation, root-mean-square norms, gated feed-forward."""

from __future__ import annotations

from pi_gguf.families.family import (
    INTERLEAVED_ROTARY,
    Family,
    Handled,
    bias_fields,
    expert_fields,
    expert_keys,
    full_attention,
    rms_fields,
    rms_keys,
)

LLAMA = Family(
    "llama", "llama", "Llama 1, 2, 3, 3.1, 3.2", rms_keys, INTERLEAVED_ROTARY, handles={"hidden_act": ("silu",)},
    fields=lambda stated: {**rms_fields(stated), **bias_fields(stated)},
)  # fmt: skip
_HANDLES: Handled = {"hidden_act": ("silu",), "sliding_window": full_attention}

MISTRAL = Family("mistral", "llama", "Mistral 7B from v0.2 on, Nemo", rms_keys, INTERLEAVED_ROTARY, _HANDLES)
MIXTRAL = Family(
    "mixtral",
    "llama",
    "Mixtral",
    lambda config: {**rms_keys(config), **expert_keys(config)},
    INTERLEAVED_ROTARY,
    _HANDLES,
    fields=lambda stated: {**rms_fields(stated), **expert_fields(stated, "num_local_experts")},
    experts=True,
)
