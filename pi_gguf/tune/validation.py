"""What a fine-tune is worth while it runs: perplexity at the old and the new window, passkeys at the new one, and what
the old window pays.

In: a model in training, or the folder it became. Out: a few figures by name, which the run logs and records. Every
process of a run measures the same, as its shards are needed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common import machine
from pi_gguf.common.files import human_bytes
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import OptionError, TextError
from pi_gguf.measure.passkey import PasskeyPrompts, k_max, passkey_cells
from pi_gguf.measure.perplexity import Yardstick
from pi_gguf.models.hf import HfModel, HfTokens, tokenize_with
from pi_gguf.tune.processes import agree

DISTANCES, KEYS = 2, 2
"""Of the passkeys: places in the new window, and keys at each."""


class TrainingModel(HfTokens):
    """A model in training, asked for one prompt at a time with nothing kept in between.

    Args:
        model: of transformers, sharded or not.
        checkpoint: what it was opened from.
        window: the new one, in tokens.
        device: where its inputs go.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, window: int, device: str) -> None:
        self._model, self._device = model, device
        self._tokenizer = checkpoint.load_tokenizer()
        self.name, self.window = checkpoint.source, window

    def logits_chunks(self, ids: Sequence[int], last: int) -> Iterator[np.ndarray]:
        import torch

        self._model.eval()
        try:
            with torch.no_grad():
                inputs = torch.tensor([list(ids)], device=self._device)
                logits = self._model(inputs, use_cache=False, logits_to_keep=last).logits
        finally:
            self._model.train()
        yield logits[0, -last:].float().cpu().numpy()

    def close(self) -> None:
        """Leave the model to its owner."""


class Validation:
    """Measures a model every so many steps.

    Args:
        checkpoint: extended to the new window.
        every: steps between two; 0 for none while it runs.
        early_stop: tell to stop when k_max has reached the new window.
        text: files to read; the longest held-out novel of the bundled sample when empty.

    Raises:
        OptionError: `every` cannot work, or `early_stop` where passkeys cannot be asked for.
        TextError: the text is shorter than the new window.
    """

    def __init__(self, checkpoint: Checkpoint, *, every: int, early_stop: bool, text: Sequence[str]) -> None:
        if every < 0:
            raise OptionError(f"eval-steps must not be negative, got {every}")
        if early_stop and not every:
            raise OptionError("early-stop needs eval-steps, got 0", "give for example --eval-steps 100")
        self._before, context = checkpoint.original, checkpoint.rope.max_position_embeddings
        self._original, self._context = self._before.rope.max_position_embeddings, context
        self.every, self._early_stop = every, early_stop
        self._yardstick = Yardstick.of(text, self._original, context)
        self._tokens = len(tokenize_with(checkpoint.load_tokenizer(), self._yardstick.text, True))
        self._passkeys = False
        if not every:
            return
        if self._tokens < self._yardstick.tokens_needed():
            raise TextError(
                f"{self._yardstick.name}: {self._tokens} tokens, too few to validate at {self._context}",
                "give a longer text with --eval-text, or leave --eval-steps out",
            )
        try:
            PasskeyPrompts(TrainingModel(None, checkpoint, context, "cpu"), context).make("12345", context)
            self._passkeys = True
        except OptionError as error:
            if early_stop:
                raise OptionError(f"early-stop: no passkeys, {error}", "leave --early-stop out") from error
            say(f"validation without passkeys: {error}")

    @property
    def text(self) -> tuple[str, str]:
        """Name of the text without its folder, and hash of what is read of it."""
        return Path(self._yardstick.name).name, sha256([self._yardstick.text])

    def is_due(self, step: int) -> bool:
        """Tell whether to measure after a step, counted from 1."""
        return self.every > 0 and step % self.every == 0

    def measure(self, model: Any, device: str) -> dict[str, float]:
        """Measure a model in training.

        Returns:
            `eval_perplexity_WINDOW` for the old and the new window and, where passkeys can be asked for, `eval_k_max`
            in tokens.
        """
        lm = TrainingModel(model, self._before, self._context, device)
        windows = (self._original, self._context)
        found = {f"eval_perplexity_{w}": value for w, value in self._yardstick.perplexities(lm, windows).items()}
        if self._passkeys:
            cells = passkey_cells(lm, windows=(self._context,), distances=DISTANCES, keys=KEYS)
            found["eval_k_max"] = float(k_max(cells))
        found = dict(agree(found, device))  # they decide together when to stop
        say("validation: " + ", ".join(f"{name.removeprefix('eval_')} {value:.6g}" for name, value in found.items()))
        return found

    def is_reached(self, found: dict[str, float]) -> bool:
        """Tell whether the run has come to its end early: k_max is the new window."""
        return self._early_stop and found["eval_k_max"] >= self._context

    def price(self, after: Checkpoint, device: str) -> dict[str, Any] | None:
        """Measure what the old window pays: perplexity there before and after the fine-tune.

        Args:
            after: the folder it became.
            device: `cpu` or `cuda`.

        Returns:
            `window` in tokens, perplexity `before` and `after`, and what was read; None, and a line that says why,
            where the text is too short or a model does not fit.
        """
        yardstick = self._yardstick
        if self._tokens < yardstick.tokens_needed():  # then not on the stretches that the new window is measured on
            yardstick = replace(yardstick, largest=self._original)
        if self._tokens < yardstick.tokens_needed():
            say(
                f"price at {self._original} tokens: not measured, {yardstick.name} has {self._tokens} of "
                f"{yardstick.tokens_needed()}; give --eval-text"
            )
            return None
        need, free = after.n_parameters() * (2 if device == "cuda" else 4), machine.free_memory(device)
        if need > free:
            say(
                f"price at {self._original} tokens: not measured, the model takes {human_bytes(need)} and "
                f"{human_bytes(free)} are free"
            )
            return None
        say(
            f"measure what the old window pays: {yardstick.SAMPLES} stretches of {self._original} tokens, read by the "
            "model as it was and as it is now"
        )
        perplexities: list[float] = []
        for checkpoint in (self._before, after):
            lm = HfModel(checkpoint, device=device)
            perplexities += yardstick.perplexities(lm, (self._original,)).values()
            lm.close()
        before, now = perplexities
        say(
            f"price at {self._original} tokens: perplexity {before:.4g} before, {now:.4g} after "
            f"({now / before - 1:+.1%}; {yardstick.name})"
        )
        return {"window": self._original, "before": before, "after": now, **yardstick.record()}
