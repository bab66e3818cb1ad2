"""Documents that one model has read, or reads while it answers: given once, asked about at any time, also tomorrow.

In: bytes of a document. Out: what of it is read, conversations about it as tokens, quotations, and where the model
looked. One document is read at a time, behind all answers, or before the one that asks about it. All of this is used
from one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from pi_gguf.errors import OptionError, PiGgufError, ResourceError
from pi_gguf.llamacpp.watch import Watch
from pi_gguf.runtime.chat import conversation_ids
from pi_gguf.runtime.looked import answer_ids, check_scores, look
from pi_gguf.runtime.reading import Reading, reach, trust
from pi_gguf.runtime.sequence import CachedSequence
from pi_gguf.runtime.session import Session

_LEAST_SECONDS, _SHARE = 10.0, 0.05
"""What was read is kept on the way after so many seconds, if keeping it takes no more than this share of them."""

_SHOWN = 20_000
"""Characters of a document that are given at a time."""

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
    urgent: bool = False
    stopped: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        """Wake who watches."""
        self.changed.set()
        self.changed = asyncio.Event()


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
            if self._state_bytes(held):
                held.status, held.read = "kept", held.head.readers[self._reader][0]
        self._queue: asyncio.Queue[_Held] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._speed = 0.0
        """Operations a second, as the last reading had them."""
        self._looking = asyncio.Lock()
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
        for held in self._held.values():
            held.stopped = True
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for held in self._held.values():
            if held.status == "reading":
                await self._keep(held)

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
        tokens = head.readers.get(self._reader, (0, ""))[0]
        return Entry(
            head.id, head.name, head.format, head.characters, tokens, window, max(0, window - tokens), held.status,
            held.read, held.known, held.seconds_left, self._state_bytes(held), head.added, head.used, held.error,
            trust(tokens, *self._reach),
        )  # fmt: skip

    def _state_bytes(self, held: _Held) -> int:
        """Return the bytes of the state that is kept of it; 0 without one."""
        states, (_, name) = self._engine.states, held.head.readers.get(self._reader, (0, ""))
        if states is None or not name:
            return 0
        try:
            return (states.folder / name).stat().st_size
        except OSError:
            return 0

    # Given, read, removed

    async def add(self, name: str, data: bytes) -> tuple[Entry, bool]:
        """Take a document, and begin to read it; return whether it is a new one, too.

        Raises:
            DocumentTooLong: it does not fit the window.
            OptionError: the libraries that read documents are not installed.
            TextError: it cannot be read.
        """
        document = await asyncio.to_thread(read_apart, data, name)
        id = document_id(document)
        if new := id not in self._held:
            reading = await asyncio.to_thread(self._reading_of, document)
            held = _Held(Head(id, document.name, document.format, len(document.text)), document, reading)
            self._note_tokens(held)
            await asyncio.to_thread(self._stored.keep, held.head, document)
            self._held[id] = held
        self.read(id)
        return self.entry(id), new

    def read(self, id: str) -> None:
        """Begin to read what is not kept.

        Raises:
            UnknownDocument: there is none.
        """
        held = self._of(id)
        held.stopped = False
        if held.status in ("waiting", "reading", "kept"):
            return
        held.status, held.error = "waiting", ""
        held.change()
        self._queue.put_nowait(held)
        if self._task is None:
            self._task = asyncio.create_task(self._read_all())

    async def stop(self, id: str) -> None:
        """Stop reading a document; what was read is kept."""
        held = self._of(id)
        if held.status not in FINAL:
            held.stopped = True
            while held.status not in FINAL:
                await held.changed.wait()

    async def remove(self, id: str) -> None:
        """Forget a document and what was read of it; its file, wherever that is, stays.

        Raises:
            UnknownDocument: there is none.
        """
        await self.stop(id)
        held = self._held.pop(id, None)
        if held is None:
            raise UnknownDocument(id)
        if states := self._engine.states:
            for _, name in held.head.readers.values():
                if name:
                    (states.folder / Path(name).name).unlink(missing_ok=True)
        self._stored.remove(id)
        held.status, held.error = "failed", "it was removed"
        held.change()

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
        return Reading(self._engine.model, document, form=self.form)

    def _note_tokens(self, held: _Held) -> None:
        if held.reading:
            state = held.head.readers.get(self._reader, (0, ""))[1]
            held.head.readers[self._reader] = len(held.reading.ids), state

    def _loaded(self, held: _Held) -> Reading:
        """Return a document's tokens; its text is read from disk where that was not yet done."""
        if held.reading is None:
            held.document = held.document or self._stored.document(held.head.id)
            held.reading = self._reading_of(held.document)
            self._note_tokens(held)
        return held.reading

    async def _read_all(self) -> None:
        while True:
            held = await self._queue.get()
            try:
                if held.stopped:
                    held.status = "unread"
                else:
                    await asyncio.to_thread(self._loaded, held)
                    held.status, held.read = "reading", 0
                    held.change()
                    await self._read(held)
            except PiGgufError as error:
                held.status, held.error = "failed", f"{error}; {error.hint}"
            except Exception as error:
                held.status, held.error = "failed", f"{type(error).__name__}: {error}"
                say(f"{held.head.name}: {held.error}")
            held.seconds_left, held.urgent = 0.0, False
            held.change()

    async def _read(self, held: _Held) -> None:
        """Read a document: behind all others, and when somebody asks about it before them."""
        reading, whole, on = self._loaded(held), False, True
        while on and not held.stopped:
            urgent, pace = held.urgent, _Pace()
            job = Job(reading.ids, 0, background=not urgent, kept=True)
            async with contextlib.aclosing(self._engine.run(job)) as events:
                async for event in events:
                    if isinstance(event, Read):
                        await self._note(held, event, pace)
                    elif isinstance(event, Ended):
                        whole, on = event.why != "cancelled", False
                    if held.stopped or held.urgent != urgent:
                        break
        if held.head.id in self._held:
            await self._keep(held)
        held.known, held.status = 0, "kept" if whole else "unread"

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

    async def _keep(self, held: _Held) -> None:
        """Keep what the engine holds of a document, in place of what was kept on the way."""
        engine, states, reading = self._engine, self._engine.states, self._loaded(held)
        if states is None:
            return
        ids, model, head = reading.ids, engine.model, held.head
        names: dict[str, Any] = {"document": head.name, "model": model.path.name}
        size = model.kv_cache_bytes * len(ids) // model.n_ctx

        def keep(known: int, state_bytes: int, fill: Any) -> Any:
            if known and not states.path_of(model.identity, ids[:known]).exists():
                whole = known == len(ids)
                return states.keep(model.identity, ids[:known], state_bytes, fill, whole=whole, **names)
            return None

        def keep_here(sequence: CachedSequence, known: int) -> Any:  # the others wait for the disk
            return keep(known, sequence.state_bytes(), sequence.save)

        try:
            if 2 * size > psutil.virtual_memory().available:
                kept = await asyncio.wrap_future(engine.call(lambda: engine.held(ids, keep_here)))
            else:
                known, state = await asyncio.wrap_future(engine.call(lambda: engine.saved(ids)))
                kept = await asyncio.to_thread(keep, known, len(state), _filling(state))
        except (PiGgufError, asyncio.CancelledError) as error:
            say(f"what was read of {head.name} is not kept: {error}")
            return
        if kept is None:
            return
        before = head.readers.get(self._reader, (0, ""))[1]
        if before and before != kept.path.name:
            (states.folder / Path(before).name).unlink(missing_ok=True)
        head.readers[self._reader] = len(ids), kept.path.name
        if held.document:
            await asyncio.to_thread(self._stored.keep, head, held.document)

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
            held.urgent = True
            async with contextlib.aclosing(self.watch(id)) as changes:
                async for entry in changes:
                    yield Read(max(0, entry.read - entry.known), max(0, entry.tokens - entry.known), entry.known)
            if held.status == "failed":
                raise ResourceError(f"{held.head.name}: it was not read ({held.error})", "give it once more")
        async with contextlib.aclosing(self._engine.run(replace(job, kept=True))) as events:
            async for event in events:
                yield event

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
            return await asyncio.to_thread(self._look, reading, ids, answer)

    def _look(self, reading: Reading, ids: Sequence[int], answer: str) -> list[dict[str, Any]]:
        looker, document = _Looker(self._engine, ids), reading.document
        check_scores(looker)
        passages, bounds = reading.passage_bounds()
        written = answer_ids(looker, answer)[: self._engine.model.n_ctx - len(ids)]
        shares = look(looker, ids, written, bounds)
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
