"""Where a model looked while it wrote an answer: the passage of the key first, nothing else changed by looking."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_adapters import make_adapter
from small_families import make_model

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.bundled.passkey import INTRODUCTION, QUESTION, key_sentence
from pi_gguf.documents.formats import Document
from pi_gguf.errors import GgufError, OptionError, TextError
from pi_gguf.llamacpp.watch import ScoreWatch
from pi_gguf.runtime.looked import in_order, token_bounds, weigh
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


@pytest.mark.parametrize("case", ["an adapter", "sliding windows", "a quantized K cache"])
def test_what_is_computed_beside_is_what_the_model_computes(case, llama, tmp_path):
    base, lora = llama, []
    if case == "an adapter":
        adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
        lora = [tmp_path / "lora.gguf"]
        pi_gguf.convert(str(llama), lora[0], quant="F32", lora=[str(adapter)], adapter_only=True)
    elif case == "sliding windows":
        base = make_model(tmp_path / "gemma", "gemma3_text", {"sliding_window": 16})
    pi_gguf.convert(str(base), tmp_path / "m.gguf", quant="F32", check="none")
    ids, seen = [int(i) for i in np.random.default_rng(0).integers(3, 400, 60)], []
    type_k = "q8_0" if case == "a quantized K cache" else "f16"
    with pi_gguf.open(tmp_path / "m.gguf", lora=lora, type_k=type_k) as model:
        own = np.concatenate(list(model.logits_chunks(ids, 3)))
        with model.beside(ScoreWatch(seen.append), 57) as beside:
            assert beside.ids == (ids[:57] if case == "sliding windows" else ids)
            np.testing.assert_allclose(np.concatenate(list(beside.read(ids, 3))), own, atol=2e-3)
            copied = list(seen)
            beside.clear()
            seen.clear()
            list(beside.read(ids, 1))
    assert len(copied) == len(seen) == model.info.hyperparameter("block_count")
    pairs = [(few, whole) for few, whole in zip(copied, seen, strict=True) if in_order(few, 57)]
    assert len(pairs) == (1 if case == "sliding windows" else 2)
    for few, whole in pairs:
        assert few.shape[1] == 3 and whole.shape[1] == 60
        np.testing.assert_allclose(few[:, :, :60], whole[:, -3:, :60], atol=1e-3)
        np.testing.assert_allclose(whole.sum(-1), 1, atol=1e-3)


def test_shares_are_those_of_the_definition(path):
    document, _ = hidden("31418", 0.4, 1200)
    answer, rows = Answer(QUESTION, " 31418.\n"), []
    with pi_gguf.open(path) as model, Reading(model, document, form="plain") as book:
        found = dict(book.passages(answer))
        ids = [*book.ids, *model.tokenize(QUESTION, add_special=False)]
        written = model.tokenize(answer.text, add_special=False)
        with model.beside(ScoreWatch(rows.append), 0) as beside:
            beside.clear()
            list(beside.read([*ids, *written][:-1], 1))
        pieces = list(map(model.session.piece, book.document_ids))
    assert len(rows) == 4 and len(ids) < 512
    text, passages = document.text, document.passages()
    read = b"".join(pieces).decode()
    assert read.removeprefix(" ") == text and text.isascii() and len(passages) >= 3
    ends = np.cumsum(list(map(len, pieces))) - (len(read) - len(text))
    where = [max(p for p in passages if p.start < max(end, 1)) for end in ends]
    expected = dict.fromkeys(passages, 0.0)
    for i, token in enumerate(written):
        same = [at for at, other in enumerate(book.document_ids) if other == token]
        for head in np.concatenate(rows)[:, len(ids) - 1 + i]:
            for at in range(16, len(book.document_ids)):
                expected[where[at]] += head[same].sum() / max(len(same), 1) * head[at]
    total = sum(expected.values())
    assert found == pytest.approx({passage: share / total for passage, share in expected.items()}, abs=2e-3)


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
