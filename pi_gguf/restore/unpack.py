"""The whole way back: a GGUF file -> a Hugging Face folder, under its name when it is whole: `unpack`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import check_free_disk, check_writable, replace_when_complete, writes
from pi_gguf.common.progress import stage
from pi_gguf.errors import OptionError
from pi_gguf.llamacpp.quantizer import UNQUANTIZED
from pi_gguf.restore.configuration import check_config, is_tied, may_be_tied, restore_config
from pi_gguf.restore.opened import OpenedFile, open_file
from pi_gguf.restore.tokenizer import check_tokenizer, open_vocabulary, special_ids, write_tokenizer
from pi_gguf.restore.weights import DTYPES, plan_sources, same_numbers, write_shards


@dataclass(frozen=True)
class Unpacked:
    """What was written: folder, model_type, window in tokens, dtype, how many weights there are and bytes of them."""

    path: str
    model_type: str
    window: int
    dtype: str
    parameters: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@writes("out_dir")
@stage("unpack {source}")
def unpack(source: str | Path, out_dir: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Unpacked:
    """Turn a GGUF file back into a Hugging Face folder: weights, config with its scaling, tokenizer, chat template.

    The weights are the very numbers that llama.cpp computes with; what quantizing lost stays lost. The tokenizer gives
    the sample texts the ids that llama.cpp gives them, or nothing is written.

    Args:
        source: GGUF file to read; of a split one any part.
        out_dir: folder to write.
        dtype: bf16 or f32; when left out bf16, but for files of F32 or F16 weights, which it would round.
        overwrite: replace the folder that is there.

    Example:
        pi-gguf unpack model-Q8_0.gguf ./model
    """
    source, out_dir = Path(source), Path(out_dir)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}", "leave it out for the usual")
    check_writable(out_dir, overwrite, folder=True)
    return restore(open_file(source), out_dir, dtype)


def restore(
    opened: OpenedFile, out_dir: Path, dtype: str | None = None, *, weights: bool = True, tokenizer: bool = True
) -> Unpacked:
    """Write the folder of an opened file.

    Args:
        dtype: as `unpack` has it.
        weights: write them too.
        tokenizer: write and prove it too; without both there is enough to plan with.
    """
    written = dtype or _usual_dtype(opened)
    tied = is_tied(opened)
    if not tied and may_be_tied(opened):
        tied = same_numbers(opened.tensors["output.weight"], opened.tensors["token_embd.weight"])
    restored = restore_config(opened, DTYPES[written][1], tied=tied)
    if weights:
        numbers = sum(math.prod(tensor.shape) for tensor in opened.tensors.values())
        check_free_disk(out_dir.parent, DTYPES[written][2] * numbers)
    with replace_when_complete(out_dir) as partial, open_vocabulary(opened) as vocabulary:
        partial.mkdir()
        fields = {**restored.fields, **special_ids(vocabulary)}
        (partial / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
        if tokenizer:
            write_tokenizer(partial, vocabulary, restored.rope.max_position_embeddings)
        planned = load_checkpoint(str(partial), plain=not (weights or tokenizer))
        check_config(planned, restored, opened.stated)
        sources = plan_sources(planned, opened)
        if tokenizer:
            check_tokenizer(planned, vocabulary)
        if weights:
            write_shards(partial, planned, sources, written)
            load_checkpoint(str(partial)).tensors  # noqa: B018  all are there, by their shapes
        parameters = planned.n_parameters()
    nbytes = DTYPES[written][2] * parameters
    window = restored.rope.max_position_embeddings
    return Unpacked(str(out_dir), restored.family.model_type, window, written, parameters, nbytes)


def _usual_dtype(opened: OpenedFile) -> str:
    """Return the smaller dtype where it rounds nothing that was not rounded more by quantizing."""
    matrices = {tensor.type for tensor in opened.tensors.values() if len(tensor.shape) > 1}
    exact = matrices & {*UNQUANTIZED} - {"BF16"}
    return "f32" if exact and not matrices - {*UNQUANTIZED} else "bf16"
