"""The door to Hugging Face checkpoints: resolve MODEL, read config and safetensors, open with transformers.

In: a folder, a Hub id or `bundled:tiny`. Out: a `Checkpoint` whose config and tensor list are already checked.
Only safetensors are read, memory-mapped; no code from a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf import bundled
from pi_gguf.errors import CheckpointError, ResourceError, UnsupportedError
from pi_gguf.rope import RopeScaling, positive_int, positive_number

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROVENANCE_FILE = "pi_gguf.json"
"""Written by `extend` beside the weights: source, windows, steps and tokens trained."""

_MEBIBYTE = 2**20

MAX_LAYERS = 10_000
"""No Llama has as many; a larger number is a damaged config."""

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers of old checkpoints that follow from the config."""


@dataclass(frozen=True)
class TensorSource:
    """Where one tensor lies: its file, shape and stored dtype (`F32`, `F16` or `BF16`)."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for side in self.shape:
            size *= side
        return size


@dataclass(frozen=True)
class Checkpoint:
    """A checked Llama checkpoint.

    Args:
        source: MODEL as the user gave it.
        path: the local folder.
        config: the parsed config.json.
        rope: the position scaling of the config.
    """

    source: str
    path: Path
    config: dict[str, Any]
    rope: RopeScaling

    # Shapes, by the config's own names

    @property
    def n_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def n_heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def n_kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.n_heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.n_heads)

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def provenance(self) -> dict[str, Any]:
        """What `extend` recorded of the training, empty for any other checkpoint."""
        path = self.path / PROVENANCE_FILE
        if not path.exists():
            return {}
        record = read_json(path)
        for name in ("steps", "tokens"):
            value = record.setdefault(name, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(f"{path}: {name} must be a whole number, got {value!r}", "delete the file")
        return record

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that the config asks for; shapes as torch has them (out, in)."""
        c = self.config
        shapes: dict[str, tuple[int, ...]] = {}
        hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        linear = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes["model.embed_tokens.weight"] = (vocab, hidden)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}."
            for name, shape in linear.items():
                shapes[f"{prefix}{name}.weight"] = shape
                if c.get("attention_bias" if "attn" in name else "mlp_bias", False):
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        return shapes

    def n_parameters(self) -> int:
        total = 0
        for shape in self.tensor_shapes().values():
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
        return total

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """Every tensor of the model, in the order of `tensor_shapes`.

        Raises:
            CheckpointError: a file or tensor is missing, truncated or of another shape than the config says.
            UnsupportedError: a tensor that is not part of a Llama, or a dtype that is not handled.
        """
        found = {}
        for path in self._weight_files():
            found.update(_read_header(path))
        wanted = self.tensor_shapes()
        for name in list(found):
            if _IGNORED_TENSORS.search(name) or (self.tied and name == "lm_head.weight"):
                del found[name]
        missing = [name for name in wanted if name not in found]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors are missing, the first is {missing[0]}",
                "download the checkpoint again; every shard must be there",
            )
        unknown = [name for name in found if name not in wanted]
        if unknown:
            raise UnsupportedError(
                f"{found[unknown[0]].path}: tensor {unknown[0]} is not part of a Llama model "
                f"({len(unknown)} such tensors)",
                "merge adapters into the weights, or check model_type in config.json",
            )
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise CheckpointError(
                    f"{found[name].path}: {name} must have shape {list(shape)} by config.json, "
                    f"got {list(found[name].shape)}",
                    "config.json and weights are of different models",
                )
        return {name: found[name] for name in wanted}

    def fingerprint(self) -> str:
        """Return a hash of the config and of the size, beginning and end of every weight file; fast at any size."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in self._weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_MEBIBYTE))
                file.seek(max(0, size - _MEBIBYTE))
                digest.update(file.read(_MEBIBYTE))
        return digest.hexdigest()

    def _weight_files(self) -> list[Path]:
        index_path, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index_path.exists():
            weight_map = read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{index_path}: weight_map must map tensors to files", "download it again")
            paths = [self.path / name for name in sorted(set(weight_map.values()))]
            for path in paths:
                if not _is_file(path) or path.parent != self.path:
                    raise CheckpointError(
                        f"{index_path}: names {path.name[:80]!r}, which is absent from the folder",
                        "download the missing shard",
                    )
            return paths
        if single.exists():
            return [single]
        hint = "put model.safetensors there"
        if list(self.path.glob("*.bin")) or list(self.path.glob("*.pth")):
            hint = "only safetensors are read: save the model with save_pretrained(safe_serialization=True) first"
        raise CheckpointError(f"{self.path}: no model.safetensors or model.safetensors.index.json", hint)

    # Opening with transformers

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a broken tokenizer
            raise CheckpointError(
                f"{self.path}: the tokenizer does not open ({_one_line(error)})",
                "tokenizer.json or tokenizer.model must be in the folder",
            ) from error
        return tokenizer

    def load_model(
        self, *, dtype: torch.dtype, device: str = "cpu", rope: RopeScaling | None = None
    ) -> PreTrainedModel:
        """Open the model with transformers.

        Args:
            dtype: of the weights in memory.
            device: `cpu` or `cuda`.
            rope: scaling to apply instead of the config's own.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = AutoConfig.for_model(**(rope or self.rope).to_hf(self.config))
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self.path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            return model.to(device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(f"{self.path}: the model does not fit in memory ({_one_line(error)})") from error


def load_checkpoint(model: str, *, config_only: bool = False) -> Checkpoint:
    """Open MODEL and check its config.

    Args:
        model: a Hugging Face folder, a Hub id such as `meta-llama/Llama-2-7b-hf`, or `bundled:tiny`.
        config_only: fetch nothing but the config from the Hub.

    Raises:
        CheckpointError: it is not there, or its config lacks a field.
        UnsupportedError: it is no Llama model.
    """
    path = _resolve(model, config_only=True)
    config_path = path / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{path}: config.json is missing", "MODEL must be a Hugging Face folder")
    config = read_json(config_path)
    model_type = config.get("model_type")
    if model_type != "llama":
        raise UnsupportedError(
            f"{config_path}: model_type must be llama, got {model_type!r}", "only the Llama architecture is handled"
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{config_path}: quantization_config: the weights are already quantized",
            "use the checkpoint in 16 or 32 bits",
        )
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        positive_int(config, name, str(config_path))
    for name in ("num_key_value_heads", "head_dim"):
        if config.get(name) is not None:
            positive_int(config, name, str(config_path))
    for name, value in config.items():
        if isinstance(value, int) and value >= 2**31:
            raise CheckpointError(f"{config_path}: {name} must be below 2^31, got {value}", "correct the config")
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise CheckpointError(
            f"{config_path}: num_hidden_layers must be at most {MAX_LAYERS}, got {config['num_hidden_layers']}",
            "correct the config",
        )
    positive_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", str(config_path))
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"{config_path}: hidden_act must be silu, got {config['hidden_act']!r}")
    rope = RopeScaling.from_hf(config, str(config_path))
    if not config_only:
        path = _resolve(model, config_only=False)  # from the Hub only now, when the config is known to be handled
    return Checkpoint(model, path, config, rope)


def _resolve(model: str, *, config_only: bool) -> Path:
    if model == bundled.TINY:
        return bundled.TINY_DIR
    if model.startswith("bundled:"):
        raise CheckpointError(f"{model}: no such bundled model", f"the one there is: {bundled.TINY}")
    path = Path(model)
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model}: no such folder ({_one_line(error)})", "check the spelling") from error
    if is_folder:
        return path
    if _is_file(path):
        raise CheckpointError(f"{model}: is a file; MODEL must be a Hugging Face folder", f"try {path.parent}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or (path.parent.is_dir() and str(path.parent) != "."):
        raise CheckpointError(f"{model}: no such folder", f"give a folder, a Hub id (owner/name) or {bundled.TINY}")
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if config_only else ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # network, permission and not-found errors of the Hub's client
        raise CheckpointError(
            f"{model}: not a folder here, and not to be had from the Hub ({_one_line(error)})",
            "check the spelling and the connection; for gated models run `hf auth login`",
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_header(path: Path) -> dict[str, TensorSource]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it has no iterator
            shapes = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not safetensors ({_one_line(error)})", "download this file again"
        ) from error
    for name, (_, dtype) in shapes.items():
        if dtype not in DTYPE_BYTES and not _IGNORED_TENSORS.search(name):
            raise UnsupportedError(f"{path}: {name} must be F32, F16 or BF16, got {dtype}")
    return {name: TensorSource(path, shape, dtype) for name, (shape, dtype) in shapes.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable JSON ({_one_line(error)})", "download this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
