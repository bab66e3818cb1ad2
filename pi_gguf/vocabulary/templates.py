"""Chat templates: programs of strangers in Jinja. Parsed when a file is written, run only for a conversation.

In: the template of a checkpoint or a GGUF file. Out: nothing but an error where it does not parse; or the text of a
conversation, as transformers makes it, or of many, with the places of the answers. It is run in a process of its own,
sandboxed and bounded in memory and time, as `{{ 'A' * 10**10 }}` takes ten gigabytes wherever it is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pi_gguf.common.children import limit_child, run_child
from pi_gguf.errors import CheckpointError, GgufError, one_line

MAX_SOURCE = 2**19
"""Characters of a template; the longest known has 60,000."""

MAX_OUTPUT = 2**26
"""Characters of a conversation's text."""

CUT = "\ufdd0"
"""Cuts the name of a special token that stands in a message, which is no token there; Unicode has it for such uses."""

_MEMORY_BYTES = 2**30
_CPU_SECONDS = 5
_WALL_SECONDS = 60
"""Of the process that runs a template. A machine may be busy: only CPU seconds tell what the template takes."""

_CPU_SECONDS_OF_MANY = 120
_WALL_SECONDS_OF_MANY = 1800
"""The same for a batch of conversations: some MB of them take two or three."""

_BEGIN, _END = "\ufdd1", "\ufdd2"
"""Written around what `{% generation %}` marks, where its places are wanted; no text has them by then."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_CORRECT = "correct the template, or give texts instead of conversations"
_PLAIN = "give the prompt as it is, without the chat template (run without --chat), or correct the template"


def check_template(source: Any, name: str) -> None:
    """Check that a template can be read; it is parsed only, never compiled or run.

    Args:
        source: the template, whatever a file has in its place.
        name: of the template, for messages.

    Raises:
        CheckpointError: it is no text, too long, nested too deeply, or no template.
    """
    if not isinstance(source, str):
        raise CheckpointError(f"{name} must be a text, got {type(source).__name__}", "correct or remove it")
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{name} has half a surrogate in it ({error})", "correct or remove it") from error
    if len(source) > MAX_SOURCE:
        raise CheckpointError(f"{name} has {len(source)} characters, {MAX_SOURCE} at most", "shorten or remove it")
    environment = _environment()
    try:
        parsed = environment.parse(source)
        unknown = [node.name for node in parsed.find_all(nodes.Filter) if node.name not in environment.filters]
        unknown += [node.name for node in parsed.find_all(nodes.Test) if node.name not in environment.tests]
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested too deeply", "correct or remove it") from error
    except (TemplateError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise CheckpointError(f"{name} is broken ({one_line(error)})", "correct or remove it") from error
    if unknown:
        raise CheckpointError(f"{name} is broken (no filter or test {unknown[0]!r})", "correct or remove it")


def cut(value: Any, names: re.Pattern[str]) -> Any:
    """Return what a template is given, with `CUT` behind the first character of each name in its texts and keys."""
    if isinstance(value, str):
        return names.sub(lambda match: match[0][0] + CUT + match[0][1:], value.replace(CUT, ""))
    if isinstance(value, Mapping):
        return {cut(key, names): cut(item, names) for key, item in value.items()}
    return [cut(item, names) for item in value] if isinstance(value, list | tuple) else value


def render_chat(
    template: Any, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], path: str, *, tools: Any = None
) -> str:
    """Return the text of a conversation, up to where the answer begins.

    Args:
        template: of the file.
        messages: objects with `role` and `content`.
        tokens: special tokens by the names that templates know: `bos_token`, `eos_token` and so on.
        path: of the file, for messages.
        tools: what the template shows as tools.

    Raises:
        GgufError: the template is broken, refuses the conversation, or takes too much memory or time.
    """
    name = f"{path}: tokenizer.chat_template"
    try:
        check_template(template, name)
    except CheckpointError as error:
        raise GgufError(str(error), _PLAIN) from error
    variables = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": True, **tokens}
    try:
        answer = _ask({"template": template, "variables": variables}, _CPU_SECONDS, _WALL_SECONDS)
        text: str = answer["text"]
        text.encode()
    except UnicodeEncodeError as error:
        raise GgufError(f"{name} makes half a surrogate ({error})", _PLAIN) from error
    except KeyError as error:
        raise GgufError(f"{name}: {answer['error']}", _PLAIN) from error
    except ValueError as error:
        raise GgufError(f"{name} {error}", _PLAIN) from error
    return text


@dataclass(frozen=True)
class Rendered:
    """A conversation as a template writes it.

    Args:
        text: of the whole.
        spans: first character of each answer, and the one behind it; empty where they were not asked for.
        others: answers without a span: those that the whole does not have as they were given.
        error: what is wrong, where it has no text.
    """

    text: str = ""
    spans: Sequence[tuple[int, int]] = ()
    others: int = 0
    error: str = ""


def render_chats(
    template: str,
    chats: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, Any],
    name: str,
    *,
    special: re.Pattern[str] | None,
) -> list[Rendered]:
    """Return the texts of whole conversations, all written in one process.

    An answer is what `{% generation %}` marks, where the template has such marks. Elsewhere it begins where the text of
    the messages before it ends, with the prompt to answer, and ends where the text of the messages up to it does, if
    both of these are how the whole begins. Where they are not (Qwen 3 writes the last answer otherwise than earlier
    ones, the prompt of DeepSeek R1 opens thoughts), an answer is its message's own thoughts and text, if between them
    and the messages before stands nothing but what the prompt has, and special tokens. What ends the turn is part of an
    answer: the line break that many templates put behind that is not, nor what some write once behind the last turn
    (Phi 3), if the turn has an end of its own.

    Args:
        template: that `check_template` has passed.
        chats: objects with `messages` and `tools`, as templates take them.
        tokens: special tokens by the names that templates know.
        name: of the template, for messages.
        special: what spells out a special token; None where answers are not looked for.

    Raises:
        CheckpointError: the template takes too much memory or time for all of them.
    """
    variables = {"documents": None, **tokens}
    asked = {"template": template, "chats": list(chats), "variables": variables, "special": special and special.pattern}
    try:
        answer = _ask(asked, _CPU_SECONDS_OF_MANY, _WALL_SECONDS_OF_MANY)
        return [Rendered(**one, spans=[(begin, end) for begin, end in spans]) for spans, one in answer["chats"]]
    except KeyError as error:
        raise CheckpointError(f"{name}: {answer['error']}", _CORRECT) from error
    except ValueError as error:
        raise CheckpointError(f"{name} {error} for {len(chats)} conversations", _CORRECT) from error


def has_marks(template: str) -> bool:
    """Tell whether a template marks its answers by `{% generation %}`."""
    return bool(_MARKS.search(template))


def _ask(asked: Mapping[str, Any], cpu_seconds: int, seconds: int) -> dict[str, Any]:
    """Return what a process of its own answers.

    Raises:
        ValueError: it was ended, with what was too much.
    """
    sent = json.dumps(asked).encode()
    try:
        done = run_child("vocabulary.templates", str(cpu_seconds), seconds=seconds, input=sent, capture_output=True)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"takes more than {seconds} s") from error
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:  # no answer
        most = f"{cpu_seconds} s or {_MEMORY_BYTES >> 20} MiB"
        raise ValueError(f"takes more than {most} (ended with {done.returncode})") from error
    return answer


def _environment(*, marks: bool = False) -> ImmutableSandboxedEnvironment:
    """Return Jinja as templates of chats expect it: what transformers adds and sets, and nothing folded beforehand.

    Args:
        marks: write `_BEGIN` and `_END` around what `{% generation %}` marks.
    """

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; its text is like any other."""

        tags = {"generation"}  # noqa: RUF012  as jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
            return [begin, *body, end] if marks else body

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


# In the process that runs a template


def _serve(cpu_seconds: int) -> None:
    """Read a template and its variables from standard input; write what it makes of them, or why not."""
    limit_child(_MEMORY_BYTES, cpu_seconds)
    answer: dict[str, Any]
    try:
        asked = json.load(sys.stdin)
        if "chats" in asked:
            answer = {"chats": _rendered_chats(**asked)}
        else:
            answer = {"text": _written(_environment().from_string(asked["template"]), asked["variables"], MAX_OUTPUT)}
    except Exception as error:  # a template can raise anything
        answer = {"error": _said(error)}
    print(json.dumps(answer))


def _said(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"
    return "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)


def _written(template: Any, variables: Mapping[str, Any], most: int) -> str:
    """Return what a template writes, of so many characters at most."""
    parts, length = [], 0
    for part in template.generate(variables):
        parts.append(part)
        length += len(part)
        if length > most:
            raise ValueError(f"it writes more than {MAX_OUTPUT} characters")
    return "".join(parts)


def _rendered_chats(
    template: str, chats: list[dict[str, Any]], variables: dict[str, Any], special: str | None
) -> list[tuple[list[tuple[int, int]], dict[str, Any]]]:
    """Return the answers of each conversation, and what else `Rendered` takes; all on the day on which it begins."""
    now, left = datetime.now(), MAX_OUTPUT
    done: list[tuple[list[tuple[int, int]], dict[str, Any]]] = []
    plain, marked = (_environment(marks=marks) for marks in (False, True))
    for environment in (plain, marked):
        environment.globals["strftime_now"] = lambda form: now.strftime(form)
    compiled = plain.from_string(template)
    marking = marked.from_string(template) if has_marks(template) else None
    for chat in chats:
        try:
            text, spans, others = _rendered_chat(compiled, marking, chat, variables, most=left, special=special)
        except Exception as error:  # a template can raise anything
            done.append(([], {"error": _said(error)}))
        else:
            left -= len(text)
            done.append((spans, {"text": text, "others": others}))
    return done


def _rendered_chat(
    template: Any,
    marking: Any,
    chat: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    most: int,
    special: str | None,
) -> tuple[str, list[tuple[int, int]], int]:
    """Return text and answers of a conversation, and the number of those without a span.

    `marking` is the template that writes marks, where it has some.
    """

    def render(messages: list[Any], prompt: bool, which: Any = template) -> str:
        given = {"messages": messages, "tools": chat["tools"], "add_generation_prompt": prompt, **variables}
        return _written(which, given, most)

    messages = chat["messages"]
    text = render(messages, False)
    text.encode()
    if special is None:
        return text, [], 0
    if marking:
        return text, _marked(render(messages, False, marking), text), 0
    return text, *_split(render, messages, text, special)


def _marked(text: str, plain: str) -> list[tuple[int, int]]:
    """Return what lies between marks, by its places without them."""
    found: list[tuple[int, int]] = []
    begin: int | None = None
    at = 0
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part not in (_BEGIN, _END):
            at += len(part)
        elif (part == _BEGIN) != (begin is None):
            raise ValueError("its generation marks do not come in pairs")
        elif begin is None:
            begin = at
        else:
            found.append((begin, at))
            begin = None
    if begin is not None or text.replace(_BEGIN, "").replace(_END, "") != plain:
        raise ValueError("what its generation marks enclose is changed or lost afterwards")
    return found


def _split(
    render: Callable[[list[Any], bool], str], messages: list[Any], whole: str, special: str
) -> tuple[list[tuple[int, int]], int]:
    """Return the answers by what is written without them, and up to them, and the number of those not so found."""
    closing = _closing(render, messages, whole, special)
    body, turn_end = whole[: len(whole) - len(closing)], re.compile(rf"(?:{special})(\s*)$")
    found, others = [], 0
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        last = i + 1 == len(messages)
        before, after = render(messages[:i], True), whole if last else render(messages[: i + 1], False)
        ends, after = after.endswith(closing), after.removesuffix(closing)
        if ends and body.startswith(after) and after.startswith(before):
            ended = turn_end.search(after, len(before))
            found.append((len(before), ended.start(1) if ended else len(whole) if last else len(after)))
        elif span := _own_words(message, before, render(messages[:i], False).removesuffix(closing), whole, special):
            found.append(span)
        else:
            others += 1
    return found, others


def _own_words(message: Mapping[str, Any], prompt: str, asked: str, whole: str, special: str) -> tuple[int, int] | None:
    """Return where a message's thoughts and text stand, with the end of its turn, if there they answer the prompt.

    Args:
        prompt: the messages before, with the prompt to answer.
        asked: the messages before, without it.
    """
    text, thoughts = (str(message.get(key) or "").strip() for key in ("content", "reasoning_content"))
    begin = at = whole.find(text, len(asked)) if text else -1
    if thoughts and at >= 0:
        begin = whole.find(thoughts, len(asked), at)
    same = _shared(whole, prompt, special)
    if begin < 0 or not re.fullmatch(rf"(?:{special}|\s)*", whole[same:begin]):
        return None
    ended = re.compile(rf"\s*(?:{special})").match(whole, at + len(text))
    return begin, ended.end() if ended else at + len(text)


def _shared(text: str, other: str, special: str) -> int:
    """Return how many characters both begin with, up to a special token of the first that the other has in part."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    cut = (match.start() for match in re.finditer(special, text) if match.start() < same < match.end())
    return next(cut, same)


def _closing(render: Callable[[list[Any], bool], str], messages: list[Any], whole: str, special: str) -> str:
    """Return what a template writes once, behind a conversation that is not to be answered: special tokens, if any."""
    try:
        asking = render(messages, True)
    except Exception:  # a template can raise anything: this one asks for no answer to an answer
        return ""
    closing = whole[_shared(whole, asking, special) :]
    return closing if re.fullmatch(rf"(?:{special}|\s)+", closing) else ""


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
