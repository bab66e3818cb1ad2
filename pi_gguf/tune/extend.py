"""The fine-tune: a checkpoint and texts -> a Hugging Face folder whose positions are interpolated to a new window.

What it reads is made in `batches`, the run itself is in `trainer`. A run that stops leaves its last checkpoint in
`OUT_DIR.partial`, from which the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Unpack

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.checkpoint.config import read_json
from pi_gguf.checkpoint.hub import public_source
from pi_gguf.checkpoint.record import RECORD_FILE, Record
from pi_gguf.common.files import check_free_disk, check_writable, remove, writes
from pi_gguf.common.machine import Machine, torch_device
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import phase, process_count, say
from pi_gguf.common.provenance import sha256
from pi_gguf.data.packing import Row
from pi_gguf.data.tokens import CACHE_PREFIX, load_corpus
from pi_gguf.errors import CheckpointError, OptionError, PiGgufError
from pi_gguf.restore.models import as_folder
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.texts import Texts, held_texts, open_mixture
from pi_gguf.tune.batches import training_batches
from pi_gguf.tune.choose import plan_run
from pi_gguf.tune.folder import write_adapter, write_folder
from pi_gguf.tune.memory import training_disk_bytes
from pi_gguf.tune.options import ExtendKeywords, SpreadOptions, TuneOptions
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.processes import agree, first_process_first, is_first_process, wait_for_everyone
from pi_gguf.tune.trainer import Run, Trained, check_reports, run_training
from pi_gguf.tune.validation import Validation
from pi_gguf.vocabulary.chats import chat_templates

_HELD_OTHERWISE = {"train_window", "batch_tokens", "factor_warmup", "attention", "s2_group", "loss", "report_to"}
"""Options whose record is what they came to: stages, micro-batches, steps of warm-up, tokens of a group, what counts;
the last one shapes nothing."""


@writes("out_dir")
@flat(TuneOptions, SpreadOptions)
def extend(
    model: str,
    out_dir: str | Path,
    *,
    context: int,
    adapter_only: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    **options: Unpack[ExtendKeywords],
) -> Path:
    """Fine-tune a model with Position Interpolation and write a Hugging Face folder.

    Args:
        model: Hugging Face folder, Hub id, GGUF file or bundled:tiny.
        out_dir: folder to write.
        context: new window, in tokens, e.g. 32768.
        adapter_only: write the adapter alone as peft does, with the embeddings and norms that were trained along, and
            the position scaling in pi_gguf.json; `convert MODEL --lora` merges it. Of lora and qlora, method linear.
        device: auto, cpu or cuda.
        overwrite: replace another run that is there; a run of the same settings is used or gone on with.

    Returns:
        The folder written.

    Example:
        pi-gguf extend bundled:tiny tiny-32k --context 32768 --steps 100
    """
    tune, spread = take(TuneOptions, options), take(SpreadOptions, options)
    checkpoint = load_checkpoint(as_folder(model)).extended(context, tune.method)
    return extend_checkpoint(
        checkpoint, out_dir, tune, spread, adapter_only=adapter_only, device=device, overwrite=overwrite
    )


@writes("out_dir")
def extend_checkpoint(
    checkpoint: Checkpoint,
    out_dir: str | Path,
    tune: TuneOptions,
    spread_options: SpreadOptions | None = None,
    *,
    adapter_only: bool = False,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Fine-tune an extended checkpoint as `extend` does, and return the folder written."""
    out_dir, device = Path(out_dir), torch_device(device)
    reports = check_reports(tune.report_to)
    checkpoint.tensors  # noqa: B018  every file is checked before long work
    record = record_of_scaling(checkpoint, tune)
    if not tune.steps:
        return _write_untrained(checkpoint, out_dir, record, overwrite)
    validation = Validation(checkpoint, every=tune.eval_steps, early_stop=tune.early_stop, text=tune.eval_text)
    # What is free differs from process to process.
    planned = plan_run(checkpoint, tune, spread_options or SpreadOptions(), Machine.here(device))
    training, spread = agree(planned, device)
    if adapter_only:
        _check_adapter_only(training.train, tune.method, checkpoint.original.rope)
    texts = _texts(checkpoint, tune.data)
    if not texts and tune.longest_first:
        raise OptionError("longest-first is for documents of yours, the bundled mixture has no end", "give --data")
    if not texts and tune.recall:
        raise OptionError(
            f"recall is beside texts, got {tune.recall}: half of the bundled mixture is recall tasks",
            "leave it out, or give --data",
        )
    packing = tune.packing or ("isolate" if texts else "join")
    evaluated = validation.text if tune.eval_text else (None, None)
    record = replace(
        record, tokens=training.tokens, **_recorded(texts, tune.loss), recall=tune.recall or None,
        adapter_only=adapter_only, packing=packing,
        longest_first=tune.longest_first, eval_steps=tune.eval_steps, early_stop=tune.early_stop,
        eval_text=evaluated[0], eval_text_sha256=evaluated[1], **asdict(training),
    )  # fmt: skip
    before = Record.read(out_dir / RECORD_FILE)
    if before is not None and not record.difference(before):
        say(f"{out_dir} holds this fine-tune already; it is used")
        return out_dir
    work_dir = out_dir.with_name(out_dir.name + ".partial")
    with first_process_first(device):
        if is_first_process():
            check_writable(out_dir, overwrite, folder=True)
            check_free_disk(out_dir.parent, training_disk_bytes(checkpoint, training))
            _begin_or_resume(work_dir, replace(record, sharded=spread.fsdp), overwrite)
        batches = _batches(checkpoint, training, texts, tune, packing, work_dir)
    run = Run(checkpoint, training, batches, work_dir, tune.seed, device, reports, spread, validation)
    say(_described(run, tune))
    trained = run_training(run)
    if is_first_process():
        _write_trained(run, trained, record, out_dir)
    wait_for_everyone(device)
    return out_dir


def record_of_scaling(checkpoint: Checkpoint, tune: TuneOptions) -> Record:
    """Return what is recorded of any fine-tune, one without a step too."""
    rope = checkpoint.rope
    return Record(
        source=public_source(checkpoint.source),
        weights_sha256=checkpoint.fingerprint(),
        method=tune.method,
        rope_type=rope.rope_type,
        factor=rope.factor,
        original_window=rope.original_max_position_embeddings,
        context=rope.max_position_embeddings,
        steps=tune.steps,
        seed=tune.seed,
        options=_other_options(tune) or None,
    )


def _other_options(tune: TuneOptions) -> dict[str, Any]:
    """Return the options that shape a run and that no field of its record holds; by them, too, it is recognized."""
    held = {one.name for one in fields(Record)} | _HELD_OTHERWISE
    return {name: value for name, value in asdict(tune).items() if name not in held}


def _write_untrained(checkpoint: Checkpoint, out_dir: Path, record: Record, overwrite: bool) -> Path:
    """Write a folder with the scaling alone, and return it."""
    if process_count() > 1:
        raise OptionError("steps 0 is for one process, there is nothing to share", "start it without torchrun")
    check_writable(out_dir, overwrite, folder=True)
    write_folder(checkpoint, out_dir, record, None)
    return out_dir


def _batches(
    checkpoint: Checkpoint, training: TrainingPlan, texts: list[Texts], tune: TuneOptions, packing: str, work_dir: Path
) -> list[list[Row]]:
    """Tokenize and pack what the run reads; where that fails, a folder in which nothing is trained yet is emptied."""
    try:
        corpora = [load_corpus(checkpoint, some, work_dir, training.tokens, tune.loss) for some in texts]
        return training_batches(
            checkpoint, training, corpora or None, tune.seed, packing=packing, longest_first=tune.longest_first,
            recall=tune.recall,
        )  # fmt: skip
    except PiGgufError:
        if is_first_process() and not any(work_dir.glob("checkpoint-*")):
            _clear(work_dir)
        raise


def _texts(checkpoint: Checkpoint, data: Sequence[str]) -> list[Texts]:
    """Return the texts to train on; none for the bundled model's own mixture, which has no end."""
    if checkpoint.source == bundled.TINY and not data:
        say("no --data: the bundled sample is used, in the bundled model's own training mixture")
        return []
    if data:
        texts = open_mixture(data)
    else:
        documents = bundled.novels("train")
        say(f"no --data: the {len(documents)} training novels of the bundled sample are used")
        texts = [held_texts(documents)]
    if not any(some.chats for some in texts) and chat_templates(checkpoint.load_tokenizer()):
        say(
            f"note: {checkpoint.source} is a chat model (it has a chat template) and the texts are plain: every step "
            "trains it to go on with a text, none to answer, and its answers get worse the longer it trains; mix "
            "conversations in, --data TEXTS:0.7 --data CHATS.jsonl:0.3"
        )
    return texts


def _recorded(texts: list[Texts], loss: str) -> dict[str, Any]:
    """Return what is recorded of the texts; of one set of them as before weights were known."""
    if not texts:
        return {"data": "bundled mixture"}
    weights = [some.weight for some in texts if some.weight is not None]
    return {
        "data": [label for some in texts for label in some.labels],
        "data_sha256": texts[0].sha256 if len(texts) == 1 else sha256([some.sha256 for some in texts]),
        "data_weights": weights if len(weights) > 1 else None,
        "counted": loss if any(some.chats for some in texts) else None,
    }


def _described(run: Run, tune: TuneOptions) -> str:
    """Return what is said of a run before it begins."""
    rope, training = run.checkpoint.rope, run.training
    return (
        f"fine-tune {run.checkpoint.source}: window {rope.original_max_position_embeddings} -> "
        f"{rope.max_position_embeddings} by method {tune.method}, {tune.steps} steps, {training.tokens / 1e6:.1f} M "
        f"tokens, {training.sequences} on sequences of {', '.join(map(str, training.steps_by_window()))} tokens "
        f"({training.reason})"
    )


def _begin_or_resume(work_dir: Path, record: Record, overwrite: bool) -> None:
    """Begin a run's folder, or check that the one there is of the same run, and drop a checkpoint cut off in writing.

    Raises:
        OptionError: an unfinished run of other settings is there, and not to be overwritten.
    """
    path = work_dir / "run.json"
    before = Record.read(path)
    key = record.difference(before) if before else ""
    if key and not overwrite:
        raise OptionError(
            f"{work_dir}: holds an unfinished run with {key} {getattr(before, key)!r}, now {getattr(record, key)!r}",
            "repeat the first command to go on with it, or start anew with --overwrite",
        )
    if key or before is None:
        _clear(work_dir, corpora=False)  # their names say which texts and tokenizer they are of
        record.write(path)
    for checkpoint_dir in work_dir.glob("checkpoint-*"):
        try:
            read_json(checkpoint_dir / "trainer_state.json")  # written last
        except CheckpointError:
            remove(checkpoint_dir)


def _clear(work_dir: Path, *, corpora: bool = True) -> None:
    """Delete what a run keeps to go on with."""
    for pattern in ("run.json*", "checkpoint-*", "adapter", *([f"{CACHE_PREFIX}*"] if corpora else [])):
        for old in list(work_dir.glob(pattern)):
            remove(old)


def _write_trained(run: Run, trained: Trained, record: Record, out_dir: Path) -> None:
    """Write what a run ended with: the adapter alone where the record says so, or the folder with its price."""
    record = replace(record, validations=trained.validations, **trained.measured)
    if record.adapter_only:
        assert trained.adapter_dir is not None
        write_adapter(trained.adapter_dir, out_dir, record, trained.losses)
    else:
        with phase(f"write {out_dir}"):
            write_folder(
                run.checkpoint, out_dir, record, trained, lambda after: run.validation.price(after, run.device)
            )
    _clear(run.work_dir)


def _check_adapter_only(train: str, method: str, before: RopeScaling) -> None:
    if train == "full":
        raise OptionError("adapter-only is for train lora and qlora, got full", "give --train lora")
    if method != "linear" or before.rope_type != "default" or before.own is not None:
        raise OptionError(
            f"adapter-only is for method linear on a model without scaling, got method {method} on rope_type "
            f"{before.own.rope_type if before.own else before.rope_type}",
            "leave --adapter-only out: the merged folder states any scaling",
        )
