"""The door: foreign names, pages of elsewhere, wrong keys and bodies too large are refused before anything is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pi_gguf.server.guard import BODY_BYTES, UPLOAD_BYTES, Guard, Rules
from pi_gguf.server.protocol import ApiError
from pi_gguf.server.wire import json_response

HOST = "127.0.0.1:8080"


class Door:
    """A guard before an application that says how many bytes it was sent; `asked` counts what came through."""

    def __init__(self, rules: Rules) -> None:
        self.asked, self.lines = 0, list[str]()

        async def answer(request: Request) -> Response:
            self.asked += 1
            return Response(str(len(await request.body())))

        async def refused(_: Request, error: Exception) -> Response:
            assert isinstance(error, ApiError)
            return json_response(error.body, error.status, error.headers)

        routes = [Route("/{path:path}", answer, methods=["GET", "POST", "DELETE", "OPTIONS"])]
        self.app = Starlette(
            routes=routes, middleware=[Middleware(Guard, rules=rules)], exception_handlers={ApiError: refused}
        )

    def __call__(self, method: str = "GET", path: str = "/v1/models", **headers: str) -> httpx.Response:
        return self.send(method, path, {name.replace("_", "-"): value for name, value in headers.items()})

    def send(self, method: str, path: str, headers: dict, content: object = None) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
                return await client.request(method, path, headers=headers, content=content)

        return asyncio.run(send())


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "[::1]", "box.lan", "BOX.lan:8080"],
)
def test_names_of_the_server_are_known(host):
    assert Door(Rules(hosts=["box.lan"]))(host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "",
        "evil.example@localhost", "localhost@evil.example", "localhost/evil", "localhost:80:80", "localhost:port",
        "192.168.1.7", "0.0.0.0", "[::1", "localhost#x", "localhost?x", "2130706433", "127.1", "xlocalhost",
    ],
)  # fmt: skip
def test_other_names_are_refused(host):
    door = Door(Rules(hosts=["box.lan"]))
    answer = door(host=host)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden" and door.asked == 0


def test_two_names_are_none():
    scope = {
        "type": "http", "method": "GET", "path": "/", "scheme": "http", "http_version": "1.1", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"host", b"evil.example")],
    }  # fmt: skip
    door, sent = Door(Rules()), []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request", "body": b""}

    asyncio.run(Guard(door.app, Rules())(scope, receive, send))
    assert sent[0]["status"] == 403 and door.asked == 0


def test_a_server_for_all_addresses_is_called_by_any_but_not_by_any_name():
    door = Door(Rules(hosts=["0.0.0.0"], key="secret"))
    key = {"authorization": "Bearer secret"}
    assert door(host="192.168.1.7:8080", **key).status_code == door(host="[fe80::1]:8080", **key).status_code == 200
    assert door(host="evil.example", **key).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"origin": f"http://{HOST}"}, {"sec_fetch_site": "same-origin"}, {"sec_fetch_site": "none"},
        {"origin": f"http://{HOST}", "sec_fetch_site": "same-origin"},
    ],
)  # fmt: skip
def test_programs_and_the_own_page_may_ask(headers):
    assert Door(Rules())("POST", **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
        {"origin": f"http://{HOST}.evil.example"}, {"origin": f"ftp://{HOST}"}, {"origin": ""}, {"origin": HOST},
        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}, {"sec_fetch_site": "Cross-Site"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
        {"origin": f"http://evil.example@{HOST}"}, {"origin": "http://["},
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_pages_of_elsewhere_are_refused(headers, method):
    door = Door(Rules())
    answer = door(method, **headers)
    assert answer.status_code == 403 and door.asked == 0 and "access-control-allow-origin" not in answer.headers


def test_a_link_of_elsewhere_opens_the_page_and_no_frame_does():
    visit = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert Door(Rules())("GET", "/", **visit).status_code == 200
    assert Door(Rules())("POST", "/", **visit).status_code == 403
    assert Door(Rules())("GET", "/", **{**visit, "sec_fetch_dest": "iframe"}).status_code == 403


def test_a_named_page_of_elsewhere_may_ask():
    door = Door(Rules(origins=["https://app.example"], key="secret"))
    asked = {"origin": "https://app.example", "sec_fetch_site": "cross-site"}
    preflight = door(
        "OPTIONS", **asked, access_control_request_method="POST", access_control_request_private_network="true",
        access_control_request_headers="authorization, content-type",
    )  # fmt: skip
    assert preflight.status_code == 200 and door.asked == 0
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
    assert preflight.headers["access-control-allow-private-network"] == "true"
    assert door("POST", **asked).status_code == 401, "a preflight needs no key, the request does"
    answer = door("POST", **asked, authorization="Bearer secret")
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "Origin" in answer.headers["vary"]
    assert door("POST", origin="https://other.example", authorization="Bearer secret").status_code == 403
    assert door("OPTIONS", origin="https://other.example", access_control_request_method="POST").status_code == 403


def test_all_pages_may_ask_where_that_was_said():
    assert Door(Rules(origins=["*"]))("POST", origin="https://any.example").status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer secre", "Bearer secrets", "Basic secret", "secret",
        "Bearer sécret", "Bearer secret secret",
    ],
)  # fmt: skip
def test_a_wrong_key_is_refused(given):
    door = Door(Rules(key="secret"))
    answer = door.send("GET", "/v1/models", {} if given is None else {"authorization": given.encode()})
    assert answer.status_code == 401 and door.asked == 0
    assert answer.json()["error"]["type"] == "authentication_error" and answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/tokenize", "/v1/documents", "/anything", "/DESK/a", "/healthz"]
)
def test_the_key_opens_everything(path):
    door = Door(Rules(key="secret"))
    assert door("GET", path).status_code == 401
    assert door("GET", path, authorization="bearer secret").status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/desk/desk.js", "/openapi.json"])
def test_the_page_is_there_without_the_key(path):
    assert Door(Rules(key="secret"))("GET", path).status_code == 200


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/v1/chat/completions", BODY_BYTES), ("/v1/documents", UPLOAD_BYTES), ("/v1/documents/", BODY_BYTES)],
)
def test_a_body_that_says_it_is_too_large_is_not_read(path, limit):
    door = Door(Rules())
    answer = door.send("POST", path, {"content-length": str(limit + 1)}, b"")
    assert answer.status_code == 413 and door.asked == 0
    assert door.send("POST", path, {"content-length": str(limit)}, b"").status_code == 200
    assert door.send("POST", path, {"content-length": "-1"}, b"").status_code == 400
    assert door.send("POST", path, {"content-length": "9" * 30}, b"").status_code == 400


def test_a_body_that_grows_too_large_is_not_read_on():
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**20
            yield bytes(2**20)

    answer = Door(Rules()).send("POST", "/v1/completions", {}, endless())
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
    assert sent <= BODY_BYTES + 2**21


def test_every_answer_carries_what_keeps_a_page_harmless():
    door = Door(Rules(key="secret"))
    for answer in (door("GET", "/"), door("GET", "/v1/models"), door(host="evil.example")):
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"


def test_a_log_has_a_line_for_each_without_content():
    lines: list[str] = []
    door = Door(Rules(key="secret", log=lines.append))
    door.send("POST", "/v1/com%0apletions?prompt=private", {"authorization": "Bearer secret"}, b"private")
    door("GET", "/v1/models", authorization="Bearer private")
    assert len(lines) == 2 and "\n" not in "".join(lines)
    assert lines[0].startswith("POST /v1/com%0Apletions 404 ") and lines[1].startswith("GET /v1/models 401 ")
    assert "private" not in "".join(lines) and "secret" not in "".join(lines)
