"""What is asked of an engine, and what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pi_gguf.errors import PiGgufError
from pi_gguf.runtime.sampling import Sampling

TOP = 20
"""Most probable tokens that are told at most."""


class QueueFull(PiGgufError):
    """Too many wait already.

    Args:
        waiting: how many.
        retry_after: after about how many seconds to come again.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already", f"try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Job:
    """A text to read, and how it goes on.

    Args:
        ids: the prompt, one token or more.
        limit: tokens to write at most; with 0 the prompt is only read.
        sampling: how each is chosen, and what ends the text.
        top: tell the log-probabilities of what is written, and of so many most probable tokens, up to 20.
        prompt_top: the same for the tokens of the prompt; all of it is then read.
        special: whether special tokens are part of the text.
        background: whether it lets all others go first.
        kept: whether the prompt begins with a document that may be kept on disk.
    """

    ids: Sequence[int]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    top: int | None = None
    prompt_top: int | None = None
    special: bool = False
    background: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Choice:
    """A token with the natural logarithm of its probability, before what `Sampling` does to it.

    Args:
        token: its id.
        piece: its bytes.
        logprob: of it.
        top: id, bytes and logarithm of the most probable ones, the first of them first.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class Read:
    """So many tokens of a prompt were read of those that must be; `known` more were in the cache."""

    read: int
    to_read: int
    known: int


@dataclass(frozen=True)
class PromptScored:
    """The tokens of the prompt; None for the first, which nothing predicts."""

    choices: tuple[Choice | None, ...]


@dataclass(frozen=True)
class Written:
    """Text that is certain; with `Job.top` the tokens chosen since then, whose text may follow later, and the end."""

    text: str
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of a job.

    Args:
        why: stop, length or cancelled.
        prompt: tokens of it.
        known: how many of these were in the cache, or kept on disk.
        written: tokens.
        read_seconds: from the first batch to the first token.
        write_seconds: from there to the end.
        waited_seconds: from the asking to the first token.
    """

    why: str
    prompt: int
    known: int
    written: int
    read_seconds: float
    write_seconds: float
    waited_seconds: float


Event = Read | PromptScored | Written | Ended


@dataclass
class Figures:
    """What an engine has done, and does now; all but the first five only grow."""

    slots: int
    busy: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_used: int = 0
    read_tokens: int = 0
    known_tokens: int = 0
    written_tokens: int = 0
    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    preempted: int = 0
    batches: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
