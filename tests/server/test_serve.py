"""The command serve as a process: where it listens and for whom, how it ends, and what it has when it starts again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from books import words

from pi_gguf.errors import OptionError
from pi_gguf.server.serve import Address

BOOK = words(1500)


class Process:
    """A server in a process of its own."""

    def __init__(self, path: Path, log: Path, *options: str) -> None:
        command = [sys.executable, "-m", "pi_gguf", "serve", str(path), "--port", "0", "--n-ctx", "4096", *options]
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not (found := re.search(r"the API:\s+(http://\S+)/v1", self.said())):
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)
        self.url = found[1]
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, text: str) -> bool:
        """Wait for what is logged behind an answer."""
        end = time.monotonic() + 30
        while text not in self.said() and time.monotonic() < end:
            time.sleep(0.02)
        return text in self.said()

    def answers(self) -> bool:
        try:
            return self.get("/health") == {"status": "ok"}
        except OSError:
            return False

    def get(self, path: str, body: Any = None, **headers: str) -> Any:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def give(self, name: str, text: str) -> dict[str, Any]:
        form = (
            f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{text}\r\n--x--\r\n'.encode()
        )
        return self.get("/v1/documents", form, **{"Content-Type": "multipart/form-data; boundary=x"})

    def ask(self, document: str) -> dict[str, Any]:
        return self.get("/v1/chat/completions", {
            "model": self.get("/v1/models")["data"][0]["id"], "document": document, "max_tokens": 12,
            "messages": [{"role": "user", "content": "What did the captain say?"}],
        })  # fmt: skip

    def until(self, document: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + 120
        while not true(entry := self.get(f"/v1/documents/{document}")):
            assert time.monotonic() < end, entry
            time.sleep(0.02)
        return entry

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(tiny_gguf, tmp_path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one(*options: str) -> Process:
        log = tmp_path / f"{len(started)}.log"
        started.append(Process(tiny_gguf, log, "--cache-dir", str(tmp_path / "cache"), *options))
        return started[-1]

    yield one
    for process in started:
        process.process.kill()
        process.process.wait()


def test_a_restart_loses_no_document_and_reads_nothing_again(start):
    server = start()
    id = server.give("book.txt", BOOK)["id"]
    server.until(id, lambda entry: entry["status"] == "kept")
    first = server.ask(id)
    assert server.end() == 130
    assert "Traceback" not in server.said()
    again = start()
    (entry,) = again.get("/v1/documents")["data"]
    assert (entry["id"], entry["status"], entry["name"]) == (id, "kept", "book.txt")
    second = again.ask(id)
    assert second["choices"][0]["message"] == first["choices"][0]["message"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= entry["tokens"]


def test_a_kill_loses_no_finished_document(start):
    server = start()
    id = server.give("book.txt", BOOK)["id"]
    server.until(id, lambda entry: entry["status"] == "kept")
    other = server.give("other.txt", words(1500, 3000))["id"]
    server.end(signal.SIGKILL)
    again = start()
    states = {entry["id"]: entry["status"] for entry in again.get("/v1/documents")["data"]}
    assert states[id] == "kept"
    assert states.get(other, "unread") in ("unread", "kept")
    assert again.ask(other)["usage"]["completion_tokens"] > 0


def test_ending_while_it_reads_keeps_what_was_read(start):
    server = start()
    id = server.give("book.txt", BOOK)["id"]
    server.until(id, lambda entry: entry["read"] > 0)
    assert server.end(signal.SIGTERM) == 143
    again = start()
    entry = again.get(f"/v1/documents/{id}")
    assert entry["status"] in ("unread", "kept")
    assert again.ask(id)["usage"]["completion_tokens"] > 0
    assert "Traceback" not in server.said() + again.said()


def test_ending_while_it_answers_ends_soon(start):
    server = start("--no-keep")
    body = {"model": server.get("/v1/models")["data"][0]["id"], "prompt": "Once", "max_tokens": 4000, "stream": True}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as stream:
        stream.readline()
        assert server.end() == 130
    assert "Traceback" not in server.said()


def test_the_log_has_no_content_unless_asked_for(start):
    secret, server = "the heron keeps the lighthouse", start("--no-keep")
    model = server.get("/v1/models")["data"][0]["id"]
    server.get("/v1/completions", {"model": model, "prompt": secret, "max_tokens": 3})
    assert server.says("POST /v1/completions 200") and secret not in server.said()
    asked = start("--no-keep", "--log-content")
    asked.get("/v1/completions", {"model": model, "prompt": secret, "max_tokens": 3})
    assert asked.says(f"prompt: {secret}") and asked.says("answer: ")


def test_a_key_by_the_environment(start, monkeypatch):
    monkeypatch.setenv("PI_GGUF_API_KEY", "of-the-test")
    server = start("--no-keep")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/v1/models")
    assert server.get("/v1/models", Authorization="Bearer of-the-test")["data"]
    assert "of-the-test" not in server.said()


def test_a_port_in_use_is_one_line(start, tiny_gguf, cli):
    server = start("--no-keep")
    code, _, err = cli("serve", tiny_gguf, "--port", server.url.rpartition(":")[2])
    assert code == 2 and "cannot listen there" in err and "hint: --port 0" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 is reached by others, and no key is asked for"),
        ({"host": "::"}, "no key"),
        ({"host": "192.0.2.7"}, "no key"),
        ({"host": "example.org"}, "no key"),
        ({"host": "0.0.0.0", "api_key": ""}, "api-key must be"),
        ({"port": -1}, "port must be 0 to 65535, got -1"),
        ({"port": 70000}, "port must be"),
        ({"api_key": "ä"}, "api-key must be of ASCII"),
        ({"api_key": " a"}, "api-key must be"),
    ],
)
def test_an_address_that_would_be_open_to_all_is_refused(options, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        Address(**options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_key(host):
    assert Address(host=host).rules().key is None
    assert Address(host="0.0.0.0", api_key="a").rules().key == "a"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slots", "0"], "slots must be 1 to 32, got 0"),
        (["--slots", "33"], "slots must be"),
        (["--queue", "0"], "queue must be"),
        (["--host", "0.0.0.0"], "no key is asked for"),
        (["--form", "chat"], "chat_template is missing"),
        (["--form", "x"], "form must be one of"),
        (["--cache-size", "x"], "cache-size"),
    ],
)
def test_options_that_cannot_work_are_one_line(cli, tiny_gguf, options, said, monkeypatch):
    monkeypatch.delenv("PI_GGUF_API_KEY", raising=False)
    code, _, err = cli("serve", tiny_gguf, "--port", "0", *options)
    assert code in (2, 6) and said in err and "hint:" in err


def test_the_sources_of_the_page_are_in_the_package():
    from importlib import resources

    names = {path.name for path in resources.files("pi_gguf.server").joinpath("desk").iterdir()}
    assert {"index.html", "desk.css", "desk.js"} <= names
