"""The keys that a file of this model must state."""

from __future__ import annotations

from typing import Any

from pi_gguf.checkpoint.checkpoint import Checkpoint


def model_metadata(checkpoint: Checkpoint, *, finetuned: bool) -> dict[str, Any]:
    """Return the keys of the architecture: hyper-parameters and position scaling."""
    family = checkpoint.family
    return {
        **{f"{family.arch}.{key}": value for key, value in family.keys(checkpoint.hf_config).items()},
        **checkpoint.rope.to_gguf(family.arch, finetuned=finetuned or family.rope_finetuned),
    }
