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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.adapters.adapted import AdaptedCheckpoint, low_rank_changes
from pi_gguf.adapters.merging import ScaledTensor
from pi_gguf.checkpoint.agreement import check_sizes
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.tensors import TensorSource, open_files
from pi_gguf.common.files import check_free_disk, disk_errors
from pi_gguf.common.machine import cores
from pi_gguf.common.progress import progress_bar, say, stage
from pi_gguf.errors import CheckpointError, OptionError, UnsupportedError
from pi_gguf.families.family import Config, Transform
from pi_gguf.gguf.file import TensorInfo, padded, quantization_version, tensor_namer, tensor_nbytes, write_header
from pi_gguf.gguf.header import read_header
from pi_gguf.gguf.keys import model_metadata
from pi_gguf.llamacpp.quantizer import UNQUANTIZED, mixture, quantizations, quantize_rows
from pi_gguf.llamacpp.trial import trust

if TYPE_CHECKING:
    import numpy as np
    import torch

_NUMBERED = re.compile(r"(\.experts)\.\d+\.|\.norms\.\d+\.")
"""Parts that a checkpoint stores one by one and GGUF as one tensor: experts, and norms of single heads."""

_F16_LIMIT = 65520
"""What no longer rounds to F16's largest number, 65504."""

_WRITE_BYTES = 2**16
"""Bytes written at once: a new file's pages come in pieces of this size, and large ones can cost several times
as much on a virtual machine that has to ask its host for them."""

_CHUNK_ELEMENTS = 2**18
"""Weights that a core quantizes at once: 1 MiB as 32-bit floats, so that they stay in its cache."""


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
        import numpy as np

        keys = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(len(self.outputs)),
        }
        return replace(self, metadata={**(self.metadata if number == 0 else {}), **keys}, outputs=outputs)


def split_paths(path: Path, count: int) -> list[Path]:
    """Return the names of the files that a model is split into, as llama.cpp asks for them; `path` itself for one."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


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
    config_path = checkpoint.path / "config.json"
    check_sizes(
        checkpoint.skeleton, metadata, arch, tied=checkpoint.tied and not checkpoint.family.needs_head, path=config_path
    )
    outputs = _exact_outputs(checkpoint)
    outputs += [_divisors(*item) for item in checkpoint.rope.factor_tensors(arch, checkpoint.rotary_dim).items()]
    if quantization in UNQUANTIZED:
        outputs = [o if _stays_exact(o) else _typed(o, quantization) for o in outputs]
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exact.gguf"
            write_header(path, arch, metadata, outputs)
            os.truncate(path, padded(path.stat().st_size) + sum(padded(o.nbytes) for o in outputs))
            types = mixture(path, quantization, overrides=overrides, importance=importance)
        outputs = [_typed(o, types[o.name]) for o in outputs]
    return FilePlan(checkpoint, quantization, metadata, outputs, importance)


def _exact_outputs(checkpoint: Checkpoint) -> list[Output]:
    """Return the tensors of the GGUF file in their order, as F32."""
    import torch

    family, config = checkpoint.family, checkpoint.hf_config
    gguf_name = tensor_namer(family.arch, checkpoint.n_layers)
    tensors = dict(checkpoint.tensors)
    if family.needs_head:  # a copy of the embedding where that is the head
        tensors |= {name: tensors[origin] for name, origin in checkpoint.tied_tensors.items()}
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(_NUMBERED.sub(r"\1.", name), []).append(name)
    outputs = []
    for merged, names in groups.items():
        names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
        written = gguf_name(family.rename(merged))
        if written is None:
            raise UnsupportedError(
                f"{checkpoint.path}: {merged} has no place in a GGUF file of {family.arch}",
                "llama.cpp takes the embedding for the head of this family; set tie_word_embeddings to true only if "
                "they are one"
                if merged in checkpoint.untied_heads
                else "llama.cpp has no such variant of this family",
            )
        make = _maker(family.transform(merged), config, stacked=merged != names[0])
        sources = tuple(tensors[name] for name in names)
        shape = tuple(make([torch.empty(source.shape, device="meta") for source in sources]).shape)
        outputs.append(Output(written, shape, "F32", 4 * math.prod(shape), sources, make))
    return outputs


def _maker(
    transform: Transform | None, config: Config, *, stacked: bool
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        tensor = torch.stack(list(tensors)) if stacked else tensors[0]
        return transform(tensor, config) if transform else tensor

    return make


def plan_adapter_file(checkpoint: AdaptedCheckpoint, *, general: dict[str, Any], quantization: str) -> FilePlan:
    """Decide every key and tensor of a GGUF file that holds the checkpoint's one adapter, for its base's own file.

    llama.cpp multiplies by alpha / rank, with one alpha for all: where a tensor's scaling is another, B carries the
    difference.

    Args:
        general: `general.*` keys.
        quantization: F32 or F16.

    Raises:
        UnsupportedError: the adapter changes something that GGUF holds in a way no product of low rank can follow.
    """
    family, config = checkpoint.family, checkpoint.hf_config
    gguf_name = tensor_namer(family.arch, checkpoint.n_layers)
    path = checkpoint.adapters[0].path
    alpha, outputs = 0.0, []
    for name, change in low_rank_changes(checkpoint).items():
        transform = family.transform(name)
        rows = checkpoint.tensors[name].shape[0]
        written = gguf_name(family.rename(name))
        if _NUMBERED.search(name) or written is None or (transform and not _permutes_rows(transform, config, rows)):
            raise UnsupportedError(
                f"{path}: {name} is part of another tensor in {family.arch}, or other than a reordering of its rows",
                "convert without --adapter-only: the adapter is then merged",
            )
        if change.embedding and transform:
            raise UnsupportedError(
                f"{path}: {name} has its rows reordered in {family.arch}", "leave out --adapter-only"
            )
        alpha = alpha or change.scaling * change.rank
        by = change.scaling * change.rank / alpha if alpha else 0.0
        b = change.b
        if not math.isclose(by, 1, rel_tol=1e-12):
            b = ScaledTensor.of(b, by)
        swap = _maker(lambda tensor, _: tensor.T, config, stacked=False)
        parts = {
            "lora_a": (change.a, swap if change.embedding else _maker(None, config, stacked=False)),
            "lora_b": (b, _maker(transform, config, stacked=False)),
        }
        for suffix, (source, make) in parts.items():
            shape = source.shape[::-1] if make is swap else source.shape
            output = Output(f"{written}.{suffix}", shape, "F32", 4 * math.prod(shape), (source,), make)
            outputs.append(_typed(output, quantization))
    metadata = {
        **general,
        "general.type": "adapter",
        "general.file_type": quantizations()[quantization],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha or 1.0),
    }
    return FilePlan(checkpoint, quantization, metadata, outputs, {})


def _permutes_rows(transform: Transform, config: Config, rows: int) -> bool:
    """Tell whether a transformation only reorders rows, so that transform(B A) is transform(B) A."""
    import torch

    numbers = torch.arange(rows)
    made = transform(torch.stack([numbers, numbers + rows], 1), config)
    return (
        made.shape == (rows, 2)
        and bool((made[:, 0].sort().values == numbers).all())
        and bool((made[:, 1] == made[:, 0] + rows).all())
    )


def _divisors(name: str, divisors: Sequence[float]) -> Output:
    def make(_: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.tensor(divisors)

    return Output(name, (len(divisors),), "F32", 4 * len(divisors), (), make)


def _stays_exact(output: Output) -> bool:
    """Tell whether a tensor is F32 in every file, as llama.cpp has it: vectors, norms, and what chooses experts."""
    return len(output.shape) == 1 or output.name.endswith("_norm.weight") or "ffn_gate_inp" in output.name


def _typed(output: Output, kind: str) -> Output:
    return replace(output, type=kind, nbytes=tensor_nbytes(kind, output.shape))


# Writing


@stage("write {path}")
def write_file(plan: FilePlan, path: Path, *, overwrite: bool = False) -> None:
    """Write a planned file to `path`; go on where a run of the same plan stopped.

    Beside it, `path` with .state holds what was planned and a checksum of each tensor that is there.

    Args:
        path: a name that is not the final one.
        overwrite: begin anew where the file there is of another plan or source.

    Raises:
        CheckpointError: a weight is not a number, or beyond F16; or the source changed while it was read.
        OptionError: the file there is of another plan, or the source changed since; it stays.
        ResourceError: not enough disk; what was written stays.
    """
    identity = _identity(plan)
    done = _resume(plan, path, identity, overwrite)
    if done:
        say(f"go on with {path}: {done} of {len(plan.outputs)} tensors are there")
    left = plan.outputs[done:]
    check_free_disk(path.parent, sum(padded(output.nbytes) for output in left))
    with (
        disk_errors(path),
        open_files() as files,
        path.open("ab") as file,
        state_path(path).open("a", encoding="utf-8") as state,
        progress_bar(f"write {plan.quantization}", sum(o.nbytes for o in plan.outputs), "bytes") as advance,
        _stopping(ThreadPoolExecutor(cores())) as workers,
        _stopping(ThreadPoolExecutor(1)) as reader,
        _stopping(ThreadPoolExecutor(1)) as writer,
    ):
        advance(sum(output.nbytes for output in plan.outputs[:done]), earlier=True)

        def read(output: Output) -> torch.Tensor:
            return _values(output, files)

        def put(output: Output, data: np.ndarray) -> None:
            checksum = 0
            for start in range(0, output.nbytes, _WRITE_BYTES):
                part = data[start : start + _WRITE_BYTES].data
                checksum = zlib.crc32(part, checksum)
                file.write(part)
            file.write(bytes(padded(output.nbytes) - output.nbytes))
            file.flush()
            state.write(json.dumps([output.name, checksum]) + "\n")
            state.flush()
            advance(output.nbytes)

        reading = (reader.submit(read, output) for output in left)
        coming, writing = next(reading, None), None
        for output in left:
            assert coming is not None
            values, coming = coming.result(), next(reading, None)
            data = _encode(values, output, plan.importance.get(output.name), workers)
            if writing:
                writing.result()
            writing = writer.submit(put, output, data)
        if writing:
            writing.result()
    if changed := next((key for key, value in _identity(plan).items() if identity[key] != value), None):
        raise CheckpointError(f"{path}: {changed} changed while it was read", "convert again")
    trust(read_header(path))


@contextmanager
def _stopping(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Leave a pool without the work that waits in it; what runs is waited for."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def state_path(path: Path) -> Path:
    """Return the name of the file that says what of an unfinished file is there."""
    return path.with_name(f"{path.name}.state")


def _resume(plan: FilePlan, path: Path, identity: dict[str, str], overwrite: bool) -> int:
    """Bring file and state to the last whole tensor, or begin both; return how many tensors are there."""
    before, recorded = _read_state(state_path(path)) if path.exists() else (None, [])
    difference = before is not None and next((key for key in identity if before.get(key) != identity[key]), "")
    if difference and not overwrite:
        what = "with other settings" if difference == "settings" else f"of what {difference} was before it changed"
        raise OptionError(f"{path}: an unfinished conversion {what}", "begin anew with --overwrite")
    whole: list[list[Any]] = []
    with disk_errors(path):
        if before is None or difference or not _begins_with(path, plan.header):
            path.write_bytes(plan.header)
        else:
            whole = _whole_tensors(plan, path, recorded)
        end = len(plan.header) + sum(padded(output.nbytes) for output in plan.outputs[: len(whole)])
        os.truncate(path, end)
        lines = [identity, *whole]
        state_path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(whole)


def _identity(plan: FilePlan) -> dict[str, str]:
    """Return what must be the same for a run to go on: one entry for each file of weights, one for all the rest."""
    stats = {source.path: source.path.stat() for source in plan.checkpoint.tensors.values()}
    return {
        **{str(path.name): f"{stat.st_size} bytes, {stat.st_mtime_ns}" for path, stat in stats.items()},
        "the checkpoint": plan.checkpoint.fingerprint(),
        "settings": hashlib.sha256(plan.header).hexdigest(),
        **plan.checkpoint.adapter_hashes,
        "the importance matrix": _hash(plan.importance),
    }


def _hash(importance: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + importance[name].tobytes())
    return digest.hexdigest()


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


def _values(output: Output, files: dict[Path, Any]) -> torch.Tensor:
    """Read a tensor's sources and make it of them.

    Args:
        files: opened files by path, filled as they are needed.
    """
    return output.make([_load(source, output.type, files) for source in output.sources])


def _load(source: TensorSource, kind: str, files: dict[Path, Any]) -> torch.Tensor:
    tensor = source.read(files)
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


def _encode(values: torch.Tensor, output: Output, importance: np.ndarray | None, workers: Executor) -> np.ndarray:
    """Convert or quantize a tensor, on all cores; return its bytes.

    Args:
        importance: weight of each column, of each of the tensor's matrices; none when None.
    """
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
    weights = [None] if importance is None else list(importance.reshape(-1, columns))
    matrix, step = len(rows) // len(weights), max(1, _CHUNK_ELEMENTS // columns)
    parts = [
        (slice(start, min(start + step, (i + 1) * matrix)), weight)
        for i, weight in enumerate(weights)
        for start in range(i * matrix, (i + 1) * matrix, step)
    ]
    for future in [workers.submit(quantize_rows, output.type, rows[p], dtype, out[p], w) for p, w in parts]:
        future.result()
    return out.reshape(-1)
