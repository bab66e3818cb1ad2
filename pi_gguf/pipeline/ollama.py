"""A GGUF file as a model of Ollama: the Modelfile that says its window, where it ends, and where the file lies.

In: a file. Out: OUT_DIR/Modelfile. Ollama copies the file into its own store when it makes a model of it, so nothing is
copied here. Without `num_ctx` it opens a window of its own choice, whatever the file states.

Source: Ollama's reference of the Modelfile (docs/modelfile.mdx), and what its parser takes (parser/parser.go): a value
ends at the end of a line unless it is quoted, quotes have no escapes, and what is not printable is dropped.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.common.files import check_writable, write_text, writes
from pi_gguf.common.provenance import package_version
from pi_gguf.errors import OptionError, UnsupportedError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.llamacpp.cache import predict_kv_cache
from pi_gguf.restore.opened import open_file
from pi_gguf.restore.tokenizer import Vocabulary, open_vocabulary

_NAME_LENGTH = 80
"""Characters of a model's name in Ollama, at most."""


@dataclass(frozen=True)
class OllamaModel:
    """A Modelfile that was written.

    Args:
        path: of the Modelfile.
        name: of the model in Ollama, made of the file's.
        num_ctx: window, in tokens.
        stop: texts that end an answer.
        cache_bytes: of the KV cache at that window, in f16.
        has_template: whether the file has a chat template.
    """

    path: str
    name: str
    num_ctx: int
    stop: list[str]
    cache_bytes: int
    has_template: bool

    @property
    def commands(self) -> tuple[str, str]:
        """The commands that make a model of it and run it."""
        return f"ollama create {self.name} -f {shlex.quote(self.path)}", f"ollama run {self.name}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "commands": list(self.commands)}


def export_ollama(file: str | Path, out_dir: str | Path, *, overwrite: bool = False) -> OllamaModel:
    """Write a Modelfile for Ollama: the file's window as num_ctx, its end tokens as stops; its template stays its own.

    Nothing is copied: the Modelfile names the file, as ./NAME where that lies in OUT_DIR, else by its whole path.

    Args:
        file: GGUF file, in one part.
        out_dir: folder for the Modelfile, made where there is none.
        overwrite: replace the Modelfile that is there.

    Example:
        pi-gguf export ollama my-llama-32k.gguf ./ollama
    """
    file, path = Path(file), Path(out_dir) / "Modelfile"
    if path.parent.is_dir():
        check_writable(path, overwrite)
    info = read_gguf(file)
    parts, window = info.metadata.get("split.count", 1), info.hyperparameter("context_length")
    if parts not in (0, 1):
        raise UnsupportedError(
            f"{file}: is one of {parts} parts, and a Modelfile names whole files",
            f"llama-gguf-split --merge {file} WHOLE.gguf, of llama.cpp, makes one of them",
        )
    source = _source(file, path.parent)
    with open_vocabulary(open_file(file)) as vocabulary:
        stop = _stops(vocabulary)
        has_template = bool(vocabulary.templates())
    _write(path, _text(source, window, stop), overwrite)
    cache = predict_kv_cache(info, window, "f16", "f16")
    return OllamaModel(str(path), _name(file), window, stop, cache, has_template)


def _source(file: Path, folder: Path) -> str:
    """Return how a Modelfile in a folder names a file.

    Raises:
        OptionError: the path has characters that Ollama drops.
    """
    whole = file.absolute()
    source = f"./{file.name}" if whole.parent.resolve() == folder.resolve() else str(whole)
    if not source.isprintable():
        raise OptionError(f"{source!r}: Ollama reads no name with such characters", "give the file another name")
    return source


def _stops(vocabulary: Vocabulary) -> list[str]:
    """Return the spellings of the end tokens that no text has by chance: of special ones, where they can be written."""
    tokens = [vocabulary.tokens[i] for i in vocabulary.ends()]
    special = [token.text for token in tokens if vocabulary.is_a(token, "CONTROL", "USER_DEFINED") and token.text]
    return list(dict.fromkeys(text for text in special if text.isprintable() and '"' not in text))


def _text(source: str, window: int, stop: list[str]) -> str:
    lines = [
        f"# Made by pi-gguf {package_version()} of what the file states.",
        f'FROM "{source}"' if " " in source else f"FROM {source}",
        "# The window, in tokens. A smaller one takes less memory.",
        f"PARAMETER num_ctx {window}",
        *(f'PARAMETER stop "{text}"' for text in stop),
    ]
    return "\n".join(lines) + "\n"


@writes("path", parents=True)
def _write(path: Path, text: str, overwrite: bool) -> None:
    check_writable(path, overwrite)
    write_text(path, text)


def _name(file: Path) -> str:
    """Return a name that Ollama takes: letters, digits, points, hyphens and underscores, the first no sign."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", file.name.removesuffix(".gguf")).strip("._-")
    return found[:_NAME_LENGTH] or "model"
