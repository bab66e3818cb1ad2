"""Adapters of LoRA, merged into a checkpoint's tensors while these are read.

In: a checkpoint and the adapters' folders, as peft saves them. Out: the checkpoint, whose tensors now read as peft's
merge gives them, one adapter after the other. Whatever cannot be merged exactly is an error; peft itself is not needed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pi_gguf.adapters.files import CONFIG_FILE, AdapterFiles, load_adapter_files
from pi_gguf.adapters.merging import (
    Addition,
    Change,
    LowRank,
    MergedTensor,
    Piece,
    Replacement,
    Residual,
    Rows,
    WeightDecomposed,
)
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.config import read_json, read_rope
from pi_gguf.checkpoint.record import RECORD_FILE, Record
from pi_gguf.checkpoint.tensors import TensorSource, open_files
from pi_gguf.common.files import is_file
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckpointError, OptionError, UnsupportedError
from pi_gguf.scaling.own import positive_int, positive_number
from pi_gguf.scaling.rope import RopeScaling

if TYPE_CHECKING:
    import torch

_OTHER_MODEL = "check that MODEL is the one the adapter was trained on"
_VISION = re.compile(r"(?:model\.)?(?:vision_|visual\.|multi_modal_projector\.|mm_projector\.|audio_|embed_vision\.)")
"""Beginnings of names in the other parts of a vision-language model."""


@dataclass(frozen=True)
class Adapter:
    """A checked adapter of one model.

    Args:
        files: its folder, config and tensors.
        changes: what it does, by the name of the tensor it does it to, in that order.
        rope: the position scaling it was trained with, where its folder states one.
    """

    files: AdapterFiles
    changes: dict[str, list[Change]]
    rope: RopeScaling | None

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def name(self) -> str:
        return self.files.name


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint that reads as if its adapters were merged into it; made by `with_adapters`.

    Args:
        base: the checkpoint without them.
        adapters: in the order in which they are merged.
        merged: the tensors afterwards, in any order.
        tokens_dir: the folder whose tokenizer files hold.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    merged: dict[str, TensorSource]
    tokens_dir: Path

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        return {name: self.merged[name] for name in self.tensor_shapes}

    @property
    def tied(self) -> bool:
        return bool(self.hf_config.tie_word_embeddings)

    @property
    def tokenizer_dir(self) -> Path:
        return self.tokens_dir

    @property
    def rope_stated(self) -> bool:
        """Whether an adapter states the position scaling it was trained with."""
        return any(adapter.rope is not None for adapter in self.adapters)

    @property
    def record(self) -> Record | None:
        """What was recorded of the training, the checkpoint's and the adapters'; the source is the checkpoint's."""
        record = super().record
        for adapter in self.adapters:
            if trained := Record.read(adapter.path / RECORD_FILE):
                record = dataclasses.replace(record or Record(), steps=trained.steps, tokens=trained.tokens)
        return record

    @property
    def adapter_hashes(self) -> dict[str, str]:
        return {f"adapter {i} ({adapter.name})": adapter.files.sha256() for i, adapter in enumerate(self.adapters, 1)}

    def extended(self, context: int, method: str = "linear") -> Self:
        if not self.rope_stated:
            return super().extended(context, method)
        if context != self.rope.max_position_embeddings:
            raise OptionError(
                f"context must be the adapter's {self.rope.max_position_embeddings} tokens, got {context}",
                "leave --context out",
            )
        return self

    def _open_model(self, config: Any, dtype: torch.dtype) -> Any:
        text = copy.deepcopy(config.get_text_config())
        text.vocab_size, text.tie_word_embeddings = self.vocab_size, self.tied
        if hasattr(text, "quantization_config"):
            del text.quantization_config  # of weights that were rounded; these are not
        return self._open_values(text, dtype=dtype)


def with_adapters(checkpoint: Checkpoint, folders: Sequence[str]) -> AdaptedCheckpoint:
    """Return the checkpoint with adapters merged into it, tensor by tensor as they are read.

    Its position scaling is the one that an adapter's folder states, where one does; its tokenizer that of the last
    adapter that brings another one than MODEL's.

    Args:
        checkpoint: that the adapters were trained on.
        folders: with adapter_config.json and adapter_model.safetensors, or Hub ids, in the order of merging.

    Raises:
        CheckpointError: an adapter is missing, partial, or of another model.
        OptionError: adapters that exclude each other.
        UnsupportedError: something that cannot be merged exactly.
    """
    model = _Model(checkpoint)
    adapters: list[Adapter] = []
    for folder in folders:
        files = load_adapter_files(folder)
        adapters.append(Adapter(files, model.merge(files), _stated_rope(files.path, checkpoint)))
    rows = model.check_vocabulary(adapters[-1].files)
    tokens_dir = checkpoint.tokenizer_dir
    for adapter in adapters:
        tokens_dir = _tokenizer_dir(adapter.path, checkpoint, tokens_dir, rows)
    stated = [adapter for adapter in adapters if adapter.rope is not None]
    for adapter in stated[1:]:
        if adapter.rope != stated[0].rope:
            raise OptionError(
                f"{adapter.path}: trained with factor {_factor(adapter):g}, {stated[0].path} with "
                f"{_factor(stated[0]):g}",
                "merge adapters of one position scaling only",
            )
    fields = {item.name: getattr(checkpoint, item.name) for item in dataclasses.fields(Checkpoint)}
    fields |= {**model.configs(), "before": None}  # its shapes may be others
    adapted = AdaptedCheckpoint(
        **fields, base=checkpoint, adapters=tuple(adapters), merged=model.tensors, tokens_dir=tokens_dir
    )
    rope = stated[0].rope if stated else None
    return adapted if rope is None else adapted.scaled(rope)


def _factor(adapter: Adapter) -> float:
    assert adapter.rope is not None
    return adapter.rope.factor


def low_rank_changes(checkpoint: AdaptedCheckpoint) -> dict[str, LowRank]:
    """Return what the one adapter of a checkpoint does, if it only adds products of low rank.

    Raises:
        UnsupportedError: it does something else, which a GGUF adapter cannot hold.
    """
    [adapter] = checkpoint.adapters
    found = {}
    tied = set(checkpoint.base.tied_tensors.values())
    for name, changes in adapter.changes.items():
        for change in changes:
            if isinstance(change, LowRank) and change.plain and name not in tied:
                found[name] = change
                continue
            if not (isinstance(change, Replacement) and _is_of(checkpoint.base.tensors.get(name), change)):
                source = next(iter(change.sources), None)
                raise UnsupportedError(
                    f"{adapter.files.weights}: {source.name if source else CONFIG_FILE} {_beyond(change)} {name}, "
                    "which a GGUF adapter cannot hold",
                    "convert without --adapter-only: the adapter is then merged",
                )
    return found


def _is_of(base: TensorSource | None, change: Replacement) -> bool:
    """Tell whether a replaced tensor is the model's own; peft saves the base of embeddings along."""
    if base is None or base.shape != change.source.shape:
        return False
    with open_files() as files:
        return bool(change.apply(None, files).float().equal(base.read(files).float()))


def _beyond(change: Change) -> str:
    if isinstance(change, WeightDecomposed):
        return "(DoRA) sets the length of the rows of"
    if isinstance(change, Rows):
        return "replaces rows of"
    if isinstance(change, Residual):
        return f"({change.kind}) counts from other values of"
    if isinstance(change, LowRank):
        return "changes, in a form of its own," if not change.plain else "changes, as input and output at once,"
    return "changes as a whole"


# The model that adapters are merged into


@dataclass
class _Edit:
    """What one adapter does to one tensor of the model as peft opens it.

    Args:
        starts: what peft takes out of it when it opens the adapter.
        base: what then takes its place.
        added: what is merged into it.
        copy: what stands in its place in the end, trained as a whole.
    """

    starts: list[Change] = field(default_factory=list)
    base: Change | None = None
    added: list[Change] = field(default_factory=list)
    copy: Replacement | None = None

    def changes(self) -> list[Change]:
        if self.copy:
            return [self.copy]
        return [*self.starts, *([self.base] if self.base else []), *self.added]


class _Model:
    """The tensors of a model while adapters are merged into it, one after the other.

    Two that are tied stay one tensor, as in peft's merge, until an adapter has another one in the place of either.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[str, TensorSource] = dict(checkpoint.tensors)
        self.tied = dict(checkpoint.tied_tensors)
        skeleton = checkpoint.skeleton
        self.modules = dict(skeleton.named_modules())
        ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
        self.embedding, self.head = (
            next((name for name, module in self.modules.items() if module is end), "") for end in ends
        )
        self.changed: dict[str, Path] = {}

    @property
    def _with_rows(self) -> list[str]:
        """The tensors with a row for each token."""
        named = [f"{self.embedding}.weight", f"{self.head}.weight", f"{self.head}.bias"]
        return [name for name in named if name in self.tensors]

    def configs(self) -> dict[str, Any]:
        """Return the configs that say what the model is now."""
        rows = self.tensors[f"{self.embedding}.weight"].shape[0]
        now = {"vocab_size": rows, "tie_word_embeddings": bool(self.tied)}
        if rows == self.checkpoint.vocab_size and now["tie_word_embeddings"] == bool(self.checkpoint.tied_tensors):
            return {}
        hf_config = copy.deepcopy(self.checkpoint.hf_config)
        for name, value in now.items():
            setattr(hf_config, name, value)
        return {"config": {**self.checkpoint.config, **now}, "hf_config": hf_config}

    def check_vocabulary(self, last: AdapterFiles) -> int:
        """Return how many rows embedding and head have; check that it is the same number.

        Raises:
            CheckpointError: they have not.
        """
        rows = {name: self.tensors[name].shape[0] for name in self._with_rows}
        if len(set(rows.values())) > 1:
            raise CheckpointError(
                f"{last.weights}: the vocabulary was resized, and not all of it is in the adapter: "
                + ", ".join(f"{name} has {count} rows" for name, count in rows.items()),
                "resize MODEL itself as before training (resize_token_embeddings, then save_pretrained), or save the "
                "adapter with save_embedding_layers=True",
            )
        before = self.checkpoint.vocab_size
        if (after := next(iter(rows.values()))) != before:
            say(f"note: {last.path}: the vocabulary has {after} rows, MODEL's {before}")
        return after

    def merge(self, files: AdapterFiles) -> dict[str, list[Change]]:
        """Merge an adapter; return what it does, by the tensor it does it to.

        Raises:
            CheckpointError: it is damaged or of another model.
            UnsupportedError: a tensor of it has no place in the model.
        """
        edits = _Reader(self, files).edits()
        changes = self._changes(edits, files)
        for name, listed in changes.items():
            self._check_shapes(name, listed, files)
            whole = any(isinstance(change, Replacement) for change in listed)
            if whole and name in self.changed:
                say(f"note: {files.path}: replaces {name}, which {self.changed[name]} changed before")
            self.changed[name] = files.path
        self.tensors |= {
            name: MergedTensor.of(self._tensor(name), tuple(listed), files.path) for name, listed in changes.items()
        }
        return changes

    def _tensor(self, name: str) -> TensorSource:
        """Return a tensor as it is now; of one that was tied until now, the one it was tied to."""
        return self.tensors[name if name in self.tensors else self.checkpoint.tied_tensors[name]]

    def _changes(self, edits: dict[str, _Edit], files: AdapterFiles) -> dict[str, list[Change]]:
        """Return the changes of each tensor, those of tied ones under the first's name; untie what becomes two."""
        pairs = {head: (edits.pop(origin, _Edit()), edits.pop(head, _Edit())) for head, origin in self.tied.items()}
        changes = {name: edit.changes() for name, edit in edits.items()}
        for head, (first, second) in pairs.items():
            origin = self.tied[head]
            shared = [*first.starts, *second.starts]
            shared += [base for base in [second.base or first.base] if base]
            shared += [*first.added, *second.added]
            apart = bool(first.base and second.base) and not _alike([first.base], [second.base])
            ends = [edit.changes() if edit.copy or apart else shared for edit in (first, second)]
            if not (apart or first.copy or second.copy) or _alike(*ends):
                self._say_shared(origin, head, first, second, files)
                if ends[0]:
                    changes[origin] = ends[0]
                continue
            say(f"note: {files.path}: {origin} and {head} are one tensor in MODEL, and two with this adapter")
            del self.tied[head]
            changes |= dict(zip((origin, head), ends, strict=True))
        order = [*self.tensors, *(name for name in changes if name not in self.tensors)]
        return {name: changes[name] for name in order if name in changes}

    def _say_shared(self, origin: str, head: str, first: _Edit, second: _Edit, files: AdapterFiles) -> None:
        products = [bool(edit.added) and not isinstance(edit.added[0], Rows) for edit in (first, second)]
        if not any(products):
            return
        how = "twice what either is in training" if all(products) else "what is one of the two in training"
        say(
            f"note: {files.path}: {origin} and {head} are one tensor in MODEL; it changes by {how}, as in peft's merge "
            "(untie MODEL first for a change of each)"
        )

    def _check_shapes(self, name: str, changes: list[Change], files: AdapterFiles) -> None:
        shape = before = self._tensor(name).shape
        grows = name in [f"{self.embedding}.weight", f"{self.head}.weight", f"{self.head}.bias"]
        for change in changes:
            after = change.shape(shape)
            may_grow = grows and isinstance(change, Replacement | Rows) and len(after) == len(shape)
            if isinstance(change, Rows) and max(change.indices, default=0) >= after[0]:
                raise CheckpointError(
                    f"{files.weights}: {change.source.name} is of token {max(change.indices)}, and {name} has "
                    f"{shape[0]} rows",
                    f"{_OTHER_MODEL}, with the same vocabulary",
                )
            if after != shape and not (may_grow and after[1:] == shape[1:] and after[0]):
                stored = next(iter(change.sources))
                hint = _OTHER_MODEL
                if grows and after[1:] == shape[1:]:
                    hint = (
                        "the vocabulary was resized before training: resize MODEL alike (resize_token_embeddings, then "
                        "save_pretrained), or save the adapter with save_embedding_layers=True"
                    )
                made = "another shape" if -1 in after else str(list(after))
                raise CheckpointError(
                    f"{files.weights}: {stored.name} makes {made} of {name}, which has shape {list(before)}", hint
                )
            shape = after


def _alike(ones: Sequence[Change | None], others: Sequence[Change | None]) -> bool:
    """Tell whether two tensors end as one: each replaced, by the same values."""
    (one, *left), (other, *right) = (ones or [None], others or [None])
    if left or right or not (isinstance(one, Replacement) and isinstance(other, Replacement)):
        return False
    with open_files() as files:
        return one.source.shape == other.source.shape and bool(
            one.apply(None, files).float().equal(other.apply(None, files).float())
        )


class _Reader:
    """Finds, for each tensor of an adapter, the tensor of the model that it is for."""

    def __init__(self, model: _Model, files: AdapterFiles) -> None:
        self.model, self.files, self.config = model, files, files.config
        self.found: dict[str, _Edit] = {}
        names = [*files.parts, *files.copies, *files.bases]
        self.of_vision = any("language_model." in name for name in names)
        self.left_out = 0

    def edits(self) -> dict[str, _Edit]:
        """Return what the adapter does to each tensor of the model."""
        for module, parts in self.files.parts.items():
            self._read_parts(module, parts)
        for name, source in self.files.bases.items():
            for edit, piece in self._places(name, source):
                if piece is None:
                    edit.base = Replacement(source)
                else:
                    edit.added.append(Replacement(source, piece))
        for name, source in self.files.copies.items():
            for edit, piece in self._places(name, source):
                edit.copy = Replacement(source, piece)
        if self.left_out:
            say(f"note: {self.files.path}: {self.left_out} tensors are of the vision part and left out")
        if not self.found:
            raise CheckpointError(f"{self.files.weights}: holds nothing of the text model", _OTHER_MODEL)
        self._check_saved_modules()
        return self.found

    def _places(self, name: str, source: TensorSource) -> Iterator[tuple[_Edit, Piece]]:
        """Yield what is known of each tensor that a name of the adapter means, and which part of it goes there."""
        places = self._find(name)
        if places is None:
            raise UnsupportedError(
                f"{self.files.weights}: {source.name} fits no tensor of the model, which has no {name}", _OTHER_MODEL
            )
        for place, piece in places:
            yield self.found.setdefault(place, _Edit()), piece

    def _find(self, name: str) -> list[tuple[str, Piece]] | None:
        """Return the tensors on disk that a name means; none for a part that is not of the text, None if unknown."""
        named = self._model_name(name)
        if named in self.model.tensors or named in self.model.tied:
            return [(named, None)]
        if named in self._memory:
            return self._memory[named]
        if self.of_vision and _VISION.match(name):
            self.left_out += 1
            return []
        return None

    def _model_name(self, name: str) -> str:
        """Return the name in this model of what was trained in another class: without a head, or with eyes."""
        prefix = f"{self.model.checkpoint.skeleton.base_model_prefix}."
        short = re.sub(r"^(?:model\.)?language_model\.(?:model\.)?", prefix, name)
        for candidate in (name, prefix + name, short, short.removeprefix(prefix)):
            known = candidate in self.model.tensors or candidate in self.model.tied or candidate in self._memory
            if known or candidate in self.model.modules:
                return candidate
        return name

    @cached_property
    def _memory(self) -> dict[str, list[tuple[str, Piece]]]:
        """Where the tensors lie that transformers holds under another name than the disk: fused experts, routers.

        Found with transformers' own way back: a tensor of its elements' numbers comes apart into the parts.
        """
        import torch
        from transformers.core_model_loading import revert_weight_conversion

        skeleton, places = self.model.checkpoint.skeleton, dict[str, list[tuple[str, Piece]]]()
        for name, tensor in skeleton.state_dict().items():
            if name in self.model.tensors or name in self.model.checkpoint.tied_tensors or tensor.ndim < 2:
                continue
            rows = tensor.shape[-2]
            numbers = torch.arange(math.prod(tensor.shape[:-1])).reshape(*tensor.shape[:-1], 1)
            parts: list[tuple[str, Piece]] = []
            for part, values in revert_weight_conversion(skeleton, {name: numbers}).items():
                first, last = (int(values.flatten()[i]) for i in (0, -1))
                piece = None if tensor.ndim == 2 else (first // rows, slice(first % rows, last % rows + 1))
                parts.append((part, piece))
            if all(part in self.model.tensors for part, _ in parts):
                places[name] = parts
        return places

    def _read_parts(self, module: str, parts: dict[str, TensorSource]) -> None:
        """Read a module's lora_A, lora_B and so on."""
        depth = 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        parts = dict(parts)
        delta = parts.pop("token_adapter.trainable_tokens_delta", None)
        if delta:
            rows = Rows(delta, self._token_rows(module, delta))
            for edit, _ in self._places(f"{module}.weight", delta):
                edit.added.append(rows)
        if not parts:
            return
        parameters = self._targeted_parameters(module)
        if depth >= max(1, len(parameters)):
            name = next(iter(parts.values())).name
            raise UnsupportedError(
                f"{self.files.weights}: {name} is of a parameter that target_parameters in {CONFIG_FILE} does not name",
                "config and weights are of different adapters",
            )
        name = f"{module}.{parameters[len(parameters) - 1 - depth] if parameters else 'weight'}"
        bias = parts.pop("lora_B.bias", None)
        first = next(iter(parts.values()), bias)
        assert first is not None
        scaling = self.config.scaling(name if parameters else module)
        for edit, piece in self._places(name, first):
            change = self._product(module, name, parts, scaling, piece)
            edit.starts += self._starts(module, change, scaling)
            edit.added.append(change)
        if bias:
            for edit, _ in self._places(f"{module}.bias", bias):
                edit.added.append(Addition(bias, scaling[1]))

    def _targeted_parameters(self, module: str) -> list[str]:
        """Return the parameters of a module that are adapted themselves; peft wraps the last around those before."""
        own = self.model.modules.get(self._model_name(module))
        if own is None or not self.config.target_parameters:
            return []
        return [
            name
            for name, _ in own.named_parameters(recurse=False)
            if any(f".{module}.{name}".endswith(f".{target}") for target in self.config.target_parameters)
        ]

    def _token_rows(self, module: str, delta: TensorSource) -> tuple[int, ...]:
        """Return the numbers of the tokens whose rows a tensor holds; a tied head's are those of the embedding."""
        embedding = self.model.embedding
        same = [module, *([embedding] if f"{self._model_name(module)}.weight" in self.model.tied else [])]
        for own in same:
            for name, rows in self.config.tokens.items():
                ours = own.endswith(name) if name else self._model_name(own) == embedding
                if ours and len(rows) == delta.shape[0]:
                    return rows
        raise CheckpointError(
            f"{self.files.weights}: {delta.name} has {delta.shape[0]} rows, and trainable_token_indices in "
            f"{CONFIG_FILE} does not say of which tokens",
            "config and weights are of different adapters",
        )

    def _starts(self, module: str, change: LowRank | WeightDecomposed, scaling: tuple[int, float]) -> list[Residual]:
        product = change.direction if isinstance(change, WeightDecomposed) else change
        if self.config.starts and product.piece is not None:
            raise UnsupportedError(
                f"{self.config.path}: init_lora_weights: {self.config.starts[0]} is not for parameters of experts "
                f"({module}), in peft as well",
                "set it to true if the adapter counts from MODEL's own weights",
            )
        starts = [] if product.embedding else [Residual(kind, *scaling) for kind in self.config.starts]
        most = min(product.shape(()))
        for start in starts:
            if start.rank > most - (start.kind == "kasa"):
                raise CheckpointError(
                    f"{self.files.weights}: {module} has rank {start.rank}, too many components for {start.kind} of a "
                    f"layer of width {most}",
                    "config and weights are of different adapters",
                )
        return starts

    def _product(
        self, module: str, name: str, parts: dict[str, TensorSource], scaling: tuple[int, float], piece: Piece
    ) -> LowRank | WeightDecomposed:
        weights, kinds = self.files.weights, [("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")]
        kind = next((kind for kind in kinds if set(kind) <= set(parts)), None)
        if kind is None:
            raise CheckpointError(
                f"{weights}: {module} must have lora_A and lora_B, got {' and '.join(sorted(parts))} alone",
                "save the adapter again",
            )
        more = {"lora_magnitude_vector": self.config.dora, "lora_diag": self.config.diagonal}
        wanted = {*kind, *(part for part, on in more.items() if on)}
        for part in sorted(wanted ^ set(parts)):
            says = "is missing" if part in wanted else f"fits no field of {CONFIG_FILE}"
            raise CheckpointError(f"{weights}: {module}.{part} {says}", "config and weights are of different adapters")
        a, b, experts = parts[kind[0]], parts[kind[1]], 1
        if piece is not None:
            experts = self.model.checkpoint.skeleton.get_parameter(self._model_name(name)).shape[0]
        blocks = self.config.blocks_of(module)
        for source, side, of_blocks in ((a, 0, 1), (b, 1, blocks[1])):
            if len(source.shape) != 2 or source.shape[side] * of_blocks != scaling[0] * experts:
                raise CheckpointError(
                    f"{weights}: {source.name} must have rank {scaling[0]} by {CONFIG_FILE}, got shape "
                    f"{list(source.shape)}",
                    "config and weights are of different adapters",
                )
        product = LowRank(a, b, scaling[1], kind == kinds[1], parts.get("lora_diag"), blocks, piece, experts)
        magnitude = parts.get("lora_magnitude_vector")
        return WeightDecomposed(product, magnitude) if magnitude else product

    def _check_saved_modules(self) -> None:
        """Check that each module that was trained as a whole is there."""
        origins = self.model.checkpoint.tied_tensors
        names = [*self.files.copies, *self.files.bases]
        names = [self._model_name(name) for name in names]
        names += [head for head, origin in origins.items() if origin in names]
        for wanted in self.config.modules_to_save:
            modules = [name for name in self.model.modules if name.endswith(wanted)]
            if modules and not any(name.startswith(f"{module}.") for module in modules for name in names):
                raise CheckpointError(
                    f"{self.config.path}: modules_to_save names {wanted[:80]!r}, and {self.files.weights.name} has no "
                    "such tensor of the model",
                    "save the adapter again; without them the model is not the one that was trained",
                )


# The tokenizer


def _tokenizer_dir(folder: Path, checkpoint: Checkpoint, now: Path, rows: int) -> Path:
    """Return the adapter's folder where its tokenizer has tokens that the other lacks, or its own chat template.

    Args:
        now: folder of the tokenizer that holds otherwise.
        rows: of the merged embedding; tokens beyond them the model does not have.
    """
    names = ("tokenizer.json", "tokenizer.model")
    if not any(is_file(folder / name) for name in names):
        return now
    texts = [*names, "tokenizer_config.json", "chat_template.jinja"]
    if all(_bytes(folder / name) == _bytes(now / name) for name in texts):
        return now
    try:
        own = dataclasses.replace(checkpoint, path=folder).open_tokenizer()
    except CheckpointError as error:
        raise CheckpointError(
            str(error), f"delete the tokenizer files in {folder} if MODEL's own tokenizer was used in training"
        ) from error
    tokens = own.get_vocab()
    if (last := max(tokens.values(), default=0)) >= rows:
        say(f"note: {folder}: its tokenizer has {last + 1} tokens, the model {rows} rows: MODEL's tokenizer is taken")
        return now
    if any(is_file(now / name) for name in names):
        before = dataclasses.replace(checkpoint, path=now).open_tokenizer()
        others = before.get_vocab()
        brings = bool(tokens.items() - others.items()) or max(others.values(), default=0) >= rows
        if not brings and (tokens != others or own.chat_template in (None, before.chat_template)):
            return now
    say(f"note: {folder}: the adapter's own tokenizer is taken, with {len(tokens)} tokens")
    return folder


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if is_file(path) else None


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
            f"{folder}: config.json states factor {stated[0].factor:g}, {RECORD_FILE} {stated[1].factor:g}",
            "delete the file that is wrong",
        )
    return stated[0] if stated else None


def _rope_of_config(folder: Path, checkpoint: Checkpoint) -> RopeScaling | None:
    path, base = folder / "config.json", checkpoint.rope
    if not path.exists():
        return None
    config = read_json(path)
    if isinstance(text := config.get("text_config"), dict):  # of a vision-language model
        config = text
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
    return checkpoint.extended(scaled).rope


def _rope_of_record(folder: Path, checkpoint: Checkpoint) -> RopeScaling | None:
    path, base = folder / RECORD_FILE, checkpoint.rope
    record = Record.read(path)
    if record is None:
        return None
    if record.rope_type != "linear":
        raise UnsupportedError(
            f"{path}: rope_type must be linear, got {record.rope_type!r}", "delete the file if nothing is scaled"
        )
    context, original = (positive_int(record.to_json(), name, str(path)) for name in ("context", "original_window"))
    factor = positive_number(context / original if record.factor is None else record.factor, "factor", str(path))
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
    return checkpoint.extended(context).rope
