"""The whole path: checkpoint -> Position Interpolation -> quantized GGUF -> checked, under one name at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from pi_gguf.adapters.adapted import AdaptedCheckpoint, with_adapters
from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.checkpoint.hub import model_name, public_source
from pi_gguf.checkpoint.record import Record
from pi_gguf.common.files import (
    check_free_disk,
    check_writable,
    disk_errors,
    has_more,
    parse_bytes,
    publish,
    remove,
    writes,
)
from pi_gguf.common.machine import Machine, torch_device
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import phase, process_count, say
from pi_gguf.common.provenance import library_versions, package_version
from pi_gguf.errors import CheckError, CheckpointError, OptionError, ResourceError, TextError
from pi_gguf.gguf.certificate import ROOM, Certificate, store  # fmt: skip
from pi_gguf.gguf.file import tensor_types
from pi_gguf.gguf.parts import part_paths
from pi_gguf.llamacpp.quantizer import TENSORS_NEED_IMPORTANCE, UNQUANTIZED, check_quantization, nearest, spelled
from pi_gguf.pipeline.options import ConvertKeywords
from pi_gguf.pipeline.rescale import Rescaling, plan_rescaling, write_rescaled
from pi_gguf.prove.certify import Base, measure  # fmt: skip
from pi_gguf.prove.check import CheckReport, Reference, check_gguf
from pi_gguf.prove.options import ProofOptions
from pi_gguf.prove.requirements import Requirement, check_requirements, find_missed, read_requirements  # fmt: skip
from pi_gguf.restore.models import as_folder
from pi_gguf.tune.choose import plan_training
from pi_gguf.tune.extend import extend_checkpoint
from pi_gguf.tune.memory import training_disk_bytes
from pi_gguf.tune.options import TuneOptions
from pi_gguf.vocabulary.keys import file_name, gguf_vocabulary
from pi_gguf.write.adapter import plan_adapter_file
from pi_gguf.write.imatrix import ImportanceMatrix, read_imatrix
from pi_gguf.write.layout import FilePlan, plan_file
from pi_gguf.write.options import WriteOptions
from pi_gguf.write.writer import state_path, write_file


@dataclass(frozen=True)
class Conversion:
    """What was written: the file to open, the size of all in bytes, what was checked and measured; neither for an
    adapter alone, which llama.cpp opens on its base's file only."""

    path: str
    files: list[str]
    nbytes: int
    quantization: str
    checks: list[CheckReport]
    certificate: Certificate | None = None
    adapter_only: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DryRun:
    """What would be written: files and tensors (GGUF name, shape as torch has it, type, bytes), exact sizes in bytes.

    `memory_bytes` is what writing takes beyond Python itself, about; `disk_bytes` includes the fine-tune's.
    """

    files: list[tuple[str, int]]
    quantization: str
    tensors: list[tuple[str, list[int], str, int]]
    header_bytes: int
    nbytes: int
    memory_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, plans: Sequence[FilePlan], out: Path, quantization: str, training_bytes: int) -> DryRun:
        names = [str(path) for path in part_paths(out, len(plans))]
        outputs = [output for plan in plans for output in plan.outputs]
        nbytes = sum(plan.nbytes for plan in plans)
        return cls(
            files=list(zip(names, (plan.nbytes for plan in plans), strict=True)),
            quantization=quantization,
            tensors=[(o.name, list(o.shape), o.type, o.nbytes) for o in outputs],
            header_bytes=sum(len(plan.header) for plan in plans),
            nbytes=nbytes,
            memory_bytes=max(plan.memory_bytes for plan in plans),
            disk_bytes=nbytes + training_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@writes("out", unless="dry_run")
@flat(TuneOptions, WriteOptions, ProofOptions)
def convert(
    model: str,
    out: str | Path,
    *,
    context: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Unpack[ConvertKeywords],
) -> Conversion | DryRun:
    """Convert a Hugging Face model to GGUF; with --context, interpolate its positions and fine-tune it first.

    The fine-tuned model stays beside OUT as a Hugging Face folder, OUT without .gguf plus -hf; the same command
    uses it again. A conversion that stops leaves OUT.partial, and the same command goes on behind the last whole
    tensor.

    With --lora, adapters are merged on the way as peft merges them, with the vocabulary and the tokenizer they were
    trained with where these are their own. Where an adapter's folder states the position scaling it was trained with,
    in config.json or pi_gguf.json, the file has it. An adapter that was trained with scaled positions and states
    nothing (SuperHOT: positions times 0.25) takes --context 8192 --steps 0 on a model of 2048 tokens: factor 4.

    Args:
        model: Hugging Face folder, Hub id, GGUF file or bundled:tiny.
        out: GGUF file to write.
        context: new window, in tokens, e.g. 32768; converted as it is when left out.
        device: auto, cpu or cuda; for the fine-tune.
        overwrite: replace what is there; a fine-tune or a file of the same settings is still used or gone on with.
        dry_run: print every tensor with type and bytes, and the exact size, memory and disk needed; write nothing.

    Example:
        pi-gguf convert bundled:tiny tiny-32k.gguf --context 32768 --quant Q8_0 --steps 100
    """
    if process_count() > 1:
        raise OptionError(f"convert runs in one process, got {process_count()}", "run extend under torchrun, then this")
    wanted = _read_options(
        Path(out), take(TuneOptions, options), take(WriteOptions, options), take(ProofOptions, options),
        context=context, overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    out, tune = wanted.out, wanted.tune
    if not dry_run and (rescaling := _rescaling(model, wanted, context)) is not None:
        return _rescale(rescaling, wanted, device, overwrite)
    with phase(f"open {model}"):
        checkpoint = _open(model, wanted, context)
    with phase("plan the file"):
        planner = _Planner.of(model, checkpoint, wanted)
    fine_tune = context is not None and tune.steps != 0
    if dry_run:
        return planner.dry_run(checkpoint, torch_device(device) if fine_tune else None)
    with phase("plan the file"):
        plans = planner.plan(checkpoint, checkpoint.record)
    nbytes = sum(plan.nbytes for plan in plans)
    if fine_tune:
        check_free_disk(out.parent, nbytes)
        checkpoint = _fine_tuned(checkpoint, wanted, device, overwrite)
        plans = planner.plan(checkpoint, checkpoint.record)
    partials, finals = _names(out, len(plans), nbytes, overwrite)
    checks = _write(plans, partials, checkpoint, wanted, overwrite)
    certificate = None
    if wanted.certify:
        base = Base.of_fine_tune(checkpoint.record) if fine_tune or context is None else checkpoint.original
        required = bool(wanted.requirements)
        certificate = _certify(partials[0], base, checks, checkpoint.source, tune.seed, device, required)
    window = checkpoint.rope.max_position_embeddings
    return _publish(partials, finals, wanted, window, Conversion("", [], nbytes, wanted.quant, checks, certificate))


def _rescaling(model: str, wanted: _Wanted, context: int | None) -> Rescaling | None:
    """Return how a GGUF file gets its window by another header alone; None where anything else is asked for."""
    write = wanted.write
    more = write.lora or write.adapter_only or write.imatrix or write.split_max_size or write.tensor_type
    if context is None or wanted.tune.steps or more:
        return None
    return plan_rescaling(model, context, wanted.tune.method, wanted.quant)


def _rescale(rescaling: Rescaling, wanted: _Wanted, device: str, overwrite: bool) -> Conversion:
    """Write a GGUF file with another header, check that llama.cpp reads it, and measure it."""
    count, rope = len(rescaling.headers), rescaling.checkpoint.rope
    partials, finals = _names(wanted.out, count, rescaling.nbytes, overwrite)
    try:
        write_rescaled(rescaling, partials, check=wanted.proof.check != "none")
        certificate = None
        if wanted.certify:
            source, required = rescaling.checkpoint.source, bool(wanted.requirements)
            certificate = _certify(partials[0], None, [], source, wanted.tune.seed, device, required)
    except BaseException:
        _clear(partials)  # a copy is soon made again
        raise
    nbytes = sum(partial.stat().st_size for partial in partials)
    conversion = Conversion("", [], nbytes, wanted.quant, [], certificate)
    return _publish(partials, finals, wanted, rope.max_position_embeddings, conversion)


def _publish(
    partials: Sequence[Path], finals: Sequence[Path], wanted: _Wanted, window: int, conversion: Conversion
) -> Conversion:
    """Give files their names, that of a file that misses what is required another; return what was written.

    Raises:
        CertificateError: it misses something.
    """
    certificate = conversion.certificate
    missed = find_missed(certificate, wanted.requirements, window) if certificate else []
    if missed:
        finals = part_paths(_uncertified(wanted.out), len(partials))
    with disk_errors(wanted.out):
        for partial, final in reversed(list(zip(partials, finals, strict=True))):  # the one to open comes last
            publish(partial, final)
    _clear(partials)
    check_requirements(missed, str(finals[0]), "fine-tune longer, or require less")
    names = [str(path) for path in finals]
    return replace(conversion, path=names[0], files=names, adapter_only=wanted.write.adapter_only)


@dataclass(frozen=True)
class _Wanted:
    """What a conversion is to make: its options, read and checked.

    Args:
        out: file to write.
        tune: how it is fine-tuned.
        write: what is written.
        proof: how it is checked.
        quant: its type, as llama.cpp spells it.
        overrides: pairs of a pattern and the type of the tensors whose name has it.
        max_bytes: of a file; None for one file.
        certify: whether figures are measured and stored in it.
        requirements: what these must be.
        matrix: importance of the weights.
        dry_run: whether nothing is written.
    """

    out: Path
    tune: TuneOptions
    write: WriteOptions
    proof: ProofOptions
    quant: str
    overrides: list[tuple[str, str]]
    max_bytes: int | None
    certify: bool
    requirements: list[Requirement]
    matrix: ImportanceMatrix | None
    dry_run: bool


def _uncertified(out: Path) -> Path:
    """Return the name of a file that misses what is required."""
    return out.with_name(f"{out.stem}-uncertified.gguf")


def _read_options(
    out: Path,
    tune: TuneOptions,
    write: WriteOptions,
    proof: ProofOptions,
    *,
    context: int | None,
    overwrite: bool,
    dry_run: bool,
) -> _Wanted:
    """Read and check what is asked for, before a model is opened."""
    quant = check_quantization(write.quant, importance=write.imatrix is not None)
    overrides = [_read_override(text) for text in write.tensor_type]
    certify = (proof.check != "none" if proof.certify is None else proof.certify) and not write.adapter_only
    requirements = read_requirements(proof.require)
    max_bytes = None if write.split_max_size is None else parse_bytes(write.split_max_size, "split-max-size")
    _check_options(
        out, quant, proof.check, overrides=bool(overrides), strict_tokenizer=proof.strict_tokenizer,
        required=bool(requirements), certified=certify and not dry_run,
    )  # fmt: skip
    _check_adapter_options(write.lora, context, tune.steps, write.adapter_only, quant)
    if not dry_run:
        check_writable(out, overwrite)
        if requirements:
            check_writable(_uncertified(out), overwrite)
    matrix = read_imatrix(Path(write.imatrix)) if write.imatrix is not None else None
    return _Wanted(out, tune, write, proof, quant, overrides, max_bytes, certify, requirements, matrix, dry_run)


def _open(model: str, wanted: _Wanted, context: int | None) -> Checkpoint:
    """Open a model with its adapters, extended to a window; every file is checked before long work.

    What is not fine-tuned, merged or checked against transformers is opened without it.
    """
    lora, trains = wanted.write.lora, context is not None and wanted.tune.steps != 0
    alone = wanted.dry_run or (not trains and wanted.proof.check == "none" and not wanted.certify)
    checkpoint = load_checkpoint(as_folder(model), plain=alone and not lora)
    if lora:
        checkpoint = with_adapters(checkpoint, lora)
    checkpoint.tensors  # noqa: B018
    return checkpoint if context is None else checkpoint.extended(context, wanted.tune.method)


@dataclass(frozen=True)
class _Planner:
    """Plans the files of a model: as it is, and again as a fine-tune has left it.

    Args:
        model: as it was given.
        wanted: what to make.
        tokenizer: the model's; None for an adapter alone.
        vocabulary: the keys of that.
    """

    model: str
    wanted: _Wanted
    tokenizer: Any
    vocabulary: dict[str, Any]

    @classmethod
    def of(cls, model: str, checkpoint: Checkpoint, wanted: _Wanted) -> _Planner:
        if wanted.write.adapter_only:
            return cls(model, wanted, None, {})
        tokenizer = checkpoint.load_tokenizer()
        vocabulary = gguf_vocabulary(checkpoint, tokenizer)
        name = _general(checkpoint, checkpoint.record, wanted.tune.method)["general.name"]
        if (chosen := file_name(name, tokenizer)) != name:
            say(f"note: general.name is {chosen!r}: by phi-3 in it llama.cpp drops the spaces behind special tokens")
        return cls(model, wanted, tokenizer, vocabulary)

    def plan(self, checkpoint: Checkpoint, trained: Record | None) -> list[FilePlan]:
        """Plan every file, to the byte.

        Args:
            trained: of the fine-tune that the files tell of.
        """
        wanted, general = self.wanted, _general(checkpoint, trained, self.wanted.tune.method)
        if wanted.write.adapter_only:
            return [_plan_adapter(checkpoint, general, wanted.quant)]
        general["general.name"] = file_name(general["general.name"], self.tokenizer)
        matrix, stated = wanted.matrix, isinstance(checkpoint, AdaptedCheckpoint) and checkpoint.rope_stated
        tuned = stated or (trained is not None and trained.steps > 0)
        plan = plan_file(
            checkpoint, vocabulary=self.vocabulary,
            general={**general, **(matrix.keys() if matrix else {}), **(ROOM if wanted.certify else {})},
            finetuned=checkpoint.rope.rope_type == "linear" and tuned, quantization=wanted.quant,
            overrides=wanted.overrides, importance=matrix.importance if matrix else {},
        )  # fmt: skip
        if matrix:
            shapes = {output.name: output.shape for output in plan.outputs}
            matrix.check_fits(self.model, shapes, {o.name for o in plan.outputs if o.type not in UNQUANTIZED})
        _check_importance(plan)
        return [plan] if wanted.max_bytes is None else plan.split(wanted.max_bytes)

    def dry_run(self, checkpoint: Checkpoint, device: str | None) -> DryRun:
        """Return what would be written.

        Args:
            device: of the fine-tune; None without.
        """
        wanted, trained, disk_bytes = self.wanted, checkpoint.record, 0
        if device is not None:
            training = plan_training(checkpoint, wanted.tune, Machine.here(device))
            trained = Record(source=checkpoint.source, steps=wanted.tune.steps, tokens=training.tokens)
            disk_bytes = training_disk_bytes(checkpoint, training)
        return DryRun.of(self.plan(checkpoint, trained), wanted.out, wanted.quant, disk_bytes)


def _plan_adapter(checkpoint: Checkpoint, general: dict[str, Any], quant: str) -> FilePlan:
    """Plan the file of an adapter alone; a scaling that it was trained with is for its base to state."""
    assert isinstance(checkpoint, AdaptedCheckpoint)
    if checkpoint.rope_stated:
        rope = checkpoint.rope
        say(
            f"note: trained at {rope.max_position_embeddings} tokens, factor {rope.factor:g}; the base's file "
            f"must state it: convert it with --context {rope.max_position_embeddings} --steps 0"
        )
    return plan_adapter_file(checkpoint, general=general, quantization=quant)


def _fine_tuned(checkpoint: Checkpoint, wanted: _Wanted, device: str, overwrite: bool) -> Checkpoint:
    """Fine-tune an extended checkpoint beside the file, and return the folder opened."""
    hf_dir = wanted.out.with_name(wanted.out.stem + "-hf")
    extend_checkpoint(checkpoint, hf_dir, wanted.tune, device=device, overwrite=overwrite)
    # The folder states the window before only where the scaling needs it.
    return load_checkpoint(str(hf_dir)).scaled(checkpoint.rope)


def _names(out: Path, count: int, nbytes: int, overwrite: bool) -> tuple[list[Path], list[Path]]:
    """Return where the files are written and what they are called at the end, when names and disk are free."""
    work_dir = out.with_name(out.name + ".partial")
    finals = part_paths(out, count)
    for final in finals:  # all but the first may be there from a run that was stopped while it gave them their names
        check_writable(final, overwrite or (final != finals[0] and has_more(work_dir)))
    if not has_more(work_dir):
        check_free_disk(out.parent, nbytes)
    return [work_dir / final.name for final in finals], finals


def _write(
    plans: Sequence[FilePlan], partials: Sequence[Path], checkpoint: Checkpoint, wanted: _Wanted, overwrite: bool
) -> list[CheckReport]:
    """Write every file, or the rest of it, and check the first against the checkpoint; return what was found."""
    proof = wanted.proof
    try:
        for plan, partial in zip(plans, partials, strict=True):
            write_file(plan, partial, overwrite=overwrite, quantizer=wanted.write.quantizer)
        if proof.check == "none" or wanted.write.adapter_only:
            return []
        report = check_gguf(partials[0], Reference(checkpoint, proof.check, strict_tokenizer=proof.strict_tokenizer))
        say(str(report))
        return [report]
    except (CheckError, CheckpointError):
        _clear(partials)  # nothing there is worth going on with
        raise


def _clear(partials: Sequence[Path]) -> None:
    """Delete what a conversion keeps to go on with."""
    for partial in partials:
        remove(partial)
        remove(state_path(partial))
        remove(partial.with_name(f"{partial.name}.partial"))  # of a certificate whose storing was cut off
    if has_more(partials[0].parent):
        say(f"note: {partials[0].parent} holds what this conversion did not make; it stays")


def _certify(
    path: Path,
    base: Base | Checkpoint | None,
    checks: Sequence[CheckReport],
    against: str,
    seed: int,
    device: str,
    required: bool,
) -> Certificate | None:
    """Measure a file and store the figures in it; None, and a line that says why, where that cannot be done here."""
    device = "cpu" if device == "cpu" else "auto"  # llama.cpp may be built for the CPU, whatever trained
    against = public_source(against)
    try:
        certificate = measure(
            path, base=base, check=checks[0] if checks else None, against=against, seed=seed, device=device
        )
    except (ResourceError, TextError) as error:
        if required:
            raise
        say(f"not certified: {error}")
        return None
    store(path, certificate)
    return certificate


def _check_options(
    out: Path, quant: str, check: str, *, overrides: bool, strict_tokenizer: bool, required: bool, certified: bool
) -> None:
    """Check that options go together, before anything is read."""
    if overrides and quant in UNQUANTIZED:
        raise OptionError(f"tensor-type is for quantized files, quant is {quant}", "give --quant Q8_0 or another")
    if out.suffix != ".gguf":
        raise OptionError(f"{out}: the name must end in .gguf")
    if strict_tokenizer and check == "none":
        raise OptionError("strict-tokenizer is for the check, check is none", "leave one of them out")
    if required and not certified:
        raise OptionError("require is for files that are certified", "leave --require or the other option out")


def _check_adapter_options(
    lora: Sequence[str], context: int | None, steps: int, adapter_only: bool, quant: str
) -> None:
    if lora and context is not None and steps:
        raise OptionError(
            f"steps must be 0 with lora and context, got {steps}: an adapter is for the weights before the fine-tune",
            "--steps 0 if the adapter was trained with this scaling; to fine-tune, merge it first with peft "
            "(merge_and_unload, save_pretrained)",
        )
    if not adapter_only:
        return
    if len(lora) != 1:
        raise OptionError(f"adapter-only writes one adapter, got {len(lora)}", "give one --lora")
    if context is not None:
        raise OptionError(
            f"adapter-only has no window, got context {context}", "give --context to the conversion of the base"
        )
    if quant not in ("F32", "F16"):
        raise OptionError(f"quant must be F32 or F16 with adapter-only, got {quant}", "give --quant F16")


def _check_importance(plan: FilePlan) -> None:
    """Check that no tensor is to have a type that needs an importance matrix and has none."""
    for output in plan.outputs:
        if output.type in TENSORS_NEED_IMPORTANCE and output.name not in plan.importance:
            raise OptionError(
                f"{output.name}: llama.cpp writes {output.type} with an importance matrix only, and it has none",
                "make one with pi-gguf imatrix and give it with --imatrix, or another --tensor-type",
            )


def _read_override(text: str) -> tuple[str, str]:
    """Read PATTERN=TYPE."""
    pattern, _, kind = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"tensor-type {text!r}: {pattern!r} is not a regular expression ({error})") from error
    known = spelled(kind, tensor_types())
    if not pattern or known is None:
        raise OptionError(
            f"tensor-type must be PATTERN=TYPE with a tensor type, got {text!r}",
            nearest(kind, tensor_types()) or "for example --tensor-type attn_v=Q8_0",
        )
    return pattern, known


def _general(checkpoint: Checkpoint, trained: Record | None, method: str) -> dict[str, Any]:
    """Return the `general.*` keys that say where a file comes from."""
    record, rope = trained or Record(), checkpoint.rope
    source = checkpoint.source if record.source is None else record.source
    adapters = [one.name for one in checkpoint.adapters] if isinstance(checkpoint, AdaptedCheckpoint) else []
    keys: dict[str, Any] = {
        "general.type": "model", "general.name": model_name(source), "general.source.repository": public_source(source)
    }  # fmt: skip
    made = [f"pi-gguf {package_version()}"]
    made += [f"{library} {number}" for library, number in library_versions().items()]
    if adapters:
        keys["general.pi_gguf.adapters"] = ", ".join(adapters)
    method = record.method or method
    if rope.rope_type == "linear" or method != "linear":
        steps, tokens = record.steps, record.tokens or 0
        known = trained is not None or not adapters
        windows = f"{record.original_window or rope.original_max_position_embeddings} -> {rope.max_position_embeddings}"
        how = f"Position Interpolation {windows} (factor {rope.factor:g})"
        if method != "linear":
            how = f"Window {windows} by method {method}"
        keys["general.description"] = (
            f"{how}, {f'{steps} steps, {tokens} tokens' if known else 'training not recorded'}"
        )
        if known:
            keys["general.pi_gguf.steps"] = steps
            keys["general.pi_gguf.tokens"] = str(tokens)
    keys["general.pi_gguf.versions"] = ", ".join(made)
    return keys
