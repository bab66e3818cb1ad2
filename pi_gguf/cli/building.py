"""Click commands made of public functions.

A command's options are its function's keyword parameters: default and type stand in the signature, help in the
docstring, each once; those that several functions share stand in classes of options.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pi_gguf.common.endings import check_address_space, print_all
from pi_gguf.common.options import Options, flag
from pi_gguf.common.progress import KINDS, output, process_rank
from pi_gguf.pipeline.options import GROUPS

_WINDOWS = {"windows"}


_REPEATABLE = {
    "second_text": "PATH", "set": "KEY=VALUE",
    **{one.name: one.metadata["each"] for group in GROUPS for one in fields(group) if one.metadata["each"]},
}  # fmt: skip
"""What one value of an option that may be repeated is."""


_MANY = 20
"""A command with more parameters explains the most needed only, unless it is asked for all."""


_WITH_TORCH = {
    "pipeline.convert",
    "tune.extend",
    "pipeline.demo",
    "evaluate.report",
    "evaluate.compare",
    "evaluate.bounds",
    "restore.unpack",
}
"""Modules of commands that open Hugging Face models."""


class Numbers(click.ParamType):
    """Whole numbers separated by commas."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            try:
                return tuple(int(part) for part in value.split(","))
            except ValueError:
                self.fail(f"must be whole numbers separated by commas, got {value!r}", param, ctx)
        return value


def command(target: str, show: Callable[[Any], str], *, name: str | None = None, reports: bool = True) -> click.Command:
    """Make a click command of a function.

    Args:
        target: `module:function`; its positional parameters become arguments, its keywords options.
        show: turns what the function returns into text for people.
        name: of the command, the function's when None.
        reports: whether `--json` is offered; the returned value then has `to_json`.
    """
    module, function_name = target.split(":")
    function = getattr(importlib.import_module(f"pi_gguf.{module}"), function_name)
    summary, helps, example = _parse_docstring(function.__doc__)
    params: list[click.Parameter] = []
    several = False  # whether the last argument may be repeated
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        text = helps[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            several, metavar = True, f"{parameter.name.upper()}..."
            params.append(click.Argument([parameter.name], metavar=metavar, nargs=-1, required=True))
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            params.append(click.Argument([parameter.name], metavar=parameter.name.upper()))
            continue
        params.append(_option(parameter, parameter.annotation, text))
    if reports:
        params.append(click.Option(["--json", "as_json"], is_flag=True, help="print JSON"))

    def run(as_json: bool = False, **values: Any) -> None:
        if module in _WITH_TORCH:
            check_address_space()
        given = [values.pop(argument.name) for argument in params if isinstance(argument, click.Argument)]
        result = function(*given[:-1], *given[-1], **values) if several else function(*given, **values)
        if process_rank() > 0:
            return
        print_all(json.dumps(result.to_json(), indent=1) if as_json else show(result))

    arguments = "\n".join(
        f"  {p.name.upper()}: {helps[p.name]}" for p in params if p.name in helps and p.param_type_name == "argument"
    )
    short, _, _ = summary.partition("\n\n")
    used = f"\b\n{arguments}\n\n\b\nExample:\n  {example}"
    made = Grouped(
        name or function_name, getattr(function, "groups", ()), f"{short}\n\n{used}", params=params, callback=run,
        help=f"{summary}\n\n{used}", short_help=summary.split("\n")[0],
    )  # fmt: skip
    return telling(made)


def telling(made: click.Command) -> click.Command:
    """Give a command the options of what it tells on standard error while it works."""
    work = made.callback
    assert work

    def run(progress: str | None, quiet: bool, **values: Any) -> None:
        with output(progress, quiet):
            work(**values)

    how = "bar, plain (lines after 1 s, each 30, at the end) or none; a bar on a terminal, plain elsewhere by default"
    made.params += [
        click.Option(["--progress"], type=click.Choice(KINDS), help=how),
        click.Option(["--quiet"], is_flag=True, help="no progress and no notes; results and errors stay"),
    ]
    made.callback = run
    return made


def _option(parameter: inspect.Parameter, hint: Any, text: str) -> click.Option:
    name = f"--{flag(parameter.name)}"
    required = parameter.default is parameter.empty
    options: dict[str, Any] = {
        "required": required,
        "help": text,
        "show_default": parameter.default not in (None, (), False),
    }
    if not required:
        options["default"] = parameter.default
    inner = [t for t in typing.get_args(hint) if t is not type(None)]
    if parameter.name in _WINDOWS:
        options["type"] = Numbers()
    elif typing.get_origin(hint) is Sequence or hint == Sequence[str]:
        options |= {"multiple": True, "type": str, "metavar": _REPEATABLE[parameter.name]}
    elif hint is bool or inner == [bool]:
        name = f"{name}/--no-{name[2:]}" if parameter.default in (True, None) else name
        options |= {"is_flag": True}
    else:
        kind = inner[0] if inner else hint
        options["type"] = str if kind is Path or str in inner else kind
    return click.Option([name], **options)


def _parse_docstring(doc: str) -> tuple[str, dict[str, str], str]:
    """Split a docstring into its text, its `Args` by name, and its `Example`."""
    doc = inspect.cleandoc(doc)
    sections = re.split(r"\n(Args|Returns|Raises|Example|Source):\n", doc)
    parts = dict(zip(sections[1::2], sections[2::2], strict=True))
    helps = {}
    for match in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", parts.get("Args", ""), re.MULTILINE):
        helps[match[1]] = " ".join(match[2].split())
    return sections[0].strip(), helps, " ".join(parts.get("Example", "").split())


class Grouped(click.Command):
    """A command whose help shows its options by concern; of many what most people need, and all with --help-all.

    Args:
        groups: the concerns, classes of `options`.
        short: the text above the options where --help-all has more.
    """

    def __init__(self, name: str, groups: Sequence[type[Options]], short: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._groups, self._short, self._many = groups, short, bool(groups) and len(self.params) > _MANY
        if self._many:
            text = "show every option"
            self.params.append(
                click.Option(
                    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, help=text, callback=_help_all
                )
            )

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not self._explains_all(ctx):
            self.help = self._short
        super().format_help_text(ctx, formatter)

    def _explains_all(self, ctx: click.Context) -> bool:
        return not self._many or bool(ctx.meta.get(_ALL))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = (p for p in self.get_params(ctx) if isinstance(p, click.Option))
        records = {p.name: p.get_help_record(ctx) for p in options}
        shown = {name: record for name, record in records.items() if record}
        titles = {group.title: [one.name for one in fields(group) if one.name in shown] for group in self._groups}
        needed = [
            one.name for group in self._groups for one in fields(group) if one.metadata["needed"] and one.name in shown
        ]
        titles |= {"Output": sorted(_OUTPUT & shown.keys())} if self._groups else {}
        grouped = {name for names in titles.values() for name in names}
        first = [name for name in shown if name not in grouped]
        with formatter.section("Options"):
            formatter.write_dl([shown[name] for name in (*first[:1], *needed, *first[1:])])
        for title, names in titles.items():
            left = [name for name in names if name not in needed]
            if not left:
                continue
            with formatter.section(title):
                if self._explains_all(ctx):
                    formatter.write_dl([shown[name] for name in left])
                else:
                    formatter.write(_names(formatter, [shown[name][0].split()[0] for name in left]))


def _names(formatter: click.HelpFormatter, names: Sequence[str]) -> str:
    """Return names of options in lines, each name whole: click's own way would break one at a hyphen."""
    indent = " " * formatter.current_indent
    wrapper = textwrap.TextWrapper(formatter.width, indent, indent, break_on_hyphens=False)
    return wrapper.fill(" ".join(names)) + "\n"


_ALL = "pi_gguf.help_all"


_OUTPUT = {"as_json", "progress", "quiet"}


def _help_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta[_ALL] = True
        print_all(ctx.get_help())
        ctx.exit()


class Lazy(click.Group):
    """A group whose commands are made when they are asked for, so that help and errors load nothing heavy."""

    def __init__(self, name: str, commands: dict[str, tuple[str, Callable[[], click.Command]]], **options: Any) -> None:
        super().__init__(name, **options)
        self._made = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._made)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._made[cmd_name][1]() if cmd_name in self._made else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (summary, _) in self._made.items()])
