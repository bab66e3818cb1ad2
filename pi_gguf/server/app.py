"""The application: what is answered at which address.

In: an engine, a library, and who may ask. Out: an ASGI application. Every error is one in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pi_gguf.engine.engine import Engine
from pi_gguf.engine.library import Library
from pi_gguf.errors import PiGgufError
from pi_gguf.runtime.reading import reach, trust
from pi_gguf.server.description import describe
from pi_gguf.server.guard import Guard, Rules
from pi_gguf.server.metrics import CONTENT_TYPE, Metrics
from pi_gguf.server.protocol import ApiError, DetokenizeRequest, TokenizeRequest
from pi_gguf.server.responses import responses
from pi_gguf.server.shelf import Shelf
from pi_gguf.server.talk import Talk
from pi_gguf.server.wire import Gone, body_of, error_body, json_response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """What is chosen when a server is started.

    Args:
        rules: who may ask.
        form: what stands around document and question: chat, question or plain.
    """

    rules: Rules = field(default_factory=Rules)
    form: str | None = None


def create_app(engine: Engine, library: Library, settings: Settings) -> Starlette:
    """Return the application."""
    file, name = str(engine.model.path), engine.model.path.stem
    talk, shelf, desk = Talk(engine, library, name), Shelf(library, file, engine.model.n_ctx), _desk()
    model, metrics, description = _model(engine, name, settings.form), Metrics(engine.figures), describe(name)

    async def models(request: Request) -> Response:
        if "id" not in request.path_params:
            return json_response({"object": "list", "data": [model]})
        talk.check_name(request.path_params["id"])
        return json_response(model)

    async def page(request: Request) -> Response:
        return _file(desk, request, request.path_params.get("file", "index.html"))

    async def health(_: Request) -> Response:
        return json_response({"status": "ok"})

    async def openapi(_: Request) -> Response:
        return json_response(description)

    async def figures(_: Request) -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, endpoint, methods=methods or ["GET"])

    routes = [
        route("/", page),
        route("/desk/{file}", page),
        route("/health", health),
        route("/metrics", figures),
        route("/openapi.json", openapi),
        route("/v1/models", models),
        route("/v1/models/{id:path}", models),
        route("/v1/completions", talk.completions, "POST"),
        route("/v1/chat/completions", talk.chat, "POST"),
        route("/v1/responses", responses(talk, file), "POST"),
        route("/tokenize", _tokenize(engine), "POST"),
        route("/detokenize", _detokenize(engine), "POST"),
        route("/v1/documents", shelf.entries),
        route("/v1/documents", shelf.add, "POST"),
        route("/v1/documents/{id}", shelf.entry),
        route("/v1/documents/{id}", shelf.remove, "DELETE"),
        route("/v1/documents/{id}/progress", shelf.progress),
        route("/v1/documents/{id}/read", shelf.read, "POST"),
        route("/v1/documents/{id}/stop", shelf.stop, "POST"),
        route("/v1/documents/{id}/text", shelf.text),
        route("/v1/documents/{id}/looked", shelf.looked, "POST"),
        route("/v1/render", shelf.render, "POST"),
    ]
    handlers: dict[Any, Any] = {
        kind: _handler(file) for kind in (ApiError, PiGgufError, HTTPException, Gone, Exception)
    }
    app = Starlette(routes=routes, middleware=[Middleware(Guard, rules=settings.rules)], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _handler(file: str) -> Callable[[Request, Exception], Response]:
    """Return what makes a response of an error."""

    def answer(_: Request, error: Exception) -> Response:
        if isinstance(error, Gone):
            return Response(status_code=499)
        if isinstance(error, HTTPException):
            kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
            said = {404: "nothing is here", 405: "this method is not allowed here"}
            message = said.get(error.status_code, error.detail)
            error = ApiError(error.status_code, message, kind, headers=dict(error.headers or {}))
        told = error_body(error, file)
        return json_response(told.body, told.status, told.headers)

    return answer


# What a server has


def _model(engine: Engine, name: str, form: str | None) -> dict[str, Any]:
    """Return the entry of the model in the list of models."""
    model = engine.model
    measured, k_max = reach(model.info)
    status = model.path.stat()
    return {
        "id": name,
        "object": "model",
        "created": int(status.st_mtime),
        "owned_by": "pi-gguf",
        "meta": {
            "n_ctx": model.n_ctx,
            "n_params": sum(math.prod(tensor.shape) for tensor in model.info.tensors),
            "size": status.st_size,
            "slots": engine.slots,
            "chat": model.has_chat_template,
            "form": form or ("chat" if model.has_chat_template else "question"),
            "trust": trust(0, measured, k_max),
            "measured": measured,
            "k_max": k_max,
        },
    }


def _tokenize(engine: Engine) -> Endpoint:
    async def tokenize(request: Request) -> Response:
        asked = await body_of(request, TokenizeRequest)
        ids = await asyncio.to_thread(engine.model.tokenize, asked.content, add_special=asked.add_special)
        return json_response({"tokens": ids})

    return tokenize


def _detokenize(engine: Engine) -> Endpoint:
    async def detokenize(request: Request) -> Response:
        ids = (await body_of(request, DetokenizeRequest)).tokens
        if not all(one < engine.model.n_vocab for one in ids):
            raise ApiError(400, f"tokens must be from 0 to {engine.model.n_vocab - 1}", param="tokens")
        return json_response({"content": await asyncio.to_thread(engine.model.detokenize, ids) if ids else ""})

    return detokenize


# The desk


def _desk() -> dict[str, tuple[bytes, str]]:
    """Return the files of the desk by name, each with its mark."""
    folder = importlib.resources.files("pi_gguf.server") / "desk"
    if not folder.is_dir():
        return {}
    files = {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in _TYPES}
    return {name: (data, f'"{hashlib.sha256(data).hexdigest()[:32]}"') for name, data in files.items()}


def _file(desk: dict[str, tuple[bytes, str]], request: Request, name: str) -> Response:
    if name not in desk:
        raise HTTPException(404)
    data, mark = desk[name]
    headers = {"ETag": mark, "Cache-Control": "no-cache", "Content-Type": _TYPES[name.rpartition(".")[2]]}
    if mark in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers)
