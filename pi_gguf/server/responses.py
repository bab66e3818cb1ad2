"""OpenAI's newer endpoint, /v1/responses, as far as it is text in and text out: one answer, kept nowhere.

In: requests of starlette. Out: an answer, or its events as they come.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from pi_gguf.engine.jobs import Ended, Written
from pi_gguf.server.answers import Chunks, Events, Gathered, gather
from pi_gguf.server.protocol import (
    ChatRequest,
    Message,
    NamedSchema,
    Part,
    ResponseFormat,
    Some,
    Strict,
    Temperature,
)
from pi_gguf.server.talk import Talk
from pi_gguf.server.wire import EventStream, begun, body_of, json_response, unless_gone


class Item(BaseModel):
    """A message of the input."""

    model_config = ConfigDict(strict=True)
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Some[Part]


class Format(NamedSchema):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(BaseModel):
    """How the text is written."""

    model_config = ConfigDict(strict=True)
    format: Format | None = None


class ResponseRequest(Strict):
    """Something to answer."""

    input: str | Annotated[Some[Item], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: Temperature | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    text: TextOptions | None = None
    stream: bool | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None

    def to_chat(self) -> ChatRequest:
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        said = [Message(role="system", content=self.instructions)] if self.instructions else []
        said += [Message(role=one.role, content=one.content) for one in items]
        form = self.text.format if self.text else None
        wanted = None
        if form and form.type != "text":
            wanted = ResponseFormat(type=form.type, json_schema=form if form.type == "json_schema" else None)
        return ChatRequest(
            messages=said, max_completion_tokens=self.max_output_tokens, temperature=self.temperature,
            top_p=self.top_p, response_format=wanted,
        )  # fmt: skip


class _Answer:
    """An answer that grows."""

    def __init__(self, model: str, asked: ResponseRequest) -> None:
        self._item = f"msg_{secrets.token_hex(12)}"
        self._number = -1
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()), "model": model,
            "error": None, "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "metadata": {}, "parallel_tool_calls": False, "previous_response_id": None, "store": False,
            "temperature": asked.temperature, "top_p": asked.top_p, "tool_choice": "none", "tools": [],
            "text": {"format": asked.text.format.model_dump(by_alias=True) if asked.text and asked.text.format
                     else {"type": "text"}},
        }  # fmt: skip

    def state(self, text: str, end: Ended | None) -> dict[str, Any]:
        cut = end is not None and end.why == "length"
        told: dict[str, Any] = {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        if end:
            told = {
                "status": "incomplete" if cut else "completed",
                "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
                "output": [self.item(text, "incomplete" if cut else "completed")],
                "usage": {
                    "input_tokens": end.prompt, "input_tokens_details": {"cached_tokens": end.known},
                    "output_tokens": end.written, "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": end.prompt + end.written,
                },
            }  # fmt: skip
        return {**self._head, **told}

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self.part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def event(self, name: str, **told: Any) -> tuple[str, dict[str, Any]]:
        self._number += 1
        return f"response.{name}", {"type": f"response.{name}", "sequence_number": self._number, **told}

    async def stream(self, events: Events) -> Chunks:
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield self.event("created", response=self.state("", None))
        yield self.event("in_progress", response=self.state("", None))
        yield self.event("output_item.added", output_index=0, item=self.item(None, "in_progress"))
        yield self.event("content_part.added", **place, part=self.part(""))
        found = Gathered()
        async with aclosing(events):
            async for one in events:
                match one:
                    case Written(text=text) if text:
                        found.text += text
                        yield self.event("output_text.delta", **place, delta=text, logprobs=[])
                    case Ended():
                        found.ended = one
        whole = self.state(found.text, found.end)
        yield self.event("output_text.done", **place, text=found.text, logprobs=[])
        yield self.event("content_part.done", **place, part=self.part(found.text))
        yield self.event("output_item.done", output_index=0, item=whole["output"][0])
        yield self.event(whole["status"], response=whole)


def responses(talk: Talk, file: str) -> Any:
    """Return the endpoint."""

    async def answer(request: Request) -> Response:
        asked = await body_of(request, ResponseRequest)
        talk.check_name(asked.model)
        job, _ = await unless_gone(request, asyncio.to_thread(talk.chat_job, asked.to_chat()))
        form = _Answer(talk.name, asked)
        if asked.stream:
            return EventStream(form.stream(await unless_gone(request, begun(talk.engine.run(job)))), file)
        found = await unless_gone(request, gather(talk.engine.run(job)))
        return json_response(form.state(found.text, found.end))

    return answer
