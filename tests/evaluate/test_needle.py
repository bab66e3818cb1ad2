"""A needle in a haystack: the prompts, and the whole path with a reader that really looks the number up."""

from __future__ import annotations

import json
import random
import re

import pytest
from readers import NEEDLE, Reader, look_up, watched

import pi_gguf
from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, TextError
from pi_gguf.evaluate.needle import INTRODUCTION, evaluate_needle, needle_item
from pi_gguf.measure.haystack import Item, fit, hide, sentences
from pi_gguf.models.hf import HfModel
from pi_gguf.runtime.model import Model


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=2048, steps=0)
    return path


def test_prompts_fill_the_window_with_the_needle_at_its_depth():
    lm = Reader(look_up)
    report = evaluate_needle(lm, windows=(700, 3000), depths=5, needles=2)
    assert [(c.window, c.depth, c.found, c.needles) for c in report.cells] == [
        (window, depth, 2, 2) for window in (700, 3000) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    places = [(window, depth) for window in (3000, 700) for depth in (1, 0.75, 0.5, 0.25, 0) for _ in range(2)]
    novels = list(bundled.novels("heldout").values())
    prose, plain = sentences(novels), " ".join(novels[0].split())
    assert report.texts == list(bundled.novels("heldout")) and len(lm.asked) == len(places)
    for (prompt, total), (window, depth) in zip(lm.asked, places, strict=True):
        text, question = prompt.removeprefix(INTRODUCTION).split("\n\n")
        ((thing, number),) = NEEDLE.findall(text)
        assert question.endswith(f"The secret number of the {thing} is") and number not in question
        before, after = (part.strip() for part in text.split(f"The secret number of the {thing} is {number}."))
        filler = f"{before} {after}".strip()
        assert plain.startswith(filler), "prose as it is written, but for line ends"
        n = next(n for n in range(len(prose)) if len(" ".join(prose[:n])) >= len(filler))
        assert " ".join(prose[:n]) == filler, "whole sentences"
        assert total <= window < total + len(lm.tokenize(prose[n])) + 2
        share = len(lm.tokenize(before)) / len(lm.tokenize(filler))
        assert abs(share - depth) < 100 / window, (window, depth, share)
    assert len({NEEDLE.search(prompt)[2] for prompt, _ in lm.asked}) == len(places), "a number of its own each time"


def test_who_answers_nothing_or_another_number_finds_nothing():
    for answer in ("", " 1234567", " 12345678"):
        report = evaluate_needle(Reader(lambda prompt, answer=answer: answer), windows=(400,), depths=2, needles=2)
        assert [cell.found for cell in report.cells] == [0, 0]


def test_the_seed_alone_draws_the_needles():
    def prompts(**options):
        lm = Reader(look_up)
        evaluate_needle(lm, windows=(400, 500), depths=2, **options)
        return [prompt for prompt, _ in lm.asked]

    assert prompts() == prompts(seed=0)
    assert not set(prompts()) & set(prompts(seed=1))


def test_facts_are_hidden_at_their_depth():
    units = ["aa", "b", "c"]  # the middle of the characters lies behind the first
    assert hide(units, [(0, "x"), (1, "z"), (0.5, "y")]) == ["x", "aa", "y", "b", "c", "z"]
    assert hide(units, [(0.9, "y"), (0.8, "x")]) == ["aa", "b", "c", "x", "y"], "in order where no unit is between"


def test_sentences_are_whole_and_none_is_endless():
    text = 'He rose.  "Go on!" she\nsaid. Was it Mr. X? It was'
    assert sentences([text, "End."]) == ["He rose.", '"Go on!"', "she said.", "Was it Mr.", "X?", "It was", "End."]
    endless = "a long well-known word " * 100
    parts = sentences([endless])
    assert " ".join(parts) == endless.strip() and 300 < max(map(len, parts)) <= 400


def test_as_many_units_as_fit_are_taken():
    lm = Reader(look_up)
    item = Item("counting", lambda n: " ".join(map(str, range(n))), ["one"])
    room = 2 * len(lm.tokenize("one", add_special=False)) + 8
    lengths = [len(lm.tokenize(item.build(n))) for n in range(300)]
    for window in range(40, 300, 13):
        ids, left = fit(lm, item, window)
        most = max(n for n, length in enumerate(lengths) if length + room <= window)
        assert (ids, left) == (lm.tokenize(item.build(most)), room)


def test_a_finished_place_is_not_asked_for_again(tmp_path):
    keep = tmp_path / "kept.jsonl"

    def asked(**options):
        lm = Reader(look_up)
        report = evaluate_needle(lm, **{"windows": (400, 500), "depths": 3, "keep": str(keep), **options})
        return len(lm.asked), report.cells

    first = asked()
    assert first[0] == 6 and len(keep.read_text().splitlines()) == 6
    assert asked() == (0, first[1])
    keep.write_text("".join(keep.read_text().splitlines(keepends=True)[:4]))
    assert asked() == (2, first[1])
    assert asked(windows=(400, 500, 600))[0] == 3
    assert asked(needles=2)[0] == 12 and asked(seed=1)[0] == 6


def test_both_backends_answer_the_same(llama, gguf_path):
    checkpoint = load_checkpoint(str(llama))
    hf = watched(HfModel, checkpoint.extended(2048))
    with watched(Model, gguf_path, n_ctx=2048, type_k="f32", type_v="f32", flash_attn=False) as gguf:
        cells = [evaluate_needle(lm, windows=(512, 1536), depths=3).cells for lm in (hf, gguf)]
        assert hf.answers == gguf.answers and len(set(gguf.answers)) > 1 and all(gguf.answers)
    assert [(c.window, c.depth, c.found) for c in cells[0]] == [(c.window, c.depth, c.found) for c in cells[1]]
    assert [cell.found for cell in cells[0]] == [0] * 6, "random weights find nothing"


def test_the_command_prints_and_draws(cli, llama, gguf_path, tmp_path):
    options = ("--windows", "512,1024", "--depths", "3")
    code, out, err = cli("eval", "needle", gguf_path, *options, "--plot", tmp_path / "needle.png")
    assert code == 0 and f"wrote {tmp_path / 'needle.png'}" in err
    assert (tmp_path / "needle.png").read_bytes()[:4] == b"\x89PNG"
    assert "needles found" in " ".join(out.split()) and "512" in out
    assert out.count(" 0%") == 6 + 1, "six cells and the first depth"
    out = cli("eval", "needle", gguf_path, llama, *options, "--context", "2048")[2]
    assert "context is for Hugging Face models" in out
    out = cli("eval", "needle", gguf_path, llama, *options)[1]
    assert out.count("0%") == 4 and str(llama) in out, "a row a model, a column a window"
    report = json.loads(cli("eval", "needle", gguf_path, *options, "--json")[1])
    assert len(report["cells"]) == 6 and {"text_sha256", "seed"} <= set(report["provenance"])


def test_what_cannot_be_asked_is_refused(tmp_path):
    lm = Reader(look_up)
    for options, message in (
        ({"depths": 0}, "depths must be at least 1, got 0"),
        ({"needles": -1}, "needles must be at least 1, got -1"),
        ({"windows": (1,)}, "windows must be token counts above 1"),
        ({"plot": "a.xls"}, "plot must end in one of"),
    ):
        with pytest.raises(OptionError, match=message):
            evaluate_needle(lm, **options)
    with pytest.raises(OptionError, match="plot is for one model, got 2"):
        evaluate_needle(lm, "a.gguf", plot="a.png")
    with pytest.raises(OptionError, match=r"at least about \d+ tokens for a needle, got 50") as error:
        evaluate_needle(lm, windows=(50, 2000))  # the largest is asked for first
    least = int(re.search(r"about (\d+)", str(error.value))[1])
    assert not lm.asked, "said before anything is asked"
    assert len(evaluate_needle(lm, windows=(least + 5,), depths=1).cells) == 1
    (tmp_path / "short.txt").write_text("It rained. " * 50)
    lm.asked.clear()
    with pytest.raises(TextError, match="too short for a needle at 2000 tokens"):
        evaluate_needle(lm, windows=(2000, 200), text=[str(tmp_path / "short.txt")])
    assert not lm.asked
    assert evaluate_needle(lm, windows=(200,), depths=1, text=[str(tmp_path)]).texts == [str(tmp_path / "short.txt")]


def test_no_needle_is_in_what_the_bundled_model_is_trained_on():
    mixture = bundled.training_mixture(3, 512)
    text = "".join(next(mixture) for _ in range(200))
    prompt = needle_item(random.Random(0), ["It rained."], [0.0]).build(1)
    assert NEEDLE.search(prompt) and "secret number" not in text and not re.search(r"\b\d{7}\b", text)
