"""A GGUF file where a MODEL stands: unpacked into the user's cache, once, and opened from there.

In: MODEL, as the user gives it. Out: a folder for a GGUF file, anything else as it is. The folder is of the file as it
is now, with all its parts: one that was replaced or written to is unpacked again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pi_gguf.common.files import human_bytes, one_writer, user_cache
from pi_gguf.common.progress import process_count, say
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.header import is_gguf
from pi_gguf.gguf.parts import complete
from pi_gguf.restore.opened import open_file
from pi_gguf.restore.unpack import restore


def as_folder(model: str, *, weights: bool = True, tokenizer: bool = True) -> str:
    """Return MODEL, of a GGUF file a folder that was made of it.

    Args:
        weights: write them too.
        tokenizer: write and prove it too; without both there is enough to plan with.

    Raises:
        GgufError: the file, or a part of it, is missing or damaged.
        UnsupportedError: it is of no family that is unpacked.
        OptionError: there are several processes, or no place for the folder.
    """
    path = Path(model)
    if not is_gguf(path) or path.is_dir():
        return model
    if not path.is_file():
        raise GgufError(f"{path}: no such file", "check the spelling")
    cache, by_hand = user_cache(), f"pi-gguf unpack {path} FOLDER, and give that folder as MODEL"
    if process_count() > 1 or cache is None:
        why = "several processes" if cache else "a user without a home"
        raise OptionError(f"{path}: a GGUF file is not unpacked on the way by {why}", by_hand)
    parts = complete(path).paths
    states = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in (part.stat() for part in parts)]
    mark = f"{parts[0].resolve()} {states} {weights} {tokenizer}"
    folder = cache / "unpacked" / hashlib.sha256(mark.encode()).hexdigest()[:16] / parts[0].stem
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{folder}: cannot be written ({error.strerror})", by_hand) from error
    with one_writer(folder):
        if (folder / "config.json").exists():
            if weights:
                say(f"{path} was unpacked before; {folder} is used")
            return str(folder)
        result = restore(open_file(path), folder, weights=weights, tokenizer=tokenizer)
    if weights:
        say(
            f"{path} is unpacked into {folder} ({result.model_type}, {human_bytes(result.nbytes)} in {result.dtype}), "
            "which may be deleted at any time"
        )
    return str(folder)
