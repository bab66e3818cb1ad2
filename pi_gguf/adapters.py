"""LoRA adapters of PEFT: read, checked, and merged into a checkpoint's tensors while these are read.

In: a checkpoint and folders with adapter_config.json and adapter_model.safetensors. Out: the checkpoint, whose tensors
now read as W + scaling * B A in 32 bits. Whatever cannot be merged exactly is an error; peft itself is not needed.

r rank, D_in and D_out the widths of a linear layer, V vocabulary, D width of the embedding.
Source: LoRA, arXiv 2106.09685, section 4.1; rank-stabilized scaling, arXiv 2312.03732.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pi_gguf.checkpoint import (
    PROVENANCE_FILE,
    Checkpoint,
    TensorSource,
    is_file,
    read_json,
    read_provenance,
    read_rope,
    read_tensor_list,
)
from pi_gguf.errors import CheckpointError, OptionError, UnsupportedError
from pi_gguf.rope import RopeScaling, positive_int, positive_number

if TYPE_CHECKING:
    import torch

_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MERGE = "merge it with peft (merge_and_unload, then save_pretrained) and convert that folder"

_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Fields of adapter_config.json that are read here, or that say nothing the tensors do not say: `target_modules` chose
the tensors that are there, and `fan_in_fan_out` is for layers that no family here has (peft drops it as well). Any
other field must be unset."""

_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Those that leave the base weights alone; others (PiSSA, OLoRA, ...) count from weights that are not the MODEL's."""

_LOW_RANK = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")

_T = TypeVar("_T")


# What an adapter does to one tensor


@dataclass(frozen=True)
class Replacement:
    """Another whole tensor: of `modules_to_save`, a trained bias, or the base of an adapted embedding."""

    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        return _read_finite(self.source, files)


@dataclass(frozen=True)
class LowRank:
    """An addition of scaling * B A, or its transpose for an embedding.

    Args:
        a: (r, D_in); of an embedding (r, V).
        b: (D_out, r); of an embedding (D, r).
        scaling: alpha / r, dimensionless.
        embedding: whether the tensor looks up rows (V, D).
    """

    a: TensorSource
    b: TensorSource
    scaling: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.embedding else shape

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        a, b = _read_finite(self.a, files).float(), _read_finite(self.b, files).float()
        change = (b @ a).mul_(self.scaling)
        return (change.T if self.embedding else change).add_(tensor)  # in place: one tensor in 32 bits, not two


@dataclass(frozen=True)
class Addition:
    """An addition of scaling * a vector: the bias of a layer's B."""

    source: TensorSource
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        return tensor.float() + _read_finite(self.source, files).float() * self.scaling


Change = Replacement | LowRank | Addition


@dataclass(frozen=True)
class MergedTensor(TensorSource):
    """A tensor of the checkpoint as it reads after the changes of adapters, in 32 bits."""

    changes: tuple[Change, ...]

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        tensor = super().read(files)
        for change in self.changes:
            tensor = change.apply(tensor, files)
        return tensor.float()


@dataclass(frozen=True)
class ScaledTensor(TensorSource):
    """A tensor times a number, in 32 bits."""

    by: float

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        return super().read(files).float() * self.by


def _read_finite(source: TensorSource, files: dict[Path, Any]) -> torch.Tensor:
    tensor = source.read(files)
    if not all(math.isfinite(value) for value in tensor.aminmax()):
        raise CheckpointError(f"{source.path}: {source.name} holds NaN or infinity", "the adapter is damaged")
    return tensor


# Adapters


@dataclass(frozen=True)
class Adapter:
    """A checked adapter of one model.

    Args:
        path: its folder.
        changes: what it does, by the name of the tensor it does it to, in that order.
        rope: the position scaling it was trained with, where its folder states one.
    """

    path: Path
    changes: dict[str, list[Change]]
    rope: RopeScaling | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def sha256(self) -> str:
        """Return a hash of config and weights."""
        digest = hashlib.sha256((self.path / _CONFIG_FILE).read_bytes())
        with (self.path / _WEIGHTS_FILE).open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint that reads as if its adapters were merged into it; made by `with_adapters`.

    Args:
        adapters: in the order in which they are merged.
    """

    adapters: tuple[Adapter, ...]

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        merged: dict[str, TensorSource] = {}
        for name, source in super().tensors.items():
            changes = [change for adapter in self.adapters for change in adapter.changes.get(name, ())]
            merged[name] = source
            if changes:
                merged[name] = MergedTensor(source.path, source.name, source.shape, "F32", tuple(changes))
        return merged

    @property
    def rope_stated(self) -> bool:
        """Whether an adapter states the position scaling it was trained with."""
        return any(adapter.rope is not None for adapter in self.adapters)

    @property
    def provenance(self) -> dict[str, Any]:
        """What was recorded of the training, the checkpoint's and the adapters'; the source is the checkpoint's."""
        record = dict(super().provenance)
        for adapter in self.adapters:
            trained = read_provenance(adapter.path)
            record |= {name: trained[name] for name in ("steps", "tokens") if name in trained}
        return record

    @property
    def adapter_hashes(self) -> dict[str, str]:
        return {f"adapter {i} ({adapter.name})": adapter.sha256() for i, adapter in enumerate(self.adapters, 1)}

    def extended(self, context: int, method: str = "linear") -> RopeScaling:
        if not self.rope_stated:
            return super().extended(context, method)
        if context != self.rope.max_position_embeddings:
            raise OptionError(
                f"context must be the adapter's {self.rope.max_position_embeddings} tokens, got {context}",
                "leave --context out",
            )
        return self.rope

    def _open_model(self, config: Any, dtype: torch.dtype) -> Any:
        files: dict[Path, Any] = {}
        weights = {name: source.read(files).to(dtype) for name, source in self.tensors.items()}
        return type(self.skeleton).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def with_adapters(checkpoint: Checkpoint, folders: Sequence[str]) -> AdaptedCheckpoint:
    """Return the checkpoint with adapters merged into it, tensor by tensor as they are read.

    Its position scaling is the one that an adapter's folder states, where one does.

    Args:
        checkpoint: that the adapters were trained on.
        folders: with adapter_config.json and adapter_model.safetensors, in the order of merging.

    Raises:
        CheckpointError: an adapter is missing, partial, or of another model.
        OptionError: adapters that exclude each other.
        UnsupportedError: something that cannot be merged exactly.
    """
    adapters = [_load_adapter(folder, checkpoint) for folder in folders]
    touched: dict[str, tuple[Adapter, bool]] = {}
    rope: tuple[Adapter, RopeScaling] | None = None
    for adapter in adapters:
        for name, changes in adapter.changes.items():
            whole = isinstance(changes[0], Replacement)
            before = touched.setdefault(name, (adapter, whole))
            if before[0] is not adapter and (whole or before[1]):
                raise OptionError(
                    f"{adapter.path} and {before[0].path}: both change {name}, and one of them replaces it",
                    "merge one of the two",
                )
        if adapter.rope is not None:
            if rope is not None and rope[1] != adapter.rope:
                raise OptionError(
                    f"{adapter.path}: trained with factor {adapter.rope.factor:g}, {rope[0].path} with "
                    f"{rope[1].factor:g}",
                    "merge adapters of one position scaling only",
                )
            rope = adapter, adapter.rope
    fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(Checkpoint)}
    return AdaptedCheckpoint(**{**fields, "rope": rope[1] if rope else checkpoint.rope}, adapters=tuple(adapters))


def low_rank_changes(checkpoint: AdaptedCheckpoint) -> dict[str, LowRank]:
    """Return what the one adapter of a checkpoint does, if it only adds products of low rank.

    Raises:
        UnsupportedError: it replaces a tensor, or adds to a bias.
    """
    [adapter] = checkpoint.adapters
    found, files = {}, dict[Path, Any]()
    for name, changes in adapter.changes.items():
        for change in changes:
            if isinstance(change, LowRank):
                found[name] = change
                continue
            base = TensorSource.read(checkpoint.tensors[name], files)
            if not change.apply(base, files).float().equal(base.float()):  # peft saves the base of embeddings along
                raise UnsupportedError(
                    f"{adapter.path / _WEIGHTS_FILE}: {change.source.name} changes {name} as a whole, which a GGUF "
                    "adapter cannot hold",
                    "convert without --adapter-only: the adapter is then merged",
                )
    return found


def _load_adapter(folder: str, checkpoint: Checkpoint) -> Adapter:
    path = Path(folder)
    config_path, weights_path = path / _CONFIG_FILE, path / _WEIGHTS_FILE
    for wanted in (config_path, weights_path):
        if not is_file(wanted):
            hint = "--lora takes a folder as peft saves it"
            if wanted is weights_path and is_file(path / "adapter_model.bin"):
                hint = "only safetensors are read: save the adapter again with save_pretrained"
            raise CheckpointError(f"{path}: {wanted.name} is missing", hint)
    config = read_json(config_path)
    _check_config(config, config_path)
    changes = _read_changes(read_tensor_list(weights_path), _Scaling(config, config_path), checkpoint, weights_path)
    replaced = [name for name, listed in changes.items() if isinstance(listed[0], Replacement)]
    replaced += [name for name, origin in checkpoint.tied_tensors.items() if origin in replaced]
    for module in config.get("modules_to_save") or ():
        if not any(module in name for name in replaced):
            raise CheckpointError(
                f"{config_path}: modules_to_save names {module!r}, and {_WEIGHTS_FILE} has no such tensor of the model",
                "save the adapter again; without them the model is not the one that was trained",
            )
    return Adapter(path, changes, _stated_rope(path, checkpoint))


def _check_config(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type must be LORA, got {config.get('peft_type')!r}", _MERGE)
    if config.get("init_lora_weights") not in _INITIALIZATIONS:
        raise UnsupportedError(
            f"{path}: init_lora_weights: {str(config['init_lora_weights'])[:80]!r} changes the base weights before "
            "training",
            "save the adapter with path_initial_model_for_weight_conversion, which makes it a plain one",
        )
    for name, value in config.items():
        if name not in _FIELDS and value not in (None, False) and value not in ([], {}, ""):
            raise UnsupportedError(f"{path}: {name} must be unset, got {str(value)[:80]}", _MERGE)
    modules = config.get("modules_to_save")
    if modules is not None and not (isinstance(modules, list) and all(isinstance(m, str) for m in modules)):
        raise CheckpointError(f"{path}: modules_to_save must be a list of names, got {str(modules)[:80]}", "correct it")


class _Scaling:
    """Rank and scaling of each module, by adapter_config.json."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.path, self.root = path, config.get("use_rslora", False)
        if not isinstance(self.root, bool):
            raise CheckpointError(f"{path}: use_rslora must be true or false, got {self.root!r}", "correct the config")
        self.rank, self.alpha = positive_int(config, "r", str(path)), self._number(config, "lora_alpha")
        ranks, alphas = self._pattern(config, "rank_pattern"), self._pattern(config, "alpha_pattern")
        self.ranks = {name: positive_int(ranks, name, f"{path}: rank_pattern") for name in ranks}
        self.alphas = {name: self._number(alphas, name, "alpha_pattern: ") for name in alphas}

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and scaling of a module, by its name in the model."""
        rank, alpha = _matching(self.ranks, module, self.rank), _matching(self.alphas, module, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.root else alpha / rank

    def _number(self, fields: Mapping[str, Any], name: str, where: str = "") -> float:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            got = "nothing" if value is None else repr(value)[:80]
            raise CheckpointError(f"{self.path}: {where}{name} must be a number, got {got}", "correct the config")
        return value

    def _pattern(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(
                f"{self.path}: {name} must map modules to numbers, got {str(patterns)[:80]}", "correct the config"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{self.path}: {name}: {pattern[:80]!r} is not a regular expression ({error})",
                    "correct the config",
                ) from error
        return patterns


def _matching(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern that is the module's name or an end of it."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


# The tensors of an adapter


def _read_changes(
    found: dict[str, TensorSource], scaling: _Scaling, checkpoint: Checkpoint, path: Path
) -> dict[str, list[Change]]:
    """Sort an adapter's tensors by the tensor of the model that each belongs to; all must fit, and none be left."""
    wholes: dict[str, Replacement] = {}
    parts: dict[str, dict[str, TensorSource]] = {}
    biases: dict[str, TensorSource] = {}
    names: set[str] = set()
    for stored, source in found.items():
        name = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if name in names:
            raise CheckpointError(f"{path}: {stored} is there under two names", "save the adapter again")
        names.add(name)
        if match := re.fullmatch(r"(.+)\.lora_B\.bias", name):
            biases[match[1]] = source
        elif match := _LOW_RANK.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = source
        else:
            wholes[name] = Replacement(source)
    if not found:
        raise CheckpointError(f"{path}: holds no tensors", "save the adapter again")
    _drop_tied(wholes, parts, checkpoint, path)
    changes: dict[str, list[Change]] = {name: [whole] for name, whole in wholes.items()}
    for module, pair in parts.items():
        changes.setdefault(f"{module}.weight", []).append(_low_rank(module, pair, scaling, path))
    for module, source in biases.items():
        changes.setdefault(f"{module}.bias", []).append(Addition(source, scaling.of(module)[1]))
    model = checkpoint.tensors
    for name, change in ((name, change) for name, listed in changes.items() for change in listed):
        stored = next(s.name for s in _sources(change))
        if name not in model:
            raise UnsupportedError(
                f"{path}: {stored} fits no tensor of the model, which has no {name}",
                "check that MODEL is the one the adapter was trained on",
            )
        if change.shape != model[name].shape:
            raise CheckpointError(
                f"{path}: {stored} makes {list(change.shape)} of {name}, which has shape {list(model[name].shape)}",
                "check that MODEL is the one the adapter was trained on, with the same vocabulary",
            )
    return {name: changes[name] for name in model if name in changes}


def _sources(change: Change) -> Iterator[TensorSource]:
    if isinstance(change, LowRank):
        yield from (change.a, change.b)
    else:
        yield change.source


def _low_rank(module: str, pair: dict[str, TensorSource], scaling: _Scaling, path: Path) -> LowRank:
    kinds = [("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")]
    kind = next((kind for kind in kinds if set(kind) == set(pair)), None)
    if kind is None:
        raise CheckpointError(
            f"{path}: {module} must have lora_A and lora_B, got {' and '.join(sorted(pair))} alone",
            "save the adapter again",
        )
    a, b = pair[kind[0]], pair[kind[1]]
    rank, factor = scaling.of(module)
    for source, side in ((a, 0), (b, 1)):
        if len(source.shape) != 2 or source.shape[side] != rank:
            raise CheckpointError(
                f"{path}: {source.name} must have rank {rank} by {_CONFIG_FILE}, got shape {list(source.shape)}",
                "config and weights are of different adapters",
            )
    return LowRank(a, b, factor, embedding=kind == kinds[1])


def _drop_tied(
    wholes: dict[str, Replacement], parts: dict[str, dict[str, TensorSource]], checkpoint: Checkpoint, path: Path
) -> None:
    """Drop the second copy of a tied tensor that is replaced; refuse what would make the two differ."""
    for name, origin in checkpoint.tied_tensors.items():
        for module in (origin, name):
            if pair := parts.get(module.removesuffix(".weight")):
                raise UnsupportedError(
                    f"{path}: {next(iter(pair.values())).name} would untie {name} from {origin}, which are one tensor "
                    "in this model",
                    "untie the model (tie_word_embeddings false, both tensors saved), then convert with the adapter",
                )
        pair_of_wholes = [wholes.get(origin), wholes.pop(name, None)]
        given = [whole for whole in pair_of_wholes if whole]
        if not given:
            continue
        files: dict[Path, Any] = {}
        copies = [whole.source.read(files).float() for whole in given]
        if len(copies) < 2 or not copies[0].equal(copies[1]):
            raise UnsupportedError(
                f"{path}: {given[-1].source.name} would untie {name} from {origin}, which are one tensor in this model",
                "save the adapter with both in modules_to_save and ensure_weight_tying, or untie the model first",
            )


# Position scaling


def _stated_rope(folder: Path, checkpoint: Checkpoint) -> RopeScaling | None:
    """Return the scaling that an adapter's folder states, in its config.json or in the record of `extend`.

    The factor is the adapter's, the window the model's: configs are about with the window before scaling and after.

    Returns:
        None where nothing is stated, or what the model has anyway.
    """
    stated = [s for s in (_rope_of_config(folder, checkpoint), _rope_of_record(folder, checkpoint)) if s is not None]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise CheckpointError(
            f"{folder}: config.json states factor {stated[0].factor:g}, {PROVENANCE_FILE} {stated[1].factor:g}",
            "delete the file that is wrong",
        )
    return stated[0] if stated else None


def _rope_of_config(folder: Path, checkpoint: Checkpoint) -> RopeScaling | None:
    path, base = folder / "config.json", checkpoint.rope
    if not path.exists():
        return None
    config = read_json(path)
    if config.get("model_type") != checkpoint.family.model_type:
        raise CheckpointError(
            f"{path}: model_type must be the model's {checkpoint.family.model_type}, got {config.get('model_type')!r}",
            "check that MODEL is the one the adapter was trained on",
        )
    stated = read_rope(config, checkpoint.family, str(path))
    if stated == base:
        return base if base.rope_type == "linear" else None
    window, scaled = base.max_position_embeddings, round(base.max_position_embeddings * stated.factor)
    if stated.rope_theta != base.rope_theta or stated.sliding_rope_theta != base.sliding_rope_theta:
        raise UnsupportedError(
            f"{path}: rope_theta must be the model's {base.rope_theta:g}, got {stated.rope_theta:g}",
            "check that MODEL is the one the adapter was trained on",
        )
    if stated.rope_type != "linear" or base.rope_type != "default" or stated.factor == 1:
        kinds = [rope.own.rope_type if rope.own else rope.rope_type for rope in (stated, base)]
        raise UnsupportedError(
            f"{path}: states rope_type {kinds[0]}, factor {stated.factor:g} and a window of "
            f"{stated.max_position_embeddings} tokens; MODEL has {kinds[1]}, {base.factor:g} and {window}",
            "delete this config.json if the adapter was trained with MODEL's own positions",
        )
    if stated.max_position_embeddings not in (window, scaled):
        raise CheckpointError(
            f"{path}: max_position_embeddings must be the model's {window} or {scaled}, its "
            f"{stated.factor:g}-fold, got {config.get(checkpoint.family.window)}",
            "check that MODEL is the one the adapter was trained on",
        )
    return checkpoint.extended(scaled)


def _rope_of_record(folder: Path, checkpoint: Checkpoint) -> RopeScaling | None:
    path, base = folder / PROVENANCE_FILE, checkpoint.rope
    record = read_provenance(folder)
    if not record:
        return None
    if record.get("rope_type") != "linear":
        raise UnsupportedError(
            f"{path}: rope_type must be linear, got {record.get('rope_type')!r}", "delete the file if nothing is scaled"
        )
    context, original = (positive_int(record, name, str(path)) for name in ("context", "original_window"))
    factor = positive_number(record.get("factor", context / original), "factor", str(path))
    if original != base.original_max_position_embeddings:
        raise CheckpointError(
            f"{path}: original_window must be the model's {base.original_max_position_embeddings}, got {original}",
            "check that MODEL is the one the adapter was trained on",
        )
    if context <= original or abs(original * factor - context) > 1:
        raise CheckpointError(
            f"{path}: context {context} must be above original_window {original}, by factor {factor:g}",
            "correct the file",
        )
    if base.rope_type == "linear" and base.max_position_embeddings == context:
        return base
    return checkpoint.extended(context)
