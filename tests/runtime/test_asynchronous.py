"""Streams for coroutines: all the text, the result, errors, and an end of the work where nobody listens any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
from books import answer, document

import pi_gguf
from pi_gguf.errors import OptionError
from pi_gguf.runtime.asynchronous import Stream
from pi_gguf.runtime.reading import Reading


@pytest.fixture(scope="module")
def model(tiny_gguf):
    with pi_gguf.open(tiny_gguf, n_ctx=1024) as model:
        yield model


def threads() -> int:
    return sum(thread.name != "llama.cpp_0" for thread in threading.enumerate())


async def text_of(stream: Stream[Any]) -> str:
    async with stream as parts:
        return "".join([part async for part in parts])


def counting(ended: list[str], *, cancelled: Callable[[], bool]) -> Generator[str, None, str]:
    """Go on until it is stopped."""
    try:
        while not cancelled():
            yield "a"
        return "cancelled"
    finally:
        ended.append("ended")


def test_a_stream_is_the_text_and_the_result(model):
    book = Reading(model, document(150))
    expected = answer(book.ask("Who is it?", max_tokens=12))
    stream = Stream(book.ask, "Who is it?", max_tokens=12)
    assert asyncio.run(text_of(stream)) == expected.text == stream.result.text
    assert stream.result.tokens == 12


def test_two_at_once_are_both_right_and_the_loop_goes_on_meanwhile(model):
    questions = ("Once upon a time", "The captain looked at the sea and")
    expected = ["".join(model.complete(one, max_tokens=20)) for one in questions]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def both() -> list[str]:
        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*[text_of(Stream(model.complete, one, max_tokens=20)) for one in questions])
        ticking.cancel()
        return found

    assert asyncio.run(both()) == expected and ticks > 3


def test_an_error_is_raised_where_it_is_awaited(model):
    with pytest.raises(OptionError, match="do not fit the window"):
        asyncio.run(text_of(Stream(model.complete, "a", max_tokens=5000)))

    def breaking(*, cancelled: Callable[[], bool]) -> Generator[str, None, None]:
        yield "a"
        raise ZeroDivisionError

    async def two() -> None:
        async with Stream(breaking) as parts:
            assert await anext(parts.__aiter__()) == "a"
            await anext(parts.__aiter__())

    with pytest.raises(ZeroDivisionError):
        asyncio.run(two())


def test_who_leaves_early_ends_the_work(model):
    ended: list[str] = []

    async def leave() -> None:
        async with Stream(counting, ended) as parts:
            async for _ in parts:
                break
        assert ended == ["ended"]

    before = threads()
    asyncio.run(leave())
    assert threads() == before

    async def answer_left() -> None:
        async with Stream(model.complete, "Once", max_tokens=900) as parts:
            async for _ in parts:
                break

    asyncio.run(answer_left())
    assert "".join(model.complete("Once", max_tokens=5)), "the model is free again"


def test_a_cancelled_task_ends_the_work():
    ended: list[str] = []

    async def main() -> None:
        task = asyncio.create_task(text_of(Stream(counting, ended)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["ended"]

    asyncio.run(main())


def test_who_waits_for_a_turn_can_be_cancelled(model, never_a_hang):
    holding = model.complete("Once", max_tokens=50)
    next(holding)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(text_of(Stream(model.complete, "Once", max_tokens=5)), 0.3)

    asyncio.run(main())
    assert "".join(holding)


def test_a_stream_that_is_not_begun_does_nothing():
    ended: list[str] = []

    async def main() -> None:
        async with Stream(counting, ended):
            pass
        stream = Stream(counting, ended)
        async for _ in stream:  # without `async with`: left where the loop ends
            break

    asyncio.run(main())
    assert ended == ["ended"]
