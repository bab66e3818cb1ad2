"""One sequence of tokens in an opened llama.cpp: read, written, and kept from call to call.

In: token ids. Out: logits, or the tokens that follow. What ids have in common with those read before is not read again.
V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from pi_gguf.errors import GgufError, OptionError, ResourceError
from pi_gguf.llamacpp.library import compute, last_error
from pi_gguf.measure.language_model import common_prefix
from pi_gguf.runtime.sampling import Chooser, Sampling
from pi_gguf.runtime.sequence import CachedSequence

Cancelled = Callable[[], bool]
"""Looked at before each batch and each token: true, and no more is computed. `threading.Event().is_set` is one."""

Progress = Callable[[int, int, int], None]
"""Told, in tokens: how many of the prompt were read, how many had to be, and how many were written."""


def never() -> bool:
    return False


def silent(_read: int, _to_read: int, _written: int) -> None:
    pass


class TooLong(OptionError):
    """A prompt and what is to be written after it do not fit the window.

    Args:
        what: of the prompt.
        tokens: that it has.
        writing: how many are to be written.
        window: that is open, in tokens.
        hint: what to do.
    """

    def __init__(self, what: str, tokens: int, writing: int, window: int, hint: str) -> None:
        super().__init__(
            f"{what} of {tokens} tokens and {writing} to write do not fit the window of {window} tokens", hint
        )
        self.tokens, self.writing, self.window = tokens, writing, window


def check_fits(what: str, tokens: int, window: int, max_tokens: int | None, hint: str) -> int:
    """Return how many tokens of a window are left behind a prompt.

    Args:
        what: of the prompt, for the message.
        tokens: that it has.
        window: that is open, in tokens.
        max_tokens: how many are to be written; one at least when None.
        hint: what to do where it does not fit.

    Raises:
        OptionError: `max_tokens` is none.
        TooLong: it does not fit; nothing is ever cut.
    """
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, got {max_tokens}")
    if tokens + (max_tokens or 1) > window:
        raise TooLong(what, tokens, max_tokens or 1, window, hint)
    return window - tokens


class Stopped(Exception):
    """A reading was cancelled."""


class Session(CachedSequence):
    """What the first sequence of a context has read, and what it reads and writes next.

    Texts may be written in turn: each reads again what the other has put out of the cache.

    Args:
        llama: what `open_llama` opened.
        batch: tokens to read at a time.
        interrupted: called when a signal comes while llama.cpp computes; it may hasten the end.
    """

    def __init__(self, llama: Any, *, batch: int, interrupted: Callable[[], None] = lambda: None) -> None:
        super().__init__(llama)
        self._batch, self._interrupted = batch, interrupted
        self.n_vocab = int(self._llama_cpp.llama_vocab_n_tokens(self.vocab))

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary."""
        return self._open()[1]

    def is_end(self, token: int) -> bool:
        return bool(self._llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the text of a token, which may be part of a character; nothing for special ones, or `special`."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def read(
        self, ids: Sequence[int], last: int, *, cancelled: Cancelled = never, on_progress: Progress = silent
    ) -> Iterator[np.ndarray]:
        """Read what of `ids` is not in the cache, and yield the logits after each of the last ones, in chunks.

        Args:
            ids: token ids; as many as the window has at most.
            last: after how many of them logits are wanted, at least 1.
            cancelled: whether to stop before the next batch; what was read stays.
            on_progress: told before the first batch and after each.

        Yields:
            float32 (tokens, V).

        Raises:
            ResourceError: llama.cpp has no room to compute.
            Stopped: it was cancelled.
        """
        first = len(ids) - last
        known = self._rewind(min(common_prefix(self.ids, ids), first))
        mine = self.ids = list(ids[:known])
        on_progress(0, len(ids) - known, 0)
        for start in range(known, len(ids), self._batch):
            if cancelled():
                raise Stopped
            if self.ids is not mine:
                raise RuntimeError("this session has read something else in between")
            part = ids[start : start + self._batch]
            self._decode(part, first)
            on_progress(len(mine) - known, len(ids) - known, 0)
            if outputs := min(len(part), max(0, len(mine) - first)):
                yield self._logits(outputs).copy()

    def write(
        self,
        ids: Sequence[int],
        limit: int,
        sampling: Sampling,
        *,
        cancelled: Cancelled = never,
        on_progress: Progress = silent,
    ) -> Generator[int, None, str]:
        """Read `ids` and yield the tokens that follow.

        Args:
            ids: the prompt, one id or more; with `limit` it must fit the window.
            limit: how many tokens to write at most.
            sampling: how each is chosen; `stop` is for who makes text of them.
            cancelled: whether to stop before the next batch or token.
            on_progress: told after each batch and token.

        Returns:
            Why it ended: `stop` at an end token, `length` at the limit, or `cancelled`.

        Raises:
            GgufError: the logits are no numbers.
            OptionError: the grammar, or the biases, leave no token.
            ResourceError: llama.cpp has no room to compute.
        """
        text, mine, to_read = list(ids), None, 0

        def note(read: int, new: int, _: int) -> None:
            nonlocal to_read
            to_read = new
            on_progress(read, new, written)

        with Chooser(self.vocab, self.n_vocab, sampling, ids) as chooser:
            for written in range(limit):
                try:
                    if cancelled():
                        return "cancelled"
                    if self.ids is mine:
                        self._decode(text[-1:], len(mine))
                    else:
                        for _ in self.read(text, 1, cancelled=cancelled, on_progress=note):
                            pass
                        mine = self.ids
                except Stopped:
                    return "cancelled"
                token = self.choose(chooser, self._logits(1)[0])
                if token is None or self.is_end(token):
                    return "stop"
                text.append(token)
                on_progress(to_read, to_read, written + 1)
                yield token
        return "length"

    def choose(self, chooser: Chooser, logits: np.ndarray) -> int | None:
        """Return the next token; None where a grammar is fulfilled and the vocabulary has nothing to end with.

        Raises:
            GgufError: the logits are no numbers.
            OptionError: the grammar, or the biases, leave no token.
        """
        if math.isnan(logits.max()):
            raise GgufError(f"{self._name}: its logits are no numbers", "its weights may be damaged: copy it again")
        token = chooser.choose(logits)
        if token is None and any(map(self.is_end, range(self.n_vocab))):
            raise OptionError(
                f"{self._name}: its vocabulary has no token with which the text can go on here",
                "allow other texts by the grammar, or fewer biases",
            )
        return token

    def _decode(self, part: Sequence[int], first: int) -> None:
        """Read a batch behind what the cache holds, with logits of the positions from `first`."""
        at, count, library = len(self.ids), len(part), self._llama_cpp
        batch = library.llama_batch(  # without numbers of sequences it is that of sequence 0
            n_tokens=count,
            token=(library.llama_token * count)(*part),
            pos=(library.llama_pos * count)(*range(at, at + count)),
            logits=(ctypes.c_int8 * count)(*(position >= first for position in range(at, at + count))),
        )
        if compute(self._llama_cpp.llama_decode, self._context, batch, interrupted=self._interrupted) != 0:
            raise ResourceError(f"{self._name}: llama.cpp could not read a batch ({last_error()})")
        self.ids += part

    def _logits(self, outputs: int) -> np.ndarray:
        """Return the logits of the last batch (outputs, V), valid up to the next."""
        found = self._llama_cpp.llama_get_logits(self._context)
        values = (ctypes.c_float * (outputs * self.n_vocab)).from_address(ctypes.addressof(found.contents))
        return np.ctypeslib.as_array(values).reshape(outputs, -1)
