"""A Hugging Face checkpoint as a `LanguageModel`: the reference that the GGUF file is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.machine import torch_device
from pi_gguf.common.products import fast_products
from pi_gguf.errors import CheckpointError, GgufError
from pi_gguf.measure.language_model import GAP, LanguageModel, common_prefix
from pi_gguf.vocabulary.chats import chat_templates
from pi_gguf.vocabulary.templates import render_chat

if TYPE_CHECKING:
    import torch

_CHUNK = 1024


class HfTokens(LanguageModel):
    """The half of a `LanguageModel` that transformers' tokenizer is."""

    _tokenizer: Any

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return tokenize_with(self._tokenizer, text, add_special)

    @property
    def bos(self) -> list[int]:
        ids = self.tokenize("a")
        return ids[:1] if ids[0] == self._tokenizer.bos_token_id else []

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def is_end(self, token: int) -> bool:
        return bool(token == self._tokenizer.eos_token_id)


class HfModel(HfTokens):
    """A checkpoint opened by transformers in 32 bits on the CPU, 16 on a GPU.

    Args:
        checkpoint: what to open.
        device: `auto`, `cpu` or `cuda`.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "auto") -> None:
        import torch

        self.name = checkpoint.source
        self.window = checkpoint.rope.max_position_embeddings
        self.device = torch_device(device)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self._model: Any = checkpoint.load_model(dtype=dtype, device=self.device).eval()
        self._tokenizer: Any = checkpoint.load_tokenizer()
        self._folder = str(checkpoint.tokenizer_dir)
        self._evaluated: list[int] = []
        self._cache: Any = None

    def logits_chunks(self, ids: Sequence[int], last: int) -> Iterator[np.ndarray]:
        import torch
        from transformers import DynamicCache

        first = len(ids) - last
        known = min(common_prefix(self._evaluated, ids), first)
        if self._cache is None or known < len(ids) // 4:  # from the start is faster than with masks for the rest
            self._cache, known = DynamicCache(config=self._model.config), 0
        elif known < len(self._evaluated):
            self._cache.crop(known - len(self._evaluated))  # negative: how many to drop
        self._evaluated = list(ids[:known])
        # From an empty cache all at once: torch's causal kernel needs no mask then. Later a mask of
        # [chunk, tokens] is made, so chunks stay small.
        step = _CHUNK if known else len(ids)
        for start in range(known, len(ids), step):
            part = list(ids[start : start + step])
            with torch.inference_mode(), fast_products(self.device):
                hidden = self._model.base_model(
                    torch.tensor([part], device=self.device), past_key_values=self._cache, use_cache=True
                ).last_hidden_state[0]
            self._evaluated += part
            for offset in range(max(0, first - start), len(part), _CHUNK):
                yield self._logits(hidden[offset : offset + _CHUNK]).cpu().numpy()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (T, V) of last hidden states (T, D): the model's own forward after its base, with whatever
        a family does there (scaling, soft caps)."""
        import torch
        from transformers.modeling_outputs import MoeModelOutputWithPast

        base = self._model.base_model
        whole, base.forward = base.forward, lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden[None])
        try:
            with torch.inference_mode(), fast_products(self.device):
                logits: torch.Tensor = self._model(
                    torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
                ).logits
        finally:
            base.forward = whole
        return logits[0].float()

    def chat_around(self, message: str) -> tuple[list[int], list[int]] | None:
        template = chat_templates(self._tokenizer).get("default")
        if template is None:
            return None
        messages = [{"role": "user", "content": message}]
        try:
            text = render_chat(template, messages, self._tokenizer.special_tokens_map, self._folder)
        except GgufError as error:  # what a template of a file raises
            raise CheckpointError(str(error)) from error
        before, _, behind = text.partition(GAP)
        if not behind or GAP in behind:
            return None
        return self.tokenize(before, add_special=False), self.tokenize(behind, add_special=False)

    def close(self) -> None:
        self._model = self._cache = None


def tokenize_with(tokenizer: Any, text: str, add_special: bool) -> list[int]:
    """Return token ids of transformers' tokenizer, without its warning that they are many."""
    ids: list[int] = tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"]
    return ids
