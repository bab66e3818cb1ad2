"""What a fine-tune does, step by step, before it runs: `TrainingPlan`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pi_gguf.errors import OptionError


@dataclass(frozen=True)
class Stage:
    """Steps of a fine-tune that train on sequences of one length.

    Args:
        window: tokens of a sequence.
        steps: optimizer steps.
        micro_batch: sequences computed at once.
    """

    window: int
    steps: int
    micro_batch: int


@dataclass(frozen=True)
class TrainingPlan:
    """How a fine-tune is run.

    Args:
        steps: optimizer steps.
        stages: lengths of the training sequences, one after the other.
        sequences: `full length`, `PoSE` where positions skip, or `PoSE and full length` where both are mixed.
        reason: why these.
        accumulation: micro-batches of one optimizer step.
        learning_rate: at its peak.
        warmup_steps: linear, from a tenth of the peak.
        schedule: `constant` (the paper's) or `decay` (linear to a tenth of the peak over the last third).
        factor_warmup_steps: steps over which the factor grows from 1; 0 (the paper's) starts with the whole.
        mix: share of the tokens that is asked for in sequences of the whole new window, among shorter ones.
        full_window: tokens of those sequences; 0 without a mix.
        full_micro_batch: of those sequences, how many are computed at once.
        full_micro_batches: of the run's micro-batches, how many are of those sequences.
        train: `full`, or adapters: `lora` on weights in 16 bits, `qlora` in 4.
        train_reason: why this way.
        lora_rank: of the adapters; 0 where every weight is trained.
        lora_alpha: an adapter counts alpha / rank times.
        attention_group: tokens of a group within which is attended in training; None where to all of a sequence.
    """

    steps: int
    stages: list[Stage]
    sequences: str
    reason: str
    accumulation: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    factor_warmup_steps: int
    mix: float = 0.0
    full_window: int = 0
    full_micro_batch: int = 0
    full_micro_batches: int = 0
    train: str = "full"
    train_reason: str = "as given by --train"
    lora_rank: int = 0
    lora_alpha: int = 0
    attention_group: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_window().values())

    def tokens_by_window(self) -> dict[int, int]:
        """Return the tokens of the run by the length of their sequences."""
        tokens: dict[int, int] = {}
        for window, n in self.micro_batches():
            tokens[window] = tokens.get(window, 0) + n * window
        return tokens

    def micro_batches(self) -> Iterator[tuple[int, int]]:
        """Yield the length of the sequences of each micro-batch of the run, and how many these are."""
        shorts = (stage for stage in self.stages for _ in range(stage.steps * self.accumulation))
        for stage, whole in zip(shorts, self.full_length, strict=True):
            yield (self.full_window, self.full_micro_batch) if whole else (stage.window, stage.micro_batch)

    def attended(self, window: int) -> int:
        """Return over how many tokens the last one of a sequence or a group attends."""
        return min(window, self.attention_group or window)

    @cached_property
    def full_length(self) -> list[bool]:
        """Whether each micro-batch of the run is of the whole window, by the mix.

        Each time that brings the share of the tokens so far nearer to `mix`; so they are spread evenly over the run.
        """
        chosen: list[bool] = []
        full, tokens, new = 0, 0, self.full_micro_batch * self.full_window
        for stage in self.stages:
            short = stage.micro_batch * stage.window
            for _ in range(stage.steps * self.accumulation):
                above, below = full + new - self.mix * (tokens + new), full - self.mix * (tokens + short)
                chosen.append(self.mix > 0 and abs(above) < abs(below))
                full += new if chosen[-1] else 0
                tokens += new if chosen[-1] else short
        return chosen

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(self.full_micro_batch * self.full_window, *(s.micro_batch * s.window for s in self.stages))

    def steps_by_window(self) -> dict[int, int]:
        """Return the steps on sequences of each length, in the order they first come."""
        windows = dict.fromkeys(stage.window for stage in self.stages)
        return {window: sum(s.steps for s in self.stages if s.window == window) for window in windows}

    def step_tokens(self, stage: Stage) -> int:
        """Return the tokens of one optimizer step in a stage where nothing of the whole window is mixed in."""
        return self.accumulation * stage.micro_batch * stage.window


def parse_windows(train_window: int | str, steps: int) -> list[tuple[int, int]]:
    """Read the lengths of training sequences: one, or several with their steps.

    Args:
        train_window: tokens, e.g. 2048; or `512x500,2048x200,8192`: 500 steps on 512 tokens, 200 on 2048, the rest on
            8192; or `512x500,8192+512x200`: the last 200 steps on 8192 and 512 tokens in turn.
        steps: of the whole run.

    Returns:
        Pairs of tokens and steps.

    Raises:
        OptionError: not of this form, or the steps do not add up.
    """
    text = str(train_window)
    turn = r"[0-9]+(\+[0-9]+)*"
    if not re.fullmatch(rf"({turn}x[0-9]+,)*{turn}(x[0-9]+)?", text):
        raise OptionError(
            f"train-window must be tokens, or tokens x steps separated by commas, got {train_window!r}",
            "for example 2048, or 512x500,2048x200,8192 (the last takes the steps that are left)",
        )
    counted: list[tuple[list[int], int]] = []
    for part in text.split(","):
        windows, _, count = part.partition("x")
        left = steps - sum(n for _, n in counted)
        counted.append(([int(window) for window in windows.split("+")], int(count) if count else left))
    if any(n < 1 for _, n in counted) or sum(n for _, n in counted) != steps:
        counts = " + ".join(str(n) for _, n in counted)
        raise OptionError(
            f"train-window {train_window!r} does not divide the {steps} steps: {counts}",
            f"let its steps add up to {steps}, or leave the last one's out",
        )
    pairs: list[tuple[int, int]] = []
    for in_turn, n in counted:
        pairs += [(in_turn[0], n)] if len(in_turn) == 1 else [(in_turn[i % len(in_turn)], 1) for i in range(n)]
    return pairs
