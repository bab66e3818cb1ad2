"""The Llama architecture: hyper-parameters to GGUF keys, and its tensor transformations.

Shapes: D hidden size, H heads (query or key-value), d head size. gguf's own tables give the tensor names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

ARCH = "llama"


def gguf_hyperparameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the architecture's keys, all but those of position scaling."""
    config = checkpoint.config
    return {
        f"{ARCH}.block_count": checkpoint.n_layers,
        f"{ARCH}.embedding_length": config["hidden_size"],
        f"{ARCH}.feed_forward_length": config["intermediate_size"],
        f"{ARCH}.attention.head_count": checkpoint.n_heads,
        f"{ARCH}.attention.head_count_kv": checkpoint.n_kv_heads,
        f"{ARCH}.attention.key_length": checkpoint.head_dim,
        f"{ARCH}.attention.value_length": checkpoint.head_dim,
        f"{ARCH}.attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        f"{ARCH}.rope.dimension_count": checkpoint.head_dim,
        f"{ARCH}.vocab_size": config["vocab_size"],
    }


def transform(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as llama.cpp's Llama graph wants it: rows of Q and K in interleaved rotary order.

    Hugging Face rotates element j of a head with element j + d/2, llama.cpp element 2j with 2j + 1.

    Args:
        name: Hugging Face's name.
        tensor: weight (H * d, D) or bias (H * d) for Q and K; any other is returned as it is.
    """
    if ".q_proj." in name:
        return _interleave(tensor, checkpoint.n_heads)
    if ".k_proj." in name:
        return _interleave(tensor, checkpoint.n_kv_heads)
    return tensor


def _interleave(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    rest = tensor.shape[1:]
    return tensor.reshape(n_heads, 2, -1, *rest).transpose(1, 2).reshape(tensor.shape).contiguous()
