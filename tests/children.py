"""Commands in processes of their own whose imports are done already, so that tests can start and kill many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

_server = multiprocessing.get_context("forkserver")  # a clean process that imports once, and forks
_server.set_forkserver_preload(
    ["transformers.trainer", "peft", "datasets", "pi_gguf.tune.extend", "pi_gguf.tune.trainer"]
)


def _run(arguments: list[str], environment: dict[str, str], exact: bool, streams: tuple[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell; the command takes it back
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, where the command leaves it ignored
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    import torch

    import pi_gguf.pipeline.plan
    import pi_gguf.tune.trainer
    from pi_gguf.cli.app import entry_point

    torch.set_num_threads(1)
    if exact:
        pi_gguf.common.machine.fast_bf16 = pi_gguf.tune.trainer.fast_bf16 = lambda device: False
    sys.argv = ["pi-gguf", *arguments]
    entry_point()


class Command:
    """A command of pi-gguf in `n` processes, as torchrun would start them.

    `exact` computes in 32 bits, where one process and several differ by the order of additions only.
    """

    def __init__(self, *arguments: object, n: int = 1, exact: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = tuple(str(Path(self._folder.name, name)) for name in ("out", "err"))
        for path in self._streams:
            Path(path).touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared = {**meeting, "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        self._processes = []
        for rank in range(n):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
            given = ([str(argument) for argument in arguments], environment, exact, self._streams)
            self._processes.append(_server.Process(target=_run, args=given, daemon=True))
            self._processes[-1].start()

    def kill(self) -> None:
        """End every process at once, as kill -9 does."""
        for process in self._processes:
            process.kill()
        self.wait()

    def send(self, number: int) -> None:
        """Send every process a signal."""
        for process in self._processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def wait(self, seconds: float = 300) -> tuple[int, str, str]:
        """Return the exit code (the first that is not 0), standard output and standard error; nothing runs on."""
        for process in self._processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode for process in self._processes]
        out, err = (Path(path).read_text() for path in self._streams)
        self._folder.cleanup()
        return next((code for code in codes if code != 0), 0), out, err
