"""Where the weights of a checkpoint lie, in which of their forms, each under the name that transformers saves it by.

In: a folder, and names and shapes of the tensors that its model has. Out: a `TensorSource` for each. Forms that hold
the same weights are read as they are: experts fused in one tensor, 8-bit floats with scales, one prefix more, a text
model inside a vision-language model. What holds other weights (packed 4-bit numbers, another model's tensors) is an
error that says what it is.

E experts, I inner width, D width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pi_gguf.checkpoint.config import note, read_json
from pi_gguf.checkpoint.weights import WeightFile
from pi_gguf.common.files import is_file
from pi_gguf.errors import CheckpointError, UnsupportedError, one_line

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
PLAIN_DTYPES = ("F32", "F16", "BF16")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")

IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$")
"""Buffers of old checkpoints that follow from the config."""

VALUE_HEAD = re.compile(r"(^|\.)v_head\.")
"""What rates texts in reinforcement learning, saved with the model by trl; transformers leaves it aside."""

_ACTIVATION_SCALES = re.compile(r"\.(input_scale|activation_scale(_inv)?|output_scale|[qkv]_scale|kv_scale)$")
"""Scales of values that are computed, not of weights."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_PACKED = {
    r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\.": "4-bit weights of bitsandbytes",
    r"\.SCB$": "8-bit weights of bitsandbytes",
    r"\.weight_packed$": "packed weights of compressed-tensors",
    r"\.(qweight|qzeros|g_idx)$": "packed weights of GPTQ or AWQ",
    r"(_blocks|_scales)$": "MXFP4 blocks",
    r"\.biases$": "packed weights of MLX",
    r"\.(W_q|meta)$": "packed weights of HQQ",
    r"\.(codes|codebooks|codebook|Qidxs)$": "weights of a codebook (AQLM, QuIP#)",
}
"""What the name of a tensor says of how the weights beside it are packed."""

_STACKED = {
    r"\.switch_mlp\.": "experts stacked as MLX keeps them",
    r"\.(input_linear|output_linear)\.weight$": "experts stacked as Granite and ScatterMoE keep them",
    r"\.experts\.mlp\.(w1|w2|v1)$": "experts stacked as MegaBlocks keeps them",
    r"\.experts\.(w13_weight|w2_weight|w1|w2|w3)$": "experts stacked as vLLM keeps them",
    r"\.experts\.(gate|up|down|gate_up)_proj\.weight$": "experts stacked in one matrix of each kind",
    r"\.(qkv_proj|gate_up_proj)\.weight$": "projections fused as vLLM keeps them",
    r"\.lora_[AB]\.|\.base_layer\.|\.original_module\.": "an adapter that is not merged",
}
"""What the name of a tensor says of the tool that saved it."""

_OTHER_HEAD = re.compile(r"^(score|classifier|regression_head|reward_head|value_head|qa_outputs)\.")
"""Heads of models that do not write."""

_ONE_OF_MANY = re.compile(r"-\d+-of-\d+\.safetensors$")

_16_BITS = "use the checkpoint in 16 or 32 bits"
_QUANTIZED = f"the weights are quantized already: {_16_BITS}"


# Sources


@contextmanager
def open_files() -> Iterator[dict[Path, Any]]:
    """Give the `files` that sources are read from; what they open is closed at the end."""
    files: dict[Path, Any] = {}
    try:
        yield files
    finally:
        for file in files.values():
            if isinstance(file, WeightFile):
                file.close()


@dataclass(frozen=True)
class TensorSource:
    """Where one tensor lies: its file, its name there, shape, and dtype that it reads as (`F32`, `F16` or `BF16`)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = DTYPE_BYTES.get(self.dtype, 1)
        for side in self.shape:
            size *= side
        return size

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        """Return its values.

        Args:
            files: opened files by path, filled as they are needed; of `open_files`.
        """
        if self.path not in files:
            files[self.path] = WeightFile(self.path)
        tensor: torch.Tensor = files[self.path].get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class WidenedTensor(TensorSource):
    """Numbers of 64 or 8 bits, read as 32-bit ones."""

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        return super().read(files).float()


@dataclass(frozen=True)
class ScaledBlocks(TensorSource):
    """An 8-bit matrix whose blocks are multiplied by a number each, in 32 bits.

    Args:
        scale: (blocks of rows, blocks of columns), or of any shape with one number.
        block: rows and columns of a block.
    """

    scale: TensorSource
    block: tuple[int, int]

    @property
    def is_even(self) -> bool:
        """Whether all blocks are of one size."""
        return all(side % size == 0 for side, size in zip(self.shape, self.block, strict=True))

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        values, scale = super().read(files).float(), self.scale.read(files).float()
        if scale.numel() == 1:
            return values.mul_(scale.reshape(()))
        rows, columns = self.block
        for i, line in enumerate(scale.reshape(scale.shape[0], -1)):
            values[i * rows : (i + 1) * rows].mul_(line.repeat_interleave(columns)[: values.shape[1]])
        return values


@dataclass(frozen=True)
class ExpertPart(TensorSource):
    """The matrix of one expert in a tensor that has all of them, (E, 2 I, D) or (E, D, I).

    Args:
        of: the tensor of all experts.
        expert: its number.
        first_row: of the matrix, in the expert's rows.
    """

    of: TensorSource
    expert: int
    first_row: int

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        place = self.path / "experts"  # all of one tensor, as its parts are read one after another
        if files.get(place, (None, None))[0] != self.of:
            files[place] = self.of, self.of.read(files)
        part: torch.Tensor = files[place][1][self.expert, self.first_row : self.first_row + self.shape[0]]
        return part


# Files


def weight_files(folder: Path, explicit: Any = None) -> list[Path]:
    """Return the files that transformers reads weights from: one file before an index of several.

    Args:
        explicit: name of the file, where a config states one (`transformers_weights`).

    Raises:
        CheckpointError: none is there, a shard is missing, or it is no file.
    """
    single, index_path = folder / _SINGLE, folder / _INDEX
    if isinstance(explicit, str) and explicit:
        single = index_path = folder / explicit
    if single.exists() and single.suffix == ".safetensors":
        paths = [_checked_file(single)]
    elif index_path.exists():
        paths = _shards(index_path, folder)
    else:
        raise CheckpointError(f"{folder}: no {single.name} or {index_path.name}", _other_weights(folder))
    aside = {path for path in [*folder.glob("*.safetensors"), index_path] if path.exists()} - {*paths}
    aside -= {index_path} if paths != [single] else set()
    if aside:
        names = ", ".join(sorted(path.name for path in aside)[:4]) + (" and more" if len(aside) > 4 else "")
        note(f"{folder}: {names} left aside: weights are read from {paths[0].name if len(paths) == 1 else 'the index'}")
    return paths


def _shards(index_path: Path, folder: Path) -> list[Path]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map must map tensors to files", "download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not is_file(folder / name):
            there = sorted(other.name for other in folder.glob("*.safetensors"))
            hint = "download the missing shard"
            if there:
                hint += f"; or, if {there[0]} is the whole model, remove the index and call it {_SINGLE}"
            raise CheckpointError(f"{index_path}: names {name[:80]!r}, which is absent from the folder", hint)
    return [folder / name for name in names]


def _checked_file(path: Path) -> Path:
    if not is_file(path):
        raise CheckpointError(f"{path}: is not a file", "put the checkpoint's own file there")
    return path


def _other_weights(folder: Path) -> str:
    """Return a hint by what else is in the folder."""
    if (folder / _SINGLE).is_symlink():
        return f"{_SINGLE} is a link to nothing: download it again"
    if variants := sorted(path for path in folder.glob("*.safetensors") if is_file(path)):
        name = variants[0].name
        if name.startswith("adapter_model"):
            return "this is an adapter's folder: give its base as MODEL and this folder with --lora"
        if _ONE_OF_MANY.search(name):
            return f"{name} is one of several files, and {_INDEX} tells which tensor is in which: download it too"
        if name.startswith("consolidated"):
            return f"{name} is in Mistral's own format: take the files that the model's authors made for transformers"
        return f"transformers does not open {name} by itself: if it is the whole model, call it {_SINGLE}"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        return "only safetensors are read: save the model with save_pretrained(safe_serialization=True) first"
    if files := sorted(folder.glob("*.gguf")):
        return f"{files[0].name} is a GGUF file already: give that file to `pi-gguf quantize`"
    if inside := sorted(path.parent for name in (_SINGLE, _INDEX) for path in folder.glob(f"*/{name}")):
        return f"there are weights in {inside[-1]}: give that folder as MODEL"
    return f"put {_SINGLE} there"


def read_tensors(path: Path) -> dict[str, TensorSource]:
    """Read names, shapes and dtypes of the tensors of a safetensors file, whatever their dtype.

    Raises:
        CheckpointError: it is truncated or no safetensors.
    """
    _checked_file(path)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it has no iterator
            return {name: TensorSource(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not safetensors ({one_line(error)})", "download this file again"
        ) from error


# Forms of the same weights


@dataclass(frozen=True)
class Wanted:
    """The tensors of a model, as transformers builds it.

    Args:
        shapes: by the names that it saves them by; of tied ones only the first.
        base_prefix: what its names have before those of the model without its head, `model.`.
        anchor: the name of the embedding.
        renamed: names in memory -> names on disk, where they differ and the tensor does not.
        fused: tensors in memory that hold many on disk -> these, by what each part is: names of the gate, up and down
            matrices of each expert.
    """

    shapes: Mapping[str, tuple[int, ...]]
    base_prefix: str
    anchor: str
    renamed: Mapping[str, str]
    fused: Mapping[str, Sequence[Sequence[str]]]


def unwrapped(found: Mapping[str, TensorSource], wanted: Wanted) -> tuple[dict[str, TensorSource], str, int]:
    """Return the tensors without what a tool put before their names, that prefix, and how many belong to other parts.

    Raises:
        CheckpointError: several models are in the files.
    """
    if wanted.anchor in found:
        return dict(found), wanted.base_prefix, 0
    core = wanted.anchor.removeprefix(wanted.base_prefix)
    prefixes = [name.removesuffix(core) for name in found if name == core or name.endswith("." + core)]
    if not prefixes:
        return dict(found), wanted.base_prefix, 0
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{next(iter(found.values())).path.parent}: {wanted.anchor} may be {prefixes[0]}{core} or "
            f"{prefixes[1]}{core}",
            "keep one model's tensors in the folder",
        )
    prefix, heads = prefixes[0], [n for n in wanted.shapes if not n.startswith(wanted.base_prefix)]
    heads += [name for name in ("lm_head.weight", "embed_out.weight") if name not in heads]
    renamed, others = {}, 0
    for name, source in found.items():
        head = next((head for head in heads if name == head or name.endswith("." + head)), None)
        if head is not None:
            renamed[head] = source
        elif name.startswith(prefix):
            renamed[wanted.base_prefix + name.removeprefix(prefix)] = source
        else:
            renamed[name] = source
            others += 1
    return renamed, prefix, others


def with_scales(found: Mapping[str, TensorSource], block: Any) -> dict[str, TensorSource]:
    """Return the tensors with 8-bit weights read together with their scales, and 64-bit ones as 32-bit.

    Args:
        block: rows and columns that share a scale, as a config states them; as the shapes say when None.

    Raises:
        CheckpointError: scales that do not fit their matrix.
    """
    result = dict(found)
    eight_bit = [name for name, source in found.items() if source.dtype in _FLOAT8]
    for name in eight_bit:
        scale = next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in found), None)
        if scale is None:
            result[name] = _as(WidenedTensor, found[name])
        else:
            result[name] = _scaled(found[name], result.pop(scale), block)
    for name, source in found.items():
        if source.dtype == "F64":
            result[name] = _as(WidenedTensor, source)
        elif eight_bit and _ACTIVATION_SCALES.search(name):
            del result[name]
    if eight_bit:
        note(f"{found[eight_bit[0]].path}: {len(eight_bit)} matrices of 8-bit floats are read as 32-bit ones")
    return result


def _as(kind: type[WidenedTensor], source: TensorSource) -> WidenedTensor:
    return kind(source.path, source.name, source.shape, "F32")


def _scaled(weight: TensorSource, scale: TensorSource, stated: Any) -> ScaledBlocks:
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(TensorSource)} | {"dtype": "F32"}
    hint = "the scales are of another tool or of another matrix: " + _16_BITS
    if scale.dtype not in (*PLAIN_DTYPES, "F64", "F8_E8M0"):
        raise UnsupportedError(f"{scale.path}: {scale.name} must be of floats, got {scale.dtype}", hint)
    if all(side == 1 for side in scale.shape):
        return ScaledBlocks(**fields, scale=scale, block=(1, 1))
    grid = (*scale.shape, 1) if len(scale.shape) == 1 else scale.shape
    block = stated if isinstance(stated, list) and len(stated) == 2 else None
    if len(weight.shape) != 2 or len(grid) != 2 or 0 in grid:
        raise CheckpointError(
            f"{scale.path}: {scale.name} of shape {list(scale.shape)} scales no matrix {list(weight.shape)}", hint
        )
    sides = []
    for side, blocks, number in zip(weight.shape, grid, block or (None, None), strict=True):
        size = number if isinstance(number, int) and number > 0 and -(-side // number) == blocks else None
        size = size or (side // blocks if side % blocks == 0 else None)
        if size is None:
            raise CheckpointError(
                f"{scale.path}: {scale.name} of shape {list(scale.shape)} does not divide a matrix "
                f"{list(weight.shape)} into equal blocks",
                hint,
            )
        sides.append(size)
    return ScaledBlocks(**fields, scale=scale, block=(sides[0], sides[1]))


def split_experts(found: Mapping[str, TensorSource], wanted: Wanted) -> dict[str, TensorSource]:
    """Return the tensors by their names on disk where they are stored as transformers holds them in memory.

    Raises:
        UnsupportedError: a fused tensor of another layout.
    """
    result = {wanted.renamed.get(name, name) if name not in wanted.shapes else name: s for name, s in found.items()}
    fused = 0
    for name, groups in wanted.fused.items():
        source = result.get(name)
        if source is None or any(part in found for parts in groups for part in parts):
            continue
        shapes = [wanted.shapes[parts[0]] for parts in groups]
        layout = (len(groups[0]), sum(rows for rows, _ in shapes), shapes[0][1])
        if source.shape != layout:
            raise UnsupportedError(
                f"{source.path}: {source.name} must hold all experts as {list(layout)}, got {list(source.shape)}",
                "save the model with transformers' save_pretrained, which writes a tensor for each expert",
            )
        del result[name]
        fused += 1
        row = 0
        for parts, (rows, columns) in zip(groups, shapes, strict=True):
            for expert, part in enumerate(parts):
                result[part] = ExpertPart(source.path, source.name, (rows, columns), source.dtype, source, expert, row)
            row += rows
    if fused:
        note(f"{next(iter(found.values())).path.parent}: experts are fused, as transformers holds them in memory")
    return result


# What else may be there


def check_not_packed(found: Mapping[str, TensorSource], method: Any) -> None:
    """Check that no weights are packed integers.

    Args:
        found: every tensor of the files.
        method: of quantization, as the config states it.

    Raises:
        UnsupportedError: packed weights; it says of which tool.
    """
    odd = [source for source in found.values() if source.dtype not in DTYPE_BYTES]
    odd = [source for source in odd if not IGNORED_TENSORS.search(source.name)]
    for pattern, what in _PACKED.items():
        hit = next((name for name in found if re.search(pattern, name)), None)
        if hit is not None and odd:
            raise UnsupportedError(f"{found[hit].path}: {hit} belongs to {what}", _QUANTIZED)
    if odd and method:
        raise UnsupportedError(
            f"{odd[0].path}: {odd[0].name} is {odd[0].dtype}: weights quantized by {str(method)[:40]}", _QUANTIZED
        )


def check_dtypes(sources: Iterable[TensorSource], *more: str) -> None:
    """Check that every tensor reads as numbers of 16 or 32 bits.

    Args:
        more: dtypes that are taken beside these.

    Raises:
        UnsupportedError: another dtype.
    """
    for source in sources:
        if source.dtype not in (*PLAIN_DTYPES, *more):
            raise UnsupportedError(
                f"{source.path}: {source.name} must be F32, F16 or BF16, got {source.dtype}", "save it in one of these"
            )


def unknown_tensors(unknown: Sequence[TensorSource], model_type: str) -> UnsupportedError:
    """Return the error of tensors that the model does not have: named for what they are, where their names say it."""
    if head := next((source for source in unknown if _OTHER_HEAD.search(source.name)), None):
        return UnsupportedError(
            f"{head.path}: tensor {head.name} is the head of a classifier or reward model, which writes no text",
            "convert the language model that it was made from",
        )
    for pattern, what in _STACKED.items():
        if hit := next((source for source in unknown if re.search(pattern, source.name)), None):
            return UnsupportedError(
                f"{hit.path}: tensor {hit.name} is of {what} ({len(unknown)} tensors are not part of a {model_type} "
                "model)",
                "merge adapters (peft's merge_and_unload), and save the model with transformers' save_pretrained",
            )
    return UnsupportedError(
        f"{unknown[0].path}: tensor {unknown[0].name} is not part of a {model_type} model ({len(unknown)} such "
        "tensors)",
        "check model_type and num_hidden_layers in config.json; adapters must be merged into the weights",
    )
