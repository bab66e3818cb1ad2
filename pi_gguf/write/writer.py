"""One pass from a checkpoint to a GGUF file: each tensor is read, transformed, quantized and written, once.

In: a `FilePlan`. Out: the file; the same bytes as llama.cpp makes of the exact file. While one tensor is quantized on
all cores, the next is read and the last is written. What was written survives a kill, and the same plan goes on behind
the last whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_gguf.checkpoint.tensors import TensorSource, open_files
from pi_gguf.common.files import check_free_disk, disk_errors
from pi_gguf.common.machine import cores
from pi_gguf.common.progress import progress_bar, say, stage
from pi_gguf.errors import CheckpointError, OptionError
from pi_gguf.gguf.file import padded
from pi_gguf.gguf.header import read_header
from pi_gguf.llamacpp.quantizer import quantize_rows, widened
from pi_gguf.llamacpp.trial import trust
from pi_gguf.write.layout import FilePlan, Output

if TYPE_CHECKING:
    import torch


_F16_LIMIT = 65520
"""What no longer rounds to F16's largest number, 65504."""


_WRITE_BYTES = 2**16
"""Bytes written at once: a new file's pages come in pieces of this size, and large ones can cost several times
as much on a virtual machine that has to ask its host for them."""


_CHUNK_ELEMENTS = 2**18
"""Weights that a core quantizes at once: 1 MiB as 32-bit floats, so that they stay in its cache."""


_WORTH_COMPILING = 2**28
"""Weights of K-quants and IQ4 from which on numba's compiler, ten seconds once a machine, is worth its time."""


@stage("write {path}")
def write_file(plan: FilePlan, path: Path, *, overwrite: bool = False, quantizer: str = "auto") -> None:
    """Write a planned file to `path`; go on where a run of the same plan stopped.

    Beside it, `path` with .state holds what was planned and a checksum of each tensor that is there.

    Args:
        path: a name that is not the final one.
        overwrite: begin anew where the file there is of another plan or source.
        quantizer: of K-quants and IQ4: auto, ggml or numba; the bytes are the same.

    Raises:
        CheckpointError: a weight is not a number, or beyond F16; or the source changed while it was read.
        OptionError: the file there is of another plan, or the source changed since; it stays.
        ResourceError: not enough disk; what was written stays.
    """
    quantizers = _quantizers(plan, quantizer)
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
            data = _encode(values, output, quantizers[output.type], plan.importance.get(output.name), workers)
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


RowQuantizer = Callable[[str, np.ndarray, np.ndarray, "np.ndarray | None"], None]


def _quantizers(plan: FilePlan, wanted: str) -> dict[str, RowQuantizer]:
    """Return what quantizes rows, by tensor type.

    Raises:
        OptionError: numba is asked for and not installed.
    """
    weights = Counter[str]()
    for output in plan.outputs:
        weights[output.type] += math.prod(output.shape)
    found: dict[str, RowQuantizer] = dict.fromkeys(weights, quantize_rows)
    searched = [kind for kind in weights if kind.endswith("_K") or kind.startswith("IQ4")]
    if wanted == "numba" or (wanted == "auto" and sum(weights[kind] for kind in searched) >= _WORTH_COMPILING):
        try:
            from pi_gguf.write import kquants
        except ImportError as error:
            if wanted == "numba":
                raise OptionError("quantizer numba: numba is not installed", "pip install 'pi-gguf[fast]'") from error
        else:
            kinds = [kind for kind in searched if kind in kquants.KINDS]
            with progress_bar("compile the quantizer, unless it is kept from before", len(kinds), "types") as advance:
                for kind in kinds:
                    if kquants.gives_ggml_bytes(kind):
                        found[kind] = kquants.quantize_rows
                    advance(1)
    return found


def _encode(
    values: torch.Tensor, output: Output, quantizer: RowQuantizer, importance: np.ndarray | None, workers: Executor
) -> np.ndarray:
    """Convert or quantize a tensor, on all cores; return its bytes.

    Args:
        quantizer: of its rows.
        importance: weight of each column, of each of the tensor's matrices; none when None.
    """
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

    def quantize(part: slice, weight: np.ndarray | None) -> None:
        quantizer(output.type, widened(rows[part], dtype), out[part], weight)

    for future in [workers.submit(quantize, part, weight) for part, weight in parts]:
        future.result()
    return out.reshape(-1)
