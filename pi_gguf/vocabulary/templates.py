"""Chat templates: programs of strangers in Jinja. Parsed when a file is written, run only for a conversation.

In: the template of a checkpoint or a GGUF file. Out: nothing but an error where it does not parse; or the text of a
conversation, as transformers makes it. It is run in a process of its own, sandboxed and bounded in memory and time, as
`{{ 'A' * 10**10 }}` takes ten gigabytes wherever it is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    asked = json.dumps({"template": template, "variables": variables}).encode()
    try:
        done = run_child(
            "vocabulary.templates", str(_CPU_SECONDS), seconds=_WALL_SECONDS, input=asked, capture_output=True
        )
        answer = json.loads(done.stdout)
        text: str = answer["text"]
        text.encode()
    except subprocess.TimeoutExpired as error:
        raise GgufError(f"{name} takes more than {_WALL_SECONDS} s", _PLAIN) from error
    except UnicodeEncodeError as error:
        raise GgufError(f"{name} makes half a surrogate ({error})", _PLAIN) from error
    except KeyError as error:
        raise GgufError(f"{name}: {answer['error']}", _PLAIN) from error
    except ValueError as error:  # no answer
        raise GgufError(
            f"{name} takes more than {_CPU_SECONDS} s or {_MEMORY_BYTES >> 20} MiB (ended with {done.returncode})",
            _PLAIN,
        ) from error
    return text


def _environment() -> ImmutableSandboxedEnvironment:
    """Return Jinja as templates of chats expect it: what transformers adds and sets, and nothing folded beforehand."""

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; its text is like any other."""

        tags = {"generation"}  # noqa: RUF012  as jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
    try:
        asked = json.load(sys.stdin)
        answer = {"text": _rendered(asked["template"], asked["variables"])}
    except MemoryError:
        answer = {"error": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply"}
    except Exception as error:  # a template can raise anything
        answer = {"error": one_line(error)}
    print(json.dumps(answer))


def _rendered(template: str, variables: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in _environment().from_string(template).generate(variables):
        parts.append(part)
        length += len(part)
        if length > MAX_OUTPUT:
            raise ValueError(f"it writes more than {MAX_OUTPUT} characters")
    return "".join(parts)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
