"""Texts of documents, kept on disk as private as the documents are, so that a library outlives its process.

A file: a line of JSON with what is shown in a list, a line of JSON with the text and its places. States, which say what
a model read of it, are files of their own (`runtime.states`); here stands which they are.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pi_gguf.common.files import disk_errors, open_plain, remove, removed_if_damaged, replace_when_complete
from pi_gguf.common.progress import say
from pi_gguf.documents.formats import Document
from pi_gguf.documents.markup import Place
from pi_gguf.errors import GgufError, PiGgufError

_NAME = re.compile(r"doc-[0-9a-f]{16}\.json")
_LONGEST_HEAD = 2**20


@dataclass
class Head:
    """What a list shows of a document.

    Args:
        id: by its name and text.
        name: of its file.
        format: txt, md, html, pdf, docx or epub.
        characters: of its text.
        added: seconds since 1970.
        used: when it was asked about last.
        readers: by model and form, how many tokens it has there, the file of its state, and how many that holds.
    """

    id: str
    name: str
    format: str
    characters: int
    added: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    readers: dict[str, tuple[int, str, int]] = field(default_factory=dict)


def document_id(document: Document) -> str:
    """Return what names a document: the same name and text have the same."""
    content = f"{document.name}\n{document.text}".encode(errors="surrogatepass")
    return f"doc-{xxhash.xxh3_64_hexdigest(content)}"


class Stored:
    """The documents in a folder; several processes may use one.

    Args:
        folder: made when the first is kept; with None nothing is.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def heads(self) -> list[Head]:
        """Return what is kept; what is damaged is removed, and it is said."""
        found = []
        for path in self.folder.glob("doc-*.json") if self.folder else ():
            if not _NAME.fullmatch(path.name):
                continue
            with removed_if_damaged(path), open_plain(path) as file:
                found.append(_head(file.readline(_LONGEST_HEAD)))
        return found

    def document(self, id: str) -> Document:
        """Return a document with its text.

        Raises:
            GgufError: it is gone, or damaged.
        """
        path = self._path(id)
        try:
            if path is None:
                raise OSError("it was not kept")
            with open_plain(path) as file:
                head, body = _head(file.readline(_LONGEST_HEAD)), json.loads(file.readline())
            return Document(head.name, head.format, body["text"], tuple(Place(*place) for place in body["places"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GgufError(f"{id}: its text is not kept any more", "give the document once more") from error

    def keep(self, head: Head, document: Document) -> None:
        """Keep a document; where that cannot be, it is said, and it is there until the process ends."""
        path = self._path(head.id)
        if path is None:
            return
        places = [[place.start, place.kind, place.label] for place in document.places]
        lines = json.dumps(asdict(head)), json.dumps({"text": document.text, "places": places})
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replace_when_complete(path) as partial, disk_errors(path):
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
        except (OSError, PiGgufError) as error:
            say(f"the text of {head.name} is not kept: {error}")

    def remove(self, id: str) -> None:
        """Forget a document."""
        if path := self._path(id):
            remove(path)

    def _path(self, id: str) -> Path | None:
        return self.folder / f"{id}.json" if self.folder else None


def _head(line: bytes) -> Head:
    """Read the first line of a file.

    Raises:
        ValueError: it is none.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        head = Head(**values)
        head.readers = {
            str(key): (int(of), Path(name).name, int(known)) for key, (of, name, known) in head.readers.items()
        }
        if not all(isinstance(value, int | float) for value in (head.characters, head.added, head.used)):
            raise TypeError("numbers")
        return head
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError("its first line is damaged") from error
