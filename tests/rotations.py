"""The angles that transformers' own rotary embedding gives a config."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE = {"model_type": "llama", "max_position_embeddings": 2048, "rope_theta": 10000.0}


def rotary(config: dict, head_dim: int = 64) -> LlamaRotaryEmbedding:
    """transformers' own angles for a config."""
    fields = {k: v for k, v in config.items() if k != "model_type"}
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=head_dim, num_attention_heads=1, **fields))


def angles(embedding: LlamaRotaryEmbedding, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = embedding(torch.zeros(1, dtype=torch.float32), torch.tensor([positions]))
    return cos.numpy(), sin.numpy()
