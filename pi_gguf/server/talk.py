"""The endpoints that write: completions and chats, whole or as streams.

In: requests of starlette. Out: responses. What takes long before the engine is asked (templates, grammars, tokens of
long texts) goes on in threads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pi_gguf.engine.engine import Engine
from pi_gguf.engine.jobs import Job
from pi_gguf.engine.library import Library
from pi_gguf.runtime.model import Model
from pi_gguf.server.answers import (
    ChatForm,
    Chunks,
    CompletionForm,
    Echo,
    Gathered,
    Logprobs,
    Wanted,
    Within,
    gather,
    with_usage,
)
from pi_gguf.server.protocol import ApiError, ChatRequest, Chosen, CompletionRequest, Generation
from pi_gguf.server.tools import Apart, call_grammar, knows_tools, style_of
from pi_gguf.server.wire import EventStream, begun, body_of, json_response, unless_gone

COMPLETION_TOKENS, CHAT_TOKENS = 16, 512
"""What is written at most where no number is given; less where the window has less room."""

CHARACTERS_A_TOKEN = 64
"""What a conversation may have for each token of the window, before its template is run; words have about five."""


class Talk:
    """What an engine is asked for by clients.

    Args:
        engine: writes.
        library: knows the documents.
        name: of the model.
    """

    def __init__(self, engine: Engine, library: Library, name: str) -> None:
        self.engine, self.library, self.name = engine, library, name
        self._file = str(engine.model.path)

    def check_name(self, name: str | None) -> None:
        """Check that a model is the one that is here.

        Raises:
            ApiError: it is another.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404, f"there is no model {name[:100]!r} here; it is {self.name!r}", "not_found_error",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def completions(self, request: Request) -> Response:
        asked = await body_of(request, CompletionRequest)
        self.check_name(asked.model)
        jobs = await unless_gone(request, asyncio.to_thread(self._completion_jobs, asked))
        form, wanted = CompletionForm(self.name), _wanted(asked, asked.logprobs is not None)
        if asked.stream:
            return await self._stream_completions(request, form, jobs, wanted)
        found = await unless_gone(request, self._all([job for job, _ in jobs]))
        choices = [
            form.choice(index, (echo.text if echo else "") + one.text, one.end.why, _scored(one, echo, wanted.logprobs))
            for index, (one, (_, echo)) in enumerate(zip(found, jobs, strict=True))
        ]
        return json_response(form.whole(choices, *(one.end for one in found)))

    async def chat(self, request: Request) -> Response:
        asked = await body_of(request, ChatRequest)
        self.check_name(asked.model)
        job, apart = await unless_gone(request, asyncio.to_thread(self.chat_job, asked))
        form = ChatForm(self.name, self.engine.model.is_end, apart, self._quotes(asked.document))
        wanted = _wanted(asked, bool(asked.logprobs))
        events = self.engine.run(job) if asked.document is None else self.library.run(asked.document, job)
        if not asked.stream:
            found = await unless_gone(request, gather(events))
            return json_response(await form.answer(found, wanted.logprobs))
        events = await unless_gone(request, begun(events))
        return EventStream(with_usage([form.stream(events, wanted)], form, wanted), self._file, "[DONE]")

    # Completions

    def _completion_jobs(self, asked: CompletionRequest) -> list[tuple[Job, Echo | None]]:
        """Return what the engine has to do for each prompt, and what is to be repeated of it."""
        sampling, model, jobs = asked.sampling(), self.engine.model, list[tuple[Job, Echo | None]]()
        for prompt in asked.prompts():
            ids = model.tokenize(prompt) if isinstance(prompt, str) else prompt
            if not all(0 <= one < model.n_vocab for one in ids):
                raise ApiError(400, f"prompt: tokens must be from 0 to {model.n_vocab - 1}", param="prompt")
            if not ids:
                raise ApiError(400, "prompt: it has no token, and the model has none to begin with", param="prompt")
            room = self.engine.check("prompt", len(ids), asked.max_tokens)
            limit = min(COMPLETION_TOKENS, room) if asked.max_tokens is None else asked.max_tokens
            text = prompt if isinstance(prompt, str) else model.detokenize(ids)
            echo = _echo(model, text, ids) if asked.echo else None
            jobs.append((Job(ids, limit, sampling, asked.logprobs, asked.logprobs if asked.echo else None), echo))
        return jobs

    async def _stream_completions(
        self, request: Request, form: CompletionForm, jobs: Sequence[tuple[Job, Echo | None]], wanted: Wanted
    ) -> Response:
        """Return the texts of the prompts as a stream, one after the other."""
        first = await unless_gone(request, begun(self.engine.run(jobs[0][0])))
        events = [first, *(self.engine.run(job) for job, _ in jobs[1:])]
        chunks: list[Chunks] = [
            form.stream(index, one, echo, wanted)
            for index, (one, (_, echo)) in enumerate(zip(events, jobs, strict=True))
        ]
        return EventStream(with_usage(chunks, form, wanted), self._file, "[DONE]")

    async def _all(self, jobs: Sequence[Job]) -> list[Gathered]:
        """Return all answers; no more of them are asked for at a time than the engine works on."""
        free = asyncio.Semaphore(self.engine.slots)

        async def one(job: Job) -> Gathered:
            async with free:
                return await gather(self.engine.run(job))

        tasks = [asyncio.ensure_future(one(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Chats

    def chat_job(self, asked: ChatRequest) -> tuple[Job, Apart | None]:
        """Return what the engine has to do for a chat, and what takes calls out of its text, where there are tools."""
        model, apart, must_be, tools = self.engine.model, None, None, None
        if asked.tools and asked.tool_choice != "none":
            template = str(model.info.metadata.get("tokenizer.chat_template", ""))
            if not knows_tools(template):
                raise ApiError(400, "this model's chat template knows no tools; leave them out", param="tools")
            tools, style = [tool.model_dump(exclude_none=True) for tool in asked.tools], style_of(template)
            apart = Apart([tool.function.name for tool in asked.tools], style)
            if demanded := _demanded(asked):
                must_be = call_grammar(demanded, style)
        elif asked.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
        messages, stops = [message.to_template() for message in asked.messages], tuple[str, ...]()
        check_characters([messages, tools], model.n_ctx)
        if asked.document is None:
            ids = model.chat_ids(messages, tools)
        else:
            ids, stops = self.library.chat_ids(asked.document, messages, tools)
        room = self.engine.check("conversation", len(ids), asked.limit)
        limit = asked.limit or min(CHAT_TOKENS, room)
        sampling = asked.sampling(stops, must_be)
        return Job(ids, limit, sampling, asked.top, special=apart is not None), apart

    def _quotes(self, document: str | None) -> Any:
        if document is None:
            return None
        return lambda text: asyncio.to_thread(self.library.quotes, document, text)


def check_characters(value: Any, window: int) -> None:
    """Check that the texts of a conversation are not far too long for a window of so many tokens.

    Raises:
        ApiError: they are.
    """
    characters, parts = 0, [value]
    while parts:
        match parts.pop():
            case str() as text:
                characters += len(text)
            case list() as some:
                parts += some
            case dict() as some:
                parts += (*some, *some.values())
    if characters > CHARACTERS_A_TOKEN * window:
        raise ApiError(
            400, f"conversation of {characters:,} characters does not fit the window of {window} tokens",
            "exceed_context_size_error", code="context_length_exceeded", param="messages",
            more={"n_prompt_tokens": math.ceil(characters / CHARACTERS_A_TOKEN), "n_ctx": window},
        )  # fmt: skip


def _demanded(asked: ChatRequest) -> list[dict[str, Any]]:
    """Return the functions of which one has to be called; none where the model may do as it likes."""
    functions = [tool.function.model_dump() for tool in asked.tools or ()]
    if asked.tool_choice == "required":
        return functions
    if not isinstance(asked.tool_choice, Chosen):
        return []
    name = asked.tool_choice.function.name
    if not (found := [one for one in functions if one["name"] == name]):
        raise ApiError(400, f"tool_choice: there is no function {name[:100]!r} among the tools", param="tool_choice")
    return found


def _wanted(asked: Generation, logprobs: bool) -> Wanted:
    options = asked.stream_options
    return Wanted(bool(options and options.include_usage), bool(asked.return_progress), logprobs)


def _scored(found: Gathered, echo: Echo | None, wanted: bool) -> dict[str, Any] | None:
    """Return the log-probabilities of a text; those of the prompt first, where it is repeated."""
    if not wanted:
        return None
    within = Within()
    choices = [*within.add(found.text, found.choices), *within.end(found.end.why)]
    return Logprobs().of([*(found.prompt or ()), *choices], echo)


def _echo(model: Model, text: str, ids: Sequence[int]) -> Echo:
    """Return a prompt as its answer begins with it."""
    pieces = [model.session.piece(one) for one in ids]
    begin = next((i for i, piece in enumerate(pieces) if piece), 0)
    if pieces[begin][:1] == b" " and text[:1] != " ":
        pieces[begin] = pieces[begin][1:]  # the space that SentencePiece puts before a text
    return Echo(text, model.session.piece(ids[0], True), tuple(pieces))
