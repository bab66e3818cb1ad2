"""The whole path: checkpoint -> Position Interpolation -> quantized GGUF -> checked, under one name at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.check import LEVELS, CheckReport, Reference, check_gguf
from pi_gguf.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.errors import CheckError, CheckpointError, OptionError
from pi_gguf.files import check_free_disk, check_writable, disk_errors, publish, remove
from pi_gguf.finetune import extend
from pi_gguf.ggml import check_quantization
from pi_gguf.gguf_file import tensor_types
from pi_gguf.hf_model import torch_device
from pi_gguf.planning import plan_training, training_disk_bytes
from pi_gguf.progress import say
from pi_gguf.provenance import library_versions, package_version
from pi_gguf.rope import RopeScaling
from pi_gguf.vocabulary import check_name, gguf_vocabulary
from pi_gguf.writing import UNQUANTIZED, FilePlan, plan_file, write_file


@dataclass(frozen=True)
class Conversion:
    """What was written: the file, its size in bytes, and what was checked."""

    path: str
    nbytes: int
    quantization: str
    checks: list[CheckReport]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DryRun:
    """What would be written: tensors (GGUF name, shape as torch has it, type, bytes) and exact size in bytes.

    `memory_bytes` is what writing takes beyond the mapped checkpoint, about; `disk_bytes` includes the fine-tune's.
    """

    path: str
    quantization: str
    tensors: list[tuple[str, list[int], str, int]]
    header_bytes: int
    nbytes: int
    memory_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    model: str,
    out: str | Path,
    *,
    context: int | None = None,
    quant: str = "Q4_K_M",
    steps: int = 1000,
    data: Sequence[str] = (),
    train_window: int | str | None = None,
    learning_rate: float | None = None,
    batch_tokens: int | None = None,
    schedule: str = "constant",
    factor_warmup: int = 0,
    check: str = "quick",
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    tensor_type: Sequence[str] = (),
    dry_run: bool = False,
) -> Conversion | DryRun:
    """Convert a Hugging Face model to GGUF; with --context, interpolate its positions and fine-tune it first.

    The fine-tuned model stays beside OUT as a Hugging Face folder, OUT without .gguf plus -hf; the same command
    uses it again. A conversion that stops leaves OUT.partial, and the same command goes on behind the last whole
    tensor.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny.
        out: GGUF file to write.
        context: new window, in tokens, e.g. 32768; converted as it is when left out.
        quant: any type llama.cpp has, e.g. F16, Q8_0 or Q4_K_M; quantized in one pass, with no file in between.
        steps: optimizer steps; 0 applies the scaling without training.
        data: text file or folder of them to train on; the bundled sample when left out. Repeatable.
        train_window: tokens of a training sequence; below the context positions skip (PoSE). Several with their steps
            follow each other: 512x500,2048x200,8192.
        learning_rate: at its peak; by the model's size when left out (2e-5 for 7B).
        batch_tokens: tokens of an optimizer step; by the model's size when left out.
        schedule: constant (the paper's) or decay (to a tenth over the last third).
        factor_warmup: steps over which the factor grows from 1, e.g. 300; 0 (the paper's) starts with the whole.
        check: quick reads a prompt longer than the original window, full the whole new window; none.
        seed: of the order of the data and of the skips.
        device: auto, cpu or cuda; for the fine-tune.
        overwrite: replace what is there; a fine-tune or a file of the same settings is still used or gone on with.
        tensor_type: PATTERN=TYPE: another type for the tensors whose GGUF name has the pattern in it, e.g. attn_v=Q8_0.
            Repeatable; the first that fits holds.
        dry_run: print every tensor with type and bytes, and the exact size, memory and disk needed; write nothing.

    Example:
        pi-gguf convert bundled:tiny tiny-32k.gguf --context 32768 --quant Q8_0 --steps 100
    """
    out, quant = Path(out), check_quantization(quant)
    overrides = [_read_override(text) for text in tensor_type]
    if overrides and quant in UNQUANTIZED:
        raise OptionError(f"tensor-type is for quantized files, quant is {quant}", "give --quant Q8_0 or another")
    if out.suffix != ".gguf":
        raise OptionError(f"{out}: the name must end in .gguf")
    if check not in LEVELS:
        raise OptionError(f"check must be one of {', '.join(LEVELS)}, got {check}")
    if not dry_run:
        check_writable(out, overwrite)
    checkpoint = load_checkpoint(model)
    checkpoint.tensors  # noqa: B018  every file is checked before long work
    rope = checkpoint.interpolated(context) if context is not None else checkpoint.rope
    tokenizer, trained = checkpoint.load_tokenizer(), checkpoint.provenance
    vocabulary = gguf_vocabulary(checkpoint, tokenizer)
    check_name(_general(model, rope, trained)["general.name"], tokenizer)
    fine_tune = context is not None and steps != 0
    if dry_run and fine_tune:
        planned = plan_training(
            checkpoint, rope, steps=steps, train_window=train_window, learning_rate=learning_rate,
            batch_tokens=batch_tokens, schedule=schedule, factor_warmup=factor_warmup, device=torch_device(device),
        )  # fmt: skip
        trained = {"source": checkpoint.source, "steps": steps, "tokens": planned.tokens}

    def plan_of(checkpoint: Checkpoint, trained: dict[str, Any]) -> FilePlan:
        return plan_file(
            checkpoint, rope=rope, vocabulary=vocabulary, general=_general(model, rope, trained),
            finetuned=rope.rope_type == "linear" and trained.get("steps", 0) > 0, quantization=quant,
            overrides=overrides,
        )  # fmt: skip

    plan = plan_of(checkpoint, trained)
    if dry_run:
        return DryRun(
            str(out), quant, [(o.name, list(o.shape), o.type, o.nbytes) for o in plan.outputs], len(plan.header),
            plan.nbytes, plan.memory_bytes, plan.nbytes + (training_disk_bytes(checkpoint) if fine_tune else 0),
        )  # fmt: skip
    if fine_tune:
        assert context is not None
        check_free_disk(out.parent, plan.nbytes)
        hf_dir = out.with_name(out.stem + "-hf")
        extend(
            model, hf_dir, context=context, data=data, steps=steps, train_window=train_window,
            learning_rate=learning_rate, batch_tokens=batch_tokens, schedule=schedule, factor_warmup=factor_warmup,
            seed=seed, device=device, overwrite=overwrite,
        )  # fmt: skip
        checkpoint = load_checkpoint(str(hf_dir))
        plan = plan_of(checkpoint, checkpoint.provenance)
    work_dir = out.with_name(out.name + ".partial")
    if not work_dir.exists():
        check_free_disk(out.parent, plan.nbytes)
        work_dir.mkdir()
    partial = work_dir / out.name
    checks = []
    try:
        write_file(plan, partial, overwrite=overwrite)
        if check != "none":
            checks.append(check_gguf(partial, Reference(checkpoint, rope, check)))
            say(str(checks[-1]))
    except (CheckError, CheckpointError):
        remove(work_dir)  # nothing there is worth going on with
        raise
    with disk_errors(out):
        publish(partial, out)
    remove(work_dir)
    return Conversion(str(out), out.stat().st_size, quant, checks)


def _read_override(text: str) -> tuple[str, str]:
    """Read PATTERN=TYPE."""
    pattern, _, kind = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"tensor-type {text!r}: {pattern!r} is not a regular expression ({error})") from error
    if not pattern or kind.upper() not in tensor_types():
        raise OptionError(
            f"tensor-type must be PATTERN=TYPE with a tensor type, got {text!r}",
            "for example --tensor-type attn_v=Q8_0",
        )
    return pattern, kind.upper()


def _general(source: str, rope: RopeScaling, trained: dict[str, Any]) -> dict[str, Any]:
    """Return the `general.*` keys that say where a file comes from."""
    source = str(trained.get("source", source))
    name = source.removeprefix("bundled:") if ":" in source else Path(source).name
    if Path(source).is_dir():
        source = name  # a folder's place on this machine is nobody's business
    keys: dict[str, Any] = {"general.type": "model", "general.name": name, "general.source.repository": source}
    made = [f"pi-gguf {package_version()}"]
    made += [f"{library} {number}" for library, number in library_versions().items()]
    if rope.rope_type == "linear":
        steps, tokens = trained.get("steps", 0), trained.get("tokens", 0)
        keys["general.description"] = (
            f"Position Interpolation {rope.original_max_position_embeddings} -> {rope.max_position_embeddings} "
            f"(factor {rope.factor:g}), {steps} steps, {tokens} tokens"
        )
        keys["general.pi_gguf.steps"] = int(steps)
        keys["general.pi_gguf.tokens"] = str(tokens)
    keys["general.pi_gguf.versions"] = ", ".join(made)
    return keys
