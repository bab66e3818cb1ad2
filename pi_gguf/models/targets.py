"""What an evaluation is asked of: a GGUF file, a Hugging Face model, or a server.

In: the word on the command line. Out: an open `LanguageModel`. All backends go through it, so that a figure differs
between them only by what the models compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import library_versions
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import is_gguf
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.models.hf import HfModel
from pi_gguf.models.options import ServerOptions, TargetOptions
from pi_gguf.models.server import RemoteModel
from pi_gguf.runtime.model import Model


@contextmanager
def opened(
    model: str | LanguageModel, target: TargetOptions, *, n_ctx: int | None, at_most: int | None = None
) -> Iterator[LanguageModel]:
    """Open a target that `check_targets` has seen, and close it; an open model passes through.

    Args:
        model: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or the URL of an OpenAI-compatible server.
        n_ctx: tokens to open it for; its own window when None.
        at_most: less than its own window, where that is enough.
    """
    if isinstance(model, LanguageModel):
        yield model
        return
    lm: LanguageModel
    if is_url(model):
        lm = RemoteModel(model, load_checkpoint(str(_tokenizer(target)), weights=False), n_ctx)
    elif is_gguf(model):
        if at_most is not None:
            n_ctx = min(at_most, window_of(model))
        lm = Model(model, n_ctx=n_ctx, device=target.device, type_k=target.type_k, type_v=target.type_v)
    else:
        checkpoint = load_checkpoint(model)
        if target.context is not None:
            checkpoint = checkpoint.extended(target.context, target.method)
        lm = HfModel(checkpoint, device=target.device)
    if n_ctx is not None and n_ctx > lm.window:
        say(f"note: {model} has a window of {lm.window} tokens and is read to {n_ctx}")
    try:
        yield lm
    finally:
        lm.close()


def is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _tokenizer(target: TargetOptions) -> str | None:
    return target.tokenizer if isinstance(target, ServerOptions) else None


def identity(model: str | LanguageModel, **options: Any) -> dict[str, Any]:
    """Return what tells a target from another one, and from itself after a change, without reading all of it.

    Args:
        options: as it is opened with; they and the versions of the libraries are part of it.
    """
    return {**_what(model), **options, "versions": library_versions()}


def _what(model: str | LanguageModel) -> dict[str, Any]:
    if isinstance(model, LanguageModel):
        return {"model": model.name}
    if is_url(model):
        return {"model": model}
    if is_gguf(model):
        if not Path(model).is_file():
            raise GgufError(f"{model}: no such file")
        stat = Path(model).stat()
        return {"model": model, "bytes": stat.st_size, "written": stat.st_mtime_ns}
    return {"model": model, "weights": load_checkpoint(model).fingerprint()}


def check_targets(models: Sequence[str | LanguageModel], target: TargetOptions) -> None:
    """Check before long work that there is a target, none twice, and that each can be asked with these options.

    Args:
        target: a server may be asked where these are `ServerOptions`.

    Raises:
        OptionError: otherwise.
    """
    names = [model if isinstance(model, str) else model.name for model in models]
    if not names:
        raise OptionError("MODEL is missing", "give a GGUF file, a Hugging Face folder or bundled:tiny")
    if len(set(names)) < len(names):
        raise OptionError(f"models must differ, got {', '.join(names)}")
    if _tokenizer(target) is not None and not any(map(is_url, names)):
        raise OptionError(
            f"tokenizer is for URLs, got {', '.join(names)}", "leave it out: files and folders have their own"
        )
    context, of_files = target.context, (target.type_k, target.type_v) != ("f16", "f16")
    for model in models:
        if not isinstance(model, str):
            continue
        if is_url(model):
            if not isinstance(target, ServerOptions):
                raise OptionError(
                    f"{model}: a server gives no log-probabilities of a prompt",
                    "it can be asked for passkey, needle, ruler and summarize",
                )
            if context is not None or of_files:
                raise OptionError(f"context and cache types are the server's to choose, {model} is a URL")
            if target.tokenizer is None:
                raise OptionError(f"{model}: tokenizer must name the MODEL whose tokenizer the server's model has")
        elif is_gguf(model):
            if context is not None:
                raise OptionError(f"context is for Hugging Face models; {model} holds its scaling")
        elif of_files:
            raise OptionError(f"type-k and type-v are for GGUF files, {model} is none", "leave them out")


LARGEST = 32768
"""No window is above it unless it is asked for, in tokens."""


def choose_windows(
    windows: Sequence[int] | None, models: Sequence[str | LanguageModel], target: TargetOptions, *, least: int = 2048
) -> list[int]:
    """Return the windows to measure, in tokens.

    Args:
        windows: asked for; when None, `least` and its doublings up to the largest window of the models and `LARGEST`.
        models: targets that `check_targets` has seen.
        target: as they are opened.

    Raises:
        OptionError: none, or one below 2.
    """
    if windows is None:
        largest = min(LARGEST, max(window_of(model, target) for model in models))
        return doublings(min(least, largest), largest)
    if not windows or min(windows) < 2:
        raise OptionError(f"windows must be token counts above 1, got {list(windows)}")
    return list(windows)


def window_of(model: str | LanguageModel, target: TargetOptions | None = None) -> int:
    """Return the window that a target states, in tokens, without its weights; of a server its tokenizer's model's."""
    target = target or TargetOptions()
    if isinstance(model, LanguageModel):
        return model.window
    if not is_url(model) and is_gguf(model):
        return read_gguf(Path(model)).rope.max_position_embeddings
    source = str(_tokenizer(target)) if is_url(model) else model
    return target.context or load_checkpoint(source, weights=False).rope.max_position_embeddings


def doublings(original: int, context: int) -> list[int]:
    """Return the original window and each doubling of it, the last one cut to `context`, in tokens."""
    windows = [original]
    while windows[-1] < context:
        windows.append(min(2 * windows[-1], context))
    return windows
