"""Answers on their way: JSON, server-sent events, and a client that goes away before it has its answer.

In: what is to be answered. Out: responses of starlette. Who goes away ends the work that is done for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pi_gguf.errors import PiGgufError
from pi_gguf.server.protocol import ApiError, dumped, error_of, read_body

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_LONG = 2**16
"""Bytes of a body above which it is long."""

_log = logging.getLogger("uvicorn.error")


class Gone(Exception):
    """The client is not there any more; nothing is answered."""


async def body_of(request: Request, kind: type[M]) -> M:
    """Return the request that a body is, read in a thread where it is long.

    Raises:
        ApiError: it is no JSON, or a field has a value that cannot be honoured.
    """
    data = await request.body()
    return read_body(data, kind) if len(data) <= _LONG else await asyncio.to_thread(read_body, data, kind)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumped(value), status, headers, "application/json")


def error_body(error: Exception, name: str) -> ApiError:
    """Return any error as clients are told it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PiGgufError):
        return error_of(error, name)
    return ApiError(500, "an error of this program; the server's log says more", "server_error")


class EventStream(EventSourceResponse):
    """Server-sent events of JSON values; an error on the way is the last of them.

    Args:
        values: each with the name of its event, "" for none; closed in any case.
        name: of the model's file, for messages.
        end: what is sent behind the last.
    """

    def __init__(self, values: AsyncGenerator[tuple[str, Any], None], name: str, end: str = "") -> None:
        self._events = _events(values, name, end)
        super().__init__(self._events, headers={"Cache-Control": "no-store"}, sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _events(
    values: AsyncGenerator[tuple[str, Any], None], name: str, end: str
) -> AsyncGenerator[dict[str, str], None]:
    async with aclosing(values) as parts:
        try:
            async for event, value in parts:
                yield {"data": dumped(value), **({"event": event} if event else {})}
        except Exception as error:
            if not isinstance(error, ApiError | PiGgufError):
                _log.error("an error of this program", exc_info=error)
            yield {"data": dumped(error_body(error, name).body), **({"event": "error"} if not end else {})}
    if end:
        yield {"data": end}


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work returns, once its body was read; cancel it when the client goes away.

    Raises:
        Gone: the client went away.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def begun(events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Return events whose first is there, so that what refuses them has raised its error."""
    first = await anext(events)

    async def whole() -> AsyncGenerator[T, None]:
        async with aclosing(events) as rest:
            yield first
            async for event in rest:
                yield event

    return whole()
