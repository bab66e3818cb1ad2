"""Finished items of a long evaluation on disk, so that the same command goes on where it stopped.

In: a path, and what tells one item from another. Out: a line of JSON an item, each there only when it is whole.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pi_gguf.common.files import check_writable, disk_errors, open_plain
from pi_gguf.common.progress import Advance, progress_bar
from pi_gguf.errors import OptionError

K = TypeVar("K")

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
        self._settings: dict[str, Any] = {}
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

    def under(self, settings: Mapping[str, Any]) -> Kept:
        """Return the same journal, each of whose items has these settings."""
        part = copy.copy(self)
        part._settings = {**self._settings, **settings}
        return part

    def value(self, item: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """Return the value of an item; what is not finished is measured and kept."""
        if self.get(item) is None:
            self.put(item, measure())
        return self.get(item)

    def values(
        self,
        title: str,
        unit: str,
        items: Mapping[K, dict[str, Any]],
        measure: Callable[[K, Advance], Any],
        size: Callable[[K], int] = lambda _: 1,
    ) -> dict[K, Any]:
        """Return the value of each item; those that are not finished are measured in this order and kept.

        Args:
            title: what is being done, of the progress bar.
            unit: what the bar counts.
            items: by what `measure` knows them by.
            measure: makes a value, and advances the bar by as much as `size` says.
            size: how much work an item is.
        """
        todo = [key for key, item in items.items() if self.get(item) is None]
        with progress_bar(title, sum(map(size, todo)), unit) as advance:
            for key in todo:
                self.put(items[key], measure(key, advance))
        return {key: self.get(item) for key, item in items.items()}

    def get(self, item: dict[str, Any]) -> Any:
        """Return the value of an item; None where it is not finished."""
        return self._values.get(_name({**self._settings, **item}))

    def put(self, item: dict[str, Any], value: Any) -> None:
        """Keep the value of an item, in JSON's types."""
        item = {**self._settings, **item}
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
