"""A server as a target: a real model behind HTTP, asked as its file is."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

import pi_gguf
from pi_gguf.bundled import TINY
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.models.server import RemoteModel


@contextmanager
def serving(answer, keys=None):
    """Serve `answer(path, body)` on this machine; yields the URL and the bodies that came. Fills `keys` with what was
    sent to be let in."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(*answer(self.path, None))

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send(*answer(self.path, bodies[-1]))

        def _send(self, code, value):
            if keys is not None:
                keys.append(self.headers["Authorization"])
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _redirecting(where, code=302):
    """Return a server whose every answer sends to another URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.send_header("Location", where + self.path.removeprefix("/moved"))
            self.end_headers()

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_to_another_host(llama, monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    keys = []
    with serving(lambda *_: (200, {"data": [{"id": "m"}]}), keys) as (url, _):
        other = _redirecting(url.replace("127.0.0.1", "localhost").removesuffix("/v1"), code)
        thread = Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(OptionError, match="sends to another host") as error:
                RemoteModel(f"http://127.0.0.1:{other.server_port}/v1", load_checkpoint(str(llama)), 64)
            assert keys == [] and "sk-secret" not in str(error.value)
        finally:
            other.shutdown()
            thread.join()
            other.server_close()


def test_a_name_and_password_in_a_url_are_in_no_report(llama):
    with serving(lambda *_: (200, {"data": [{"id": "m"}]})) as (url, _):
        address = url.replace("://", "://alice:secret@")
        with pytest.raises(OptionError) as error:
            RemoteModel(address, load_checkpoint(str(llama)), 64)
        assert "secret" not in str(error.value)
        assert RemoteModel(url, load_checkpoint(str(llama)), 64).name == url


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    pi_gguf.convert(TINY, path, quant="Q8_0", check="none")
    return path


def test_a_server_finds_the_passkeys_that_its_file_finds(gguf_path):
    options = {"windows": (300, 600), "distances": 2, "keys": 2, "seed": 3}
    with pi_gguf.open(gguf_path, n_ctx=1024) as model:

        def answer(path, body):
            if path == "/v1/models":
                return 200, {"data": [{"id": "tiny"}]}
            assert (path, body["model"], body["temperature"]) == ("/v1/completions", "tiny", 0)
            return 200, {"choices": [{"text": "".join(model.complete(body["prompt"], max_tokens=body["max_tokens"]))}]}

        with serving(answer) as (url, bodies):
            remote = pi_gguf.evaluate_passkey(url, tokenizer=TINY, **options)
    assert len(bodies) == 8 and all(body["prompt"].endswith("The pass key is") for body in bodies)
    local = pi_gguf.evaluate_passkey(str(gguf_path), **options)
    assert [(c.distance, c.found) for c in remote.cells] == [(c.distance, c.found) for c in local.cells]
    assert remote.k_max == {url: 600}, "the bundled model finds keys inside its window"


def test_a_wrong_answer_is_no_key_found():
    def answer(path, body):
        return 200, {"data": [{"id": "m"}]} if body is None else {"choices": [{"text": " 1234"}]}

    with serving(answer) as (url, _):
        report = pi_gguf.evaluate_passkey(url, tokenizer=TINY, windows=(300,), distances=1, keys=2)
    assert report.cells[0].found == 0 and report.k_max == {url: 0}


def test_what_a_server_cannot_do_is_said(cli):
    options = ("--tokenizer", TINY, "--windows", "300", "--distances", "1", "--keys", "1")
    for answered, code, says in (
        ((200, {}), 2, "lists no models"),
        ((401, {"error": "no key"}), 2, "the server refuses models with 401"),
    ):
        with serving(lambda path, body, answered=answered: answered) as (url, _):
            got, _, err = cli("eval", "passkey", url, *options)
            assert got == code and says in err and url in err
    got, _, err = cli("eval", "passkey", url, *options)  # it is gone now
    assert got == 2 and "no answer of a server" in err
    got, _, err = cli("eval", "passkey", url, "--windows", "300")
    assert got == 2 and "tokenizer must name the MODEL" in err
    for suite in ("passkey", "needle", "ruler", "summarize"):
        got, _, err = cli("eval", suite, "absent.gguf", "--tokenizer", TINY)
        assert got == 2 and "tokenizer is for URLs, got absent.gguf" in err
    with serving(lambda path, body: (200, {"data": [{"id": "m"}]})) as (url, _):
        with pytest.raises(OptionError, match="context and cache types are the server's"):
            pi_gguf.evaluate_passkey(url, tokenizer=TINY, context=4096)
        with pytest.raises(OptionError, match="context and cache types are the server's"):
            pi_gguf.evaluate_passkey(url, tokenizer=TINY, type_v="q8_0")
        with pytest.raises(OptionError, match="an answer without choices"):
            pi_gguf.evaluate_passkey(url, tokenizer=TINY, windows=(300,), distances=1, keys=1)
        got, _, err = cli("eval", "perplexity", url)
        assert got == 2 and "a server gives no log-probabilities" in err
        for against in (("kl", TINY, "--against", url), ("short", TINY, url)):
            got, _, err = cli("eval", *against)
            assert got == 2 and f"{url}: a server gives no log-probabilities" in err


def test_the_key_of_the_environment_is_sent(monkeypatch):
    seen = []

    def answer(path, body):
        return 200, {"data": [{"id": "m"}]} if body is None else {"choices": [{"text": ""}]}

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(answer, seen) as (url, _):
        pi_gguf.evaluate_passkey(url, tokenizer=TINY, windows=(300,), distances=1, keys=1)
    assert seen == ["Bearer secret"] * 2
