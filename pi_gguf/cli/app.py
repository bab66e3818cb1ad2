"""The commands by name, and the one place where errors end.

Data goes to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import contextlib
import signal
import sys

import click

from pi_gguf.cli.ask import ask, chat, documents
from pi_gguf.cli.building import Lazy, command
from pi_gguf.cli.evaluate import EVALUATIONS
from pi_gguf.cli.export import EXPORTS
from pi_gguf.cli.make import show_convert, show_extend, show_imatrix, show_plan, show_quantize, show_unpack
from pi_gguf.cli.prove import show_card, show_certify, show_inspect, show_repair
from pi_gguf.cli.run import models, run
from pi_gguf.cli.serve import serve
from pi_gguf.common.endings import Signals, prepare_streams, print_all, signals, translated
from pi_gguf.common.progress import named_frame, visible
from pi_gguf.errors import Interrupted

_COMMANDS = {
    "plan": ("Say what a conversion would do and cost.", lambda: command("pipeline.plan:plan", show_plan)),
    "extend": (
        "Fine-tune with Position Interpolation; write a Hugging Face folder.",
        lambda: command("tune.extend:extend", show_extend, reports=False),
    ),
    "convert": (
        "The whole path: extend, write GGUF, quantize, check.",
        lambda: command("pipeline.convert:convert", show_convert),
    ),
    "quantize": (
        "Quantize a GGUF file with llama.cpp.",
        lambda: command("write.quantize:quantize", show_quantize, reports=False),
    ),
    "imatrix": (
        "Compute an importance matrix over long texts.",
        lambda: command("write.imatrix:compute_imatrix", show_imatrix, name="imatrix"),
    ),
    "inspect": (
        "Show what a file states, what llama.cpp reads, and what is wrong.",
        lambda: command("prove.inspect:inspect", show_inspect),
    ),
    "repair": (
        "Correct the metadata of a GGUF file; tensors stay as they are.",
        lambda: command("prove.repair:repair", show_repair),
    ),
    "unpack": (
        "Turn a GGUF file back into a Hugging Face folder.",
        lambda: command("restore.unpack:unpack", show_unpack),
    ),
    "certify": (
        "Measure a GGUF file at its window and write the figures into it.",
        lambda: command("prove.certify:certify", show_certify),
    ),
    "card": (
        "Write a model card for a GGUF file.",
        lambda: command("prove.card:card", show_card),
    ),
    "eval": (
        "Measure a file or a model at length: the paper's suites and more.",
        lambda: Lazy("eval", EVALUATIONS, help="Measure a file or a model at length."),
    ),
    "export": (
        "Ready a GGUF file for other programs.",
        lambda: Lazy("export", EXPORTS, help="Ready a GGUF file for other programs."),
    ),
    "models": ("List the families of models that are converted.", lambda: models),
    "ask": ("Ask a GGUF file about a long document, which is read once.", lambda: ask),
    "chat": ("Talk with a GGUF file, about a document too.", lambda: chat),
    "documents": ("What was read of documents and is kept.", lambda: documents),
    "serve": ("Serve a GGUF file: a page for documents, and OpenAI's API.", lambda: serve),
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
    "MODEL is a Hugging Face folder, a Hub id, a GGUF file or bundled:tiny. Start with: pi-gguf demo",
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
    _print_error(f"error: {visible(message, '')}\nhint: {visible(hint, '')}")
    return code


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):  # a full standard error is no reason for another one
        print(text, file=sys.stderr, flush=True)


def _interrupted(stop: BaseException) -> int:
    _print_error("interrupted")
    cause = stop.__cause__ if isinstance(stop, click.Abort) else stop  # click makes one of the other
    return 128 + (cause.number if isinstance(cause, Interrupted) else signal.SIGINT)


if __name__ == "__main__":
    entry_point()
