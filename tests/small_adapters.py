"""A small adapter of LoRA, as peft saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_adapter(base: Path, path: Path, **config: Any) -> Path:
    """Save a random adapter of a model with peft: nothing of it is zero, and what it replaces is changed too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **config}))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(path)
    return path
