"""The parts of a GGUF file that is split: found by any of them, and seen as one file.

In: a path. Out: a `Whole`: the header of each part that is there, those that are missing, and one header over the
tensors of all. llama.cpp opens the first part and finds the others by their names, NAME-00002-of-00003.gguf; the keys
split.no (from 0), split.count and split.tensors.count (of all parts) say the same. The first has all other keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pi_gguf.common.files import is_file
from pi_gguf.errors import GgufError
from pi_gguf.gguf.file import GgufInfo, TensorInfo, read_gguf, tensors_of
from pi_gguf.gguf.findings import CONVERT, Finding
from pi_gguf.gguf.header import ALIGNMENT, Header, read_header
from pi_gguf.gguf.loadable import find_misplaced

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000
_AGAIN = "copy the parts again"


@dataclass(frozen=True)
class Whole:
    """A file, or the parts of a split one.

    Args:
        headers: of the parts that are there, in their order, the first among them.
        missing: the others.
    """

    headers: list[Header]
    missing: list[Path]

    @property
    def first(self) -> Header:
        """The part with the metadata, which llama.cpp opens."""
        return self.headers[0]

    @property
    def paths(self) -> list[Path]:
        return [header.path for header in self.headers]

    @property
    def is_split(self) -> bool:
        return len(self.headers) + len(self.missing) > 1

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """Those of all parts that are there, one behind the other."""
        return [tensor for header in self.headers for tensor in tensors_of(header)]

    @cached_property
    def header(self) -> Header:
        """The header as it would be in one file: without keys of parts, and as if the data of all were behind it.

        With parts missing it stays one of a split file, whose tensors are not all there.
        """
        if not self.is_split:
            return self.first
        places, at = [], 0
        alignment = self.first.metadata.get("general.alignment", ALIGNMENT)
        found = [(header, place) for header in self.headers for place in header.tensors]
        for (header, place), tensor in zip(found, self.tensors, strict=True):
            at = place.offset if header is self.first else at
            places.append(replace(place, offset=at, elsewhere=(header.path, header.data_offset + place.offset)))
            at += -(-tensor.nbytes // alignment) * alignment
        keys = {} if self.missing else dict.fromkeys(key for key in SPLIT_KEYS if key in self.first.entries)
        begin = -(-self.first.data_offset // alignment) * alignment  # a first part without tensors is not padded
        return replace(self.first.changed(keys), tensors=places, data_offset=begin)

    @property
    def info(self) -> GgufInfo:
        """What the file states, with the tensors of all parts."""
        return replace(read_gguf(self.first.path), header=self.header, tensors=self.tensors)

    def findings(self) -> Iterator[Finding]:
        """Yield what is wrong between the parts, and where tensors lie in those behind the first."""
        count = len(self.headers) + len(self.missing)
        for path in self.missing:
            yield Finding(
                path.name, None, None, "the part is not here, and llama.cpp opens no other without it.", CONVERT
            )
        for header in self.headers if self.is_split else ():
            number = int(_named(header.path)[2])
            wanted = {"split.no": number - 1, "split.count": count}
            for key, value in wanted.items():
                stated = header.metadata.get(key)
                if stated != value or type(stated) is not int:
                    text = f"in {header.path.name}; the file is a part of something else, or was renamed."
                    yield Finding(key, stated, value, text, CONVERT)
            if self.headers[0] is not header:
                yield from find_misplaced(header, tensors_of(header))
        total = self.first.metadata.get("split.tensors.count")
        if self.is_split and not self.missing and total != len(self.tensors):
            text = "the parts have other tensors than their first states."
            yield Finding("split.tensors.count", total, len(self.tensors), text, CONVERT)
        names = [tensor.name for tensor in self.tensors]
        for name in sorted({name for name in names if names.count(name) > 1}) if self.is_split else ():
            yield Finding(name, "in several parts", None, "llama.cpp opens no file that has a tensor twice.", CONVERT)


def whole(path: Path) -> Whole:
    """Read the headers of a file and of all its parts that are there, whichever of them is given.

    The name says how many there are where split.count is lost and other parts or keys show that there are some.

    Raises:
        GgufError: the file or the first part is missing, one is damaged, or parts are not called as llama.cpp asks for
            them.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    named = _PART.fullmatch(path.name)
    if named and type(header.metadata.get("split.count")) is not int and 1 < int(named[3]) <= _MOST_PARTS:
        others = [part for part in part_paths(path, int(named[3])) if part != path and is_file(part)]
        if others or any(key in header.entries for key in SPLIT_KEYS):
            count = int(named[3])
    if count in (0, 1):
        return Whole([header], [])
    if not isinstance(count, int) or not 1 < count <= _MOST_PARTS or named is None or int(named[3]) != count:
        raise GgufError(
            f"{path}: is one of {count} parts and not called so",
            "parts are called NAME-00001-of-00003.gguf, as they were written",
        )
    parts = part_paths(path, count)
    if not is_file(parts[0]):
        raise GgufError(f"{parts[0]}: no such file, and it has the metadata of all {count} parts", _AGAIN)
    there = [part for part in parts if is_file(part)]
    return Whole(
        [header if part == path else read_header(part) for part in there], [p for p in parts if p not in there]
    )


def complete(path: Path) -> Whole:
    """Read a file and all its parts as `whole` does, and refuse what is not one file.

    Raises:
        GgufError: a part is missing, or they do not go together.
    """
    found = whole(path)
    if found.missing:
        others = f" ({len(found.missing) - 1} more)" if len(found.missing) > 1 else ""
        count = len(found.headers) + len(found.missing)
        raise GgufError(f"{found.missing[0]}: no such file, and it is one of {count} parts{others}", _AGAIN)
    for finding in found.findings():
        raise GgufError(f"{found.first.path}: {finding}", _AGAIN)
    return found


def part_paths(path: Path, count: int) -> list[Path]:
    """Return the names of the files that a model is split into, as llama.cpp asks for them; `path` itself for one.

    A path that is called as a part is taken for all of them.
    """
    if count == 1:
        return [path]
    stem = name_of_all(path).stem
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def name_of_all(path: Path) -> Path:
    """Return NAME.gguf for a part NAME-00001-of-00003.gguf; any other path as it is."""
    named = _PART.fullmatch(path.name)
    return path.with_name(f"{named[1]}.gguf") if named else path


def _named(path: Path) -> re.Match[str]:
    found = _PART.fullmatch(path.name)
    assert found
    return found
