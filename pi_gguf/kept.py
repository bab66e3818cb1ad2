"""Finished items of a long evaluation on disk, so that the same command goes on where it stopped.

In: a path, and what tells one item from another. Out: a line of JSON an item, each there only when it is whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pi_gguf.errors import OptionError
from pi_gguf.files import check_writable, disk_errors, open_plain

_BEGIN, _LINE_BYTES = b'{"item": ', 2**26
"""What every line begins with, and what none is longer than."""


class Kept:
    """Values by item.

    Args:
        path: JSONL file, made when the first item is finished; None keeps nothing.

    Raises:
        OptionError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._values: dict[str, Any] = {}
        if self._path is None:
            return
        check_writable(self._path, overwrite=True)
        if not self._path.exists():
            return
        with open_plain(self._path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
                try:
                    record = json.loads(line)
                    self._values[_name(record["item"])] = record["value"]
                except (ValueError, KeyError, TypeError) as error:
                    ours = line.startswith(_BEGIN) or _BEGIN.startswith(line)
                    if ours and line[-1:] != b"\n" and len(line) < _LINE_BYTES:  # cut off by a kill
                        break
                    raise OptionError(f"{path}: line {number} is no finished item", "give another --keep") from error

    def get(self, item: dict[str, Any]) -> Any:
        """Return the value of an item; None where it is not finished."""
        return self._values.get(_name(item))

    def put(self, item: dict[str, Any], value: Any) -> None:
        """Keep the value of an item, in JSON's types."""
        self._values[_name(item)] = value
        if self._path is None:
            return
        line = json.dumps({"item": item, "value": value}).encode() + b"\n"
        whole = self._path.read_bytes() if self._path.exists() else b""
        end = whole.rfind(b"\n") + 1
        with disk_errors(self._path), self._path.open("r+b" if whole else "wb", buffering=0) as file:
            file.truncate(end)  # what a kill cut off
            file.seek(end)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise


def _name(item: dict[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)
