"""How the command line ends: by a signal, on a closed output, in a crash of native code, by the errors of other code.

In: what happens to a process. Out: two lines and an exit code, as `errors` has them; a traceback for bugs only.
"""

from __future__ import annotations

import _thread
import errno
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pi_gguf.errors import Interrupted, OptionError, PiGgufError, ResourceError, TextError

_PATIENCE = 2.0
"""Seconds between a second signal and the end of a process that has not ended by itself."""

_NO_MEMORY = (
    "cannot allocate memory", "can't allocate memory", "unable to allocate", "failed to map segment", "bad_alloc",
    "can't start new thread", "out of memory",
)  # fmt: skip
_DISK_FULL = ("no space left on device", "pytorchstreamwriter failed writing", "file write failed")
_TOO_LARGE = ("file too large",)
"""What libraries say that have errors of their own for it, in lower case."""

_TORCH_BYTES = 3 * 2**29
"""Of address space, for the libraries alone."""

_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EIO,
}  # fmt: skip


class Signals:
    """Raises `Interrupted` where the first of Ctrl-C, SIGTERM and SIGHUP is met; a second one ends what still runs."""

    def __init__(self) -> None:
        self._seen = self._sent_again = 0
        self._raised = self._ended = False
        self.met: Interrupted | None = None
        """The first of them: what it raises, libraries may catch and make something else of."""

    def handle(self, number: int, _: Any) -> None:
        if not self._raised:
            self._raised = True
            self.met = Interrupted(number)
            raise self.met

    def unraisable(self, lost: Any) -> None:
        """Raise again what was raised in a callback of native code, through which nothing passes."""
        if not isinstance(lost.exc_value, Interrupted):
            sys.__unraisablehook__(lost)
            return
        self._raised = False
        self._sent_again += 1
        timer = threading.Timer(0.1, _thread.interrupt_main, [lost.exc_value.number])
        timer.daemon = True
        timer.start()

    def watch(self, reader: int) -> None:
        """See signals while the main thread is inside native code, where Python's handlers wait."""
        while read := os.read(reader, 1):
            if read[0] not in handled_signals() or (read[0] == signal.SIGINT and _stops_only):
                continue
            if self._sent_again:
                self._sent_again -= 1
                continue
            self._seen += 1
            if self._seen > 1:
                threading.Event().wait(_PATIENCE)
                if not self._ended:
                    with suppress(OSError):
                        os.write(2, b"interrupted\n")
                    os._exit(128 + read[0])
        os.close(reader)

    def end(self) -> None:
        self._ended = True


_stops_only: list[threading.Event] = []


@contextmanager
def ctrl_c_stops() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event, and end nothing."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    _stops_only.append(stop)
    try:
        yield stop
    finally:
        _stops_only.remove(stop)
        signal.signal(signal.SIGINT, before)


def handled_signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def signals() -> Iterator[Signals]:
    """Let Ctrl-C, SIGTERM and SIGHUP raise `Interrupted`, also where the parent had Ctrl-C ignored."""
    state = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {
        number: signal.signal(number, state.handle)
        for number in handled_signals()
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    awake, hook = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), sys.unraisablehook
    sys.unraisablehook = state.unraisable
    threading.Thread(target=state.watch, args=[reader], daemon=True).start()
    try:
        yield state
    finally:
        state.end()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(awake)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def prepare_streams() -> None:
    """Make printing fail where standard output is closed, not go into the next file that is opened."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # Read-only as standard output: what is printed is an error then, at the end of the work.
            os.open(os.devnull, os.O_RDWR if number == 2 else os.O_RDONLY)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError):
            faulthandler.enable()


def print_all(text: str, end: str = "\n") -> None:
    """Print on standard output, now.

    Raises:
        ResourceError: it is closed or full.
    """
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        drop_output()
        raise ResourceError(
            f"standard output: cannot be written ({error.strerror})", "what was to be written to files is written"
        ) from error


def drop_output() -> None:
    """Let what is not printed yet go nowhere, or Python would try it again as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def translated(error: BaseException) -> PiGgufError | None:
    """Return an error of Python or of a library as one of ours; None where it is a bug."""
    if isinstance(error, PiGgufError):
        foreign = (error.__cause__ or error.__context__) is not None and not isinstance(error, ResourceError)
        return _of_memory(str(error)) if foreign and _address_space_is_short() else error
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    said = [" ".join(str(link).split()) for link in chain]
    if any(isinstance(link, MemoryError) for link in chain) or any(_says(text, _NO_MEMORY) for text in said):
        return _of_memory(next((text for text in said if text), "no memory is left"))
    if any(_says(text, _DISK_FULL) for text in said):
        return ResourceError(f"the disk is full ({said[0][:200]})", "free some disk space")
    if any(_says(text, _TOO_LARGE) for text in said):
        return ResourceError(f"files may not become so large ({said[0][:200]})", "raise the limit, see ulimit -f")
    first = chain[0]
    if isinstance(first, RecursionError):
        return ResourceError("something in the input is nested too deeply", "--debug shows where it is read")
    if isinstance(first, UnicodeError):
        return TextError(f"a text is not valid Unicode ({said[0][:200]})", "write it in UTF-8; --debug shows where")
    if isinstance(first, OSError):
        return _of_system(first, said[0])
    return _of_memory(said[0]) if _address_space_is_short() else None


def _of_memory(said: str) -> ResourceError:
    return ResourceError(f"out of memory ({said[:300]})", "close other programs, raise ulimit -v, or choose less")


def check_address_space() -> None:
    """Check that torch and transformers have room: without it some of their parts abort the process.

    Raises:
        ResourceError: the process may take less.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _TORCH_BYTES:
        raise ResourceError(
            f"the address space is limited to {limit / 2**30:.2f} GiB, torch and transformers need "
            f"{_TORCH_BYTES / 2**30:g} GiB beside the model",
            "raise it, see ulimit -v",
        )


def _address_space_is_short() -> bool:
    """Tell whether most of a limited address space was in use: libraries that find none say all kinds of things."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        with Path("/proc/self/status").open(encoding="ascii", errors="replace") as file:
            peak = next(int(line.split()[1]) for line in file if line.startswith("VmPeak:"))
    except (ImportError, OSError, StopIteration):
        return False
    return limit != resource.RLIM_INFINITY and peak * 1024 > 0.8 * limit


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text.lower() for phrase in phrases)


def _of_system(error: OSError, said: str) -> PiGgufError:
    if error.filename is None and error.errno in (errno.EPIPE, errno.EBADF):
        drop_output()
        return ResourceError(f"standard output: cannot be written ({error.strerror})", "leave it open to the end")
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    message = f"{name}: {error.strerror}" if name else f"{type(error).__name__}: {said[:300]}"
    if error.errno in _OF_THE_MACHINE:
        return ResourceError(message, "free what it asks for, then run the same command again")
    return OptionError(message, "check that it is there and may be read and written; --debug shows where")
