"""A GGUF file at another window without training: a new header before the same data, in the time of a copy.

In: a file, the window and the method. Out: a `Rescaling`, or None where more than the header changes: another type of
weights, divisors of the frequencies, which are a tensor. What it writes is opened by llama.cpp, and the window and the
factor that it reads are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckError, GgufError
from pi_gguf.gguf.header import MEASURED, Entry, Header, is_gguf, write_changed
from pi_gguf.restore.models import as_folder
from pi_gguf.restore.opened import open_file
from pi_gguf.runtime.model import Model
from pi_gguf.scaling.rope import FACTOR_TENSOR_NAMES

_OF_TRAINING = ("general.description", "general.pi_gguf.steps", "general.pi_gguf.tokens")


@dataclass(frozen=True)
class Rescaling:
    """A file that needs another header only.

    Args:
        checkpoint: the model without its weights, extended.
        headers: of the file's parts, the first with the new keys; each knows the file that it was read from.
    """

    checkpoint: Checkpoint
    headers: list[Header]

    @property
    def nbytes(self) -> int:
        """About the size of all parts."""
        return sum(header.path.stat().st_size for header in self.headers)


def plan_rescaling(model: str, context: int, method: str, quant: str) -> Rescaling | None:
    """Return how a file gets another window; None where MODEL is no file of this type, or more than a header changes.

    Args:
        model: MODEL, as it was given.
        context: new window, in tokens.
        method: `linear` (Position Interpolation) or another of `METHODS`.
        quant: type of the file that is asked for.

    Raises:
        OptionError: `context` is not above the window.
        UnsupportedError: the file cannot be unpacked, or its positions cannot be scaled.
    """
    path = Path(model)
    if not is_gguf(path) or not path.is_file():
        return None
    opened = open_file(path)
    if opened.info.quantization != quant or set(opened.tensors) & set(FACTOR_TENSOR_NAMES):
        return None
    checkpoint = load_checkpoint(as_folder(model, weights=False), config_only=True).extended(context, method)
    family, rope = checkpoint.family, checkpoint.rope
    if rope.factor_tensors(family.arch, checkpoint.rotary_dim):
        return None
    first = opened.headers[0]
    keys = rope.to_gguf(family.arch, finetuned=family.rope_finetuned)
    old = [key for key in first.entries if key.startswith((f"{family.arch}.rope.scaling.", MEASURED))]
    how = f"window {rope.original_max_position_embeddings} -> {context} by method {method}, without training"
    new = {key: Entry.of(value) for key, value in {**keys, "general.description": how}.items()}
    gone = dict.fromkeys([*old, *(key for key in _OF_TRAINING if key in first.entries)])
    return Rescaling(checkpoint, [first.changed({**gone, **new}), *opened.headers[1:]])


def write_rescaled(rescaling: Rescaling, partials: Sequence[Path], *, check: bool) -> None:
    """Write the parts of a file, and have llama.cpp open them.

    Args:
        rescaling: what is to be written.
        partials: names of the parts, which are not the final ones.
        check: compare what llama.cpp reads.

    Raises:
        CheckError: llama.cpp reads another window or factor.
    """
    for header, partial in zip(rescaling.headers, partials, strict=True):
        write_changed(header, partial)
    if check:
        _check(partials[0], rescaling.checkpoint)


def _check(path: Path, checkpoint: Checkpoint) -> None:
    rope = checkpoint.rope
    try:
        with Model(path, n_ctx=512, device="cpu") as model:
            read = (model.n_ctx_train, model.rope_freq_scale_train)
    except GgufError as error:
        raise CheckError(str(error), "nothing was written; unpack the file, and convert the folder") from error
    if read[0] != rope.max_position_embeddings or abs(read[1] / rope.rope_freq_scale - 1) > 1e-6:
        raise CheckError(
            f"{path}: llama.cpp reads a window of {read[0]} tokens at rope_freq_scale {read[1]:g}, planned "
            f"{rope.max_position_embeddings} at {rope.rope_freq_scale:g}"
        )
    say(
        f"checked: window {read[0]}, rope_freq_scale {read[1]:g}; the tensors are the file's own, to the byte, and "
        "logits are not compared"
    )
