"""What other libraries keep to themselves and we need: every such name stands here, with why there is no public one.

In: their objects. Out: what is in them, or the objects changed. A library that renames one of these breaks this file
alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def tied_weights(model: Any) -> dict[str, str]:
    """Return the names of a transformers model's heads with those of the weights they may be tied to.

    The public `all_tied_weights_keys` is empty where the config does not tie them, and the names are wanted then, too.
    """
    keys: dict[str, str] = model._tied_weights_keys or {}
    return keys


def replace_backend(tokenizer: Any, backend: Any) -> None:
    """Give a tokenizer of transformers another tokenizer of `tokenizers`.

    `backend_tokenizer` cannot be set, and one made anew with `tokenizer_object` would lose its class and settings.
    """
    tokenizer._tokenizer = backend


def use_one_device(arguments: Any) -> None:
    """Let transformers' Trainer use one GPU at most in a process: it would split every batch over all there are.

    `n_gpu` is the number of those there are, and cannot be set.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


def attention_of(model: Any) -> str:
    """Return the name by which transformers knows a model's attention, to go back to: it is set, but not told."""
    name: str = model.config._attn_implementation
    return name


def takes_attention(model: Any) -> bool:
    """Tell whether a model takes its attention from transformers' registry: one that does not only logs a warning when
    another is set."""
    takes: bool = model._can_set_attn_implementation()
    return takes


def shared_state() -> dict[str, Any]:
    """Return what accelerate's `PartialState` knows, to be changed: its attributes are made from it and cannot be set
    for the states that come later."""
    from accelerate import PartialState

    state: dict[str, Any] = PartialState._shared_state
    return state


def onednn_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return a b + bias in 32 bits by oneDNN, which torch itself takes for other types only."""
    import torch

    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return found


@contextmanager
def forgiving_compiler() -> Iterator[Callable[[Any], None]]:
    """Let torch compute as ever what it cannot compile, while this is open: no public setting says so.

    Yields:
        What takes a module's compiled form from it, as `torch.nn.Module.compile` cannot be undone.
    """
    import torch._dynamo

    def undo(module: Any) -> None:
        module._compiled_call_impl = None

    with torch._dynamo.config.patch(suppress_errors=True):
        yield undo


def ggml_library() -> ctypes.CDLL:
    """Open the library of ggml's quantizers: llama-cpp-python says publicly neither where it is nor how to open it."""
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    library: ctypes.CDLL = load_shared_library("ggml-base", libggml_base_path)
    return library


def ggml_devices() -> ctypes.CDLL:
    """Open ggml's own library, which lists devices: llama-cpp-python has it open and no public name for it."""
    from llama_cpp._ggml import libggml

    library: ctypes.CDLL = libggml
    return library
