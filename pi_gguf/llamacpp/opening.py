"""Open a file with llama-cpp-python's `Llama`, and apply adapters to it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi_gguf.errors import GgufError
from pi_gguf.llamacpp.library import NativePath, last_error, llama_cpp_library, log
from pi_gguf.llamacpp.watch import ProductWatch


def open_llama(path: str | Path, *, fast_buffers: bool, watch: ProductWatch | None = None, **options: Any) -> Any:
    """Open a file with llama-cpp-python's `Llama`, without its chat templates: it compiles each as soon as it opens.

    Args:
        fast_buffers: whether weights are held in the forms that are fast on this CPU; `Llama` has no argument for it.
        watch: sees what the weights are multiplied with; nor for this.
        options: as `Llama` has them.
    """

    class Llama(llama_cpp_library().Llama):  # type: ignore[misc]
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
    scales = (ctypes.c_float * len(paths))(*[1.0] * len(paths))
    llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, len(paths), scales)
