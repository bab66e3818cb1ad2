"""From MODEL, as the user gives it, to a folder: a folder itself, an id of the Hub, or the bundled model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pi_gguf import bundled
from pi_gguf.common.files import is_file
from pi_gguf.common.progress import aside
from pi_gguf.errors import CheckpointError, one_line

ADAPTER_FILE = "adapter_config.json"


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_name(source: str) -> str:
    """Return what a model is called: the last part of a Hub id or of a folder's place, a cached one's Hub id read back.

    Args:
        source: a folder, a Hub id or `bundled:tiny`.
    """
    return public_source(source).removeprefix("bundled:").rpartition("/")[2]


def public_source(source: str) -> str:
    """Return MODEL as it may be published: a Hub id as it is, of a folder no more than its name."""
    if source.startswith("bundled:"):
        return source
    path = Path(source)
    if _HUB_ID.fullmatch(source) and not source.startswith(".") and not path.exists():
        return source
    path = path.expanduser().resolve()
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return path.name


@contextmanager
def without_adapter(path: Path, weights: list[Path]) -> Iterator[Path]:
    """Give a folder in which transformers finds no adapter to attach: the checkpoint's own, or one of links to it."""
    if not (path / ADAPTER_FILE).exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in [*path.glob("*.json"), *weights]:
            link = folder / file.relative_to(path)
            if file.name != ADAPTER_FILE and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
        yield folder


def resolve(model: str, patterns: list[str]) -> Path:
    if model == bundled.TINY:
        return bundled.TINY_DIR
    if model.startswith("bundled:"):
        raise CheckpointError(f"{model}: no such bundled model", f"the one there is: {bundled.TINY}")
    path = Path(model)
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model}: no such folder ({one_line(error)})", "check the spelling") from error
    if is_folder:
        return path
    if is_file(path):
        raise CheckpointError(f"{model}: is a file; MODEL must be a Hugging Face folder", f"try {path.parent}")
    if not _HUB_ID.fullmatch(model) or (path.parent.is_dir() and str(path.parent) != "."):
        raise CheckpointError(f"{model}: no such folder", f"give a folder, a Hub id (owner/name) or {bundled.TINY}")
    from huggingface_hub import snapshot_download

    try:
        with aside():
            return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # network, permission and not-found errors of the Hub's client
        raise CheckpointError(
            f"{model}: not a folder here, and not to be had from the Hub ({one_line(error)})",
            "check the spelling and the connection; for gated models run `hf auth login`",
        ) from error
