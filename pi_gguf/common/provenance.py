"""What a result carries to be believed and repeated: versions, commit, hashes, time and peak memory."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pi_gguf.common.machine import peak_memory

_STARTED = time.time()
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+")
_PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "numpy")


def package_version(name: str = "pi-gguf") -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a folder that was not installed
        return "unknown"


def library_versions() -> dict[str, str]:
    return {name: package_version(name) for name in _PACKAGES}


def provenance(*, seed: int, device: str, **more: Any) -> dict[str, Any]:
    """Return the record that goes into a JSON result.

    Args:
        more: what else the figures depend on, such as `text_sha256`.
    """
    return {
        "pi_gguf": package_version(),
        "commit": _commit(),
        "libraries": library_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": seed,
        "device": device,
        "elapsed_seconds": round(time.time() - _STARTED, 1),
        "peak_memory_bytes": peak_memory(),
        **more,
    }


def without_folders(value: Any) -> Any:
    """Return a report in JSON's types without the folders of this machine: absolute paths become their last names.

    Two that would be the same are numbered. Inside of a text what looks like one is shortened, too.
    """
    names: dict[str, str] = {}

    def shown(text: str) -> str:
        if not Path(text).is_absolute() or "\n" in text:
            return _FOLDERS.sub("", text)
        if text not in names:
            alike = sum(Path(other).name == Path(text).name for other in names)
            names[text] = f"{Path(text).name} ({alike + 1})" if alike else Path(text).name
        return names[text]

    def walk(inner: Any) -> Any:
        if isinstance(inner, str):
            return shown(inner)
        if isinstance(inner, dict):
            return {walk(key): walk(item) for key, item in inner.items()}
        return [walk(item) for item in inner] if isinstance(inner, (list, tuple)) else inner

    return walk(value)


def sha256(texts: list[str]) -> str:
    """Return one hash over texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _commit() -> str | None:
    """Return the commit of the source tree this runs from, with `+` when it has changes; None elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(root)]
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
