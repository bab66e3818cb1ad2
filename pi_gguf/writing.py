"""One pass from a checkpoint to a GGUF file: each tensor is read, transformed, quantized and written, once.

In: a `Checkpoint`, its vocabulary and a `RopeScaling`. Out: the file, of any type that llama.cpp quantizes to; the same
bytes as llama.cpp makes of the exact file. While one tensor is quantized on all cores, the next is read and the last is
written. What was written survives a kill, and the same plan goes on behind the last whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint import Checkpoint, TensorSource
from pi_gguf.errors import CheckpointError, OptionError, UnsupportedError
from pi_gguf.families.family import Config, Transform
from pi_gguf.files import check_free_disk, disk_errors
from pi_gguf.ggml import cores, mixture, quantizations, quantize_rows
from pi_gguf.gguf_file import (
    FREQUENCY_FACTORS,
    TensorInfo,
    padded,
    quantization_version,
    tensor_namer,
    tensor_nbytes,
    write_header,
)
from pi_gguf.progress import progress_bar, say
from pi_gguf.rope import RopeScaling

if TYPE_CHECKING:
    import numpy as np
    import torch

UNQUANTIZED = ("F32", "F16", "BF16")

_NUMBERED = re.compile(r"(\.experts)\.\d+\.|\.norms\.\d+\.")
"""Parts that a checkpoint stores one by one and GGUF as one tensor: experts, and norms of single heads."""

_F16_LIMIT = 65520
"""What no longer rounds to F16's largest number, 65504."""

_CHUNK_ELEMENTS = 2**18
"""Weights that a core quantizes at once: 1 MiB as 32-bit floats, so that they stay in its cache."""


@dataclass(frozen=True)
class Output(TensorInfo):
    """A tensor of the GGUF file: what it is made of, and how.

    Args:
        sources: Hugging Face tensors; several are experts, stacked along a new first dimension; none for the
            factors of the rotation's frequencies.
        make: of the sources' values.
    """

    sources: tuple[str, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class FilePlan:
    """A GGUF file before it is written: everything but the values of its tensors.

    Args:
        checkpoint: what is converted.
        quantization: file type, e.g. F16 or Q4_K_M.
        metadata: keys and values.
        outputs: tensors in the order of their data.
    """

    checkpoint: Checkpoint
    quantization: str
    metadata: dict[str, Any]
    outputs: list[Output]

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
        """What writing takes beside the mapped checkpoint, about: two of the largest tensors read, two written."""
        shapes = self.checkpoint.tensors
        read = [sum(shapes[name].nbytes for name in output.sources) for output in self.outputs]
        return 2 * max(read) + 2 * max(output.nbytes for output in self.outputs)


def plan_file(
    checkpoint: Checkpoint,
    *,
    rope: RopeScaling,
    vocabulary: dict[str, Any],
    general: dict[str, Any],
    finetuned: bool,
    quantization: str,
    overrides: Sequence[tuple[str, str]] = (),
) -> FilePlan:
    """Decide name, shape, type and place of every tensor, and every key. Nothing is read but shapes.

    Args:
        rope: the scaling to state in the file.
        vocabulary: from `gguf_vocabulary`.
        general: `general.*` keys.
        finetuned: whether the weights were trained with `rope`.
        quantization: file type, e.g. F16 or Q4_K_M.
        overrides: pairs of a pattern of tensor names and a tensor type.

    Raises:
        UnsupportedError: a tensor that GGUF has no name for.
    """
    arch = checkpoint.family.arch
    metadata = {
        **general,
        "general.file_type": quantizations()[quantization],
        "general.quantization_version": quantization_version(),
        **model_metadata(checkpoint, rope, finetuned=finetuned),
        **vocabulary,
    }
    outputs = _exact_outputs(checkpoint)
    factors = rope.rope_factors(checkpoint.rotary_dim)
    if factors is not None:
        outputs.append(_frequency_factors(factors))
    if quantization in UNQUANTIZED:
        outputs = [o if _stays_exact(o) else _typed(o, quantization) for o in outputs]
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exact.gguf"
            write_header(path, arch, metadata, outputs)
            os.truncate(path, padded(path.stat().st_size) + sum(padded(o.nbytes) for o in outputs))
            types = mixture(path, quantization, overrides=overrides, importance={})
        outputs = [_typed(o, types[o.name]) for o in outputs]
    return FilePlan(checkpoint, quantization, metadata, outputs)


def model_metadata(checkpoint: Checkpoint, rope: RopeScaling, *, finetuned: bool) -> dict[str, Any]:
    """Return the keys of the architecture: hyper-parameters and position scaling."""
    family = checkpoint.family
    return {
        **{f"{family.arch}.{key}": value for key, value in family.keys(checkpoint.hf_config).items()},
        **rope.to_gguf(family.arch, finetuned=finetuned or family.rope_finetuned),
    }


def _exact_outputs(checkpoint: Checkpoint) -> list[Output]:
    """Return the tensors of the GGUF file in their order, as F32."""
    import torch

    family, config = checkpoint.family, checkpoint.hf_config
    gguf_name = tensor_namer(family.arch, checkpoint.n_layers)
    groups: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        groups.setdefault(_NUMBERED.sub(r"\1.", name), []).append(name)
    outputs = []
    for merged, names in groups.items():
        names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
        written = gguf_name(family.rename(merged))
        if written is None:
            raise UnsupportedError(f"{checkpoint.path}: gguf has no name for {merged} in {family.arch}")
        make = _maker(family.transform(merged), config, stacked=merged != names[0])
        shape = tuple(make([torch.empty(checkpoint.tensors[n].shape, device="meta") for n in names]).shape)
        outputs.append(Output(written, shape, "F32", 4 * math.prod(shape), tuple(names), make))
    return outputs


def _maker(
    transform: Transform | None, config: Config, *, stacked: bool
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        tensor = torch.stack(list(tensors)) if stacked else tensors[0]
        return transform(tensor, config) if transform else tensor

    return make


def _frequency_factors(factors: Sequence[float]) -> Output:
    def make(_: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.tensor(factors)

    return Output(FREQUENCY_FACTORS, (len(factors),), "F32", 4 * len(factors), (), make)


def _stays_exact(output: Output) -> bool:
    """Tell whether a tensor is F32 in every file, as llama.cpp has it: vectors, norms, and what chooses experts."""
    return len(output.shape) == 1 or output.name.endswith("_norm.weight") or "ffn_gate_inp" in output.name


def _typed(output: Output, kind: str) -> Output:
    return replace(output, type=kind, nbytes=tensor_nbytes(kind, output.shape))


# Writing


def write_file(plan: FilePlan, path: Path, *, overwrite: bool = False) -> None:
    """Write a planned file to `path`; go on where a run of the same plan stopped.

    Beside it, `path` with .state holds what was planned and a checksum of each tensor that is there.

    Args:
        path: a name that is not the final one.
        overwrite: begin anew where the file there is of another plan or source.

    Raises:
        CheckpointError: a weight is not a number, or beyond F16; or the source changed since the run that stopped.
        OptionError: the file there is of another plan.
        ResourceError: not enough disk; what was written stays.
    """
    state_path = path.with_name(path.name + ".state")
    done = _resume(plan, path, state_path, overwrite)
    if done:
        say(f"go on with {path}: {done} of {len(plan.outputs)} tensors are there")
    left = plan.outputs[done:]
    check_free_disk(path.parent, sum(padded(output.nbytes) for output in left))
    files: dict[Path, Any] = {}
    with (
        disk_errors(path),
        path.open("ab") as file,
        state_path.open("a", encoding="utf-8") as state,
        progress_bar(f"write {plan.quantization}", sum(o.nbytes for o in plan.outputs), "bytes") as advance,
        _stopping(ThreadPoolExecutor(cores())) as workers,
        _stopping(ThreadPoolExecutor(1)) as reader,
        _stopping(ThreadPoolExecutor(1)) as writer,
    ):
        advance(sum(output.nbytes for output in plan.outputs[:done]))

        def put(output: Output, data: np.ndarray) -> None:
            file.write(data.data)
            file.write(bytes(padded(output.nbytes) - output.nbytes))
            file.flush()
            state.write(json.dumps([output.name, zlib.crc32(data.data)]) + "\n")
            state.flush()
            advance(output.nbytes)

        reading = (reader.submit(_values, output, plan.checkpoint, files) for output in left)
        coming, writing = next(reading, None), None
        for output in left:
            assert coming is not None
            values, coming = coming.result(), next(reading, None)
            data = _encode(values, output, workers)
            if writing:
                writing.result()
            writing = writer.submit(put, output, data)
        if writing:
            writing.result()


@contextmanager
def _stopping(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Leave a pool without the work that waits in it; what runs is waited for."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _resume(plan: FilePlan, path: Path, state_path: Path, overwrite: bool) -> int:
    """Bring file and state to the last whole tensor, or begin both; return how many tensors are there."""
    identity = _identity(plan)
    before, recorded = _read_state(state_path) if path.exists() else (None, [])
    difference = before is not None and next((key for key in identity if before.get(key) != identity[key]), "")
    if difference and not overwrite:
        hint = "begin anew with --overwrite"
        if difference == "settings":
            raise OptionError(f"{path}: an unfinished conversion with other settings", hint)
        raise CheckpointError(f"{path}: {difference} changed since this conversion was begun", hint)
    whole: list[list[Any]] = []
    with disk_errors(path):
        if before is None or difference or not _begins_with(path, plan.header):
            path.write_bytes(plan.header)
        else:
            whole = _whole_tensors(plan, path, recorded)
        end = len(plan.header) + sum(padded(output.nbytes) for output in plan.outputs[: len(whole)])
        os.truncate(path, end)
        lines = [identity, *whole]
        state_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(whole)


def _identity(plan: FilePlan) -> dict[str, str]:
    """Return what must be the same for a run to go on: one entry for each file of weights, one for all the rest."""
    stats = {source.path: source.path.stat() for source in plan.checkpoint.tensors.values()}
    return {
        **{str(path.name): f"{stat.st_size} bytes, {stat.st_mtime_ns}" for path, stat in stats.items()},
        "the checkpoint": plan.checkpoint.fingerprint(),
        "settings": hashlib.sha256(plan.header).hexdigest(),
    }


def _read_state(path: Path) -> tuple[dict[str, Any] | None, list[list[Any]]]:
    """Return identity and tensors of a state; (None, []) where there is none, and no line that a kill cut off."""
    lines = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return (lines[0], lines[1:]) if lines and isinstance(lines[0], dict) else (None, [])


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _whole_tensors(plan: FilePlan, path: Path, recorded: list[list[Any]]) -> list[list[Any]]:
    """Return the recorded tensors, up to the first whose data is not as its checksum says."""
    whole = []
    with path.open("rb") as file:
        file.seek(len(plan.header))
        for output, line in zip(plan.outputs, recorded, strict=False):
            checksum, left = 0, output.nbytes
            while left and (part := file.read(min(left, 2**24))):
                checksum, left = zlib.crc32(part, checksum), left - len(part)
            padding = file.read(padded(output.nbytes) - output.nbytes)
            if left or line != [output.name, checksum] or len(padding) < padded(output.nbytes) - output.nbytes:
                break
            whole.append(line)
    return whole


def _values(output: Output, checkpoint: Checkpoint, files: dict[Path, Any]) -> torch.Tensor:
    """Read a tensor's sources and make it of them.

    Args:
        files: opened files by path, filled as they are needed.
    """
    return output.make([_load(checkpoint.tensors[name], output.type, files) for name in output.sources])


def _load(source: TensorSource, kind: str, files: dict[Path, Any]) -> torch.Tensor:
    from safetensors import safe_open

    if source.path not in files:
        files[source.path] = safe_open(source.path, framework="pt")
    tensor: torch.Tensor = files[source.path].get_tensor(source.name)
    low, high = (float(value) for value in tensor.aminmax())
    if not math.isfinite(high - low) and not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"{source.path}: {source.name} holds NaN or infinity", "the checkpoint is damaged or diverged"
        )
    if kind == "F16" and max(-low, high) >= _F16_LIMIT:
        raise CheckpointError(
            f"{source.path}: {source.name} holds values beyond F16's 65504", "use --quant BF16 or F32"
        )
    return tensor


def _encode(values: torch.Tensor, output: Output, workers: Executor) -> np.ndarray:
    """Convert or quantize a tensor, on all cores; return its bytes."""
    import numpy as np
    import torch

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if output.type in plain:
        data: np.ndarray = values.to(plain[output.type]).contiguous().view(torch.uint8).numpy().reshape(-1)
        return data
    dtype = next(name for name, kind in plain.items() if kind == values.dtype)
    columns = output.shape[-1]
    rows = values.contiguous().view({4: torch.float32, 2: torch.uint16}[values.itemsize]).numpy().reshape(-1, columns)
    out = np.empty((len(rows), output.nbytes // len(rows)), np.uint8)
    step = max(1, _CHUNK_ELEMENTS // columns)
    parts = [slice(start, start + step) for start in range(0, len(rows), step)]
    for future in [workers.submit(quantize_rows, output.type, rows[p], dtype, out[p]) for p in parts]:
        future.result()
    return out.reshape(-1)
