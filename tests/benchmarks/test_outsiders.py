"""Programs of others open our files: what they read and write is what we do, or what the page says of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from helpers import SHARED_MODELS

import pi_gguf
from pi_gguf.gguf.header import read_header, write_changed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "outsiders.py"

_SPEC = importlib.util.spec_from_file_location("outsiders_benchmark", SCRIPT)
bench = sys.modules["outsiders_benchmark"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)

LLAMA_CPP = "llama.cpp (xllamacpp)"
READERS = (LLAMA_CPP, "node-llama-cpp", "mistral.rs", "transformers")
FILES = [f"{kind}, {quant}" for kind in bench.KINDS for quant in bench.QUANTS]
SLOW = {"transformers": ("plain, Q4_K_M", "PI x4, F16", "LoRA merged, F16")}
"""Files that a reader is asked about which takes seconds for each."""

PAIRS = [(reader, file) for reader in READERS for file in SLOW.get(reader, FILES)]

DIED_OF_AN_INSTRUCTION = "ended with -4"


def ask(reader, questions):
    """Ask a reader, or skip where it cannot be here; in CI what pip installs must be."""
    if missing := bench.READERS[reader].missing():
        assert not os.environ.get("CI") or reader == "node-llama-cpp", missing
        pytest.skip(missing)
    answers = bench.ask(reader, questions)
    if any((answer.error or "").startswith(DIED_OF_AN_INSTRUCTION) for answer in answers):
        pytest.skip(f"{reader} is compiled for another CPU")
    return answers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of the bundled model in the usual shape, with what is asked about each and what we say."""
    folder = tmp_path_factory.mktemp("files")
    return bench.make_files(str(bench.make_usual(folder / "hf")), folder)


@pytest.fixture(scope="module")
def rows(made):
    """What each reader makes of each file, asked once."""
    asked = {}

    def of(reader, file):
        if reader not in asked:
            files = SLOW.get(reader, FILES)
            answers = ask(reader, [made[name][0] for name in files])
            asked[reader] = {n: bench.compare(made[n][1], answer) for n, answer in zip(files, answers, strict=True)}
        return asked[reader][file]

    return of


def test_what_is_asked_leaves_no_doubt(made):
    assert list(made) == FILES and len(FILES) == 6
    for file, (question, ours) in made.items():
        longer = file.startswith("PI")
        assert (ours.window, ours.scale) == ((8192, 0.25) if longer else (2048, 1.0))
        assert [len(ids) for ids in ours.ids] == [bench.TOKENS] * 2
        assert min(map(min, ours.leads)) >= bench.LEAD
        assert question.begin == "<s>"
    question, _ = made["PI x4, F16"]
    with pi_gguf.open(question.path) as model:
        assert len(model.tokenize(question.prompts[1])) > 2048, "or a lost factor might not show"


@pytest.mark.parametrize(("reader", "file"), PAIRS)
def test_a_file_is_to_others_what_it_is_to_us(reader, file, made, rows):
    row, ours = rows(reader, file), made[file][1]
    assert row.error is None
    assert row.window == ours.window
    if reader == "transformers" and file.startswith("PI"):
        assert row.scale == 1.0 and not row.same, "it reads the factor now: say so in docs/elsewhere.md"
        assert row.lead > 2 * bench.LEAD, "no rounding"
    else:
        assert row.scale in (None, ours.scale)
        assert (row.tokens, row.of, row.same) == (64, 64, True)


@pytest.mark.parametrize("reader", [LLAMA_CPP, "mistral.rs"])
def test_a_lost_factor_would_show(reader, made, tmp_path):
    question, ours = made["PI x4, F16"]
    header = read_header(Path(question.path))
    write_changed(
        header.changed(dict.fromkeys(k for k in header.entries if ".rope.scaling." in k)), tmp_path / "m.gguf"
    )
    (answer,) = ask(reader, [dataclasses.replace(question, path=str(tmp_path / "m.gguf"))])
    row = bench.compare(ours, answer)
    assert row.window == ours.window and row.tokens < 16


def test_mistral_rs_takes_no_heads_of_another_size(tiny_gguf):
    (answer,) = ask("mistral.rs", [bench.Question(str(tiny_gguf), 2048, ["It was"], "<s>")])
    assert "Shape mismatch" in (answer.error or ""), "it opens it now: say so in docs/elsewhere.md"


@pytest.mark.skipif(not (SHARED_MODELS / "stories15M").exists(), reason="needs stories15M in shared/assets/models")
def test_a_file_with_sentencepiece_is_the_same_to_llama_cpp(tmp_path):
    model = str(SHARED_MODELS / "stories15M")
    ((question, ours),) = bench.make_files(model, tmp_path, ["PI x4"], ["F16"]).values()
    (answer,) = ask(LLAMA_CPP, [question])
    row = bench.compare(ours, answer)
    assert (row.window, row.tokens, row.of) == (1024, 64, 64)


# How it is judged

OURS = bench.Ours(256, 0.25, [[5, 6, 7], [8]], [["a", "a b", "a b c"], ["x"]], [[0.5, 0.4, 0.3], [0.2]])


def test_tokens_count_up_to_the_first_other_one():
    answer = bench.Answer(256, 0.25, ["a b d", "x"], [[5, 6, 9], [8, 1]])
    assert bench.compare(OURS, answer) == bench.Row(256, 0.25, 3, 4, 0.3, False)
    answer = bench.Answer(256, None, ["a b c", "x"], [[5, 6, 7, 1], [8]])
    assert bench.compare(OURS, answer) == bench.Row(256, None, 4, 4, None, True)
    assert bench.compare(OURS, bench.Answer(256, None, ["a b", "x"], [[5, 6], [8]])).tokens == 3, "it wrote less"


def test_texts_count_where_there_are_no_tokens():
    assert bench.compare(OURS, bench.Answer(None, None, [" a\x07 b c d ", "x"])).tokens == 4
    assert bench.compare(OURS, bench.Answer(None, None, ["a c", "y"])) == bench.Row(None, None, 1, 4, 0.4, False)


def test_a_file_that_is_not_opened_says_why():
    assert bench.compare(OURS, bench.Answer(error="no")) == bench.Row(None, None, 0, 4, None, False, "no")


def test_a_reader_that_dies_or_hangs_is_an_answer(monkeypatch, tmp_path):
    script = tmp_path / "outsiders.py"
    script.write_text(
        "import sys, os, time\nnext(sys.stdin)\nprint('answer: {\"window\": 5}', flush=True)\n"
        "time.sleep(60) if os.environ.get('HANG') else (print('so it is', file=sys.stderr), os._exit(3))\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    questions = [bench.Question("a.gguf", 8, [], "")] * 3
    first, *others = bench.ask("mistral.rs", questions)
    assert first.window == 5 and [other.error for other in others] == ["ended with 3: so it is"] * 2
    monkeypatch.setenv("HANG", "1")
    monkeypatch.setattr(bench, "_SECONDS", 1)
    first, *others = bench.ask("mistral.rs", questions)
    assert first.window == 5 and [other.error for other in others] == ["took more than 3 seconds"] * 2
