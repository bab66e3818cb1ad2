"""A model behind an OpenAI-compatible server, such as llama-server or vLLM: it continues prompts.

In: the URL that ends in /v1, and the checkpoint whose tokenizer the server's model has, by which prompts are cut to
length. A server gives no log-probabilities of a prompt, so passkeys count as found when they are what it writes.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.models.hf import HfTokens

_SECONDS = 600
"""To wait for an answer."""

_ANSWER_BYTES = 2**26


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a redirect on the host that was asked only: the key is for nobody else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        asked, other = urlsplit(req.full_url), urlsplit(newurl)
        if (asked.scheme, asked.hostname, asked.port) != (other.scheme, other.hostname, other.port):
            raise OptionError(
                f"{asked.hostname}: the server sends to another host, {other.scheme}://{other.netloc}",
                "give that URL if it is the right one",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class RemoteModel(HfTokens):
    """The first model that a server lists. The environment's OPENAI_API_KEY is sent where it is set.

    Args:
        url: such as http://127.0.0.1:8080/v1.
        checkpoint: gives the tokenizer, and the window where none is asked for.
        n_ctx: tokens that the server's model reads.

    Raises:
        OptionError: nothing answers there, or what answers is no such server.
    """

    def __init__(self, url: str, checkpoint: Checkpoint, n_ctx: int | None) -> None:
        self._url = url.rstrip("/")
        address = urlsplit(self._url)
        self.name = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"  # goes into reports
        self._open = urllib.request.build_opener(_SameHost).open
        self.window = n_ctx or checkpoint.rope.max_position_embeddings
        self._tokenizer = checkpoint.load_tokenizer()
        try:
            self._model = self._ask("models", None)["data"][0]["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise OptionError(f"{self.name}: lists no models", "give the URL that ends in /v1") from error

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data, headers)
        try:
            with self._open(request, timeout=_SECONDS) as answer:
                return json.loads(answer.read(_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode(errors="replace").split())
            hint = "check OPENAI_API_KEY" if error.code in (401, 403) else "see what the server logs"
            raise OptionError(f"{self.name}: the server refuses {path} with {error.code} ({said})", hint) from error
        except (OSError, ValueError) as error:
            raise OptionError(f"{self.name}: no answer of a server ({error})", "is it running there?") from error

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        body = {"model": self._model, "prompt": self.detokenize(ids), "max_tokens": max_tokens, "temperature": 0}
        if stop:
            body["stop"] = list(stop)
        try:
            return str(self._ask("completions", body)["choices"][0]["text"])
        except (KeyError, IndexError, TypeError) as error:
            raise OptionError(f"{self.name}: an answer without choices", "give the URL that ends in /v1") from error

    def predicts(self, ids: Sequence[int], last: int) -> bool:
        expected = self.detokenize(ids[-last:]).strip()
        return self.generate(ids[:-last], last + 1).strip().startswith(expected)

    def logits_chunks(self, ids: Sequence[int], last: int) -> Iterator[np.ndarray]:
        raise NotImplementedError("a server gives none; `check_targets` lets nobody ask it")

    def close(self) -> None:
        """Leave the server to its owner."""
