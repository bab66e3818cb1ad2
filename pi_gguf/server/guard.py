"""The door: who may ask, from where, and how much at a time; what every answer carries; one line of log each.

In: any request. Out: those that a program or a page of this machine may make; others are refused before anything of
them is read. A page of elsewhere reaches a server on loopback by two ways: its own name made to point there (the Host
header tells), and requests across sites (Origin and Sec-Fetch-Site tell).
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pi_gguf.server.protocol import ApiError
from pi_gguf.server.wire import json_response

BODY_BYTES, UPLOAD_BYTES = 8 * 2**20, 128 * 2**20

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY = ("0.0.0.0", "::")
"""Addresses to listen at that stand for all of a machine's."""

_OPEN = ("/", "/health", "/openapi.json")
"""What is answered without the key, beside the files of the desk."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """Who may ask.

    Args:
        hosts: names and addresses by which the server may be called, beside those of loopback: the one that it listens
            at, and what else was named.
        origins: of pages elsewhere that may ask, such as https://example.org; * for all.
        key: what everyone has to show; None where nobody has to.
        log: told a line about each answer; None keeps no log.
    """

    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    key: str | None = None
    log: Callable[[str], None] | None = None


class Guard:
    """Middleware that refuses, bounds, marks and logs."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._hosts = {name.lower().strip("[]") for name in (*_LOOPBACK, *rules.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets
        began, status, headers = time.monotonic(), 0, Headers(scope=scope)

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._mark(MutableHeaders(scope=message), headers)
            await send(message)

        try:
            refused = self._refusal(scope, headers)
            if refused:
                await json_response(refused.body, refused.status, refused.headers)(scope, receive, marked)
            elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await json_response({}, 200, _preflight(headers))(scope, receive, marked)
            else:
                await self._app(scope, _bounded(receive, _limit(scope)), marked)
        finally:
            if self._rules.log:
                path = quote(scope["path"], safe="/:")[:200]
                self._rules.log(f"{scope['method']} {path} {status or 'gone'} {time.monotonic() - began:.3f} s")

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if not self._known_host(headers.getlist("host")):
            return _forbidden("this name of the server is not known; start it with --allow-host NAME to use it")
        if not self._near(scope, headers):
            return _forbidden("a page of elsewhere may not ask; start the server with --cors ORIGIN to let it")
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if self._rules.key and not preflight and not _open(scope["path"]) and not self._has_key(headers):
            return ApiError(
                401, "the key is missing or wrong; send it as Authorization: Bearer KEY", "authentication_error",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            return ApiError(400, "Content-Length must be a number")
        return _too_large(_limit(scope)) if int(length) > _limit(scope) else None

    def _known_host(self, given: Sequence[str]) -> bool:
        """Whether a request was sent to a name that is the server's; an address needs no name, and none is faked."""
        if len(given) != 1:
            return False
        name = _name(f"//{given[0]}")
        if name in self._hosts:
            return True
        try:
            return any(host in self._hosts for host in _ANY) and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _near(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request comes from no page, from one of the server's own, or from one that was named."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none").lower()
        if origin is not None:
            kind, _, host = origin.lower().partition("://")
            return (kind in ("http", "https") and host == headers["host"].lower()) or self._named(origin)
        if site in ("none", "same-origin"):
            return True
        visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return visit and scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"

    def _named(self, origin: str) -> bool:
        return "*" in self._rules.origins or origin in self._rules.origins

    def _has_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        wanted = (self._rules.key or "").encode()
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), wanted)

    def _mark(self, answer: MutableHeaders, asked: Headers) -> None:
        for name, value in _HEADERS.items():
            answer[name] = value
        answer.setdefault("Cache-Control", "no-store")
        if (origin := asked.get("origin")) and self._named(origin):
            answer["Access-Control-Allow-Origin"] = origin
            answer["Access-Control-Expose-Headers"] = "Retry-After"
            answer.add_vary_header("Origin")


def _name(url: str) -> str:
    """Return the host of a URL without its port, in small letters; "" where it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return ""
    plain = parts.username is None and not (parts.path or parts.query or parts.fragment)
    return (parts.hostname or "") if plain else ""


def _preflight(headers: Headers) -> dict[str, str]:
    """Return what a browser has to hear before it sends a request of a page that was named."""
    wanted = headers.get("access-control-request-headers", "")
    told = {
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": wanted if wanted.isascii() and wanted.isprintable() else "",
        "Access-Control-Max-Age": "600",
    }
    if headers.get("access-control-request-private-network"):
        told["Access-Control-Allow-Private-Network"] = "true"
    return told


def _open(path: str) -> bool:
    return path in _OPEN or path.startswith("/desk/")


def _limit(scope: Scope) -> int:
    return UPLOAD_BYTES if (scope["method"], scope["path"]) == ("POST", "/v1/documents") else BODY_BYTES


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="forbidden")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit >> 20} MiB", code="too_large", headers={"Connection": "close"})


def _bounded(receive: Receive, limit: int) -> Receive:
    """Return a receiver that raises where a body goes beyond its limit, whatever length it announced."""
    got = 0

    async def counted() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > limit:
            raise _too_large(limit)
        return message

    return counted
