"""ask, chat and documents on the command line: answers on standard output, all else on standard error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from books import CHATML, with_template, words

from pi_gguf.documents.formats import Document
from pi_gguf.documents.quotes import Quote
from pi_gguf.engine.stored import Head, Stored, document_id
from pi_gguf.gguf.certificate import Certificate, store
from pi_gguf.runtime import reading as module
from pi_gguf.runtime.session import Session

WINDOW = ("--n-ctx", "2048")
SHORT = ("--max-tokens", "8")


@pytest.fixture
def chat_path(tiny_gguf, tmp_path):
    return with_template(tiny_gguf, tmp_path / "chat.gguf", CHATML)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PI_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "documents"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(words(400))
    return path


@pytest.fixture
def typed(monkeypatch):
    """Give lines, or bytes, to standard input, which is no terminal."""

    def give(text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def kept(cli) -> list[dict[str, object]]:
    code, out, _ = cli("documents", "list", "--json")
    assert code == 0
    return json.loads(out)


# ask


def test_questions_are_answered_on_standard_output(tiny_gguf, book, cli):
    code, out, err = cli("ask", tiny_gguf, book, "Who is it?", "And the sea?", *WINDOW, *SHORT)
    assert code == 0 and len(out.splitlines()) >= 2 and "book.txt: " in err and "was never measured" in err
    assert "kept" not in err and len(kept(cli)) == 1
    again = cli("ask", tiny_gguf, book, "Who is it?", "And the sea?", *WINDOW, *SHORT)
    assert again[:2] == (0, out) and "were read before and are kept" in again[2]
    one = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT, "--quiet")
    assert one[0] == 0 and out.startswith(one[1]) and one[2] == ""
    unkept = cli(
        "ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT, "--no-keep", "--cache-dir", book.parent / "other"
    )
    assert unkept[:2] == one[:2] and not (book.parent / "other").exists()


def test_a_bar_ends_at_its_end(tiny_gguf, book, cli, monkeypatch):
    bars, said = [], []

    @contextlib.contextmanager
    def bar(title, total, unit):
        bars.append((title, total, []))
        yield lambda amount, text: bars[-1][2].append(amount) or said.append(text)

    monkeypatch.setattr("pi_gguf.cli.ask.progress_bar", bar)
    book.write_text(words(900))
    assert cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)[0] == 0
    ((title, total, steps),) = bars
    assert title == "read book.txt" and sum(steps) == total and min(steps) >= 0
    assert said[-1].endswith(" tokens/s") and int(said[-1].removesuffix(" tokens/s").replace(",", "")) > 0
    assert total == kept(cli)[0]["tokens"] - 256, "all but what was read to see how fast that goes"


def test_json_has_the_fit_and_the_answers(tiny_gguf, book, cli):
    text = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)[1]
    code, out, _ = cli("ask", tiny_gguf, book, "Who is it?", "And the sea?", *WINDOW, *SHORT, "--json")
    found = json.loads(out)
    assert code == 0 and found["document"] == "book.txt" and found["window"] == 2048
    assert found["known"] == found["tokens"] == kept(cli)[0]["tokens"]
    assert [one["question"] for one in found["answers"]] == ["Who is it?", "And the sea?"]
    assert found["answers"][0]["text"] == text.removesuffix("\n") and found["answers"][0]["tokens"] == 8


def test_quotations_are_shown_with_their_places(tiny_gguf, book, cli, monkeypatch):
    quoted = " ".join(words(400).split()[100:110])
    monkeypatch.setattr(
        "pi_gguf.runtime.reading.stream", lambda *_: iter([f'It is "{quoted}" and "nothing of the kind at all".'])
    )
    code, out, err = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, "--form", "plain")
    assert code == 0 and "nothing of the kind" in out and '"nothing of the kind at all": not in the document' in err
    assert f'"{quoted[:20]}' in err and "characters " in err.split(quoted[:20])[1]


def test_questions_come_line_by_line(tiny_gguf, book, cli, typed):
    expected = cli("ask", tiny_gguf, book, "Who is it?", "And the sea?", *WINDOW, *SHORT)[1]
    typed("Who is it?\r\n\n  \nAnd the sea?")
    assert cli("ask", tiny_gguf, book, *WINDOW, *SHORT)[:2] == (0, expected)
    typed("")
    assert cli("ask", tiny_gguf, book, *WINDOW)[:2] == (0, "")


def test_a_document_from_standard_input_needs_questions_as_arguments(tiny_gguf, book, cli, typed):
    expected = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)[1]
    typed(book.read_bytes())
    assert cli("ask", tiny_gguf, "-", "Who is it?", *WINDOW, *SHORT)[:2] == (0, expected)
    typed(book.read_bytes())
    code, out, err = cli("ask", tiny_gguf, "-", *WINDOW)
    assert (code, out) == (2, "") and "questions must be arguments" in err


def test_a_document_that_does_not_fit_is_refused_and_its_parts_are_read(tiny_gguf, book, cli):
    book.write_text("\n\n".join(words(100, 100 * k) for k in range(8)))
    code, out, err = cli("ask", tiny_gguf, book, "Who is it?", "--n-ctx", "1024", *SHORT)
    assert (code, out) == (2, "") and "128 for question and answer do not fit the window of 1,024" in err
    parts = int(err.split("--part 1/")[1].split(",")[0])
    texts = set()
    for k in range(1, parts + 1):
        code, out, err = cli("ask", tiny_gguf, book, "Who is it?", "--n-ctx", "1024", "--part", f"{k}/{parts}", *SHORT)
        assert code == 0 and f"book.txt, part {k} of {parts}: " in err
        texts.add(out)
    assert len(texts) == parts and len(kept(cli)) == parts
    for part, message in (("0/2", "part must be K/N"), ("3/2", "part must be K/N"), ("a", "part must be K/N, got a")):
        code, _, err = cli("ask", tiny_gguf, book, "a", "--part", part)
        assert code == 2 and message in err


@pytest.mark.parametrize(
    ("name", "content", "options", "code", "message"),
    [
        ("none.txt", None, (), 5, "none.txt: cannot be read (No such file"),
        ("book.pdf", b"%PDF-1.7\nbroken", (), 5, "book.pdf"),
        ("book.txt", b"\n \n", (), 5, "book.txt"),
        (
            "book.txt",
            b"text",
            ("--cache-size", "many"),
            2,
            "cache-size must be a number of bytes such as 500M or 4G, got 'many'",
        ),
        ("book.txt", b"text", ("--temperature", "-1"), 2, "temperature must be 0, or 0.01"),
        ("book.txt", b"text", ("--form", "verse"), 2, "form must be one of"),
        ("book.txt", b"text", ("--max-tokens", "0"), 2, "max_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_two_lines(tiny_gguf, cli, tmp_path, name, content, options, code, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended, out, err = cli("ask", tiny_gguf, tmp_path / name, "Who?", "--n-ctx", "512", "--quiet", *options)
    assert (ended, out) == (code, "") and message in err, err
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_a_certified_file_says_how_far_it_was_measured(tmp_path, tiny_gguf, book, cli):
    certified = tmp_path / "certified.gguf"
    for k_max, said in (
        (600, "; k_max 600: answers about what lies further back may be wrong"), (5000, "; k_max 5,000"), (None, ""),
    ):  # fmt: skip
        shutil.copyfile(tiny_gguf, certified)
        found, asked = (1, 4) if k_max else (None, None)
        made = Certificate(
            window=9000, perplexity={1024: 9.0, 9000: 9.5}, reference_perplexity=9.0, reference="itself",
            ppl_ratio=1.1, k_max=k_max, passkeys_found=found, passkeys_asked=asked, kl_divergence=None,
            top1_agreement=None, against=None, text="a", text_sha256="b", date="2026-01-01", seconds=1.0,
            device="cpu", versions="c",
        )  # fmt: skip
        store(certified, made)
        _, _, err = cli("ask", certified, book, "Who is it?", *WINDOW, *SHORT)
        assert f"this file was measured to 9,000 tokens{said}\n" in err and "was never measured" not in err
    other = with_template(certified, tmp_path / "other.gguf", CHATML)
    _, _, err = cli("ask", other, book, "Who is it?", *WINDOW, *SHORT)
    assert "was never measured: pi-gguf certify FILE measures it" in err, "a certificate of another header is none"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_reading_keeps_what_was_read(tiny_gguf, book, cli, monkeypatch, number):
    decode, calls = Session._decode, []

    def signalled(self, part, first):
        decode(self, part, first)
        calls.append(len(part))
        if len(calls) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "_PROBE", 128)
    monkeypatch.setattr(module, "_CHUNK", 128)
    monkeypatch.setattr(Session, "_decode", signalled)
    code, out, err = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)
    assert (code, out) == (128 + number, "") and err.endswith("interrupted\n")
    monkeypatch.setattr(Session, "_decode", decode)
    (one,) = kept(cli)
    assert one["tokens"] == sum(calls) and not one["whole"]
    assert " so far" in cli("documents", "list")[1]
    code, out, err = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)
    assert code == 0 and f"{sum(calls):,} tokens of it were read before" in err
    assert out == cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT, "--no-keep")[1]


def test_without_a_home_the_answer_still_comes(tiny_gguf, book, cli, monkeypatch):
    monkeypatch.delenv("PI_GGUF_CACHE")
    expected = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)[1]

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    code, out, err = cli("ask", tiny_gguf, book, "Who is it?", *WINDOW, *SHORT)
    assert (code, out) == (0, expected) and err.count("nothing that is read is kept") == 1
    code, _, err = cli("documents", "list")
    assert code == 2 and "there is no cache folder" in err


# documents


def test_what_is_kept_is_listed_shown_and_removed(tiny_gguf, book, cli, cache):
    assert cli("documents", "list")[:2] == (0, "nothing is kept\n") and kept(cli) == []
    other = book.with_name("other.txt")
    other.write_text(words(300, 5000))
    for document in (book, other):
        cli("ask", tiny_gguf, document, "a", *WINDOW, *SHORT)
    last, first = kept(cli)
    assert (last["document"], first["document"]) == ("other.txt", "book.txt") and first["model"] == "model.gguf"
    table = cli("documents", "list")[1]
    assert first["key"] in table and f"{first['tokens']:,}" in table
    shown = cli("documents", "show", "book.txt")[1]
    assert f"key: {first['key']}" in shown and str(cache) in shown and "other.txt" not in shown
    code, out, err = cli("documents", "remove", first["key"][:6])
    assert (code, out) == (0, "") and f"removed {first['key']}: book.txt, model.gguf" in err and book.exists()
    assert [one["document"] for one in kept(cli)] == ["other.txt"]
    for command in ("show", "remove"):
        code, _, err = cli("documents", command, "book.txt")
        assert code == 2 and "book.txt: nothing of this name is kept" in err
    assert cli("documents", "prune", "--cache-size", "1G")[2] == ""
    assert "other.txt" in cli("documents", "prune", "--cache-size", "0")[2] and kept(cli) == []


def test_removed_by_its_name_the_text_that_a_server_keeps_is_gone_too(tiny_gguf, book, cli, cache):
    library = Stored(cache.with_name("library"))
    for name in ("book.txt", "given.txt", "other.txt"):
        given = Document(name, "txt", words(50))
        library.keep(Head(document_id(given), name, "txt", len(given.text)), given)
    cli("ask", tiny_gguf, book, "a", *WINDOW, *SHORT)
    code, _, err = cli("documents", "remove", "book.txt")
    assert code == 0 and "book.txt, model.gguf" in err and "removed the text of book.txt" in err
    code, _, err = cli("documents", "remove", "given.txt")
    assert code == 0 and err == "removed the text of given.txt\n"
    assert [head.name for head in library.heads()] == ["other.txt"]
    assert cli("documents", "remove", "given.txt")[0] == 2


def test_sizes_are_decimal(tiny_gguf, book, cli, cache):
    cli("ask", tiny_gguf, book, "a", *WINDOW, *SHORT)
    size = kept(cli)[0]["bytes"]
    assert 100_000 < size < 10**8
    for keeps in (f"{size / 1e3 + 1:.0f}k", f"{size / 1e6 + 0.01:.2f} MB".replace(" ", ""), "1T", str(size)):
        assert cli("documents", "prune", "--cache-size", keeps)[2] == "", keeps
    _, _, err = cli(
        "ask", tiny_gguf, book, "b", *WINDOW, *SHORT, "--cache-size", f"{size - 1}", "--cache-dir", book.parent / "two"
    )
    assert "book.txt is not kept: it takes " in err
    assert cli("documents", "prune", "--cache-size", f"{size - 1}")[2].startswith("removed ")


# chat


def test_a_conversation_by_lines(chat_path, book, cli, typed, tmp_path):
    saved = tmp_path / "talk.md"
    said = ("Who is it?", "/tokens", "And the sea?", "/undo", "/undo", "/undo", "Who is it?", f"/save {saved}")
    typed("\n".join([*said, f"/save {saved}", "/help", "/quit", "not said", ""]))
    code, out, err = cli("chat", chat_path, *WINDOW, *SHORT, "--system", "Be short.")
    assert code == 0 and "not said" not in saved.read_text()
    once = ("of 2,048 tokens", "nothing was said yet", f"wrote {saved}", "/read PATH", f"error: {saved}: exists")
    for part in ("the last turn is taken back", *once):
        assert err.count(part) == (2 if part.startswith("the last") else 1), part
    assert saved.read_text().startswith("**You:** Who is it?\n\n")
    answered = saved.read_text().split("\n\n", 1)[1].strip()
    assert out.count(answered) >= 2, "the same again after it was taken back"


def test_a_conversation_about_a_document(chat_path, book, cli, typed):
    typed("Who is it?\n")
    code, one, err = cli("chat", chat_path, "--document", book, *WINDOW, *SHORT)
    assert code == 0 and "book.txt: " in err and len(kept(cli)) == 1
    typed(f"/read {book.parent / 'none.txt'}\n/read {book}\nWho is it?\n{words(1500)}\nWho is it?\n")
    code, out, err = cli("chat", chat_path, *WINDOW, *SHORT)
    assert code == 0 and out.startswith(one) and "are kept" in err
    assert "none.txt: cannot be read" in err and "do not fit the window of 2048" in err
    assert len(out) > len(one), "it goes on after an error"


def test_a_conversation_needs_a_template(tiny_gguf, cli, typed):
    typed("a\n")
    code, out, err = cli("chat", tiny_gguf, *WINDOW)
    assert (code, out) == (6, "") and "chat_template is missing" in err


def test_ctrl_c_stops_an_answer_and_not_the_program(chat_path, cli, typed, monkeypatch):
    decode, calls = Session._decode, []

    def signalled(self, part, first):
        decode(self, part, first)
        calls.append(len(part))
        if len(calls) in (4, 9):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Session, "_decode", signalled)
    typed("Who is it?\n/tokens\nAnd now?\n/tokens\n")
    code, out, err = cli("chat", chat_path, *WINDOW, "--max-tokens", "40")
    assert code == 0 and err.count("of 2,048 tokens") == 2 and "interrupted" not in err
    assert len(calls) < 12 and out.count("\n") >= 2


def test_a_second_question_is_not_stopped_by_the_ctrl_c_of_the_first(chat_path, cli, typed, monkeypatch):
    decode, calls = Session._decode, []

    def signalled(self, part, first):
        decode(self, part, first)
        calls.append(len(part))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Session, "_decode", signalled)
    typed("Who is it?\nAnd now?\n")
    assert cli("chat", chat_path, *WINDOW, *SHORT)[0] == 0
    assert len(calls) == 3 + 8


def test_an_error_keeps_the_other_answers(tiny_gguf, book, cli):
    book.write_text(words(900))
    questions = ("Who is it?", "word " * 3000, "And the sea?")
    code, out, err = cli("ask", tiny_gguf, book, *questions, *WINDOW, *SHORT, "--json")
    found = json.loads(out)["answers"]
    assert code != 0 and [one["question"] for one in found] == list(questions)
    assert "do not fit the window" in found[1]["error"] and found[0]["tokens"] == found[2]["tokens"] == 8
    assert err.count("do not fit the window") == 1


def test_no_answer_shows_no_quotation_of_the_one_before(chat_path, book, cli, typed, monkeypatch):
    write, quote = Session.write, "She is the one who went on board"

    def stopped(self, ids, *args, **options):
        if "And now?" in b"".join(map(self.piece, ids)).decode(errors="ignore"):
            return "cancelled"
        return (yield from write(self, ids, *args, **options))

    monkeypatch.setattr(Session, "write", stopped)
    monkeypatch.setattr("pi_gguf.runtime.chat.Conversation.quotes", lambda self: [Quote(quote, 0, 1, "none")])
    typed("Who is it?\nAnd now?\n/tokens\n")
    code, _, err = cli("chat", chat_path, "--document", book, *WINDOW, "--max-tokens", "5")
    assert code == 0 and err.count(quote) == 1 and err.count("no answer came") == 1
