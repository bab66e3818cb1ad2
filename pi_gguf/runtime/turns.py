"""One at a time: a model is used by one thread at a time, the others wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Lets one thread in at a time. The one that is in may come in again, and what it began may end in another one.

    `threading.RLock` would not do: a generator that is not used up is closed by whoever lets go of it last.
    """

    def __init__(self) -> None:
        self._lock, self._owner, self._depth = threading.Lock(), 0, 0

    @contextmanager
    def __call__(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for the turn; give whether it came, before `cancelled` said that it is not wanted any more."""
        me = threading.get_ident()
        if self._owner != me:
            while not self._lock.acquire(timeout=0.05):
                if cancelled():
                    yield False
                    return
            self._owner = me
        self._depth += 1
        try:
            yield True
        finally:
            self._depth -= 1
            if not self._depth:
                self._owner = 0
                self._lock.release()
