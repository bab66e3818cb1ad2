"""The command serve: a file, opened for many; its page and its API at one address.

In: a GGUF file, and where to listen. Out: nothing, until a signal ends it; what was read of documents is then kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from pi_gguf.common.files import human_bytes
from pi_gguf.common.progress import say, visible
from pi_gguf.engine.engine import BESIDE, Engine
from pi_gguf.engine.library import Library
from pi_gguf.errors import OptionError
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.reading import choose_form, reach, trust
from pi_gguf.runtime.states import States
from pi_gguf.server.app import Settings, create_app
from pi_gguf.server.guard import Rules

_SPIN = "10000"
"""Rounds that llama.cpp's threads wait awake, libgomp's GOMP_SPINCOUNT: long enough to wait for each other, and not so
long that they keep event loop and clients from a core (docs/log.md)."""

MOST_SLOTS = 32
"""As many tokens as the smallest batch has."""

_LAST_SECONDS = 3
"""In which answers may still end when the server does."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and who may ask.

    Args:
        host: name or address; 127.0.0.1 is this machine alone.
        port: 0 takes a free one.
        api_key: what everyone has to send; needed where others than this machine reach the server.
        cors: origins of pages elsewhere that may ask, such as https://example.org.
        allow_host: further names by which the server may be called.

    Raises:
        OptionError: a port that is none, or a host that others reach, without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    cors: Sequence[str] = ()
    allow_host: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise OptionError(f"port must be 0 to 65535, got {self.port}", "0 takes a free one")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise OptionError("api-key must be of ASCII letters, not empty, without space around it")
        if not self.api_key and not _loopback(self.host):
            raise OptionError(
                f"host {self.host} is reached by others, and no key is asked for",
                "set PI_GGUF_API_KEY, or leave --host out: 127.0.0.1 is this machine alone",
            )

    def listen(self) -> socket.socket:
        """Open the address.

        Raises:
            OptionError: it is in use, or none of this machine's.
        """
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            return socket.create_server((self.host, self.port), family=family, backlog=256)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OptionError(
                f"{self.host}:{self.port}: cannot listen there ({reason})", "--port 0 takes a free one"
            ) from error

    def rules(self) -> Rules:
        """Return who may ask."""
        return Rules((self.host, *self.allow_host), tuple(self.cors), self.api_key, say)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def serve(
    file: str, address: Address, *, slots: int, queue: int, form: str | None, states: States | None,
    log_content: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Serve a file until a signal comes.

    Args:
        file: the GGUF file.
        address: where, and for whom.
        slots: texts that are worked on at a time.
        queue: requests that may wait.
        form: what stands around document and question.
        states: where what was read is kept; None keeps nothing.
        log_content: log what is asked and answered, too.
        options: as `Model` has them.

    Raises:
        OptionError: a value that cannot work.
    """
    for name, value, most in (("slots", slots, MOST_SLOTS), ("queue", queue, 100_000)):
        if not 1 <= value <= most:
            raise OptionError(f"{name} must be 1 to {most}, got {value}")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN)  # read when llama.cpp is loaded
    with contextlib.closing(address.listen()) as listening, Model(file, sequences=slots + BESIDE, **options) as model:
        choose_form(model, form)
        log = _log if log_content else None
        with Engine(model, states=states, queue=queue, log=log) as engine:
            library = Library(engine, states.library if states else None, form=form)
            app = create_app(engine, library, Settings(address.rules(), form))
            _say_what_is_served(model, address, slots, listening)
            asyncio.run(_run(app, library, listening))


async def _run(app: Any, library: Library, listening: socket.socket) -> None:
    how: dict[str, Any] = {"access_log": False, "server_header": False, "ws": "none", "lifespan": "off"}
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_LAST_SECONDS, **how)
    server = uvicorn.Server(config)
    measuring = asyncio.create_task(library.measure())
    try:
        await server.serve([listening])
    finally:
        measuring.cancel()
        await library.close()


def _say_what_is_served(model: Model, address: Address, slots: int, listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    shown = f"[{address.host}]" if ":" in address.host else address.host
    say(
        f"{Path(model.path).name}: window {model.n_ctx:,} tokens, KV cache {human_bytes(model.kv_cache_bytes)}, "
        f"{slots} texts at a time"
    )
    say(trust(0, *reach(model.info)))
    say(f"the desk: http://{shown}:{port}/\nthe API:  http://{shown}:{port}/v1\nCtrl-C ends; what was read is kept")


def _log(prompt: str, answer: str) -> None:
    say(f"prompt: {visible(prompt)}\nanswer: {visible(answer)}")
