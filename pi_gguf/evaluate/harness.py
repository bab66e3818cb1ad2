"""An open model as lm-evaluation-harness takes one. This imports the harness: open it only where it is installed.

In: a `LanguageModel`, and the harness's requests. Out: log-likelihoods and texts, as its own class for transformers has
them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pi_gguf.common.progress import Advance, progress_bar
from pi_gguf.errors import OptionError, TextError
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.models.hf import HfTokens
from pi_gguf.runtime.model import Model


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model that the harness asks.

    Args:
        lm: the model.
        task: for messages.
        window: most tokens that it is asked at once.
    """

    def __init__(self, lm: LanguageModel, task: str, window: int) -> None:
        super().__init__()
        self._lm, self._task, self._window, self._terminal = lm, task, window, sys.stderr
        self._prefix = _prefix_token(lm)

    @property
    def eot_token_id(self) -> int:
        """The token that a text with nothing before it is read after, too."""
        return self._prefix

    @contextmanager
    def _bar(self, total: int) -> Iterator[Advance]:
        with redirect_stderr(self._terminal), progress_bar(self._task, total, "requests") as advance:
            yield advance

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids, bos = self._lm.tokenize(string, add_special=add_special_tokens is not False), self._lm.bos
        written = add_special_tokens is None and bos and ids[:2] == bos * 2  # in the text, and added to it
        return ids[1:] if written else ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Answer (anything, context, continuation) in an order in which neighbors share their beginnings."""
        found = [(0.0, False)] * len(requests)
        with self._bar(len(requests)) as advance:
            for i in sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2]):
                _, before, scored = requests[i]
                if not (before and 0 < len(scored) <= self._window):
                    raise TextError(
                        f"task {self._task}: must score from 1 to {self._window} tokens after at least one, got "
                        f"{len(scored)} after {len(before)}"
                    )
                logprobs, chosen = self._lm.score((before + scored)[-(self._window + 1) :], len(scored))
                found[i] = float(logprobs.sum()), bool(chosen.all())
                advance(1)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        windows = [
            [
                (None, *make_disjoint_window(part))
                for part in get_rolling_token_windows(self.tok_encode(request.args[0]), self._prefix, self._window, 1)
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([*itertools.chain(*windows)]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        found = [""] * len(requests)
        with self._bar(len(requests)) as advance:
            for i in sorted(range(len(requests)), key=lambda i: prompts[i]):
                found[i] = self._generate(prompts[i], normalize_gen_kwargs(requests[i].args[1]))
                advance(1)
        return found

    def _generate(self, prompt: list[int], settings: dict[str, Any]) -> str:
        limit = settings["max_gen_toks"]
        if settings["do_sample"]:
            raise OptionError(f"task {self._task}: draws its tokens; only the most probable ones are taken here")
        if limit >= self._window:
            raise OptionError(f"task {self._task}: max_gen_toks must be below {self._window} tokens, got {limit}")
        stops = [stop for stop in settings["until"] if stop]
        text = self._lm.generate(prompt[limit - self._window :], limit, stops)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def _prefix_token(lm: LanguageModel) -> int:
    """Return the token that a text with nothing before it is read after.

    It is the tokenizer's begin token whether or not the model adds it, the end token where there is none.
    """
    if isinstance(lm, Model):
        known = [lm.info.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")]
    elif isinstance(lm, HfTokens):
        known = [lm._tokenizer.bos_token_id, lm._tokenizer.eos_token_id]
    else:
        known = [*lm.bos]
    token = next((token for token in known if token is not None), None)
    if token is None:
        raise OptionError(f"{lm.name}: the tokenizer has neither begin nor end token")
    return int(token)
