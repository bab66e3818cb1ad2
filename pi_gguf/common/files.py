"""Safe files: one writer for each output, which appears under its name only when it is complete.

While a command writes OUT, `OUT.partial` is its private folder, locked by the kernel for as long as the process lives.
What is unfinished lies in there: what a run goes on with, and under `tmp` what the next run deletes.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from pi_gguf.common.progress import process_rank, say
from pi_gguf.errors import OptionError, ResourceError

_LOCK, _TEMPORARY, _OLD = "lock", "tmp", "old"
"""In a work folder: who writes; what is deleted when nobody does; a folder that is being replaced."""

_FLAGS = os.O_RDWR | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))

_RECORD_BYTES = 1024
"""A lock's record has always this size, so that writing it anew is a single step."""

_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())
"""Outputs that this thread is the writer of."""

P = ParamSpec("P")
R = TypeVar("R")


def check_writable(path: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Check that `path` may be written: its folder takes files, and nothing is there unless `overwrite`.

    Args:
        path: what is to be written.
        overwrite: whether something of the same kind may be replaced.
        folder: a folder is written, not a file; neither ever replaces the other.

    Raises:
        OptionError: otherwise.
    """
    _check_name(path)
    try:
        there = os.path.lexists(path)
        tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from error
    _check_kind(path, folder)
    if there and not overwrite:
        raise OptionError(f"{path}: exists", "give another name, or --overwrite")


def _check_name(path: Path) -> None:
    if path.name in ("", ".."):
        raise OptionError(f"{path}: is no name of an output", "give the name of what is to be written")
    if not path.parent.is_dir():
        raise OptionError(f"{path}: the folder {path.parent} does not exist", f"mkdir -p {path.parent}")


def _check_kind(path: Path, folder: bool) -> None:
    """Check that what is there, if anything, is of the kind that is to be written."""
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        kind = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
        raise OptionError(f"{path}: is {kind}", "give another name")


def open_folder(path: Path, names: Sequence[str], mark: str) -> None:
    """Make a folder for results, or check that the one there is of an earlier run, whose results are replaced.

    Args:
        names: of the files that will be written into it.
        mark: what every run leaves there from its start.

    Raises:
        OptionError: files of these names are there without the mark, or what is no file.
    """
    _make_folder(path)
    for name in names:
        check_writable(path / name, overwrite=(path / mark).exists())


def _not_writable(path: Path, error: Exception) -> OptionError:
    reason = getattr(error, "strerror", None) or error
    return OptionError(f"{path}: cannot be written ({reason})", "give another name or folder")


# One writer


def writes(*names: str, unless: str | None = None, parents: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the only writer of the outputs that some of its arguments name, from its start to its end.

    Args:
        names: of arguments that are paths; None is no output.
        unless: argument with which it writes nothing.
        parents: make the folders in which the outputs are to lie.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            with ExitStack() as held:
                if process_rank() == 0 and not (unless and given[unless]):
                    for path in dict.fromkeys(Path(given[name]) for name in names if given[name] is not None):
                        if parents:
                            _make_folder(path.parent)
                        held.enter_context(one_writer(path))
                return function(*args, **kwargs)

        return alone

    return decorate


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from error


@contextmanager
def one_writer(path: Path) -> Iterator[Path]:
    """Be the only one who writes `path`, in all processes; give its work folder, `path` with .partial.

    What a dead writer left in `tmp` is deleted. The folder goes away again where nothing is left in it.

    Raises:
        OptionError: another one writes it, or what has the name of the work folder is not ours.
    """
    _check_name(path)
    folder = path.with_name(f"{path.name}.partial")
    place = path.parent.resolve() / path.name
    if place in _held.get():
        yield folder
        return
    try:
        with disk_errors(path):
            lock = _lock(path, folder)
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from error
    before = _held.set(_held.get() | {place})
    try:
        _tidy(folder, path)
        yield folder
    finally:
        _held.reset(before)
        _leave(folder)
        os.close(lock)


def _lock(path: Path, folder: Path) -> int:
    """Make the work folder, or take over one of ours that nobody has; return the descriptor that holds its lock."""
    while True:
        made = True
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            made = False
        lock = _open_lock(folder)
        if lock is None:
            continue
        try:
            _flock(lock, path, folder)
            if _is_still(lock, folder / _LOCK):
                _begin(lock, folder, made)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _open_lock(folder: Path) -> int | None:
    """Open the lock in a work folder, or make it where that is empty; None where its writer is just deleting it.

    Raises:
        OptionError: there is none, or it is not ours.
    """
    try:
        names = [entry.name for entry in folder.iterdir()] if stat.S_ISDIR(os.lstat(folder).st_mode) else ["?"]
        if names and _LOCK not in names:
            raise _in_the_way(folder)
        lock = os.open(folder / _LOCK, _FLAGS | (0 if names else os.O_CREAT), 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _in_the_way(folder) from error
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(lock)
        raise _in_the_way(folder)
    return lock


def _in_the_way(path: Path, what: str = "is in the way, and no work folder of pi-gguf") -> OptionError:
    return OptionError(f"{path}: {what}", "move it away (an older pi-gguf may have left it), or name another output")


def _begin(lock: int, folder: Path, made: bool) -> None:
    """Write who has the lock into it."""
    try:
        if not made:
            _check_ours(folder)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        record = {"pi_gguf": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command}
        os.lseek(lock, 0, os.SEEK_SET)
        os.write(lock, json.dumps(record).encode().ljust(_RECORD_BYTES))
    except OSError:
        if made:
            _leave(folder)
        raise


def _flock(lock: int, path: Path, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        record = _read_record(folder / _LOCK) or {}
        who = f"process {record.get('pi_gguf', '?')} since {record.get('since', '?')}: {record.get('command', '?')}"
        raise OptionError(f"{path}: is being written by {who}", "wait for it, or give another name") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        say(f"note: {path.parent} has no locks; let no other process write {path.name}")


def _is_still(lock: int, name: Path) -> bool:
    """Tell whether a descriptor is of the file that has the name now."""
    try:
        return os.path.samestat(os.fstat(lock), os.lstat(name))
    except FileNotFoundError:
        return False


def _read_record(lock: Path) -> dict[str, Any] | None:
    """Return a lock's record; None where there is none of ours."""
    try:
        if not stat.S_ISREG(os.lstat(lock).st_mode):
            return None
        record = json.loads(lock.read_bytes()[:_RECORD_BYTES])
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "pi_gguf" in record else None


def _check_ours(folder: Path) -> None:
    """Check that a work folder whose lock is held was made here, by this user, and holds plain files only.

    Raises:
        OptionError: otherwise; nothing in it is touched.
    """
    status = os.lstat(folder)
    begun = has_more(folder) or os.lstat(folder / _LOCK).st_size  # otherwise killed at its very start
    if begun and (status.st_uid != os.geteuid() or _read_record(folder / _LOCK) is None):
        raise _in_the_way(folder)
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            found = os.lstat(Path(parent, name))
            plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
            if not plain and not stat.S_ISDIR(found.st_mode):
                raise _in_the_way(Path(parent, name), "is a link, a pipe or a device in a work folder")


def _tidy(folder: Path, path: Path) -> None:
    """Delete what a dead writer left, and bring back the folder that it was about to replace."""
    remove(folder / _TEMPORARY)
    old = folder / _OLD
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    remove(old)


def _leave(folder: Path) -> None:
    """Delete a work folder in which nothing is left to go on with."""
    with suppress(OSError):
        remove(folder / _TEMPORARY)
        if not has_more(folder):
            (folder / _LOCK).unlink()
            folder.rmdir()  # fails where another one has just put a lock into it


def has_more(folder: Path) -> bool:
    """Tell whether a work folder holds more than its lock."""
    return any(entry.name != _LOCK for entry in folder.iterdir())


@contextmanager
def temporary(path: Path, name: str) -> Iterator[Path]:
    """Give a path in the work folder of `path` for something that is deleted at the end, even if that is a kill's."""
    with one_writer(path) as folder:
        (folder / _TEMPORARY).mkdir(mode=0o700, exist_ok=True)
        made = folder / _TEMPORARY / name
        try:
            yield made
        finally:
            remove(made)


# Disks and files


def user_cache() -> Path | None:
    """Return the folder of what may be made again, in the user's own cache; None for a user without a home."""
    given = (os.environ.get("XDG_CACHE_HOME"), os.environ.get("LOCALAPPDATA"))
    base = next((Path(name) for name in given if name and Path(name).is_absolute()), None)
    if base is None:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # containers run as users that no list has
            return None
    return base / "pi-gguf"


def is_file(path: Path) -> bool:
    """Tell whether a file is there, no folder, pipe or device; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_free_disk(folder: Path, need_bytes: int) -> None:
    """Check that `folder` has room for `need_bytes`.

    Raises:
        ResourceError: otherwise, with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ResourceError(
            f"{folder}: {human_bytes(need_bytes)} needed, {human_bytes(free)} free", "free some disk space"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's word that the disk is full into a `ResourceError`."""
    try:
        yield
    except OSError as error:
        short_write = error.errno is None and "requested and" in str(error)  # numpy's tofile names no errno
        if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: the disk is full", "free some disk space") from error
        if error.errno == errno.EFBIG:
            raise ResourceError(f"{path}: files may not become so large", "raise the limit, see ulimit -f") from error
        raise


@contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Give a temporary path; rename it to `path` on success, delete it on any failure.

    Raises:
        OptionError: another process writes `path`.
        ResourceError: the disk is full.
    """
    with temporary(path, path.name) as partial, disk_errors(path):
        yield partial
        publish(partial, path)


def publish(partial: Path, path: Path) -> None:
    """Give a complete file or folder its name, in place of one of its kind; a kill leaves one or the other.

    Its writer must hold `path`.

    Raises:
        OptionError: a folder has the name of a file, or the reverse; it stays.
    """
    is_folder = partial.is_dir()
    _check_kind(path, is_folder)
    for part in (partial, *(partial.rglob("*") if is_folder else ())):
        _sync(part)
    if is_folder and os.path.lexists(path):
        old = path.with_name(f"{path.name}.partial") / _OLD
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
        remove(old)
    else:
        partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder where its file system knows that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read: one writes into a pipe when one likes, and a device has no end.

    Raises:
        OSError: it is no file, or not to be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return path.open("rb")


@contextmanager
def removed_if_damaged(path: Path) -> Iterator[None]:
    """Remove a file of a cache at which a ValueError is raised, and say so; one that cannot be read is let be."""
    try:
        yield
    except ValueError as error:
        say(f"{path}: not used and removed: {error}")
        with suppress(OSError):
            path.unlink()
    except OSError:
        pass


def remove(path: Path) -> None:
    """Delete a file or a folder, if there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replace_when_complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def parse_bytes(text: str, option: str, least: int = 1) -> int:
    """Return the bytes that a size such as 500M or 1.5G (decimal) says.

    Raises:
        OptionError: it says none, by the option's name.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper(), re.ASCII)
    found = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else -1
    if found < least:
        raise OptionError(f"{option} must be a number of bytes such as 500M or 4G, got {text!r}", "K, M, G are decimal")
    return found


def human_bytes(n: float) -> str:
    """Write a number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
