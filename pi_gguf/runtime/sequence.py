"""What one sequence of an opened llama.cpp holds in the cache: known, dropped, copied, saved and put back.

A context has one sequence, or several in one cache, where what two have in common is there once. In: token ids. Out:
how many of them the cache holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi_gguf.llamacpp.library import compute, llama_cpp_library
from pi_gguf.measure.language_model import common_prefix


class CachedSequence:
    """A sequence of a context.

    Args:
        llama: what `open_llama` opened.
        number: of the sequence.
    """

    def __init__(self, llama: Any, number: int = 0) -> None:
        self._llama_cpp = llama_cpp_library()
        self._opened: tuple[Any, Any] | None = llama.ctx, self._llama_cpp.llama_model_get_vocab(llama.model)
        self._name, self.number = str(llama.model_path), number
        self._sliding = int(self._llama_cpp.llama_model_n_swa(llama.model))
        self.ids: list[int] = []
        """What lies in the cache; another list with each reading."""

    @property
    def _context(self) -> Any:
        return self._open()[0]

    @property
    def _memory(self) -> Any:
        return self._llama_cpp.llama_get_memory(self._context)

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            raise RuntimeError(f"{self._name}: it was closed")
        return self._opened

    def close(self) -> None:
        """Let go of what is about to be freed: whatever still runs on it then raises an error."""
        self._opened, self.ids = None, []

    def known(self, ids: Sequence[int]) -> int:
        """Return how many of `ids` the cache holds from their beginning."""
        return common_prefix(self.ids, ids)

    def state_bytes(self) -> int:
        """Return the size of what the cache holds, as llama.cpp saves it."""
        return int(self._llama_cpp.llama_state_seq_get_size(self._context, self.number))

    def save(self, state: np.ndarray) -> int:
        """Write what the cache holds into an array (`state_bytes`,) of bytes; return how many were written."""
        data, library = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8)), self._llama_cpp
        return int(compute(library.llama_state_seq_get_data, self._context, data, state.nbytes, self.number))

    def restore(self, state: np.ndarray, ids: Sequence[int]) -> bool:
        """Put into the cache what was saved after `ids`; False, and it is empty, where llama.cpp does not take it.

        The state must be whole and of the same model, cache types and llama.cpp: another may end the process.
        """
        self.clear()
        data, library = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8)), self._llama_cpp
        if compute(library.llama_state_seq_set_data, self._context, data, state.nbytes, self.number) != state.nbytes:
            self.clear()
            return False
        self.ids = list(ids)
        return True

    def clear(self) -> None:
        """Empty the cache of this sequence."""
        if self._llama_cpp.llama_n_seq_max(self._context) == 1:
            self._llama_cpp.llama_memory_clear(self._memory, True)
        else:
            self._llama_cpp.llama_memory_seq_rm(self._memory, self.number, -1, -1)
        self.ids = []

    def rewind(self, known: int) -> int:
        """Drop what is behind the first `known` ids; return how many are left, 0 where the model cannot go back."""
        self.ids = self.ids[: self._rewind(known)]
        return len(self.ids)

    def copy(self, source: CachedSequence, known: int) -> int:
        """Hold the first `known` ids of another sequence, without computing or storing them again.

        Returns:
            How many are held: 0 where the model cannot, as with recurrent layers that have read on.
        """
        self.clear()
        self._llama_cpp.llama_memory_seq_cp(self._memory, source.number, self.number, 0, known)
        self.ids = source.ids[: self._rewind(known)]
        return len(self.ids)

    def _rewind(self, known: int) -> int:
        """Drop from the cache what is behind the first `known` ids; return how many it then holds."""
        gone_back = self._llama_cpp.llama_memory_seq_rm(self._memory, self.number, known, -1)  # recurrent states cannot
        if gone_back and known and self._sliding:  # a kept state has only those that a window at its end sees
            first = self._llama_cpp.llama_memory_seq_pos_min(self._memory, self.number)
            gone_back = 0 <= first <= max(0, known - self._sliding + 1)
        if gone_back:
            return known
        self.clear()
        return 0
