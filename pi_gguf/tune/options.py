"""The options of a fine-tune."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from pi_gguf.common.options import Options, option
from pi_gguf.errors import OptionError

DEFAULT_GROUP = 0.25
"""LongLoRA's (arXiv 2309.12307, section 3.2)."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """How a model is fine-tuned, and on what."""

    title: typing.ClassVar[str] = "Fine-tune"

    method: str = option(
        "linear (Position Interpolation), ntk, yarn, none (direct fine-tuning) or nope.", default="linear"
    )
    data: Sequence[str] = option(
        "text, JSONL or Parquet file (of texts or conversations), folder of them, or a data set of the Hub as "
        "owner/name or owner/name:split; :0.3 behind it is its weight, by which the sources share the tokens; the "
        "bundled sample when left out. Repeatable.",
        default=(),
        needed=True,
        each="SOURCE",
    )
    recall: float = option(
        "share of the tokens that are recall tasks beside the data, e.g. 0.3: numbers with names, hidden in novels of "
        "the sample and asked for at the end, in all lengths up to that of a training sequence.",
        default=0.0,
    )
    loss: str = option(
        "what counts of conversations: assistant (the answers) or all; of texts everything does.",
        default="assistant",
        choices=("assistant", "all"),
    )
    steps: int = option("optimizer steps; 0 applies the scaling without training.", default=1000, needed=True)
    train: str = option(
        "full (every weight), lora (adapters on every linear layer; embeddings and norms whole), qlora (the same on "
        "weights in 4 bits: a CUDA GPU and bitsandbytes), or auto, the first that fits the free memory.",
        default="full",
        needed=True,
    )
    train_window: int | str | None = option(
        "tokens of a training sequence; below the context positions skip (PoSE). Several with their steps follow each "
        "other, 512x500,2048x200,8192, or come in turn, 512x500,8192+512.",
        default=None,
    )
    mix: float | None = option(
        "share of the tokens to train in sequences of the whole context, e.g. 0.1, spread evenly among sequences of "
        "train-window with PoSE; when left out, a quarter where whole sequences fit the GPU, none elsewhere.",
        default=None,
    )
    attention: str = option(
        "of training: full, or s2, for whole windows: half of the heads attend within groups, the others within groups "
        "shifted by half of one (LongLoRA); what is measured and written attends fully.",
        default="full",
        choices=("full", "s2"),
    )
    s2_group: float = option("tokens of a group of s2 as a share of the context, e.g. 0.125.", default=DEFAULT_GROUP)
    factor_warmup: int = option(
        "steps over which the factor grows from 1, e.g. 300; 0 (the paper's) starts with the whole.", default=0
    )
    learning_rate: float | None = option("at its peak; by the model's size when left out (2e-5 for 7B).", default=None)
    batch_tokens: int | None = option("tokens of an optimizer step; by the model's size when left out.", default=None)
    schedule: str = option(
        "constant (the paper's) or decay (to a tenth over the last third).",
        default="constant",
        choices=("constant", "decay"),
    )
    packing: str | None = option(
        "isolate (documents that share a row do not see each other) or join (a row is one sequence); when left out, "
        "isolate, but join for the bundled model's own training mixture.",
        default=None,
        choices=("isolate", "join"),
    )
    longest_first: bool = option(
        "fill rows with the longest documents first, and train on those alone if there are enough.", default=False
    )
    lora_rank: int = option("rank of the adapters, of lora and qlora.", default=16)
    lora_alpha: int | None = option("an adapter counts alpha / rank times; twice the rank when left out.", default=None)
    eval_steps: int = option(
        "steps between two validations: perplexity at the old and the new window, and k_max at the new one of a few "
        "passkeys; 0 for none while it runs. What the old window pays is measured at the end in any case.",
        default=0,
    )
    eval_text: Sequence[str] = option(
        "text to validate on, as long as the new window; a held-out novel of the bundled sample when left out. "
        "Repeatable; the longest is read.",
        default=(),
        each="PATH",
    )
    early_stop: bool = option("end the run when a validation finds k_max at the new window.", default=False)
    report_to: str = option(
        "where the losses are shown while it runs: auto (TensorBoard where installed, in OUT.runs), none, or names "
        "that transformers knows, separated by commas.",
        default="auto",
    )
    seed: int = option("of the order of the data and of the skips.", default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise OptionError(f"steps must not be negative, got {self.steps}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise OptionError(f"learning-rate must be between 0 and 1, got {self.learning_rate}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise OptionError(f"batch-tokens must be at least 1, got {self.batch_tokens}")
        if not 0 <= self.recall < 1:
            raise OptionError(f"recall must be from 0 to below 1, got {self.recall}")
        if self.mix is not None and not 0 <= self.mix < 1:
            raise OptionError(
                f"mix must be from 0 to below 1, got {self.mix}",
                "--train-window with the context, without --mix, trains on sequences of the whole window only",
            )
        if not 0 < self.s2_group < 1:
            raise OptionError(f"s2-group must be between 0 and 1, got {self.s2_group}")
        if self.s2_group != DEFAULT_GROUP and self.attention != "s2":
            raise OptionError(
                f"s2-group is for attention s2, got {self.s2_group} with {self.attention}", "give --attention s2"
            )


@dataclass(frozen=True, kw_only=True)
class SpreadOptions(Options):
    """How a fine-tune is spread over processes, under torchrun or accelerate launch."""

    title: typing.ClassVar[str] = "Several processes"

    fsdp: bool = option(
        "under torchrun or accelerate launch, with train full: shard weights, gradients and moments over the processes "
        "(FSDP2); --no-fsdp copies them to each (DDP), as lora and qlora do.",
        default=True,
    )
    cp_size: int | None = option(
        "GPUs that share one sequence, by torch's context parallelism; when left out, one, or where weights are "
        "sharded as few as the sequences need to fit.",
        default=None,
    )
    sp_size: int = option("GPUs that share one sequence, by DeepSpeed's sequence parallelism.", default=1)
    deepspeed: str | None = option("a DeepSpeed config in JSON, which then shards instead of FSDP2.", default=None)


class TuneKeywords(TypedDict, total=False):
    method: str
    data: Sequence[str]
    recall: float
    loss: str
    steps: int
    train: str
    train_window: int | str | None
    mix: float | None
    attention: str
    s2_group: float
    factor_warmup: int
    learning_rate: float | None
    batch_tokens: int | None
    schedule: str
    packing: str | None
    longest_first: bool
    lora_rank: int
    lora_alpha: int | None
    eval_steps: int
    eval_text: Sequence[str]
    early_stop: bool
    report_to: str
    seed: int


class ExtendKeywords(TuneKeywords, total=False):
    fsdp: bool
    cp_size: int | None
    sp_size: int
    deepspeed: str | None
