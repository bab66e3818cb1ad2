"""Take pictures of the desk: a file is served, a document read, questions asked, and what the page shows is kept.

In: a GGUF file, a document and questions. Out: `desk-light.png`, `desk-dark.png` and `desk-phone.png`, each under 200
KB. Nothing is drawn for them; needs playwright and a browser.

Example:
    python tools/desk_pictures.py model.gguf book.txt docs/pictures "Who went on board?" "What did he say?"
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

MOST = 200_000
COLOURS = (256, 128, 64, 32)
SIZES = {"light": (1280, 800), "dark": (1280, 800), "phone": (390, 780)}


@contextmanager
def served(path: Path) -> Iterator[str]:
    """Serve a file on a free port, its documents in a folder that is deleted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["serve", str(path), "--port", str(port), "--cache-dir", folder]
        with subprocess.Popen([sys.executable, "-m", "pi_gguf", *arguments]) as server:
            try:
                wait_for(f"{url}health", server)
                yield url
            finally:
                server.terminate()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit("the server ended")


def take(page: Page, path: Path) -> None:
    """Keep what a page shows, in as many colours as there is room for."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colours in COLOURS:
        shown.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < MOST:
            print(f"{path}: {path.stat().st_size:,} bytes, {colours} colours")
            return
    raise SystemExit(f"{path}: {path.stat().st_size:,} bytes are too many")


def ask(page: Page, document: Path, questions: list[str]) -> None:
    """Give a document, wait until it is read, ask about it and look where the model looked at last."""
    page.set_input_files("#file", document)
    page.locator("#documents .state.kept").first.wait_for(state="attached", timeout=1_800_000)
    for number, question in enumerate(questions):
        page.fill("#question", question)
        page.press("#question", "Enter")
        page.locator(".turn").nth(number).locator(".tools").wait_for(timeout=600_000)
    print(page.inner_text("#turns"))
    page.get_by_role("button", name="Where it looked").last.click()
    page.locator(".looked").wait_for(timeout=600_000)


def pictures(browser: Browser, url: str, document: Path, questions: list[str], folder: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page = context.new_page()
    page.goto(url)
    ask(page, document, questions)
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme="light" if name == "light" else "dark")
        if name == "phone":
            page.keyboard.press("Escape")
            page.emulate_media(color_scheme="light")
        elif page.locator(".passage").is_hidden():
            quoted, looked = page.locator(".prose mark[role=button]"), page.locator(".first button")
            (quoted.last if quoted.count() else looked.first).click()
            page.locator(".passage mark").wait_for()
        page.locator(".turn").first.evaluate("turn => turn.scrollIntoView({ block: 'start' })")
        take(page, folder / f"desk-{name}.png")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="GGUF file to serve")
    parser.add_argument("document", type=Path)
    parser.add_argument("folder", type=Path, help="where to keep the pictures")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="chromium or the like")
    given = parser.parse_args()
    arguments = ["--no-sandbox", "--disable-gpu"] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["--disable-gpu"]
    with served(given.file) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.browser, args=arguments)
        pictures(browser, url, given.document, given.questions, given.folder)
        browser.close()


if __name__ == "__main__":
    main()
