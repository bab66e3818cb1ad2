"""Where a model looked while it wrote an answer: the passage of the key first, nothing else changed by looking."""

from __future__ import annotations

import json

import numpy as np
import pytest

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.bundled.passkey import INTRODUCTION, QUESTION, key_sentence
from pi_gguf.documents.formats import Document
from pi_gguf.errors import GgufError, OptionError, TextError
from pi_gguf.runtime.looked import token_bounds, weigh
from pi_gguf.runtime.reading import Answer, Reading
from pi_gguf.runtime.states import States


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    pi_gguf.convert("bundled:tiny", path, quant="F16", check="none")
    return path


def hidden(key, share, characters=5000):
    """A document of prose with a key, so far into it, and where the key's line is."""
    text = INTRODUCTION + next(iter(novels("heldout").values()))[30_000 : 30_000 + characters]
    at = text.index("\n", round(len(text) * share)) + 1
    line = key_sentence(key)
    return Document("p.txt", "txt", text[:at] + line + text[at:]), (at, at + len(line))


def asked(book, question=QUESTION, **options):
    answer = book.ask(question, max_tokens=6, **options)
    while True:
        try:
            next(answer)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_passage_with_the_key_is_the_first(path, share):
    document, (start, end) = hidden("31418", share)
    with pi_gguf.open(path) as model, Reading(model, document, form="plain") as book:
        answer = asked(book)
        assert "31418" in answer.text
        found = book.passages(answer)
    assert sorted(passage for passage, _ in found) == document.passages() and len(found) >= 6
    assert found[0][0].start < end and found[0][0].end > start
    assert found[0][1] > 0.5
    shares = [share for _, share in found]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True) and min(shares) >= 0


def test_of_the_same_number_in_several_passages_the_one_with_the_key_is_looked_at(path):
    document, (start, _) = hidden("31418", 0.5)
    others = [f"There were {number} sheep on the hill.\n" for number in ("31418", "31418", "27182")]
    parts = [document.text[:1500], document.text[1500:start], document.text[start:4000], document.text[4000:]]
    text = "".join(part + other for part, other in zip(parts, [*others, ""], strict=True))
    document, at = Document("p.txt", "txt", text), text.index(key_sentence("31418"))
    with pi_gguf.open(path) as model, Reading(model, document, form="plain") as book:
        found = book.passages(asked(book))
    assert found[0][0].start <= at < found[0][0].end


def test_looking_changes_nothing_and_needs_nothing_read_again(path):
    document, _ = hidden("31418", 0.4)
    with pi_gguf.open(path) as model, Reading(model, document, form="plain") as book:
        first = asked(book)
        ids, state = list(model.session.ids), np.zeros(model.session.state_bytes(), np.uint8)
        model.session.save(state)
        found = book.passages(first)
        after = np.zeros(model.session.state_bytes(), np.uint8)
        model.session.save(after)
        assert model.session.ids == ids and np.array_equal(state, after)
        read = []
        again = asked(book, on_progress=lambda done, new, _: read.append(new))
        assert again.text == first.text and max(read) < 32
        assert book.passages(first) == found


def test_what_is_looked_at_is_the_same_when_the_answer_came_from_a_kept_document(path, tmp_path):
    document, _ = hidden("31418", 0.4)
    states = States(tmp_path)
    with pi_gguf.open(path) as model, Reading(model, document, form="plain", states=states) as book:
        answer = asked(book)
        found = book.passages(answer)
    with pi_gguf.open(path) as model, Reading(model, document, form="plain", states=states) as book:
        again = book.passages(answer)
    assert [passage for passage, _ in again] == [passage for passage, _ in found]
    np.testing.assert_allclose([share for _, share in again], [share for _, share in found], atol=1e-3)


def test_passages_of_a_part_are_those_of_the_whole_document(path):
    document, (start, end) = hidden("31418", 0.75)
    with pi_gguf.open(path) as model, Reading(model, document, form="plain", part=(2, 2)) as book:
        found = book.passages(asked(book))
    passages = document.passages()
    assert sorted(passage for passage, _ in found) == passages[-len(found) :] and len(found) < len(passages)
    assert found[0][0].start < end and found[0][0].end > start


def test_flash_attention_and_empty_answers_are_errors(path):
    document, _ = hidden("31418", 0.5)
    with pi_gguf.open(path, flash_attn=True) as model:
        book = Reading(model, document, form="plain")
        with pytest.raises(OptionError, match="flash attention makes no scores"):
            book.passages(Answer(QUESTION, " 31418"))
    with pi_gguf.open(path) as model:
        book = Reading(model, document, form="plain")
        with pytest.raises(TextError, match="the answer is empty"):
            book.passages(Answer(QUESTION, ""))
        book.close()
        with pytest.raises(TextError, match="reading was closed"):
            book.passages(Answer(QUESTION, " 31418"))


def test_tokens_belong_to_the_passage_of_their_last_byte():
    text = "Ä b.\n\nCd e"
    assert token_bounds([b"\xc3", b"\x84", b" b.", b"\n\n", b"Cd", b" e"], text, [0, 6]) == [0, 4, 6]
    assert token_bounds([b" \xc3\x84", b" b.\n", b"\nC", b"d e"], text, [0, 6]) == [0, 2, 4]
    with pytest.raises(GgufError, match="does not keep a text as it is"):
        token_bounds([b"a b. cd e"], text, [0, 6])


def test_heads_that_copy_count_and_empty_passages_have_nothing():
    seen = np.zeros((2, 1, 6), np.float32)
    seen[0, 0, [0, 4]] = 0.2, 0.6  # sees the token that is written next, at 4
    seen[1, 0, 1] = 0.9  # sees another
    copied = np.arange(6)[None] == 4
    bounds = np.array([0, 2, 2, 6])
    np.testing.assert_allclose(weigh(seen, copied, bounds), [0.12, 0, 0.36], rtol=1e-6)
    often = copied | (np.arange(6)[None] == 5)  # the document has it twice, so it says half as much
    np.testing.assert_allclose(weigh(seen, often, bounds), [0.06, 0, 0.18], rtol=1e-6)


def test_ask_says_where_the_model_looked(path, cli, tmp_path):
    document, (start, end) = hidden("31418", 0.5)
    file = tmp_path / "p.txt"
    file.write_text(document.text)
    asking = ["ask", path, file, QUESTION, "--form", "plain", "--max-tokens", 6, "--no-keep", "--where"]
    code, out, err = cli(*asking)
    assert code == 0 and "31418" in out and err.count("looked at characters") == 3
    code, out, _ = cli(*asking, "--json")
    first, *others = json.loads(out)["answers"][0]["looked"]
    assert first["start"] < end and first["end"] > start and first["place"] in err
    assert len(others) == 2 and first["share"] > others[0]["share"] >= others[1]["share"]
    code, out, err = cli(*asking, "--flash-attn")
    assert code == 2 and "flash attention makes no scores" in err and out == ""
