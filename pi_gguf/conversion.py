"""The whole path: checkpoint -> Position Interpolation -> GGUF -> quantized -> checked, under one name at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.check import LEVELS, CheckReport, Reference, check_gguf
from pi_gguf.checkpoint import DTYPE_BYTES, Checkpoint, load_checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.files import check_free_disk, check_writable, remove, replace_when_complete
from pi_gguf.finetune import extend
from pi_gguf.gguf_file import UNQUANTIZED, write_gguf
from pi_gguf.progress import say
from pi_gguf.provenance import library_versions, package_version
from pi_gguf.rope import RopeScaling
from pi_gguf.runtime import check_quantization, quantize
from pi_gguf.vocabulary import gguf_vocabulary


@dataclass(frozen=True)
class Conversion:
    """What was written: the file, its size in bytes, and what was checked (the exact file first)."""

    path: str
    nbytes: int
    quantization: str
    checks: list[CheckReport]

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
) -> Conversion:
    """Convert a Hugging Face model to GGUF; with --context, interpolate its positions and fine-tune it first.

    The fine-tuned model stays beside OUT as a Hugging Face folder, OUT without .gguf plus -hf; the same command
    uses it again.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny.
        out: GGUF file to write.
        context: new window, in tokens, e.g. 32768; converted as it is when left out.
        quant: any type llama.cpp has, e.g. F16, Q8_0 or Q4_K_M.
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
        overwrite: replace what is there; a fine-tune of the same settings is still used or gone on with.

    Example:
        pi-gguf convert bundled:tiny tiny-32k.gguf --context 32768 --quant Q8_0 --steps 100
    """
    out, quant = Path(out), check_quantization(quant)
    if out.suffix != ".gguf":
        raise OptionError(f"{out}: the name must end in .gguf")
    if check not in LEVELS:
        raise OptionError(f"check must be one of {', '.join(LEVELS)}, got {check}")
    check_writable(out, overwrite)
    checkpoint = load_checkpoint(model)
    checkpoint.tensors  # noqa: B018  every file is checked before long work
    rope = checkpoint.interpolated(context) if context is not None else checkpoint.rope
    vocabulary = gguf_vocabulary(checkpoint, checkpoint.load_tokenizer())
    base_type = quant if quant in UNQUANTIZED else _stored_type(checkpoint)
    size = checkpoint.n_parameters() * DTYPE_BYTES[base_type]
    check_free_disk(out.parent, size if quant in UNQUANTIZED else int(size * 1.3))
    if context is not None and steps != 0:
        hf_dir = out.with_name(out.stem + "-hf")
        extend(
            model, hf_dir, context=context, data=data, steps=steps, train_window=train_window,
            learning_rate=learning_rate, batch_tokens=batch_tokens, schedule=schedule, factor_warmup=factor_warmup,
            seed=seed, device=device, overwrite=overwrite,
        )  # fmt: skip
        checkpoint = load_checkpoint(str(hf_dir))
    return _write(checkpoint, rope, vocabulary, out, quant, base_type, check, model)


def _write(
    checkpoint: Checkpoint,
    rope: RopeScaling,
    vocabulary: dict[str, Any],
    out: Path,
    quant: str,
    base_type: str,
    level: str,
    source: str,
) -> Conversion:
    reference = Reference(checkpoint, rope, level) if level != "none" else None
    trained = checkpoint.provenance
    finetuned = rope.rope_type == "linear" and trained.get("steps", 0) > 0
    checks = []
    exact = out.with_name(f".{out.name}.{base_type}.gguf")
    try:
        with replace_when_complete(out) as partial:
            written = partial if quant == base_type else exact
            write_gguf(
                checkpoint, written, rope=rope, vocabulary=vocabulary, general=_general(source, rope, trained),
                finetuned=finetuned, quantization=base_type,
            )  # fmt: skip
            if reference:
                checks.append(check_gguf(written, reference))
                say(str(checks[-1]))
            if quant != base_type:
                quantize(exact, partial, quant=quant)
                if reference:
                    checks.append(check_gguf(partial, reference))
                    say(str(checks[-1]))
    finally:
        remove(exact)
    return Conversion(str(out), out.stat().st_size, quant, checks)


def _stored_type(checkpoint: Checkpoint) -> str:
    """Return the type that holds every weight of the checkpoint exactly."""
    types = {source.dtype for source in checkpoint.tensors.values()}
    return types.pop() if len(types) == 1 else "F32"


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
