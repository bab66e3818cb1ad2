"""What every test may ask for: a small model, its file, the command line, an end in time."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pi-gguf-verdicts-")
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A core for each worker: two that both start a thread on every core spend their time waiting for each other.
    places = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {places[int(worker.removeprefix("gw")) % len(places)]})

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell: tests and their children send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from helpers import make_llama

from pi_gguf.common import progress

progress.FIRST_SECONDS = progress.LINE_SECONDS  # what a command says is no question of how busy the machine is


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, untied, float32, window 64. Not to be changed by a test."""
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def f32_gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound F32 file of the model, interpolated to 256 tokens. Not to be changed by a test."""
    from pi_gguf.pipeline.convert import convert

    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    convert(str(llama), path, context=256, steps=0, quant="F32", check="none")
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in an F32 file of 32768 tokens, uncertified. Not to be changed by a test."""
    from pi_gguf.pipeline.convert import convert

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert("bundled:tiny", path, quant="F32", check="none", certify=False)
    return path


@pytest.fixture
def never_a_hang() -> Iterator[None]:
    """Fail a test that takes more than a minute; `signal.alarm(n)` inside a test sets a shorter limit."""

    def stop(*_: Any) -> None:
        pytest.fail("the command did not end in time")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def llama_copy(llama: Path, tmp_path: Path) -> Path:
    """The same model, for a test to damage."""
    import shutil

    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from pi_gguf.cli.app import entry_point

        monkeypatch.setattr("sys.argv", ["pi-gguf", *map(str, arguments)])
        code = 0
        try:
            entry_point()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run
