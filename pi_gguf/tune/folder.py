"""Write the Hugging Face folder of a fine-tune: weights, config, tokenizer, record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pi_gguf.adapters.adapted import with_adapters
from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.checkpoint.record import RECORD_FILE, Record
from pi_gguf.common.files import check_free_disk, replace_when_complete
from pi_gguf.common.provenance import library_versions, package_version
from pi_gguf.errors import ResourceError
from pi_gguf.tune.trainer import Trained

LOSSES_FILE = "losses.json"
"""Beside the weights: the loss of each step in nats a token, in order."""


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def write_folder(
    checkpoint: Checkpoint,
    out_dir: Path,
    record: Record,
    trained: Trained | None,
    price: Callable[[Checkpoint], dict[str, Any] | None] | None = None,
) -> None:
    """Write weights in their original dtype, the config with the scaling, the tokenizer's files and the record.

    Adapters are merged into the checkpoint's own weights, whatever these were held in during training.

    Args:
        price: measured on the folder before it gets its name.
    """
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    stored = dtypes[next(iter(checkpoint.tensors.values())).dtype]
    if trained is None:
        model = checkpoint.load_model(dtype=stored)
    elif trained.adapter_dir is not None:
        model = with_adapters(checkpoint, [str(trained.adapter_dir)]).load_model(dtype=stored)
    else:
        assert trained.model is not None
        model = trained.model
    check_free_disk(out_dir.parent, stored.itemsize * checkpoint.n_parameters())
    with replace_when_complete(out_dir) as partial:
        try:
            model.to(stored).save_pretrained(partial)
        except SafetensorError as error:  # its only way to say that the disk is full
            raise ResourceError(f"{out_dir}: the weights were not written ({error})", "free some disk space") from error
        config = {**checkpoint.config, "tie_word_embeddings": checkpoint.tied}
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, partial / name)
        settings_path = partial / "tokenizer_config.json"
        if settings_path.exists():
            settings = json.loads(settings_path.read_text())
            settings["model_max_length"] = checkpoint.rope.max_position_embeddings
            settings_path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        del model
        if price:
            record = replace(record, price=price(load_checkpoint(str(partial))))
        write_record(partial, record, trained.losses if trained else [])


def write_adapter(adapter_dir: Path, out_dir: Path, record: Record, losses: list[float]) -> None:
    """Write an adapter as peft does, with the record, which states the scaling it was trained with."""
    with replace_when_complete(out_dir) as partial:
        shutil.copytree(adapter_dir, partial)
        write_record(partial, record, losses)


def write_record(folder: Path, record: Record, losses: list[float]) -> None:
    if losses:
        (folder / LOSSES_FILE).write_text(json.dumps(losses) + "\n")
    replace(record, pi_gguf=package_version(), libraries=library_versions()).write(folder / RECORD_FILE)
