"""The command line: click commands made from the public functions, tables, and the one place where errors end.

A command's options are its function's keyword parameters: default and type stand in the signature, help in the
docstring, each once; those that several functions share stand in `options`. Data goes to standard output, progress and
messages to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pi_gguf.common.endings import Signals, check_address_space, prepare_streams, print_all, signals, translated
from pi_gguf.common.options import Options, flag
from pi_gguf.common.progress import KINDS, named_frame, output, process_rank
from pi_gguf.common.tables import text_table
from pi_gguf.errors import Interrupted
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
}
"""Modules of commands that open Hugging Face models."""

_PROMPT_BYTES = 2**26
_GRAMMAR_BYTES = 2**20
"""Read of standard input at most."""


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
    return _telling(made)


def _telling(made: click.Command) -> click.Command:
    """Give a command the options of what it tells on standard error while it works."""
    work = made.callback
    assert work

    def run(progress: str | None, quiet: bool, **values: Any) -> None:
        with output(progress, quiet):
            work(**values)

    how = "bar, plain (a line each 30 seconds and at the end) or none; a bar on a terminal, plain elsewhere by default"
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
                    formatter.write_text(" ".join(shown[name][0].split()[0] for name in left))


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


# What each command prints for people


def _show_plan(plan: Any) -> str:
    from pi_gguf.common.files import human_bytes

    rows = [
        ("model", f"{plan.model}, {plan.parameters / 1e6:,.1f} M parameters"),
        ("window", f"{plan.original_window} -> {plan.context} tokens, method {plan.method}, factor {plan.factor:g}"),
    ]
    if plan.training:
        t = plan.training
        rows += [
            *(
                ("fine-tune", f"{steps} steps in sequences of {window} tokens")
                for window, steps in t.steps_by_window().items()
            ),
            *([("full length", _mix_text(t))] if t.full_window else []),
            ("sequences", f"{t.sequences}: {t.reason}"),
            ("weights", f"{_way(t)} ({t.train_reason})"),
            ("tokens", f"{t.tokens / 1e6:,.1f} M"),
            ("learning rate", f"{t.learning_rate:g}, {t.schedule} after {t.warmup_steps} steps of warm-up"),
            *([("factor", f"grows from 1 over {t.factor_warmup_steps} steps")] if t.factor_warmup_steps else []),
            ("time, about", human_seconds(plan.training_seconds)),
            ("memory, about", f"{human_bytes(plan.training_memory_bytes)}; activations are {plan.activations}"),
        ]
    rows += [
        (f"output, {plan.quant}, about", human_bytes(plan.output_bytes)),
        ("disk needed, about", human_bytes(plan.disk_bytes)),
        *((f"KV cache at {plan.context}, {name}", human_bytes(n)) for name, n in plan.kv_cache_bytes.items()),
    ]
    return text_table("", (), rows, numbers=False)


def _mix_text(training: Any) -> str:
    share = training.tokens_by_window()[training.full_window] / training.tokens
    return (
        f"{training.full_micro_batches} of {training.steps * training.accumulation} micro-batches are "
        f"{training.full_micro_batch} x {training.full_window} tokens, {share:.1%} of all"
    )


def _way(training: Any) -> str:
    if training.train == "full":
        return "full: every one is trained"
    return f"{training.train}: adapters of rank {training.lora_rank}, alpha {training.lora_alpha}"


def human_seconds(seconds: float) -> str:
    """Write a duration for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _show_extend(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return f"wrote {path}\nnext: pi-gguf convert MODEL {path}.gguf --lora {path} --quant Q8_0"
    return f"wrote {path}\nnext: pi-gguf convert {path} {path}.gguf --quant Q8_0"


def _show_convert(result: Any) -> str:
    from pi_gguf.common.files import human_bytes
    from pi_gguf.pipeline.convert import DryRun

    if isinstance(result, DryRun):
        rows = [(name, "x".join(map(str, shape)), kind, f"{n:,}") for name, shape, kind, n in result.tensors]
        title = f"{result.files[0][0]}, {result.quantization}"
        table = text_table(title, ("tensor", "shape", "type", "bytes"), rows, numbers=False)
        files = "".join(f"{path}: {nbytes:,} bytes\n" for path, nbytes in result.files)
        return (
            f"{table}\n{files}all: {result.nbytes:,} bytes, {result.header_bytes:,} of them before the first tensor\n"
            f"memory: about {human_bytes(result.memory_bytes)} beside Python and its libraries; disk: "
            f"{human_bytes(result.disk_bytes)}\nnothing was written"
        )
    wrote = f"wrote {result.path} ({result.quantization}, {human_bytes(result.nbytes)})\n"
    if result.certificate:
        wrote += "".join(f"  {name}: {value}\n" for name, value in result.certificate.rows())
    if result.adapter_only:
        return f'{wrote}next: pi-gguf run BASE.gguf --lora {result.path} --prompt "..."'
    return f'{wrote}next: pi-gguf run {result.path} --prompt "..."\n      pi-gguf eval passkey {result.path} --growing'


def _show_quantize(path: Path) -> str:
    from pi_gguf.common.files import human_bytes

    return f"wrote {path} ({human_bytes(path.stat().st_size)})\nnext: pi-gguf inspect {path}"


def _show_imatrix(report: Any) -> str:
    from pi_gguf.gguf.header import is_gguf

    text = (
        f"wrote {report.path} ({report.tensors} tensors, {report.tokens:,} tokens in {report.windows} windows of "
        f"{report.context})\nnext: pi-gguf "
    )
    verb = "quantize" if is_gguf(report.model) else "convert"
    return f"{text}{verb} {report.model} OUT.gguf --quant IQ3_XXS --imatrix {report.path}"


def _show_inspect(report: Any) -> str:
    from pi_gguf.common.files import human_bytes

    unmeasured = [("measured", f"no: pi-gguf certify {report.path}")] if report.format == "GGUF" else []
    rows = [
        ("format", f"{report.format}, {report.architecture}, {report.quantization}"),
        ("window", f"{report.window} tokens (original {report.original_window})" if report.window else "unknown"),
        *((key, str(value)) for key, value in report.rope.items()),
        ("tensors", ", ".join(f"{n} {kind}" for kind, n in report.tensors.items())),
        ("size", human_bytes(report.nbytes)),
        *((f"llama.cpp reads {key}", f"{value}") for key, value in report.llama_cpp.items()),
        *((key, str(value)) for key, value in report.general.items()),
        *(report.certificate.rows() if report.certificate else unmeasured),
        *(("warning", text) for text in report.warnings),
        *((finding.severity, str(finding)) for finding in report.findings),
    ]
    table = text_table(report.path, (), rows, numbers=False)
    return f"{table}\nnext: {report.repair}" if report.repair else table


def _show_certify(report: Any) -> str:
    table = text_table(report.path, (), report.certificate.rows(), numbers=False)
    return f"{table}\nnext: pi-gguf inspect {report.path}"


def _show_card(card: Any) -> str:
    return f"wrote {card.path}" if card.path else str(card.text).rstrip()


def _show_repair(report: Any) -> str:
    lines = [f"{change.key}: {change.old} -> {change.new}" for change in report.changes]
    lines += [f"left, {finding.severity}: {finding}" for finding in report.left]
    if not report.changes:
        return "\n".join([*lines, f"{report.source}: nothing to repair; nothing was written"])
    return "\n".join([*lines, f"wrote {report.path}", f"next: pi-gguf inspect {report.path}"])


def _show_perplexity(report: Any) -> str:
    title = f"perplexity, stride {report.stride}"
    if len(report.models) == 1:
        rows = [(str(r.window), f"{r.perplexity:.3f}", f"{r.standard_error:.3f}", str(r.tokens)) for r in report.rows]
        return text_table(f"{report.models[0]}: {title}", ("window", "perplexity", "± s.e.", "tokens"), rows)
    found = {(r.model, r.window): f"{r.perplexity:.3f} ± {r.standard_error:.2g}" for r in report.rows}
    return _by_model(f"{title}, ± standard error", report.models, found)


def _by_model(
    title: str, models: Sequence[str], found: dict[tuple[str, Any], str], more: dict[str, dict[str, int]] | None = None
) -> str:
    """Draw a table of one row a model; `found` by model and column, `more` by column and model."""
    more = more or {}
    columns = list(dict.fromkeys(column for _, column in found))
    rows = [
        (model, *(found.get((model, column), "") for column in columns), *(str(part[model]) for part in more.values()))
        for model in models
    ]
    return text_table(title, ("model", *map(str, columns), *more), rows)


def _shares(cells: Sequence[Any], of: str) -> dict[tuple[str, Any], str]:
    """Return the share found by model and window; `of` names the field with how many there were."""
    found: dict[tuple[str, Any], str] = {}
    for key in dict.fromkeys((cell.model, cell.window) for cell in cells):
        here = [cell for cell in cells if (cell.model, cell.window) == key]
        found[key] = f"{sum(c.found for c in here) / sum(getattr(c, of) for c in here):.0%}"
    return found


def _show_needle(report: Any) -> str:
    if len(report.models) > 1:
        return _by_model("needles found, by window", report.models, _shares(report.cells, "needles"))
    windows, depths = (sorted({getattr(c, key) for c in report.cells}) for key in ("window", "depth"))
    found = {(c.window, c.depth): f"{c.found / c.needles:.0%}" for c in report.cells}
    rows = [(f"{depth:.0%}", *(found[window, depth] for window in windows)) for depth in depths]
    return text_table(f"{report.models[0]}: needles found", ("depth", *map(str, windows)), rows)


def _show_ruler(report: Any) -> str:
    from pi_gguf.evaluate.ruler import mean_scores

    means = {model: mean_scores([row for row in report.rows if row.model == model]) for model in report.models}
    title = f"score in percent; effective length: mean of at least {report.threshold:g}"
    if len(report.models) > 1:
        found = {(m, window): f"{value:.1f}" for m, by_window in means.items() for window, value in by_window.items()}
        return _by_model(f"mean {title}", report.models, found, {"effective length": report.effective_length})
    (model,), windows = report.models, list(means[report.models[0]])
    scores = {(row.task, row.window): f"{row.score:.1f}" for row in report.rows}
    rows = [(task, *(scores[task, w] for w in windows)) for task in dict.fromkeys(row.task for row in report.rows)]
    rows.append(("mean", *(f"{means[model][w]:.1f}" for w in windows)))
    table = text_table(f"{model}: {title}", ("task", *map(str, windows)), rows)
    return f"{table}\neffective length: {report.effective_length[model]}"


def _show_short(report: Any) -> str:
    def cell(row: Any) -> str:
        error = "" if row.standard_error is None else f" ± {row.standard_error:.3f}"
        difference = "" if row.difference is None else f" ({row.difference:+.3f})"
        return f"{row.value:.3f}{error}{difference}"

    found = {(row.model, row.task, row.metric): cell(row) for row in report.rows}
    kinds = list(dict.fromkeys((row.task, row.metric) for row in report.rows))
    rows = [(" ".join(kind), *(found[model, *kind] for model in report.models)) for kind in kinds]
    title = "± standard error" + (", difference from the first" if len(report.models) > 1 else "")
    return text_table(title, ("task", *report.models), rows)


def _show_summaries(report: Any) -> str:
    rows = [
        (r.model, f"{r.rouge1:.1f}", f"{r.rouge2:.1f}", f"{r.rougel:.1f}", str(r.documents), f"{r.tokens:.0f}")
        for r in report.rows
    ]
    header = ("model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "documents", "tokens each")
    return text_table(f"summaries of {report.source}", header, rows)


def _show_report(report: Any) -> str:
    windows = [row.window for row in next(iter(report.perplexity.values()))]
    found = {(label, row.window): f"{row.perplexity:.2f}" for label, rows in report.perplexity.items() for row in rows}
    table = _by_model(f"perplexity by window, to {windows[-1]}", list(report.perplexity), found)
    return f"{table}\nwrote {report.path}"


def _show_kl(report: Any) -> str:
    numbers = ("mean", "median", "p90", "p99", "worst")
    rows = [
        (f"{r.begin}-{r.end - 1}", *(f"{getattr(r, name):.3g}" for name in numbers), f"{r.top1:.2%}", str(r.tokens))
        for r in report.rows
    ]
    title = f"{report.model} from {report.against}: KL divergence, nats (KV cache {report.type_k}, {report.type_v})"
    return text_table(title, ("positions", *numbers, "top-1", "tokens"), rows)


def _show_matrix(report: Any) -> str:
    ranges = [f"{row.begin}-{row.end - 1}" for row in report.cells[0].rows]
    rows = []
    for cell in report.cells:
        means = [f"{row.mean:.3g}" for row in cell.rows]
        rows.append((f"{Path(cell.model).name}, {cell.type_k}", *means, f"{cell.rows[-1].top1:.2%}"))
    title = f"mean KL divergence from {report.against}, nats, by position"
    return text_table(title, ("file, KV cache", *ranges, "top-1"), rows)


def _show_compare(report: Any) -> str:
    windows = [str(row.window) for row in report.rows[0].perplexity]
    rows = [
        (row.name, *(f"{p.perplexity:.4g}" for p in row.perplexity), str(row.k_max), f"{row.found:.0%}")
        for row in report.rows
    ]
    title = f"{report.model} to {report.context}, untrained: perplexity by window, passkeys"
    return text_table(title, ("way", *windows, "k_max", "found"), rows)


def _show_bounds(report: Any) -> str:
    of_pairs = f"{report.extrapolated:.3g} (median of {report.pairs} pairs), {report.extrapolated_worst:.3g} (worst)"
    of_distances = f"{report.bound_ratio:,.0f} (median over distances), {report.bound_ratio_least:,.0f} (least)"
    rows = [
        ("largest score beyond the window, by the largest inside", of_pairs),
        ("the same with interpolated positions", f"{report.interpolated:.3g} (worst)"),
        ("error halfway between two positions, by its bound", f"{report.error_share:.3g} (worst)"),
        ("that bound, by the largest |h|", f"{report.bound_exact:.4g} (as the paper writes it, {report.bound:.4g})"),
        ("bound of extrapolation by that of interpolation", of_distances),
    ]
    shape = f"base {report.rope_theta:g}, {report.rotary_dim} dimensions, window {report.window}"
    return text_table(f"{report.model}: {shape}, followed to {report.context}", (), rows, numbers=False)


def _show_passkey(report: Any) -> str:
    if report.growing:
        shares = {(c.distance, c.model): f"{c.found / c.keys:.0%}" for c in report.cells}
        distances = list(dict.fromkeys(distance for distance, _ in shares))
        rows = [(str(distance), *(shares[distance, name] for name in report.models)) for distance in distances]
        rows.append(("k_max", *(str(report.k_max[name]) for name in report.models)))
        return text_table("passkeys found", ("distance", *(Path(name).name for name in report.models)), rows)
    if len(report.models) > 1:
        title = "passkeys found, by window; k_max (at least 20 % found)"
        return _by_model(title, report.models, _shares(report.cells, "keys"), {"k_max": report.k_max})
    (name,) = report.models
    windows = sorted({c.window for c in report.cells})
    places = sorted({round(c.distance / c.window, 4) for c in report.cells})
    found = {(c.window, round(c.distance / c.window, 4)): f"{c.found / c.keys:.0%}" for c in report.cells}
    rows = [(f"{place:.0%} of the window", *(found.get((w, place), "") for w in windows)) for place in places]
    table = text_table(f"{name}: passkeys found", ("distance", *map(str, windows)), rows)
    return f"{table}\nk_max (at least 20 % found): {report.k_max[name]}"


def _read_prompt() -> str:
    """Read standard input.

    Raises:
        TextError: it is closed, no text in UTF-8, or longer than any window.
    """
    from pi_gguf.errors import TextError

    hint = 'give --prompt "...", or a text in UTF-8: pi-gguf run FILE < text.txt'
    try:
        data = sys.stdin.buffer.read(_PROMPT_BYTES + 1)
        if len(data) > _PROMPT_BYTES:
            raise TextError(f"standard input: more than {_PROMPT_BYTES:,} bytes fit no window", hint)
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TextError(f"standard input: not UTF-8 at byte {error.start}", hint) from error
    except (OSError, ValueError) as error:
        raise TextError(f"standard input: cannot be read ({error})", hint) from error


def _read_small(path: str, option: str) -> str:
    """Read the text file of an option.

    Raises:
        OptionError: it is no file, no text in UTF-8, or longer than any grammar.
    """
    from pi_gguf.common.files import open_plain
    from pi_gguf.errors import OptionError, one_line

    try:
        with open_plain(Path(path)) as file:
            data = file.read(_GRAMMAR_BYTES + 1)
        if len(data) > _GRAMMAR_BYTES:
            raise OptionError(f"{option} {path}: more than {_GRAMMAR_BYTES:,} bytes", "give a smaller one")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{option} {path}: cannot be read ({one_line(error)})", "give a text file in UTF-8"
        ) from error


@_telling
@click.command("run")
@click.argument("file", metavar="FILE.gguf")
@click.option("--prompt", help="text to continue; standard input when left out")
@click.option("--max-tokens", type=int, help="limit in tokens, e.g. 100; up to 256 when left out")
@click.option("--chat", is_flag=True, help="treat the prompt as a message, with the file's chat template")
@click.option(
    "--lora", multiple=True, metavar="ADAPTER.gguf", help="adapter to apply, as --adapter-only writes it; repeatable"
)
@click.option("--n-ctx", type=int, help="window to open, in tokens; the file's own when left out")
@click.option("--type-k", default="f16", show_default=True, help="K cache: f32, f16, q8_0 or q4_0")
@click.option("--type-v", default="f16", show_default=True, help="V cache: f32, f16, q8_0 or q4_0")
@click.option(
    "--flash-attn/--no-flash-attn",
    default=None,
    help="flash attention; with all layers on a GPU or a quantized V cache by default",
)
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most probable token, e.g. 0.8")
@click.option("--top-k", default=40, show_default=True, help="draw from so many most probable tokens")
@click.option(
    "--top-p",
    default=0.95,
    show_default=True,
    help="draw from the most probable ones of this probability in all; 1: any",
)
@click.option(
    "--min-p", default=0.05, show_default=True, help="leave out what is below this share of the most probable; 0: none"
)
@click.option(
    "--repeat-penalty", default=1.0, show_default=True, help="divides logits of the last 64 tokens, e.g. 1.1; 1: none"
)
@click.option("--seed", default=0, show_default=True, help="of the sampling")
@click.option("--stop", multiple=True, metavar="TEXT", help="ends the text, e.g. --stop 'Question:'; repeatable")
@click.option("--grammar", metavar="FILE", help="llama.cpp's grammar (GBNF) of the text, e.g. answer.gbnf")
@click.option("--json-schema", metavar="FILE", help="write JSON of this schema, e.g. answer.schema.json")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda")
@click.option("--gpu-layers", type=int, help="layers on the GPU, the output matrix as one; all when left out")
def run(file: str, prompt: str | None, max_tokens: int | None, chat: bool, **options: Any) -> None:
    """Continue a prompt with a GGUF file, streaming the text.

    Temperature 0 leaves --top-k, --top-p, --min-p and --seed without effect. A grammar or schema bears --max-tokens,
    too: what is cut there is not whole.

    \b
    Example:
      pi-gguf run tiny-32k.gguf --prompt "It was a dark" --max-tokens 50
    """
    from pi_gguf.common.files import human_bytes
    from pi_gguf.common.progress import say
    from pi_gguf.runtime.model import Model
    from pi_gguf.runtime.session import Sampling, SamplingKeywords

    for name in ("grammar", "json_schema"):
        if options[name] is not None:
            options[name] = _read_small(options[name], f"--{name.replace('_', '-')}")
    settings: Any = {name: options.pop(name) for name in SamplingKeywords.__annotations__ if name in options}
    Sampling(**settings)  # what cannot work is said before a file is opened
    if prompt is None:
        prompt = _read_prompt()
    with Model(file, **options) as model:
        say(f"{file}: window {model.n_ctx} tokens, KV cache {human_bytes(model.kv_cache_bytes)}")
        settings["max_tokens"] = max_tokens
        message = [{"role": "user", "content": prompt}]
        for part in model.chat(message, **settings) if chat else model.complete(prompt, **settings):
            print_all(part, end="")
        print_all("")


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def models(as_json: bool) -> None:
    """List the families of models that are converted.

    \b
    Example:
      pi-gguf models --json
    """
    from pi_gguf.families import FAMILIES

    header = ("model_type", "models", "GGUF architecture", "Position Interpolation")
    rows = [(f.model_type, f.models, f.arch, "no: ALiBi" if f.alibi else "yes") for f in FAMILIES.values()]
    if as_json:
        print_all(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=1))
    else:
        print_all(text_table(f"{len(rows)} families", header, rows, numbers=False))


_EVALUATIONS = {
    "perplexity": (
        "Sliding-window perplexity at several windows.",
        lambda: command("evaluate.perplexity:evaluate_perplexity", _show_perplexity, name="perplexity"),
    ),
    "passkey": (
        "Passkey retrieval by distance, and k_max.",
        lambda: command("evaluate.passkey:evaluate_passkey", _show_passkey, name="passkey"),
    ),
    "needle": (
        "A needle in a haystack of prose, by window and depth.",
        lambda: command("evaluate.needle:evaluate_needle", _show_needle, name="needle"),
    ),
    "ruler": (
        "Needles, variables and counts of words; the effective length.",
        lambda: command("evaluate.ruler:evaluate_ruler", _show_ruler, name="ruler"),
    ),
    "short": (
        "Short benchmarks by lm-evaluation-harness, before and after.",
        lambda: command("evaluate.short:evaluate_short", _show_short, name="short"),
    ),
    "summarize": (
        "Summaries of long documents, by ROUGE.",
        lambda: command("evaluate.summarize:evaluate_summaries", _show_summaries, name="summarize"),
    ),
    "compare": (
        "Ways to reach a longer window without training, side by side.",
        lambda: command("evaluate.compare:compare", _show_compare),
    ),
    "matrix": (
        "What quantizations and quantized KV caches cost at depth.",
        lambda: command("evaluate.matrix:evaluate_matrix", _show_matrix, name="matrix"),
    ),
    "report": (
        "The paper's tables and figure 2 on one page, beside your numbers.",
        lambda: command("evaluate.report:evaluate_all", _show_report, name="report"),
    ),
    "bounds": (
        "The paper's bounds and attention curves on a model's own weights.",
        lambda: command("evaluate.bounds:evaluate_bounds", _show_bounds, name="bounds"),
    ),
    "kl": (
        "KL divergence from a reference, by position.",
        lambda: command("evaluate.kl:evaluate_kl", _show_kl, name="kl"),
    ),
}

_COMMANDS = {
    "plan": ("Say what a conversion would do and cost.", lambda: command("pipeline.plan:plan", _show_plan)),
    "extend": (
        "Fine-tune with Position Interpolation; write a Hugging Face folder.",
        lambda: command("tune.extend:extend", _show_extend, reports=False),
    ),
    "convert": (
        "The whole path: extend, write GGUF, quantize, check.",
        lambda: command("pipeline.convert:convert", _show_convert),
    ),
    "quantize": (
        "Quantize a GGUF file with llama.cpp.",
        lambda: command("write.quantize:quantize", _show_quantize, reports=False),
    ),
    "imatrix": (
        "Compute an importance matrix over long texts.",
        lambda: command("write.imatrix:compute_imatrix", _show_imatrix, name="imatrix"),
    ),
    "inspect": (
        "Show what a file states, what llama.cpp reads, and what is wrong.",
        lambda: command("prove.inspect:inspect", _show_inspect),
    ),
    "repair": (
        "Correct the metadata of a GGUF file; tensors stay as they are.",
        lambda: command("prove.repair:repair", _show_repair),
    ),
    "certify": (
        "Measure a GGUF file at its window and write the figures into it.",
        lambda: command("prove.certify:certify", _show_certify),
    ),
    "card": (
        "Write a model card for a GGUF file.",
        lambda: command("prove.card:card", _show_card),
    ),
    "eval": (
        "Measure a file or a model at length: the paper's suites and more.",
        lambda: Lazy("eval", _EVALUATIONS, help="Measure a file or a model at length."),
    ),
    "models": ("List the families of models that are converted.", lambda: models),
    "run": ("Continue a prompt with a GGUF file.", lambda: run),
    "demo": (
        "The main job on the bundled model, with table and plots.",
        lambda: command("pipeline.demo:demo", str, reports=True),
    ),
}

main = Lazy(
    "pi-gguf",
    _COMMANDS,
    help="Turn a RoPE checkpoint with a short window into a quantized GGUF that works at 32k tokens, and prove it.\n\n"
    "MODEL is a Hugging Face folder, a Hub id or bundled:tiny. Start with: pi-gguf demo",
    params=[
        click.Option(["--debug"], is_flag=True, help="show the traceback of an error"),
        click.Option(["--version"], is_flag=True, help="show the version", is_eager=True, expose_value=False,
                     callback=lambda ctx, _, value: _print_version(ctx) if value else None),
    ],
)  # fmt: skip


def _print_version(ctx: click.Context) -> None:
    from pi_gguf.common.provenance import package_version

    print_all(package_version())
    ctx.exit()


def entry_point() -> None:
    """Run the command line; every error but a bug ends here, as two lines and its exit code."""
    prepare_streams()  # before anything opens a file
    try:
        with signals() as state:
            code = _run_main(state)
    except KeyboardInterrupt as stop:  # met before anything had begun, or when all was done
        code = _interrupted(stop)
    sys.exit(code)


def _run_main(state: Signals) -> int:
    try:
        named_frame(f"pi-gguf {' '.join(sys.argv[1:])}", main, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "pi-gguf"
        return _refuse(" ".join(error.format_message().split()), f"{path} --help shows how it is used", error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        return _interrupted(stop)
    except Exception as error:
        if state.met:
            return _interrupted(state.met)
        known = translated(error)
        if known is None or "--debug" in sys.argv:
            raise
        return _refuse(str(known), known.hint, known.exit_code)
    return 0


def _refuse(message: str, hint: str, code: int) -> int:
    _print_error(f"error: {_as_line(message)}\nhint: {_as_line(hint)}")
    return code


def _as_line(text: str) -> str:
    """Return a text that a terminal shows on one line, as it is: names of files may hold breaks and control codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):  # a full standard error is no reason for another one
        print(text, file=sys.stderr, flush=True)


def _interrupted(stop: BaseException) -> int:
    _print_error("interrupted")
    cause = stop.__cause__ if isinstance(stop, click.Abort) else stop  # click makes one of the other
    return 128 + (cause.number if isinstance(cause, Interrupted) else signal.SIGINT)


if __name__ == "__main__":
    entry_point()
