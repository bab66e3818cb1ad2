"""The endpoints of documents: given, listed, watched, shown, searched for where the model looked, and removed.

In: requests of starlette. Out: responses. What a client names a file is a name to show, never a path.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pi_gguf.engine.library import Entry, Library
from pi_gguf.errors import GgufError
from pi_gguf.server.answers import Chunks
from pi_gguf.server.markdown import render as to_html
from pi_gguf.server.protocol import ApiError, LookedRequest, RenderRequest, error_of
from pi_gguf.server.talk import check_characters
from pi_gguf.server.wire import EventStream, body_of, json_response, unless_gone


class Shelf:
    """What a library is asked for by clients."""

    def __init__(self, library: Library, file: str, window: int) -> None:
        self._library, self._file, self._window = library, file, window

    async def add(self, request: Request) -> Response:
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "file is missing; send it as multipart/form-data", param="file")
                name, data = file.filename or "", await file.read()
        except HTTPException as error:
            raise ApiError(400, f"no form that can be read ({error.detail})") from error
        entry, new = await self._library.add(name, data)
        return json_response(entry.to_json(), 201 if new else 200)

    async def entries(self, _: Request) -> Response:
        entries = self._library.entries()
        kept = sum(entry.kept_bytes for entry in entries)
        told = {"kept_bytes": kept, "limit_bytes": self._library.limit_bytes}
        return json_response({"object": "list", "data": [entry.to_json() for entry in entries], **told})

    async def entry(self, request: Request) -> Response:
        return json_response(self._entry(request).to_json())

    async def remove(self, request: Request) -> Response:
        entry = self._entry(request)
        await self._library.remove(entry.id)
        return json_response({"id": entry.id, "object": "document", "deleted": True})

    async def progress(self, request: Request) -> Response:
        entry = self._entry(request)

        async def told() -> Chunks:
            async for changed in self._library.watch(entry.id):
                yield "", changed.to_json()

        return EventStream(told(), self._file)

    async def read(self, request: Request) -> Response:
        entry = self._entry(request)
        self._library.read(entry.id)
        return json_response(self._library.entry(entry.id).to_json())

    async def stop(self, request: Request) -> Response:
        entry = self._entry(request)
        await self._library.stop(entry.id)
        return json_response(self._library.entry(entry.id).to_json())

    async def text(self, request: Request) -> Response:
        entry = self._entry(request)
        start, end = _whole(request, "start", 0), _whole(request, "end", entry.characters)
        return json_response(await asyncio.to_thread(self._library.text, entry.id, start, end))

    async def looked(self, request: Request) -> Response:
        entry, asked = self._entry(request), await body_of(request, LookedRequest)
        messages = [message.to_template() for message in asked.messages]
        check_characters([messages, asked.answer], self._window)
        try:
            passages = await unless_gone(request, self._library.looked(entry.id, messages, asked.answer))
        except GgufError as error:  # as where an answer has no word of the document
            raise ApiError(400, error_of(error, self._file).body["error"]["message"], param="answer") from error
        return json_response({"passages": passages})

    async def render(self, request: Request) -> Response:
        asked, quotes = await body_of(request, RenderRequest), list[dict[str, Any]]()
        html = await asyncio.to_thread(to_html, asked.markdown)  # first: it refuses what is too long
        if asked.document is not None:
            quotes = await asyncio.to_thread(self._library.quotes, asked.document, asked.markdown)
        return json_response({"html": html, "quotes": quotes})

    def _entry(self, request: Request) -> Entry:
        return self._library.entry(request.path_params["id"])


def _whole(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise ApiError(400, f"{name} must be a whole number of characters, at least 0", param=name)
    return int(value)
