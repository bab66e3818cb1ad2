"""Many texts at a time in one context of llama.cpp: continuous batching.

In: jobs, each a prompt and how it goes on. Out: events, as text comes. One thread reads batch after batch; each has the
next token of every text that is written, and behind these as much as has room of what is still to be read. So a long
prompt does not stop an answer, and what two texts have in common from their beginning is read and stored once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pi_gguf.engine.jobs import Choice, Ended, Event, Figures, Job, PromptScored, QueueFull, Read, Written
from pi_gguf.errors import OptionError, PiGgufError, ResourceError, TextError
from pi_gguf.measure.language_model import common_prefix
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.sampling import Chooser
from pi_gguf.runtime.sequence import CachedSequence
from pi_gguf.runtime.session import TooLong
from pi_gguf.runtime.states import States
from pi_gguf.runtime.text import StopText

T = TypeVar("T")

QUEUE = 64
"""Jobs that wait at most."""

BESIDE = 2
"""Sequences beside the slots: one in which documents are read in the background, one that copies what is kept."""

_AHEAD = 64
"""Tokens of an answer for which the cache must have room before it begins; more may have to wait for others to end."""


# How far a job is


@dataclass(eq=False)
class _Slot:
    """A sequence of the context, and whose it is.

    Args:
        sequence: it.
        cells: a number for each place of the cache that it holds; two sequences that share a place have one in common.
        work: what it is used for now.
        used: when it was given or left.
        left: how many tokens had been written by all then.
    """

    sequence: CachedSequence
    cells: list[int] = field(default_factory=list)
    work: _Work | None = None
    used: float = 0.0
    left: int = 0


@dataclass(eq=False)
class _Work:
    """A job on its way.

    Args:
        job: it.
        tell: what is called with each event, or the error that ends it, from the engine's thread.
        chooser: chooses its tokens.
        asked: when.
    """

    job: Job
    tell: Callable[[Event | Exception], None]
    chooser: Chooser
    asked: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    slot: _Slot | None = None
    admitted: int = 0
    known: int | None = None
    written: int = 0
    began: float = 0.0
    first: float = 0.0
    ids: list[int] = field(init=False)
    text: StopText = field(init=False)
    scored: list[Choice | None] = field(init=False)

    def __post_init__(self) -> None:
        self.ids, self.text, self.scored = list(self.job.ids), StopText(self.job.sampling.stop), [None]

    @property
    def wanted(self) -> list[int]:
        """What the cache may hold of it: not the last token, after which the next is chosen."""
        if self.job.prompt_top is not None and not self.written:
            return []  # each of its tokens is to be scored
        return self.ids[:-1] if self.job.limit else self.ids

    @property
    def done(self) -> int:
        """How many of its tokens are in the cache."""
        return len(self.slot.sequence.ids) if self.slot else 0

    def ended(self, why: str) -> Ended:
        now = time.perf_counter()
        first = self.first or now
        began = self.began or now
        return Ended(
            why, len(self.job.ids), self.known or 0, self.written, first - began, now - first, first - self.asked
        )


_SINGLE = 20
"""An operation of attention, for one token after the other, takes as long on a CPU as so many of those by which a batch
is read (docs/log.md)."""


class Engine:
    """Reads and writes many texts at a time with one model, which is the engine's while it runs.

    Use it as a context manager, or call `close`; it ends with its model, too.

    Args:
        model: opened with `BESIDE` sequences more than texts are worked on at a time.
        states: where documents are kept; None keeps nothing.
        queue: jobs that may wait.
        log: told prompt and text of each that ended; None tells nobody.
    """

    def __init__(
        self, model: Model, *, states: States | None = None, queue: int = QUEUE,
        log: Callable[[str, str], None] | None = None,
    ) -> None:  # fmt: skip
        if len(model.sequences) <= BESIDE:
            raise OptionError(f"the model must be opened with {BESIDE + 1} sequences or more")
        self.model, self.states, self._queue, self._log = model, states, queue, log
        *mine, self._spare = model.sequences
        self._slots = [_Slot(sequence) for sequence in mine]
        self.slots = len(self._slots) - 1  # the last one is for the background
        self._batch = model.batch()
        self._waiting: deque[_Work] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._figures = Figures(self.slots, cache_tokens=model.n_ctx)
        self._numbers, self._orders = itertools.count(), itertools.count(1)
        self._lasting = 1.0
        """Seconds that a job takes, about."""
        self._patience = round(model.reading_cost(0, 1) / (_SINGLE * model.attention_cost()))
        """Tokens that others write until what an idle sequence holds has slowed them by as much as reading it takes."""
        self._closing = False
        self._awake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        model.users.append(self.close)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what goes on, as if it were cancelled, and let go of the model; once more does nothing."""
        with self._awake:
            self._closing = True
            self._awake.notify()
        self._thread.join()
        if self.close in self.model.users:
            self.model.users.remove(self.close)

    # Asked from other threads

    def check(self, what: str, tokens: int, max_tokens: int | None) -> int:
        """Return how many tokens are left behind a prompt.

        Raises:
            OptionError: `max_tokens` is none.
            TextError: there is no token.
            TooLong: prompt and `max_tokens` do not fit the window; nothing is ever cut.
        """
        if max_tokens is not None and max_tokens < 0:
            raise OptionError(f"max_tokens must be at least 0, got {max_tokens}")
        if tokens == 0:
            raise TextError(f"{what} without a token", "write some")
        window, writing = self.model.n_ctx, 1 if max_tokens is None else max_tokens
        if tokens + writing > window:
            raise TooLong(what, tokens, writing, window, f"shorten it by {tokens + writing - window} tokens")
        return window - tokens

    async def run(self, job: Job) -> AsyncGenerator[Event, None]:
        """Do a job, and yield what comes of it; the last event is `Ended`. Leaving early frees its place.

        Raises:
            GgufError: the logits are no numbers.
            OptionError: grammar or biases leave no token.
            QueueFull: too many wait.
            ResourceError: llama.cpp has no room to compute.
            TooLong: it does not fit the window.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()

        def tell(event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed in between
                loop.call_soon_threadsafe(told.put_nowait, event)

        self._check_enters(job)
        chooser = partial(Chooser, self.model.session.vocab, self.model.n_vocab, job.sampling, job.ids)
        made = await asyncio.to_thread(chooser) if job.sampling.gbnf else chooser()  # grammars take their time
        work = self._enter(job, tell, made)
        try:
            while True:
                event = await told.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self._leave(work)

    def _check_enters(self, job: Job) -> None:
        """Check that a job fits, and the queue has room for it."""
        self.check("a prompt", len(job.ids), job.limit)
        with self._awake:
            if self._closing:
                raise ResourceError("the server ends", "start it again")
            if len(self._waiting) >= self._queue and not job.background:
                raise QueueFull(len(self._waiting), self._retry_after())

    def _enter(self, job: Job, tell: Callable[[Event | Exception], None], chooser: Chooser) -> _Work:
        work = _Work(job, tell, chooser)
        with self._awake:
            if self._closing:
                chooser.close()
                raise ResourceError("the server ends", "start it again")
            self._waiting.append(work)
            self._figures.requests += 1
            self._awake.notify()
        return work

    def _retry_after(self) -> int:
        return max(1, min(60, round(self._lasting * len(self._waiting) / self.slots)))

    def _leave(self, work: _Work) -> None:
        with self._awake:
            work.cancelled = True
            self._awake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two batches, in the engine's thread."""
        future: Future[T] = Future()
        with self._awake:
            if self._closing:
                raise ResourceError("the server ends", "start it again")
            self._calls.append((future, function))
            self._awake.notify()
        return future

    def figures(self) -> Figures:
        """Return what was done, and is done now."""
        with self._awake:
            now = Figures(**vars(self._figures))
            now.busy, now.waiting = sum(slot.work is not None for slot in self._slots), len(self._waiting)
            now.cache_used = len(set().union(*(slot.cells for slot in self._slots)))
        return now

    def known(self, ids: Sequence[int]) -> int:
        """Return how many of `ids` some sequence holds from their beginning."""
        return max(slot.sequence.known(ids) for slot in self._slots)

    def held(self, ids: Sequence[int], use: Callable[[CachedSequence, int], T]) -> T:
        """Give a function a sequence that holds just as many of `ids` as are known, and that number; by `call` only."""
        best = max(self._slots, key=lambda slot: slot.sequence.known(ids)).sequence
        known, source = best.known(ids), best
        if known < len(best.ids):
            known, source = self._spare.copy(best, known), self._spare
        try:
            return use(source, known)
        finally:
            self._spare.clear()

    def saved(self, ids: Sequence[int]) -> tuple[int, np.ndarray]:
        """Return how many of `ids` are held, and the state after them as llama.cpp saves it; by `call` only."""
        return self.held(ids, _saved)

    # The engine's own thread

    def _run(self) -> None:
        with self.model.turns():
            for sequence in self.model.sequences:
                sequence.clear()
            while True:
                with self._awake:
                    while not (self._closing or self._calls or self._waiting or self._busy()):
                        self._awake.wait()
                    calls, closing = [self._calls.popleft() for _ in range(len(self._calls))], self._closing
                self._drop_cancelled()
                for future, function in calls:
                    _answer(future, function)
                if closing:
                    break
                try:
                    self._drop_cancelled()  # while these were answered
                    self._admit()
                    self._step()
                except Exception as error:
                    self._fail(error)
            self._end_all()

    def _busy(self) -> list[_Work]:
        """The jobs that have a slot, in the order in which they got it."""
        return sorted((slot.work for slot in self._slots if slot.work), key=lambda work: work.admitted)

    def _end_all(self) -> None:
        with self._awake:
            left, calls = [*self._busy(), *self._waiting], list(self._calls)
            self._waiting.clear()
        for work in left:
            self._finish(work, "cancelled")
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ResourceError("the server ends", "start it again"))
        for slot in self._slots:
            slot.sequence.clear()

    def _fail(self, error: Exception) -> None:
        """End all that goes on: what the cache holds is not known any more."""
        for work in self._busy():
            self._lose(work, error)
        for slot in self._slots:
            slot.sequence.clear()
            slot.cells = []

    def _lose(self, work: _Work, error: Exception) -> None:
        self._free(work)
        work.chooser.close()
        self._figures.failed += 1
        work.tell(error)

    def _drop_cancelled(self) -> None:
        with self._awake:
            gone = [work for work in self._waiting if work.cancelled]
            self._waiting = deque(work for work in self._waiting if not work.cancelled)
        for work in [*gone, *(work for work in self._busy() if work.cancelled)]:
            self._finish(work, "cancelled")

    def _free(self, work: _Work) -> None:
        """Take a job off its slot, which keeps what was read."""
        if slot := work.slot:
            slot.work, slot.used, work.slot = None, time.monotonic(), None
            slot.left = self._figures.written_tokens

    def _finish(self, work: _Work, why: str) -> None:
        self._free(work)
        work.chooser.close()
        ended, figures = work.ended(why), self._figures
        figures.cancelled += why == "cancelled"
        figures.read_seconds += ended.read_seconds
        figures.write_seconds += ended.write_seconds
        if not work.job.background:
            self._lasting += 0.2 * (ended.read_seconds + ended.write_seconds - self._lasting)
        work.tell(ended)
        if self._log and not work.job.background:
            at = len(work.job.ids)
            self._log(self.model.detokenize(work.ids[:at]), self.model.detokenize(work.ids[at:]))

    # Who gets a sequence

    def _admit(self) -> None:
        """Give the jobs that wait a slot, as far as there are slots and the cache has room."""
        while work := self._next():
            try:
                slot = self._place(work)
                while slot is None and not work.job.background and self._pause_background():
                    slot = self._place(work)
            except Exception as error:  # of this job alone
                with self._awake:
                    self._waiting.remove(work)
                self._lose(work, error)
                continue
            if slot is None:
                return
            with self._awake:
                self._waiting.remove(work)
            work.slot, slot.work, work.admitted = slot, work, next(self._orders)
            work.began = work.began or time.perf_counter()
            if work.known is None:
                self._figures.known_tokens += work.done
            work.known = min(work.done, work.done if work.known is None else work.known)
            work.tell(Read(0, len(work.ids) - work.done, work.done))
            if work.done == len(work.ids):
                self._finish(work, "length")

    def _next(self) -> _Work | None:
        with self._awake:
            return min(self._waiting, key=lambda work: work.job.background, default=None)

    def _place(self, work: _Work) -> _Slot | None:
        """Return a slot that holds as much of a job as is known; None while there is none, or no room in the cache."""
        mine = self._slots[-1:] if work.job.background else self._slots[:-1]
        free = [slot for slot in mine if slot.work is None]
        if not free:
            return None
        wanted = work.wanted
        best = max(self._slots, key=lambda slot: (slot.sequence.known(wanted), slot in free))
        common = best.sequence.known(wanted)
        if not self._has_room(work, best.cells[:common]):
            return None
        if best in free and 2 * common >= len(best.sequence.ids) > 0:
            target = best
        else:  # what others may ask for again is left as it is, as far as there are other slots
            others = [slot for slot in free if slot is not best] or free
            target = min(others, key=lambda slot: (bool(slot.sequence.ids), slot.used))
        if target is best:
            target.sequence.rewind(common)
            target.cells = target.cells[: len(target.sequence.ids)]
        elif common:
            target.cells = best.cells[: target.sequence.copy(best.sequence, common)]
        else:
            target.sequence.clear()
            target.cells = []
        if work.job.kept:
            self._restore(target, wanted)
        need = self._promised(self._busy(), work) - len(target.cells)
        while self._used() + need > self.model.n_ctx and self._drop_idle({target}):
            pass
        return target

    def _has_room(self, work: _Work, known: list[int]) -> bool:
        """Tell whether the cache has room for a job, of which it holds some cells, beside all that goes on."""
        busy = self._busy()
        held: set[int] = set(known).union(*(other.slot.cells for other in busy if other.slot))
        return not busy or len(held) + self._promised(busy, work) - len(known) <= self.model.n_ctx

    def _promised(self, busy: list[_Work], work: _Work) -> int:
        """Return the places that jobs still take beside those they hold, and all that a new one takes."""
        ahead = _AHEAD + len(work.ids) // self._batch.size  # what the others write while it is read
        return sum(_need(other, ahead) - other.done for other in busy) + _need(work, _AHEAD)

    def _used(self) -> int:
        return len(set().union(*(slot.cells for slot in self._slots)))

    def _drop_idle(self, spared: set[_Slot]) -> bool:
        """Empty the sequence that nobody has used for longest; False where none is left."""
        idle = [slot for slot in self._slots if slot.work is None and slot.cells and slot not in spared]
        if not idle:
            return False
        slot = min(idle, key=lambda slot: slot.used)
        slot.sequence.clear()
        slot.cells = []
        return True

    def _drop_stale(self) -> None:
        """Empty idle sequences that have cost by now what they could save: each token looks at all that is held."""
        written = self._figures.written_tokens
        for slot in self._slots:
            if slot.work is None and slot.cells and written - slot.left > self._patience:
                slot.sequence.clear()
                slot.cells = []

    def _restore(self, slot: _Slot, wanted: Sequence[int]) -> None:
        """Bring back what is kept on disk, where that is more than the sequence holds."""
        if self.states is None or len(slot.sequence.ids) >= len(wanted):
            return
        with self.states.longest(self.model.identity, wanted, self.model.n_ctx) as found:
            if not found or common_prefix(found.ids, wanted) <= len(slot.sequence.ids):
                return
            slot.sequence.clear()
            slot.cells = []
            while self._used() + len(found.ids) > self.model.n_ctx and self._drop_idle({slot}):
                pass
            if slot.sequence.restore(found.state, found.ids):
                slot.sequence.rewind(common_prefix(found.ids, wanted))
            slot.cells = self._cells(len(slot.sequence.ids))

    def _cells(self, count: int) -> list[int]:
        return list(itertools.islice(self._numbers, count))

    def _pause_background(self) -> bool:
        """Let a job in the background wait again, for one that is not; what it has read stays while there is room."""
        background = [work for work in self._busy() if work.job.background]
        if background:
            self._wait_again(background[-1])
        return bool(background)

    def _wait_again(self, work: _Work) -> None:
        self._free(work)
        self._figures.preempted += 1
        if not work.written:
            work.scored = [None]  # read again from the start, where its tokens are scored
        with self._awake:
            self._waiting.appendleft(work)

    # One batch

    def _step(self) -> None:
        """Read a batch: a token of each text that is written, and of the others what has room."""
        self._drop_stale()
        self._batch.clear()
        parts: list[tuple[_Work, int, int]] = []  # with the place of the first logits, and how many there are
        busy = self._busy()
        for work, count in _shares(busy, self._batch.size):
            part = work.ids[work.done : work.done + count]
            if not part or not work.slot:
                continue
            at_end = work.done + len(part) == len(work.ids)
            outputs = len(part) if work.job.prompt_top is not None and not work.written else int(at_end)
            parts.append((work, self._batch.add(work.slot.sequence, part, outputs), outputs))
        if not parts:
            return
        if not self._batch.read():
            self._make_room(busy)
            return
        self._figures.batches += 1
        for work, place, outputs in parts:
            self._take(work, place, outputs)

    def _make_room(self, busy: list[_Work]) -> None:
        """Empty an idle sequence, or let the youngest job wait: it will read again what was read of it."""
        if self._drop_idle(set()):
            return
        if len(busy) < 2:
            raise ResourceError(f"{self.model.path.name}: llama.cpp's cache has no room for a batch")
        work = max(busy, key=lambda work: (work.job.background, work.admitted))
        slot = work.slot
        self._wait_again(work)
        if slot:
            slot.sequence.clear()
            slot.cells = []

    def _take(self, work: _Work, place: int, outputs: int) -> None:
        """Take what a batch gave a job."""
        assert work.slot
        before = len(work.slot.cells)
        work.slot.cells += self._cells(work.done - before)
        reading = before < len(work.job.ids) and not work.written
        if reading:
            self._figures.read_tokens += work.done - before
            known = work.known or 0
            work.tell(Read(work.done - known, len(work.job.ids) - known, known))
        try:
            if reading and work.job.prompt_top is not None:
                self._score(work, before, place, outputs)
            if work.done < len(work.ids):
                return
            if work.job.limit == 0:
                self._finish(work, "length")
                return
            self._write(work, self._batch.logits(place + outputs - 1))
        except PiGgufError as error:
            self._lose(work, error)

    def _write(self, work: _Work, logits: np.ndarray) -> None:
        """Choose the next token, and tell it."""
        session = self.model.session
        token = session.choose(work.chooser, logits)
        work.first = work.first or time.perf_counter()
        if token is None or session.is_end(token):
            if token is not None and work.job.top is not None:
                work.tell(Written("", (self._choice(token, logits, work.job.top, work.job.special),)))
            self._tell_rest(work, "stop")
            return
        work.ids.append(token)
        work.written += 1
        self._figures.written_tokens += 1
        piece = session.piece(token, work.job.special)
        text = work.text.add(piece)
        choices = () if work.job.top is None else (self._choice(token, logits, work.job.top, work.job.special),)
        if text or choices:
            work.tell(Written(text, choices))
        if work.text.ended:
            self._finish(work, "stop")
        elif work.written >= work.job.limit:
            self._tell_rest(work, "length")

    def _tell_rest(self, work: _Work, why: str) -> None:
        if rest := work.text.rest():
            work.tell(Written(rest))
        self._finish(work, why)

    def _score(self, work: _Work, before: int, place: int, outputs: int) -> None:
        """Score the tokens of a prompt of which a batch has the logits before them."""
        top = work.job.prompt_top or 0
        for i in range(outputs):
            if before + i + 1 < len(work.job.ids):
                logits = self._batch.logits(place + i)
                work.scored.append(self._choice(work.job.ids[before + i + 1], logits, top, special=True))
        if len(work.scored) == len(work.job.ids):
            work.tell(PromptScored(tuple(work.scored)))

    def _choice(self, token: int, logits: np.ndarray, top: int, special: bool) -> Choice:
        piece, most = self.model.session.piece, float(logits.max())
        total = most + math.log(np.exp(logits - most).sum(dtype=np.float64))
        first = np.argpartition(logits, -top)[-top:] if 0 < top < len(logits) else np.arange(min(top, len(logits)))
        ordered = first[np.argsort(-logits[first], kind="stable")]
        return Choice(
            token, piece(token, special), float(logits[token]) - total,
            tuple((int(i), piece(int(i), special), float(logits[i]) - total) for i in ordered),
        )  # fmt: skip


def _saved(sequence: CachedSequence, known: int) -> tuple[int, np.ndarray]:
    state = np.empty(sequence.state_bytes() if known else 0, np.uint8)
    if known and sequence.save(state) != len(state):
        raise ResourceError("llama.cpp does not give its state")
    return known, state


def _need(work: _Work, ahead: int) -> int:
    """Return how many tokens the cache must have room for, so many of the answer among them."""
    return len(work.ids) + min(work.job.limit - work.written, ahead)


def _shares(busy: Sequence[_Work], room: int) -> list[tuple[_Work, int]]:
    """Return how many tokens of each job go into a batch.

    The next token of each text that is written; then what is shortest to read, so that a short question does not wait
    for a long one, of which a quarter of the room is kept for the first that came. What is read in the background gets
    what is left.

    Args:
        busy: jobs with a slot, in the order in which they got it.
        room: tokens of a batch.
    """
    left = {work: len(work.ids) - work.done for work in busy}
    shares = {work: 1 for work in busy if left[work] == 1}
    room -= len(shares)
    reading = sorted(set(busy) - set(shares), key=lambda work: (work.job.background, left[work], work.admitted))
    first = min(reading, key=lambda work: (work.job.background, work.admitted), default=None)
    kept = min(left[first], room // 4) if first else 0
    for work in reading:
        its = kept if work is first else 0
        shares[work] = min(left[work], room - kept + its)
        room, kept = room - shares[work], kept - its
    return list(shares.items())


def _answer(future: Future[Any], function: Callable[[], Any]) -> None:
    """Run a function, and give its result, or what it raises, to who waits for it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
