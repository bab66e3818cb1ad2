"""Conversations as a model learns them: rows of a data set -> token ids, and which of them count in the loss.

In: conversations as rows state them (OpenAI's `messages` or ShareGPT's `conversations`), and a checkpoint. Its own chat
template makes texts of them, its tokenizer ids. Out: nothing of the model itself is known here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckpointError, TextError
from pi_gguf.texts import Conversation
from pi_gguf.vocabulary.templates import CUT, Rendered, check_template, cut, render_chats

SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""What ShareGPT's rows have as `from`, and a template's word for it."""

_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""What templates know of a message beside role and content."""

_TEXT_OR_TURNS = "give rows with messages of role and content, or conversations of from and value"


def chat_templates(tokenizer: Any) -> dict[str, str]:
    """Return the chat templates of an opened tokenizer by name, as transformers names them."""
    found = tokenizer.chat_template or {}
    return found if isinstance(found, dict) else {"default": found}


class ChatEncoder:
    """What makes token ids of conversations.

    Args:
        checkpoint: whose template and tokenizer.
        loss: `assistant`, or `all` to count every token.

    Raises:
        CheckpointError: there is no template, or none that can be read.
    """

    def __init__(self, checkpoint: Checkpoint, loss: str) -> None:
        self._tokenizer: Any = checkpoint.load_tokenizer()
        self._name, self._loss = f"{checkpoint.tokenizer_dir}: chat_template", loss
        self.answers, self.others, self._first = 0, 0, ""
        self._templates = chat_templates(self._tokenizer)
        if "default" not in self._templates:
            raise CheckpointError(
                f"{self._name} is missing, and the texts hold conversations",
                "a base model has none: put it into chat_template.jinja in the folder, or give texts in a field text",
            )
        for name, template in self._templates.items():
            check_template(template, f"{self._name} {name!r}")
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = _any_of({token.content for token in added if token.special})
        self._added = _any_of({token.content for token in added})  # DeepSeek R1 ends turns by what is not special

    @property
    def sha256(self) -> str:
        """Hash of what the result depends on, beside the conversations and the tokenizer."""
        return hashlib.sha256(json.dumps([self._templates, self._loss], sort_keys=True).encode()).hexdigest()

    def encode(self, chats: Sequence[Conversation], characters: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each conversation, int32, and whether each counts, bool.

        A token counts if it begins in an answer (`render_chats` says what that is). Special tokens that a message
        spells out stay text.

        Args:
            chats: rows.
            characters: of its text, so many are taken at most.

        Raises:
            TextError: a row is no conversation, or its template does not take it; or it has been split into turns
                nowhere so far.
        """
        rendered = self._rendered(chats)
        for chat, one in zip(chats, rendered, strict=True):
            if len(one.text) > characters:
                say(f"note: {chat.where}: the first {characters:,} characters are read")
        parts = [one.text[:characters].split(CUT) for one in rendered]
        flat = [part for some in parts for part in some]
        encoded = self._tokenizer(flat, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        each = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        found = []
        for one, some in zip(rendered, parts, strict=True):
            ids, places, at = [], [], 0
            for part in some:
                their, offsets = next(each)
                ids += their
                places.append(np.array(offsets, np.int64).reshape(-1, 2) + at)
                at += len(part) + len(CUT)
            found.append((np.array(ids, np.int32), self._counted(one, np.concatenate(places))))
        return found

    def _rendered(self, chats: Sequence[Conversation]) -> list[Rendered]:
        """Return the texts, those of each template written together."""
        asked = [_as_templates_take_it(chat) for chat in chats]
        by_name: dict[str, list[int]] = {}
        for i, (chat, given) in enumerate(zip(chats, asked, strict=True)):
            name = "tool_use" if given["tools"] and "tool_use" in self._templates else "default"
            _check_tools(given, self._templates[name], chat.where)
            by_name.setdefault(name, []).append(i)
        found = [Rendered()] * len(chats)
        for name, places in by_name.items():
            some = [cut(asked[i], self._special) for i in places]
            texts = render_chats(
                self._templates[name], some, self._tokenizer.special_tokens_map, self._name,
                special=self._added if self._loss == "assistant" else None,
            )  # fmt: skip
            for i, rendered in zip(places, texts, strict=True):
                if rendered.error:
                    raise TextError(
                        f"{chats[i].where}: the model's chat template: {rendered.error}",
                        "correct or remove the row; --loss all needs no template that can be split",
                    )
                self._count(rendered, chats[i].where)
                found[i] = rendered
        if self.others and not self.answers:
            raise TextError(
                f"{self._first}: the model's chat template cannot be split into turns: it does not write an answer "
                "behind the prompt to answer",
                "mark the answers by {% generation %} in chat_template.jinja, or take --loss all",
            )
        return found

    def _count(self, rendered: Rendered, where: str) -> None:
        self.answers += len(rendered.spans)
        self.others += rendered.others
        if rendered.others and not self._first:
            self._first = where

    def tell(self, name: str) -> None:
        """Say how many of the answers so far do not count, if any.

        Args:
            name: of the texts.
        """
        if self.others:
            say(
                f"{name}: {self.others:,} of {self.answers + self.others:,} answers do not count: the model's chat "
                f"template does not write them as they were given, without their thoughts perhaps; the first in "
                f"{self._first}"
            )

    def _counted(self, rendered: Rendered, places: np.ndarray) -> np.ndarray:
        """Return which tokens count, by their characters: (tokens, 2)."""
        first, last = places.T
        if self._loss == "all":
            return np.ones(len(first), bool)
        counted = np.zeros(len(first), bool)
        for begin, end in rendered.spans:
            # tokenizers that trim blanks off give a token of blanks alone an empty place behind them
            counted |= np.where(first < last, (begin <= first) & (first < end), (begin < first) & (first <= end))
        return counted


def _any_of(words: set[str]) -> re.Pattern[str]:
    """Return what finds any of these words, the longest first."""
    longest_first = sorted(words - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _as_templates_take_it(chat: Conversation) -> dict[str, Any]:
    """Return messages and tools as templates of chats expect them.

    Raises:
        TextError: the row has them otherwise.
    """
    if not isinstance(chat.turns, list) or not all(isinstance(turn, Mapping) for turn in chat.turns):
        raise TextError(f"{chat.where}: must hold a list of messages", _TEXT_OR_TURNS)
    messages = [_message(turn, f"{chat.where}: message {i}") for i, turn in enumerate(chat.turns, 1)]
    if chat.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _content(chat.system, f"{chat.where}: system")})
    tools = chat.tools or None
    try:
        tools = json.loads(tools) or None if isinstance(tools, str) else tools
        json.dumps([messages, tools]).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise TextError(f"{chat.where}: tools: {error}", "give a list of objects, or the same as JSON") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise TextError(f"{chat.where}: tools must be a list of objects", "as OpenAI has them")
    return {"messages": messages, "tools": tools}


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    stated = {key: value for key, value in turn.items() if value is not None}
    if "role" in stated:
        role, content = stated["role"], stated.get("content")
        if not isinstance(role, str) or not role:
            raise TextError(f"{where}: role must be a text", _TEXT_OR_TURNS)
    elif "from" in stated:
        speaker, content = stated["from"], stated.get("value")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise TextError(
                f"{where}: from must be one of {', '.join(SHAREGPT_ROLES)}, got {str(speaker)[:40]!r}",
                "rename or remove it",
            )
        role = SHAREGPT_ROLES[speaker]
    else:
        listed = ", ".join(map(str, turn)) or "none"
        raise TextError(f"{where}: must have role and content, or from and value, its fields are: {listed}")
    calls = stated.get("tool_calls")
    if not calls:
        stated.pop("tool_calls", None)
    elif not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise TextError(f"{where}: tool_calls must be a list of objects", "as OpenAI has them")
    else:
        stated["tool_calls"] = [_call(call) for call in calls]
    text = "" if content is None and calls else _content(content, where)
    return {"role": role, "content": text, **{key: stated[key] for key in _KEPT if key in stated}}


def _content(content: Any, where: str) -> str:
    """Return a message's text, which may be in parts."""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise TextError(f"{where}: content must be a text, got {type(content).__name__}", _TEXT_OR_TURNS)
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise TextError(f"{where}: content is no valid Unicode ({error.reason})") from error
    return content


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as templates write them; OpenAI has them as JSON."""
    stated = {key: value for key, value in call.items() if value is not None}
    function = stated.get("function", stated)
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return stated
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return stated
    if not isinstance(parsed, dict):
        return stated
    changed = {**function, "arguments": parsed}
    return {**stated, "function": changed} if "function" in stated else changed


def _check_tools(given: Mapping[str, Any], template: str, where: str) -> None:
    """Check that a template does something with the tools of a conversation.

    Raises:
        TextError: it would leave them out without a word.
    """
    calls = any("tool_calls" in message for message in given["messages"])
    for what, there in (("tool_calls", calls), ("tools", bool(given["tools"]))):
        if there and not re.search(rf"\b{what}\b", template):
            raise TextError(
                f"{where}: has {what}, which the model's chat template does not take",
                "leave such rows out, or take a model that calls tools",
            )
