"""Answers in OpenAI's form: what the engine tells -> objects, chunks of a stream, log-probabilities, usage.

In: the events of `Engine.run`. Out: JSON values, whole or piece by piece.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from pi_gguf.engine.jobs import Choice, Ended, Event, PromptScored, Read, Written
from pi_gguf.engine.library import UnknownDocument
from pi_gguf.errors import GgufError
from pi_gguf.server.protocol import ApiError
from pi_gguf.server.tools import Apart, Call, as_answered

Events = AsyncGenerator[Event, None]
Chunks = AsyncGenerator[tuple[str, Any], None]
"""Values to send, each with the name of its event."""

Quotes = Callable[[str], Awaitable[list[dict[str, Any]]]]
"""Finds what an answer quotes."""

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, for which JSON has no number."""


@dataclass
class Gathered:
    """All that came of an answer."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    prompt: tuple[Choice | None, ...] | None = None
    ended: Ended | None = None

    @property
    def end(self) -> Ended:
        """How it ended.

        Raises:
            ApiError: it did not: the server is closing.
        """
        if self.ended is None or self.ended.why == "cancelled":
            raise ApiError(503, "the server is closing; ask again later", "server_error")
        return self.ended


async def gather(events: Events) -> Gathered:
    """Wait for the whole of an answer."""
    found, parts = Gathered(), []
    async with aclosing(events):
        async for event in events:
            match event:
                case Written():
                    parts.append(event.text)
                    found.choices += event.choices
                case PromptScored():
                    found.prompt = event.choices
                case Ended():
                    found.ended = event
    found.text = "".join(parts)
    return found


def usage(*ended: Ended) -> dict[str, Any]:
    """Return the tokens of answers, together."""
    prompt, written = sum(one.prompt for one in ended), sum(one.written for one in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.known for one in ended)},
    }


def timings(*ended: Ended) -> dict[str, float]:
    names = ("read_seconds", "write_seconds", "waited_seconds")
    return {name: round(sum(getattr(one, name) for one in ended), 6) for name in names}


# Log-probabilities


def _number(logprob: float) -> float:
    return max(logprob, LEAST)


def _shown(piece: bytes) -> str:
    """Return a token's text; its bytes, as OpenAI's completions show them, where it is part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprobs(choices: Sequence[Choice], is_end: Callable[[int], bool]) -> dict[str, Any]:
    """Return log-probabilities in the form of chats, in which a token that ends an answer is none of it."""

    def one(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": piece.decode(errors="replace"), "logprob": _number(logprob), "bytes": list(piece)}

    content = [
        {**one(c.piece, c.logprob), "top_logprobs": [one(piece, logprob) for _, piece, logprob in c.top]}
        for c in choices
        if not is_end(c.token)
    ]
    return {"content": content, "refusal": None}


@dataclass(frozen=True)
class Echo:
    """A prompt that its answer begins with.

    Args:
        text: of it.
        first: its first token as it is shown, the begin token, too.
        pieces: what of the text each token is; nothing of it for the begin token.
    """

    text: str
    first: bytes
    pieces: tuple[bytes, ...]


class Within:
    """Holds tokens back until their text is part of the answer, which that of a stop string never is."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._waiting, self._next, self._length = deque[tuple[int, Choice]](), 0, 0

    def add(self, text: str, choices: Sequence[Choice]) -> list[Choice]:
        """Return the tokens that are certain, with a text and tokens more."""
        self._length += len(text)
        for choice in choices:
            self._waiting.append((self._next, choice))
            self._next += len(self._decoder.decode(choice.piece))
        found = []
        while self._waiting and self._waiting[0][0] < self._length:
            found.append(self._waiting.popleft()[1])
        return found

    def end(self, why: str) -> list[Choice]:
        """Return the rest: all of it where no stop string ended the text, but the model or a limit."""
        if why == "stop" and self._waiting and self._waiting[-1][1].piece:
            return []
        return [choice for _, choice in self._waiting]


class Logprobs:
    """Log-probabilities in the form of completions; offsets, in characters, go on from chunk to chunk."""

    def __init__(self) -> None:
        self._decoder, self._offset = codecs.getincrementaldecoder("utf-8")("ignore"), 0

    def of(self, choices: Sequence[Choice | None], echo: Echo | None = None) -> dict[str, Any]:
        """Return the next of them.

        Args:
            choices: one a token; None for the first of a prompt, before which nothing stands.
            echo: the prompt, where the first of them are its tokens.
        """
        pieces = echo.pieces if echo else ()
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for choice, in_text in zip_longest(choices, pieces[: len(choices)]):
            piece = choice.piece if choice else echo.first if echo else b""
            told["tokens"].append(_shown(piece))
            told["token_logprobs"].append(_number(choice.logprob) if choice else None)
            told["top_logprobs"].append(_tops(choice) if choice else None)
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(piece if in_text is None else in_text))
        return told


def _tops(choice: Choice) -> dict[str, float]:
    """Return the most probable tokens by their text, the more probable of two alike, and the chosen one."""
    tops: dict[str, float] = {}
    for piece, logprob in (*((piece, logprob) for _, piece, logprob in choice.top), (choice.piece, choice.logprob)):
        tops.setdefault(_shown(piece), _number(logprob))
    return tops


# Forms


class _Form:
    """What all parts of an answer have in common."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], *ended: Ended, **more: Any) -> dict[str, Any]:
        told = {"usage": usage(*ended), "timings": timings(*ended)}
        return {**self._head, "object": self.kind, "choices": choices, **told, **more}

    def chunk(self, choice: dict[str, Any] | None, **more: Any) -> tuple[str, dict[str, Any]]:
        return "", {**self._head, "object": self.chunk_kind, "choices": [choice] if choice else [], **more}


class Progress:
    """Tells how far reading has come, as llama-server does: `processed` of `total` tokens, `cache` of them known."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def of(self, read: Read) -> dict[str, Any]:
        return {
            "total": read.known + read.to_read,
            "cache": read.known,
            "processed": read.known + read.read,
            "time_ms": round(1000 * (time.monotonic() - self._began)),
        }


@dataclass(frozen=True)
class Wanted:
    """What a stream tells beside the text."""

    usage: bool = False
    progress: bool = False
    logprobs: bool = False


class CompletionForm(_Form):
    """An answer of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    async def stream(self, index: int, events: Events, echo: Echo | None, wanted: Wanted) -> Chunks:
        """Yield the chunks of one prompt's text.

        Args:
            index: of the prompt.
            events: of the engine.
            echo: the prompt, where the answer begins with it.
            wanted: what is told beside.
        """
        logprobs, within, progress, found = Logprobs(), Within(), Progress(), Gathered()
        if echo and not wanted.logprobs:
            yield self.chunk(self.choice(index, echo.text))
        async with aclosing(events):
            async for event in events:
                match event:
                    case Read() if wanted.progress:
                        yield self.chunk(self.choice(index, ""), prompt_progress=progress.of(event))
                    case PromptScored() if echo:
                        yield self.chunk(self.choice(index, echo.text, None, logprobs.of(event.choices, echo)))
                    case Written():
                        choices = within.add(event.text, event.choices) if wanted.logprobs else []
                        if event.text or choices:
                            told = logprobs.of(choices) if wanted.logprobs else None
                            yield self.chunk(self.choice(index, event.text, None, told))
                    case Ended():
                        found.ended = event
        if wanted.logprobs and (choices := within.end(found.end.why)):
            yield self.chunk(self.choice(index, "", None, logprobs.of(choices)))
        yield self.chunk(self.choice(index, "", found.end.why), timings=timings(found.end), ended=found.end)


class ChatForm(_Form):
    """An answer of /v1/chat/completions.

    Args:
        model: its name.
        is_end: whether a token ends an answer.
        apart: takes calls out of the text, where there are tools.
        quotes: finds what the answer quotes, where it is about a document.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, is_end: Callable[[int], bool], apart: Apart | None = None, quotes: Quotes | None = None
    ) -> None:
        super().__init__(model)
        self._is_end = is_end
        self._apart, self._quotes, self._calls = apart, quotes, 0

    def _split(self, text: str) -> tuple[str, list[Call]]:
        return self._apart.add(text) if self._apart else (text, [])

    def _rest(self) -> tuple[str, list[Call]]:
        return self._apart.end() if self._apart else ("", [])

    async def _quoted(self, text: str) -> dict[str, Any]:
        if self._quotes is None:
            return {}
        try:
            return {"quotes": await self._quotes(text)}
        except (UnknownDocument, GgufError):  # it was removed meanwhile; the answer is there all the same
            return {"quotes": []}

    async def answer(self, found: Gathered, logprobs: bool) -> dict[str, Any]:
        """Return the whole answer."""
        (text, calls), (rest, more) = self._split(found.text), self._rest()
        text, calls = text + rest, [*calls, *more]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = as_answered(calls)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": chat_logprobs(found.choices, self._is_end) if logprobs else None,
            "finish_reason": "tool_calls" if calls else found.end.why,
        }
        return self.whole([choice], found.end, **await self._quoted(text))

    def _delta(self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _deltas(self, text: str, calls: list[Call], choices: Sequence[Choice], wanted: Wanted) -> list[tuple[str, Any]]:
        told = chat_logprobs(choices, self._is_end) if wanted.logprobs else None
        chunks = [self.chunk(self._delta({"content": text}, None, told))] if text or (told and told["content"]) else []
        if calls:
            answered = as_answered(calls, self._calls, streamed=True)
            self._calls += len(calls)
            chunks.append(self.chunk(self._delta({"tool_calls": answered})))
        return chunks

    async def stream(self, events: Events, wanted: Wanted) -> Chunks:
        """Yield the chunks of an answer."""
        progress, found, parts = Progress(), Gathered(), []
        yield self.chunk(self._delta({"role": "assistant", "content": ""}))
        async with aclosing(events):
            async for event in events:
                match event:
                    case Read() if wanted.progress:
                        yield self.chunk(self._delta({}), prompt_progress=progress.of(event))
                    case Written():
                        text, calls = self._split(event.text)
                        parts.append(text)
                        for chunk in self._deltas(text, calls, event.choices, wanted):
                            yield chunk
                    case Ended():
                        found.ended = event
        end = found.end
        text, calls = self._rest()
        for chunk in self._deltas(text, calls, (), wanted):
            yield chunk
        quoted = await self._quoted("".join([*parts, text]))
        finish = "tool_calls" if self._calls else end.why
        yield self.chunk(self._delta({}, finish), timings=timings(end), **quoted, ended=end)


async def with_usage(chunks: Sequence[Chunks], form: _Form, wanted: Wanted) -> Chunks:
    """Yield the chunks of one answer after the other, and the tokens of all where they are wanted."""
    ended = []
    for part in chunks:
        async with aclosing(part):
            async for name, value in part:
                if (end := value.pop("ended", None)) is not None:
                    ended.append(end)
                yield name, value | ({"usage": None} if wanted.usage else {})
    if wanted.usage:
        yield form.chunk(None, usage=usage(*ended))
