"""What transformers' Trainer asks of us while it trains: the rate of each step, and what follows a step.

In: a run's settings. Out: a Trainer, and a callback of it. Imported when a run begins, as transformers loads with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from pi_gguf.common.progress import say
from pi_gguf.errors import PiGgufError
from pi_gguf.tune.validation import Validation


class PaperTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with a schedule of its own.

    Args:
        rate_share: returns the share of the peak rate at a step.
        options: as `Trainer` has them.
    """

    def __init__(self, rate_share: Callable[[int], float], **options: Any) -> None:
        self._rate_share = rate_share
        super().__init__(**options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._rate_share)
        return self.lr_scheduler


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows how far a run is, validates it on the way, and ends it early where it is asked to.

    Args:
        trainer: whose callback it is.
        advance: of the progress bar.
        validation: what is measured, and whether that may end the run.
        device: where its inputs go.
        accumulation: micro-batches of a step.
        stop_asked: tells whether the run is to end after this step.

    Attributes:
        reached: whether the validation has ended the run.

    Raises:
        PiGgufError: a loss or gradient is not a number.
    """

    def __init__(
        self,
        trainer: Trainer,
        advance: Any,
        validation: Validation,
        *,
        device: str,
        accumulation: int,
        stop_asked: Callable[[], bool],
    ) -> None:
        self._loss: float | None = None
        self.reached = False
        self._trainer, self._advance, self._validation, self._device = trainer, advance, validation, device
        self._accumulation, self._stop_asked, self._done = accumulation, stop_asked, 0
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._done, self._since = state.global_step, time.monotonic()
        self._advance(state.global_step, earlier=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(state.global_step - self._done, text=f"loss {self._loss:.3f}" if self._loss else None)
        self._done = state.global_step
        if self._validation.is_due(state.global_step):
            self._validate(state.global_step, control)
        if self._stop_asked():
            control.should_save = control.should_training_stop = True

    def _validate(self, step: int, control: Any) -> None:
        trainer = self._trainer
        found = self._validation.measure(trainer.accelerator.unwrap_model(trainer.model_wrapped), self._device)
        trainer.log(found)
        control.should_log = True  # the step's loss still is to be; what was just logged took that back
        if self._validation.is_reached(found):
            say(f"early stop at step {step}: k_max has reached the window")
            self.reached = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)
        for what, value in {"loss": self._loss, "gradient": (logs or {}).get("grad_norm")}.items():
            if value is not None and not math.isfinite(value):
                last = self._accumulation * state.global_step
                raise PiGgufError(
                    f"the {what} of step {state.global_step}, micro-batches {last - self._accumulation + 1} to "
                    f"{last} of the run, is not a number",
                    "lower --learning-rate; if it is step 1, the checkpoint is damaged",
                )
        if "loss" in (logs or {}):  # kept with the step, so that a run that goes on knows of those before
            now = time.monotonic()
            state.log_history[-1]["seconds"], self._since = now - self._since, now
