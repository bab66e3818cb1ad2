"""Documents that one model has read, or reads while it answers: given once, asked about at any time, also tomorrow.

In: bytes of a document. Out: what of it is read, conversations about it as tokens, quotations, and where the model
looked. One document is read at a time, behind all answers, or before the one that asks about it. All of this is used
from one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pi_gguf.common.progress import say
from pi_gguf.documents.apart import read_apart
from pi_gguf.documents.formats import Document
from pi_gguf.documents.quotes import find_quotes
from pi_gguf.engine.engine import Engine
from pi_gguf.engine.jobs import Ended, Event, Job, Read
from pi_gguf.engine.stored import Head, Stored, document_id
from pi_gguf.errors import OptionError, PiGgufError, ResourceError, one_line
from pi_gguf.llamacpp.watch import Watch
from pi_gguf.runtime.chat import conversation_ids
from pi_gguf.runtime.looked import answer_ids, check_scores, look
from pi_gguf.runtime.reading import ROOM, DocumentTooLong, Reading, reach, trust
from pi_gguf.runtime.sequence import CachedSequence
from pi_gguf.runtime.session import Cancelled, Session
from pi_gguf.runtime.states import States

_LEAST_SECONDS, _SHARE = 10.0, 0.05
"""What was read is kept on the way after so many seconds, if keeping it takes no more than this share of them."""

_SHOWN = 20_000
"""Characters of a document that are given at a time."""

_TAKEN = 2
"""Documents that are taken at a time: each takes a process and a thread."""

FINAL = ("kept", "unread", "failed")
"""What a document is when nothing happens to it."""


class UnknownDocument(PiGgufError):
    """There is no document of this name."""

    def __init__(self, id: str) -> None:
        super().__init__(f"no document {id[:60]!r}", "GET /v1/documents lists those there are")


@dataclass(frozen=True)
class Entry:
    """A document as the library has it.

    Args:
        id: its name here.
        name: of its file.
        format: txt, md, html, pdf, docx or epub.
        characters: of its text.
        tokens: with what stands around it; 0 where that is not known yet.
        window: that the model was opened for.
        room: tokens left for a question and its answer.
        status: waiting, reading, kept (asked about at once), unread (it is read when it is asked about) or failed.
        read: tokens read so far.
        known: of these not read now: they were kept.
        seconds_left: about how long reading the others takes; 0 where that is not known.
        kept_bytes: on disk.
        added: seconds since 1970.
        used: when it was asked about last.
        error: why it failed.
        trust: how far the file's window was measured to reach.
    """

    id: str
    name: str
    format: str
    characters: int
    tokens: int
    window: int
    room: int
    status: str
    read: int
    known: int
    seconds_left: float
    kept_bytes: int
    added: float
    used: float
    error: str
    trust: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return {"object": "document", **asdict(self)}


@dataclass(eq=False)
class _Held:
    """A document on its way.

    Args:
        head: what is kept of it.
        document: its text, when it was needed.
        reading: its tokens, when these were needed.
    """

    head: Head
    document: Document | None = None
    reading: Reading | None = None
    status: str = "unread"
    read: int = 0
    known: int = 0
    seconds_left: float = 0.0
    error: str = ""
    asking: int = 0
    """Questions that wait for it: it is then read before all others."""
    stopped: bool = False
    task: asyncio.Task[None] | None = None
    """Waits for its turn, and reads."""
    batches: asyncio.Task[bool] | None = None
    """Reads as it is read now: behind all others, or before them."""
    writing: asyncio.Task[Any] | None = None
    """Keeps what was read."""
    nudged: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        """Wake who watches."""
        self.changed.set()
        self.changed = asyncio.Event()

    def nudge(self) -> None:
        """Let its task look again at what is wanted of it."""
        self.nudged.set()
        if self.batches:
            self.batches.cancel()


@dataclass
class _Pace:
    """When a reading began, was kept last, and how many seconds that took."""

    began: float = field(default_factory=time.perf_counter)
    kept_at: float = field(default_factory=time.perf_counter)
    cost: float = 0.0


class Library:
    """The documents of a model.

    Args:
        engine: reads them.
        folder: where their texts are kept; with None they are gone when the process ends. What was read is kept where
            the engine keeps it.
        form: what stands around document and question, as `choose_form` has it.
    """

    def __init__(self, engine: Engine, folder: Path | None, *, form: str | None = None) -> None:
        self._engine, self._stored = engine, Stored(folder)
        self.form = form or ("chat" if engine.model.has_chat_template else "question")
        self._reader = f"{engine.model.name_of_states()[:16]}-{self.form}"
        self._held = {head.id: _Held(head) for head in self._stored.heads()}
        for held in self._held.values():
            tokens, _, known = self._readers(held)
            if self._state_bytes(held):
                held.status, held.read = "kept" if known == tokens else "unread", known
        self._turn: list[_Held] = []
        """Those that are read or wait for it, in their order."""
        self._speed = 0.0
        """Operations a second, as the last reading had them."""
        self._looking, self._taking = asyncio.Lock(), asyncio.Semaphore(_TAKEN)
        self._longest = max(len(engine.model.session.piece(token)) for token in range(engine.model.n_vocab))
        self._reach = reach(engine.model.info)

    async def measure(self) -> None:
        """Count the tokens of documents that another model has read."""
        for held in [held for held in self._held.values() if self._reader not in held.head.readers]:
            try:
                await asyncio.to_thread(self._loaded, held)
            except PiGgufError as error:
                held.status, held.error = "failed", f"{error}; {error.hint}"
            held.change()

    async def close(self) -> None:
        """Stop what is read, and keep what was."""
        for held in list(self._held.values()):
            held.stopped = True
            held.nudge()
        tasks = [held.task for held in self._held.values() if held.task]
        if tasks:
            await asyncio.wait(tasks)

    # What there is

    def entries(self) -> list[Entry]:
        """Return all documents, the last used first."""
        return sorted(map(self._entry, self._held.values()), key=lambda entry: -entry.used)

    def entry(self, id: str) -> Entry:
        """Return one.

        Raises:
            UnknownDocument: there is none.
        """
        return self._entry(self._of(id))

    @property
    def limit_bytes(self) -> int:
        """What all that is kept may take on disk."""
        return self._engine.states.limit if self._engine.states else 0

    def _of(self, id: str) -> _Held:
        try:
            return self._held[id]
        except KeyError:
            raise UnknownDocument(id) from None

    def _entry(self, held: _Held) -> Entry:
        head, window = held.head, self._engine.model.n_ctx
        tokens = self._readers(held)[0]
        return Entry(
            head.id, head.name, head.format, head.characters, tokens, window, max(0, window - tokens), held.status,
            held.read, held.known, held.seconds_left, self._state_bytes(held), head.added, head.used, held.error,
            trust(tokens, *self._reach),
        )  # fmt: skip

    def _readers(self, held: _Held) -> tuple[int, str, int]:
        """Return a document's tokens, the file of its state, and how many of the tokens that holds."""
        return held.head.readers.get(self._reader, (0, "", 0))

    def _state_bytes(self, held: _Held) -> int:
        """Return the bytes of the state that is kept of it; 0 without one."""
        states, name = self._engine.states, self._readers(held)[1]
        if states is None or not name:
            return 0
        try:
            return (states.folder / name).stat().st_size
        except OSError:
            return 0

    # Given, read, removed

    async def add(self, name: str, data: bytes) -> tuple[Entry, bool]:
        """Take a document, and begin to read it; return whether it is a new one, too. A few are taken at a time.

        Raises:
            DocumentTooLong: it does not fit the window.
            OptionError: the libraries that read documents are not installed.
            TextError: it cannot be read.
        """
        async with self._taking:
            document = await asyncio.to_thread(read_apart, data, name)
            id, reading = document_id(document), None
            if id not in self._held:
                reading = await asyncio.to_thread(self._reading_of, document)
            new = id not in self._held  # another may have given it meanwhile
            if new:
                held = _Held(Head(id, document.name, document.format, len(document.text)), document, reading)
                self._note_tokens(held)
                self._held[id] = held
                await asyncio.to_thread(self._stored.keep, held.head, document)
        self.read(id)
        return self.entry(id), new

    def read(self, id: str) -> None:
        """Begin to read what is not kept.

        Raises:
            UnknownDocument: there is none.
        """
        held = self._of(id)
        if held.status == "kept" or (held.task and not held.stopped):
            return
        held.stopped = False
        if held.task is None:
            held.status, held.error = "waiting", ""
            held.task = asyncio.create_task(self._read_in_turn(held))
            self._turn.append(held)
        held.change()

    async def stop(self, id: str) -> None:
        """Stop reading a document; what was read is kept.

        Raises:
            UnknownDocument: there is none.
        """
        await self._stop(self._of(id))

    async def _stop(self, held: _Held) -> None:
        task = held.task
        if task is None:
            return
        held.stopped = True
        held.nudge()
        while held.task is task and held.stopped:  # somebody may want it read again
            await held.changed.wait()

    async def remove(self, id: str) -> None:
        """Forget a document and what was read of it; its file, wherever that is, stays.

        Raises:
            UnknownDocument: there is none.
        """
        held = self._of(id)
        del self._held[id]
        self._stored.remove(id)
        await self._stop(held)
        if held.writing:
            await asyncio.wait({held.writing})
        for _, name, _ in held.head.readers.values():
            self._drop_state(name)
        held.status, held.error = "failed", "it was removed"
        held.change()

    def _drop_state(self, name: str) -> None:
        """Remove a state that no document has any more; two of the same text have one."""
        others = {state for held in self._held.values() for _, state, _ in held.head.readers.values()}
        if (states := self._engine.states) and name and name not in others:
            (states.folder / name).unlink(missing_ok=True)

    async def watch(self, id: str) -> AsyncGenerator[Entry, None]:
        """Yield a document whenever something happened to it, until nothing more does."""
        held = self._of(id)
        while True:
            changed = held.changed
            yield self._entry(held)
            if held.status in FINAL:
                return
            await changed.wait()

    def _reading_of(self, document: Document) -> Reading:
        window, size = self._engine.model.n_ctx, len(document.text.encode())
        least = -(-size // self._longest)
        if least > window:  # whatever its tokens are; to count them takes memory
            room = min(ROOM, window // 8)
            hint = "give a part of it, or take a file with a longer window"
            raise DocumentTooLong(f"{document.name}, at least", least, room, window, hint)
        return Reading(self._engine.model, document, form=self.form)

    def _note_tokens(self, held: _Held) -> None:
        if held.reading:
            _, state, known = self._readers(held)
            held.head.readers[self._reader] = len(held.reading.ids), state, known

    def _loaded(self, held: _Held) -> Reading:
        """Return a document's tokens; its text is read from disk where that was not yet done."""
        if held.reading is None:
            held.document = held.document or self._stored.document(held.head.id)
            held.reading = self._reading_of(held.document)
            self._note_tokens(held)
        return held.reading

    async def _read_in_turn(self, held: _Held) -> None:
        """Wait for a document's turn, or for somebody who asks about it, and read it."""
        try:
            while not (held.stopped or held.asking or self._turn[0] is held):
                held.nudged.clear()
                await held.nudged.wait()
            if not held.stopped:
                await asyncio.to_thread(self._loaded, held)
                held.status, held.read = "reading", 0
                held.change()
                await self._read(held)
            else:
                held.status = "unread"
        except PiGgufError as error:
            held.status, held.error = "failed", f"{self._shown(error)}; {error.hint}"
        except Exception as error:
            held.status, held.error = "failed", f"{type(error).__name__}: {self._shown(error)}"
            say(f"{held.head.name}: {type(error).__name__}: {error}")
        finally:
            self._turn.remove(held)
            if self._turn:
                self._turn[0].nudged.set()
            held.task, held.known, held.seconds_left = None, 0, 0.0
            held.change()

    def _shown(self, error: Exception) -> str:
        """Return what an error says, without the folder of the model's file."""
        path = self._engine.model.path
        return one_line(error).replace(str(path), path.name)

    async def _read(self, held: _Held) -> None:
        """Read a document: behind all others, and when somebody asks about it before them."""
        whole = False
        while not (whole or held.stopped):
            held.batches = asyncio.create_task(self._read_batches(held, background=not held.asking))
            await asyncio.wait({held.batches})
            if held.batches.cancelled():  # it was nudged
                continue
            whole = held.batches.result()
            if not whole:  # the engine ends
                break
        kept = self._engine.states is None
        if self._held.get(held.head.id) is held:
            kept |= await self._keep(held)
        held.status = "kept" if whole and kept else "unread"

    async def _read_batches(self, held: _Held, *, background: bool) -> bool:
        """Read a document; return whether that came to its end."""
        job, pace = Job(self._loaded(held).ids, 0, background=background, kept=True), _Pace()
        async with contextlib.aclosing(self._engine.run(job)) as events:
            async for event in events:
                if isinstance(event, Read):
                    await self._note(held, event, pace)
                elif isinstance(event, Ended):
                    return event.why != "cancelled"
        return False

    async def _note(self, held: _Held, event: Read, pace: _Pace) -> None:
        """Count what was read, and keep it from time to time."""
        model, now, total = self._engine.model, time.perf_counter(), event.known + event.to_read
        held.read, held.known = event.read + event.known, event.known
        if event.read:
            self._speed = model.reading_cost(event.known, held.read) / max(now - pace.began, 1e-9)
        left = model.reading_cost(held.read, total)
        held.seconds_left = left / self._speed if self._speed else 0.0
        held.change()
        if held.read < total and now - pace.kept_at > max(_LEAST_SECONDS, pace.cost / _SHARE):
            await self._keep(held)
            pace.kept_at = time.perf_counter()
            pace.cost = pace.kept_at - now

    async def _keep(self, held: _Held) -> bool:
        """Keep what the engine holds of a document, in place of what was kept before; return whether that is whole."""
        if self._engine.states is None:
            return False
        held.writing = asyncio.create_task(self._write(held, self._engine.states))
        try:
            found = await asyncio.shield(held.writing)  # what is begun is ended
        except PiGgufError as error:
            say(f"what was read of {held.head.name} is not kept: {error}")
            return False
        if found is None or self._held.get(held.head.id) is not held:
            return False
        name, known = found
        tokens, before, _ = self._readers(held)
        held.head.readers[self._reader] = tokens, name, known
        if before != name:
            self._drop_state(before)
        if held.document:
            await asyncio.to_thread(self._stored.keep, held.head, held.document)
        return bool(known == tokens)

    async def _write(self, held: _Held, states: States) -> tuple[str, int] | None:
        """Write what the engine holds of a document; return the state's file and how many tokens it has, if any."""
        engine, ids, model, head = self._engine, self._loaded(held).ids, self._engine.model, held.head

        def keep(known: int, size: int, fill: Any) -> tuple[str, int] | None:
            path = states.path_of(model.identity, ids[:known])
            if not known or path.exists():  # a document of the same text had it read
                return (path.name, known) if known else None
            names: dict[str, Any] = {"document": head.name, "model": model.path.name, "whole": known == len(ids)}
            return (path.name, known) if states.keep(model.identity, ids[:known], size, fill, **names) else None

        def keep_here(sequence: CachedSequence, known: int) -> tuple[str, int] | None:  # the others wait for the disk
            return keep(known, sequence.state_bytes(), sequence.save)

        if 2 * model.kv_cache_bytes * len(ids) // model.n_ctx > psutil.virtual_memory().available:
            return await asyncio.wrap_future(engine.call(lambda: engine.held(ids, keep_here)))
        known, state = await asyncio.wrap_future(engine.call(lambda: engine.saved(ids)))
        return await asyncio.to_thread(keep, known, len(state), _filling(state))

    # Asked

    def chat_ids(
        self, id: str, messages: Sequence[Mapping[str, Any]], tools: Any = None
    ) -> tuple[list[int], tuple[str, ...]]:
        """Return the tokens of a conversation about a document, and what ends the answer beside the model's own tokens.

        What the system says stands behind the document, so that this is read once whatever is said.

        Raises:
            GgufError: the template cannot be used, or the text is gone.
            OptionError: the model has no chat template, and there is more than a question.
            UnknownDocument: there is none.
        """
        held = self._of(id)
        reading = self._loaded(held)
        said = [dict(one) for one in messages if one["role"] not in ("system", "developer")]
        rules = "\n".join(str(one["content"]) for one in messages if one["role"] in ("system", "developer"))
        asked = next((one for one in said if one["role"] == "user"), None)
        if asked is None:
            raise OptionError("messages: nothing is asked", "the last message must be of the role user")
        if rules:
            asked["content"] = f"{rules}\n\n{asked['content']}"
        held.head.used = time.time()
        if self.form == "chat":
            return conversation_ids(self._engine.model, said, reading, tools=tools), ()
        if len(said) > 1 or tools:
            raise OptionError(
                f"{self._engine.model.path.name}: its file has no chat template: each question is asked by itself",
                "send one message of the role user",
            )
        return reading.asked_ids(str(asked["content"])), reading.form.stop

    async def run(self, id: str, job: Job) -> AsyncGenerator[Event, None]:
        """Do a job about a document, as `Engine.run` does; what is still to be read of it is read first.

        Raises:
            PiGgufError: the document cannot be read.
            UnknownDocument: there is none.
        """
        held = self._of(id)
        if held.status in ("unread", "failed"):
            self.read(id)
        if held.status not in FINAL:
            async with contextlib.aclosing(self._read_for(held)) as changes:
                async for change in changes:
                    yield change
            if held.status == "failed":
                raise ResourceError(f"{held.head.name}: it was not read ({held.error})", "give it once more")
        async with contextlib.aclosing(self._engine.run(replace(job, kept=True))) as events:
            async for event in events:
                yield event

    async def _read_for(self, held: _Held) -> AsyncGenerator[Read, None]:
        """Let a document be read before all others as long as this is waited for; tell how far that is."""
        held.asking += 1
        if held.asking == 1:
            held.nudge()
        try:
            while held.status not in FINAL:
                changed, tokens = held.changed, self._readers(held)[0]
                yield Read(max(0, held.read - held.known), max(0, tokens - held.known), held.known)
                await changed.wait()
        finally:
            held.asking -= 1
            if not held.asking:
                held.nudge()

    def text(self, id: str, start: int, end: int) -> dict[str, Any]:
        """Return some of a document's text, and where that stands.

        Raises:
            OptionError: these characters are not there.
            UnknownDocument: there is none.
        """
        document = self._document(id)
        if not 0 <= start < end <= len(document.text):
            raise OptionError(
                f"start and end must be characters of the document's {len(document.text)}, got {start} and {end}"
            )
        end = min(end, start + _SHOWN)
        place = document.place_of(start, end)
        return {"start": start, "end": end, "text": document.text[start:end], "place": place}

    def quotes(self, id: str, answer: str) -> list[dict[str, Any]]:
        """Return what an answer quotes, and where that stands in the document."""
        return [asdict(quote) for quote in find_quotes(answer, self._document(id))]

    def _document(self, id: str) -> Document:
        held = self._of(id)
        held.document = held.document or self._stored.document(id)
        return held.document

    async def looked(self, id: str, messages: Sequence[Mapping[str, Any]], answer: str) -> list[dict[str, Any]]:
        """Return the passages of a document in their order, and which share of what the model looked at each has.

        Answers go on meanwhile, half as fast: it is computed once more beside them.

        Raises:
            GgufError: the model's attention cannot be seen.
            OptionError: the model was opened with flash attention; or nothing was answered.
            ResourceError: there is no memory for a second cache.
            UnknownDocument: there is none.
        """
        if not answer.strip():
            raise OptionError("answer is empty: nothing was looked at", "send what was answered")
        reading = await asyncio.to_thread(self._loaded, self._of(id))
        ids, _ = await asyncio.to_thread(self.chat_ids, id, messages)
        self._engine.check("document and question", len(ids), 0)
        async with self._looking:
            left = threading.Event()
            looking = asyncio.create_task(asyncio.to_thread(self._look, reading, ids, answer, left.is_set))
            try:
                return await asyncio.shield(looking)
            finally:  # one at a time, also where who asked has left
                left.set()
                await asyncio.wait({looking})

    def _look(self, reading: Reading, ids: Sequence[int], answer: str, left: Cancelled) -> list[dict[str, Any]]:
        looker, document = _Looker(self._engine, ids), reading.document
        check_scores(looker)
        passages, bounds = reading.passage_bounds()
        written = answer_ids(looker, answer)[: self._engine.model.n_ctx - len(ids)]
        shares = look(looker, ids, written, bounds, cancelled=left)
        return [
            {"start": start, "end": end, "place": document.place_of(start, end), "share": float(share)}
            for (start, end), share in zip(passages, shares, strict=True)
        ]


def _filling(state: np.ndarray) -> Any:
    """Return what writes a state that is in memory into an array."""

    def fill(into: np.ndarray) -> int:
        into[:] = state
        return len(state)

    return fill


class _Looker:
    """An engine's model, as looking needs it: beside it stands what the engine holds of some ids.

    Args:
        engine: it.
        ids: what is read beside.
    """

    def __init__(self, engine: Engine, ids: Sequence[int]) -> None:
        self._engine, self._ids = engine, ids
        self.path, self.flash_attn, self.session = engine.model.path, engine.model.flash_attn, engine.model.session
        self.tokenize = engine.model.tokenize

    def looking_bytes(self) -> int:
        """Return what `beside` takes of memory, about: a cache, and the state that is copied into it."""
        return 2 * self._engine.model.kv_cache_bytes

    @contextlib.contextmanager
    def beside(self, watch: Watch, known: int) -> Iterator[Session]:
        """Give a session beside the engine's, watched, that has read what the engine holds of the first `known` ids."""
        engine, ids = self._engine, self._ids[:known]
        held, state = engine.call(lambda: engine.saved(ids)).result()
        with engine.model.beside(watch, known, (ids[:held], state)) as session:
            del state
            yield session
