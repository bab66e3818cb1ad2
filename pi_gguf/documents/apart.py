"""A stranger's document, read in a process of its own, bounded in memory and time: it can break that one alone.

In: its bytes, and its name. Out: a `Document`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import unicodedata
from typing import Any

from pi_gguf.common.children import limit_child, run_child
from pi_gguf.documents.formats import KINDS, Document, read_data
from pi_gguf.documents.markup import Place
from pi_gguf.errors import PiGgufError, TextError, one_line

_MEMORY_BYTES = 3 * 2**30
_CPU_SECONDS = 120
_WALL_SECONDS = 600
"""Of the process that reads. A machine may be busy: only CPU seconds tell what a document takes."""

_LONGEST_NAME = 120


def plain_name(name: str) -> str:
    """Return a document's name without folders, control characters and marks that change the order of letters.

    Example:
        >>> plain_name("../../etc/passwd"), plain_name("C:\\\\books\\\\a.txt"), plain_name("..")
        ('passwd', 'a.txt', 'document')
    """
    last = re.split(r"[/\\]", name)[-1]
    shown = "".join(c for c in last if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
    shown = " ".join(shown.split()).lstrip(". ")
    stem, dot, suffix = shown.rpartition(".")
    if len(shown) > _LONGEST_NAME:
        shown = (
            stem[: _LONGEST_NAME - len(suffix) - 1] + dot + suffix if 0 < len(suffix) < 10 else shown[:_LONGEST_NAME]
        )
    return shown or "document"


def read_apart(data: bytes, name: str) -> Document:
    """Read a document in a process of its own.

    Args:
        data: the file's bytes.
        name: its name; what comes before the last slash is left out.

    Raises:
        TextError: it cannot be read, or takes more memory or time than a document may.
    """
    name = plain_name(name)
    try:
        limits = str(_MEMORY_BYTES), str(_CPU_SECONDS)
        done = run_child("documents.apart", name, *limits, seconds=_WALL_SECONDS, input=data, capture_output=True)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise TextError(f"{name}: reading it takes more than {_WALL_SECONDS} s", "save it in another format") from error
    except ValueError as error:
        raise TextError(
            f"{name}: reading it takes more than {_CPU_SECONDS} s or {_MEMORY_BYTES >> 30} GiB, or ends the reader "
            f"({done.returncode})",
            "save it in another format",
        ) from error
    if "error" in answer:
        raise TextError(answer["error"], answer["hint"])
    return Document(name, answer["format"], answer["text"], tuple(Place(*place) for place in answer["places"]))


def _main(name: str, memory_bytes: str, cpu_seconds: str) -> None:
    limit_child(int(memory_bytes), int(cpu_seconds))
    answer: dict[str, Any]
    try:
        document = read_data(sys.stdin.buffer.read(), name)
        answer = {"format": document.format, "text": document.text, "places": list(map(_plain, document.places))}
    except PiGgufError as error:
        answer = {"error": str(error), "hint": error.hint}
    except MemoryError:
        answer = {"error": f"{name}: reading it takes too much memory", "hint": "save it in another format"}
    except Exception as error:  # whatever a library meets in a stranger's file
        answer = {"error": f"{name}: cannot be read ({one_line(error)})", "hint": f"give {KINDS}"}
    sys.stdout.write(json.dumps(answer))


def _plain(place: Place) -> tuple[Any, ...]:
    return tuple(getattr(place, field.name) for field in dataclasses.fields(place))


if __name__ == "__main__":
    _main(*sys.argv[1:])
