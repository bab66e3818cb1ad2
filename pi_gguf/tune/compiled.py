"""A model's layers compiled by torch, where a run on a CPU is long enough to earn it.

What lies between the products (norms, rotation, activations, sums) passes through memory once instead of once an
operation. With fast products in 16 bits that is a fifth of a step; in 32 bits a tenth, for a longer compilation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common import machine
from pi_gguf.common.private import forgiving_compiler
from pi_gguf.common.progress import say
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.speed import training_operations

LEAST_OPERATIONS = 2e14
"""Of a run: some ten minutes of two cores with AMX, of which compiling takes half a minute."""


def compiling_pays(checkpoint: Checkpoint, training: TrainingPlan, device: str, processes: int) -> bool:
    """Tell whether a run's layers are compiled: a long run of one process, on a CPU with fast products in 16 bits and a
    C++ compiler. It depends on nothing that changes from run to run, as values change in their last places. Attention
    within groups is another program in every second layer and compiles for a minute and more."""
    if device != "cpu" or processes > 1 or training.attention_group or not machine.fast_bf16(device):
        return False
    has_compiler = any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "c++"))))
    return has_compiler and training_operations(checkpoint, training) >= LEAST_OPERATIONS


@contextmanager
def compiled_layers(model: Any) -> Iterator[int]:
    """Let a model's layers compute compiled while this is open; each length of sequences is compiled when it comes.

    Args:
        model: a causal model, or peft's around one.

    Yields:
        How many layers do so. Those with experts do not, as what they compute depends on their values.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if not any("Expert" in type(part).__name__ for part in layer.modules())]
    if layers:
        say(f"compiling {len(layers)} layers takes half a minute, once for each length of sequences")
    with forgiving_compiler() as undo:
        for layer in layers:
            layer.compile()
        try:
            yield len(layers)
        finally:
            for layer in layers:
                undo(layer)
