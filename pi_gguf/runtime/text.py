"""Tokens -> text as it comes, up to a string that ends it."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Generator, Sequence

REPEATED, TIMES, PERIOD = 64, 4, 64
"""A text repeats itself when its last tokens, so many or more, are one stretch over and over, so often at least; a
stretch of so many tokens at most."""


class StopText:
    """Makes text of the bytes of tokens, up to the first of some strings.

    Held back is what may still become a character, or one of the strings. Bytes that are no UTF-8 are left out.

    Example:
        >>> text = StopText(["END"])
        >>> text.add(b"one E"), text.add(b"ND two"), text.ended
        ('one ', '', True)
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop, self._held, self.ended = stop, "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add(self, piece: bytes) -> str:
        """Return the text that is certain with one piece more."""
        held = self._held + self._decoder.decode(piece)
        found = [at for string in self._stop if (at := held.find(string)) >= 0]
        if found:
            self._held, self.ended = "", True
            return held[: min(found)]
        begun = max((_begun(held, string) for string in self._stop), default=0)
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]

    def rest(self) -> str:
        """Return what is held back: nothing more comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, string: str) -> int:
    """Return how many characters of `string` end `text`, not all."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def repeats(tokens: Sequence[int]) -> bool:
    """Tell whether a text ends in one stretch over and over.

    Example:
        >>> repeats([7, 1, 2, 3] * 20), repeats([7, 1, 2, 3] * 10)
        (True, False)
    """
    for period in range(1, PERIOD + 1):
        length = max(TIMES * period, REPEATED)
        if length <= len(tokens) and tokens[-1] == tokens[-1 - period]:
            tail = tokens[-length:]
            if tail[period:] == tail[:-period]:
                return True
    return False


def until_it_repeats(tokens: Generator[int, None, str]) -> Generator[int, None, str]:
    """Yield tokens as they come, up to where they are one stretch over and over; return `repeats` then, else why they
    ended. Where the most probable token is taken each time nothing else would follow."""
    written: list[int] = []
    with contextlib.closing(tokens):
        while not repeats(written):
            try:
                written.append(next(tokens))
            except StopIteration as end:
                return str(end.value)
            yield written[-1]
    return "repeats"


def stream(
    tokens: Generator[int, None, str], piece: Callable[[int], bytes], stop: Sequence[str] = ()
) -> Generator[str, None, str]:
    """Yield the text of tokens as it comes, and return why it ended, `stop` where a string of `stop` came.

    Args:
        tokens: as `Session.write` yields them; closed in any case.
        piece: gives a token's bytes.
        stop: strings that end the text.
    """
    text, why = StopText(stop), "stop"
    with contextlib.closing(tokens):
        while not text.ended:
            try:
                token = next(tokens)
            except StopIteration as end:
                why = end.value
                break
            if part := text.add(piece(token)):
                yield part
    if rest := text.rest():
        yield rest
    return why
