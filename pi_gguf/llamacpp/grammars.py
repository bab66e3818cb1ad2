"""Grammars and schemas of strangers, tried in a child process before llama.cpp has them in this one.

In: a grammar in GBNF, or a JSON schema. Out: nothing or a grammar, or an `OptionError`. A grammar can end llama.cpp, or
keep it busy for ever once a text has come to some place of it; a schema of a line can become a grammar of gigabytes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from functools import lru_cache
from itertools import count

import psutil

from pi_gguf.common.children import limit_child, run_child
from pi_gguf.errors import OptionError, one_line
from pi_gguf.llamacpp.library import last_line, llama_cpp_library, log

_LIVES = b"lives"
"""What a child says last."""

GRAMMAR, SCHEMA, SCHEMA_GRAMMAR = 2**16, 2**18, 2**19
"""Characters of a grammar, a schema, and what is made of one, at most: a grammar is read for each text."""

_MEMORY, _CPU_SECONDS, _SECONDS = 2**30, 5, 30
"""What a child may take, beside the memory that the library has: seconds of the CPU, and of the clock."""

_PARTS = re.compile(
    r"""(?P<comment>\#[^\r\n]*)
    | (?P<token>!?<[^>]*>)
    | (?P<text>"(?:\\.|[^"\\])*" | \[(?:\\.|[^\]\\])*\] | \.)
    | (?P<rule>[A-Za-z0-9-]+)[ \t]*::=
    | (?P<name>[A-Za-z0-9-]+)
    | (?P<times>[*+?]|\{[^}]*\})""",
    re.VERBOSE | re.DOTALL,
)
"""Of a grammar: what stands for a token or for characters, where a rule begins, its name elsewhere, how often."""

REPEATED = 2000
"""How often llama.cpp repeats a part, at most; above, it takes the second number of a repetition for none."""


@lru_cache(64)
def check_grammar(grammar: str, most: int = GRAMMAR) -> None:
    """Have a child read a grammar: llama.cpp ends at one that is nested too deeply, and prints what is wrong in others.

    The child begins at every place of it, too: there are grammars, as `x ::= y x "c" | "d"` where y may be nothing,
    at which llama.cpp goes on for ever once a text has come to them.

    Args:
        grammar: in GBNF.
        most: characters that it may have.

    Raises:
        OptionError: llama.cpp cannot read it, with the reason.
    """
    hint = 'e.g. root ::= "yes" | "no"; llama.cpp describes them in grammars/README.md'
    if not grammar.strip() or "\0" in grammar:
        raise OptionError("grammar must be a text without null characters, and not empty", hint)
    if len(grammar) > most:
        raise OptionError(f"grammar must have at most {most:,} characters, got {len(grammar):,}", "make it simpler")
    if not sys.executable:
        return
    try:
        data = grammar.encode()
        child = run_child("llamacpp.grammars", "check", seconds=_SECONDS, input=data, capture_output=True)
    except UnicodeEncodeError as error:
        raise OptionError(f"grammar: not UTF-8 at character {error.start}", hint) from error
    except subprocess.TimeoutExpired as error:
        raise OptionError(f"grammar: llama.cpp does not read it within {_SECONDS} seconds", hint) from error
    said = child.stderr.decode(errors="replace")
    if child.stdout.endswith(_LIVES):
        return
    if "bad_alloc" in said or -child.returncode in (getattr(signal, "SIGXCPU", None), signal.SIGKILL):
        raise OptionError("grammar: there is a place in it at which too much may come", "leave out what may be nothing")
    reason = said.partition("error parsing grammar: ")[2] or said or "it ends"
    raise OptionError(f"grammar: llama.cpp cannot read it ({reason.strip().splitlines()[0][:200]})", hint)


@lru_cache(64)
def convert_schema(schema: str) -> str:
    """Return the grammar that llama-cpp-python's converter makes of a schema, in a child.

    Args:
        schema: JSON.

    Raises:
        ValueError: the converter does not understand it, or it takes too much.
    """
    if not sys.executable:
        return _converted(schema)
    try:
        child = run_child("llamacpp.grammars", "convert", seconds=_SECONDS, input=schema.encode(), capture_output=True)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"it takes more than {_SECONDS} s") from error
    if child.stdout.endswith(_LIVES):
        return child.stdout.removesuffix(_LIVES).decode()
    said = child.stderr.decode(errors="replace").strip().splitlines()
    raise ValueError(said[-1] if child.returncode == 1 and said else "its grammar takes too much memory or time")


# The child


def _converted(schema: str) -> str:
    """Return the grammar of a schema.

    Raises:
        ValueError: the converter does not understand it.
    """
    try:
        grammar = str(llama_cpp_library().llama_grammar.json_schema_to_gbnf(schema))
    except MemoryError:
        raise
    except Exception as error:  # the converter lets through whatever a schema makes its code run into
        raise ValueError(f"{type(error).__name__}: {one_line(error)}") from error
    if len(grammar) > SCHEMA_GRAMMAR:
        raise ValueError(f"its grammar has more than {SCHEMA_GRAMMAR:,} characters")
    return grammar


def _begin(grammar: str) -> None:
    """Have llama.cpp read a grammar, and begin at every place of it."""
    begin, (plain, text, root) = llama_cpp_library().llama_sampler_init_grammar, _every_place(grammar)
    for one, rule in ((plain, "root"), (text, root)):
        if not begin(None, one.encode(), rule.encode()):
            sys.exit(last_line("".join(log)))


def _every_place(grammar: str) -> tuple[str, str, str]:
    """Return a grammar; with a rule that begins wherever a text can come to in it; and the name of that.

    Names of tokens, which llama.cpp reads with a vocabulary only, are a number.

    That is where every rule begins, and, as a text can be past any of a rule's characters, where a copy of it begins
    that has none. The copies name the rules themselves, not each other. llama.cpp looks at no state twice, so that
    what it finds at a place is the sum of what it finds at the rules that may begin there.
    """
    prefix = next(one for one in (f"place{n}-" for n in count()) if one not in grammar)
    whole, copies, end, counted = list[str](), list[str](), 0, False
    for part in _PARTS.finditer(grammar):
        between, said, kind = grammar[end : part.start()], part[0], part.lastgroup
        end = part.end()
        whole += [between, "<[0]>" if kind == "token" and "<[" not in said[:3] else said]
        if kind == "rule":
            copies += [between, f"{prefix}{len(copies)} ::="]
        elif kind == "times":
            copies += [between, "" if counted else _times(said)]
        else:
            copies += [between, {"name": said, "comment": ""}.get(str(kind), '""')]
        counted = kind in ("text", "token") or (kind in ("times", "comment") and counted)
    copied = "".join([*copies, grammar[end:]])
    names = re.findall(rf"{prefix}[0-9]+(?= ::=)", copied)
    plain = "".join([*whole, grammar[end:]])
    return plain, f"{plain}\n{copied}\n{prefix}all ::= {' | '.join(names)}\n", f"{prefix}all"


def _times(said: str) -> str:
    """Return how often a part of a copy stands: never for ever, as all of it may be nothing."""
    numbers = [int(number) for number in re.findall("[0-9]+", said)]
    if (len(numbers) == 2 and numbers[1] <= REPEATED) or (len(numbers) == 1 and "," not in said):
        return said
    return f"{{{max(1, numbers[0])}}}" if numbers else "?"


def _main(what: str) -> None:
    data, _ = sys.stdin.buffer.read(), llama_cpp_library()
    # what the library has mapped, as that of a GPU's, counts as well
    limit_child(psutil.Process().memory_info().vms + _MEMORY, _CPU_SECONDS)
    if hasattr(signal, "alarm"):  # it does not go on for ever where its parent was killed
        signal.alarm(_SECONDS + 1)
    if what == "check":
        _begin(data.decode())
    else:
        try:
            sys.stdout.buffer.write(_converted(data.decode()).encode())
            sys.stdout.flush()
        except ValueError as error:
            sys.exit(str(error))
    os.write(1, _LIVES)


if __name__ == "__main__":
    _main(*sys.argv[1:])
