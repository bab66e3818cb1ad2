"""The fine-tune: a checkpoint and texts -> a Hugging Face folder whose positions are interpolated to a new window.

The trainer is transformers' own; here are the paper's schedule, the rows and positions it reads, and the safe end.
A run that stops leaves its last checkpoint in `OUT_DIR.partial`, from which the same command goes on.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf import bundled
from pi_gguf.checkpoint import PROVENANCE_FILE, Checkpoint, load_checkpoint, read_json
from pi_gguf.data import pack, pose_positions
from pi_gguf.errors import CheckpointError, OptionError, PiGgufError, ResourceError, TextError, UnsupportedError
from pi_gguf.files import check_free_disk, check_writable, human_bytes, remove, replace_when_complete, write_json
from pi_gguf.planning import (
    TrainingPlan,
    estimate_training_memory,
    fast_bf16,
    free_memory,
    plan_training,
    training_disk_bytes,
)
from pi_gguf.progress import progress_bar, say
from pi_gguf.provenance import library_versions, package_version, sha256
from pi_gguf.rope import RopeScaling
from pi_gguf.texts import read_texts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def extend(
    model: str,
    out_dir: str | Path,
    *,
    context: int,
    data: Sequence[str] = (),
    steps: int = 1000,
    train_window: int | str | None = None,
    learning_rate: float | None = None,
    batch_tokens: int | None = None,
    schedule: str = "constant",
    factor_warmup: int = 0,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Fine-tune a model with Position Interpolation and write a Hugging Face folder.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny.
        out_dir: folder to write.
        context: new window, in tokens, e.g. 32768.
        data: text file or folder of them; the bundled sample when left out. Repeatable.
        steps: optimizer steps; 0 applies the scaling without training.
        train_window: tokens of a training sequence; below the context positions skip (PoSE). Several with their steps
            follow each other: 512x500,2048x200,8192.
        learning_rate: at its peak; by the model's size when left out (2e-5 for 7B).
        batch_tokens: tokens of an optimizer step; by the model's size when left out.
        schedule: constant (the paper's) or decay (to a tenth over the last third).
        factor_warmup: steps over which the factor grows from 1, e.g. 300; 0 (the paper's) starts with the whole.
        seed: of the order of the data and of the skips.
        device: auto, cpu or cuda.
        overwrite: replace another run that is there; a run of the same settings is used or gone on with.

    Returns:
        The folder written.

    Example:
        pi-gguf extend bundled:tiny tiny-32k --context 32768 --steps 100
    """
    from pi_gguf.hf_model import torch_device

    out_dir = Path(out_dir)
    checkpoint = load_checkpoint(model)
    rope = checkpoint.interpolated(context)
    if steps < 0:
        raise OptionError(f"steps must not be negative, got {steps}")
    device = torch_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError("extend runs in one process, got WORLD_SIZE above 1", "start it without torchrun")
    checkpoint.tensors  # noqa: B018  every file is checked before long work
    record: dict[str, Any] = {
        "source": checkpoint.source,
        "weights_sha256": checkpoint.fingerprint(),
        "rope_type": rope.rope_type,
        "factor": rope.factor,
        "original_window": rope.original_max_position_embeddings,
        "context": context,
        "steps": steps,
        "seed": seed,
    }
    if not steps:
        check_writable(out_dir, overwrite, folder=True)
        _write_folder(checkpoint, rope, out_dir, record, None)
        return out_dir
    training = plan_training(
        checkpoint, rope, steps=steps, train_window=train_window, learning_rate=learning_rate,
        batch_tokens=batch_tokens, schedule=schedule, factor_warmup=factor_warmup, device=device,
    )  # fmt: skip
    documents = _documents(checkpoint, data)
    record |= {"tokens": training.tokens, **asdict(training), **_text_record(documents)}
    if (out_dir / PROVENANCE_FILE).exists() and not _difference(read_json(out_dir / PROVENANCE_FILE), record):
        say(f"{out_dir} holds this fine-tune already; it is used")
        return out_dir
    check_writable(out_dir, overwrite, folder=True)
    check_free_disk(out_dir.parent, training_disk_bytes(checkpoint))
    batches = training_batches(checkpoint, training, documents, seed)
    work_dir = out_dir.with_name(out_dir.name + ".partial")
    _begin_or_resume(work_dir, record, overwrite)
    say(
        f"fine-tune {model}: window {rope.original_max_position_embeddings} -> {context} (factor {rope.factor:g}), "
        f"{steps} steps, {training.tokens / 1e6:.1f} M tokens, {training.method} on sequences of "
        f"{', '.join(str(stage.window) for stage in training.stages)} tokens ({training.reason})"
    )
    trained = _train(checkpoint, rope, training, batches, work_dir, seed, device)
    _write_folder(checkpoint, rope, out_dir, record | trained.measured, trained.model)
    remove(work_dir)
    return out_dir


def _documents(checkpoint: Checkpoint, data: Sequence[str]) -> dict[str, str] | None:
    """Return the texts to train on by name; None for the bundled model's own mixture, which has no end."""
    if data:
        return read_texts(data)
    if checkpoint.source == bundled.TINY:
        say("no --data: the bundled sample is used, in the bundled model's own training mixture")
        return None
    documents = bundled.novels("train")
    say(f"no --data: the {len(documents)} training novels of the bundled sample are used")
    return documents


def _text_record(documents: dict[str, str] | None) -> dict[str, Any]:
    if documents is None:
        return {"data": "bundled mixture"}
    names = sorted(documents)
    return {"data": [Path(name).name for name in names], "data_sha256": sha256([documents[name] for name in names])}


def _difference(before: dict[str, Any], record: dict[str, Any]) -> str:
    """Return the first setting in which two runs differ, or an empty string; how the source was spelled is none."""
    settings = {key: value for key, value in record.items() if key not in ("source", "reason")}
    return next((key for key, value in settings.items() if before.get(key) != value), "")


def training_batches(
    checkpoint: Checkpoint, training: TrainingPlan, documents: dict[str, str] | None, seed: int
) -> list[list[np.ndarray]]:
    """Tokenize and pack enough text for the run.

    Args:
        documents: texts by name; None for the bundled model's own mixture.

    Returns:
        Micro-batches in the order they are trained on; each a list of rows of at most the stage's window of ids,
        int32. The texts begin again, in a new order, when they are used up.

    Raises:
        TextError: no document is as long as a training sequence.
    """
    import numpy as np

    tokenizer: Any = checkpoint.load_tokenizer()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids + end

    tokenized: list[list[int]] = []
    if documents is not None:
        names = sorted(documents)
        random.Random(seed).shuffle(names)
        with progress_bar("tokenize", len(names), "texts") as advance:
            for name in names:
                tokenized.append(encode(documents[name]))
                advance(1)
        window, longest = max(stage.window for stage in training.stages), max(map(len, tokenized))
        if longest < window:
            raise TextError(
                f"{names[0]}{' and others' if len(names) > 1 else ''}: the longest text has {longest} tokens, fewer "
                f"than the training window of {window}",
                f"give longer texts or --train-window {max(2, longest)}",
            )

    def rows(stage: int, window: int) -> Iterator[list[int]]:
        if documents is None:
            yield from pack((encode(t) for t in bundled.training_mixture(seed + 1 + 1000 * stage, window)), window)
        packed = list(pack(tokenized, window))
        for turn in itertools.count():
            random.Random(f"{seed} {stage} {turn}").shuffle(packed)
            yield from packed

    batches: list[list[np.ndarray]] = []
    with progress_bar("pack", training.steps * training.accumulation, "batches") as advance:
        for i, stage in enumerate(training.stages):
            stream = (np.array(row, np.int32) for row in rows(i, stage.window))
            for _ in range(stage.steps * training.accumulation):
                batches.append(list(itertools.islice(stream, stage.micro_batch)))
                advance(1)
    return batches


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
        remove(work_dir)
        work_dir.mkdir(parents=True)
        write_json(path, record)
    for checkpoint_dir in work_dir.glob("checkpoint-*"):
        try:
            read_json(checkpoint_dir / "trainer_state.json")  # written last
        except CheckpointError:
            remove(checkpoint_dir)


@dataclass(frozen=True)
class _Trained:
    model: PreTrainedModel
    measured: dict[str, Any]


def _train(
    checkpoint: Checkpoint,
    rope: RopeScaling,
    training: TrainingPlan,
    batches: list[list[np.ndarray]],
    work_dir: Path,
    seed: int,
    device: str,
) -> _Trained:
    """Run transformers' Trainer, from its last checkpoint where there is one."""
    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    recompute = estimate_training_memory(checkpoint, training) > 0.6 * free_memory(device)
    need = estimate_training_memory(checkpoint, training, recompute=recompute)
    if need > (free := free_memory(device)):
        raise ResourceError(
            f"{checkpoint.source}: training needs about {human_bytes(need)}, {human_bytes(free)} are free",
            "a smaller --train-window or --batch-tokens helps only with activations; weights take 16 bytes a parameter",
        )
    model = checkpoint.load_model(dtype=torch.float32, device=device, rope=rope)
    model.config.use_cache = False

    class Batches(torch.utils.data.Dataset):
        """An item is a whole micro-batch, since how many rows it has changes with the stage."""

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return padded(batches[i], batch_positions(i, batches[i], rope, training, seed))

    def padded(rows: list[np.ndarray], places: list[np.ndarray]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(map(len, rows)))
        ids, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
        positions, mask = np.zeros(shape, places[0].dtype), np.zeros(shape, np.int64)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            n = len(row)
            ids[i, :n], labels[i, :n], positions[i, :n], mask[i, :n] = row, row, place, 1
        # The mask is given even when it is all ones: without one, transformers takes a skip in the positions for the
        # start of another document and lets nothing attend across it.
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    class PaperTrainer(Trainer):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:  # type: ignore[has-type]
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer or self.optimizer, lambda step: rate_share(step, training)
                )
            return self.lr_scheduler

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # they come in their order already

    stop = _StopOnInterrupt()

    class Progress(TrainerCallback):  # type: ignore[misc]
        def __init__(self, advance: Any) -> None:
            self.advance, self.loss, self.done = advance, None, 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.done = state.global_step
            self.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.advance(state.global_step - self.done, text=f"loss {self.loss:.3f}" if self.loss else None)
            self.done = state.global_step
            if stop.asked:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)
            if self.loss is not None and not math.isfinite(self.loss):
                raise PiGgufError(f"the loss is not a number before step {state.global_step}", "lower --learning-rate")

    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=training.steps,
        per_device_train_batch_size=1,  # an item is a micro-batch
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=fast_bf16(device),
        **({"activation_checkpointing": True} if recompute else {}),
        save_strategy="steps",
        save_steps=max(10, training.steps // 20),
        save_total_limit=2,
        logging_steps=min(10, training.steps),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device; Trainer would split every batch over all there are
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    with progress_bar("fine-tune", training.steps, "steps") as advance, stop:
        progress = Progress(advance)
        trainer = PaperTrainer(model=model, args=arguments, train_dataset=Batches(), data_collator=itemgetter(0))
        trainer.remove_callback(_printer())
        trainer.add_callback(progress)
        last = get_last_checkpoint(str(work_dir))
        if last:
            say(f"resume from {last}")
        result = trainer.train(resume_from_checkpoint=last)
    if stop.asked and trainer.state.global_step < training.steps:
        say(f"stopped at step {trainer.state.global_step}; the same command goes on from {work_dir}")
        raise KeyboardInterrupt
    measured = {
        "loss": round(progress.loss or result.training_loss, 4),
        "seconds": round(result.metrics["train_runtime"], 1),
        "device": device,
    }
    return _Trained(trainer.model, measured)


def batch_positions(
    i: int, rows: list[np.ndarray], rope: RopeScaling, training: TrainingPlan, seed: int
) -> list[np.ndarray]:
    """Return the positions of the run's micro-batch `i`, one array a row: int64, float32 while the factor grows.

    The model keeps its final scaling all along: a smaller factor is made by positions that lie further apart.
    """
    import numpy as np

    rng = np.random.default_rng((seed, i))
    step = i // training.accumulation
    if step >= training.factor_warmup_steps:
        return [pose_positions(len(row), rope.max_position_embeddings, rng) for row in rows]
    now = rope.grown((step + 1) / training.factor_warmup_steps)
    return [rope.positions_as_under(now, pose_positions(len(row), now.max_position_embeddings, rng)) for row in rows]


def rate_share(step: int, training: TrainingPlan) -> float:
    """Return the share of the peak rate at a step: linear warm-up from a tenth, then as the schedule says."""
    if step < training.warmup_steps:
        return 0.1 + 0.9 * step / training.warmup_steps
    if training.schedule == "constant":
        return 1.0
    left = (training.steps - step) / max(1, training.steps - max(training.warmup_steps, training.steps * 2 // 3))
    return 0.1 + 0.9 * min(1.0, max(0.0, left))


class _StopOnInterrupt:
    """Turns the first Ctrl-C into a request to stop after the step; a second one interrupts at once."""

    asked = False

    def __enter__(self) -> None:
        try:
            self._before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not in the main thread: leave Ctrl-C to whoever is
            self._before = None

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("stopping after this step; a checkpoint is saved")

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _write_folder(
    checkpoint: Checkpoint, rope: RopeScaling, out_dir: Path, record: dict[str, Any], trained: PreTrainedModel | None
) -> None:
    """Write weights in their original dtype, the config with the scaling, the tokenizer's files and the record."""
    import torch
    from safetensors import SafetensorError

    record["pi_gguf"] = package_version()
    record["libraries"] = library_versions()
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    stored = dtypes[next(iter(checkpoint.tensors.values())).dtype]
    model = trained if trained is not None else checkpoint.load_model(dtype=stored, rope=rope)
    check_free_disk(out_dir.parent, stored.itemsize * checkpoint.n_parameters())
    with replace_when_complete(out_dir) as partial:
        try:
            model.to(stored).save_pretrained(partial)
        except SafetensorError as error:  # its only way to say that the disk is full
            raise ResourceError(f"{out_dir}: the weights were not written ({error})", "free some disk space") from error
        config = rope.to_hf(checkpoint.config)
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, partial / name)
        settings_path = partial / "tokenizer_config.json"
        if settings_path.exists():
            settings = json.loads(settings_path.read_text())
            settings["model_max_length"] = rope.max_position_embeddings
            settings_path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        (partial / PROVENANCE_FILE).write_text(json.dumps(record, indent=1) + "\n")
