"""The same for programs made of coroutines: a model's work goes on in a thread, its text comes as it is written.

In: a function that makes a generator, as `Model.complete`, `Model.chat` and `Reading.ask` are. Out: an asynchronous
one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Stream(Generic[T]):
    """The text of a generator that runs in a thread of its own. Iterate it; leaving early stops the work.

    Args:
        make: as `Model.complete`; it takes `cancelled`.
        args: its arguments.
        keywords: its keywords.

    Example:
        >>> async def show(book):  # doctest: +SKIP
        ...     async with Stream(book.ask, "Who keeps the lighthouse?") as parts:
        ...         async for part in parts:
        ...             print(part, end="")
        ...     print(parts.result.quotes)
    """

    def __init__(self, make: Callable[..., Generator[str, None, T]], *args: Any, **keywords: Any) -> None:
        self._make, self._args, self._keywords = make, args, keywords
        self._stop, self._parts = threading.Event(), self._run()
        self.result: T | None = None
        """What the generator returned, when it is used up."""

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    def __aiter__(self) -> AsyncGenerator[str, None]:
        return self._parts

    async def _run(self) -> AsyncGenerator[str, None]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(kind: str, value: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (kind, value))

        def work() -> None:
            try:
                parts = self._make(*self._args, cancelled=self._stop.is_set, **self._keywords)
                while True:
                    put("part", next(parts))
            except StopIteration as end:
                put("end", end.value)
            except BaseException as error:
                put("error", error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                kind, value = await queue.get()
                if kind == "error":
                    raise value
                if kind == "end":
                    self.result = value
                    return
                yield value
        finally:
            self._stop.set()
            await asyncio.to_thread(thread.join)
