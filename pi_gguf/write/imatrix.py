"""Importance matrices: how much each column of a weight matters, by what llama.cpp multiplies it with on long texts.

In: a GGUF file or a checkpoint, and texts. Out: llama.cpp's own file of an importance matrix, which quantizing reads
again. Importance is the mean square of a column's inputs.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import check_writable, open_plain, replace_when_complete, temporary, writes
from pi_gguf.common.progress import progress_bar, say, stage
from pi_gguf.errors import GgufError, OptionError, ResourceError, TextError, one_line
from pi_gguf.gguf.file import read_gguf, read_values, write_values
from pi_gguf.gguf.header import is_gguf
from pi_gguf.llamacpp.watch import ProductWatch
from pi_gguf.runtime.model import Model
from pi_gguf.texts import read_texts
from pi_gguf.vocabulary.keys import gguf_vocabulary
from pi_gguf.write.layout import plan_file
from pi_gguf.write.writer import write_file

DEFAULT_TOKENS = 65536
"""Tokens read when no limit is given; at least one window."""

_COLLECTED = "blk."
"""What the names of the watched weights begin with; llama.cpp leaves out embeddings and the output matrix, too."""

_CHARACTERS = 8
"""More than a token has in any text that is worth reading."""

_AGAIN = "make it again with pi-gguf imatrix"

_KEY_BYTES = 127
"""What llama.cpp keeps of a text that it writes into a quantized file."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix as it lies in a file.

    Args:
        path: of the file.
        sums: sum of the squares of each column's inputs by tensor, float32 (matrices, columns).
        counts: how many inputs each matrix had by tensor, float32 (matrices,).
        datasets: names of the texts.
        chunks: windows read.
        chunk_size: tokens of a window.
    """

    path: Path
    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    datasets: list[str]
    chunks: int
    chunk_size: int

    @cached_property
    def importance(self) -> dict[str, np.ndarray]:
        """Mean of the squares by tensor, float32 (matrices, columns); 1 where a matrix had no input."""
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
        return found

    def keys(self) -> dict[str, int | str]:
        """Return the keys that a file quantized with it states, as llama.cpp writes them."""
        keys: dict[str, int | str] = {"quantize.imatrix.file": _short(self.path.name)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = _short(self.datasets[0].replace("\\", "/").split("/")[-1])
        keys["quantize.imatrix.entries_count"] = len(self.sums)
        if self.chunks:
            keys["quantize.imatrix.chunks_count"] = self.chunks
        return keys

    def check_fits(self, model: str, shapes: Mapping[str, tuple[int, ...]], quantized: Collection[str]) -> None:
        """Check that it is a matrix of a model: no other tensors, the same columns, and none missing in the layers.

        Args:
            model: for the message.
            shapes: of the model's tensors by GGUF name, as torch has them.
            quantized: names of those that are quantized.

        Raises:
            GgufError: otherwise.
        """
        hint = f"make one of this model: pi-gguf imatrix {model} OUT.gguf"
        for name, values in self.importance.items():
            if name not in shapes:
                raise GgufError(f"{self.path}: {name} is no tensor of {model}; it is a matrix of another model", hint)
            *outer, _, columns = (1, *shapes[name])[-3:]
            matrices = outer[0] if outer else 1
            if values.shape not in ((matrices, columns), (1, matrices * columns)):
                raise GgufError(
                    f"{self.path}: {name} must have {matrices} x {columns} columns as in {model}, "
                    f"got {values.shape[0]} x {values.shape[1]}; it is a matrix of another model",
                    hint,
                )
        for name in sorted(quantized):
            if name.startswith(_COLLECTED) and name not in self.sums:
                raise GgufError(f"{self.path}: {name} of {model} is missing", hint)


def _short(name: str) -> str:
    return name.encode(errors="replace")[:_KEY_BYTES].decode(errors="ignore")


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix that this package or llama.cpp wrote, in llama.cpp's older binary form, too.

    Raises:
        GgufError: the file is none, or a value in it cannot be.
    """
    try:
        with open_plain(path) as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GgufError(f"{path}: cannot be read ({reason})", "check the spelling") from error
    matrix = _read_gguf_form(path) if magic == b"GGUF" or path.suffix == ".gguf" else _read_older_form(path)
    for parts, part in ((matrix.sums, "in_sum2"), (matrix.counts, "counts")):
        for name, values in parts.items():
            _check_values(path, f"{name}.{part}", values)
    return matrix


def _check_values(path: Path, name: str, values: np.ndarray) -> None:
    wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        raise GgufError(f"{path}: {name} must hold numbers from 0 on, got {values[tuple(wrong[0])]:g}", _AGAIN)


def _read_gguf_form(path: Path) -> ImportanceMatrix:
    info = read_gguf(path)
    if (kind := info.metadata.get("general.type")) != "imatrix":
        got = "it is missing" if kind is None else f"got {kind!r}"
        raise GgufError(
            f"{path}: general.type must be imatrix, {got}; it is no importance matrix", "make one with pi-gguf imatrix"
        )
    numbers = {}
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        value = info.metadata.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
            got = "it is missing" if value is None else f"got {value!r}"
            raise GgufError(f"{path}: {key} must be a whole number, {got}", _AGAIN)
        numbers[key] = value
    datasets = info.header.entries.get("imatrix.datasets")
    values = read_values(info.header)
    sums, counts = {}, {}
    for name in sorted({t.name.rpartition(".")[0] for t in info.tensors}):
        for part in ("in_sum2", "counts"):
            if f"{name}.{part}" not in values:
                raise GgufError(f"{path}: {name}.{part} is missing or not F32", _AGAIN)
        total, many = (values[f"{name}.{part}"].size for part in ("in_sum2", "counts"))
        if total % many:
            raise GgufError(f"{path}: {name} has {many} counts for {total} sums", _AGAIN)
        sums[name], counts[name] = values[f"{name}.in_sum2"].reshape(many, -1), values[f"{name}.counts"].reshape(-1)
    if not sums or len(info.tensors) != 2 * len(sums):
        raise GgufError(f"{path}: it holds no pairs of in_sum2 and counts", _AGAIN)
    read = [str(text) for text in datasets.value] if datasets is not None and datasets.type == "[STRING]" else []
    return ImportanceMatrix(path, sums, counts, read, numbers["imatrix.chunk_count"], numbers["imatrix.chunk_size"])


def _read_older_form(path: Path) -> ImportanceMatrix:
    """Read what `llama-imatrix` wrote before it wrote GGUF: entries of a name, calls and mean squares times calls.

    Numbers are of 32 bits; texts have their length before them. Behind the entries may be the chunks and a data set.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def number() -> int:
            return int(struct.unpack("<i", file.read(4))[0])

        def piece(length: int) -> bytes:
            if not 0 < length <= size - file.tell():
                raise ValueError(f"{length} bytes of {size - file.tell()}")
            return file.read(length)

        sums, counts = {}, {}
        try:
            entries = number()
            if entries < 1:
                raise ValueError(f"{entries} entries")
            for _ in range(entries):
                name = piece(number()).decode()
                if name in sums:
                    raise ValueError(f"{name} is there twice")
                calls = max(1, number())  # 0 where the means are not multiplied
                sums[name] = np.frombuffer(piece(4 * number()), "<f4").reshape(1, -1)
                counts[name] = np.array([calls], np.float32)
            chunks = max(0, number()) if file.tell() < size else 0
            length = number() if file.tell() < size else 0
            datasets = [piece(length).decode(errors="replace")] if length else []
        except (struct.error, ValueError) as error:
            raise GgufError(
                f"{path}: no importance matrix, neither GGUF nor the older form ({one_line(error)})", _AGAIN
            ) from error
    return ImportanceMatrix(path, sums, counts, datasets, chunks, 0)


def write_imatrix(matrix: ImportanceMatrix, arch: str) -> None:
    """Write an importance matrix to its path, under that name only when complete.

    Args:
        matrix: what is written.
        arch: the model's architecture, which GGUF files state.
    """
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": matrix.datasets,
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    values = {}
    for name in sorted(matrix.sums):
        values[f"{name}.in_sum2"] = matrix.sums[name]
        values[f"{name}.counts"] = matrix.counts[name].reshape(-1, 1)
    with replace_when_complete(matrix.path) as partial:
        write_values(partial, arch, metadata, values)


# Computing


class SquareSums:
    """Sums the squares of what weights are multiplied with, column by column, and counts them by matrix."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}

    def add(self, name: str, inputs: np.ndarray, chosen: np.ndarray | None, matrices: int) -> None:
        """Add the inputs of one product; arguments as `ProductWatch` has them.

        Raises:
            GgufError: an input is not a number.
        """
        slots, columns = inputs.shape[1:]
        if name not in self.sums:
            self.sums[name], self.counts[name] = np.zeros((matrices, columns)), np.zeros(matrices, np.int64)
        rows = {0: inputs.reshape(-1, columns)}
        if chosen is not None:
            rows = {}
            for matrix in np.unique(chosen):
                token, used = np.nonzero(chosen == matrix)
                rows[int(matrix)] = inputs[token, used % slots]
        for matrix, part in rows.items():
            squares = np.einsum("nc,nc->c", part, part)
            if not np.isfinite(squares).all():
                raise GgufError(
                    f"{name}: its inputs or their squares are no numbers", "the model is damaged or diverged"
                )
            self.sums[name][matrix] += squares
            self.counts[name][matrix] += len(part)


@dataclass(frozen=True)
class ImatrixReport:
    """What was written: file, tensors, and the texts, windows and tokens read.

    `unused` counts the matrices of experts that no token took.
    """

    path: str
    model: str
    tensors: int
    unused: int
    texts: list[str]
    windows: int
    context: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@writes("out")
@stage("compute an importance matrix of {model} in llama.cpp")
def compute_imatrix(
    model: str,
    out: str | Path,
    *,
    text: Sequence[str] = (),
    context: int | None = None,
    tokens: int | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> ImatrixReport:
    """Compute an importance matrix in llama.cpp over long texts, for convert and quantize --imatrix.

    Texts are cut into windows of the file's own length; the first window of each text is read, then the second of
    each, and so on up to --tokens. Texts shorter than a window are left out.

    Args:
        model: GGUF file, best F32, F16 or BF16; or Hugging Face folder, Hub id or bundled:tiny.
        out: GGUF file to write.
        text: text file or folder of them; the training novels of the bundled sample when left out. Repeatable.
        context: tokens of a window; the file's own window when left out.
        tokens: limit in tokens, as whole windows; 65536 or one window, whichever is more, when left out.
        overwrite: replace the file that is there.
        device: auto, cpu or cuda.

    Example:
        pi-gguf imatrix my-llama-32k-f16.gguf my-llama-32k.imatrix.gguf --text books/
    """
    out = Path(out)
    if out.suffix != ".gguf":
        raise OptionError(f"{out}: the name must end in .gguf")
    for name, value in (("context", context), ("tokens", tokens)):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    check_writable(out, overwrite)
    documents = read_texts(text) if text else _sample()
    with _as_gguf(model, out) as path:
        if out.exists() and out.samefile(path):
            raise OptionError(f"{out}: model and output are the same file", "give another name")
        info = read_gguf(path)
        window = info.rope.max_position_embeddings
        context = context or window
        if context > window:
            raise OptionError(
                f"context must be at most the model's window of {window} tokens, got {context}", "give a smaller one"
            )
        limit = tokens or max(DEFAULT_TOKENS, context)
        if limit < context:
            raise OptionError(
                f"tokens must be at least a window of {context}, got {tokens}", "give more, or a smaller --context"
            )
        sums = SquareSums()
        watch = ProductWatch({t.name for t in info.tensors if t.name.startswith(_COLLECTED)}, sums.add)
        with _opened(path, context, device, watch) as lm:
            windows = list(text_windows(lm, documents, context, limit // context))
            with progress_bar("importance matrix", len(windows) * context, "tokens") as advance:
                for i, (name, ids) in enumerate(windows):
                    for done in lm.evaluate(ids):
                        advance(done, text=f"window {i + 1} of {len(windows)}, {Path(name).name}")
    read = list(dict.fromkeys(Path(name).name for name, _ in windows))
    matrix = ImportanceMatrix(
        out, {name: values.astype(np.float32) for name, values in sums.sums.items()},
        {name: values.astype(np.float32) for name, values in sums.counts.items()}, read, len(windows), context,
    )  # fmt: skip
    write_imatrix(matrix, info.arch)
    unused = sum(int((counts == 0).sum()) for counts in sums.counts.values())
    if unused:
        say(f"note: {unused} matrices of experts had no token; their columns count alike. More --tokens reach more")
    return ImatrixReport(
        str(out), model, len(sums.sums), unused, read, len(windows), context, len(windows) * context
    )  # fmt: skip


def text_windows(
    lm: Model, documents: Mapping[str, str], context: int, windows: int
) -> Iterator[tuple[str, list[int]]]:
    """Yield windows of exactly `context` tokens with their document's name: the first of each document, the second...

    Args:
        lm: gives the tokenizer; every window has its begin token, if the model wants one.
        documents: texts by name.
        context: tokens of a window.
        windows: how many at most.

    Raises:
        TextError: every document is shorter than a window.
    """
    bos = list(lm.bos)
    step = context - len(bos)
    tokenized: dict[str, list[int]] = {}
    left, turn = windows, 0
    names, lengths = list(documents), {}
    while left and names:
        for name in list(names):
            if name not in tokenized:
                part = documents[name][: _CHARACTERS * context * windows]
                tokenized[name] = lm.tokenize(part, add_special=False)
                lengths[name] = len(tokenized[name]) + len(bos)
            ids = bos + tokenized[name][turn * step : (turn + 1) * step]
            if len(ids) < context or not step:
                names.remove(name)
                continue
            yield name, ids
            left -= 1
            if not left:
                break
        turn += 1
    short = {name: n for name, n in lengths.items() if n < context}
    if left == windows:
        name, length = max(short.items(), key=lambda item: item[1], default=("text", 0))
        raise TextError(
            f"{name}: {length} tokens, fewer than the window of {context}", "give longer texts or a smaller --context"
        )
    if short:
        say(f"note: {len(short)} texts are shorter than the window of {context} tokens and are left out")


@contextmanager
def _opened(path: Path, context: int, device: str, watch: ProductWatch) -> Iterator[Model]:
    try:
        lm = Model(path, n_ctx=context, type_k="f16", device=device, watch=watch)
    except ResourceError as error:
        raise ResourceError(str(error), "read smaller windows, for example --context 2048") from error
    with lm:
        yield lm


@contextmanager
def _as_gguf(model: str, out: Path) -> Iterator[Path]:
    """Give a GGUF file, or one of a Hugging Face MODEL that is deleted again, of the type its weights are stored in."""
    if is_gguf(model):
        yield Path(model)
        return
    checkpoint = load_checkpoint(model)
    types = {source.dtype for source in checkpoint.tensors.values()}
    plan = plan_file(
        checkpoint, vocabulary=gguf_vocabulary(checkpoint, checkpoint.load_tokenizer()),
        general={"general.type": "model"}, finetuned=True, quantization=types.pop() if len(types) == 1 else "F32",
    )  # fmt: skip
    with temporary(out, "model") as folder:
        folder.mkdir()
        path = folder / "model.gguf"
        write_file(plan, path)
        yield path


def _sample() -> dict[str, str]:
    documents = bundled.novels("train")
    say(f"no --text: the {len(documents)} training novels of the bundled sample are read")
    return documents
