"""Progress and messages on standard error: bars with time left on a terminal, silence elsewhere."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Advance = Callable[..., None]
"""Called with the work done since the last call, and optionally `text=` to show beside the bar."""


@contextmanager
def progress_bar(title: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show a bar for work of `total` units, with rate and time left.

    Args:
        title: what is being done.
        total: amount of work; None where it is not known.
        unit: `bytes`, or the plural of what is counted.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = [TextColumn("{task.description}"), BarColumn(), *amount]
    times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
    with Progress(
        *columns, *times, console=Console(stderr=True), disable=process_rank() > 0 or not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(amount: float = 1, text: str | None = None) -> None:
            fields: dict[str, Any] = {} if text is None else {"text": text}
            bar.update(task, advance=amount, **fields)

        yield advance


def say(message: str) -> None:
    """Print a line for the user on standard error; of many processes the first one speaks."""
    if process_rank() == 0:
        with suppress(OSError):  # a full standard error ends no work
            print(message, file=sys.stderr, flush=True)


def stage(text: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say what a function does, to whoever sees it crash in native code.

    Args:
        text: with its arguments in braces, e.g. "check {path}".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def staged(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            result: R = named_frame(text.format(**given), function, *args, **kwargs)
            return result

        return staged

    return decorate


def named_frame(text: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function with a text on the stack: all that faulthandler can print when the process is dying is names."""
    code = _call.__code__.replace(co_filename=f"crashed while: {text}")
    return FunctionType(code, {})(function, args, kwargs)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def process_rank() -> int:
    """Return the number of this process among those that torchrun or accelerate launch started, from 0."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes they started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
