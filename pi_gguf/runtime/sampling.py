"""How the next token is chosen: what a caller asks for, and llama.cpp's samplers that do it.

In: logits. Out: a token. V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from pi_gguf.common.options import flag
from pi_gguf.errors import OptionError, one_line
from pi_gguf.llamacpp.grammars import GRAMMAR, REPEATED, SCHEMA, SCHEMA_GRAMMAR, check_grammar, convert_schema
from pi_gguf.llamacpp.library import llama_cpp_library

PENALIZED = 64
"""How many of the last tokens a repeat penalty looks at, those of the prompt among them."""

LEAST, MOST = 0.01, 10**6
"""Of a temperature and a repeat penalty: others are 0 or infinite in 32 bits, which makes logits no numbers."""

_MANY = 10**9
"""What is told of a number that is far too great, at most."""

_SEEDS = 2**32 - 1
"""Seeds there are; llama.cpp takes the next number for one of its own choice."""

_CHARACTER = 'char ::= [^"\\\\]', 'char ::= [^"\\\\\\x00-\\x1F\\x7F]'
"""The converter's rule for a string's character, and JSON's: it must not be a line's end or another control code."""


class SamplingKeywords(TypedDict, total=False):
    """The fields of `Sampling`, as keywords."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop: Sequence[str]
    grammar: str | None
    json_schema: str | Mapping[str, Any] | None
    logit_bias: Mapping[int, float]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where a text ends.

    Args:
        temperature: 0 takes the most probable token each time, and `top_k`, `top_p`, `min_p` and `seed` do nothing;
            else 0.01 to 1,000,000.
        top_k: draws from so many most probable tokens; as many as the vocabulary has are all.
        top_p: draws from the most probable tokens that together have this probability; 1 draws from all.
        min_p: leaves out what is less probable than this share of the most probable; 0 leaves out nothing.
        repeat_penalty: what the logits of the last 64 tokens are divided by, those below 0 multiplied with; 0.01 to
            1,000,000, 1 changes nothing.
        frequency_penalty: what is taken off a token's logit for each time that it is among the last 64, -2 to 2.
        presence_penalty: what is taken off once for a token that is among them, -2 to 2.
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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()
    grammar: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, fits, rule in (
            ("temperature", self.temperature == 0 or LEAST <= self.temperature <= MOST, f"0, or {LEAST} to {MOST:,}"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and 1 at most"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repeat_penalty", LEAST <= self.repeat_penalty <= MOST, f"{LEAST} to {MOST:,}"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
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
            check_grammar(grammar, GRAMMAR if self.json_schema is None else SCHEMA_GRAMMAR)

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
    if len(text) > SCHEMA:
        raise OptionError(f"json_schema must have at most {SCHEMA:,} characters, got {len(text):,}", "make it simpler")
    try:
        if not isinstance(read := json.loads(text), dict):
            raise ValueError("a schema is an object")
        if most := next((number for number in _repetitions(read) if not number <= REPEATED), None):
            raise ValueError(f"a part may be repeated {REPEATED:,} times at most, not {most:,}")
        grammar = convert_schema(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"json_schema: not a schema that is understood ({one_line(error)})",
            'e.g. {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}',
        ) from error
    return grammar.replace(*_CHARACTER)


def _repetitions(schema: Any) -> Iterator[float]:
    """Yield how often parts are repeated anywhere in a schema: the converter writes out each of them."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            for name in ("minLength", "maxLength", "minItems", "maxItems"):
                if isinstance(number := part.get(name), int | float):
                    yield min(number, _MANY)
            if isinstance(pattern := part.get("pattern"), str):
                yield from _numbers(pattern)


def _numbers(pattern: str) -> Iterator[int]:
    """Yield how often parts of a pattern are repeated, in any figures that Python reads, as the converter does."""
    for braces in re.findall(r"\{([^{}]*)\}", pattern):
        for number in braces.split(","):
            with contextlib.suppress(ValueError):
                yield min(int(number), _MANY)


class Chooser:
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
            self.close()
            raise
        for sampler in _draws(n_vocab, sampling):
            llama_cpp.llama_sampler_chain_add(drawn, sampler)
        for token in prompt[-PENALIZED:]:
            llama_cpp.llama_sampler_accept(drawn, token)
        lengths = [llama_cpp.llama_sampler_chain_n(chain) for chain in self._chains]
        self._plain = sampling.temperature == 0 and lengths == [0, 1]
        """Whether the first of the most probable tokens is taken, which needs no rows for llama.cpp."""

    def __enter__(self) -> Chooser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what llama.cpp keeps for it; once more does nothing."""
        chains, self._chains = self._chains, []
        for chain in chains:
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
        forbidden = self._row["logit"] == -math.inf
        if forbidden.all():
            return None
        self._llama_cpp.llama_sampler_apply(drawn, ctypes.byref(array))
        token = int(array.data[array.selected].id) if 0 <= array.selected < array.size else -1
        if token < 0 or forbidden[token]:  # of logits that are no numbers any; a grammar that takes it ends the process
            return None
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
    penalties = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
    if penalties != (1, 0, 0):
        yield llama_cpp.llama_sampler_init_penalties(n_vocab, PENALIZED, *penalties)
    if sampling.temperature == 0:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    yield llama_cpp.llama_sampler_init_top_k(sampling.top_k)
    yield llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1)
    yield llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1)
    yield llama_cpp.llama_sampler_init_temp(sampling.temperature)
    yield llama_cpp.llama_sampler_init_dist(sampling.seed)
