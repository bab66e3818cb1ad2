"""One sequence of tokens in an opened llama.cpp: read, written, and kept from call to call.

In: token ids. Out: logits, or the tokens that follow. What ids have in common with those read before is not read again.
What is drawn goes through llama.cpp's own samplers; text is made of tokens here, too. V vocabulary.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from pi_gguf.common.options import flag
from pi_gguf.errors import GgufError, OptionError, ResourceError, one_line
from pi_gguf.llamacpp.library import compute, last_error, llama_cpp_library
from pi_gguf.llamacpp.trial import check_grammar
from pi_gguf.measure.language_model import common_prefix

PENALIZED = 64
"""How many of the last tokens a repeat penalty looks at, those of the prompt among them."""

_SEEDS = 2**32 - 1
"""Seeds there are; llama.cpp takes the next number for one of its own choice."""

Cancelled = Callable[[], bool]
"""Looked at before each batch and each token: true, and no more is computed. `threading.Event().is_set` is one."""

Progress = Callable[[int, int, int], None]
"""Told, in tokens: how many of the prompt were read, how many had to be, and how many were written."""


def never() -> bool:
    return False


def silent(_read: int, _to_read: int, _written: int) -> None:
    pass


class SamplingKeywords(TypedDict, total=False):
    """The fields of `Sampling`, as keywords."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int
    stop: Sequence[str]
    grammar: str | None
    json_schema: str | Mapping[str, Any] | None
    logit_bias: Mapping[int, float]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where a text ends.

    Args:
        temperature: 0 takes the most probable token each time, and `top_k`, `top_p`, `min_p` and `seed` do nothing.
        top_k: draws from so many most probable tokens; as many as the vocabulary has are all.
        top_p: draws from the most probable tokens that together have this probability; 1 draws from all.
        min_p: leaves out what is less probable than this share of the most probable; 0 leaves out nothing.
        repeat_penalty: what the logits of the last 64 tokens are divided by, those below 0 multiplied with; 1 changes
            nothing.
        seed: of the sampling, 0 to 4294967294.
        stop: strings that end the text; they are not part of it.
        grammar: what the text must be, in GBNF (llama.cpp's grammars/README.md); its first rule is `root`.
        json_schema: the same for JSON, as a schema; keywords that llama.cpp's converter does not know restrict nothing.
        logit_bias: what to add to a token's logit, by id; minus infinity forbids it.

    Raises:
        OptionError: a value that cannot work, or a grammar or schema that llama.cpp cannot read.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    grammar: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, fits, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and 1 at most"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repeat_penalty", 0 < self.repeat_penalty < math.inf, "above 0"),
            ("seed", 0 <= self.seed < _SEEDS, f"0 to {_SEEDS - 1}"),
        ):
            if not fits:
                raise OptionError(f"{flag(name)} must be {rule}, got {getattr(self, name)}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(self.stop):
            raise OptionError("stop must not be empty: every text contains it", "leave it out")
        for token, bias in self.logit_bias.items():
            if not bias < math.inf:
                raise OptionError(
                    f"logit_bias must be a number, or minus infinity, got {bias} for {token}", "100 is as good as sure"
                )
        if self.grammar is not None and self.json_schema is not None:
            raise OptionError("grammar and json_schema exclude each other", "give one of them")
        if (grammar := self.gbnf) is not None:
            check_grammar(grammar)

    @property
    def gbnf(self) -> str | None:
        """The grammar, that of the schema where one is given."""
        return self.grammar if self.json_schema is None else schema_to_gbnf(self.json_schema)


def schema_to_gbnf(schema: str | Mapping[str, Any]) -> str:
    """Return the grammar of the JSON that a schema allows, by llama-cpp-python's converter.

    Raises:
        OptionError: the schema is no JSON, or holds what the converter cannot express.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        if not isinstance(json.loads(text), dict):
            raise ValueError("a schema is an object")
        return str(llama_cpp_library().llama_grammar.json_schema_to_gbnf(text))
    except Exception as error:  # the converter lets through whatever a schema makes its code run into
        raise OptionError(
            f"json_schema: not a schema that is understood ({type(error).__name__}: {one_line(error)})",
            'e.g. {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}',
        ) from error


def check_fits(what: str, tokens: int, window: int, max_tokens: int | None, hint: str) -> int:
    """Return how many tokens of a window are left behind a prompt.

    Args:
        what: of the prompt, for the message.
        tokens: that it has.
        window: that is open, in tokens.
        max_tokens: how many are to be written; one at least when None.
        hint: what to do where it does not fit.

    Raises:
        OptionError: it does not fit, with both numbers; nothing is ever cut.
    """
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, got {max_tokens}")
    if tokens + (max_tokens or 1) > window:
        raise OptionError(
            f"{what} of {tokens} tokens and {max_tokens or 1} to write do not fit the window of {window} tokens", hint
        )
    return window - tokens


class Stopped(Exception):
    """A reading was cancelled."""


class Session:
    """What one context of llama.cpp has read, and what it reads and writes next.

    Texts may be written in turn: each reads again what the other has put out of the cache.

    Args:
        llama: what `open_llama` opened.
        batch: tokens to read at a time.
        interrupted: called when a signal comes while llama.cpp computes; it may hasten the end.
    """

    def __init__(self, llama: Any, *, batch: int, interrupted: Callable[[], None] = lambda: None) -> None:
        self._llama_cpp = llama_cpp_library()
        self._opened: tuple[Any, Any] | None = llama.ctx, self._llama_cpp.llama_model_get_vocab(llama.model)
        self._name, self._batch, self._interrupted = str(llama.model_path), batch, interrupted
        self._sliding = int(self._llama_cpp.llama_model_n_swa(llama.model))
        self.n_vocab = int(self._llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.ids: list[int] = []
        """What lies in the cache; another list with each reading."""

    @property
    def _context(self) -> Any:
        return self._open()[0]

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary."""
        return self._open()[1]

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            raise RuntimeError(f"{self._name}: it was closed")
        return self._opened

    def close(self) -> None:
        """Let go of what is about to be freed: whatever still runs on it then raises an error."""
        self._opened, self.ids = None, []

    def is_end(self, token: int) -> bool:
        return bool(self._llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def piece(self, token: int) -> bytes:
        """Return the text of a token, which may be part of a character; nothing for special tokens."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def read(
        self, ids: Sequence[int], last: int, *, cancelled: Cancelled = never, on_progress: Progress = silent
    ) -> Iterator[np.ndarray]:
        """Read what of `ids` is not in the cache, and yield the logits after each of the last ones, in chunks.

        Args:
            ids: token ids; as many as the window has at most.
            last: after how many of them logits are wanted, at least 1.
            cancelled: whether to stop before the next batch; what was read stays.
            on_progress: told before the first batch and after each.

        Yields:
            float32 (tokens, V).

        Raises:
            ResourceError: llama.cpp has no room to compute.
            Stopped: it was cancelled.
        """
        first = len(ids) - last
        known = self._rewind(min(common_prefix(self.ids, ids), first))
        mine = self.ids = list(ids[:known])
        on_progress(0, len(ids) - known, 0)
        for start in range(known, len(ids), self._batch):
            if cancelled():
                raise Stopped
            if self.ids is not mine:
                raise RuntimeError("this session has read something else in between")
            part = ids[start : start + self._batch]
            self._decode(part, first)
            on_progress(len(mine) - known, len(ids) - known, 0)
            if outputs := min(len(part), max(0, len(mine) - first)):
                yield self._logits(outputs).copy()

    # What was read, kept elsewhere

    def known(self, ids: Sequence[int]) -> int:
        """Return how many of `ids` the cache holds from their beginning."""
        return common_prefix(self.ids, ids)

    def state_bytes(self) -> int:
        """Return the size of what the cache holds, as llama.cpp saves it."""
        return int(self._llama_cpp.llama_state_seq_get_size(self._context, 0))

    def save(self, state: np.ndarray) -> int:
        """Write what the cache holds into an array (`state_bytes`,) of bytes; return how many were written."""
        data = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        return int(compute(self._llama_cpp.llama_state_seq_get_data, self._context, data, state.nbytes, 0))

    def restore(self, state: np.ndarray, ids: Sequence[int]) -> bool:
        """Put into the cache what was saved after `ids`; False, and it is empty, where llama.cpp does not take it.

        The state must be whole and of the same model, cache types and llama.cpp: another may end the process.
        """
        self.clear()
        data = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        if compute(self._llama_cpp.llama_state_seq_set_data, self._context, data, state.nbytes, 0) != state.nbytes:
            self.clear()
            return False
        self.ids = list(ids)
        return True

    def clear(self) -> None:
        """Empty the cache."""
        self._llama_cpp.llama_memory_clear(self._llama_cpp.llama_get_memory(self._context), True)
        self.ids = []

    def rewind(self, known: int) -> int:
        """Drop what is behind the first `known` ids; return how many are left, 0 where the model cannot go back."""
        self.ids = self.ids[: self._rewind(known)]
        return len(self.ids)

    def write(
        self,
        ids: Sequence[int],
        limit: int,
        sampling: Sampling,
        *,
        cancelled: Cancelled = never,
        on_progress: Progress = silent,
    ) -> Generator[int, None, str]:
        """Read `ids` and yield the tokens that follow.

        Args:
            ids: the prompt, one id or more; with `limit` it must fit the window.
            limit: how many tokens to write at most.
            sampling: how each is chosen; `stop` is for who makes text of them.
            cancelled: whether to stop before the next batch or token.
            on_progress: told after each batch and token.

        Returns:
            Why it ended: `stop` at an end token, `length` at the limit, or `cancelled`.

        Raises:
            GgufError: the logits are no numbers.
            OptionError: the grammar, or the biases, leave no token.
            ResourceError: llama.cpp has no room to compute.
        """
        text, mine, to_read = list(ids), None, 0

        def note(read: int, new: int, _: int) -> None:
            nonlocal to_read
            to_read = new
            on_progress(read, new, written)

        with _Chooser(self.vocab, self.n_vocab, sampling, ids) as chooser:
            for written in range(limit):
                try:
                    if cancelled():
                        return "cancelled"
                    if self.ids is mine:
                        self._decode(text[-1:], len(mine))
                    else:
                        for _ in self.read(text, 1, cancelled=cancelled, on_progress=note):
                            pass
                        mine = self.ids
                except Stopped:
                    return "cancelled"
                token = self._choose(chooser)
                if token is None or self.is_end(token):
                    return "stop"
                text.append(token)
                on_progress(to_read, to_read, written + 1)
                yield token
        return "length"

    def _choose(self, chooser: _Chooser) -> int | None:
        """Return the next token; None where a grammar is fulfilled and the vocabulary has nothing to end with."""
        logits = self._logits(1)[0]
        if math.isnan(logits.max()):
            raise GgufError(f"{self._name}: its logits are no numbers", "its weights may be damaged: copy it again")
        token = chooser.choose(logits)
        if token is None and any(map(self.is_end, range(self.n_vocab))):
            raise OptionError(
                f"{self._name}: its vocabulary has no token with which the text can go on here",
                "allow other texts by the grammar, or fewer biases",
            )
        return token

    def _rewind(self, known: int) -> int:
        """Drop from the cache what is behind the first `known` ids; return how many it then holds."""
        memory = self._llama_cpp.llama_get_memory(self._context)
        gone_back = self._llama_cpp.llama_memory_seq_rm(memory, 0, known, -1)  # states of recurrent layers cannot
        if gone_back and known and self._sliding:  # a kept state has only those that a window at its end sees
            first = self._llama_cpp.llama_memory_seq_pos_min(memory, 0)
            gone_back = 0 <= first <= max(0, known - self._sliding + 1)
        if gone_back:
            return known
        self._llama_cpp.llama_memory_clear(memory, True)
        return 0

    def _decode(self, part: Sequence[int], first: int) -> None:
        """Read a batch behind what the cache holds, with logits of the positions from `first`."""
        at, count, library = len(self.ids), len(part), self._llama_cpp
        batch = library.llama_batch(  # without numbers of sequences it is that of sequence 0
            n_tokens=count,
            token=(library.llama_token * count)(*part),
            pos=(library.llama_pos * count)(*range(at, at + count)),
            logits=(ctypes.c_int8 * count)(*(position >= first for position in range(at, at + count))),
        )
        if compute(self._llama_cpp.llama_decode, self._context, batch, interrupted=self._interrupted) != 0:
            raise ResourceError(f"{self._name}: llama.cpp could not read a batch ({last_error()})")
        self.ids += part

    def _logits(self, outputs: int) -> np.ndarray:
        """Return the logits of the last batch (outputs, V), valid up to the next."""
        found = self._llama_cpp.llama_get_logits(self._context)
        values = (ctypes.c_float * (outputs * self.n_vocab)).from_address(ctypes.addressof(found.contents))
        return np.ctypeslib.as_array(values).reshape(outputs, -1)


class _Chooser:
    """llama.cpp's samplers for one text: one chain says what may come, another draws from it.

    They are two because a grammar has seen what was written only, and a repeat penalty the prompt, too.
    """

    def __init__(self, vocab: Any, n_vocab: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        llama_cpp = self._llama_cpp = llama_cpp_library()
        self._row = np.zeros(n_vocab, np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._chains = [
            llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params()) for _ in "ab"
        ]
        allowed, drawn = self._chains
        try:
            for sampler in _rules(vocab, n_vocab, sampling):
                llama_cpp.llama_sampler_chain_add(allowed, sampler)
        except BaseException:
            self.__exit__()
            raise
        for sampler in _draws(n_vocab, sampling):
            llama_cpp.llama_sampler_chain_add(drawn, sampler)
        for token in prompt[-PENALIZED:]:
            llama_cpp.llama_sampler_accept(drawn, token)
        lengths = [llama_cpp.llama_sampler_chain_n(chain) for chain in self._chains]
        self._plain = sampling.temperature == 0 and lengths == [0, 1]
        """Whether the first of the most probable tokens is taken, which needs no rows for llama.cpp."""

    def __enter__(self) -> _Chooser:
        return self

    def __exit__(self, *_: object) -> None:
        for chain in self._chains:
            self._llama_cpp.llama_sampler_free(chain)

    def choose(self, logits: np.ndarray) -> int | None:
        """Return the next token of `logits` (V,); None where none may come, at which llama.cpp itself would end."""
        if self._plain:
            return int(logits.argmax())
        structures, (allowed, drawn) = self._llama_cpp, self._chains
        self._row["id"], self._row["logit"] = self._ids, logits
        data = ctypes.cast(self._row.ctypes.data, structures.llama_token_data_p)
        array = structures.llama_token_data_array(data=data, size=len(self._row), selected=-1, sorted=False)
        self._llama_cpp.llama_sampler_apply(allowed, ctypes.byref(array))
        if self._row["logit"].max() == -math.inf:
            return None
        self._llama_cpp.llama_sampler_apply(drawn, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        for chain in self._chains:
            self._llama_cpp.llama_sampler_accept(chain, token)
        return token


def _rules(vocab: Any, n_vocab: int, sampling: Sampling) -> Iterator[Any]:
    """Yield the samplers that say what may come."""
    llama_cpp = llama_cpp_library()
    if unknown := [token for token in sampling.logit_bias if not 0 <= token < n_vocab]:
        raise OptionError(f"logit_bias must be of tokens from 0 to {n_vocab - 1}, got {unknown[0]}")
    if sampling.logit_bias:
        biases = (llama_cpp.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias.items())
        yield llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)
    if (grammar := sampling.gbnf) is not None:
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        if not sampler:
            raise OptionError("grammar: it names tokens that the vocabulary does not have", "write them as text")
        yield sampler


def _draws(n_vocab: int, sampling: Sampling) -> Iterator[Any]:
    """Yield the samplers that choose a token, in llama.cpp's usual order."""
    llama_cpp = llama_cpp_library()
    if sampling.repeat_penalty != 1:
        yield llama_cpp.llama_sampler_init_penalties(n_vocab, PENALIZED, sampling.repeat_penalty, 0.0, 0.0)
    if sampling.temperature == 0:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    yield llama_cpp.llama_sampler_init_top_k(sampling.top_k)
    yield llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1)
    yield llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1)
    yield llama_cpp.llama_sampler_init_temp(sampling.temperature)
    yield llama_cpp.llama_sampler_init_dist(sampling.seed)


# Text


class StopText:
    """Makes text of the bytes of tokens, up to the first of some strings.

    Held back is what may still become a character, or one of the strings. Bytes that are no UTF-8 are left out.

    Example:
        >>> text = StopText(["END"])
        >>> text.add(b"one E"), text.add(b"ND two"), text.ended
        ('one ', '', True)
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop, self._held, self.ended = stop, "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add(self, piece: bytes) -> str:
        """Return the text that is certain with one piece more."""
        held = self._held + self._decoder.decode(piece)
        found = [at for string in self._stop if (at := held.find(string)) >= 0]
        if found:
            self._held, self.ended = "", True
            return held[: min(found)]
        begun = max((_begun(held, string) for string in self._stop), default=0)
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]

    def rest(self) -> str:
        """Return what is held back: nothing more comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, string: str) -> int:
    """Return how many characters of `string` end `text`, not all."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def stream(
    tokens: Generator[int, None, str], piece: Callable[[int], bytes], stop: Sequence[str] = ()
) -> Generator[str, None, str]:
    """Yield the text of tokens as it comes, and return why it ended, `stop` where a string of `stop` came.

    Args:
        tokens: as `Session.write` yields them; closed in any case.
        piece: gives a token's bytes.
        stop: strings that end the text.
    """
    text, why = StopText(stop), "stop"
    with contextlib.closing(tokens):
        while not text.ended:
            try:
                token = next(tokens)
            except StopIteration as end:
                why = end.value
                break
            if part := text.add(piece(token)):
                yield part
    if rest := text.rest():
        yield rest
    return why
