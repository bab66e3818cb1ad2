"""The record of a fine-tune: pi_gguf.json beside the weights, and run.json of one that is not finished.

In and out: a JSON object of the fields below; what is None is not written. Folders of older versions lack some, those
of newer ones have more, which are kept as they are.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from pi_gguf.checkpoint.config import read_json
from pi_gguf.common.files import write_json
from pi_gguf.errors import CheckpointError
from pi_gguf.scaling.own import positive_int

RECORD_FILE = "pi_gguf.json"
"""Written by `extend` beside the weights."""

_KINDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"
}  # fmt: skip


_TOLD = {"told": True}
"""Marks what says how a run went, or the same in other words; every other field shapes the run."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a fine-tune is made from and how it went; None where that was not recorded.

    Args:
        source: MODEL, as it may be published.
        weights_sha256: fingerprint of the checkpoint.
        method: of extending the window.
        rope_type: of the scaling.
        factor: of the scaling, dimensionless.
        original_window: before it was extended, in tokens.
        context: the new window, in tokens.
        steps: optimizer steps; 0 where the scaling was applied without training.
        seed: of the order of the data and of the skips.
        tokens: trained on.
        stages: as in `TrainingPlan`, as all up to `attention_group`.
        data: names of the texts, without folders.
        data_sha256: of what is in them.
        data_weights: of each, in their order, where weights were given.
        recall: share of the tokens that were recall tasks beside the texts; None where none were.
        counted: what counts of conversations; None where there were none.
        adapter_only: whether the adapter alone was written.
        packing: of documents into rows.
        longest_first: whether the longest documents came first.
        eval_steps: steps between two validations.
        early_stop: whether a validation could end the run.
        eval_text: name of the user's text to validate on; None for the bundled one.
        eval_text_sha256: of what was read of it.
        sharded: whether the checkpoints of an unfinished run are FSDP2's; None of a finished one.
        options: given ones that no other field holds.
        loss: of the last step, in nats a token.
        steps_done: fewer than `steps` where the run ended early.
        seconds: that it took.
        device: `cpu` or `cuda`.
        peak_memory_bytes: while it ran.
        predicted_memory_bytes: before it ran.
        validations: figures by name, each with its step.
        price: what the old window pays, see `Validation.price`.
        pi_gguf: version of this package.
        libraries: versions by name.
        others: fields that this version does not know.
    """

    source: str | None = field(default=None, metadata=_TOLD)
    weights_sha256: str | None = None
    method: str | None = None
    rope_type: str | None = None
    factor: float | None = None
    original_window: int | None = None
    context: int | None = None
    steps: int = 0
    seed: int | None = None
    tokens: int | None = None
    stages: list[dict[str, int]] | None = None
    sequences: str | None = None
    reason: str | None = field(default=None, metadata=_TOLD)
    accumulation: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    schedule: str | None = None
    factor_warmup_steps: int | None = None
    mix: float | None = None
    full_window: int | None = None
    full_micro_batch: int | None = None
    full_micro_batches: int | None = None
    train: str | None = None
    train_reason: str | None = field(default=None, metadata=_TOLD)
    lora_rank: int | None = None
    lora_alpha: int | None = None
    attention_group: int | None = None
    data: str | list[str] | None = None
    data_sha256: str | None = None
    data_weights: list[float] | None = None
    recall: float | None = None
    counted: str | None = None
    adapter_only: bool | None = None
    packing: str | None = None
    longest_first: bool | None = None
    eval_steps: int | None = None
    early_stop: bool | None = None
    eval_text: str | None = None
    eval_text_sha256: str | None = None
    sharded: bool | None = None
    options: dict[str, Any] | None = None
    loss: float | None = field(default=None, metadata=_TOLD)
    steps_done: int | None = field(default=None, metadata=_TOLD)
    seconds: float | None = field(default=None, metadata=_TOLD)
    device: str | None = field(default=None, metadata=_TOLD)
    peak_memory_bytes: int | None = field(default=None, metadata=_TOLD)
    predicted_memory_bytes: int | None = field(default=None, metadata=_TOLD)
    validations: list[dict[str, float]] | None = field(default=None, metadata=_TOLD)
    price: dict[str, Any] | None = field(default=None, metadata=_TOLD)
    pi_gguf: str | None = field(default=None, metadata=_TOLD)
    libraries: dict[str, str] | None = field(default=None, metadata=_TOLD)
    others: dict[str, Any] = field(default_factory=dict, metadata=_TOLD)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """Read a record; None where there is none.

        Raises:
            CheckpointError: it is no JSON object, or a field is of another type.
        """
        if not path.exists():
            return None
        stated = {"steps": 0, "tokens": 0, **read_json(path)}
        known = _types()
        for name in known:
            if name in stated:
                _check(stated, name, known[name], path)
        others = {name: value for name, value in stated.items() if name not in known}
        return cls(**{name: value for name, value in stated.items() if name in known}, others=others)

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return what is recorded, by the names in the file."""
        stated = {name: getattr(self, name) for name in _types()}
        return {name: value for name, value in stated.items() if value is not None} | self.others

    def difference(self, before: Record) -> str:
        """Return the first setting in which an earlier run differs from this one, or an empty string.

        How the source was spelled is none; nor are shards where this run's do not count, as it is finished.
        """
        return next(self._differences(before), "")

    def _differences(self, before: Record) -> Iterator[str]:
        for one in fields(self):
            mine = getattr(self, one.name)
            counts = not one.metadata.get("told") and (one.name != "sharded" or mine is not None)
            if counts and mine != getattr(before, one.name):
                yield one.name


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """Return the types that each field of the file may have; of lists and objects no more than that."""
    hints = typing.get_type_hints(Record)
    unions = {name: typing.get_args(hint) or (hint,) for name, hint in hints.items() if name != "others"}
    return {name: tuple(typing.get_origin(kind) or kind for kind in kinds) for name, kinds in unions.items()}


def _check(stated: dict[str, Any], name: str, kinds: tuple[type, ...], path: Path) -> None:
    """Check the type of a field; numbers that count something are not negative.

    Raises:
        CheckpointError: it is another one.
    """
    value = stated[name]
    if value is None and name not in ("steps", "tokens"):
        return
    if name in ("original_window", "context"):
        positive_int(stated, name, str(path))
    numbers = (int, float) if float in kinds else kinds
    fits = isinstance(value, numbers) and (bool in kinds or not isinstance(value, bool))
    if not fits or value is None or (int in kinds and value < 0 and name != "seed"):
        allowed = " or ".join(_KINDS[kind] for kind in kinds if kind is not NoneType)
        raise CheckpointError(f"{path}: {name} must be {allowed}, got {repr(value)[:80]}", "delete the file")
