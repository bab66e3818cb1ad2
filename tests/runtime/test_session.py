"""The one loop over llama.cpp: what is read once, what is drawn, where a text ends, and how it may be left."""

from __future__ import annotations

import json
import math
import re
import typing
from dataclasses import fields
from threading import Event

import numpy as np
import pytest
from helpers import make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import pi_gguf
from pi_gguf.errors import GgufError, OptionError, TextError
from pi_gguf.llamacpp.library import llama_cpp_library
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.sampling import Chooser, Sampling, SamplingKeywords
from pi_gguf.runtime.session import Session
from pi_gguf.runtime.text import StopText

PROMPTS = ("Once upon a time", "The captain looked at the sea and", "a", "1, 2, 3, 4,")


@pytest.fixture(scope="module")
def random_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "random.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=1024, steps=0)
    return path


@pytest.fixture(scope="module")
def model(tiny_gguf):
    with pi_gguf.open(tiny_gguf) as model:
        yield model


def text(model: Model, prompt: str = PROMPTS[0], **options: object) -> str:
    return "".join(model.complete(prompt, **{"max_tokens": 24, **options}))


def logits(model: Model, ids: list[int]) -> np.ndarray:
    return np.concatenate(list(model.logits_chunks(ids, 1)))


# The same text as llama-cpp-python's own loop


def theirs(path, prompt: str, **options: object) -> str:
    llama = llama_cpp_library().Llama(str(path), n_ctx=0, flash_attn=False, verbose=False)
    ids = llama.tokenize(prompt.encode(), add_bos=True, special=True)
    parts = llama.create_completion(ids, max_tokens=24, stream=True, **options)
    written = "".join(part["choices"][0]["text"] for part in parts)
    llama.close()
    return written


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_llama_cpp_python(tiny_gguf, random_path, prompt):
    for file in (tiny_gguf, random_path):
        with pi_gguf.open(file, type_k="f16") as model:
            mine = text(model, prompt)
        assert mine == theirs(file, prompt, temperature=0.0) and mine


def test_drawn_text_is_that_of_llama_cpp_python(tiny_gguf):
    for options in (
        {"temperature": 0.9, "seed": 3}, {"temperature": 1.5, "seed": 4, "top_k": 5, "top_p": 0.7, "min_p": 0.1},
        {"temperature": 1.5, "seed": 4, "stop": ["e"]}, {"temperature": 1.5, "seed": 4, "logit_bias": {10: 4.0}},
    ):  # fmt: skip
        with pi_gguf.open(tiny_gguf, type_k="f16") as model:
            assert text(model, **options) == theirs(tiny_gguf, PROMPTS[0], **options), options


def test_a_prompt_that_was_read_before_gives_the_same_text(model):
    first = [text(model, prompt) for prompt in PROMPTS]
    assert [text(model, prompt) for prompt in reversed(PROMPTS)] == first[::-1]


# Sampling


def test_a_seed_repeats_a_text_and_another_gives_another(model):
    one, two, other, greedy = (
        text(model, temperature=t, seed=seed) for t, seed in ((1.0, 1), (1.0, 1), (1.0, 2), (0.0, 1))
    )
    assert one == two and len({one, other, greedy}) == 3


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.9999}])
def test_drawing_from_one_token_is_greedy(model, only):
    assert text(model, temperature=2.0, seed=5, **only) == text(model)


def test_a_frequency_penalty_grows_with_each_time_a_presence_penalty_does_not(model):
    logits = np.zeros(model.n_vocab, np.float32)
    logits[[7, 8, 9]] = 3.0, 2.5, 1.2  # 7 was read three times, 8 once, 9 never
    for how, first in (({}, 7), ({"frequency_penalty": 0.4}, 8), ({"frequency_penalty": 1.4}, 9)):
        with Chooser(model.session.vocab, model.n_vocab, Sampling(**how), [7, 7, 7, 8]) as chooser:
            assert chooser.choose(logits) == first
    for how, first in (({"presence_penalty": 1.7}, 7), ({"presence_penalty": 1.9}, 9)):
        with Chooser(model.session.vocab, model.n_vocab, Sampling(**how), [7, 7, 7, 8]) as chooser:
            assert chooser.choose(logits) == first


def test_a_repeat_penalty_counts_the_prompt_and_what_was_written(model):
    ids = model.tokenize(PROMPTS[1])
    plain, punished = (list(model.session.write(ids, 40, Sampling(repeat_penalty=penalty))) for penalty in (1.0, 1e6))
    assert len(set(plain)) < len(plain), "it repeats itself by nature"
    ended = [*ids, *punished]
    assert len(set(ended[-len(punished) :])) == len(punished) and not set(punished) & set(ids)


def test_a_bias_forbids_a_token_and_forces_one(model):
    ids = model.tokenize(PROMPTS[0])
    first = next(model.session.write(ids, 1, Sampling()))
    for temperature in (0.0, 2.0):
        forbidden = Sampling(temperature=temperature, logit_bias={first: -math.inf})
        assert first not in list(model.session.write(ids, 60, forbidden))
        forced = Sampling(temperature=temperature, logit_bias={7: 1000.0})
        assert list(model.session.write(ids, 3, forced)) == [7, 7, 7]
    with pytest.raises(OptionError, match=rf"tokens from 0 to {model.n_vocab - 1}, got {model.n_vocab}"):
        text(model, logit_bias={model.n_vocab: 1.0})
    with pytest.raises(OptionError, match="no token with which the text can go on"):
        text(model, logit_bias=dict.fromkeys(range(model.n_vocab), -math.inf))


def test_a_grammar_holds_whatever_is_drawn(model):
    grammar = 'root ::= "The " ("sea" | "house") [0-9]{3} "é日"'
    for seed in range(5):
        parts = model.complete(PROMPTS[0], max_tokens=60, temperature=2.0, seed=seed, grammar=grammar)
        found = ""
        while True:
            try:
                found += next(parts)
            except StopIteration as end:
                assert end.value == "stop"
                break
        assert re.fullmatch(r"The (sea|house)\d{3}é日", found), found
    assert re.fullmatch(r"The (sea|house)\d{3}é日", text(model, max_tokens=60, grammar=grammar))


def test_a_schema_holds_as_text_and_as_an_object(model):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["ship", "house"]}, "old": {"type": "boolean"}, "n": {"enum": [1, 20]}},
        "required": ["kind", "old", "n"],
    }
    for seed, given in enumerate((schema, json.dumps(schema))):
        found = json.loads(text(model, max_tokens=200, temperature=1.5, seed=seed, json_schema=given))
        assert set(found) == {"kind", "old", "n"}
        assert found["kind"] in ("ship", "house") and found["n"] in (1, 20) and isinstance(found["old"], bool)


def test_a_grammar_that_the_vocabulary_cannot_write_is_an_error_and_not_the_end(random_path):
    with pi_gguf.open(random_path) as model:
        letters = {i for i in range(model.n_vocab) if b"e" in model.session.piece(i)}
        biases = dict.fromkeys(letters, -math.inf)
        with pytest.raises(OptionError, match="no token with which the text can go on"):
            text(model, grammar='root ::= "e"', logit_bias=biases)
        assert text(model)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('root ::= "a', "unexpected end of input"),
        ("root ::= x", "Undefined rule identifier 'x'"),
        ('root ::= root "a" | "b"', "left recursion"),
        ('x ::= "a"', "does not contain a 'root' symbol"),
        ("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000, "it ends"),
        ("", "not empty"),
        ('root ::= "a\0"', "null characters"),
        ('root ::= "\ud800"', "not UTF-8 at character 10"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason(grammar, reason, capfd):
    with pytest.raises(OptionError, match=reason):
        Sampling(grammar=grammar)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_token_that_a_grammar_forbids_is_never_taken(model, temperature):
    """Of logits that are no numbers the samplers draw any token, and the grammar's would end the process."""
    how = Sampling(grammar='root ::= "a"+', temperature=temperature)
    object.__setattr__(how, "repeat_penalty", 1e-50)  # 0 as llama.cpp has it: minus infinity times it is no number
    with Chooser(model.session.vocab, model.n_vocab, how, [0]) as chooser:
        token = chooser.choose(np.zeros(model.n_vocab, np.float32))
        assert token is None or set(model.session.piece(token)) == set(b"a")


def test_a_grammar_may_name_tokens_of_the_vocabulary(model, capfd):
    assert Sampling(grammar="root ::= <[7]>{2}").gbnf
    assert list(model.session.write(model.tokenize("a"), 9, Sampling(grammar="root ::= <[7]>{2}"))) == [7, 7]
    with pytest.raises(OptionError, match="names tokens that the vocabulary does not have"):
        text(model, grammar="root ::= <no such token>")


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[1]",
        '{"a": ' * 40_000,
        '"a"',
        {"type": "nothing"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/a"},
    ],
)
def test_a_wrong_schema_is_refused(schema):
    with pytest.raises(OptionError, match="json_schema: not a schema"):
        Sampling(json_schema=schema)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "minLength": 10**9}, "2,000 times at most, not 1,000,000,000"),
        ({"anyOf": [{"type": "array", "items": {"type": "string"}, "maxItems": 2001}]}, "not 2,001"),
        ({"type": "string", "maxLength": math.inf}, "not 1,000,000,000"),
        ({"type": "string", "pattern": "^(a{3}b{1, 9000})$"}, "not 9,000"),
        ({"type": "string", "pattern": "^a{٩٠٠٠}$"}, "not 9,000"),
        ({"type": "string", "pattern": "^a{" + "9" * 500 + "}$"}, "not 1,000,000,000"),
        ({"type": "string", "pattern": "^" + "a{2000}" * 300 + "$"}, "its grammar has more than 524,288 characters"),
        ({"enum": ["a" * 2**18]}, "at most 262,144 characters, got"),
    ],
)
def test_a_schema_that_becomes_too_much_is_refused(schema, reason):
    with pytest.raises(OptionError, match=reason):
        Sampling(json_schema=schema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be 0, or 0.01 to 1,000,000, got -1"),
        ({"temperature": math.nan}, "temperature must be 0, or 0.01 to 1,000,000, got nan"),
        ({"temperature": math.inf}, "temperature must be 0, or 0.01 to 1,000,000, got inf"),
        ({"temperature": 1e-38}, "temperature must be 0, or 0.01 to 1,000,000, got 1e-38"),
        ({"top_k": 0}, "top-k must be at least 1, got 0"),
        ({"top_p": 0}, "top-p must be above 0, and 1 at most, got 0"),
        ({"top_p": 1.1}, "top-p must be"),
        ({"min_p": 1}, "min-p must be at least 0 and below 1, got 1"),
        ({"repeat_penalty": 0}, "repeat-penalty must be 0.01 to 1,000,000, got 0"),
        ({"repeat_penalty": 1e-50}, "repeat-penalty must be 0.01 to 1,000,000, got 1e-50"),
        ({"repeat_penalty": 1e39}, "repeat-penalty must be 0.01 to 1,000,000"),
        ({"frequency_penalty": 2.5}, "frequency-penalty must be from -2 to 2, got 2.5"),
        ({"presence_penalty": -3}, "presence-penalty must be from -2 to 2, got -3"),
        ({"seed": -1}, "seed must be 0 to 4294967294, got -1"),
        ({"seed": 2**32 - 1}, "seed must be"),
        ({"stop": ["a", ""]}, "stop must not be empty"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must be a number"),
        ({"logit_bias": {1: math.inf}}, "logit_bias must be a number"),
        ({"grammar": "a", "json_schema": "b"}, "exclude each other"),
    ],
)
def test_values_that_cannot_work_are_refused(options, message):
    with pytest.raises(OptionError, match=message) as error:
        Sampling(**options)
    assert error.value.hint


def test_keywords_are_the_fields():
    hints = typing.get_type_hints(Sampling)
    assert typing.get_type_hints(SamplingKeywords) == {f.name: hints[f.name] for f in fields(Sampling)}
    assert len(hints) == 12


# Text


def test_text_stops_before_a_string_that_lies_across_tokens(model):
    whole = text(model, max_tokens=60)
    for start in (3, 10, 21):
        for length in (1, 5, 12):
            stop = whole[start : start + length]
            assert text(model, max_tokens=60, stop=[stop, "not there"]) == whole[: whole.find(stop)]
    assert text(model, max_tokens=60, stop="not there") == whole
    assert text(model, max_tokens=60, stop=[whole[12:16], whole[8:11]]) == whole[: whole.find(whole[8:11])]


def test_no_part_of_a_character_or_of_a_stop_string_is_given_away():
    made = StopText(["STOP", "OPEN"])
    pieces = ("é日".encode()[:1], "é日".encode()[1:4], "é日".encode()[4:], b"x ST", b"ART S", b"TOP more")
    assert [made.add(piece) for piece in pieces] == ["", "é", "日", "x ", "START ", ""]
    assert made.ended and not made.rest()
    made = StopText(["STOP"])
    assert [made.add(b"a STO"), made.rest()] == ["a ", "STO"] and not made.ended
    made = StopText()
    assert made.add(b"a\xffb\xe6\x97") + made.rest() == "ab", "what is no UTF-8 is left out"


def test_parts_are_the_text_of_single_tokens(model):
    assert len(list(model.complete(PROMPTS[1], max_tokens=20))) > 10


def test_long_tokens_are_not_lost(tmp_path):
    folder = make_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = "x" * 100
    tokenizer.add_tokens([long])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = tmp_path / "model.gguf"
    pi_gguf.convert(str(folder), file, quant="F32", check="none", certify=False)
    with pi_gguf.open(file) as opened:
        token = tokenizer.convert_tokens_to_ids(long)
        assert opened.detokenize([token]) == long
        assert text(opened, max_tokens=2, logit_bias={token: 1000.0}) == 2 * long


# Reading once


class Watch:
    """What `on_progress` was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, read: int, to_read: int, written: int) -> None:
        self.calls.append((read, to_read, written))


def test_the_second_turn_reads_only_what_is_new(model):
    watch, prompt = Watch(), "It was a dark night. " * 100
    logits(model, [5, 6, 7])
    answer = text(model, prompt, max_tokens=10, on_progress=watch)
    ids = model.tokenize(prompt)
    assert watch.calls[0] == (0, len(ids), 0) and watch.calls[-1] == (len(ids), len(ids), 10)
    assert [c[2] for c in watch.calls if c[2]] == list(range(1, 11))
    reads = [c[0] for c in watch.calls]
    assert reads == sorted(reads) and len(set(reads)) == -(-len(ids) // 512) + 1
    cached = list(model.session.ids)
    more = f"{prompt}{answer} And then the captain"
    again, new = Watch(), model.tokenize(more)
    written = text(model, more, on_progress=again)
    shared = next((i for i, pair in enumerate(zip(cached, new, strict=False)) if pair[0] != pair[1]), len(cached))
    assert shared > len(ids) - 3, "the prompt"
    assert again.calls[0] == (0, len(new) - shared, 0) and len(new) - shared < 20
    with pi_gguf.open(model.path) as fresh:
        assert text(fresh, more) == written


def test_reading_the_rest_equals_reading_all(model, tiny_gguf):
    ids = model.tokenize("It was a dark and stormy night. " * 20)
    for known in (0, 1, 50, len(ids) - 1, len(ids)):
        logits(model, ids[:known] or ids[:1])
        reused = logits(model, ids)
        with pi_gguf.open(tiny_gguf) as fresh:
            # Batches of other lengths are added up in another order: 4e-4 on a CPU with AMX.
            np.testing.assert_allclose(reused, logits(fresh, ids), atol=2e-3)


def test_where_the_cache_cannot_go_back_all_is_read(model, monkeypatch):
    ids = model.tokenize("It was a dark and stormy night")
    expected, watch = logits(model, ids), Watch()
    monkeypatch.setattr(llama_cpp_library(), "llama_memory_seq_rm", lambda *_: False)
    np.testing.assert_allclose(np.concatenate(list(model.session.read(ids, 1, on_progress=watch))), expected, atol=1e-4)
    assert watch.calls[0] == (0, len(ids), 0)


def test_a_text_and_scores_may_be_asked_for_in_turn(model):
    ids = model.tokenize("The sea was calm that day, and")
    expected, score = [text(model, p) for p in PROMPTS[:2]], model.score(ids, 4)[0]
    parts = [model.complete(p, max_tokens=24) for p in PROMPTS[:2]]
    found = ["", ""]
    for _ in range(100):
        for i, part in enumerate(parts):
            found[i] += next(part, "")
            np.testing.assert_allclose(model.score(ids, 4)[0], score, atol=1e-4)
    assert found == expected


def test_two_readings_at_once_are_a_mistake_that_is_noticed(model):
    one, two = model.tokenize("a b c " * 300), model.tokenize("d e f " * 300)
    first = model.session.read(one, len(one))
    next(first)
    next(model.session.read(two, len(two)))
    with pytest.raises(RuntimeError, match="read something else in between"):
        next(first)


# Leaving


def test_cancelling_stops_within_a_batch_and_the_session_goes_on(model, tiny_gguf):
    long = "It was a dark night. " * 300
    ids = model.tokenize(long)
    event, seen = Event(), Watch()
    assert len(ids) > 3 * 512
    logits(model, [5, 6, 7])

    def progress(read: int, to_read: int, written: int) -> None:
        seen(read, to_read, written)
        if read >= 512:
            event.set()

    parts = model.complete(long, max_tokens=5, cancelled=event.is_set, on_progress=progress)
    with pytest.raises(StopIteration) as end:
        next(parts)
    assert end.value.value == "cancelled" and seen.calls[-1][0] == 512, "not a batch more"
    after = logits(model, ids)
    with pi_gguf.open(tiny_gguf) as fresh:
        np.testing.assert_allclose(after, logits(fresh, ids), atol=1e-4)


def test_cancelling_stops_before_the_next_token(model):
    event, seen = Event(), []
    for part in model.complete(PROMPTS[0], max_tokens=50, cancelled=event.is_set):
        seen.append(part)
        if len(seen) == 3:
            event.set()
    assert len(seen) == 3
    assert text(model).startswith("".join(seen))


def test_a_text_may_be_left_anywhere(model):
    expected = text(model)
    for count in (0, 1, 5):
        parts = model.complete(PROMPTS[0], max_tokens=24)
        for _ in range(count):
            next(parts)
        parts.close()
        assert text(model) == expected


def test_an_interrupted_batch_is_read_again(model, monkeypatch):
    ids = model.tokenize("It was a dark and stormy night. " * 20)
    expected = logits(model, ids)
    logits(model, ids[:5])
    decode = llama_cpp_library().llama_decode

    def interrupted(*arguments):
        decode(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp_library(), "llama_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids)
    assert model.session.ids == ids[:5]
    np.testing.assert_allclose(logits(model, ids), expected, atol=1e-4)


def test_a_prompt_without_tokens_is_refused(random_path, monkeypatch):
    with pi_gguf.open(random_path) as model:
        monkeypatch.setattr(Model, "tokenize", lambda *_, **__: [])
        with pytest.raises(TextError, match="a prompt without a token"):
            list(model.complete(""))


def test_logits_that_are_no_numbers_are_an_error(model, monkeypatch):
    monkeypatch.setattr(Session, "_logits", lambda self, outputs: np.full((outputs, self.n_vocab), np.nan, np.float32))
    with pytest.raises(GgufError, match="its logits are no numbers"):
        text(model)


# Caches and adapters


def test_a_quantized_cache_reads_the_rest_as_it_reads_all(tiny_gguf):
    ids = list(range(5, 205))
    with pi_gguf.open(tiny_gguf, type_k="q8_0", type_v="q8_0") as model:
        expected = text(model), logits(model, ids)
        logits(model, ids[:100])
        np.testing.assert_allclose(logits(model, ids), expected[1], atol=1e-3)
        assert text(model) == expected[0]


# The command line


def test_run_takes_the_sampling(tiny_gguf, tmp_path, cli):
    schema = tmp_path / "ship.schema.json"
    schema.write_text('{"type": "object", "properties": {"ship": {"enum": [1, 2]}}, "required": ["ship"]}')
    code, out, err = cli(
        "run", tiny_gguf, "--prompt", "Once", "--json-schema", schema, "--temperature", "2", "--seed", "3"
    )
    assert code == 0 and json.loads(out)["ship"] in (1, 2), err
    grammar = tmp_path / "answer.gbnf"
    grammar.write_text('root ::= "yes STOP" [a-z]+')
    code, out, _ = cli("run", tiny_gguf, "--prompt", "Once", "--grammar", grammar, "--stop", " STOP", "--stop", "x")
    assert (code, out) == (0, "yes\n")
    few = ("--temperature", "2", "--top-k", "1", "--max-tokens", "9", "--prompt", "Once")
    assert (
        cli("run", tiny_gguf, *few)[1]
        == cli("run", tiny_gguf, *few[-4:])[1]
        != cli("run", tiny_gguf, *few[:2], *few[-4:])[1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-k", "0"), "top-k must be at least 1"),
        (("--min-p", "nan"), "min-p must be"),
        (("--grammar", "none.gbnf"), "--grammar none.gbnf: cannot be read"),
        (("--json-schema", "/dev/zero"), "--json-schema /dev/zero: cannot be read"),
    ],
)
def test_run_refuses_before_it_opens_a_file(options, message, cli):
    code, _, err = cli("run", "there-is-none.gguf", "--prompt", "a", *options)
    assert code == 2 and message in err and "hint: " in err


def test_the_earliest_of_several_stops_ends_a_text():
    text = StopText(["b", "a"])
    assert (text.add(b"xaxb"), text.ended) == ("x", True)
