"""The door to the user's texts: files or folders of them -> documents by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pi_gguf.errors import TextError

SUFFIXES = (".txt", ".md")


def read_texts(paths: Sequence[str]) -> dict[str, str]:
    """Read text files, and all text files in folders, one document each.

    Raises:
        TextError: a file is missing, empty or no UTF-8, or a folder has no text files.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
            if not inside:
                raise TextError(f"{path}: no {' or '.join(SUFFIXES)} files in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise TextError(f"{path}: no such file or folder")
    documents = {}
    for path in files:
        try:
            body = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise TextError(f"{path}: not UTF-8 at byte {error.start}", "convert it with iconv -t UTF-8") from error
        if not body.strip():
            raise TextError(f"{path}: the text is empty")
        documents[str(path)] = body
    return documents
