"""What adapters do to one tensor, computed while it is read.

In: a tensor of the checkpoint and the adapter's own tensors. Out: the merged tensor in 32 bits, as peft's merge gives
it. Nothing here knows names, files or configs; that everything fits is checked before.

r rank, D_in and D_out the widths of a linear layer, V vocabulary, D width of the embedding, E experts.
Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, section 4; PiSSA, arXiv 2404.02948; OLoRA, arXiv
2406.01775; KaSA, arXiv 2412.06071.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint.tensors import TensorSource
from pi_gguf.errors import CheckpointError, one_line

if TYPE_CHECKING:
    import torch

Piece = tuple[int, slice] | None
"""A part of a tensor with experts, (E, D_out, D_in): the expert, and its rows; None for a whole tensor."""


@dataclass(frozen=True)
class Replacement:
    """Another whole tensor: of `modules_to_save`, a trained bias, or the base of an adapted embedding."""

    source: TensorSource
    piece: Piece = None

    @property
    def sources(self) -> Iterator[TensorSource]:
        yield self.source

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the tensor has afterwards, or must have had; as in the other changes."""
        return self.source.shape if self.piece is None else _piece_shape(self.source.shape, self.piece)

    def apply(self, tensor: torch.Tensor | None, files: dict[Path, Any]) -> torch.Tensor:
        replaced = _read_finite(self.source, files)
        return replaced if self.piece is None else replaced[self.piece]


@dataclass(frozen=True)
class LowRank:
    """An addition of scaling * B A, or its transpose for an embedding.

    Args:
        a: (r, D_in); of an embedding (r, V); of experts (E r, D_in), each expert's rows together.
        b: (D_out, r); of an embedding (D, r); of experts (D_out, r E), each expert's columns E apart.
        scaling: alpha / r, dimensionless.
        embedding: whether the tensor looks up rows (V, D).
        diagonal: (r,) between B and A, of KaSA.
        blocks: of A and of B, where these are block-diagonal and stored without their zeros.
        piece: the expert this is for, and its rows.
        experts: how many A and B are for.
    """

    a: TensorSource
    b: TensorSource
    scaling: float
    embedding: bool = False
    diagonal: TensorSource | None = None
    blocks: tuple[int, int] = (1, 1)
    piece: Piece = None
    experts: int = 1

    @property
    def sources(self) -> Iterator[TensorSource]:
        yield from (self.a, self.b, *([self.diagonal] if self.diagonal else []))

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def plain(self) -> bool:
        """Whether A and B alone say what it does."""
        return self.diagonal is None and self.blocks == (1, 1) and self.piece is None

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1] * self.blocks[0])
        if self.piece is not None:
            shape = _piece_shape((self.experts, *shape), self.piece)[0], shape[1]
        return shape[::-1] if self.embedding else shape

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        return self.change(files).add_(tensor)  # in place: one tensor in 32 bits, not two

    def change(self, files: dict[Path, Any]) -> torch.Tensor:
        """Return what is added."""
        a, b = _read_finite(self.a, files), _read_finite(self.b, files)
        if self.piece is not None:
            expert, rows = self.piece
            a, b = a[expert * self.rank : (expert + 1) * self.rank], b[rows, expert :: self.experts]
        a, b = (_block_diagonal(part, n) for part, n in zip((a, b), self.blocks, strict=True))
        b = b.float()
        if self.diagonal is not None:
            b = b * _read_finite(self.diagonal, files).float()
        change = (b @ a.float()).mul_(self.scaling)
        return change.T if self.embedding else change


@dataclass(frozen=True)
class WeightDecomposed:
    """A direction that a product of low rank turns, with a length of its own: m U / ||U||, U = W + scaling B A.

    Args:
        direction: what is added to the tensor.
        magnitude: (D_out,), of the rows' norms; of an embedding (D,), of its columns'.
    """

    direction: LowRank
    magnitude: TensorSource

    @property
    def sources(self) -> Iterator[TensorSource]:
        yield from self.direction.sources
        yield self.magnitude

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        shape = self.direction.shape(before)
        return shape if self.magnitude.shape == (shape[self.direction.embedding],) else (-1, -1)

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        import torch

        turned, along = self.direction.apply(tensor, files), 0 if self.direction.embedding else 1
        norm = torch.linalg.norm(turned, dim=along)
        factor = _read_finite(self.magnitude, files).float() / norm
        return turned.mul_(factor.unsqueeze(along))


@dataclass(frozen=True)
class Addition:
    """An addition of scaling * a vector: the bias of a layer's B."""

    source: TensorSource
    scaling: float

    @property
    def sources(self) -> Iterator[TensorSource]:
        yield self.source

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return self.source.shape

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        return tensor.float() + _read_finite(self.source, files).float() * self.scaling


@dataclass(frozen=True)
class Rows:
    """Some rows of an embedding or head, replaced; those just beyond its end make it longer.

    Args:
        source: (rows, D).
        indices: of the rows, below the length that results.
    """

    source: TensorSource
    indices: tuple[int, ...]

    @property
    def sources(self) -> Iterator[TensorSource]:
        yield self.source

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        if self.source.shape != (len(self.indices), *before[1:]):
            return self.source.shape
        rows, given = before[0], set(self.indices)
        while rows in given:
            rows += 1
        return (rows, *before[1:])

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        import torch

        rows = self.shape(tuple(tensor.shape))[0]
        changed = torch.zeros(rows, *tensor.shape[1:])
        changed[: len(tensor)] = tensor
        return changed.index_copy_(0, torch.tensor(self.indices), _read_finite(self.source, files).float())


@dataclass(frozen=True)
class Residual:
    """The tensor without what an initialization took out of it, which training then began with as B A.

    Args:
        kind: pissa (principal components), pissa_niter_N (the same, found by N random iterations), olora (first columns
            of Q, first rows of R) or kasa (the smallest components, which are gone for good).
        rank: how many components or columns.
        scaling: of the product, dimensionless.
    """

    kind: str
    rank: int
    scaling: float

    @property
    def sources(self) -> Iterator[TensorSource]:
        yield from ()

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return before

    def apply(self, tensor: torch.Tensor, files: dict[Path, Any]) -> torch.Tensor:
        import torch

        weight = tensor.float()
        if self.kind == "olora":
            q, r = torch.linalg.qr(weight)
            return weight.sub(q[:, : self.rank] @ r[: self.rank], alpha=self.scaling)
        if self.kind.startswith("pissa_niter_"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(weight, self.rank, niter=int(self.kind.rpartition("_")[2]))
            return weight.sub((u * s) @ v.T)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        taken = slice(len(s) - self.rank, None) if self.kind == "kasa" else slice(self.rank)
        return weight.sub((u[:, taken] * s[taken]) @ vh[taken])


Change = Replacement | LowRank | WeightDecomposed | Addition | Rows | Residual


@dataclass(frozen=True)
class MergedTensor(TensorSource):
    """A tensor as it reads after the changes of adapters, in 32 bits.

    Args:
        base: the tensor before.
        changes: in their order.
        adapter: folder they are from, for messages.
    """

    base: TensorSource
    changes: tuple[Change, ...]
    adapter: Path

    @classmethod
    def of(cls, base: TensorSource, changes: tuple[Change, ...], adapter: Path) -> MergedTensor:
        shape = base.shape
        for change in changes:
            shape = change.shape(shape)
        return cls(base.path, base.name, shape, "F32", base, changes, adapter)

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        import torch

        changes = list(self.changes)
        while any(isinstance(change, Replacement) for change in changes[1:]):
            del changes[0]  # what was done before it is gone
        replaced = bool(changes) and isinstance(changes[0], Replacement)
        tensor = torch.empty(0) if replaced else self.base.read(files)
        if not _finite(tensor):
            raise CheckpointError(
                f"{self.base.path}: {self.base.name} holds NaN or infinity", "the checkpoint is damaged or diverged"
            )
        for change in changes:
            tensor = change.apply(tensor, files)
        tensor = tensor.float()
        if not _finite(tensor):
            raise CheckpointError(
                f"{self.adapter}: merged into {self.name} it makes infinity or NaN",
                "the adapter is damaged, or lora_alpha in adapter_config.json far too large",
            )
        return tensor


@dataclass(frozen=True)
class ScaledTensor(TensorSource):
    """A tensor times a number, in 32 bits."""

    base: TensorSource
    by: float

    @classmethod
    def of(cls, base: TensorSource, by: float) -> ScaledTensor:
        return cls(base.path, base.name, base.shape, "F32", base, by)

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        return self.base.read(files).float() * self.by


@dataclass(frozen=True)
class PickledTensor(TensorSource):
    """A tensor of a file that torch saved, which holds tensors only."""

    def read(self, files: dict[Path, Any]) -> torch.Tensor:
        if self.path not in files:
            files[self.path] = load_pickled(self.path)
        tensor: torch.Tensor = files[self.path][self.name]
        return tensor


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Open a file of torch.save without running any code of it, its values memory-mapped where the format allows.

    Raises:
        CheckpointError: it is damaged, or holds other things than tensors by name.
    """
    import torch

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds
        raise CheckpointError(
            f"{path}: truncated, or not tensors alone ({one_line(error)})",
            "download it again, or save the adapter with save_pretrained, which writes safetensors",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path}: must hold tensors by name", "save the adapter again with save_pretrained")
    return found


def _block_diagonal(stacked: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return the matrix whose blocks lie in `stacked` one below the other."""
    rows, columns = stacked.shape[0] // blocks, stacked.shape[1]
    whole = stacked.new_zeros(stacked.shape[0], blocks * columns)
    for i in range(blocks):
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = stacked[i * rows : (i + 1) * rows]
    return whole


def _piece_shape(shape: tuple[int, ...], piece: tuple[int, slice]) -> tuple[int, ...]:
    expert, rows = piece
    return (len(range(*rows.indices(shape[1]))), *shape[2:]) if expert < shape[0] else (-1, -1)


def _read_finite(source: TensorSource, files: dict[Path, Any]) -> torch.Tensor:
    tensor = source.read(files)
    if not _finite(tensor):
        raise CheckpointError(f"{source.path}: {source.name} holds NaN or infinity", "the adapter is damaged")
    return tensor


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or all(math.isfinite(value) for value in tensor.aminmax())
