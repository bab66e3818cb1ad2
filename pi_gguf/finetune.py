"""The fine-tune: a checkpoint and texts -> a Hugging Face folder whose positions are interpolated to a new window.

What it reads is made in `batches`, the run itself is in `training`. A run that stops leaves its last checkpoint in
`OUT_DIR.partial`, from which the same command goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf import bundled
from pi_gguf.adapters import with_adapters
from pi_gguf.batches import PACKINGS, training_batches
from pi_gguf.checkpoint import PROVENANCE_FILE, Checkpoint, load_checkpoint, public_source
from pi_gguf.configs import read_json
from pi_gguf.corpus import CACHE_PREFIX, load_corpus
from pi_gguf.errors import CheckpointError, OptionError, PiGgufError, ResourceError
from pi_gguf.files import check_free_disk, check_writable, remove, replace_when_complete, write_json, writes
from pi_gguf.planning import plan_training, training_disk_bytes
from pi_gguf.processes import check_spread, first_process_first, is_first_process, wait_for_everyone
from pi_gguf.progress import process_count, say
from pi_gguf.provenance import library_versions, package_version
from pi_gguf.rope import RopeScaling
from pi_gguf.texts import Texts, held_texts, open_texts
from pi_gguf.training import Trained, check_reports, run_training
from pi_gguf.validation import Validation

LOSSES_FILE = "losses.json"
"""Beside the weights: the loss of each step in nats a token, in order."""

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """How to fine-tune, in the words of `extend`, where each is described."""

    method: str
    data: Sequence[str]
    steps: int
    train_window: int | str | None
    learning_rate: float | None
    batch_tokens: int | None
    schedule: str
    factor_warmup: int
    mix: float | None
    packing: str | None
    longest_first: bool
    train: str
    lora_rank: int
    lora_alpha: int | None
    seed: int
    device: str
    adapter_only: bool = False
    eval_steps: int = 0
    eval_text: Sequence[str] = ()
    early_stop: bool = False
    report_to: str = "auto"
    fsdp: bool = True
    cp_size: int = 1
    sp_size: int = 1
    deepspeed: str | None = None


@writes("out_dir")
def extend(
    model: str,
    out_dir: str | Path,
    *,
    context: int,
    method: str = "linear",
    data: Sequence[str] = (),
    steps: int = 1000,
    train_window: int | str | None = None,
    learning_rate: float | None = None,
    batch_tokens: int | None = None,
    schedule: str = "constant",
    factor_warmup: int = 0,
    mix: float | None = None,
    packing: str | None = None,
    longest_first: bool = False,
    train: str = "full",
    lora_rank: int = 16,
    lora_alpha: int | None = None,
    adapter_only: bool = False,
    eval_steps: int = 0,
    eval_text: Sequence[str] = (),
    early_stop: bool = False,
    report_to: str = "auto",
    fsdp: bool = True,
    cp_size: int = 1,
    sp_size: int = 1,
    deepspeed: str | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Fine-tune a model with Position Interpolation and write a Hugging Face folder.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny.
        out_dir: folder to write.
        context: new window, in tokens, e.g. 32768.
        method: linear (Position Interpolation), ntk, yarn, none (direct fine-tuning) or nope.
        data: text, JSONL or Parquet file, folder of them, or a data set of the Hub as owner/name or owner/name:split;
            the bundled sample when left out. Repeatable.
        steps: optimizer steps; 0 applies the scaling without training.
        train_window: tokens of a training sequence; below the context positions skip (PoSE). Several with their steps
            follow each other, 512x500,2048x200,8192, or come in turn, 512x500,8192+512.
        learning_rate: at its peak; by the model's size when left out (2e-5 for 7B).
        batch_tokens: tokens of an optimizer step; by the model's size when left out.
        schedule: constant (the paper's) or decay (to a tenth over the last third).
        factor_warmup: steps over which the factor grows from 1, e.g. 300; 0 (the paper's) starts with the whole.
        mix: share of the tokens to train in sequences of the whole context, e.g. 0.1, spread evenly among sequences of
            train-window with PoSE; when left out, a quarter where whole sequences fit the GPU, none elsewhere.
        packing: isolate (documents that share a row do not see each other) or join (a row is one sequence); when left
            out, isolate, but join for the bundled model's own training mixture.
        longest_first: fill rows with the longest documents first, and train on those alone if there are enough.
        train: full (every weight), lora (adapters on every linear layer; embeddings and norms whole), qlora (the same
            on weights in 4 bits: a CUDA GPU and bitsandbytes), or auto, the first of these that fits the free memory.
        lora_rank: rank of the adapters, of lora and qlora.
        lora_alpha: an adapter counts alpha / rank times; twice the rank when left out.
        adapter_only: write the adapter alone as peft does, with the embeddings and norms that were trained along, and
            the position scaling in pi_gguf.json; `convert MODEL --lora` merges it. Of lora and qlora, method linear.
        eval_steps: steps between two validations: perplexity at the old and the new window, and k_max at the new one of
            a few passkeys; 0 for none while it runs. What the old window pays is measured at the end in any case.
        eval_text: text to validate on, as long as the new window; a held-out novel of the bundled sample when left out.
            Repeatable; the longest is read.
        early_stop: end the run when a validation finds k_max at the new window.
        report_to: where the losses are shown while it runs: auto (TensorBoard where installed, in OUT_DIR.runs), none,
            or names that transformers knows, separated by commas.
        fsdp: under torchrun or accelerate launch, with train full: shard weights, gradients and moments over the
            processes (FSDP2); --no-fsdp copies them to each (DDP), as lora and qlora do.
        cp_size: GPUs that share one sequence, by torch's context parallelism.
        sp_size: GPUs that share one sequence, by DeepSpeed's sequence parallelism.
        deepspeed: a DeepSpeed config in JSON, which then shards instead of FSDP2.
        seed: of the order of the data and of the skips.
        device: auto, cpu or cuda.
        overwrite: replace another run that is there; a run of the same settings is used or gone on with.

    Returns:
        The folder written.

    Example:
        pi-gguf extend bundled:tiny tiny-32k --context 32768 --steps 100
    """
    options = FineTune(
        method=method, data=data, steps=steps, train_window=train_window, learning_rate=learning_rate,
        batch_tokens=batch_tokens, schedule=schedule, factor_warmup=factor_warmup, mix=mix, packing=packing,
        longest_first=longest_first, train=train, lora_rank=lora_rank, lora_alpha=lora_alpha, adapter_only=adapter_only,
        eval_steps=eval_steps, eval_text=eval_text, early_stop=early_stop, report_to=report_to, fsdp=fsdp,
        cp_size=cp_size, sp_size=sp_size, deepspeed=deepspeed, seed=seed, device=device,
    )  # fmt: skip
    return extend_checkpoint(load_checkpoint(model).extended(context, method), out_dir, options, overwrite=overwrite)


@writes("out_dir")
def extend_checkpoint(
    checkpoint: Checkpoint, out_dir: str | Path, options: FineTune, *, overwrite: bool = False
) -> Path:
    """Fine-tune an extended checkpoint as `extend` does, and return the folder written."""
    from pi_gguf.hf_model import torch_device

    out_dir, rope = Path(out_dir), checkpoint.rope
    context, steps, packing = rope.max_position_embeddings, options.steps, options.packing
    if packing is not None and packing not in PACKINGS:
        raise OptionError(f"packing must be {' or '.join(PACKINGS)}, got {packing}")
    if steps < 0:
        raise OptionError(f"steps must not be negative, got {steps}")
    device = torch_device(options.device)
    reports = check_reports(options.report_to)
    checkpoint.tensors  # noqa: B018  every file is checked before long work
    record: dict[str, Any] = {
        "source": public_source(checkpoint.source),
        "weights_sha256": checkpoint.fingerprint(),
        "method": options.method,
        "rope_type": rope.rope_type,
        "factor": rope.factor,
        "original_window": rope.original_max_position_embeddings,
        "context": context,
        "steps": steps,
        "seed": options.seed,
    }
    if not steps and process_count() > 1:
        raise OptionError("steps 0 is for one process, there is nothing to share", "start it without torchrun")
    if not steps:
        check_writable(out_dir, overwrite, folder=True)
        _write_folder(checkpoint, out_dir, record, None)
        return out_dir
    validation = Validation(
        checkpoint, every=options.eval_steps, early_stop=options.early_stop, text=options.eval_text
    )  # fmt: skip
    spread = check_spread(
        device, options.train, fsdp=options.fsdp, cp_size=options.cp_size, sp_size=options.sp_size,
        deepspeed=options.deepspeed,
    )  # fmt: skip
    training = plan_training(
        checkpoint, steps=steps, train_window=options.train_window, learning_rate=options.learning_rate,
        batch_tokens=options.batch_tokens, schedule=options.schedule, factor_warmup=options.factor_warmup,
        device=device, mix=options.mix, train=options.train, lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha, readers=spread.readers,
    )  # fmt: skip
    if options.adapter_only:
        _check_adapter_only(training.train, options.method, checkpoint.original.rope)
    texts = _texts(checkpoint, options.data)
    if texts is None and options.longest_first:
        raise OptionError("longest-first is for documents of yours, the bundled mixture has no end", "give --data")
    packing = packing or ("join" if texts is None else "isolate")
    record |= {
        "tokens": training.tokens,
        **asdict(training),
        **_text_record(texts),
        "adapter_only": options.adapter_only,
    }
    record |= {"packing": packing, "longest_first": options.longest_first}
    record |= {"eval_steps": options.eval_steps, "early_stop": options.early_stop}
    if (out_dir / PROVENANCE_FILE).exists() and not _difference(read_json(out_dir / PROVENANCE_FILE), record):
        say(f"{out_dir} holds this fine-tune already; it is used")
        return out_dir
    work_dir = out_dir.with_name(out_dir.name + ".partial")
    with first_process_first(device):
        if is_first_process():
            check_writable(out_dir, overwrite, folder=True)
            check_free_disk(out_dir.parent, training_disk_bytes(checkpoint, training))
            _begin_or_resume(work_dir, {**record, "sharded": spread.fsdp}, overwrite)
        try:
            corpus = None if texts is None else load_corpus(checkpoint, texts, work_dir, training.tokens)
            batches = training_batches(
                checkpoint, training, corpus, options.seed, packing=packing, longest_first=options.longest_first
            )  # fmt: skip
        except PiGgufError:
            if is_first_process() and not any(work_dir.glob("checkpoint-*")):
                _clear(work_dir)
            raise
    say(
        f"fine-tune {checkpoint.source}: window {rope.original_max_position_embeddings} -> {context} by method "
        f"{options.method}, {steps} steps, {training.tokens / 1e6:.1f} M tokens, {training.sequences} on sequences of "
        f"{', '.join(map(str, training.steps_by_window()))} tokens ({training.reason})"
    )
    trained = run_training(
        checkpoint, training, batches, work_dir, options.seed, device, reports, spread, validation
    )  # fmt: skip
    if is_first_process():
        record |= trained.measured | {"validations": trained.validations}
        if options.adapter_only:
            assert trained.adapter_dir is not None
            _write_adapter(trained.adapter_dir, out_dir, record, trained.losses)
        else:
            _write_folder(checkpoint, out_dir, record, trained, lambda after: validation.price(after, device))
        _clear(work_dir)
    wait_for_everyone(device)
    return out_dir


def _texts(checkpoint: Checkpoint, data: Sequence[str]) -> Texts | None:
    """Return the texts to train on; None for the bundled model's own mixture, which has no end."""
    if data:
        return open_texts(data)
    if checkpoint.source == bundled.TINY:
        say("no --data: the bundled sample is used, in the bundled model's own training mixture")
        return None
    documents = bundled.novels("train")
    say(f"no --data: the {len(documents)} training novels of the bundled sample are used")
    return held_texts(documents)


def _text_record(texts: Texts | None) -> dict[str, Any]:
    if texts is None:
        return {"data": "bundled mixture"}
    return {"data": texts.labels, "data_sha256": texts.sha256}


def _difference(before: dict[str, Any], record: dict[str, Any]) -> str:
    """Return the first setting in which two runs differ, or an empty string; how the source was spelled is none."""
    settings = {key: value for key, value in record.items() if key not in ("source", "reason", "train_reason")}
    return next((key for key, value in settings.items() if before.get(key) != value), "")


def _begin_or_resume(work_dir: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Begin a run's folder, or check that the one there is of the same run, and drop a checkpoint cut off in writing.

    Raises:
        OptionError: an unfinished run of other settings is there, and not to be overwritten.
    """
    path = work_dir / "run.json"
    before = read_json(path) if path.exists() else {}
    key = _difference(before, record)
    if key and before and not overwrite:
        raise OptionError(
            f"{work_dir}: holds an unfinished run with {key} {before.get(key)!r}, now {record[key]!r}",
            "repeat the first command to go on with it, or start anew with --overwrite",
        )
    if key:
        _clear(work_dir, corpora=False)  # their names say which texts and tokenizer they are of
        write_json(path, record)
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


def _write_folder(
    checkpoint: Checkpoint,
    out_dir: Path,
    record: dict[str, Any],
    trained: Trained | None,
    price: Callable[[Checkpoint], dict[str, Any] | None] | None = None,
) -> None:
    """Write weights in their original dtype, the config with the scaling, the tokenizer's files and the record.

    Adapters are merged into the checkpoint's own weights, whatever these were held in during training.

    Args:
        price: measured on the folder before it gets its name.
    """
    import torch
    from safetensors import SafetensorError

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    stored = dtypes[next(iter(checkpoint.tensors.values())).dtype]
    if trained is None:
        model = checkpoint.load_model(dtype=stored)
    elif trained.adapter_dir is not None:
        model = with_adapters(checkpoint, [str(trained.adapter_dir)]).load_model(dtype=stored)
    else:
        assert trained.model is not None
        model = trained.model
    check_free_disk(out_dir.parent, stored.itemsize * checkpoint.n_parameters())
    with replace_when_complete(out_dir) as partial:
        try:
            model.to(stored).save_pretrained(partial)
        except SafetensorError as error:  # its only way to say that the disk is full
            raise ResourceError(f"{out_dir}: the weights were not written ({error})", "free some disk space") from error
        config = {**checkpoint.config, "tie_word_embeddings": checkpoint.tied}
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, partial / name)
        settings_path = partial / "tokenizer_config.json"
        if settings_path.exists():
            settings = json.loads(settings_path.read_text())
            settings["model_max_length"] = checkpoint.rope.max_position_embeddings
            settings_path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        del model
        if price:
            record = record | {"price": price(load_checkpoint(str(partial)))}
        _write_record(partial, record, trained.losses if trained else [])


def _check_adapter_only(train: str, method: str, before: RopeScaling) -> None:
    if train == "full":
        raise OptionError("adapter-only is for train lora and qlora, got full", "give --train lora")
    if method != "linear" or before.rope_type != "default" or before.own is not None:
        raise OptionError(
            f"adapter-only is for method linear on a model without scaling, got method {method} on rope_type "
            f"{before.own.rope_type if before.own else before.rope_type}",
            "leave --adapter-only out: the merged folder states any scaling",
        )


def _write_adapter(adapter_dir: Path, out_dir: Path, record: dict[str, Any], losses: list[float]) -> None:
    """Write an adapter as peft does, with the record, which states the scaling it was trained with."""
    with replace_when_complete(out_dir) as partial:
        shutil.copytree(adapter_dir, partial)
        _write_record(partial, record, losses)


def _write_record(folder: Path, record: dict[str, Any], losses: list[float]) -> None:
    if losses:
        (folder / LOSSES_FILE).write_text(json.dumps(losses) + "\n")
    versions = {"pi_gguf": package_version(), "libraries": library_versions()}
    (folder / PROVENANCE_FILE).write_text(json.dumps(record | versions, indent=1) + "\n")
