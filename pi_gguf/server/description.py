"""What the server answers, described for programs: OpenAPI, made from the models of the requests.

In: nothing but those. Out: the description, as JSON. The schema of a request refuses what the server refuses, as far as
a schema can say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pi_gguf.common.provenance import package_version
from pi_gguf.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LookedRequest,
    RenderRequest,
    TokenizeRequest,
)
from pi_gguf.server.responses import ResponseRequest

_REQUESTS: tuple[type[BaseModel], ...] = (
    ChatRequest, CompletionRequest, DetokenizeRequest, LookedRequest, RenderRequest, ResponseRequest, TokenizeRequest,
)  # fmt: skip

_TEXT, _WHOLE, _NUMBER, _LIST = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "array"}
_OBJECT: dict[str, Any] = {"type": "object"}
_EVENT: dict[str, Any] = {"type": "object", "properties": {"data": _TEXT, "event": _TEXT}, "required": ["data"]}
"""Of a stream; its data are JSON, or [DONE]."""

_ERRORS = {
    400: "a value that cannot be honoured, or a prompt that does not fit the window",
    401: "the key is missing or wrong",
    403: "a name of the server that is not known, or a page of elsewhere",
    404: "no such model, document or address",
    405: "another method",
    413: "the body is too large",
    429: "too many wait; Retry-After says for how many seconds to wait",
    500: "an error of the server",
    503: "the server is closing, or has no memory for this",
}


def _objects(**fields: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields, all of them there."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def _list_of(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _const(value: str) -> dict[str, Any]:
    return {"type": "string", "const": value}


_ANSWERS: dict[str, dict[str, Any]] = {
    "Error": _objects(
        error=_objects(
            message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]}
        )
    ),
    "Model": _objects(id=_TEXT, object=_const("model"), created=_WHOLE, owned_by=_TEXT, meta=_OBJECT),
    "Document": _objects(
        object=_const("document"), id=_TEXT, name=_TEXT, format=_TEXT, characters=_WHOLE, tokens=_WHOLE,
        window=_WHOLE, room=_WHOLE,
        status={"type": "string", "enum": ["waiting", "reading", "kept", "unread", "failed"]},
        read=_WHOLE, known=_WHOLE, seconds_left=_NUMBER, kept_bytes=_WHOLE, added=_NUMBER, used=_NUMBER, error=_TEXT,
        trust=_TEXT,
    ),
    "Completion": _objects(
        id=_TEXT, object=_const("text_completion"), created=_WHOLE, model=_TEXT,
        choices=_list_of(
            _objects(index=_WHOLE, text=_TEXT, finish_reason=_TEXT, logprobs={"type": ["object", "null"]})
        ),
        usage=_OBJECT, timings=_OBJECT,
    ),
    "ChatCompletion": _objects(
        id=_TEXT, object=_const("chat.completion"), created=_WHOLE, model=_TEXT,
        choices=_list_of(
            _objects(index=_WHOLE, message=_OBJECT, finish_reason=_TEXT, logprobs={"type": ["object", "null"]})
        ),
        usage=_OBJECT, timings=_OBJECT,
    ),
    "Response": _objects(
        id=_TEXT, object=_const("response"), created_at=_WHOLE, model=_TEXT, status=_TEXT, output=_LIST, usage=_OBJECT
    ),
    "Models": _objects(object=_const("list"), data=_list_of({"$ref": "#/components/schemas/Model"})),
    "Documents": _objects(
        object=_const("list"), data=_list_of({"$ref": "#/components/schemas/Document"}), kept_bytes=_WHOLE,
        limit_bytes=_WHOLE,
    ),
    "Deleted": _objects(id=_TEXT, object=_const("document"), deleted={"const": True}),
    "Passage": _objects(start=_WHOLE, end=_WHOLE, text=_TEXT, place=_TEXT),
    "Looked": _objects(passages=_list_of(_objects(start=_WHOLE, end=_WHOLE, place=_TEXT, share=_NUMBER))),
    "Rendered": _objects(html=_TEXT, quotes=_list_of(_OBJECT)),
    "Tokens": _objects(tokens=_list_of(_WHOLE)),
    "Content": _objects(content=_TEXT),
    "Health": _objects(status=_const("ok")),
}  # fmt: skip


def _content(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(name: str, summary: str, good: Mapping[int, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return an operation: its good answers by status, and all errors."""
    answers = {str(status): {"description": summary, "content": content} for status, content in good.items()}
    for status, text in _ERRORS.items():
        answers[str(status)] = {"description": text, "content": _content("application/json", _ref("Error"))}
    return {"operationId": name, "summary": summary, "responses": answers, **more}


def _get(name: str, summary: str, answer: str, **more: Any) -> dict[str, Any]:
    return _operation(name, summary, {200: _content("application/json", _ref(answer))}, **more)


def _post(name: str, summary: str, asked: type[BaseModel], answer: str, streams: bool = False) -> dict[str, Any]:
    content = _content("application/json", _ref(answer))
    if streams:
        content |= _content("text/event-stream", _EVENT)
    body = {"required": True, "content": _content("application/json", _ref(asked.__name__))}
    return _operation(name, summary, {200: content}, requestBody=body)


def _id(text: str, example: str) -> list[dict[str, Any]]:
    return [{"name": "id", "in": "path", "required": True, "description": text, "schema": _TEXT, "example": example}]


def _query(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}}


def _document_paths() -> dict[str, Any]:
    of = {"parameters": _id("of the document", "doc-1")}
    document = _content("application/json", _ref("Document"))
    upload = _objects(file={"type": "string", "format": "binary"})
    return {
        "/v1/documents": {
            "get": _get("documents", "The documents", "Documents"),
            "post": _operation(
                "add_document", "A document is given, and read in the background; 200 where it was there",
                {200: document, 201: document},
                requestBody={"required": True, "content": _content("multipart/form-data", upload)},
            ),
        },
        "/v1/documents/{id}": of | {
            "get": _get("document", "A document", "Document"),
            "delete": _get("remove_document", "A document is removed, with what was read of it", "Deleted"),
        },
        "/v1/documents/{id}/progress": of | {
            "get": _operation("progress", "A document when it changes", {200: _content("text/event-stream", _EVENT)}),
        },
        "/v1/documents/{id}/read": of | {"post": _get("read_document", "A document is read again", "Document")},
        "/v1/documents/{id}/stop": of | {"post": _get("stop_document", "A document is read no further", "Document")},
        "/v1/documents/{id}/text": of | {
            "get": _get("document_text", "Part of a document's text", "Passage",
                        parameters=[_query("start"), _query("end")]),
        },
        "/v1/documents/{id}/looked": of | {
            "post": _post("looked", "Where the model looked while it wrote", LookedRequest, "Looked"),
        },
    }  # fmt: skip


def describe(model: str) -> dict[str, Any]:
    """Return the description of a server with one model."""
    paths = {
        "/health": {"get": _get("health", "Whether the server is there", "Health", security=[])},
        "/metrics": {"get": _operation("metrics", "Figures for Prometheus", {200: _content("text/plain", _TEXT)})},
        "/v1/models": {"get": _get("models", "The model", "Models")},
        "/v1/models/{id}": {
            "parameters": _id("of the model", model),
            "get": _get("model", "The model", "Model"),
        },
        "/v1/completions": {
            "post": _post("completions", "A text goes on", CompletionRequest, "Completion", streams=True)
        },
        "/v1/chat/completions": {
            "post": _post("chat", "A conversation is answered", ChatRequest, "ChatCompletion", streams=True)
        },
        "/v1/responses": {"post": _post("responses", "Text is answered", ResponseRequest, "Response", streams=True)},
        "/tokenize": {"post": _post("tokenize", "The tokens of a text", TokenizeRequest, "Tokens")},
        "/detokenize": {"post": _post("detokenize", "The text of tokens", DetokenizeRequest, "Content")},
        "/v1/render": {"post": _post("render", "Markdown as HTML that is safe", RenderRequest, "Rendered")},
        **_document_paths(),
    }
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in _REQUESTS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "pi-gguf", "version": package_version(), "summary": "A GGUF file, for many at a time"},
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"] | _ANSWERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
