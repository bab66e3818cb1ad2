"""What the evaluations ask of a model, the same for llama.cpp (`runtime.model`) and transformers (`models.hf`).

A backend provides `logits_chunks`; log-probabilities follow here, a chunk at a time, so that
[tokens, vocabulary] never exists as a whole. T tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

GAP = "[[pi-gguf text]]"
"""What stands for a text in a message, see `LanguageModel.chat_around`."""


class LanguageModel(ABC):
    """A model that reads token ids and predicts the next one."""

    name: str
    """File or folder, for tables."""

    window: int
    """Window that the model states, in tokens."""

    @abstractmethod
    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return token ids; with `add_special` the begin token is added if the model wants one."""

    @property
    @abstractmethod
    def bos(self) -> list[int]:
        """The begin token as a list of one, or an empty list if the model adds none."""

    @abstractmethod
    def logits_chunks(self, ids: Sequence[int], last: int) -> Iterator[np.ndarray]:
        """Yield the logits after each of the last `last` ids, in order, in chunks of shape (T, V), float32.

        What `ids` has in common with the call before from its start is not computed again.
        """

    def score(self, ids: Sequence[int], last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probability of each of the last `last` ids given all before it, and whether it came first.

        Args:
            ids: token ids; more than `last`.
            last: how many to score.

        Returns:
            float64 (last,) natural logarithms; bool (last,) whether the id was the most probable one.
        """
        if not 0 < last < len(ids):
            raise ValueError(f"last must be between 1 and {len(ids) - 1}, got {last}")
        logprobs, first = np.empty(last), np.empty(last, bool)
        done = 0
        targets = np.asarray(ids[-last:])
        for logits in self.logits_chunks(ids[:-1], last):
            here = targets[done : done + len(logits)]
            chosen = np.take_along_axis(logits, here[:, None], 1)[:, 0]
            top = logits.max(1)
            total = np.log(np.exp(logits - top[:, None], dtype=np.float32).sum(1, dtype=np.float64)) + top
            logprobs[done : done + len(here)] = chosen - total
            first[done : done + len(here)] = logits.argmax(1) == here
            done += len(here)
        return logprobs, first

    def predicts(self, ids: Sequence[int], last: int) -> bool:
        """Tell whether each of the last `last` ids is the most probable one after all before it."""
        return bool(self.score(ids, last)[1].all())

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""

    @abstractmethod
    def is_end(self, token: int) -> bool:
        """Tell whether generation ends at a token."""

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        """Continue ids with the most probable token each time, and return the text of what was added.

        Args:
            ids: the prompt; with `max_tokens` it must fit the window.
            max_tokens: at most; an end token ends it before.
            stop: strings that end it too; they are part of the text.
        """
        written: list[int] = []
        while len(written) < max_tokens:
            (logits,) = self.logits_chunks([*ids, *written], 1)
            token = int(logits[-1].argmax())
            if self.is_end(token):
                break
            written.append(token)
            if stop and any(string in self.detokenize(written) for string in stop):
                break
        return self.detokenize(written)

    def chat_around(self, message: str) -> tuple[list[int], list[int]] | None:
        """Return the ids before and behind `GAP` in what a user says, as the model's own chat template writes it up to
        where the model answers; None where it has no template, or one that does not show the message as it is."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the memory."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids two sequences share from their start."""
    n = min(len(a), len(b))
    differ = np.nonzero(np.asarray(a[:n]) != np.asarray(b[:n]))[0]
    return int(differ[0]) if len(differ) else n
