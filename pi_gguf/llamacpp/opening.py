"""Open a file with llama-cpp-python's `Llama`, and apply adapters to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_gguf.errors import GgufError, ResourceError
from pi_gguf.llamacpp.library import NativePath, compute, last_error, llama_cpp_library, log
from pi_gguf.llamacpp.watch import Watch


def open_llama(
    path: str | Path, *, fast_buffers: bool, sequences: int = 1, watch: Watch | None = None, **options: Any
) -> Any:
    """Open a file with llama-cpp-python's `Llama`, without its chat templates: it compiles each as soon as it opens.

    Args:
        fast_buffers: whether weights are held in the forms that are fast on this CPU; `Llama` has no argument for it.
        sequences: how many the context has; several share one cache. Nor for this.
        watch: sees what the weights are multiplied with; nor for this.
        options: as `Llama` has them.
    """

    class Llama(llama_cpp_library().Llama):  # type: ignore[misc]
        adapters: Sequence[Any] = ()

        @property
        def model_params(self) -> Any:
            return self._model_params

        @model_params.setter
        def model_params(self, params: Any) -> None:
            params.use_extra_bufts = fast_buffers
            self._model_params = params

        @property
        def context_params(self) -> Any:
            return self._context_params

        @context_params.setter
        def context_params(self, params: Any) -> None:
            params.n_seq_max, params.kv_unified = sequences, sequences > 1
            if watch:
                params.cb_eval = watch.callback
            self._context_params = params

        @property
        def metadata(self) -> dict[str, str]:
            return self._metadata

        @metadata.setter
        def metadata(self, metadata: dict[str, str]) -> None:
            self._metadata = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.chat_template")}

    return Llama(NativePath(path), **options)


def apply_adapters(llama: Any, paths: Sequence[str | Path]) -> None:
    """Apply GGUF adapters to an opened model; llama.cpp frees them together with it.

    Args:
        llama: llama_cpp's `Llama`.
        paths: of the adapters.

    Raises:
        GgufError: a file is no adapter, or not of this model.
    """
    llama_cpp = llama_cpp_library()
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(paths))()
    for i, path in enumerate(paths):
        log.clear()
        adapters[i] = llama_cpp.llama_adapter_lora_init(llama.model, os.fsencode(path))
        if not adapters[i]:
            raise GgufError(
                f"{path}: llama.cpp does not apply it to {llama.model_path} ({last_error()})",
                "it must be an adapter of this very model, written with --adapter-only",
            )
    llama.adapters = adapters
    _use_adapters(llama, llama.ctx)


def _use_adapters(llama: Any, context: Any) -> None:
    scales = (ctypes.c_float * len(llama.adapters))(*[1.0] * len(llama.adapters))
    llama_cpp_library().llama_set_adapters_lora(context, llama.adapters or None, len(llama.adapters), scales)


@dataclass(frozen=True)
class Beside:
    """Another context of an opened model, with as much of `Llama` as a session takes."""

    ctx: Any
    model: Any
    model_path: str


@contextlib.contextmanager
def open_beside(llama: Any, watch: Watch) -> Iterator[Beside]:
    """Open another context of an opened model, without flash attention, in which a watch sees what is computed.

    Its window is the same: by it llama.cpp chooses among LongRoPE's factors.

    Args:
        llama: what `open_llama` returned.
        watch: sees it.

    Raises:
        ResourceError: llama.cpp does not get the memory.
    """
    llama_cpp = llama_cpp_library()
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.cb_eval, params.n_seq_max, params.kv_unified = watch.callback, 1, False
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    log.clear()
    context = compute(llama_cpp.llama_init_from_model, llama.model, params)
    if not context:
        raise ResourceError(f"{llama.model_path}: llama.cpp opens no second window ({last_error()})")
    try:
        _use_adapters(llama, context)
        yield Beside(context, llama.model, llama.model_path)
    finally:
        compute(llama_cpp.llama_free, context)
