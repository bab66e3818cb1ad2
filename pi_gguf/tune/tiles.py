"""MLPs a tile of tokens at a time: what lies between their two products exists for one tile only.

In: a model of transformers. Out: the same model, same loss and gradients, less memory and one more forward of the MLPs.
Source: arXiv 2506.13996, "TiledMLP".
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TILE = 2048
"""Tokens of a tile."""


@contextmanager
def tiled_mlps(model: Any, tile: int) -> Iterator[int]:
    """Let the MLPs of a model compute tile by tile while this is open, and forget each tile until its gradient is due.

    Args:
        model: a causal model, or peft's around one.
        tile: tokens.

    Yields:
        How many MLPs do so. Those with experts do not, nor any that takes more than hidden states.
    """
    mlps = [module for module in model.modules() if _is_mlp(module)]
    for mlp in mlps:
        mlp.forward = _tiled(mlp.forward, tile)
    try:
        yield len(mlps)
    finally:
        for mlp in mlps:
            del mlp.forward


def _tiled(forward: Any, tile: int) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    def by_tiles(hidden: torch.Tensor) -> torch.Tensor:
        """Compute (..., D) -> (..., D)."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if len(tokens) <= tile or not torch.is_grad_enabled():
            result: torch.Tensor = forward(hidden)
            return result
        parts = [checkpoint(forward, part, use_reentrant=False) for part in torch.split(tokens, tile)]
        return torch.cat(parts).view(hidden.shape)

    return by_tiles


def _is_mlp(module: Any) -> bool:
    """Tell whether a module is an MLP that computes each token by itself: linear layers side by side in a module that
    is called so, takes hidden states only, and holds no parameters of its own."""
    if not type(module).__name__.endswith(("MLP", "FFN")) or list(module.parameters(recurse=False)):
        return False
    takes = list(inspect.signature(type(module).forward).parameters)
    return len(takes) == 2 and not any("Expert" in type(part).__name__ for part in module.modules())
