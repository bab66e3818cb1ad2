"""Every key and tensor of an adapter's file before a byte is written."""

from __future__ import annotations

import math
from typing import Any

from pi_gguf.adapters.adapted import AdaptedCheckpoint, low_rank_changes
from pi_gguf.adapters.merging import ScaledTensor
from pi_gguf.errors import UnsupportedError
from pi_gguf.families.family import Change, Config
from pi_gguf.gguf.file import tensor_namer
from pi_gguf.gguf.places import NUMBERED
from pi_gguf.llamacpp.quantizer import quantizations
from pi_gguf.write.layout import FilePlan, Output, maker, typed


def plan_adapter_file(checkpoint: AdaptedCheckpoint, *, general: dict[str, Any], quantization: str) -> FilePlan:
    """Decide every key and tensor of a GGUF file that holds the checkpoint's one adapter, for its base's own file.

    llama.cpp multiplies by alpha / rank, with one alpha for all: where a tensor's scaling is another, B carries the
    difference.

    Args:
        general: `general.*` keys.
        quantization: F32 or F16.

    Raises:
        UnsupportedError: the adapter changes something that GGUF holds in a way no product of low rank can follow.
    """
    family, config = checkpoint.family, checkpoint.hf_config
    gguf_name = tensor_namer(family.arch, checkpoint.n_layers)
    path = checkpoint.adapters[0].path
    alpha, outputs = 0.0, []
    for name, change in low_rank_changes(checkpoint).items():
        transform = family.transform(name)
        rows = checkpoint.tensors[name].shape[0]
        written = gguf_name(family.rename(name))
        if NUMBERED.search(name) or written is None or (transform and not _permutes_rows(transform, config, rows)):
            raise UnsupportedError(
                f"{path}: {name} is part of another tensor in {family.arch}, or other than a reordering of its rows",
                "convert without --adapter-only: the adapter is then merged",
            )
        if change.embedding and transform:
            raise UnsupportedError(
                f"{path}: {name} has its rows reordered in {family.arch}", "leave out --adapter-only"
            )
        alpha = alpha or change.scaling * change.rank
        by = change.scaling * change.rank / alpha if alpha else 0.0
        b = change.b
        if not math.isclose(by, 1, rel_tol=1e-12):
            b = ScaledTensor.of(b, by)
        swap = maker(lambda tensor, _: tensor.T, config, stacked=False)
        parts = {
            "lora_a": (change.a, swap if change.embedding else maker(None, config, stacked=False)),
            "lora_b": (b, maker(transform, config, stacked=False)),
        }
        for suffix, (source, make) in parts.items():
            shape = source.shape[::-1] if make is swap else source.shape
            output = Output(f"{written}.{suffix}", shape, "F32", 4 * math.prod(shape), (source,), make)
            outputs.append(typed(output, quantization))
    metadata = {
        **general,
        "general.type": "adapter",
        "general.file_type": quantizations()[quantization],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha or 1.0),
    }
    return FilePlan(checkpoint, quantization, metadata, outputs, {})


def _permutes_rows(transform: Change, config: Config, rows: int) -> bool:
    """Tell whether a transformation only reorders rows, so that transform(B A) is transform(B) A."""
    import torch

    numbers = torch.arange(rows)
    made = transform(torch.stack([numbers, numbers + rows], 1), config)
    return (
        made.shape == (rows, 2)
        and bool((made[:, 0].sort().values == numbers).all())
        and bool((made[:, 1] == made[:, 0] + rows).all())
    )
