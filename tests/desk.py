"""What tests of the desk share: a server in a process of its own, a browser, and what a page must not do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Server:
    """`pi-gguf serve` in a process of its own, on a free port; it can be stopped and started again."""

    def __init__(self, path: Path, *options: str, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        arguments = ["serve", path, "--port", self.port, "--cache-dir", cache, *options]
        self._command = [sys.executable, "-m", "pi_gguf", *map(str, arguments)]
        self._log = cache.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while True:
            try:
                urllib.request.urlopen(f"{self.url}health", timeout=10).close()
                return self
            except (urllib.error.URLError, ConnectionError):
                assert self._process.poll() is None, self._log.read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        assert self._process
        self._process.terminate()
        self._process.wait(30)

    def ask(self, path: str, method: str = "GET") -> Any:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", method=method), timeout=30) as answer:
            return json.load(answer)


@contextmanager
def serving(path: Path, *options: str, cache: Path) -> Iterator[Server]:
    server = Server(path, *options, cache=cache).start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def all_cores() -> Iterator[None]:
    """What is started meanwhile may use every core, also from a worker that keeps to one."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of this machine; without one a test fails where it is needed, and is skipped elsewhere."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if path is None or sync_playwright is None:
        reason = f"needs playwright and a browser: {', '.join(BROWSERS)}"
        if os.environ.get("CI") or os.environ.get("PI_GGUF_NEED_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with all_cores():  # a browser that shares the core of the server that it watches sees all of it too late
        playwright = sync_playwright().start()
    try:
        started = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield started
        started.close()
    finally:
        playwright.stop()


def until(page: Any, expression: str, given: Any = None) -> None:
    """Wait until something is so in a page; playwright's own way evaluates text there, which the policy refuses."""
    for _ in range(600):
        if page.evaluate(expression, given):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"it never was so: {expression}")


WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
  (event) => violations.push(event.violatedDirective + " " + event.blockedURI));
window.alert = () => violations.push("alert");
window.told = [];
document.addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  for (const one of document.querySelectorAll("#facts, .standing, .waiting, #status"))
    if (one.textContent && told.at(-1) !== one.textContent) told.push(one.textContent);
}).observe(document, { subtree: true, childList: true, characterData: true }));
"""


class Watched:
    """A page of its own, and what it did that it must not do: requests elsewhere, errors, what the policy refused."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light", **options}
        self.context = browser.new_context(**options)
        self.context.add_init_script(WATCH)
        self.server, self.requests, self.errors = server, [], []
        self.context.on("request", lambda request: self.requests.append(request))
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)

    def check(self) -> None:
        """Fail if it did any of it."""
        for request in self.requests:
            assert request.url.startswith((self.server.url, f"blob:{self.server.url}")), request.url
        assert self.errors == []
        assert self.page.evaluate("violations") == []

    def told(self) -> list[str]:
        """What the page said, one after another."""
        return self.page.evaluate("told")
