"""Tools: what a template needs to know of them, and the calls in what a model writes.

In: OpenAI's `tools` and `tool_choice`, and the text of an answer as it comes. Out: a grammar where a call is demanded,
and text and calls apart. A model writes calls as it was trained to, which its template tells: between `<tool_call>` and
`</tool_call>` (Hermes, Qwen, SmolLM2), behind `[TOOL_CALLS]` (Mistral), or as one bare object (Llama 3). What names no
function that was given is text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pi_gguf.errors import OptionError
from pi_gguf.runtime.sampling import schema_to_gbnf

_BEGIN, _END, _LIST, _PYTHON = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"

_KEYS = ("name", "parameters", "arguments", "type", "function")
"""What a bare call may begin with."""


class Call(NamedTuple):
    """A call that the model makes."""

    name: str
    arguments: str


def knows_tools(template: str) -> bool:
    """Whether a chat template does something with tools."""
    return bool(re.search(r"\{[{%][^{}]*\btools\b", template))


def style_of(template: str) -> str:
    """Return how a model writes its calls: hermes, mistral or bare."""
    return "hermes" if _BEGIN in template else "mistral" if _LIST in template else "bare"


def call_grammar(functions: Sequence[Mapping[str, Any]], style: str) -> str:
    """Return the grammar of one call of one of some functions.

    Args:
        functions: objects with `name` and, where it takes something, the schema `parameters`.
        style: of the template.

    Raises:
        OptionError: a schema that is not understood.
    """
    arguments = "parameters" if style == "bare" else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one["name"]}, arguments: one.get("parameters") or {"type": "object"}},
            "required": ["name", arguments],
        }
        for one in functions
    ]
    try:
        rules = schema_to_gbnf(calls[0] if len(calls) == 1 else {"anyOf": calls})
    except OptionError as error:
        raise OptionError(f"tools: {error}", error.hint) from error
    around = {"hermes": (f'"{_BEGIN}\\n"', f'"\\n{_END}"'), "mistral": (f'"{_LIST}["', '"]"'), "bare": ('""', '""')}
    before, after = around[style]
    rules = re.sub(r"^root ::=", "whole-call ::=", rules, flags=re.MULTILINE)
    return f"root ::= {before} whole-call {after}\n{rules}"


class Apart:
    """Takes text and calls apart, as the text comes; held back is only what may be, or become, a call.

    Args:
        names: of the functions that may be called.
        style: how the model writes calls.

    Example:
        >>> apart = Apart(["add"], "hermes")
        >>> apart.add('Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_')
        ('Well.', [])
        >>> apart.add("call>")
        ('', [Call(name='add', arguments='{"a": 1}')])
    """

    def __init__(self, names: Sequence[str], style: str) -> None:
        self._names, self._style, self._held = frozenset(names), style, ""
        self._text = self._called = False

    def add(self, text: str) -> tuple[str, list[Call]]:
        """Return the text that is certain with some more, and the calls that are whole."""
        self._held += text
        if self._style == "hermes":
            return self._between()
        if self._style == "mistral":
            return self._before(_LIST), []
        if not self._text and not _may_be_bare(self._held):
            self._text = True
        return (self._take(len(self._held)) if self._text else ""), []

    def end(self) -> tuple[str, list[Call]]:
        """Return the text and the calls that were held back: nothing more comes."""
        held = self._take(len(self._held))
        if self._text or not held.strip():
            return ("" if self._called else held), []
        body = held.lstrip().removeprefix(_BEGIN).removeprefix(_LIST).removeprefix(_PYTHON)
        calls = self._calls(body)
        return ("", calls) if calls else (held, [])

    def _between(self) -> tuple[str, list[Call]]:
        text, calls = "", []
        while True:
            part = self._before(_BEGIN)
            if self._called and not part.strip():  # white space behind a call, which is none of the text before another
                if not self._held.startswith(_BEGIN):
                    self._held = part + self._held
                    break
            else:
                text, self._called = text + part, False
            if not self._held.startswith(_BEGIN) or (at := self._held.find(_END)) < 0:
                break
            found = self._calls(self._held[len(_BEGIN) : at])
            whole = self._take(at + len(_END))
            calls += found
            self._called = bool(found)
            if not found:
                text += whole
        return text, calls

    def _before(self, mark: str) -> str:
        """Return what stands before a mark that is there, or may be beginning."""
        at = self._held.find(mark)
        if at < 0:
            begun = (n for n in range(min(len(self._held), len(mark) - 1), 0, -1) if self._held.endswith(mark[:n]))
            at = len(self._held) - next(begun, 0)
        return self._take(at)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _calls(self, text: str) -> list[Call]:
        """Return the calls that a text is; none where it is anything else."""
        calls, decoder, text = [], json.JSONDecoder(), text.strip()
        try:
            while text:
                value, end = decoder.raw_decode(text)
                calls += [self._call(one) for one in (value if isinstance(value, list) else [value])]
                text = text[end:].lstrip().removeprefix(";").lstrip()
        except (ValueError, RecursionError):
            return []
        return calls

    def _call(self, value: Any) -> Call:
        one = value.get("function") if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or one["name"] not in self._names:
            raise ValueError("no call")
        arguments = one.get("arguments", one.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("no arguments")
        return Call(one["name"], json.dumps(arguments, ensure_ascii=False))


def _may_be_bare(text: str) -> bool:
    """Whether a text is, as far as it came, the beginning of a call without marks."""
    text = text.lstrip()
    if len(text) < len(_PYTHON) and _PYTHON.startswith(text):
        return True
    text = text.removeprefix(_PYTHON).lstrip()
    if not text.startswith("{"):
        return not text
    key = text[1:].lstrip()
    return any(key.startswith(f'"{name}"') or f'"{name}"'.startswith(key) for name in _KEYS)


def as_answered(calls: Sequence[Call], first: int = 0, *, streamed: bool = False) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form, with their numbers where they are streamed."""
    return [
        {
            **({"index": first + number} if streamed else {}),
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(calls)
    ]
