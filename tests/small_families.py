"""A small random model of each family, of odd shapes, saved by transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from helpers import make_tokenizer

WINDOW = 640


COMMON = {
    "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 410, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    "max_position_embeddings": WINDOW, "initializer_range": 0.2,
}  # fmt: skip


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 7},
    "phi": {},
    "phi3": {"original_max_position_embeddings": WINDOW},
    "falcon": {"multi_query": True, "intermediate_size": None, "num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "stablelm": {},
    "olmo": {"clip_qkv": 1.5},
    "olmo2": {},
    "olmoe": {**EXPERTS, "num_key_value_heads": 4},
    "granite": {
        "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0,
    },
    "cohere": {"logit_scale": 0.5},
    "starcoder2": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 5},
    "glm4": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "expansion_ratio": 4, "max_seq_len": WINDOW},
    "bloom": {"n_layer": 3, "n_head": 4},
}  # fmt: skip


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SHAPES},
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm, norms of heads, parallel": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "phi3, sliding beyond the window": ("phi3", {"sliding_window": 4 * WINDOW}),
    "gemma, erf": ("gemma", {"hidden_act": "gelu"}),
    "starcoder2, sliding beyond the window": ("starcoder2", {"sliding_window": 4 * WINDOW}),
    "stablelm, half rotated": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox, sequential residual": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, groups of heads that it has not": ("gpt_neox", {"num_key_value_heads": 2}),
}


FREE_HEADS = {
    "llama",
    "mistral",
    "mixtral",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "smollm3",
    "glm4",
}
ALWAYS_TIED = {"gemma", "gemma2", "cohere"}
BIASES = {
    "llama": ("attention_bias", "mlp_bias"), "granite": ("attention_bias", "mlp_bias"), "glm4": ("attention_bias",),
    "nemotron": ("attention_bias", "mlp_bias"), "stablelm": ("use_qkv_bias",), "qwen2_moe": ("qkv_bias",),
}  # fmt: skip
SHARES = {
    "phi": (0.5, 0.75),
    "phi3": (1.0, 0.5),
    "gpt_neox": (0.25, 1.0),
    "stablelm": (0.25, 0.5),
    "nemotron": (0.5, 1.0),
}
SEEDS = (1, 2)


def odd_shape(family: str, seed: int) -> dict[str, Any]:
    """Return sizes that no real model has, at random: what a family allows of ties, biases, heads, experts, shares."""
    draw = random.Random(f"{family} {seed}")
    heads, size = draw.choice([2, 3, 5, 6]), draw.choice([16, 24, 40])
    groups = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    tied = True if family in ALWAYS_TIED else draw.random() < 0.5
    if family == "mpt":
        return {"d_model": heads * 16, "n_heads": heads, "n_layers": 2, "tie_word_embeddings": tied}
    if family == "bloom":
        return {"hidden_size": heads * size, "n_head": heads, "n_layer": 2, "tie_word_embeddings": tied}
    shape: dict[str, Any] = {
        "hidden_size": heads * size, "num_attention_heads": heads, "num_key_value_heads": groups,
        "num_hidden_layers": draw.choice([1, 2, 3]), "intermediate_size": draw.choice([50, 77, 131]),
        "tie_word_embeddings": tied, "head_dim": None,
    }  # fmt: skip
    if family in FREE_HEADS:
        shape |= {"head_dim": size, "hidden_size": heads * draw.choice([12, 20, 28]), "query_pre_attn_scalar": size}
    if family in ("olmoe", "gpt_neox", "falcon"):
        shape["num_key_value_heads"] = None if family != "olmoe" else heads
    if family == "falcon":
        split = {"new_decoder_architecture": True, "num_kv_heads": groups}
        shape |= draw.choice([split, {"multi_query": False}, {"ffn_hidden_size": 100}])
    if family in ("gemma2", "gemma3_text"):
        shape["sliding_window"] = draw.choice([1, 33, 2000])
    if "experts" in str(SHAPES[family]):
        experts = draw.choice([3, 5, 6])
        shape |= {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": draw.randint(1, experts)}
        inner = draw.choice([36, 44])  # torch multiplies rows of whole 16 bytes only
        shape |= {"intermediate_size": inner, "moe_intermediate_size": inner, "shared_expert_intermediate_size": 52}
    for bias in BIASES.get(family, ()):
        shape[bias] = draw.random() < 0.5
    if family in SHARES:
        share = draw.choice(SHARES[family])
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": share}
    return shape


def make_config(family: str, changes: dict[str, Any], vocab_size: int = 410) -> Any:
    from transformers import AutoConfig

    common = {} if family in ("mpt", "bloom") else COMMON
    shape = {**common, **SHAPES[family], **changes, "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1}
    if family == "bloom":
        shape.setdefault("hidden_size", 64)
    absent = [n for n in ("intermediate_size", "num_key_value_heads", "head_dim") if shape.get(n, 0) is None]
    return AutoConfig.for_model(family, **{key: value for key, value in shape.items() if key not in absent})


def make_model(path: Path, family: str, changes: dict[str, Any], vocab_size: int = 410) -> Path:
    from transformers import AutoModelForCausalLM

    config = make_config(family, changes, vocab_size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases too, so that a lost one shows
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(path)
    make_tokenizer(path)
    return path
