"""The door to Hugging Face checkpoints: resolve MODEL, read config and safetensors, open with transformers.

In: a folder, a Hub id or `bundled:tiny`. Out: a `Checkpoint` whose config and tensor list are already checked.
Only safetensors are read, memory-mapped; no code from a checkpoint is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf import bundled
from pi_gguf.errors import CheckpointError, ResourceError, UnsupportedError
from pi_gguf.families import FAMILIES, Family
from pi_gguf.families.family import head_dim, kv_heads, rotary_dim
from pi_gguf.methods import find_method
from pi_gguf.rope import (
    DEFAULT_ROPE_THETA,
    FACTOR_TENSORS,
    RopeScaling,
    divisors_scaling,
    positive_int,
    positive_number,
)
from pi_gguf.weights import WeightFile

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROVENANCE_FILE = "pi_gguf.json"
"""Written by `extend` beside the weights: source, windows, steps and tokens trained."""

_MEBIBYTE = 2**20

MAX_LAYERS = 10_000
"""No model has as many; a larger number is a damaged config."""

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$")
"""Buffers of old checkpoints that follow from the config."""


@dataclass(frozen=True)
class TensorSource:
    """Where one tensor lies: its file, its name there, shape and stored dtype (`F32`, `F16` or `BF16`)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for side in self.shape:
            size *= side
        return size

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        """Return its values.

        Args:
            files: opened files by path, filled as they are needed.
        """
        if self.path not in files:
            files[self.path] = WeightFile(self.path)
        tensor: torch.Tensor = files[self.path].get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint of one of the families.

    Args:
        source: MODEL as the user gave it.
        path: the local folder.
        config: the parsed config.json.
        hf_config: the same, opened by transformers, with its defaults and standard names.
        rope: the position scaling of the config.
    """

    source: str
    path: Path
    config: dict[str, Any]
    hf_config: PretrainedConfig
    rope: RopeScaling

    @property
    def family(self) -> Family:
        return FAMILIES[self.config["model_type"]]

    def extended(self, context: int, method: str = "linear") -> RopeScaling:
        """Return the scaling of this model extended to a window of `context` tokens.

        Args:
            context: new window, in tokens.
            method: `linear` (Position Interpolation) or another of `METHODS`.

        Raises:
            OptionError: `context` is not above the window, or there is no such method.
            UnsupportedError: its family has no rotation, or llama.cpp no way to read the composition.
        """
        path = self.path / "config.json"
        rope = find_method(method).extended(self.rope, context, self.rotary_dim)
        if method != "linear" and (self.family.longrope_only or rope.sliding_rope_theta is not None):
            raise UnsupportedError(
                f"{path}: method {method} is not handled for model_type {self.config['model_type']}",
                "--method linear is",
            )
        if self.family.longrope_only and rope.own is None:
            rope = replace(rope, own=divisors_scaling([1.0] * (self.rotary_dim // 2)))
        hf_config = _open_config(rope.to_hf(self.config), path)
        _check_variant(self.family, hf_config, path)
        _check_rope(rope, self.family, hf_config, path)
        return rope

    # Shapes, by the standard names of transformers

    @property
    def n_layers(self) -> int:
        return int(self.hf_config.num_hidden_layers)

    @property
    def n_heads(self) -> int:
        return int(self.hf_config.num_attention_heads)

    @property
    def n_kv_heads(self) -> int:
        return kv_heads(self.hf_config)

    @property
    def head_dim(self) -> int:
        return head_dim(self.hf_config)

    @property
    def rotary_dim(self) -> int:
        return rotary_dim(self.hf_config)

    @property
    def hidden_size(self) -> int:
        return int(self.hf_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.vocab_size)

    @property
    def tied(self) -> bool:
        return bool(self.hf_config.tie_word_embeddings)

    @property
    def provenance(self) -> dict[str, Any]:
        """What `extend` recorded of the training, empty for any other checkpoint."""
        return read_provenance(self.path)

    @property
    def tokenizer_dir(self) -> Path:
        """The folder whose tokenizer files hold: the checkpoint's own, but where an adapter brings its own tokens."""
        return self.path

    @property
    def adapter_hashes(self) -> dict[str, str]:
        """A hash of each adapter that is merged into the tensors, by what it is called in messages."""
        return {}

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model as transformers builds it, without memory for its weights."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            try:
                return AutoModelForCausalLM.from_config(self.hf_config)
            except Exception as error:  # transformers raises many kinds for sizes that do not fit together
                raise CheckpointError(
                    f"{self.path / 'config.json'}: no model can be built from it ({_one_line(error)})",
                    "correct the config",
                ) from error

    @cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must be on disk; shapes as torch has them (out, in)."""
        from transformers.core_model_loading import revert_weight_conversion

        state, tied = self.skeleton.state_dict(), self.tied_tensors
        on_disk = revert_weight_conversion(self.skeleton, state)
        return {name: tuple(tensor.shape) for name, tensor in on_disk.items() if name not in tied}

    @property
    def tied_tensors(self) -> dict[str, str]:
        """Names of tensors that are not on disk, as each is the same as another: whose name is the value."""
        return dict(self.skeleton._tied_weights_keys or {}) if self.tied else {}

    def n_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes.values())

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """Every tensor of the model, in the order of `tensor_shapes`.

        Raises:
            CheckpointError: a file or tensor is missing, truncated or of another shape than the config says.
            UnsupportedError: a tensor that is not part of the model, or a dtype that is not handled.
        """
        found = {}
        for path in self._weight_files():
            found.update(read_tensor_list(path))
        wanted = self.tensor_shapes
        known = self.skeleton.state_dict()
        prefix = f"{self.skeleton.base_model_prefix}."
        for name in list(found):
            if name not in wanted and prefix + name in wanted:  # saved from the model without its head
                found[prefix + name] = found.pop(name)
            elif name not in wanted and (_IGNORED_TENSORS.search(name) or name in known):
                del found[name]  # a buffer that follows from the config, or the head where it is tied
        missing = [name for name in wanted if name not in found]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors are missing, the first is {missing[0]}",
                "download the checkpoint again; every shard must be there",
            )
        unknown = [name for name in found if name not in wanted]
        if unknown:
            raise UnsupportedError(
                f"{found[unknown[0]].path}: tensor {unknown[0]} is not part of a {self.config['model_type']} model "
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
                if not is_file(path) or path.parent != self.path:
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

    def load_tokenizer(self, *, by_class: bool = False) -> PreTrainedTokenizerBase:
        """Open the tokenizer; tokenizer.json is taken at its word.

        The classes that transformers 5 would choose by model_type rebuild parts of it: a Qwen 2 gets Qwen's
        pre-tokenizer and a padding token whatever its file says.

        Args:
            by_class: open it as that class, for comparison.

        Raises:
            CheckpointError: it does not open, or is code of the checkpoint's own, which is never run.
        """
        import transformers
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        settings_path = self.tokenizer_dir / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        name = str(settings.get("tokenizer_class"))
        if settings.get("auto_map") and not hasattr(transformers, name):
            raise CheckpointError(
                f"{settings_path}: tokenizer_class: the tokenizer {name[:80]!r} is code of its own, which is not run",
                "remove auto_map if tokenizer.json alone gives the right tokens",
            )
        at_its_word = (self.tokenizer_dir / "tokenizer.json").exists() and not by_class
        kind = PreTrainedTokenizerFast if at_its_word else AutoTokenizer
        try:
            tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(self.tokenizer_dir, trust_remote_code=False)
            tokenizer.model_max_length = sys.maxsize  # nothing is ever cut, whatever the file says
            tokenizer("a")
        except BaseException as error:  # transformers raises many kinds for a broken tokenizer
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise CheckpointError(
                f"{self.tokenizer_dir}: the tokenizer does not open ({_one_line(error)})",
                "tokenizer.json or tokenizer.model must be in the folder",
            ) from error
        return tokenizer

    def load_model(
        self, *, dtype: torch.dtype, device: str = "cpu", rope: RopeScaling | None = None, four_bits: bool = False
    ) -> PreTrainedModel:
        """Open the model with transformers.

        Args:
            dtype: of the weights in memory.
            device: `cpu` or `cuda`.
            rope: scaling to apply instead of the config's own.
            four_bits: hold the linear layers but the head in 4 bits (NF4, with bitsandbytes; CUDA only).
        """
        import torch
        from transformers import AutoConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = AutoConfig.for_model(**(rope or self.rope).to_hf(self.config))
        try:
            return self._open_in_4_bits(config, dtype) if four_bits else self._open_model(config, dtype).to(device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(f"{self.path}: the model does not fit in memory ({_one_line(error)})") from error

    def _open_model(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        return model

    def _open_in_4_bits(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Open the model on the current GPU, each tensor quantized as it is read."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            device_map={"": torch.cuda.current_device()},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
        )  # fmt: skip
        return model


def load_checkpoint(model: str, *, config_only: bool = False, weights: bool = True) -> Checkpoint:
    """Open MODEL and check its config.

    Args:
        model: a Hugging Face folder, a Hub id such as `meta-llama/Llama-2-7b-hf`, or `bundled:tiny`.
        config_only: fetch nothing but the config from the Hub.
        weights: fetch the weights too, not only config and tokenizer.

    Raises:
        CheckpointError: it is not there, or its config lacks a field.
        UnsupportedError: its family, or a variant of it, is not handled.
    """
    path = _resolve(model, _CONFIG)
    config_path = path / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{path}: config.json is missing", "MODEL must be a Hugging Face folder")
    config = read_json(config_path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"{config_path}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}",
            "this family is not handled",
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{config_path}: quantization_config: the weights are already quantized",
            "use the checkpoint in 16 or 32 bits",
        )
    rope = read_rope(config, FAMILIES[model_type], str(config_path))
    hf_config = _open_config(rope.to_hf(config), config_path)
    _check_variant(FAMILIES[model_type], hf_config, config_path)
    _check_rope(rope, FAMILIES[model_type], hf_config, config_path)
    if not config_only:
        path = _resolve(
            model, _TOKENIZER + _WEIGHTS * weights
        )  # from the Hub only now, when the config is known to be handled
    return Checkpoint(model, path, config, hf_config, rope)


def _open_config(config: dict[str, Any], path: Path) -> PretrainedConfig:
    """Check the sizes of a config and open it with transformers, which knows each family's defaults and names."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = CONFIG_MAPPING[config["model_type"]]
    spelled = {name: alias for name, alias in kind.attribute_map.items() if name not in config}
    known = {field.name for field in dataclasses.fields(kind)}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if (name := spelled.get(name, name)) in known:
            positive_int(config, name, str(path))
    for name in ("num_key_value_heads", "head_dim"):
        if config.get(name) is not None:
            positive_int(config, name, str(path))
    for name, value in config.items():
        if isinstance(value, int) and value >= 2**31:
            raise CheckpointError(f"{path}: {name} must be below 2^31, got {value}", "correct the config")
        if name.endswith(("norm_eps", "norm_epsilon")):
            positive_number(value, name, str(path))
    try:
        opened: PretrainedConfig = AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises many kinds for a field it does not take
        raise CheckpointError(f"{path}: transformers does not open it ({_one_line(error)})", "correct it") from error
    if opened.num_hidden_layers > MAX_LAYERS:
        raise CheckpointError(
            f"{path}: num_hidden_layers must be at most {MAX_LAYERS}, got {opened.num_hidden_layers}",
            "correct the config",
        )
    return opened


def _check_variant(family: Family, config: PretrainedConfig, path: Path) -> None:
    if complaint := family.complaint(config):
        name, value, handled = complaint
        raise UnsupportedError(
            f"{path}: {name} must be {handled} at {config.max_position_embeddings} tokens, got {value!r}"
            if name == "sliding_window"
            else f"{path}: {name} must be {handled}, got {value!r}",
            "llama.cpp has no such variant of this family; a config edited to that converts as what it then says",
        )


def _check_rope(rope: RopeScaling, family: Family, config: PretrainedConfig, path: Path) -> None:
    """Refuse frequencies that llama.cpp has no way to read for this family."""
    if rope.needs_factor_tensors and family.arch not in FACTOR_TENSORS:
        assert rope.own is not None
        raise UnsupportedError(
            f"{path}: rope_type {rope.own.rope_type} needs a number for each frequency, which llama.cpp reads in "
            f"{', '.join(FACTOR_TENSORS)} only, got {family.arch}",
            "leave --context out to convert as is" if rope.own.has_keys else "take a checkpoint without this scaling",
        )
    pairs = rotary_dim(config) // 2
    for name, divisors in rope.factor_tensors(family.arch, 2 * pairs).items():
        if len(divisors) != pairs:
            field = "short_factor" if "short" in name else "long_factor"
            raise CheckpointError(
                f"{path}: {field} must be a list of {pairs} numbers, got {len(divisors)}", "correct the config"
            )


def read_rope(config: dict[str, Any], family: Family, path: str) -> RopeScaling:
    """Read window and scaling off the config itself, before transformers fills in or refuses anything.

    Raises:
        CheckpointError: a field is missing or no number.
        UnsupportedError: an unknown rope type.
    """
    from transformers import CONFIG_MAPPING

    absent = family.default_window is not None and config.get(family.window) is None
    window = family.default_window if absent else positive_int(config, family.window, path)
    assert window is not None
    if family.alibi:
        return RopeScaling("alibi", 1.0, DEFAULT_ROPE_THETA, window, window)
    theta: Any = CONFIG_MAPPING[family.model_type].default_theta
    sliding = None
    if isinstance(theta, dict):  # layers with a sliding window have a base of their own
        rope = config.get("rope_parameters")
        nested = rope.get("sliding_attention") if isinstance(rope, dict) else None
        default = config.get("rope_local_base_freq", theta["local"])
        sliding = nested.get("rope_theta", default) if isinstance(nested, dict) else default
        sliding, theta = positive_number(sliding, "sliding_attention.rope_theta", path), theta["global"]
    return RopeScaling.from_hf(config, path, window=window, theta=theta, sliding_theta=sliding)


_CONFIG, _TOKENIZER, _WEIGHTS = ["config.json"], ["*.json", "*.jinja", "tokenizer.model"], ["model*.safetensors"]
"""Files of a model on the Hub, by pattern."""


def _resolve(model: str, patterns: list[str]) -> Path:
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
    if is_file(path):
        raise CheckpointError(f"{model}: is a file; MODEL must be a Hugging Face folder", f"try {path.parent}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or (path.parent.is_dir() and str(path.parent) != "."):
        raise CheckpointError(f"{model}: no such folder", f"give a folder, a Hub id (owner/name) or {bundled.TINY}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # network, permission and not-found errors of the Hub's client
        raise CheckpointError(
            f"{model}: not a folder here, and not to be had from the Hub ({_one_line(error)})",
            "check the spelling and the connection; for gated models run `hf auth login`",
        ) from error


def is_file(path: Path) -> bool:
    """Tell whether a file is there; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_tensor_list(path: Path) -> dict[str, TensorSource]:
    """Read names, shapes and dtypes of the tensors of a safetensors file.

    Raises:
        CheckpointError: it is truncated or no safetensors.
        UnsupportedError: a dtype that is not handled.
    """
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
            raise UnsupportedError(f"{path}: {name} must be F32, F16 or BF16, got {dtype}", "save it in one of these")
    return {name: TensorSource(path, name, shape, dtype) for name, (shape, dtype) in shapes.items()}


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read what `extend` recorded of a training; empty where there is no record.

    Raises:
        CheckpointError: steps or tokens are no whole numbers.
    """
    path = folder / PROVENANCE_FILE
    if not path.exists():
        return {}
    record = read_json(path)
    for name in ("steps", "tokens"):
        value = record.setdefault(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{path}: {name} must be a whole number, got {value!r}", "delete the file")
    return record


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable JSON ({_one_line(error)})", "download this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def is_panic(error: BaseException) -> bool:
    """Tell whether an error is that of a Rust library that gave up, which is no Exception."""
    return type(error).__name__ == "PanicException"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
