"""A server in a thread, as clients meet it: the real engine, library and application behind uvicorn on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

import pi_gguf
from pi_gguf.engine.engine import BESIDE, Engine
from pi_gguf.engine.library import Library
from pi_gguf.runtime.states import States
from pi_gguf.server.app import Settings, create_app
from pi_gguf.server.guard import Rules

TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools> as <tool_call>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that knows tools as Hermes does."""


@dataclass
class Served:
    """A server that answers.

    Args:
        url: of it.
        engine: that it has.
    """

    url: str
    engine: Engine

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


@contextmanager
def served(
    path: Path, folder: Path, *, rules: Rules | None = None, slots: int = 2, n_ctx: int = 2048
) -> Iterator[Served]:
    """Serve a file while this is open.

    Args:
        path: the file.
        folder: where documents are kept.
        rules: who may ask.
        slots: requests at a time.
        n_ctx: window to open.
    """
    opened = pi_gguf.open(path, n_ctx=n_ctx, sequences=slots + BESIDE)
    with opened as model, Engine(model, states=States(folder / "states")) as engine:
        app = create_app(engine, Library(engine, folder / "library"), Settings(rules or Rules()))
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
        finally:
            server.should_exit = True
            thread.join(20)


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come so in time"
        time.sleep(0.02)
