"""Tensors of a GGUF file -> shards of safetensors, one tensor at a time.

In: an opened file, and a `Checkpoint` of the folder's config, whose weights are not there yet. Out: the shards and
their index. Each tensor is read in blocks, made floats by ggml's own functions, put back into the order of the
checkpoint, and written; no more than a few are in memory.

H heads, d head size, D width.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.machine import cores
from pi_gguf.common.progress import progress_bar
from pi_gguf.errors import GgufError, UnsupportedError
from pi_gguf.gguf.places import Place, places
from pi_gguf.llamacpp.quantizer import dequantize
from pi_gguf.restore.opened import OpenedFile, Parts, Stored, open_parts
from pi_gguf.scaling.rope import FACTOR_TENSOR_NAMES

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": ("BF16", "bfloat16", 2), "f32": ("F32", "float32", 4)}
"""What `--dtype` may be: safetensors' name, torch's, and bytes."""

_SHARD_BYTES = 4 * 10**9

_BLOCK_ELEMENTS = 2**20
"""Weights made floats at once by a core."""

_COMPARED_ROWS = 2**12

_OF_QKV = re.compile(r"(blk\.\d+\.attn_)([qkv])(\.(weight|bias))")


@dataclass(frozen=True)
class Slab:
    """Some matrices, or rows, of a file's tensor.

    Args:
        tensor: of the file.
        first: of its first side, where they begin.
        count: how many.
    """

    tensor: Stored
    first: int
    count: int


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: where its numbers lie and what is done to them.

    Args:
        name: the checkpoint's.
        shape: as it is there.
        slabs: of the file, one below another.
        place: what was done to it when the file was written.
        index: of the stack, where the file's tensor is one of several that cannot be taken apart before.
    """

    name: str
    shape: tuple[int, ...]
    slabs: Sequence[Slab]
    place: Place
    index: int | None = None


def plan_sources(checkpoint: Checkpoint, opened: OpenedFile) -> list[Source]:
    """Say where each tensor of a checkpoint lies in a file.

    Raises:
        GgufError: a tensor is missing or of another shape.
        UnsupportedError: the file has a tensor that the model has not.
    """
    shapes, used, sources = checkpoint.tensor_shapes, set(FACTOR_TENSOR_NAMES), []
    for place in places(checkpoint, shapes):
        slabs = _slabs(place, checkpoint, opened)
        used |= {slab.tensor.name for slab in slabs}
        _check_shape(place, slabs, [shapes[name] for name in place.names], opened)
        for i, name in enumerate(place.names):
            if not place.stacked or place.transform:
                sources.append(Source(name, shapes[name], slabs, place, i if place.stacked else None))
            else:
                sources.append(Source(name, shapes[name], [Slab(slabs[0].tensor, i, 1)], place))
    used |= {"output.weight"} if checkpoint.tied else set()
    if unknown := [name for name in opened.tensors if name not in used]:
        raise UnsupportedError(
            f"{opened.path}: {unknown[0]} is no tensor of a {checkpoint.family.model_type} model ({len(unknown)} such)",
            "take another file of the model, or its checkpoint",
        )
    return sources


def _slabs(place: Place, checkpoint: Checkpoint, opened: OpenedFile) -> list[Slab]:
    """Return where a place's numbers lie: in a tensor of its name, or in one of Q, K and V together, or in those."""
    tensors = opened.tensors
    if (tensor := tensors.get(place.written)) is not None:
        return [Slab(tensor, 0, tensor.shape[0])]
    match = _OF_QKV.fullmatch(place.written)
    fused = tensors.get(f"{match[1]}qkv{match[3]}") if match else None
    if match and fused is not None:
        size, groups = checkpoint.head_dim, checkpoint.n_kv_heads
        rows = {"q": checkpoint.n_heads * size, "k": groups * size, "v": groups * size}
        first = sum(rows[letter] for letter in "qkv"[: "qkv".index(match[2])])
        if sum(rows.values()) == fused.shape[0]:
            return [Slab(fused, first, rows[match[2]])]
    apart = [tensors.get(place.written.replace("attn_qkv", f"attn_{letter}")) for letter in "qkv"]
    if "attn_qkv" in place.written and all(apart):
        return [Slab(tensor, 0, tensor.shape[0]) for tensor in apart if tensor]
    raise GgufError(f"{opened.path}: {place.written} is missing", "copy the file again, or take another of the model")


def _check_shape(place: Place, slabs: Sequence[Slab], shapes: Sequence[tuple[int, ...]], opened: OpenedFile) -> None:
    """Check that the file's tensor is what the checkpoint's become, sides of 1 apart; a `Transform` keeps shapes."""
    shape = (len(shapes), *shapes[0]) if place.stacked else shapes[0]
    there = (sum(slab.count for slab in slabs), *slabs[0].tensor.shape[1:])
    rest = {slab.tensor.shape[1:] for slab in slabs}
    if len(rest) > 1 or [side for side in there if side > 1] != [side for side in shape if side > 1]:
        raise GgufError(
            f"{opened.path}: {place.written} must have shape {list(shape)} by its keys, got {list(there)}",
            "copy the file again, or take another of the model",
        )


def write_shards(folder: Path, checkpoint: Checkpoint, sources: Sequence[Source], dtype: str) -> None:
    """Write the weights into a folder.

    Args:
        sources: of `plan_sources`.
        dtype: `bf16` or `f32`.

    Raises:
        GgufError: a tensor holds what is no number.
    """
    size = DTYPES[dtype][2]
    groups: list[list[Source]] = [[]]
    for source in sources:
        nbytes = size * math.prod(source.shape)
        if groups[-1] and size * sum(math.prod(s.shape) for s in groups[-1]) + nbytes > _SHARD_BYTES:
            groups.append([])
        groups[-1].append(source)
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    names = ["model.safetensors"] if len(groups) == 1 else names
    total = size * sum(math.prod(source.shape) for source in sources)
    with (
        open_parts() as parts,
        ThreadPoolExecutor(cores()) as workers,
        progress_bar(f"unpack {dtype}", total, "bytes") as advance,
    ):
        for name, group in zip(names, groups, strict=True):
            with (folder / name).open("wb") as file:
                file.write(_header(group, dtype))
                for source in group:
                    data = _values(source, checkpoint, parts, workers, dtype)
                    file.write(data.data)
                    advance(data.nbytes)
    if len(groups) > 1:
        where = {source.name: name for name, group in zip(names, groups, strict=True) for source in group}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _header(sources: Sequence[Source], dtype: str) -> bytes:
    """Return what comes before the data of a safetensors file."""
    kind, _, size = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for source in sources:
        end = at + size * math.prod(source.shape)
        entries[source.name] = {"dtype": kind, "shape": list(source.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _values(source: Source, checkpoint: Checkpoint, parts: Parts, workers: Executor, dtype: str) -> np.ndarray:
    """Return a tensor of the checkpoint as bytes."""
    import torch

    kind = getattr(torch, DTYPES[dtype][1])
    # Norms are added to on the way back, in 32 bits; matrices have their rows reordered at most.
    read_as = torch.float32 if source.place.transform and len(source.shape) == 1 else kind
    tensor = torch.cat([_read(slab, parts, workers, read_as) for slab in source.slabs])
    stacked = source.index is not None
    whole = (len(source.place.names), *source.shape) if stacked else source.shape
    tensor = tensor.reshape(whole)
    if source.place.transform:
        tensor = source.place.transform.undo(tensor, checkpoint.hf_config)
    if stacked:
        tensor = tensor[source.index]
    data: np.ndarray = tensor.to(kind).contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def _read(slab: Slab, parts: Parts, workers: Executor, kind: torch.dtype) -> torch.Tensor:
    """Return numbers of a file as a list, in the order of the file."""
    import torch

    tensor, columns = slab.tensor, slab.tensor.shape[-1]
    matrix = math.prod(tensor.shape[1:])
    begin, total = slab.first * matrix // columns, slab.count * matrix // columns
    if len(tensor.shape) == 1:  # a row of it is the whole
        begin, total = 0, 1
    out = torch.empty(total * columns, dtype=kind)
    step = max(1, _BLOCK_ELEMENTS // columns)

    def fill(start: int) -> bool:
        rows = min(step, total - start)
        data = parts.read(tensor, tensor.bytes_of(begin + start), tensor.bytes_of(rows))
        values = dequantize(tensor.type, data)
        out[start * columns : (start + rows) * columns] = torch.from_numpy(values)
        return bool(np.isfinite(values).all())

    if not all(list(workers.map(fill, range(0, total, step)))):
        raise GgufError(f"{tensor.path}: {tensor.name} holds NaN or infinity", "the file is damaged: copy it again")
    return out[slab.first : slab.first + slab.count] if len(tensor.shape) == 1 else out


def same_numbers(one: Stored, other: Stored) -> bool:
    """Tell whether two tensors of a file are the same to the byte."""
    rows, step = math.prod(one.shape[:-1]), _COMPARED_ROWS
    blocks = [(one.bytes_of(i), one.bytes_of(min(step, rows - i))) for i in range(0, rows, step)]
    with open_parts() as parts:
        return all(np.array_equal(parts.read(one, *block), parts.read(other, *block)) for block in blocks)
