"""The training run itself: transformers' Trainer with the paper's optimizer and schedule, and a safe end.

In: an extended checkpoint and the batches. Out: the trained model. A run that stops leaves its last checkpoint in
its folder, from which the next one goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common import machine
from pi_gguf.common.endings import handled_signals
from pi_gguf.common.files import human_bytes
from pi_gguf.common.machine import peak_memory
from pi_gguf.common.private import use_one_device
from pi_gguf.common.products import fast_products
from pi_gguf.common.progress import progress_bar, say
from pi_gguf.data.packing import Row
from pi_gguf.errors import Interrupted, OptionError, ResourceError
from pi_gguf.tune import tiles
from pi_gguf.tune.batches import BatchDataset
from pi_gguf.tune.compiled import compiled_layers, compiling_pays
from pi_gguf.tune.lora import add_adapters, save_adapter
from pi_gguf.tune.losses import chunked_loss
from pi_gguf.tune.memory import Activations, fit_activations
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.processes import Spread, agree, is_first_process, set_precision, shard_on_cpu
from pi_gguf.tune.sparse import sparse_attention
from pi_gguf.tune.speed import step_operations
from pi_gguf.tune.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trained:
    """What a run ends with.

    Args:
        model: with every weight trained; None where adapters were.
        adapter_dir: the adapters as peft saves them, in the run's folder; None without.
        losses: of each step, nats a token, those before a resume too.
        validations: what was measured on the way, with its step, those before a resume too.
        measured: last loss, steps done, their seconds, those before a resume too, device, peak memory and what was
            predicted, in bytes.
    """

    model: PreTrainedModel | None
    adapter_dir: Path | None
    losses: list[float]
    validations: list[dict[str, float]]
    measured: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A fine-tune with all that is decided about it.

    Args:
        checkpoint: extended to the new window.
        training: how it is run.
        batches: its micro-batches, in order.
        work_dir: where its checkpoints lie; it goes on from the last one.
        seed: of the skips, and of adapters.
        device: cpu or cuda.
        reports: where the losses are shown, by transformers' names.
        spread: over which processes.
        validation: what is measured on the way, and whether that may end the run.
    """

    checkpoint: Checkpoint
    training: TrainingPlan
    batches: list[list[Row]]
    work_dir: Path
    seed: int
    device: str
    reports: list[str]
    spread: Spread
    validation: Validation


def run_training(run: Run) -> Trained:
    """Run transformers' Trainer, from its last checkpoint where there is one; every process calls this.

    Raises:
        PiGgufError: a loss or gradient is not a number.
        ResourceError: it would not fit in memory.
    """
    from pi_gguf.tune.callbacks import Progress

    training, spread, device = run.training, run.spread, run.device
    activations, need = _affordable_activations(run)
    arguments = _arguments(run, activations)
    if spread.fsdp and device == "cpu":
        shard_on_cpu()
    # After the arguments, which take this process's GPU.
    model = _open_model(run.checkpoint, training, run.seed, "cpu" if spread.fsdp or spread.deepspeed else device)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    stop = _StopOnInterrupt(spread.processes)
    costs = step_operations(run.checkpoint, training)
    with fast_products(device), progress_bar("fine-tune", training.steps, "steps", costs) as advance, stop:
        trainer = _trainer(run, model, arguments)
        progress = Progress(
            trainer, advance, run.validation, device=device, accumulation=training.accumulation,
            stop_asked=lambda: stop.asked,
        )  # fmt: skip
        trainer.add_callback(progress)
        _train(trainer, run, activations)
    if stop.asked and trainer.state.global_step < training.steps and not progress.reached:
        say(f"stopped at step {trainer.state.global_step}; the same command goes on from {run.work_dir}")
        raise Interrupted(stop.number)
    measured = {
        "steps_done": trainer.state.global_step,
        "device": device,
        "peak_memory_bytes": peak_memory(device),
        "predicted_memory_bytes": need,
    }
    return _trained(run, trainer, measured)


def _affordable_activations(run: Run) -> tuple[Activations, int]:
    """Return what becomes of the activations, and the memory that one process needs then, in bytes.

    Raises:
        ResourceError: more than is free.
    """
    training, here = run.training, machine.Machine.here(run.device)
    free = agree(here.free_bytes, run.device)
    activations, need = agree(fit_activations(run.checkpoint, training, here, run.spread), run.device)
    if need > free:
        raise ResourceError(
            f"{run.checkpoint.source}: training needs about {human_bytes(need)}, {human_bytes(free)} are free",
            "a smaller --train-window or --batch-tokens helps only with activations; weights take 16 bytes a trained "
            "parameter" + (", and fewer are trained by --train lora" if training.train == "full" else ""),
        )
    return activations, need


def _arguments(run: Run, activations: Activations) -> Any:
    """Return the arguments of transformers' Trainer: the paper's optimizer, and how the run is spread and saved."""
    from transformers import TrainingArguments

    training, spread, device = run.training, run.spread, run.device
    arguments = TrainingArguments(
        output_dir=str(run.work_dir),
        max_steps=training.steps,
        per_device_train_batch_size=1,  # an item is a micro-batch
        gradient_accumulation_steps=training.accumulation // spread.readers,
        train_sampling_strategy="sequential",  # they come in their order already
        learning_rate=training.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=machine.fast_bf16(device),
        optim="adamw_bnb_8bit" if training.train == "qlora" else "adamw_torch_fused",
        save_strategy="steps",
        save_steps=max(10, training.steps // 20),
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=run.reports,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=run.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        **_as_known(spread.arguments(activations.recompute, activations.offload), TrainingArguments),
    )
    use_one_device(arguments)
    return arguments


def _trainer(run: Run, model: Any, arguments: Any) -> Any:
    """Return a Trainer over the run's batches that prints nothing of its own."""
    from pi_gguf.tune.callbacks import PaperTrainer

    with _tensorboard_dir(run.work_dir.with_suffix(".runs")):
        trainer = PaperTrainer(
            lambda step: rate_share(step, run.training),
            model=model,
            args=arguments,
            train_dataset=BatchDataset(run.batches, run.checkpoint, run.training, run.seed),
            data_collator=itemgetter(0),
        )
    trainer.remove_callback(_printer())
    return trainer


def _train(trainer: Any, run: Run, activations: Activations) -> None:
    """Train from the last checkpoint, with a loss in chunks, the rest as planned."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(run.work_dir))
    if last:
        say(f"resume from {last}")
    if run.spread.fsdp:
        set_precision(trainer.accelerator, trainer.args.bf16)
    tiled = tiles.tiled_mlps(trainer.model, tiles.TILE) if activations.tiled else nullcontext()
    group = run.training.attention_group
    sparse = sparse_attention(trainer.model, group) if group else nullcontext()
    pays = compiling_pays(run.checkpoint, run.training, run.device, run.spread.processes)
    compiled = compiled_layers(trainer.model) if pays else nullcontext()
    with chunked_loss(trainer.model), tiled, sparse, compiled, warnings.catch_warnings():
        # The head hands a view through, and nothing is done to it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        trainer.train(resume_from_checkpoint=last)


def _trained(run: Run, trainer: Any, measured: dict[str, Any]) -> Trained:
    """Return what a run ended with: its history, and the model or the adapters; every process calls this."""
    history = trainer.state.log_history
    steps = [entry for entry in history if "loss" in entry]
    losses = [entry["loss"] for entry in steps]
    seconds = sum(entry.get("seconds", 0) for entry in steps)
    measured = {"loss": round(losses[-1], 4), "seconds": round(seconds, 1), **measured}
    validations = [
        {name: value for name, value in entry.items() if name == "step" or name.startswith("eval_")}
        for entry in history
        if any(name.startswith("eval_") for name in entry)
    ]
    if run.training.train == "full":
        whole = _whole_model(trainer, run.checkpoint, run.spread)
        return Trained(whole, None, losses, validations, measured)
    adapter_dir = run.work_dir / "adapter"
    if is_first_process():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_dir)
    return Trained(None, adapter_dir, losses, validations, measured)


def _as_known(arguments: dict[str, Any], kind: type) -> dict[str, Any]:
    """Return arguments by the names of the installed transformers: before 5.23 recomputation was called
    gradient_checkpointing."""
    names = {one.name for one in fields(kind)}
    return {
        name if name in names else name.replace("activation_", "gradient_"): value for name, value in arguments.items()
    }


def _whole_model(trainer: Any, checkpoint: Checkpoint, spread: Spread) -> Any:
    """Return the trained model, gathered on the first process where it is sharded; every process calls this."""
    import torch

    if not (spread.fsdp or spread.deepspeed):
        return trainer.model
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_first_process():
        return None
    model = checkpoint.load_model(dtype=torch.float32)
    model.load_state_dict(weights)
    return model


def _open_model(checkpoint: Checkpoint, training: TrainingPlan, seed: int, device: str) -> Any:
    """Open the model for training: every weight in 32 bits, or adapters in 32 on a frozen base in fewer."""
    import torch

    if training.train == "full":
        model: Any = checkpoint.load_model(dtype=torch.float32, device=device)
    else:
        torch.manual_seed(seed)  # A is random; B begins at zero
        dtype = torch.bfloat16 if machine.fast_bf16(device) else torch.float32
        base = checkpoint.load_model(dtype=dtype, device=device, four_bits=training.train == "qlora")
        model = add_adapters(checkpoint, base, training.lora_rank, training.lora_alpha)
    model.config.use_cache = False
    return model


def check_reports(report_to: str) -> list[str]:
    """Return where losses are shown, by transformers' names, for `--report-to`.

    Raises:
        OptionError: not one of them, or not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    available = get_available_reporting_integrations()
    if report_to == "auto":
        return [name for name in available if name == "tensorboard"]
    names = [] if report_to == "none" else report_to.split(",")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(
                f"report-to must be auto, none or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}"
            )
        if name not in available:
            raise OptionError(f"report-to {name}: it is not installed", f"pip install {name}, or --report-to none")
    return names


@contextmanager
def _tensorboard_dir(path: Path) -> Iterator[None]:
    """Name the folder that transformers' TensorBoard takes when it is made, unless the user did; the run's own is
    deleted at the end."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(path)
    try:
        yield
    finally:
        del os.environ[name]


def rate_share(step: int, training: TrainingPlan) -> float:
    """Return the share of the peak rate at a step: linear warm-up from a tenth, then as the schedule says."""
    if step < training.warmup_steps:
        return 0.1 + 0.9 * step / training.warmup_steps
    if training.schedule == "constant":
        return 1.0
    left = (training.steps - step) / max(1, training.steps - max(training.warmup_steps, training.steps * 2 // 3))
    return 0.1 + 0.9 * min(1.0, max(0.0, left))


class _StopOnInterrupt:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop after the step; a second interrupts at once."""

    asked = False
    number: int = signal.SIGINT

    def __init__(self, processes: int) -> None:
        self._alone = processes == 1  # others may be at another step; the run goes on from its last checkpoint then

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {}
        if not self._alone:
            return
        with suppress(ValueError):  # not in the main thread: leave them to whoever is
            for number in handled_signals():
                if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.number = number
        if self.asked:
            raise Interrupted(number)
        self.asked = True
        say("stopping after this step; a checkpoint is saved")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
