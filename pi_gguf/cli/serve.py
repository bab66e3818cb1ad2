"""The command serve."""

from __future__ import annotations

from typing import Any

import click

from pi_gguf.cli.ask import caching, take_states
from pi_gguf.cli.building import telling
from pi_gguf.cli.run import opening


@telling
@click.command("serve")
@click.argument("file", metavar="FILE.gguf")
@click.option("--host", default="127.0.0.1", show_default=True, help="where to listen; others than this machine reach "
              "the server at 0.0.0.0, and need a key")  # fmt: skip
@click.option("--port", default=8080, show_default=True, help="0 takes a free one")
@click.option("--slots", default=4, show_default=True, help="texts that are worked on at a time; they share the "
              "cache of one window")  # fmt: skip
@click.option("--queue", default=64, show_default=True, help="requests that may wait; more are told to come again")
@click.option("--form", help="what stands around document and question: chat (the file's chat template), question or "
              "plain; by the file when left out")  # fmt: skip
@click.option("--keep/--no-keep", default=True, help="keep documents and what was read of them on disk, as private as "
              "they are")  # fmt: skip
@caching
@click.option("--api-key", envvar="PI_GGUF_API_KEY", metavar="KEY", help="what every client has to send; "
              "PI_GGUF_API_KEY shows it to fewer eyes than the command line")  # fmt: skip
@click.option("--cors", multiple=True, metavar="ORIGIN", help="pages elsewhere that may ask, e.g. https://example.org; "
              "repeatable")  # fmt: skip
@click.option("--allow-host", multiple=True, metavar="NAME", help="another name of the server, e.g. desk.local; "
              "repeatable")  # fmt: skip
@click.option("--log-content", is_flag=True, help="log what is asked and answered, too")
@opening
def serve(file: str, slots: int, queue: int, form: str | None, log_content: bool, **options: Any) -> None:
    """Serve a GGUF file: a page to ask long documents, and OpenAI's API for applications.

    Requests are answered side by side, a document is read behind them and kept. Without --host only this machine
    reaches the server. --n-ctx is the window of each request; --kv auto takes a cache that fits.

    \b
    Example:
      pi-gguf serve my-32k.gguf
    """
    from pi_gguf.errors import OptionError

    try:
        from pi_gguf.server import serve as server
    except ImportError as error:
        name = (error.name or "a library").partition(".")[0]
        raise OptionError(f"{name} is not installed", "pip install 'pi-gguf[serve]'") from error
    address = server.Address(**{name: options.pop(name) for name in ("host", "port", "api_key", "cors", "allow_host")})
    states = take_states(options)
    server.serve(
        file, address, slots=slots, queue=queue, form=form, states=states, log_content=log_content, options=options
    )
