"""Evaluation: the windows, the figures against plain definitions, and the same figures from both backends."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import WINDOW

import pi_gguf
from pi_gguf import bundled
from pi_gguf.checkpoint import load_checkpoint
from pi_gguf.evaluate import PasskeyPrompts, k_max, sampled_windows, sliding_windows
from pi_gguf.hf_model import HfModel
from pi_gguf.passkey import EVALUATION_FILLER, draw_key, is_evaluation_key
from pi_gguf.results import PasskeyCell
from pi_gguf.runtime import Model


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=1024, steps=0)
    return path


@pytest.fixture(scope="module")
def text_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(next(iter(bundled.novels("heldout").values()))[2000:4500])
    return path


@pytest.mark.parametrize("bos", [[], [7]])
def test_sliding_windows_score_every_token_once_with_full_windows(bos):
    ids = list(range(100, 200))
    jobs = sliding_windows(ids, 40, 16, bos)
    scored = [t for window, last in jobs for t in window[len(window) - last :]]
    assert scored == ids[1:]
    assert all(len(window) == 40 for window, _ in jobs)
    assert [last for _, last in jobs] == [39, 16, 16, 16, 12]
    assert all(window[: len(bos)] == bos for window, _ in jobs[1:])


def test_sampled_windows_score_the_same_tokens_at_every_window():
    ids = list(range(1000))
    short, long = (sampled_windows(ids, window, 300, 20, 3, [7]) for window in (50, 300))
    assert [w[-20:] for w, _ in short] == [w[-20:] for w, _ in long]
    assert [w[-1] for w, _ in short] == [299, 649, 999]
    assert {len(w) for w, _ in short} == {50} and {len(w) for w, _ in long} == {300}


def test_perplexity_is_the_exponential_of_the_mean_loss(llama, text_path):
    report = pi_gguf.evaluate_perplexity(str(llama), text=[str(text_path)], windows=[48], stride=16, max_tokens=48)
    checkpoint = load_checkpoint(str(llama))
    ids = torch.tensor([checkpoint.load_tokenizer()(text_path.read_text())["input_ids"][:48]])
    with torch.inference_mode():
        loss = checkpoint.load_model(dtype=torch.float32)(ids, labels=ids).loss
    assert report.rows[0].tokens == 47
    assert report.rows[0].perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_both_backends_measure_the_same(llama, gguf_path, text_path):
    options = {"text": [str(text_path)], "windows": [64, 256], "stride": 32, "max_tokens": 300}
    ours = pi_gguf.evaluate_perplexity(str(gguf_path), **options)
    theirs = pi_gguf.evaluate_perplexity(str(llama), context=1024, **options)
    plain = pi_gguf.evaluate_perplexity(str(llama), **options)
    for a, b, c in zip(ours.rows, theirs.rows, plain.rows, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-4)
        assert a.tokens == b.tokens == 299
        assert a.standard_error == pytest.approx(b.standard_error, rel=1e-3)
        assert a.perplexity != pytest.approx(c.perplexity, rel=1e-3), "the scaling made no difference"


@pytest.mark.parametrize("backend", ["gguf", "hf"])
def test_what_was_read_before_does_not_change_a_score(llama, gguf_path, backend):
    """Calls share the cache of a common start; every order must give what a fresh model gives."""

    def fresh():
        checkpoint = load_checkpoint(str(llama))
        return (
            Model(gguf_path, type_k="f32", type_v="f32", flash_attn=False)
            if backend == "gguf"
            else HfModel(checkpoint, rope=checkpoint.extended(1024))
        )

    rng = np.random.default_rng(0)
    first = rng.integers(2, 400, 700).tolist()
    second = first[:600] + rng.integers(2, 400, 60).tolist()
    warm = fresh()
    warm.score(first, 5)
    for ids, last in ((second, 30), (first, 699), (first, 20), (second[:100], 99), (second, 659)):
        np.testing.assert_allclose(warm.score(ids, last)[0], fresh().score(ids, last)[0], atol=2e-3)


def test_passkey_prompts_fill_the_window_with_the_key_at_its_distance(llama):
    lm = HfModel(load_checkpoint(str(llama)))
    prompts = PasskeyPrompts(lm, 2000)
    line = len(lm.tokenize(EVALUATION_FILLER, add_special=False))
    decode = lm._tokenizer.decode
    for distance in (300, 1000, 2000):
        ids, last, exact = prompts.make("54321", distance)
        assert 2000 - line < len(ids) <= 2000
        assert decode(ids[-last:]).strip() == "54321"
        assert decode(ids).endswith("What is the pass key? The pass key is 54321")
        assert decode(ids).count("The pass key is 54321. Remember it.") == 1
        before = decode(ids, skip_special_tokens=True).split("The pass key is 54321.")[0]
        assert abs(len(ids) - len(lm.tokenize(before)) - exact) <= 1
        assert abs(exact - distance) <= (line if distance < 2000 else line + len(prompts._start))


def test_k_max_is_the_largest_distance_with_a_fifth_found():
    cells = [PasskeyCell(100, 50, 50, 10, 10), PasskeyCell(100, 100, 99, 2, 10), PasskeyCell(200, 200, 198, 1, 10)]
    assert k_max(cells) == 100
    assert k_max(cells[2:]) == 0


def test_no_evaluation_key_filler_or_novel_is_in_the_training_mixture():
    mixture = bundled.training_mixture(3, 512)
    text = "".join(next(mixture) for _ in range(400))
    keys = {draw_key(random.Random(i), for_evaluation=True) for i in range(3000)}
    assert all(is_evaluation_key(key) for key in keys)
    assert not [key for key in keys if key in text]
    assert EVALUATION_FILLER.split(". ")[0] not in text
    assert not set(bundled.novels("train")) & set(bundled.novels("heldout"))
    assert text.count("The pass key is ") > 50
    predicates = {sentence.rpartition(" is ")[2] for sentence in EVALUATION_FILLER.split(". ") if " is " in sentence}
    assert len(predicates) == 3 and not predicates & set(bundled.QUALITIES)
    assert len(re.findall(r"The \w+ is \w+\.", text)) > 500, "other things are said to be something, as the key is"


def test_the_reports_are_json_with_provenance(cli, llama, text_path):
    code, out, _ = cli(
        "eval", "perplexity", llama, "--text", text_path, "--windows", "32,64", "--stride", "16", "--json"
    )
    assert code == 0
    report = json.loads(out)
    assert [row["window"] for row in report["rows"]] == [32, WINDOW]
    assert {"pi_gguf", "libraries", "seed", "device", "text_sha256", "elapsed_seconds"} <= set(report["provenance"])
    code, out, _ = cli("eval", "passkey", llama, "--windows", "512", "--distances", "2", "--keys", "1", "--json")
    assert code == 0 and len(json.loads(out)["cells"]) == 2


def test_reports_are_drawn(cli, llama, text_path, tmp_path):
    for command in (
        ("perplexity", llama, "--text", text_path, "--windows", "32,64", "--stride", "16"),
        ("passkey", llama, "--windows", "512,1024", "--distances", "2", "--keys", "1"),
        ("kl", llama, "--against", llama, "--text", text_path),
    ):
        path = tmp_path / f"{command[0]}.png"
        code, _, err = cli("eval", *command, "--plot", path)
        assert code == 0 and f"wrote {path}" in err
        assert path.read_bytes()[:4] == b"\x89PNG"
    for path, message in (
        (tmp_path / "a.xls", "plot must end in one of"),
        (tmp_path / "no" / "a.png", "no such folder"),
    ):
        code, _, err = cli("eval", *command, "--plot", path)
        assert code == 2 and message in err
