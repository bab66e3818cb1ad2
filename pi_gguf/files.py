"""Safe files: outputs appear under their name only when complete; disk and overwriting are checked first."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_gguf.errors import OptionError, ResourceError


def check_writable(path: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Check that `path` may be written: its folder takes files, and nothing is there unless `overwrite`.

    Args:
        path: what is to be written.
        overwrite: whether something of the same kind may be replaced.
        folder: a folder is written, not a file; neither ever replaces the other.

    Raises:
        OptionError: otherwise.
    """
    if not path.parent.is_dir():
        raise OptionError(f"{path}: the folder {path.parent} does not exist", f"mkdir -p {path.parent}")
    try:
        there, is_folder = path.exists(), path.is_dir()
        probe = path.with_name(f".{path.name}.probe.partial")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{path}: cannot be written ({reason})", "give another name or folder") from error
    if there and is_folder != folder:
        raise OptionError(f"{path}: is {'a folder' if is_folder else 'a file'}", "give another name")
    if there and not overwrite:
        raise OptionError(f"{path}: exists", "give another name, or --overwrite")


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
        raise


@contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, delete it on any failure.

    Raises:
        ResourceError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    try:
        with disk_errors(path):
            yield partial
            publish(partial, path)
    finally:
        remove(partial)


def publish(partial: Path, path: Path) -> None:
    """Give a complete file or folder its name, in place of what is there."""
    if partial.is_file():
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    if path.is_dir():
        remove(path)
    partial.replace(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replace_when_complete(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def human_bytes(n: float) -> str:
    """Write a number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
