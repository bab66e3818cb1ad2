"""The commands run and models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pi_gguf.cli.building import telling
from pi_gguf.common.endings import print_all
from pi_gguf.common.tables import text_table

_PROMPT_BYTES = 2**26


_GRAMMAR_BYTES = 2**20
"""Read of standard input at most."""


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


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return a decorator of several options, which the help shows in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Layers(click.ParamType):
    """A number of layers, or auto."""

    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"must be a number or auto, got {value!r}", param, ctx)


opening = with_options(
    [
        click.option(
            "--lora",
            multiple=True,
            metavar="ADAPTER.gguf",
            help="adapter to apply, as --adapter-only writes it; repeatable",
        ),
        click.option("--n-ctx", type=int, help="window to open, in tokens; the file's own when left out"),
        click.option("--type-k", help="K cache: f32, f16, q8_0 or q4_0  [default: q8_0 on a CPU, f16 on a GPU]"),
        click.option("--type-v", default="f16", show_default=True, help="V cache: f32, f16, q8_0 or q4_0"),
        click.option(
            "--flash-attn/--no-flash-attn",
            default=None,
            help="flash attention; with all layers on a GPU or a quantized V cache by default",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda"),
        click.option(
            "--kv",
            type=click.Choice(["auto"]),
            help="auto: fewer bits where the default types of cache do not fit free memory",
        ),
        click.option(
            "--gpu-layers",
            type=Layers(),
            default="auto",
            show_default=True,
            help="layers on the GPU, the output matrix as one; auto: as many as fit",
        ),
    ]
)
"""The options of how a file is opened."""

sampling = with_options(
    [
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the most probable token, e.g. 0.8"),
        click.option("--top-k", default=40, show_default=True, help="draw from so many most probable tokens"),
        click.option(
            "--top-p",
            default=0.95,
            show_default=True,
            help="draw from the most probable ones of this probability in all; 1: any",
        ),
        click.option(
            "--min-p",
            default=0.05,
            show_default=True,
            help="leave out what is below this share of the most probable; 0: none",
        ),
        click.option(
            "--repeat-penalty",
            default=1.0,
            show_default=True,
            help="divides logits of the last 64 tokens, e.g. 1.1; 1: none",
        ),
        click.option("--seed", default=0, show_default=True, help="of the sampling"),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="ends the text, e.g. --stop 'Question:'; repeatable"
        ),
        click.option("--grammar", metavar="FILE", help="llama.cpp's grammar (GBNF) of the text, e.g. answer.gbnf"),
        click.option("--json-schema", metavar="FILE", help="write JSON of this schema, e.g. answer.schema.json"),
    ]
)
"""The options of how the next token is chosen."""


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `sampling` out of a command's, files read; what cannot work is said before one is opened."""
    from pi_gguf.runtime.sampling import Sampling, SamplingKeywords

    for name in ("grammar", "json_schema"):
        if options[name] is not None:
            options[name] = _read_small(options[name], f"--{name.replace('_', '-')}")
    settings: Any = {name: options.pop(name) for name in SamplingKeywords.__annotations__ if name in options}
    Sampling(**settings)
    return dict(settings)


@telling
@click.command("run")
@click.argument("file", metavar="FILE.gguf")
@click.option("--prompt", help="text to continue; standard input when left out")
@click.option("--max-tokens", type=int, help="limit in tokens, e.g. 100; up to 256 when left out")
@click.option("--chat", is_flag=True, help="treat the prompt as a message, with the file's chat template")
@sampling
@opening
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

    settings = take_sampling(options)
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
