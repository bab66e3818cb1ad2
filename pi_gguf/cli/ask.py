"""The commands ask, chat and documents: a document read once and asked many times."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from pi_gguf.cli.building import Lazy, telling
from pi_gguf.cli.run import opening, sampling, take_sampling, with_options
from pi_gguf.common.endings import ctrl_c_stops, print_all
from pi_gguf.common.progress import progress_bar, say, visible
from pi_gguf.common.tables import text_table

if TYPE_CHECKING:
    from pi_gguf.runtime.chat import Conversation
    from pi_gguf.runtime.model import Model
    from pi_gguf.runtime.reading import Answer, Reading
    from pi_gguf.runtime.states import Kept, States

T = TypeVar("T")

_CUT = "the answer is not whole: it ends at the limit; --max-tokens raises it, as far as the window has room"
_ENDINGS = {
    "length": _CUT,
    "repeats": "the answer repeats itself and was ended; --repeat-penalty 1.1 or --temperature 0.7 may help",
}

caching = with_options(
    [
        click.option("--cache-dir", metavar="FOLDER", help="where what was read is kept; PI_GGUF_CACHE, or the user's "
                     "cache folder, when left out"),
        click.option("--cache-size", default="20G", show_default=True, help="what all of it may take, e.g. 500M; the "
                     "least recently used goes first"),
    ]
)  # fmt: skip
"""The options of where what was read is kept."""

reading = with_options(
    [
        click.option("--part", default="1/1", metavar="K/N", help="read the K-th of N parts, e.g. 2/3, of a document "
                     "that does not fit the window"),
        click.option("--keep/--no-keep", default=True, help="keep what was read on disk, as private as the document"),
    ]
)  # fmt: skip
"""The options of how a document is read."""


@telling
@click.command("ask")
@click.argument("file", metavar="FILE.gguf")
@click.argument("document", metavar="DOCUMENT")
@click.argument("questions", metavar="[QUESTION]...", nargs=-1)
@click.option("--max-tokens", type=int, help="limit of an answer in tokens, e.g. 100; up to 512 when left out")
@click.option("--form", help="chat (the file's chat template), question (plain question and answer) or plain (the "
              "question goes on where the document ends); by the file when left out")  # fmt: skip
@reading
@caching
@sampling
@opening
@click.option(
    "--where",
    is_flag=True,
    help="say for each answer at which passages the model looked most; needs as much memory as the KV cache once more",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON: fit, answers, and where their quotations stand")
def ask(
    file: str, document: str, questions: tuple[str, ...], max_tokens: int | None, form: str | None, where: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Ask a GGUF file about a document: txt, md, html, pdf, docx, epub, or - for standard input.

    The document is read once: what was read is kept on disk, and the next question, tomorrow too, is answered at once.
    Without a QUESTION one is read a line. Answers go to standard output, all else to standard error. A document that
    does not fit the window is refused; nothing is ever cut.

    \b
    Example:
      pi-gguf ask my-32k.gguf book.epub "Who keeps the lighthouse?"
    """
    from pi_gguf.documents.formats import read_document
    from pi_gguf.errors import OptionError, PiGgufError
    from pi_gguf.runtime.looked import check_scores
    from pi_gguf.runtime.model import Model
    from pi_gguf.runtime.reading import Reading

    settings, part = take_sampling(options), _read_part(options.pop("part"))
    states = take_states(options)
    if document == "-" and not questions and not sys.stdin.isatty():
        raise OptionError("standard input has the document, so that questions must be arguments", "give one or more")
    text = read_document(document)
    answers: list[dict[str, Any]] = []
    failed: PiGgufError | None = None
    with Model(file, **options) as model, Reading(model, text, part=part, form=form, states=states) as book:
        if where:
            check_scores(model)
        fit = _read(book)
        for question in questions or _lines(f"{text.name}> "):
            if len(questions) > 1 or not (questions or sys.stdin.isatty()):
                say(f"> {question}")
            try:
                answer = _show_answer(book.ask(question, max_tokens=max_tokens, **settings), quiet=as_json)
                answers.append(answer.to_json())
                if where and answer.text:
                    answers[-1]["looked"] = _show_looked(book, answer)
            except PiGgufError as error:  # the other answers are worth having
                answers.append({"question": question, "error": str(error)})
                if failed:
                    say(f"error: {failed}\nhint: {failed.hint}")
                failed = error
    if as_json:
        print_all(json.dumps({**fit.to_json(), "answers": answers}, indent=1))
    if failed:
        raise failed


def _show_looked(book: Reading, answer: Answer) -> list[dict[str, Any]]:
    """Say at which three passages the model looked most, and return them."""
    found = [
        {"start": start, "end": end, "place": book.document.place_of(start, end), "share": share}
        for (start, end), share in book.passages(answer)[:3]
    ]
    for one in found:
        say(f"  looked at {one['place']} ({one['share']:.0%})")
    return found


def _read(book: Reading) -> Any:
    """Say what reading takes, and read."""
    fit = book.fit()
    for line in fit.lines():
        say(line)
    if left := book.unread:
        with progress_bar(f"read {fit.document}", left, "tokens") as advance:
            book.read(on_progress=_advancing(advance, left))
    return fit


def _advancing(advance: Callable[..., None], total: int) -> Callable[[int, int, int], None]:
    """Return what moves a bar by what was read since it was told last; what `fit` has read counts."""
    before, started = 0, time.perf_counter()

    def told(read: int, to_read: int, _: int) -> None:
        nonlocal before
        now = total - to_read + read
        speed = read / (time.perf_counter() - started)
        advance(max(0, now - before), text=f"{speed:,.0f} tokens/s" if read else None)
        before = now

    return told


def _show_answer(answer: Generator[str, None, Answer], *, quiet: bool) -> Answer:
    """Print an answer as it comes, and where its quotations stand."""
    found = _print_parts(answer, quiet=quiet)
    if not quiet:
        for line in _quote_lines(found.quotes):
            say(line)
    if found.ended in _ENDINGS:
        say(_ENDINGS[found.ended])
    return found


def _print_parts(parts: Generator[str, None, T], *, quiet: bool = False) -> T:
    """Print what comes, and a line feed; return what the generator returned."""
    while True:
        try:
            part = next(parts)
        except StopIteration as end:
            if not quiet:
                print_all("")
            return cast(T, end.value)
        if not quiet:
            print_all(visible(part) if sys.stdout.isatty() else part, end="")


def _quote_lines(quotes: list[Any]) -> list[str]:
    lines = []
    for quote in quotes:
        text = quote.text if len(quote.text) <= 60 else f"{quote.text[:57]}..."
        where = "not in the document" if quote.found == "none" else quote.place
        lines.append(f'  "{" ".join(text.split())}": {where}{", about" if quote.found == "near" else ""}')
    return list(dict.fromkeys(lines))


@telling
@click.command("chat")
@click.argument("file", metavar="FILE.gguf")
@click.option("--document", metavar="PATH", help="what to talk about: txt, md, html, pdf, docx or epub")
@click.option("--system", metavar="TEXT", help="what stands before the conversation, e.g. 'Answer in one sentence.'")
@click.option("--max-tokens", type=int, help="limit of an answer in tokens; as much as the window allows when left out")
@reading
@caching
@sampling
@opening
def chat(file: str, document: str | None, system: str | None, max_tokens: int | None, **options: Any) -> None:
    """Talk with a GGUF file that has a chat template, about a document or about nothing in particular.

    What was said is not read again. Ctrl-C stops an answer, not the program. /read PATH begins anew about a document,
    /save PATH writes the conversation as Markdown, /undo takes back the last turn, /tokens says what it takes, /quit
    or Ctrl-D ends.

    \b
    Example:
      pi-gguf chat my-32k.gguf --document book.epub
    """
    from pi_gguf.runtime.chat import Conversation
    from pi_gguf.runtime.model import Model

    settings, part = take_sampling(options), _read_part(options.pop("part"))
    settings["max_tokens"] = max_tokens
    states = take_states(options)
    with Model(file, **options) as model:
        talk = Conversation(model, system)
        model.render([{"role": "user", "content": "a"}])
        if document is not None:
            talk = _about(model, document, system, part, states)
        for line in _lines("> "):
            if line.startswith("/"):
                begun = _command(talk, line, lambda path: _about(model, path, system, part, states))
                if begun is None:
                    return
                talk = begun
                continue
            _say(talk, line, settings)


def _about(model: Model, path: str, system: str | None, part: tuple[int, int], states: States | None) -> Conversation:
    from pi_gguf.documents.formats import read_document
    from pi_gguf.runtime.chat import Conversation
    from pi_gguf.runtime.reading import Reading

    book = Reading(model, read_document(path), part=part, form="chat", system=system, states=states)
    _read(book)
    return Conversation(model, system, book)


def _say(talk: Conversation, line: str, settings: dict[str, Any]) -> None:
    from pi_gguf.errors import PiGgufError

    said = len(talk.messages)
    with ctrl_c_stops() as stop:
        try:
            if _print_parts(talk.say(line, cancelled=stop.is_set, **settings)) == "length":
                say(_CUT)
        except PiGgufError as error:
            say(f"error: {error}\nhint: {error.hint}")
            return
    if len(talk.messages) == said:
        say("no answer came; what you said is left out")
        return
    for line in _quote_lines(talk.quotes()):
        say(line)


def _command(talk: Conversation, line: str, about: Callable[[str], Conversation]) -> Conversation | None:
    """Do what a line that begins with a slash says; return the conversation that goes on, None for the end."""
    from pi_gguf.common.files import check_writable, write_text
    from pi_gguf.errors import PiGgufError

    word, _, rest = line[1:].partition(" ")
    try:
        if word in ("quit", "exit"):
            return None
        if word == "read" and rest.strip():
            return about(rest.strip())
        if word == "save" and rest.strip():
            path = Path(rest.strip()).expanduser()
            check_writable(path, overwrite=False)
            write_text(path, talk.to_markdown())
            say(f"wrote {path}")
        elif word == "undo":
            say("the last turn is taken back" if talk.undo() else "nothing was said yet")
        elif word == "tokens":
            say(f"{talk.tokens:,} of {talk.model.n_ctx:,} tokens")
        else:
            say("/read PATH, /save PATH, /undo, /tokens, /quit")
    except PiGgufError as error:
        say(f"error: {error}\nhint: {error.hint}")
    return talk


def _lines(prompt: str) -> Iterator[str]:
    """Yield the lines that are typed, or those of standard input, without the empty ones."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    asked = _prompt_session(prompt)
    while True:
        try:
            line = asked().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("Ctrl-D or /quit ends")
            continue
        if line:
            yield line


def _prompt_session(prompt: str) -> Callable[[], str]:
    """Return what asks for a line, with history and editing where prompt_toolkit is installed."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return lambda: input(prompt)
    session: Any = PromptSession()

    def ask_line() -> str:
        with _own_wakeup():
            return str(session.prompt(prompt))

    return ask_line


@contextmanager
def _own_wakeup() -> Iterator[None]:
    """Give back what Python wakes up at a signal: prompt_toolkit's event loop takes it for itself."""
    import signal

    awake = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(awake, warn_on_full_buffer=False)


# What is kept


def _kept_table(found: list[Kept]) -> str:
    from pi_gguf.common.files import human_bytes

    if not found:
        return "nothing is kept"
    rows = [
        (
            one.key, one.document, one.model, f"{one.tokens:,}{'' if one.whole else ' so far'}",
            human_bytes(one.nbytes), _date(one),
        )
        for one in found
    ]  # fmt: skip
    total = human_bytes(sum(one.nbytes for one in found))
    return text_table(f"{total} kept", ("key", "document", "model", "tokens", "size", "used"), rows, numbers=False)


def _date(one: Kept) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))


@click.command("list")
@caching
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def list_documents(as_json: bool, **options: Any) -> None:
    """List what was read and is kept, the last used first.

    \b
    Example:
      pi-gguf documents list --json
    """
    found = _some_states(options).entries()
    print_all(json.dumps([one.to_json() for one in found], indent=1) if as_json else _kept_table(found))


@click.command("show")
@click.argument("name", metavar="NAME")
@caching
def show_documents(name: str, **options: Any) -> None:
    """Show what is kept of a document: NAME is that of its file, or the begin of a key.

    \b
    Example:
      pi-gguf documents show book.epub
    """
    for one in _some_states(options).named(name):
        shown = {**one.to_json(), "used": _date(one), "path": one.path}
        print_all("\n".join(f"{key}: {value}" for key, value in shown.items()))


@click.command("remove")
@click.argument("name", metavar="NAME")
@caching
def remove_documents(name: str, **options: Any) -> None:
    """Remove what is kept of a document, by its name also the text that `serve` keeps; the document itself stays.

    \b
    Example:
      pi-gguf documents remove book.epub
    """
    from pi_gguf.common.files import remove
    from pi_gguf.engine.stored import Stored
    from pi_gguf.errors import OptionError

    states = _some_states(options)
    texts = Stored(states.library)
    given = [head for head in texts.heads() if head.name == name]
    try:
        found = states.named(name)
    except OptionError:
        if not given:
            raise
        found = []
    for one in found:
        remove(one.path)
        say(f"removed {one.key}: {one.document}, {one.model}")
    for head in given:
        texts.remove(head.id)
        say(f"removed the text of {head.name}")


@click.command("prune")
@caching
def prune_documents(**options: Any) -> None:
    """Remove the least recently used until all takes no more than --cache-size.

    \b
    Example:
      pi-gguf documents prune --cache-size 5G
    """
    states = _some_states(options)
    for one in states.prune(states.limit):
        say(f"removed {one.key}: {one.document}, {one.model}")


documents = Lazy(
    "documents",
    {
        "list": ("What was read and is kept.", lambda: list_documents),
        "show": ("What is kept of one document.", lambda: show_documents),
        "remove": ("Remove what is kept of one document.", lambda: remove_documents),
        "prune": ("Remove the least recently used.", lambda: prune_documents),
    },
    help="Show and remove what was read of documents and is kept.",
)


def take_states(options: dict[str, Any]) -> States | None:
    """Return where what was read is kept, by the options of `caching`; None for nowhere."""
    from pi_gguf.common.files import parse_bytes
    from pi_gguf.runtime.states import user_states

    given, keep = options.pop("cache_dir"), options.pop("keep", True)
    limit = parse_bytes(options.pop("cache_size"), "cache-size", least=0)
    return user_states(given, limit) if keep else None


def _some_states(options: dict[str, Any]) -> States:
    from pi_gguf.errors import OptionError

    states = take_states(options)
    if states is None:
        raise OptionError("there is no cache folder", "give --cache-dir, or set PI_GGUF_CACHE")
    return states


def _read_part(text: str) -> tuple[int, int]:
    from pi_gguf.errors import OptionError

    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match:
        raise OptionError(f"part must be K/N, got {text}", "e.g. --part 2/3")
    return int(match[1]), int(match[2])
