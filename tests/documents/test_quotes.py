"""Quotes: what an answer quotes is found at the same words of the document, or said not to be there."""

from __future__ import annotations

import doctest
import random
import textwrap

import pytest
from document_files import HEBREW, JAPANESE, write_pdf

from pi_gguf import bundled
from pi_gguf.documents import quotes
from pi_gguf.documents.formats import Document, read_document
from pi_gguf.documents.markup import Place
from pi_gguf.documents.quotes import Quote, find_quotes

ARABIC = "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق"
POINTED = "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ"
HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता"


@pytest.fixture(scope="module")
def novels() -> list[str]:
    return list(bundled.novels("train").values())[:2]


def only(answer: str, text: str) -> tuple[Quote, str]:
    """Return the one quotation of an answer, and the passage that it is."""
    (quote,) = find_quotes(answer, Document("a.txt", "txt", text))
    return quote, "" if quote.start is None else text[quote.start : quote.end]


@pytest.mark.parametrize("marks", ['""', "“”", "„“", "„”", "«»", "»«", "「」", "『』"])
def test_quotation_marks_of_any_kind(marks):
    answer = f"He said {marks[0]}it was a dark night{marks[1]} and went."
    quote, passage = only(answer, "Truly, it was a dark night.")
    assert (quote.found, quote.similarity, passage) == ("exact", 1.0, "it was a dark night")
    assert answer[quote.answer_start : quote.answer_end] == quote.text == passage
    assert quote.place == "characters 7-26"


def test_quoted_lines_of_markdown_are_one_quotation():
    answer = 'He says:\n> “It was a\n> dark night.”\n\n> Nobody was about.\nSo "it" was.'
    found = find_quotes(answer, Document("a", "txt", "It was a dark night. Nobody was about."))
    assert [(q.text, q.found) for q in found] == [("It was a\ndark night.", "exact"), ("Nobody was about.", "exact")]
    assert answer[found[0].answer_start : found[0].answer_end] == "> “It was a\n> dark night.”"


@pytest.mark.parametrize("source", ["", " (page 3)", " — The Bridge", "\n> [p. 3]"])
def test_a_source_after_quoted_lines_is_no_part_of_them(source):
    assert only(f'> "It was a dark night."{source}', "It was a dark night.")[0].text == "It was a dark night."


def test_speech_in_quoted_lines_stays_in_them():
    text = '"It was dark," he said, "and cold."'
    quote, passage = only(f"> {text}", text)
    assert (quote.found, passage) == ("exact", text)


def test_words_in_quotation_marks_are_no_quotation():
    assert find_quotes('The "Bridge" is “no bridge”, 5" wide; he said "it.\n\nAn"', Document("a", "txt", "x")) == []


def test_quotes_have_the_page_or_chapter():
    text = "The first page has this.\n\nThe second page has that."
    document = Document("a", "pdf", text, (Place(0, "page", "1"), Place(26, "page", "2")))
    assert [q.place for q in find_quotes('"second page has that" "has this. The second"', document)] == [
        "page 2",
        "pages 1-2",
    ]


@pytest.mark.parametrize(
    ("quoted", "passage", "found"),
    [
        ("IT WAS the wisdom", "it was the wis-\ndom", "near"),
        ("it was the wisdom", "it was\n\tthe wisdom", "exact"),
        ("don’t — ever — go", "don't - ever - go", "near"),
        ("**never** go cafe", "never go café", "near"),
        ("the ﬁnal straw", "the final straw", "near"),
        ("never go there,", "never go there", "near"),
        ("Strasse nach Bern", "Straße nach Bern", "near"),
        ("it was [...] wisdom", "it was not for nothing and wisdom", "near"),
        ("… never go there …", "never go there", "near"),
        ("rhaps it was the wurst of all tim", "Perhaps it was the worst of all times", "near"),
        ("It was ... the beginning of all", "It was the beginning of all", "near"),
        ("It was the wurst of times and best", "It was the worst of times, and the best", "near"),
        ("It really was the very worst of all times", "It was the very worst of all times", "near"),
        ("It was the worst, the very worst", "It was not the worst, but the very worst", "near"),
    ],
)
def test_quotes_that_are_not_letter_by_letter(quoted, passage, found):
    quote, there = only(f"“{quoted}”", f"Whoever. But, {passage}; who would have told that?")
    assert (quote.found, there) == (found, passage)
    assert 0.8 <= quote.similarity <= 1


def test_an_ellipsis_leaves_out_less_than_a_chapter():
    far = "It was the beginning. " + "And so on it went. " * 200 + "It was the end of it."
    assert only('"It was the beginning ... It was the end of it"', far)[0].found == "none"
    twice = "It was. Then it was the beginning of it."
    assert only('"it was ... the beginning of it"', twice)[1] == twice[13:-1]
    near = "It was. The end of it. It was the beginning. And so on it went. The end of it."
    assert only('"It was the beginning ... The end of it"', near)[1] == near[23:-1]


@pytest.mark.parametrize("text", [JAPANESE, HEBREW, ARABIC, POINTED, HINDI])
def test_offsets_point_at_the_words_of_any_script(text):
    whole = f"{text}\n\n{text[::-1]}"
    for start in range(len(text) - 15):
        assert only(f"「{text[start : start + 15].strip()}」", whole)[1] == text[start : start + 15].strip()
    # with a line broken, and with one letter wrong
    quote, passage = only(f"「{text[:9]}\n{text[9:]}」", whole)
    assert (quote.found, passage) == ("exact", text)
    wrong = text[:5] + "ж" + text[6:]
    quote, passage = only(f"「{wrong}」", whole)
    assert quote.found == "near" and passage.rstrip("。") == text.rstrip("。")


def test_points_and_accents_may_be_left_out():
    assert only(f"“{HEBREW}”", f"א. {POINTED} .ב")[1] == POINTED
    assert only("“והלכתי לך לך”", "כֵן וְהָלַכְתִּי לְךָ לָךְ.")[1] == "וְהָלַכְתִּי לְךָ לָךְ"


@pytest.mark.parametrize(
    ("quoted", "text"),
    [
        ("ननही मुनना लडक", "नन्ही मुन्ना लड़क"),
        ("かきくけこさしす", "がぎぐげござじず"),
        ("the old ham ate", "the old man ate"),
    ],
)
def test_other_vowels_voicing_or_short_words_are_another_text(quoted, text):
    assert only(f"“{quoted}”", text)[0].found == "none"


def test_words_are_made_whole_only_where_spaces_divide_them():
    quoted = JAPANESE[3:15] + "な" + JAPANESE[16:29]
    assert only(f"「{quoted}」", JAPANESE)[1] == JAPANESE[3:29]


def test_quotes_from_a_pdf_of_300_pages(tmp_path, novels):
    lines = textwrap.wrap(novels[0][20_000:350_000], 80)[: 300 * 12]
    path = write_pdf(tmp_path / "a.pdf", [lines[at : at + 12] for at in range(0, len(lines), 12)])
    document = read_document(path)
    assert len(document.places) == 300
    across = f"{lines[216 * 12 + 3][30:]} {lines[216 * 12 + 4][:30]}"
    across = across.replace('"', "")
    changed = lines[120 * 12][:40] + " surely " + lines[120 * 12][40:]
    other = " ".join(novels[1][50_000:50_100].replace('"', "").split())
    exact, near, none = find_quotes(f'"{across}" “{changed}” «{other}»', document)
    assert (exact.found, exact.place) == ("exact", "page 217")
    assert document.text[exact.start : exact.end].split() == across.split()
    assert (near.found, near.place) == ("near", "page 121")
    assert document.text[near.start : near.end].split() == lines[120 * 12].split()
    assert (none.found, none.start, none.place) == ("none", None, None)


def test_quotes_of_right_to_left_and_japanese_pdfs(tmp_path):
    for name, font, lines in (
        ("he", "DejaVuSans", [HEBREW[::-1]]),
        ("ja", "HeiseiMin-W3", [JAPANESE[:20], JAPANESE[20:]]),
    ):
        document = read_document(write_pdf(tmp_path / f"{name}.pdf", [["1"], lines], font))
        words = HEBREW[7:24] if name == "he" else JAPANESE[9:30]
        (quote,) = find_quotes(f"„{words}“", document)
        assert (quote.found, quote.place) == ("exact", "page 2")
        assert "".join(document.text[quote.start : quote.end].split()) == "".join(words.split())


def test_random_substrings_are_found_at_the_same_words(novels):
    draw = random.Random(0)
    text = novels[0][100_000:160_000] + JAPANESE + POINTED
    document = Document("a", "txt", text)
    spoilt = [" ".join, "\n".join, lambda words: " ".join(words).swapcase(), lambda words: "-".join(words)]
    for _ in range(60):
        start = draw.randrange(len(text) - 30)
        words = text[start : start + draw.randrange(30, 400)].split()
        answer = draw.choice(spoilt)(words).replace('"', "'").replace("“", "'").replace("”", "'")
        (quote,) = find_quotes(f'"{answer}"', document)
        assert quote.found != "none" and quote.similarity == 1
        passage = text[quote.start : quote.end]
        assert [letter for letter in passage.casefold() if letter.isalnum()] == [
            letter for letter in "".join(words).casefold() if letter.isalnum()
        ]


def test_sentences_of_another_novel_are_not_found(novels):
    draw = random.Random(1)
    document = Document("a", "txt", novels[0][:300_000])
    answer = ""
    for _ in range(40):
        start = novels[1].index(" ", draw.randrange(len(novels[1]) - 200))
        answer += f"“{' '.join(novels[1][start : start + 60].translate({ord(c): ' ' for c in '“”'}).split())}” "
    found = find_quotes(answer, document)
    assert len(found) == 40 and {quote.found for quote in found} == {"none"}


def test_a_long_quotation_is_found_but_for_what_is_left_aside_only(novels):
    document = Document("a.txt", "txt", novels[0][:20_000].translate({ord(mark): "'" for mark in '"“”'}))
    words = document.text[3000:4500].split()
    near = [" ".join(["others", *words[1:part]]) for part in (100, len(words))]
    assert len(near[0]) < 1000 < len(near[1])
    answer = f'"{near[0]}" and "{near[1]}" and "{" ".join(words).upper()}"'
    found = find_quotes(answer, document)
    assert [quote.found for quote in found] == ["near", "none", "near"]
    assert found[2].similarity == 1 and found[2].start == 3000


def test_only_so_many_quotations_are_searched_for_by_likeness():
    document = Document("a.txt", "txt", "It was a dark and stormy night; the rain fell in torrents.")
    others = [f'"the moon {number} was no ship at all"' for number in range(49)]
    near, exact = '"a dark and stormy light; the rain"', '"the rain fell"'
    found = find_quotes(" ".join([*others, near, near, exact]), document)
    assert [quote.found for quote in found] == [*["none"] * 49, "near", "none", "exact"]


def test_the_examples_are_true():
    assert doctest.testmod(quotes) == doctest.TestResults(failed=0, attempted=3)


def test_without_rapidfuzz_what_is_word_for_word_is_found_and_the_rest_is_told_once(monkeypatch, capsys):
    text = "It was a dark and stormy night; the rain fell in torrents."
    answer = (
        'He says "it was a dark, and stormy night" and "the rains fell in the torrents", "the rain fell in a flood".'
    )
    assert [quote.found for quote in find_quotes(answer, Document("a.txt", "txt", text))][1] == "near"
    monkeypatch.setattr(quotes.importlib.util, "find_spec", lambda name: None)
    quotes._can_compare.cache_clear()
    found = [quote.found for quote in find_quotes(answer, Document("a.txt", "txt", text))]
    quotes._can_compare.cache_clear()
    assert found[1:] == ["none", "none"]
    assert capsys.readouterr().err.count("pip install 'pi-gguf[documents]'") == 1
