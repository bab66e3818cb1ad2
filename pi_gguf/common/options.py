"""An option is defined once: default, type, help, and what it may be, as a field of a dataclass of its concern.

In: flat keywords, as Python callers and the command line give them. Out: one frozen object a concern, which the inner
functions take. Command line, help, signature, docstring, a run's record and docs/options.md are made from the fields; a
new option is a field there, a line in the keywords below it (`TuneKeywords` and the like, which editors and mypy read)
and its use.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ParamSpec, TypeVar

from pi_gguf.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="Options")


def option(text: str, *, default: Any, choices: Sequence[str] = (), each: str = "", needed: bool = False) -> Any:
    """Define an option.

    Args:
        text: its help, with the unit and an example.
        default: None where it is chosen when left out.
        choices: what it may be.
        each: what one value is called, of an option that may be repeated.
        needed: most people need it; it stands first in the help.
    """
    return field(default=default, metadata={"help": text, "choices": tuple(choices), "each": each, "needed": needed})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one concern; its title stands above them in help and documentation."""

    title: typing.ClassVar[str]

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if choices and value is not None and value not in choices:
                named = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
                raise OptionError(f"{flag(one.name)} must be {named}, got {value}")
            if one.metadata["each"]:
                object.__setattr__(self, one.name, tuple(value))


def flag(name: str) -> str:
    """Return an option's name as the command line and messages have it."""
    return name.replace("_", "-")


# From keywords to objects


def take(group: type[T], keywords: Mapping[str, Any]) -> T:
    """Make a group's object of its own among flat keywords.

    Raises:
        OptionError: one of them is not among its choices.
    """
    return group(**{one.name: keywords[one.name] for one in fields(group) if one.name in keywords})


def hints(group: type) -> dict[str, Any]:
    """Return the types of a group's options by name."""
    known = typing.get_type_hints(group)
    return {one.name: known[one.name] for one in fields(group)}


def keywords_of(function: Callable[..., Any], group: type[Options]) -> set[str]:
    """Return the names of a group's options among the typed keywords of a function."""
    for hint in typing.get_type_hints(function).values():
        for keywords in typing.get_args(hint) if typing.get_origin(hint) is typing.Unpack else ():
            return {*typing.get_type_hints(keywords)} & {*hints(group)}
    return {*hints(group)}


def flat(*groups: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a function that takes groups' options as `**options` their signature and documentation.

    It takes those that its keywords name, all of them where they are not typed. Another keyword is refused as Python
    does it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = [
            (one, kinds[one.name])
            for group in groups
            for kinds in (hints(group),)
            for one in fields(group)
            if one.name not in signature.parameters and one.name in keywords_of(function, group)
        ]
        more = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=kind)
            for one, kind in taken
        ]
        whole = signature.replace(parameters=[*own, *more])

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            whole.bind(*args, **kwargs)
            return function(*args, **kwargs)

        checked.__signature__ = whole  # type: ignore[attr-defined]
        checked.groups = groups  # type: ignore[attr-defined]
        checked.__doc__ = _documented(function.__doc__ or "", [one for one, _ in taken])
        return checked

    return decorate


def _documented(doc: str, taken: Sequence[Field]) -> str:
    """Return a docstring whose `Args` go on with the options."""
    doc = inspect.cleandoc(doc)
    lines = [f"    {one.name}: {one.metadata['help']}" for one in taken]
    head, mark, rest = doc.partition("\nArgs:\n")
    args, gap, tail = rest.partition("\n\n")
    return f"{head}{mark}{args}\n" + "\n".join(lines) + f"{gap}{tail}"
