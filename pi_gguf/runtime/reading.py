"""A document that a model has read: read once, asked any number of times.

In: an open `Model` and a document. Out: answers, each with its quotations and where in the document these stand. What
was read is kept on disk while it goes on and when it is done (`states`); the same document, or a longer one that begins
alike, is not read again after a restart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pi_gguf.common.files import human_bytes
from pi_gguf.common.progress import duration, say
from pi_gguf.documents.formats import Document, Passage
from pi_gguf.documents.quotes import Quote, find_quotes
from pi_gguf.errors import GgufError, OptionError, TextError
from pi_gguf.gguf.certificate import Certificate
from pi_gguf.gguf.file import GgufInfo
from pi_gguf.measure.language_model import common_prefix
from pi_gguf.runtime.looked import Looker, answer_ids, check_scores, look, token_bounds
from pi_gguf.runtime.sampling import Sampling
from pi_gguf.runtime.session import Cancelled, Progress, Session, Stopped, TooLong, check_fits, never, silent
from pi_gguf.runtime.states import Kept, States
from pi_gguf.runtime.text import stream, until_it_repeats
from pi_gguf.runtime.turns import Turns

ROOM = 1024
"""Tokens left for a question and its answer, at most an eighth of the window."""

_CHUNK = 2048
"""Tokens read between two looks at whether to keep what was read."""

_LEAST_SECONDS, _SHARE = 10.0, 0.05
"""What was read is kept on the way after so many seconds, if keeping it takes no more than this share of them."""

_PROBE = 256
"""Tokens read to say how long the rest takes; they are not read again."""

INTRODUCTION = "Here is a document.\n\n"
TASK = (
    "\n\nAnswer the question below from this document alone, shortly. Support the answer with one or two short "
    'passages of the document, word for word, in "quotation marks". If the document does not say, say so.\n\nQuestion: '
)
FORMS = ("chat", "question", "plain")


class Reader(Looker, Protocol):
    """What a reading needs of an open `Model`."""

    info: GgufInfo
    n_ctx: int
    turns: Turns
    kv_cache_bytes: int

    @property
    def session(self) -> Session:
        """What reads and writes."""

    @property
    def bos(self) -> list[int]:
        """The begin token, where the model wants one."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same for a kept state to be this model's."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the file states how a conversation is written."""

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return a conversation as the file's chat template writes it."""

    def reading_cost(self, start: int, end: int) -> float:
        """Return the operations that reading some tokens takes, roughly."""


@dataclass(frozen=True)
class Form:
    """What stands around document and question.

    Args:
        before: before the document.
        between: between it and a question.
        after: after a question.
        stop: what ends an answer, beside the model's own tokens.
    """

    before: str
    between: str
    after: str
    stop: tuple[str, ...] = ()


PLAIN = Form("", "", "")
QUESTION = Form("", "\n\nQuestion: ", "\nAnswer:", ("\nQuestion:",))

DOCUMENT, _QUESTION = "[[pi-gguf document]]", "[[pi-gguf question]]"
"""What stands for the two while a chat template writes what is around them."""


def choose_form(model: Reader, name: str | None, system: str | None = None) -> Form:
    """Return what a model wants around a document and a question.

    Raises:
        GgufError: the file's chat template cannot be used.
        OptionError: there is no form of this name.
    """
    if name is None:
        name = "chat" if model.has_chat_template else "question"
    if name not in FORMS:
        raise OptionError(f"form must be one of {', '.join(FORMS)}, got {name}")
    if name != "chat":
        return PLAIN if name == "plain" else QUESTION
    messages = [{"role": "system", "content": system}] if system else []
    text = model.render([*messages, {"role": "user", "content": f"{INTRODUCTION}{DOCUMENT}{TASK}{_QUESTION}"}])
    before, _, rest = text.partition(DOCUMENT)
    between, found, after = rest.partition(_QUESTION)
    if not found or DOCUMENT in rest or _QUESTION in after:
        raise GgufError(
            f"{model.path}: its chat template does not show a message as it is, once", "read with --form question"
        )
    return Form(before, between, after)


def _part(document: Document, part: tuple[int, int]) -> tuple[int, int]:
    """Return the characters, from the first to the one after the last, of a part: whole passages, about as long."""
    which, of = part
    if not 1 <= which <= of:
        raise OptionError(f"part must be K/N with K from 1 to N, got {which}/{of}", "e.g. --part 2/3")
    length = len(document.text)
    if of == 1:
        return 0, length
    begins = [0, *(passage.start for passage in document.passages()[1:]), length]
    if len(begins) <= of:
        raise OptionError(f"{document.name}: {len(begins) - 1} passages make no {of} parts", "give fewer")
    cuts = [0]  # numbers of passages; each part has one at least
    for k in range(1, of + 1):
        free = range(cuts[-1] + 1, len(begins) - of + k)
        cuts.append(min(free, key=lambda i, wanted=length * k / of: abs(begins[i] - wanted)))  # type: ignore[misc]
    return begins[cuts[which - 1]], begins[cuts[which]]


def _shifted(told: Progress, read_before: int, to_read: int) -> Progress:
    """Return a progress that is told of a part of a reading, and tells of the whole."""
    return lambda read, _, written: told(read_before + read, to_read, written)


@dataclass(frozen=True)
class Fit:
    """What it takes to read a document, said before.

    Args:
        document: its name.
        tokens: of the document with what stands around it.
        room: tokens left for a question and its answer.
        window: tokens that the model was opened for.
        known: how many of `tokens` need not be read, as they are kept.
        seconds: about how long the others take; 0 where that is not known.
        kv_cache_bytes: what the open cache takes.
        state_bytes: about what is kept on disk.
        measured: tokens to which the file was measured; None where it was not.
        k_max: up to which distance the measurement found passkeys; None where it was not measured.
    """

    document: str
    tokens: int
    room: int
    window: int
    known: int
    seconds: float
    kv_cache_bytes: int
    state_bytes: int
    measured: int | None
    k_max: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Say it to people."""
        lines = [
            f"{self.document}: {self.tokens:,} of {self.window:,} tokens, {self.room:,} left for a question and its "
            f"answer; the cache takes {human_bytes(self.kv_cache_bytes)}"
        ]
        if self.known:
            lines.append(f"{self.known:,} tokens of it were read before and are kept")
        if self.seconds:
            lines.append(f"reading takes about {duration(self.seconds)}")
        lines.append(self.trust())
        return lines

    def trust(self) -> str:
        """Say how far the file's window was measured to reach, and whether the document is longer."""
        return trust(self.tokens, self.measured, self.k_max)


def trust(tokens: int, measured: int | None, k_max: int | None) -> str:
    """Say how far a file's window was measured to reach, and whether so many tokens are more.

    Args:
        tokens: of a document.
        measured: tokens to which the file was measured; None where it was not.
        k_max: up to which distance passkeys were found; None where that was not measured.
    """
    if measured is None:
        return "how far this file's window really reaches was never measured: pi-gguf certify FILE measures it"
    reach = measured if k_max is None else min(measured, k_max)
    said = f"this file was measured to {measured:,} tokens"
    if k_max is not None:
        said += f"; k_max {k_max:,}"
    return said if tokens <= reach else f"{said}: answers about what lies further back may be wrong"


def reach(info: GgufInfo) -> tuple[int | None, int | None]:
    """Return to how many tokens a file was measured, and its k_max, by its certificate; None where it says nothing."""
    with contextlib.suppress(GgufError):  # a certificate of another file, or a damaged one
        if certificate := Certificate.read(info.header):
            return certificate.window, certificate.k_max
    return None, None


@dataclass(frozen=True)
class Answer:
    """An answer to a question about a document.

    Args:
        question: what was asked.
        text: the whole answer.
        quotes: what it quotes, each with where in the document that stands, or that it is not there.
        ended: why it ended: stop, length, repeats or cancelled.
        tokens: how many were written.
        waited: seconds to the first of them.
        seconds: of all of it.
    """

    question: str
    text: str
    quotes: list[Quote] = field(default_factory=list)
    ended: str = "stop"
    tokens: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)


class DocumentTooLong(TooLong):
    """A document, with room for a question and its answer, does not fit the window."""

    def __init__(self, what: str, tokens: int, writing: int, window: int, hint: str) -> None:
        super().__init__(what, tokens, writing, window, hint)
        self.args = (
            f"{what}: {tokens:,} tokens and {writing:,} for question and answer do not fit the window of {window:,} "
            "tokens",
        )


class Reading:
    """A document that an open model has read. Use it as a context manager, or call `close`.

    Args:
        model: the open model; it stays open.
        document: what to read.
        part: which of how many parts, (2, 3) the second of three; offsets are those of the whole document.
        form: chat (the file's chat template), question (a plain question and answer) or plain (the question goes on
            where the document ends); the first where the file has a template, the second elsewhere, when None.
        system: what stands before everything, in the form chat.
        states: where to keep what was read; None keeps nothing.

    Raises:
        GgufError: the file's chat template cannot be used.
        OptionError: the document does not fit the window; nothing is ever cut. Or a part or form that is none.
    """

    def __init__(
        self, model: Reader, document: Document, *, part: tuple[int, int] = (1, 1), form: str | None = None,
        system: str | None = None, states: States | None = None,
    ) -> None:  # fmt: skip
        self.model, self.document, self._states = model, document, states
        self.form = choose_form(model, form, system)
        start, end = _part(document, part)
        self._range = start, end
        self._name = document.name if part[1] == 1 else f"{document.name}, part {part[0]} of {part[1]}"
        form_ids = [model.tokenize(text, add_special=False) for text in (self.form.before, self.form.between)]
        begin = model.bos if self.form.before == "" else []
        text = document.text[start:end]
        self.document_ids = [*begin, *form_ids[0], *model.tokenize(text, add_special=False, special=False)]
        """The document with what stands before it."""
        self.ids = [*self.document_ids, *form_ids[1]]
        """The document with what stands before and after it."""
        self._after = model.tokenize(self.form.after, add_special=False)
        self.room = min(ROOM, model.n_ctx // 8)
        if len(self.ids) > model.n_ctx - self.room:
            parts = -(-len(self.ids) * part[1] // (model.n_ctx - self.room)) if part[1] == 1 else part[1] + 1
            hint = f"read it in parts, --part 1/{parts}, or take a file with a longer window"
            raise DocumentTooLong(self._name, len(self.ids), self.room, model.n_ctx, hint)
        self._kept: Kept | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the document; the model stays open, and what is kept stays kept."""
        self.ids = []

    def _check_open(self) -> None:
        if not self.ids:
            raise TextError(f"{self._name}: its reading was closed", "read it again")

    # Reading

    def fit(self, *, probe: bool = True) -> Fit:
        """Say what reading takes.

        Args:
            probe: read the first tokens to see how fast that goes; they need not be read again.
        """
        self._check_open()
        session = self.model.session
        with self.model.turns():
            self._restore()
            known, seconds = self._probe() if probe else (session.known(self.ids), 0.0)
        return self.fit_with(known, seconds)

    def fit_with(self, known: int, seconds: float) -> Fit:
        """Say what reading takes, where it is known how many tokens need not be read, and how long the others take."""
        model = self.model
        return Fit(
            self._name, len(self.ids), model.n_ctx - len(self.ids), model.n_ctx, known, seconds, model.kv_cache_bytes,
            model.kv_cache_bytes * len(self.ids) // model.n_ctx, *reach(model.info),
        )  # fmt: skip

    def _probe(self) -> tuple[int, float]:
        """Read a little; return how many tokens were known before, and about how long the rest takes."""
        model, known = self.model, self.model.session.known(self.ids)
        if len(self.ids) - known <= 2 * _PROBE:
            return known, 0.0
        started = time.perf_counter()
        self._read_to(known + _PROBE, never, silent)
        elapsed = time.perf_counter() - started
        cost = model.reading_cost(known + _PROBE, len(self.ids)) / model.reading_cost(known, known + _PROBE)
        return known, elapsed * cost

    @property
    def unread(self) -> int:
        """How many tokens of the document have to be read before a question."""
        return len(self.ids) - self.model.session.known(self.ids)

    def read(self, *, cancelled: Cancelled = never, on_progress: Progress = silent) -> None:
        """Read what was not read before, and keep it.

        Args:
            cancelled: asked before each batch whether to stop; what was read is kept.
            on_progress: told how many tokens were read, how many have to be, and 0.

        Raises:
            Stopped: it was cancelled.
            TextError: the reading was closed.
        """
        self._check_open()
        with self.model.turns(cancelled) as mine:
            if not mine:
                raise Stopped
            self._read(cancelled, on_progress)

    def _read(self, cancelled: Cancelled, on_progress: Progress) -> None:
        self._restore()
        session = self.model.session
        known = session.known(self.ids)
        if known >= len(self.ids):
            return
        kept_at, cost = time.perf_counter(), 0.0
        on_progress(0, len(self.ids) - known, 0)
        try:
            for end in [*range(known + _CHUNK, len(self.ids), _CHUNK), len(self.ids)]:
                before = session.known(self.ids)
                self._read_to(end, cancelled, _shifted(on_progress, before - known, len(self.ids) - known))
                elapsed = time.perf_counter() - kept_at
                if end < len(self.ids) and elapsed > max(_LEAST_SECONDS, cost / _SHARE):
                    kept_at = time.perf_counter()
                    self._keep()
                    cost, kept_at = time.perf_counter() - kept_at, time.perf_counter()
        finally:
            if session.known(self.ids) > known:
                self._keep()

    def _read_to(self, end: int, cancelled: Cancelled, on_progress: Progress) -> None:
        for _ in self.model.session.read(self.ids[:end], 1, cancelled=cancelled, on_progress=on_progress):
            pass

    def _restore(self) -> None:
        """Bring back what is kept, where that is more than the cache holds."""
        session = self.model.session
        if self._states is None or session.known(self.ids) >= len(self.ids):
            return
        with self._states.longest(self.model.identity, self.ids, self.model.n_ctx) as found:
            common = common_prefix(found.ids, self.ids) if found else 0
            if not found or common <= session.known(self.ids):
                return
            if not session.restore(found.state, found.ids):
                say(f"{found.kept.path}: llama.cpp does not take it; {self._name} is read again")
            elif session.rewind(common) == found.kept.tokens and not found.kept.whole:
                self._kept = found.kept

    def _keep(self) -> None:
        """Keep what the cache holds of the document, in place of what was kept on the way."""
        session = self.model.session
        if self._states is None:
            return
        ids = self.ids[: session.rewind(session.known(self.ids))]  # the cache may hold more after an interruption
        if not ids:
            return
        before, self._kept = self._kept, self._states.keep(
            self.model.identity, ids, session.state_bytes(), session.save,
            document=self._name, model=self.model.path.name, whole=len(ids) == len(self.ids),
        )  # fmt: skip
        if before and self._kept and before.path != self._kept.path:
            with contextlib.suppress(OSError):
                before.path.unlink()

    # Asking

    def ask(
        self, question: str, *, max_tokens: int | None = None, cancelled: Cancelled = never,
        on_progress: Progress = silent, **sampling: Any,
    ) -> Generator[str, None, Answer]:  # fmt: skip
        """Answer a question about the document, yielding text as it comes. Each is answered by itself.

        Where the most probable token is taken each time (a temperature of 0), an answer ends, too, when it is one
        stretch of text over and over: nothing else would follow.

        Args:
            question: what to ask.
            max_tokens: limit in tokens; up to 512, as the window allows, when None.
            cancelled: asked before each batch and token whether to stop.
            on_progress: told how many tokens were read, how many have to be, and how many were written.
            sampling: the fields of `Sampling`, as in `Model.complete`.

        Returns:
            The whole answer with its quotations.

        Raises:
            OptionError: question and `max_tokens` do not fit the window. Or a value of the sampling.
            TextError: the question is empty, or the reading was closed.

        Example:
            >>> with pi_gguf.open("m.gguf") as model, model.read("book.epub") as book:  # doctest: +SKIP
            ...     for part in book.ask("Who keeps the lighthouse?"):
            ...         print(part, end="")
        """
        self._check_open()
        if not question.strip():
            raise TextError("the question is empty", "write one")
        stop = (*sampling.pop("stop", ()), *self.form.stop)
        how = Sampling(**sampling, stop=stop)
        ids = self.asked_ids(question)
        hint = f"{self.model.n_ctx - len(self.ids)} are left behind {self._name}: ask shorter, or smaller --max-tokens"
        room = check_fits("document and question", len(ids), self.model.n_ctx, max_tokens, hint)
        started, first, written = time.perf_counter(), 0.0, 0
        parts: list[str] = []

        def note(read: int, to_read: int, count: int) -> None:
            nonlocal written, first
            written = count
            if count == 1:
                first = time.perf_counter() - started
            on_progress(read, to_read, count)

        ended = "cancelled"
        with self.model.turns(cancelled) as mine, contextlib.suppress(Stopped):
            if mine:
                if self.unread == 0:  # what cannot go back to its end, such as recurrent layers, is brought back
                    self.model.session.rewind(len(self.ids))
                self.read(cancelled=cancelled, on_progress=on_progress)
                tokens = self.model.session.write(
                    ids, max_tokens or min(512, room), how, cancelled=cancelled, on_progress=note
                )
                if how.temperature == 0 and how.gbnf is None:
                    tokens = until_it_repeats(tokens)
                answer = stream(tokens, self.model.session.piece, how.stop)
                while True:
                    try:
                        part = next(answer)
                    except StopIteration as end:
                        ended = end.value
                        break
                    parts.append(part)
                    yield part
        text = "".join(parts)
        return Answer(
            question, text, find_quotes(text, self.document), ended, written, first, time.perf_counter() - started
        )

    def asked_ids(self, question: str) -> list[int]:
        """Return the tokens of the document and a question behind it, up to where the answer begins."""
        return [*self.ids, *self.model.tokenize(question, add_special=False, special=False), *self._after]

    def passages(self, answer: Answer) -> list[tuple[Passage, float]]:
        """Return where the model looked while it wrote an answer: passages, the most looked at first, and their shares.

        A share is of what the heads of all layers see of the document, each weighted by how much it sees there of the
        token that is written next: heads that copy. The shares add up to 1.

        Args:
            answer: as `ask` returned it.

        Raises:
            GgufError: the model's attention cannot be seen.
            OptionError: the model was opened with flash attention, which makes no scores.
            ResourceError: there is no memory for a second cache.
            TextError: the answer is empty, or the reading was closed.
        """
        if not self.ids or not answer.text:
            raise TextError(f"{self._name}: {'the answer is empty' if self.ids else 'its reading was closed'}", "ask")
        model = self.model
        check_scores(model)
        passages, bounds = self.passage_bounds()
        with model.turns():
            self._read(never, silent)
            ids, written = self.asked_ids(answer.question), answer_ids(model, answer.text)
            shares = look(model, ids, written, bounds)
        return sorted(zip(passages, map(float, shares), strict=True), key=lambda found: -found[1])

    def passage_bounds(self) -> tuple[list[Passage], list[int]]:
        """Return what was read in passages; the number of the token of `ids` with which each begins, and where the
        last one ends."""
        model, (start, end) = self.model, self._range
        text = self.document.text[start:end]
        passages = [passage for passage in self.document.passages() if start <= passage.start < end]
        tokens = model.tokenize(text, add_special=False, special=False)
        first = len(self.document_ids) - len(tokens)
        bounds = token_bounds(list(map(model.session.piece, tokens)), text, [p.start - start for p in passages])
        return passages, [first + bound for bound in bounds]
