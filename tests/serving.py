"""`pi-gguf serve` in a process of its own, and a plain client for what no well-meaning client sends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
SECONDS = 120
"""After which something hangs."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


class Serving:
    """A server of a file; a context manager, and started again by `start`.

    Args:
        path: the GGUF file.
        options: of the command line.
        cache: folder of what is kept.
        key: asked of clients.
    """

    def __init__(self, path: Path, *options: object, cache: Path, key: str | None = None) -> None:
        self._words = [sys.executable, "-m", "pi_gguf", "serve", path, *options]
        self.key, self.name, self.port = key, path.stem, free_port()
        self._environment = {**os.environ, "PI_GGUF_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
        self._environment.pop("PI_GGUF_API_KEY", None)
        if key:
            self._environment["PI_GGUF_API_KEY"] = key

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        self._log.close()

    def start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        words = [*map(str, self._words), "--port", str(self.port)]
        self._process = subprocess.Popen(words, stdout=self._log, stderr=self._log, env=self._environment)
        end = time.monotonic() + SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > end:
                said = self.said()
                self.kill()
                raise AssertionError(f"it does not serve: {said}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        """Return what it wrote on standard output and error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def answers(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def headers(self, **more: str) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {**key, **{name.replace("_", "-"): value for name, value in more.items()}}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of an answer; `body` is bytes, or made JSON."""
        connection = HTTPConnection(HOST, self.port, timeout=SECONDS)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content_Type": "application/json"} if data else {}
        try:
            connection.request(method, path, data, self.headers(**{**kind, **headers}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """Return an answer that must be there."""
        status, _, data = self.ask(method, path, body)
        assert status in (200, 201), (path, status, data)
        return json.loads(data)

    def open(self, path: str, body: bytes, **headers: str) -> socket.socket:
        """Send a POST by hand, and return the connection with nothing read of the answer."""
        sent = {"Host": f"{HOST}:{self.port}", "Content_Type": "application/json"}
        if "Transfer_Encoding" not in headers:
            sent["Content_Length"] = str(len(body))
        fields = self.headers(**{**sent, **headers}).items()
        head = "\r\n".join([f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields), "", ""])
        connection = socket.create_connection((HOST, self.port), timeout=SECONDS)
        connection.sendall(head.encode() + body)
        return connection

    def upload(self, name: str, data: bytes) -> tuple[int, dict[str, Any]]:
        """Give a document; return status and JSON."""
        head = f'--cut\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + b"\r\n--cut--\r\n"
        status, _, answered = self.ask("POST", "/v1/documents", body, Content_Type="multipart/form-data; boundary=cut")
        return status, json.loads(answered)

    def figures(self) -> dict[str, float]:
        """Return the figures of /metrics by name."""
        status, _, text = self.ask("GET", "/metrics")
        assert status == 200
        lines = (line.rsplit(" ", 1) for line in text.decode().splitlines() if line.startswith("pi_gguf_"))
        return {name.removeprefix("pi_gguf_"): float(value) for name, value in lines}


def chunks(data: bytes) -> list[dict[str, Any]]:
    """Return the objects of a stream that has ended as it should."""
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    assert lines and lines[-1] == "[DONE]", lines[-1:]
    return [json.loads(line) for line in lines[:-1]]
