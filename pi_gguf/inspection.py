"""What a GGUF file or a Hugging Face folder states, what llama.cpp reads of it, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint import load_checkpoint
from pi_gguf.errors import GgufError, ResourceError
from pi_gguf.gguf_file import read_gguf
from pi_gguf.rope import RopeScaling, check_consistent


@dataclass(frozen=True)
class Inspection:
    """The report of `pi-gguf inspect`; sizes in bytes, windows in tokens."""

    path: str
    format: str
    architecture: str
    window: int
    original_window: int
    rope: dict[str, Any]
    quantization: str
    tensors: dict[str, int]
    nbytes: int
    llama_cpp: dict[str, Any]
    general: dict[str, Any]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: str | Path, *, seed: int = 0, device: str = "cpu") -> Inspection:
    """Report architecture, window, every rope key, types, sizes, what llama.cpp reads, and warnings.

    Args:
        path: GGUF file, Hugging Face folder, Hub id or bundled:tiny.
        seed: taken like everywhere; nothing is random here.
        device: taken like everywhere; only metadata and vocabulary are read.

    Example:
        pi-gguf inspect model.gguf
    """
    return _inspect_gguf(Path(path)) if Path(path).suffix == ".gguf" else _inspect_folder(str(path))


def _inspect_gguf(path: Path) -> Inspection:
    from pi_gguf.runtime import Model

    info = read_gguf(path)
    rope = info.rope
    warnings = check_consistent(rope, str(path))
    scaling = [key for key in info.metadata if key.startswith(f"{info.arch}.rope.scaling.")]
    if rope.rope_type == "linear" and f"{info.arch}.rope.scaling.original_context_length" not in info.metadata:
        warnings.append(f"{path}: {info.arch}.rope.scaling.original_context_length is missing")
    if scaling and f"{info.arch}.rope.scaling.factor" not in info.metadata:
        warnings.append(f"{path}: {info.arch}.rope.scaling.factor is missing; llama.cpp reads 1")
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token"):
        if key not in info.metadata:
            warnings.append(f"{path}: {key} is missing")
    read: dict[str, Any] = {}
    try:
        with Model(path, n_ctx=512, device="cpu") as model:
            read = {
                "n_ctx_train": model.n_ctx_train,
                "rope_freq_scale_train": model.rope_freq_scale_train,
                "n_vocab": model.n_vocab,
            }
    except (GgufError, ResourceError) as error:
        warnings.append(str(error))
    keys = {key: value for key, value in info.metadata.items() if ".rope." in key or key.endswith("context_length")}
    keys |= {t.name: "tensor" for t in info.tensors if t.name.startswith("rope_")}
    return Inspection(
        path=str(path),
        format="GGUF",
        architecture=info.arch,
        window=rope.max_position_embeddings,
        original_window=rope.original_max_position_embeddings,
        rope=keys,
        quantization=info.quantization,
        tensors=dict(Counter(t.type for t in info.tensors)),
        nbytes=path.stat().st_size,
        llama_cpp=read,
        general={key: value for key, value in info.metadata.items() if key.startswith("general.")},
        warnings=warnings,
    )


def _inspect_folder(model: str) -> Inspection:
    checkpoint = load_checkpoint(model)
    rope: RopeScaling = checkpoint.rope
    spelled = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
    tensors = checkpoint.tensors
    return Inspection(
        path=str(checkpoint.path),
        format="Hugging Face",
        architecture=str(checkpoint.config["model_type"]),
        window=rope.max_position_embeddings,
        original_window=rope.original_max_position_embeddings,
        rope={name: checkpoint.config[name] for name in spelled if name in checkpoint.config},
        quantization="/".join(sorted({t.dtype for t in tensors.values()})),
        tensors=dict(Counter(t.dtype for t in tensors.values())),
        nbytes=sum(t.nbytes for t in tensors.values()),
        llama_cpp={},
        general=checkpoint.provenance,
        warnings=check_consistent(rope, str(checkpoint.path)),
    )
