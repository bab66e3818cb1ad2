"""What a small Llama may be like: heads, ties, biases, types of its weights, scaling."""

from __future__ import annotations

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


VARIANTS = {
    "grouped heads, untied": {},
    "tied, one key-value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "bfloat16 in shards": {"dtype": "bfloat16", "max_shard_size": "100KB"},
    "float16": {"dtype": "float16"},
    "llama3 factors": {"rope_parameters": LLAMA3, "max_position_embeddings": 512},
    "padded vocabulary, other base": {
        "vocab_size": 450,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}
