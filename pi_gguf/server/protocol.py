"""What clients may ask: the fields of OpenAI's requests and a few of llama-server's; and errors in OpenAI's form.

In: the bytes of a body. Out: a request whose every known field can be honoured, or an `ApiError` that names the field.
Unknown fields are ignored.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import from_json

from pi_gguf.common.provenance import without_folders
from pi_gguf.engine.jobs import QueueFull
from pi_gguf.engine.library import UnknownDocument
from pi_gguf.errors import OptionError, PiGgufError
from pi_gguf.runtime.sampling import LEAST, Sampling
from pi_gguf.runtime.session import TooLong

TOP = 20
"""How many of the most probable tokens may be asked for, at most."""

BIASES = 10_000
"""Tokens that may be biased at once."""

_SEEDS = 2**32 - 1

_HINTS = {
    "n": "one answer a request: ask again for another, with another seed",
    "best_of": "one answer a request: ask again for another, with another seed",
    "suffix": "text is continued, not filled in",
    "functions": "give tools",
    "function_call": "give tool_choice",
    "modalities": "there is text only",
    "audio": "there is text only",
}
"""What helps where a value cannot be honoured."""


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: what is wrong; it may end in a hint.
        kind: OpenAI's type of the error.
        param: the field that it is about.
        code: OpenAI's word for it.
        more: further fields of the error object.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        more: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **(more or {})}}


# Bodies

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list of which one fault is enough: a body has room for millions."""

PARTS, PROMPTS, TOKENS = 10_000, 256, 2**20
"""Messages, their parts and calls, and tools; prompts; tokens of a prompt: as many at most, before one is looked at."""


def few(most: int, kind: type | tuple[type, ...] = object) -> BeforeValidator:
    """Return what refuses a list of more than so many parts, where the first is of a kind."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > most and isinstance(value[0], kind):
            raise ValueError(f"must have at most {most:,} parts, got {len(value):,}")
        return value

    return BeforeValidator(check)


Some = Annotated[list[T], Field(fail_fast=True), few(PARTS)]
"""One with so many parts at most."""


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "input_text", "output_text"]
    text: str


class Called(BaseModel):
    """The function of a call that the model made before."""

    model_config = ConfigDict(strict=True)
    name: str
    arguments: str


class Call(BaseModel):
    """A call that the model made before."""

    model_config = ConfigDict(strict=True)
    id: str = ""
    type: Literal["function"] = "function"
    function: Called


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Some[Part] | None = None
    name: str | None = None
    tool_calls: Some[Call] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates know it, the arguments of calls as objects."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text()}
        if self.tool_calls:
            calls = [(one, _arguments(one.function)) for one in self.tool_calls]
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.function.name, "arguments": arguments}}
                for one, arguments in calls
            ]
        return message | {
            name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None
        }


def _arguments(called: Called) -> dict[str, Any]:
    arguments = parsed(called.arguments or "{}", "tool_calls: the arguments")
    if not isinstance(arguments, dict):
        raise ApiError(400, "tool_calls: arguments must be a JSON object in a string", param="messages")
    return arguments


def _said(messages: list[Message]) -> list[Message]:
    for number, one in enumerate(messages):
        if one.content is None and not (one.role == "assistant" and one.tool_calls):
            raise ValueError(f"of message {number} the content is missing")
    return messages


Messages = Annotated[Some[Message], Field(min_length=1), AfterValidator(_said)]


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True)
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool that the model may use: a function."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: Function


class Named(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(strict=True)
    name: str


class Chosen(BaseModel):
    """A function that the model has to call."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: Named


class NamedSchema(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(strict=True)
    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")


class ResponseFormat(BaseModel):
    """What the answer must be."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def schema_of(self) -> dict[str, Any] | None:
        """Return the schema of the answer; None where it is free.

        Raises:
            ApiError: there has to be one, and is not.
        """
        if self.type == "text":
            return None
        if self.type == "json_schema" and self.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing", param="response_format")
        return self.json_schema.schema_ if self.json_schema else self.schema_ or {"type": "object"}


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


Text = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


def _not_tiny(temperature: float) -> float:
    if 0 < temperature < LEAST:
        raise ValueError(f"must be 0, or at least {LEAST}")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_not_tiny)]


class Strict(BaseModel):
    """A request: a strict one, in which no text is a number, no truth value is one, and no number is nan."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Generation(Strict):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, lt=1)
    repeat_penalty: float | None = Field(default=None, ge=LEAST, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Text | Annotated[Many[Text], Field(max_length=16)] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=BIASES)] | None = None
    n: int | None = Field(default=None, ge=1, le=1)
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    return_progress: bool | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > BIASES:  # before each of a million is looked at
            raise ValueError(f"must be of {BIASES} tokens at most")
        return bias

    def sampling(self, more_stops: Sequence[str] = (), must_be: str | None = None) -> Sampling:
        """Return how tokens are chosen.

        Args:
            more_stops: strings that end the text, beside those of the request.
            must_be: a grammar that is not the request's own.

        Raises:
            ApiError: a grammar or schema that cannot be used, or more than one of them.
        """
        rules = {"grammar": self.grammar, "json_schema": self.json_schema, **self._format(), "tool_choice": must_be}
        given = {name: rule for name, rule in rules.items() if rule is not None}
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)} exclude each other; give one of them", param=[*given][-1])
        values: dict[str, Any] = {
            name: value
            for name in (
                "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty",
            )
            if (value := getattr(self, name)) is not None
        }  # fmt: skip
        for rule in given.values():
            values["grammar" if isinstance(rule, str) else "json_schema"] = rule
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        seed = secrets.randbelow(_SEEDS) if self.seed is None else self.seed % _SEEDS
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        try:
            return Sampling(**values, seed=seed, stop=(*stops, *more_stops), logit_bias=bias)
        except OptionError as error:
            raise ApiError(400, f"{error}; {error.hint}", param=next(iter(given), None)) from error

    def _format(self) -> dict[str, Any]:
        return {}


class CompletionRequest(Generation):
    """A text to go on with."""

    prompt: Annotated[str | Many[str] | Many[int] | Many[Many[int]], few(TOKENS), few(PROMPTS, (str, list))]
    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=TOP)
    best_of: int | None = Field(default=None, ge=1, le=1)
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and not (prompt and all(one != [] for one in prompt)):
            raise ValueError("must not be empty")
        return prompt

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ChatRequest(Generation):
    """A conversation to answer."""

    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP)
    response_format: ResponseFormat | None = None
    tools: Some[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None
    document: str | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    modalities: Many[Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens are told of each; None: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @field_validator("top_logprobs")
    @classmethod
    def _wanted(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("needs logprobs to be true")
        return top

    def _format(self) -> dict[str, Any]:
        return {"response_format": self.response_format.schema_of() if self.response_format else None}


class TokenizeRequest(Strict):
    """A text to cut into tokens."""

    content: str
    add_special: bool = False


class DetokenizeRequest(Strict):
    """Tokens to make text of."""

    tokens: Annotated[Many[Annotated[int, Field(ge=0, lt=2**31)]], few(TOKENS)]


class RenderRequest(Strict):
    """Markdown to show, and a document that it may quote."""

    markdown: str
    document: str | None = None


class LookedRequest(Strict):
    """An answer about a document: where did the model look?"""

    messages: Messages
    answer: Annotated[str, StringConstraints(min_length=1)]


M = TypeVar("M", bound=BaseModel)


def parsed(data: str | bytes, what: str = "the body") -> Any:
    """Return what JSON says.

    Raises:
        ApiError: it is none: not UTF-8, nan, half a surrogate, nested hundreds of times.
    """
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"{what}: no JSON that can be read ({error})", code="invalid_json") from error


def read_body(data: bytes, kind: type[M]) -> M:
    """Return the request that a body is.

    Raises:
        ApiError: it is no JSON, or a field has a value that cannot be honoured.
    """
    value = parsed(data)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    """Say what is wrong with the first field that is."""
    found = error.errors(include_url=False, include_context=False)
    field = str(found[0]["loc"][0]) if found[0]["loc"] else ""
    said = dict.fromkeys(_told(one) for one in found if one["loc"][:1] == found[0]["loc"][:1])
    hint = f"; {_HINTS[field]}" if field in _HINTS else ""
    missing = "missing_required_parameter" if found[0]["type"] == "missing" else None
    return ApiError(400, f"{', or '.join([*said][:4])}{hint}", param=field or None, code=missing)


def _told(one: Any) -> str:
    """Say one of pydantic's errors with the place in the request, without pydantic's own words for its branches."""
    place = [str(part) for part in one["loc"] if not re.search(r"[\[({-]|^(str|int|float|bool|none)$", str(part))]
    text = one["msg"].removeprefix("Value error, ")
    return f"{'.'.join(place)}: {text[:1].lower()}{text[1:]}"


# Errors


def error_of(error: PiGgufError, name: str = "") -> ApiError:
    """Return an error of ours as clients are told it, without folders of the machine.

    Args:
        error: what was raised.
        name: of the model's file, with its folder.
    """
    text = f"{error}" if error.hint == error.usual_hint else f"{error}; {error.hint}"  # that is one of the command line
    if isinstance(error, UnknownDocument):
        return ApiError(404, text, "not_found_error", code="document_not_found")
    text = without_folders(" " + text.replace(name or " ", Path(name).name or " "))[1:]
    if isinstance(error, TooLong):
        numbers = {"n_prompt_tokens": error.tokens, "n_ctx": error.window}
        return ApiError(400, text, "exceed_context_size_error", code="context_length_exceeded", more=numbers)
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(429, text, "rate_limit_error", code="queue_full", headers=headers)
    if error.exit_code in (2, 4, 5) or "tokenizer.chat_template" in text:
        return ApiError(400, text)
    return ApiError(503 if error.exit_code == 8 else 500, text, "server_error")


def dumped(value: Any) -> str:
    """Return JSON on one line, in ASCII: no reader of lines takes a character of a text for an end of one."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
