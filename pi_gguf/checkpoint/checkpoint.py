"""The door to Hugging Face checkpoints: resolve MODEL, check config and weights, open with transformers.

In: a folder, a Hub id or `bundled:tiny`. Out: a `Checkpoint` whose config and tensor list are already checked.
Only safetensors are read, never mapped; no code from a checkpoint is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pi_gguf.checkpoint.agreement import check_rotation, rotated_dimensions
from pi_gguf.checkpoint.config import Configuration, check_rope, check_size, check_variant, note, read_config, read_json
from pi_gguf.checkpoint.hub import ADAPTER_FILE, TOKENIZER_FILES, model_name, resolve, without_adapter
from pi_gguf.checkpoint.record import RECORD_FILE, Record
from pi_gguf.checkpoint.tensors import (
    IGNORED_TENSORS,
    PLAIN_DTYPES,
    VALUE_HEAD,
    ScaledBlocks,
    TensorSource,
    Wanted,
    check_dtypes,
    check_not_packed,
    open_files,
    read_tensors,
    split_experts,
    unknown_tensors,
    unwrapped,
    weight_files,
    with_scales,
)
from pi_gguf.common.private import replace_backend, tied_weights
from pi_gguf.common.progress import phase
from pi_gguf.errors import CheckpointError, ResourceError, UnsupportedError, one_line
from pi_gguf.families import FAMILIES, Family
from pi_gguf.families.family import head_dim, kv_heads, rotary_dim
from pi_gguf.families.shapes import LAYOUTS, Adapted, adapted
from pi_gguf.scaling.methods import find_method
from pi_gguf.scaling.own import divisors_scaling
from pi_gguf.scaling.rope import RopeScaling

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_MEBIBYTE = 2**20


T = TypeVar("T")


def _of_files(read: Callable[[Any], T]) -> cached_property[T]:
    """Make a cached property that no scaling changes: an extended checkpoint has that of the one it was made from."""

    @wraps(read)
    def shared(checkpoint: Checkpoint) -> T:
        before = checkpoint.before
        if before is None:
            return read(checkpoint)
        value: T = getattr(before, read.__name__)
        return value

    return cached_property(shared)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint of one of the families.

    Args:
        source: MODEL as the user gave it.
        path: the local folder.
        config: fields of its config.json, with `rope` where that was extended; of a vision-language model those of its
            text model.
        hf_config: the same, opened, with defaults and standard names as transformers has them.
        rope: the position scaling of the model.
        configuration: all that was read of config.json.
        before: the checkpoint this one was extended from; None where it was not.
    """

    source: str
    path: Path
    config: dict[str, Any]
    hf_config: Any
    rope: RopeScaling
    configuration: Configuration
    before: Checkpoint | None = field(default=None, kw_only=True, repr=False)

    @property
    def name(self) -> str:
        """What the model is called: never a place on this machine."""
        return model_name(self.source)

    @property
    def family(self) -> Family:
        return FAMILIES[self.config["model_type"]]

    def extended(self, context: int, method: str = "linear") -> Self:
        """Return this model extended to a window of `context` tokens: the same weights under another scaling.

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
        checkpoint = replace(self.scaled(rope), before=self)
        plain = self.configuration.is_plain and method == "linear"  # which transformers computes for every family
        config = checkpoint.hf_config if plain else checkpoint._scaled_config().get_text_config()
        check_variant(self.family, config, path)
        check_rope(rope, self.family, config, path)
        if not plain:
            check_rotation(self.skeleton, config, rope, self.rotary_dim, path)
        return checkpoint

    def scaled(self, rope: RopeScaling) -> Self:
        """Return this model with `rope` as its scaling, which is not checked against the model."""
        hf_config = copy.deepcopy(self.hf_config)
        rope.apply_to(hf_config)
        return replace(self, rope=rope, config=rope.to_hf(self.config), hf_config=hf_config)

    @property
    def original(self) -> Checkpoint:
        """The model before it was extended; itself where it was not."""
        return self.before or self

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

    @_of_files
    def tied(self) -> bool:
        """Whether the head is the embedding: as the config says, unless the weights hold two that differ."""
        if not self.hf_config.tie_word_embeddings:
            return False
        try:
            if self._usual is not None:
                return True
            found = self._found
        except CheckpointError:  # not here, or said when `tensors` are asked for
            return True
        for head, origin in self._tied_keys.items():
            if head in found and origin in found and not _equal(found[head], found[origin]):
                note(
                    f"{self.path}: tie_word_embeddings is true, but {head} and {origin} differ; the head is kept as it "
                    "is, as transformers does"
                )
                return False
        return True

    @property
    def record(self) -> Record | None:
        """What `extend` recorded of the training; None for any other checkpoint."""
        return Record.read(self.path / RECORD_FILE)

    @property
    def tokenizer_dir(self) -> Path:
        """The folder whose tokenizer files hold: the checkpoint's own, but where an adapter brings its own tokens."""
        return self.path

    @property
    def bare_sentencepiece(self) -> bool:
        """Whether the tokenizer is a `tokenizer.model` alone."""
        return (self.tokenizer_dir / "tokenizer.model").exists() and not (
            self.tokenizer_dir / "tokenizer.json"
        ).exists()

    @property
    def adapter_hashes(self) -> dict[str, str]:
        """A hash of each adapter that is merged into the tensors, by what it is called in messages."""
        return {}

    @_of_files
    def skeleton(self) -> PreTrainedModel:
        """The model as transformers builds it, without memory for its weights."""
        import torch
        from transformers import AutoModelForCausalLM

        config = self.configuration.by_transformers.opened if self.configuration.is_plain else self.hf_config
        with torch.device("meta"):
            try:
                return AutoModelForCausalLM.from_config(config)
            except Exception as error:  # transformers raises many kinds for sizes that do not fit together
                raise CheckpointError(
                    f"{self.path / 'config.json'}: no model can be built from it ({one_line(error)})",
                    "correct the config",
                ) from error

    @_of_files
    def _saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that transformers saves, tied or not, in an order that is not its own."""
        if self.configuration.is_plain:
            shapes = LAYOUTS[self.family.model_type].shapes(self.hf_config)
        else:
            from transformers.core_model_loading import revert_weight_conversion

            saved = revert_weight_conversion(self.skeleton, self.skeleton.state_dict())
            shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        return {name: shapes[name] for name in sorted(shapes, key=in_order)}

    @_of_files
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must be on disk; shapes as torch has them (out, in)."""
        tied = self.tied_tensors
        return {name: shape for name, shape in self._saved_shapes.items() if name not in tied}

    @_of_files
    def adapted(self) -> Adapted:
        """What adapters of LoRA train of it."""
        return adapted(self.family.model_type, self._saved_shapes)

    @property
    def _tied_keys(self) -> dict[str, str]:
        if self.configuration.is_plain:
            return LAYOUTS[self.family.model_type].tied
        saved = self._wanted.renamed
        return {
            saved.get(head, head): saved.get(origin, origin) for head, origin in tied_weights(self.skeleton).items()
        }

    @property
    def untied_heads(self) -> list[str]:
        """Names of heads that are not the embedding."""
        return [] if self.tied else list(self._tied_keys)

    @property
    def tied_tensors(self) -> dict[str, str]:
        """Names of tensors that are not on disk, as each is the same as another: whose name is the value."""
        return self._tied_keys if self.tied else {}

    def n_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes.values())

    @_of_files
    def _wanted(self) -> Wanted:
        """The model's tensors, and how transformers holds them in memory."""
        from transformers.core_model_loading import revert_weight_conversion

        memory = self.skeleton.state_dict()
        saved = revert_weight_conversion(self.skeleton, memory)
        by_id = {id(tensor): name for name, tensor in saved.items()}
        embedding = self.skeleton.get_input_embeddings().weight
        return Wanted(
            shapes=self._saved_shapes,
            base_prefix=f"{self.skeleton.base_model_prefix}.",
            anchor=next(name for name, parameter in self.skeleton.named_parameters() if parameter is embedding),
            renamed={name: by_id[id(tensor)] for name, tensor in memory.items() if by_id.get(id(tensor), name) != name},
            fused=_fused(set(memory) - {n for n, t in memory.items() if id(t) in by_id}, saved),
        )

    @_of_files
    def _usual(self) -> dict[str, TensorSource] | None:
        """The tensors of the files, where these are those that the config says and no others; else None.

        Raises:
            CheckpointError: a file is missing or truncated.
        """
        if not self.configuration.is_plain or self.configuration.quantization:
            return None
        found: dict[str, TensorSource] = {}
        for path in self._weight_files():
            found.update(read_tensors(path))
        tied = self._tied_keys if self.hf_config.tie_word_embeddings else {}
        wanted = {name: shape for name, shape in self._saved_shapes.items() if name not in tied}
        if {name: source.shape for name, source in found.items()} != wanted:
            return None
        if any(source.dtype not in PLAIN_DTYPES for source in found.values()):
            return None
        return {name: found[name] for name in wanted}

    @_of_files
    def _read(self) -> tuple[dict[str, TensorSource], str]:
        """Every tensor of the files, by the name that transformers saves it by, in a form that can be read; and what
        the names in the files have before those of the model without its head."""
        raw: dict[str, TensorSource] = {}
        for path in self._weight_files():
            raw.update(read_tensors(path))
        quantization = self.configuration.quantization
        check_not_packed(raw, quantization.get("quant_method"))
        found, prefix, others = unwrapped(raw, self._wanted)
        if prefix not in (self._wanted.base_prefix, ""):
            note(
                f"{self.path}: the model is the tensors under {prefix}"
                + (f"; {others} others are left out" * (others > 0))
            )
        found = split_experts(with_scales(found, quantization.get("weight_block_size")), self._wanted)
        if quantization and not any(isinstance(source, ScaledBlocks) for source in found.values()):
            note(f"{self.path}: config.json says the weights are quantized, but they are not; that field is ignored")
        return found, prefix

    @property
    def _found(self) -> dict[str, TensorSource]:
        return self._read[0]

    @_of_files
    def tensors(self) -> dict[str, TensorSource]:
        """Every tensor of the model, in the order of `tensor_shapes`.

        Raises:
            CheckpointError: a file or tensor is missing, truncated or of another shape than the config says.
            UnsupportedError: a tensor that is not part of the model, or a dtype that is not handled.
        """
        if self._usual is not None:
            return self._usual
        found, wanted = dict(self._found), self.tensor_shapes
        known = self.skeleton.state_dict()
        for name, origin in self.tied_tensors.items():
            if origin not in found and name in found:  # transformers ties to the one that is there
                found[origin] = found.pop(name)
        unknown = []
        for name in [name for name in found if name not in wanted]:
            source = found.pop(name)
            if VALUE_HEAD.search(name):
                note(f"{self.path}: v_head, which rated texts in training, is left out")
            elif not (self.configuration.is_part or IGNORED_TENSORS.search(name) or name in known):
                unknown.append(source)
        self._check_complete(found, unknown)
        if unknown:
            raise unknown_tensors(unknown, self.config["model_type"])
        check_dtypes(found[name] for name in wanted)
        for name, shape in wanted.items():
            if (got := found[name].shape) != shape:
                resized = got[1:] == shape[1:] and name in {self._wanted.anchor, *self._tied_keys}
                raise CheckpointError(
                    f"{found[name].path}: {name} must have shape {list(shape)} by config.json, got {list(got)}",
                    f"if the vocabulary was resized, set vocab_size to {got[0]} in config.json"
                    if resized
                    else "config.json and weights are of different models",
                )
        return {name: found[name] for name in wanted}

    def _check_complete(self, found: dict[str, TensorSource], unknown: list[TensorSource]) -> None:
        missing = [name for name in self.tensor_shapes if name not in found]
        if not missing:
            return
        if not unknown and all(name in self._tied_keys for name in missing):
            raise CheckpointError(
                f"{self.path}: {missing[0]} is missing, and tie_word_embeddings is false in config.json or by default",
                "if the model has no head of its own, set tie_word_embeddings to true; else download the shard with it",
            )
        if unknown:
            raise unknown_tensors(unknown, self.config["model_type"])
        raise CheckpointError(
            f"{self.path}: {len(missing)} tensors are missing, the first is {missing[0]}",
            "download the checkpoint again; every shard must be there",
        )

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
        return weight_files(self.path, self.config.get("transformers_weights"))

    # Opening with transformers

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer, without added tokens that the embedding has no row for: no text can have them.

        Raises:
            CheckpointError: it does not open, or writes such a token by itself.
        """
        tokenizer = self.open_tokenizer()
        rowless = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if i >= self.vocab_size}
        if not rowless:
            return tokenizer
        own = {tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer("a")["input_ids"]}
        template = str(tokenizer.chat_template)
        if used := [f"{token!r} ({i})" for i, token in rowless.items() if i in own or token in template]:
            raise CheckpointError(
                f"{self.tokenizer_dir}: the tokenizer writes {', '.join(used[:4])}, config.json's vocab_size is "
                f"{self.vocab_size}: the embedding has no row for that",
                "take the tokenizer or the weights of this model that fit: one was resized without the other",
            )
        note(
            f"{self.tokenizer_dir}: the embedding has {self.vocab_size} rows, none for {len(rowless)} added tokens "
            f"({', '.join(list(rowless.values())[:4])}): they are left out"
        )
        return _without_tokens(tokenizer, set(rowless))

    def open_tokenizer(self, *, by_class: bool = False) -> PreTrainedTokenizerBase:
        """Open the tokenizer as it is; tokenizer.json is taken at its word.

        The classes that transformers 5 would choose by model_type rebuild parts of it: a Qwen 2 gets Qwen's
        pre-tokenizer and a padding token whatever its file says.

        Args:
            by_class: open it as that class, for comparison.

        Raises:
            CheckpointError: it does not open, or is code of the checkpoint's own, which is never run.
        """
        import transformers

        for file in TOKENIZER_FILES:
            if (self.tokenizer_dir / file).exists():
                check_size(self.tokenizer_dir / file)
        settings_path = self.tokenizer_dir / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        name = str(settings.get("tokenizer_class"))
        if settings.get("auto_map") and not hasattr(transformers, name):
            raise CheckpointError(
                f"{settings_path}: tokenizer_class: the tokenizer {name[:80]!r} is code of its own, which is not run",
                "remove auto_map if tokenizer.json alone gives the right tokens",
            )
        at_its_word = (self.tokenizer_dir / "tokenizer.json").exists() and not by_class
        # AutoTokenizer imports torch and the model classes, which take seconds and are not needed here.
        kind = transformers.PreTrainedTokenizerFast if at_its_word else transformers.AutoTokenizer
        try:
            tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(self.tokenizer_dir, trust_remote_code=False)
            tokenizer.model_max_length = sys.maxsize  # nothing is ever cut, whatever the file says
            tokenizer("a")
        except BaseException as error:  # transformers raises many kinds for a broken tokenizer
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise CheckpointError(
                f"{self.tokenizer_dir}: the tokenizer does not open ({one_line(error)})",
                "tokenizer.json or tokenizer.model must be in the folder",
            ) from error
        if tokenizer.chat_template is None and (path := self.tokenizer_dir / "chat_template.json").exists():
            tokenizer.chat_template = read_json(path).get("chat_template")
            note(f"{path}: its template, which transformers opens with the processor alone, is taken")
        return tokenizer

    def load_model(self, *, dtype: torch.dtype, device: str = "cpu", four_bits: bool = False) -> PreTrainedModel:
        """Open the model with transformers, under its scaling.

        Args:
            dtype: of the weights in memory.
            device: `cpu` or `cuda`.
            four_bits: hold the linear layers but the head in 4 bits (NF4, with bitsandbytes; CUDA only).
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = self._scaled_config()
        try:
            with phase(f"open {self.source} in transformers"):
                model = self._open_in_4_bits(config, dtype) if four_bits else self._open_model(config, dtype).to(device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"{self.path}: the model does not fit in memory ({one_line(error)})",
                "free memory, or use a larger machine",
            ) from error
        except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: transformers does not open the model ({one_line(error)})",
                "save it again with transformers' save_pretrained",
            ) from error
        model.config.tie_word_embeddings = self.tied
        return model

    def _scaled_config(self) -> PretrainedConfig:
        """Return the config as transformers reads it off the folder, with this scaling where that is another one."""
        config = copy.deepcopy(self.configuration.whole)
        if self.rope != self.configuration.rope:
            self.rope.apply_to(config.get_text_config())
        return config

    def _open_model(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        return self._open_folder(config, dtype=dtype)

    def _open_in_4_bits(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Open the model on the current GPU, each tensor quantized as it is read."""
        import torch
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        return self._open_folder(
            config, dtype=dtype, device_map={"": torch.cuda.current_device()}, quantization_config=quantization
        )

    def _open_folder(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Open the folder's own files with transformers; of a vision-language model the text model in it."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        scaled = [source for source in self._found.values() if isinstance(source, ScaledBlocks)]
        readable = self.configuration.quantization.get("quant_method") == "fp8" and all(s.is_even for s in scaled)
        if hasattr(config, "quantization_config") and not (scaled and readable):
            del config.quantization_config
        elif hasattr(config, "quantization_config"):
            config.quantization_config = {**config.quantization_config, "dequantize": True}
        if scaled and not readable:
            note(
                f"{self.path}: transformers does not read these 8-bit weights here; the model has them as pi-gguf does"
            )
            return self._open_values(config, **options)
        prefix, base = self._read[1], self._wanted.base_prefix
        if not self.configuration.is_part and prefix not in (base, ""):
            outer = prefix.removesuffix(base)
            options["key_mapping"] = {f"^{re.escape(prefix)}": base, f"^{re.escape(outer)}": ""}
        kind = AutoModelForImageTextToText if self.configuration.is_part else AutoModelForCausalLM
        with without_adapter(self.path, self._weight_files()) as folder:
            model: PreTrainedModel = kind.from_pretrained(
                folder, config=config, use_safetensors=True, trust_remote_code=False, **options
            )
        return self._text_part(model) if self.configuration.is_part else model

    def _open_values(self, config: PretrainedConfig, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        """Open the model with the tensors' values as they are read here."""
        with open_files() as files:
            values = {name: source.read(files).to(dtype) for name, source in self.tensors.items()}
        text, kind = config.get_text_config(), type(self.skeleton)
        model: PreTrainedModel = kind.from_pretrained(None, config=text, state_dict=values, dtype=dtype, **options)
        return model

    def _text_part(self, whole: PreTrainedModel) -> PreTrainedModel:
        """Return the text model in a vision-language model, as a model of its own."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(whole.config.get_text_config())
        setattr(model, model.base_model_prefix, whole.get_decoder())
        model.set_output_embeddings(whole.get_output_embeddings())
        return model


def load_checkpoint(model: str, *, config_only: bool = False, weights: bool = True, plain: bool = False) -> Checkpoint:
    """Open MODEL and check its config.

    Args:
        model: a Hugging Face folder, a Hub id such as `meta-llama/Llama-2-7b-hf`, or `bundled:tiny`.
        config_only: fetch nothing but the config from the Hub, to plan with.
        weights: fetch the weights too, not only config and tokenizer.
        plain: open a usual model without transformers, as `config_only` does, until something asks for more than names,
            shapes and numbers; its angles are not compared then.

    Raises:
        CheckpointError: it is not there, or its config lacks a field.
        UnsupportedError: its family, or a variant of it, is not handled.
    """
    path = resolve(model, _CONFIG)
    configuration = read_config(path, plain=plain or config_only)
    config_path, opened = path / "config.json", configuration.opened
    check_variant(configuration.family, opened, config_path)
    if not config_only:
        path = resolve(
            model, _TOKENIZER + _WEIGHTS * weights
        )  # from the Hub only now, when the config is known to be handled
    checkpoint = Checkpoint(model, path, configuration.fields, opened, configuration.rope, configuration)
    if not configuration.family.alibi:
        check_rope(checkpoint.rope, configuration.family, opened, config_path)
    if not (configuration.family.alibi or configuration.is_plain):
        _keep_rotated_share(checkpoint, config_path)
        check_rotation(
            checkpoint.skeleton, configuration.whole.get_text_config(), checkpoint.rope, checkpoint.rotary_dim,
            config_path,
        )  # fmt: skip
    if (path / ADAPTER_FILE).exists():
        note(f"{path}: the adapter in the folder ({ADAPTER_FILE}) is left aside; --lora {path} would merge it")
    return checkpoint


def _keep_rotated_share(checkpoint: Checkpoint, path: Path) -> None:
    """Drop a share of rotated dimensions that transformers takes no notice of for this family."""
    rope = checkpoint.hf_config.rope_parameters
    if "partial_rotary_factor" not in rope or checkpoint.rotary_dim == checkpoint.head_dim:
        return
    if rotated_dimensions(checkpoint.skeleton, checkpoint.hf_config, path) == checkpoint.head_dim:
        share = rope.pop("partial_rotary_factor")
        if rope["rope_type"] not in ("default", "dynamic"):
            raise CheckpointError(
                f"{path}: partial_rotary_factor is {share} beside rope_type {rope['rope_type']}, but this family "
                "rotates whole heads",
                "remove partial_rotary_factor",
            )
        note(f"{path}: partial_rotary_factor {share} has no effect in this family: whole heads are rotated")


def _without_tokens(tokenizer: Any, ids: set[int]) -> PreTrainedTokenizerBase:
    """Take added tokens out of an opened tokenizer."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    parsed["added_tokens"] = [token for token in parsed["added_tokens"] if token["id"] not in ids]
    if tokenizer.pad_token_id in ids:
        tokenizer.pad_token = None
    replace_backend(tokenizer, type(tokenizer.backend_tokenizer).from_str(json.dumps(parsed)))
    opened: PreTrainedTokenizerBase = tokenizer
    return opened


def in_order(name: str) -> list[tuple[bool, int, str]]:
    """Return what sorts names of tensors by their parts, layer 10 behind layer 9."""
    return [(part.isdigit(), int(part), "") if part.isdigit() else (False, 0, part) for part in name.split(".")]


def _equal(one: TensorSource, other: TensorSource) -> bool:
    """Tell whether two tensors hold the same numbers."""
    with open_files() as files:
        return one.shape == other.shape and bool((one.read(files) == other.read(files)).all())


def _fused(in_memory: set[str], saved: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Return tensors that transformers holds for all experts of a layer -> the names of their parts on disk.

    Args:
        in_memory: names of tensors in memory that are on disk in several parts.
        saved: tensors by their names on disk.
    """
    parts: dict[tuple[str, str], list[str]] = {}
    for name in saved:
        if match := re.search(r"\.(\d+)\..*\.experts\.\d+\.(\w+)\.weight$", name):
            parts.setdefault((match[1], match[2]), []).append(name)
    fused = {}
    for name in in_memory:
        layer = re.search(r"\.(\d+)\.", name)
        of_layer = {kind: names for (number, kind), names in parts.items() if layer and number == layer[1]}
        kinds = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
        chosen = kinds[:2] if name.endswith("gate_up_proj") else kinds[2:]
        fused[name] = [of_layer[kind] for either in chosen for kind in either if kind in of_layer]
    return fused


_CONFIG, _TOKENIZER, _WEIGHTS = ["config.json"], ["*.json", "*.jinja", "tokenizer.model"], ["model*.safetensors"]
"""Files of a model on the Hub, by pattern."""


def is_panic(error: BaseException) -> bool:
    """Tell whether an error is that of a Rust library that gave up, which is no Exception."""
    return type(error).__name__ == "PanicException"
