"""Documents of a server: read behind all answers, kept, found again by another process, and asked about."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from books import CHATML, with_template, words

import pi_gguf
from pi_gguf.documents.formats import Document
from pi_gguf.engine.engine import Engine
from pi_gguf.engine.jobs import Ended, Event, Job, Read, Written
from pi_gguf.engine.library import Library, UnknownDocument
from pi_gguf.errors import GgufError, OptionError, ResourceError, TextError
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.reading import DocumentTooLong, Reading
from pi_gguf.runtime.session import TooLong
from pi_gguf.runtime.states import States

WINDOW = 4096
BOOK = words(1500)
QUESTION = [{"role": "user", "content": "What did the captain say?"}]


@pytest.fixture(scope="module")
def model(tiny_gguf) -> Iterator[Model]:
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16", sequences=5) as model:
        yield model


@contextlib.asynccontextmanager
async def library(model: Model, folder: Path, *, form: str | None = None) -> AsyncIterator[Library]:
    """A library as a server has it, its engine beside it."""
    with Engine(model, states=States(folder / "documents")) as engine:
        books = Library(engine, folder / "library", form=form)
        try:
            yield books
        finally:
            await books.close()
            await asyncio.to_thread(engine.close)


async def whole(books: Library, id: str) -> list[str]:
    """Wait until nothing happens to a document; return what it was in turn."""
    return [entry.status async for entry in books.watch(id)]


async def asked(books: Library, id: str, messages: list[dict[str, str]] = QUESTION, limit: int = 12) -> list[Event]:
    ids, _ = books.chat_ids(id, messages)
    return [event async for event in books.run(id, Job(ids, limit))]


def answer(told: list[Event]) -> tuple[str, Ended]:
    assert isinstance(told[-1], Ended)
    return "".join(event.text for event in told if isinstance(event, Written)), told[-1]


def alone(tiny_gguf: Path, text: str, question: str, limit: int = 12) -> str:
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16") as model:
        return "".join(Reading(model, Document("book.txt", "txt", text)).ask(question, max_tokens=limit))


def test_a_document_is_read_kept_and_asked_about(model, tiny_gguf, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            entry, new = await books.add("folder/book.txt", BOOK.encode())
            assert new and entry.name == "book.txt" and entry.tokens > 1000 and entry.room == WINDOW - entry.tokens
            assert (await whole(books, entry.id))[-1] == "kept"
            entry = books.entry(entry.id)
            assert entry.read == entry.tokens and entry.kept_bytes > 0 and not entry.error
            assert "never measured" in entry.trust
            read = books._engine.figures().read_tokens
            text, ended = answer(await asked(books, entry.id))
            assert text == alone(tiny_gguf, BOOK, QUESTION[0]["content"])
            assert ended.known >= entry.tokens
            assert books._engine.figures().read_tokens - read < 40
            again, new = await books.add("book.txt", BOOK.encode())
            assert (again.id, new, again.status) == (entry.id, False, "kept")
            assert [one.id for one in books.entries()] == [entry.id]

    asyncio.run(all_of_it())
    for path in (*tmp_path.glob("library/*.json"), *tmp_path.glob("documents/*.state")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(list(tmp_path.glob("documents/*.state"))) == 1


def test_another_process_finds_it_and_reads_nothing(model, tmp_path):
    async def first() -> tuple[str, str]:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            await whole(books, entry.id)
            return entry.id, answer(await asked(books, entry.id))[0]

    async def second(id: str) -> tuple[str, int, int]:
        async with library(model, tmp_path) as books:
            (entry,) = books.entries()
            assert (entry.id, entry.status, entry.name, entry.format) == (id, "kept", "book.txt", "txt")
            text, ended = answer(await asked(books, id))
            return text, ended.known, entry.tokens

    id, text = asyncio.run(first())
    again, known, tokens = asyncio.run(second(id))
    assert again == text and known == tokens


def test_a_question_comes_before_the_reading_of_others_and_after_its_own(model, tmp_path):
    """Asked while it waits behind another document: it is read first, with progress, and then answered."""
    other = words(1900, 2000)

    async def both() -> list[str]:
        async with library(model, tmp_path) as books:
            first, _ = await books.add("other.txt", other.encode())
            second, _ = await books.add("book.txt", BOOK.encode())
            told = await asked(books, first.id)
            reads = [event for event in told if isinstance(event, Read)]
            assert reads and reads[-1].read <= reads[-1].to_read
            assert answer(told)[1].known >= first.tokens
            await whole(books, second.id)
            return [books.entry(one.id).status for one in (first, second)]

    assert asyncio.run(both()) == ["kept", "kept"]


def test_reading_can_be_stopped_and_goes_on_where_it_was(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            async for now in books.watch(entry.id):
                if now.read:
                    await books.stop(entry.id)
            stopped = books.entry(entry.id)
            assert stopped.status == "unread" and 0 < stopped.read < stopped.tokens
            assert len(list(tmp_path.glob("documents/*.state"))) == 1
            before = books._engine.figures().read_tokens
            books.read(entry.id)
            assert (await whole(books, entry.id))[-1] == "kept"
            assert 0 < books._engine.figures().read_tokens - before <= stopped.tokens - stopped.read
            assert len(list(tmp_path.glob("documents/*.state"))) == 1, "what was kept on the way is gone"

    asyncio.run(all_of_it())


def test_one_that_waits_is_asked_stopped_and_removed_at_once(model, tmp_path):
    """Behind a long document that is read: a question goes before it, the others need not wait for it."""

    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            gate = threading.Event()
            books._engine.call(gate.wait)
            long, _ = await books.add("long.txt", BOOK.encode())
            others = [(await books.add(f"{name}.txt", f"{name} {words(60)}".encode()))[0].id for name in "abc"]
            assert [books.entry(id).status for id in others] == ["waiting"] * 3
            await books.stop(others[0])
            assert books.entry(others[0]).status == "unread"
            await books.remove(others[1])
            question = asyncio.create_task(asked(books, others[2]))
            while books.entry(others[2]).status != "reading":
                await asyncio.sleep(0.01)
            assert books.entry(long.id).status == "reading", "neither waits for the other's end"
            while not books._engine.figures().waiting:
                await asyncio.sleep(0.01)
            assert not books._engine._waiting[-1].job.background, "and the one asked about goes first"
            gate.set()
            assert answer(await question)[0]
            assert books.entry(others[2]).status == "kept"
            await whole(books, long.id)
            assert answer(await asked(books, others[0]))[0]

    asyncio.run(all_of_it())


def test_given_twice_at_once_it_is_one(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            given = await asyncio.gather(*(books.add("book.txt", BOOK.encode()) for _ in range(3)))
            assert sum(new for _, new in given) == 1 and len({entry.id for entry, _ in given}) == 1
            await whole(books, given[0][0].id)
            await books.remove(given[0][0].id)
            assert books.entries() == []

    asyncio.run(all_of_it())
    assert not list(tmp_path.glob("*/*"))


def test_two_that_are_tokenized_side_by_side_are_one(model, tmp_path, monkeypatch):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            both, tokenized = threading.Barrier(2), books._reading_of
            monkeypatch.setattr(books, "_reading_of", lambda document: (both.wait(60), tokenized(document))[1])
            given = await asyncio.gather(*(books.add("book.txt", BOOK.encode()) for _ in range(2)))
            assert sorted(new for _, new in given) == [False, True]
            assert len(books._turn) == 1, "and it is read once"

    asyncio.run(all_of_it())


def test_given_again_while_it_is_removed_it_is_there(model, tmp_path):
    async def all_of_it() -> str:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            async for now in books.watch(entry.id):
                if now.read:
                    break
            _, (again, new) = await asyncio.gather(books.remove(entry.id), books.add("book.txt", BOOK.encode()))
            assert new and again.id == entry.id
            assert (await whole(books, again.id))[-1] == "kept"
            return again.id

    id = asyncio.run(all_of_it())
    assert (tmp_path / "library" / f"{id}.json").exists() and len(list(tmp_path.glob("documents/*.state"))) == 1


def test_what_was_stopped_is_not_whole_for_another_process(model, tmp_path):
    async def first() -> tuple[str, int]:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            async for now in books.watch(entry.id):
                if now.read:
                    await books.stop(entry.id)
            return entry.id, books.entry(entry.id).tokens

    async def second(id: str) -> tuple[str, int, int]:
        async with library(model, tmp_path) as books:
            entry = books.entry(id)
            _, ended = answer(await asked(books, id))
            assert ended.known >= entry.tokens, "all of it was read before the question"
            return entry.status, entry.read, books._engine.figures().read_tokens

    id, tokens = asyncio.run(first())
    status, read, read_now = asyncio.run(second(id))
    assert status == "unread" and 0 < read < tokens
    assert read_now <= tokens - read + 40


def test_two_of_the_same_text_share_what_was_read(model, tmp_path):
    """And one of them stays whole when the other is removed."""

    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            a, _ = await books.add("a.txt", BOOK.encode())
            await whole(books, a.id)
            read = books._engine.figures().read_tokens
            b, _ = await books.add("b.txt", BOOK.encode())
            await whole(books, b.id)
            assert a.id != b.id and books._engine.figures().read_tokens == read
            await books.remove(a.id)
            assert books.entry(b.id).kept_bytes > 0 and books.entry(b.id).status == "kept"
            await books.remove(b.id)

    asyncio.run(all_of_it())
    assert not list(tmp_path.glob("documents/*"))


def test_who_leaves_while_it_is_looked_leaves_no_work_behind(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            text, _ = answer(await asked(books, entry.id, limit=60))
            gate = threading.Event()
            books._engine.call(gate.wait)
            tasks = [asyncio.create_task(books.looked(entry.id, QUESTION, text)) for _ in range(4)]
            while not books._looking.locked():
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0.1)
            assert books._looking.locked(), "its thread still waits for the engine"
            gate.set()
            await asyncio.wait(tasks)
            assert not books._looking.locked() and all(task.cancelled() for task in tasks)
            assert len(await books.looked(entry.id, QUESTION, text)) > 1

    asyncio.run(all_of_it())


def test_an_error_of_reading_names_no_folder(model, tmp_path, monkeypatch):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            broken = ResourceError(f"{model.path}: llama.cpp could not read a batch")
            monkeypatch.setattr(books._engine._batch, "read", lambda: (_ for _ in ()).throw(broken))
            entry, _ = await books.add("book.txt", BOOK.encode())
            assert (await whole(books, entry.id))[-1] == "failed"
            failed = books.entry(entry.id)
            assert failed.error.startswith(f"{model.path.name}: llama.cpp could not") and "/" not in failed.error
            monkeypatch.undo()
            assert answer(await asked(books, entry.id))[0], "it is read again when it is asked about"

    asyncio.run(all_of_it())


def test_closing_keeps_what_was_read(model, tmp_path):
    async def first() -> int:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            async for now in books.watch(entry.id):
                if now.read:
                    return now.read
        raise AssertionError

    async def second() -> int:
        async with library(model, tmp_path) as books:
            (entry,) = books.entries()
            assert answer(await asked(books, entry.id))[0]
            return entry.tokens - books._engine.figures().read_tokens

    read = asyncio.run(first())
    assert asyncio.run(second()) >= read - 60


def test_removing_forgets_text_and_state(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            await whole(books, entry.id)
            await books.remove(entry.id)
            assert books.entries() == []
            for ask in (books.entry, books.read, lambda id: books.quotes(id, "a"), lambda id: books.text(id, 0, 1)):
                with pytest.raises(UnknownDocument):
                    ask(entry.id)
            with pytest.raises(UnknownDocument):
                await books.remove(entry.id)
            reading, _ = await books.add("book.txt", BOOK.encode())
            await books.remove(reading.id)

    asyncio.run(all_of_it())
    assert list(tmp_path.glob("library/*")) == list(tmp_path.glob("documents/*")) == []


def test_what_is_no_document_or_too_long_is_refused_and_leaves_nothing(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            for name, data, error in (
                ("a.txt", b"", TextError),
                ("a.pdf", b"%PDF-1.7 nothing", TextError),
                ("a.docx", b"PK\x03\x04 broken", TextError),
                ("a.txt", b"\xff\xfe\x00", TextError),
                ("long.txt", words(9000).encode(), DocumentTooLong),
            ):
                with pytest.raises(error) as caught:
                    await books.add(name, data)
                assert str(tmp_path) not in str(caught.value)
            assert caught.value.window == WINDOW < caught.value.tokens
            assert books.entries() == []

    asyncio.run(all_of_it())
    assert not list(tmp_path.glob("library/*"))


def test_a_state_that_is_gone_is_made_again(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            await whole(books, entry.id)
            before = answer(await asked(books, entry.id))[0]
        for path in tmp_path.glob("documents/*.state"):
            path.unlink()
        async with library(model, tmp_path) as books:
            assert books.entry(entry.id).status == "unread"
            assert answer(await asked(books, entry.id))[0] == before
            assert books.entry(entry.id).status == "kept"

    asyncio.run(all_of_it())


def test_damaged_files_of_the_library_are_left_out(model, tmp_path, capfd):
    async def given() -> str:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            await whole(books, entry.id)
            return entry.id

    id = asyncio.run(given())
    path = tmp_path / "library" / f"{id}.json"
    head, body = path.read_bytes().split(b"\n")[:2]

    async def entries() -> list[str]:
        async with library(model, tmp_path) as books:
            return [entry.id for entry in books.entries()]

    path.write_bytes(head + b"\n" + body[:50])
    assert asyncio.run(entries()) == [id]

    async def text() -> None:
        async with library(model, tmp_path) as books:
            with pytest.raises(GgufError, match="text is not kept"):
                books.text(id, 0, 5)

    asyncio.run(text())
    path.write_bytes(head[:20])
    assert asyncio.run(entries()) == [] and not path.exists()
    assert "not used and removed" in capfd.readouterr().err


def test_quotes_and_text_stand_in_the_document(model, tmp_path, monkeypatch):
    sentence = "The lighthouse stood at the end of the grey pier, and nobody kept it."

    async def all_of_it() -> None:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("a.md", f"# One\n\nFirst.\n\n# Two\n\n{sentence}\n".encode())
            (quote,) = books.quotes(entry.id, f'It says "{sentence}" somewhere.')
            assert quote["found"] == "exact"
            shown = books.text(entry.id, quote["start"], quote["end"])
            assert shown["text"] == sentence and shown["place"].startswith("Two")
            assert books.quotes(entry.id, '"something that was never written there at all"')[0]["found"] == "none"
            monkeypatch.setattr("pi_gguf.engine.library._SHOWN", 7)
            assert books.text(entry.id, 2, 40)["text"] == "One\n\nFi" and books.text(entry.id, 2, 40)["end"] == 9
            for start, end in ((-1, 3), (3, 3), (0, 10**6)):
                with pytest.raises(OptionError):
                    books.text(entry.id, start, end)

    asyncio.run(all_of_it())


def test_where_it_looked_is_what_a_reading_sees(model, tiny_gguf, tmp_path):
    """Beside the engine, from what it holds: the same shares as `Reading.passages`; its own cache stays."""

    async def all_of_it() -> tuple[str, list[dict]]:
        async with library(model, tmp_path) as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            text, _ = answer(await asked(books, entry.id))
            read = books._engine.figures().read_tokens
            looked = await books.looked(entry.id, QUESTION, text)
            assert books._engine.figures().read_tokens == read
            with pytest.raises(OptionError, match="empty"):
                await books.looked(entry.id, QUESTION, " ")
            with pytest.raises(TooLong, match="document and question of"):
                await books.looked(entry.id, [{"role": "user", "content": words(2000)}], text)
            return text, looked

    text, looked = asyncio.run(all_of_it())
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16") as plain:
        book, asking = Reading(plain, Document("book.txt", "txt", BOOK)), QUESTION[0]["content"]
        parts = book.ask(asking, max_tokens=12)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                result = end.value
                break
        expected = dict(book.passages(result))
    assert result.text == text
    assert [(one["start"], one["end"]) for one in looked] == sorted(expected)
    np.testing.assert_allclose([one["share"] for one in looked], [expected[p] for p in sorted(expected)], atol=1e-4)


def test_conversations_by_a_template_keep_the_document_in_front(tiny_gguf, tmp_path):
    """Whatever the system says, and however long the conversation is, the document is not read again."""
    path = with_template(tiny_gguf, tmp_path / "chat.gguf", CHATML)
    with pi_gguf.open(path, n_ctx=WINDOW, type_k="f16", sequences=4) as model:

        async def all_of_it() -> None:
            async with library(model, tmp_path) as books:
                assert books.form == "chat"
                entry, _ = await books.add("book.txt", BOOK.encode())
                await whole(books, entry.id)
                reading = books._loaded(books._of(entry.id))
                talk = [{"role": "system", "content": "Be short."}, *QUESTION]
                for _ in range(2):
                    ids, stop = books.chat_ids(entry.id, talk)
                    assert ids[: len(reading.ids)] == reading.ids and stop == ()
                    assert "Be short." in model.detokenize(ids[len(reading.ids) :])
                    text, ended = answer(await asked(books, entry.id, talk))
                    assert ended.known >= len(reading.ids)
                    talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
                with pytest.raises(OptionError, match="nothing is asked"):
                    books.chat_ids(entry.id, [{"role": "system", "content": "a"}])

        asyncio.run(all_of_it())


def test_a_base_model_takes_one_question(model, tmp_path):
    async def all_of_it() -> None:
        async with library(model, tmp_path, form="plain") as books:
            entry, _ = await books.add("book.txt", BOOK.encode())
            with pytest.raises(OptionError, match="each question is asked by itself"):
                books.chat_ids(entry.id, [*QUESTION, {"role": "assistant", "content": "a"}, *QUESTION])

    asyncio.run(all_of_it())
