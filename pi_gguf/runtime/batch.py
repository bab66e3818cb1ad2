"""Tokens of several sequences of a context, read by llama.cpp at once.

In: which ids come next in which sequence, and after which of them logits are wanted. Out: these logits. V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi_gguf.errors import ResourceError
from pi_gguf.llamacpp.library import compute, last_error, llama_cpp_library
from pi_gguf.runtime.sequence import CachedSequence

_NO_ROOM = 1
"""What llama.cpp returns where the cache has no room for a batch; nothing was changed then."""


class Batch:
    """A batch that is filled and read again and again.

    Args:
        llama: what `open_llama` opened.
        size: tokens that it has at most.
    """

    def __init__(self, llama: Any, size: int) -> None:
        self._llama_cpp = library = llama_cpp_library()
        self._context, self._name = llama.ctx, str(llama.model_path)
        self.n_vocab = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(llama.model)))
        self.size, self._count = size, 0
        self._parts: list[tuple[CachedSequence, Sequence[int]]] = []
        tokens, positions, numbers = (
            (kind * size)() for kind in (library.llama_token, library.llama_pos, ctypes.c_int)
        )
        outputs = (ctypes.c_int8 * size)()
        pointer = ctypes.POINTER(library.llama_seq_id)
        own = [ctypes.cast(ctypes.byref(numbers, 4 * i), pointer) for i in range(size)]
        self._batch = library.llama_batch(
            token=tokens, pos=positions, n_seq_id=(ctypes.c_int32 * size)(*[1] * size), seq_id=(pointer * size)(*own),
            logits=outputs,
        )  # fmt: skip
        self._arrays = [np.ctypeslib.as_array(array) for array in (tokens, positions, numbers, outputs)]

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        """Begin anew."""
        self._count, self._parts = 0, []

    def add(self, sequence: CachedSequence, ids: Sequence[int], last: int) -> int:
        """Add what comes next in a sequence, once a batch; there must be room.

        Args:
            sequence: in which.
            ids: what comes.
            last: after how many of the last ids logits are wanted.

        Returns:
            The place in the batch of the first of these.
        """
        tokens, positions, numbers, outputs = self._arrays
        start, end, at = self._count, self._count + len(ids), len(sequence.ids)
        tokens[start:end], positions[start:end], numbers[start:end] = ids, np.arange(at, at + len(ids)), sequence.number
        outputs[start : end - last], outputs[end - last : end] = 0, 1
        self._count = end
        self._parts.append((sequence, ids))
        return end - last

    def read(self) -> bool:
        """Read the batch; False, and nothing was read, where the cache has no room for it.

        Raises:
            ResourceError: llama.cpp cannot compute; what its sequences hold is not known any more.
        """
        self._batch.n_tokens = self._count
        code = compute(self._llama_cpp.llama_decode, self._context, self._batch)
        if code == _NO_ROOM:
            return False
        if code != 0:
            raise ResourceError(f"{self._name}: llama.cpp could not read a batch ({last_error()})")
        for sequence, ids in self._parts:
            sequence.ids += ids
        return True

    def logits(self, place: int) -> np.ndarray:
        """Return the logits at a place of the batch, float32 (V,), valid up to the next reading."""
        found = self._llama_cpp.llama_get_logits_ith(self._context, place)
        values = (ctypes.c_float * self.n_vocab).from_address(ctypes.addressof(found.contents))
        return np.ctypeslib.as_array(values)
