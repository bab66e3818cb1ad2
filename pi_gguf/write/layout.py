"""What a GGUF file will be: every key and every tensor, with type and place, before a byte is written.

In: a `Checkpoint` and its vocabulary. Out: a `FilePlan`; which type each tensor gets in a mixture, llama.cpp chooses.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_gguf.checkpoint.agreement import check_sizes
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.tensors import TensorSource
from pi_gguf.errors import OptionError
from pi_gguf.families.family import Change, Config
from pi_gguf.gguf.file import TensorInfo, padded, quantization_version, tensor_nbytes, write_header
from pi_gguf.gguf.keys import model_metadata
from pi_gguf.gguf.places import places
from pi_gguf.llamacpp.quantizer import UNQUANTIZED, mixture, quantizations

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Output(TensorInfo):
    """A tensor of the GGUF file: what it is made of, and how.

    Args:
        sources: tensors on disk; several are experts, stacked along a new first dimension; none for the factors of
            the rotation's frequencies.
        make: of the sources' values.
    """

    sources: tuple[TensorSource, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class FilePlan:
    """A GGUF file before it is written: everything but the values of its tensors.

    Args:
        checkpoint: what is converted.
        quantization: file type, e.g. F16 or Q4_K_M.
        metadata: keys and values.
        outputs: tensors in the order of their data.
        importance: weight of each column by tensor, float32 (matrices, columns).
    """

    checkpoint: Checkpoint
    quantization: str
    metadata: dict[str, Any]
    outputs: list[Output]
    importance: Mapping[str, np.ndarray]

    @cached_property
    def header(self) -> bytes:
        """The file up to the data of its first tensor."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header.gguf"
            write_header(path, self.checkpoint.family.arch, self.metadata, self.outputs)
            header = path.read_bytes()
        return header + bytes(padded(len(header)) - len(header))

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return len(self.header) + sum(padded(output.nbytes) for output in self.outputs)

    @property
    def memory_bytes(self) -> int:
        """What writing takes beside Python itself, about: two of the largest tensors read, two written."""
        read = [sum(source.nbytes for source in output.sources) for output in self.outputs]
        return 2 * max(read) + 2 * max(output.nbytes for output in self.outputs)

    def split(self, max_bytes: int) -> list[FilePlan]:
        """Return plans of files of at most `max_bytes` each, which llama.cpp opens together by the name of the first.

        The first has the metadata. A plan that is small enough stays one.

        Raises:
            OptionError: a tensor, or the metadata, is larger than a file may be.
        """
        if self.nbytes <= max_bytes:
            return [self]
        room = max_bytes - len(self._part(0, 1, self.outputs).header)  # no part has a longer one
        groups: list[list[Output]] = [[]]
        for output in self.outputs:
            if padded(output.nbytes) > room:
                raise OptionError(
                    f"split-max-size must be at least {max_bytes - room + padded(output.nbytes)} bytes for "
                    f"{output.name} and the metadata, got {max_bytes}",
                    "raise it, or leave it out",
                )
            if sum(padded(o.nbytes) for o in [*groups[-1], output]) > room:
                groups.append([])
            groups[-1].append(output)
        return [self._part(number, len(groups), outputs) for number, outputs in enumerate(groups)]

    def _part(self, number: int, count: int, outputs: list[Output]) -> FilePlan:
        keys = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(len(self.outputs)),
        }
        return replace(self, metadata={**(self.metadata if number == 0 else {}), **keys}, outputs=outputs)


def plan_file(
    checkpoint: Checkpoint,
    *,
    vocabulary: dict[str, Any],
    general: dict[str, Any],
    finetuned: bool,
    quantization: str,
    overrides: Sequence[tuple[str, str]] = (),
    importance: Mapping[str, np.ndarray] | None = None,
) -> FilePlan:
    """Decide name, shape, type and place of every tensor, and every key. Nothing is read but shapes.

    Args:
        vocabulary: from `gguf_vocabulary`.
        general: `general.*` keys.
        finetuned: whether the weights were trained with the checkpoint's scaling.
        quantization: file type, e.g. F16 or Q4_K_M.
        overrides: pairs of a pattern of tensor names and a tensor type.
        importance: weight of each column by tensor, float32 (matrices, columns); that they fit is not checked.

    Raises:
        UnsupportedError: a tensor that GGUF has no name for.
    """
    importance = importance or {}
    arch = checkpoint.family.arch
    metadata = {
        **general,
        "general.file_type": quantizations()[quantization],
        "general.quantization_version": quantization_version(),
        **model_metadata(checkpoint, finetuned=finetuned),
        **vocabulary,
    }
    if not checkpoint.configuration.is_plain:  # else the sizes are those of the tensors on disk
        path, tied = checkpoint.path / "config.json", checkpoint.tied and not checkpoint.family.needs_head
        check_sizes(checkpoint.skeleton, metadata, arch, tied=tied, path=path)
    outputs = _exact_outputs(checkpoint)
    outputs += [_divisors(*item) for item in checkpoint.rope.factor_tensors(arch, checkpoint.rotary_dim).items()]
    if quantization in UNQUANTIZED:
        outputs = [o if _stays_exact(o) else typed(o, quantization) for o in outputs]
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exact.gguf"
            write_header(path, arch, metadata, outputs)
            os.truncate(path, padded(path.stat().st_size) + sum(padded(o.nbytes) for o in outputs))
            types = mixture(path, quantization, overrides=overrides, importance=importance)
        outputs = [typed(o, types[o.name]) for o in outputs]
    return FilePlan(checkpoint, quantization, metadata, outputs, importance)


def _exact_outputs(checkpoint: Checkpoint) -> list[Output]:
    """Return the tensors of the GGUF file in their order, as F32."""
    family, config = checkpoint.family, checkpoint.hf_config
    tensors = dict(checkpoint.tensors)
    if family.needs_head:  # a copy of the embedding where that is the head
        tensors |= {name: tensors[origin] for name, origin in checkpoint.tied_tensors.items()}
    outputs = []
    for place in places(checkpoint, tensors):
        make = maker(place.transform, config, stacked=place.stacked)
        sources = tuple(tensors[name] for name in place.names)
        shape = (len(sources),) * place.stacked + tuple(sources[0].shape)  # a transform leaves it
        outputs.append(Output(place.written, shape, "F32", 4 * math.prod(shape), sources, make))
    return outputs


def maker(
    transform: Change | None, config: Config, *, stacked: bool
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        tensor = torch.stack(list(tensors)) if stacked else tensors[0]
        return transform(tensor, config) if transform else tensor

    return make


def _divisors(name: str, divisors: Sequence[float]) -> Output:
    def make(_: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.tensor(divisors)

    return Output(name, (len(divisors),), "F32", 4 * len(divisors), (), make)


def _stays_exact(output: Output) -> bool:
    """Tell whether a tensor is F32 in every file, as llama.cpp has it: vectors, norms, and what chooses experts."""
    return len(output.shape) == 1 or output.name.endswith("_norm.weight") or "ffn_gate_inp" in output.name


def typed(output: Output, kind: str) -> Output:
    return replace(output, type=kind, nbytes=tensor_nbytes(kind, output.shape))
