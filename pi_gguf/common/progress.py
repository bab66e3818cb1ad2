"""Progress and messages on standard error: bars with time left on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any, ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Advance = Callable[..., None]
"""Called with the work done since the last call, and optionally `text=` to show beside it, or `earlier=True` where it
was done before this process began and tells nothing of the speed."""

KINDS = ("bar", "plain", "none")
"""How progress is shown: drawn, in lines, not at all."""

FIRST_SECONDS = 1.0
"""After which work that is not over has its first line."""

LINE_SECONDS = 30.0
"""Between two more lines of it."""


@contextmanager
def output(progress: str | None = None, quiet: bool = False) -> Iterator[None]:
    """Choose what is said on standard error while this is open.

    Args:
        progress: one of `KINDS`; None is a bar on a terminal, lines elsewhere.
        quiet: neither progress nor messages.
    """
    global _progress, _quiet, _lines
    before = _progress, _quiet, _lines
    _progress, _quiet, _lines = "none" if quiet else progress, quiet, Lines()
    try:
        yield
    finally:
        _progress, _quiet, _lines = before


@contextmanager
def progress_bar(title: str, total: float | None, unit: str, costs: Sequence[float] = ()) -> Iterator[Advance]:
    """Show how work of `total` units goes on, with time left: in a bar or in lines.

    Args:
        title: what is being done.
        total: amount of work; None where it is not known.
        unit: `bytes`, or the plural of what is counted; empty where nothing is.
        costs: of each unit in its order, where they differ; the time left follows them.
    """
    kind = "none" if process_rank() > 0 else _progress or ("bar" if sys.stderr.isatty() else "plain")
    if kind == "none":
        yield lambda amount=1, text=None, earlier=False: None
    else:
        with (_bar if kind == "bar" else _plain)(Work(title, total, unit, time.monotonic(), costs)) as advance:
            yield advance


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Say what is being done where that takes longer than a moment, and nothing tells how much of it is done."""
    with progress_bar(visible(title), None, ""):
        yield


@contextmanager
def _bar(work: Work) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount: list[Any] = [TextColumn("{task.fields[amount]}")]
    if work.unit == "bytes":
        amount = [DownloadColumn(), TransferSpeedColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TextColumn("left")]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
    if not work.unit:
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
    asked = True if _progress == "bar" else None  # for, whatever standard error is
    console = Console(stderr=True, force_terminal=asked)
    with aside(), Progress(*columns, console=console, transient=not work.unit) as bar:
        total = None if work.total is None else work.cost(work.total)
        task = bar.add_task(work.title, total=total, text="", amount=work.amount())

        def advance(amount: float = 1, text: str | None = None, earlier: bool = False) -> None:
            work.advance(time.monotonic(), amount, text, earlier)
            bar.update(task, completed=work.cost(work.done), text=work.text, amount=work.amount())

        _drawn.append(bar)
        try:
            yield advance
        finally:
            _drawn.remove(bar)


@contextmanager
def aside() -> Iterator[None]:
    """Let nothing be drawn here while something else draws: work inside other work, or another library."""
    outer = _drawn[-1] if _drawn else None
    if outer:
        outer.stop()
    try:
        yield
    finally:
        if outer:
            outer.start()


@contextmanager
def _plain(work: Work) -> Iterator[Advance]:
    """Print lines from a thread, as a single step may take many times as long as there is between two of them."""
    lines, stream, stop = _lines, sys.stderr, threading.Event()
    lines.begin(work)

    def speak() -> None:
        while not stop.wait(max(0.01, min(FIRST_SECONDS, lines.due - time.monotonic()))):
            line = lines.tick(time.monotonic())
            if line:
                _print(line, stream)

    def advance(amount: float = 1, text: str | None = None, earlier: bool = False) -> None:
        work.advance(time.monotonic(), amount, text, earlier)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield advance
    finally:
        lines.end(work)
        stop.set()
        speaker.join(1)  # it may wait for a pipe that is full
    if work.spoken and work.unit:  # the next line says that a phase is over
        _print(work.last_line(time.monotonic()), stream)


class Work:
    """Work that goes on, as a line says it; times are seconds of any one clock.

    Args:
        title: what is being done.
        total: amount of work; None where it is not known.
        unit: `bytes`, or the plural of what is counted; empty where nothing is.
        now: when it begins.
        costs: of each unit in its order, where they differ.
    """

    def __init__(self, title: str, total: float | None, unit: str, now: float, costs: Sequence[float] = ()) -> None:
        self.title, self.total, self.unit, self.text = title, total, unit, ""
        self._sums = [0.0, *itertools.accumulate(costs)]
        self.spoken = False
        self.begun = self._at = now
        self.done = 0.0
        self._samples = deque([(now, 0.0)], maxlen=60)  # at least a second apart
        self._lock = threading.Lock()

    def advance(self, now: float, amount: float = 1, text: str | None = None, earlier: bool = False) -> None:
        """Count work that was done; of `earlier` work nothing follows for the time left."""
        with self._lock:
            self.done += amount
            self._at = now
            self.text = self.text if text is None else text
            if earlier:
                self._samples.clear()
            if not self._samples or now - self._samples[-1][0] >= 1:
                self._samples.append((now, self.cost(self.done)))

    def line(self, now: float) -> str:
        """Return what is done, and about how long the rest takes; how long it took so far where that is not known."""
        with self._lock:
            left, so_far = self._seconds_left(now), now - self.begun
            times = f"{duration(left)} left" if left >= 1 else f"{duration(so_far)} so far" if so_far >= 2 else ""
            return self._said(times)

    def last_line(self, now: float) -> str:
        return self._said(f"in {duration(now - self.begun)}")

    def _seconds_left(self, now: float) -> float:
        """Return the time left at the speed of the last minute or the last 60 steps, whichever is longer; or 0."""
        begun, before = self._samples[0]
        spent = self.cost(self.done)
        if self.total is None or spent <= before or self._at <= begun:
            return 0.0
        return (self.cost(self.total) - spent) * (self._at - begun) / (spent - before) - (now - self._at)

    def cost(self, done: float) -> float:
        """Return what so many units cost: each the same, unless it is known."""
        return self._sums[min(int(done), len(self._sums) - 1)] if len(self._sums) > 1 else done

    def amount(self) -> str:
        """Return how much is done, of how much, with the unit."""
        size, unit = 1, self.unit
        if unit == "bytes":
            largest = self.done if self.total is None else self.total
            size, unit = next(((n, name) for n, name in _SIZES if largest >= n), (1, unit))
        numbers = [self.done] if self.total is None else [self.done, self.total]
        return f"{'/'.join(f'{number / size:.{0 if size == 1 else 1}f}' for number in numbers)} {unit}"

    def _said(self, times: str) -> str:
        what = f"{self.title} {self.amount()}" if self.unit else self.title
        return ", ".join(part for part in (what, self.text, times) if part)


_SIZES = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class Lines:
    """When lines are due: the first `FIRST_SECONDS` after work begins, then one each `LINE_SECONDS`, of the work begun
    last; what is over sooner says nothing.

    Pieces of work of one name that follow each other count as one.
    """

    def __init__(self) -> None:
        self._running: list[Work] = []
        self._last, self._title = -LINE_SECONDS, ""
        self._lock = threading.Lock()

    @property
    def due(self) -> float:
        """When the next line is."""
        with self._lock:
            return self._due()

    def _due(self) -> float:
        if not self._running:
            return math.inf
        work = self._running[-1]
        begun = max(work.begun, self._last)
        if work.spoken or work.title == self._title:
            return max(begun + FIRST_SECONDS, self._last + LINE_SECONDS)
        return begun + FIRST_SECONDS

    def begin(self, work: Work) -> None:
        with self._lock:
            self._running.append(work)

    def tick(self, now: float) -> str | None:
        """Return the line that is due, if one is."""
        with self._lock:
            if now < self._due():
                return None
            work = self._running[-1]
            self._last, self._title, work.spoken = now, work.title, True
            return work.line(now)

    def end(self, work: Work) -> None:
        with self._lock:
            self._running.remove(work)


_progress: str | None = None
_quiet = False
_lines = Lines()
"""What `output` chooses."""
_drawn: list[Any] = []
"""Displays of rich that are open, the innermost last: it alone draws."""


def duration(seconds: float) -> str:
    """Write a duration in few characters."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def say(message: str) -> None:
    """Print a line for the user on standard error; of many processes the first one speaks."""
    if process_rank() == 0 and not _quiet:
        _print(visible(message), sys.stderr)


def visible(text: str, besides: str = "\n\t") -> str:
    """Return a text with its control codes written out: documents, models and names of files are of strangers."""
    return "".join(c if c.isprintable() or c in besides else c.encode("unicode_escape").decode() for c in text)


def _print(line: str, stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # a full or closed standard error ends no work
        print(line, file=stream, flush=True)


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


def local_process_count() -> int:
    """Return how many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or process_count())
