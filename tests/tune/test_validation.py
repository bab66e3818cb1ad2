"""What is measured while a fine-tune runs and at its end, against the same figures measured by the commands."""

from __future__ import annotations

import json

import pytest
from helpers import WINDOW

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, TextError
from pi_gguf.measure.perplexity import Yardstick
from pi_gguf.tune.validation import Validation

CONTEXT = 4 * WINDOW
STRIDE = WINDOW - 1
OPTIONS = {"context": CONTEXT, "steps": 4, "batch_tokens": 256, "learning_rate": 0.01, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some 5000 tokens, less than is read of a text at most."""
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(next(iter(novels("heldout").values()))[:4000])
    return path


def record_of(folder):
    return json.loads((folder / "pi_gguf.json").read_text())


def perplexities(model, text, windows):
    report = pi_gguf.evaluate_perplexity(
        str(model), text=[str(text)], windows=windows, stride=STRIDE, samples=Yardstick.SAMPLES
    )
    return [row.perplexity for row in report.rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "novel.txt"
    path.write_text(next(iter(novels("train").values()))[:30_000])
    return str(path)


@pytest.fixture(scope="module")
def run(llama, text, data, tmp_path_factory):
    options = {**OPTIONS, "data": [data], "eval_text": [str(text)]}
    return pi_gguf.extend(str(llama), tmp_path_factory.mktemp("run") / "out", eval_steps=2, report_to="none", **options)


def test_validations_are_what_eval_measures(run, text):
    found = record_of(run)["validations"]
    assert [entry["step"] for entry in found] == [2, 4]
    assert len(json.loads((run / "losses.json").read_text())) == 4, "validation takes no step's loss away"
    last = [found[-1][f"eval_perplexity_{window}"] for window in (WINDOW, CONTEXT)]
    assert last == pytest.approx(perplexities(run, text, (WINDOW, CONTEXT)), rel=0.005)  # one of them in 16 bits
    assert abs(found[0][f"eval_perplexity_{CONTEXT}"] / last[1] - 1) > 0.05, "an untrained model differs"


def test_the_price_is_perplexity_at_the_old_window_before_and_after(run, llama, text):
    price = record_of(run)["price"]
    assert price["window"] == WINDOW
    assert price["before"] == pytest.approx(perplexities(llama, text, (WINDOW, CONTEXT))[0], rel=1e-5)
    assert price["after"] == pytest.approx(perplexities(run, text, (WINDOW, CONTEXT))[0], rel=1e-5)
    assert abs(price["after"] / price["before"] - 1) > 0.05


def test_the_price_is_printed(llama, text, data, tmp_path, cli):
    options = ("--context", CONTEXT, "--steps", "1", "--data", data, "--eval-text", text, "--device", "cpu")
    code, _, err = cli("extend", llama, tmp_path / "out", *options)
    price = record_of(tmp_path / "out")["price"]
    assert code == 0
    assert f"price at 64 tokens: perplexity {price['before']:.4g} before, {price['after']:.4g} after" in err


def test_a_run_ends_early_when_k_max_is_the_window(tmp_path, cli):
    """Unscaled positions a little beyond the window: the base finds keys there before any training."""
    options = ("--method", "none", "--train-window", "64", "--batch-tokens", "64", "--learning-rate", "1e-9")
    command = ("extend", "bundled:tiny", tmp_path / "out", "--context", "2080", "--steps", "3", "--device", "cpu")
    code, _, err = cli(*command, *options, "--eval-steps", "1", "--early-stop")
    assert code == 0, err
    assert "early stop at step 1: k_max has reached the window" in err
    record = record_of(tmp_path / "out")
    assert (record["steps_done"], record["validations"][0]["eval_k_max"]) == (1, 2080)
    assert len(json.loads((tmp_path / "out" / "losses.json").read_text())) == 1


@pytest.mark.slow
def test_a_run_goes_on_while_keys_are_lost(tmp_path):
    out = pi_gguf.extend(
        "bundled:tiny", tmp_path / "out", context=4096, steps=2, train_window=64, batch_tokens=64, learning_rate=1e-9,
        device="cpu", eval_steps=1, early_stop=True, report_to="none",
    )  # fmt: skip
    record = record_of(out)
    assert record["steps_done"] == 2
    assert [entry["eval_k_max"] for entry in record["validations"]] == [0, 0]


def test_what_cannot_be_validated_is_refused_before_the_run(llama, text, tmp_path, capfd):
    checkpoint = load_checkpoint(str(llama))
    options = {"every": 1, "early_stop": False, "text": [str(text)]}
    for changed, message in (
        ({"every": -1}, "eval-steps must not be negative, got -1"),
        ({"every": 0, "early_stop": True}, "early-stop needs eval-steps, got 0"),
        ({"early_stop": True}, "early-stop: no passkeys, windows must be at least"),
    ):
        with pytest.raises(OptionError, match=message):
            Validation(checkpoint.extended(2 * WINDOW), **{**options, **changed})
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:300])
    with pytest.raises(TextError, match=r"short.txt: \d+ tokens, too few to validate at 256"):
        Validation(checkpoint.extended(CONTEXT), **{**options, "text": [str(short)]})
    capfd.readouterr()
    Validation(checkpoint.extended(2 * WINDOW), **options)
    assert "validation without passkeys: windows must be at least" in capfd.readouterr().err


def test_a_price_that_cannot_be_measured_is_said(llama, tmp_path, capfd, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    checkpoint = load_checkpoint(str(llama)).extended(CONTEXT)
    assert Validation(checkpoint, every=0, early_stop=False, text=[str(short)]).price(checkpoint, "cpu") is None
    assert f"price at 64 tokens: not measured, {short} has" in capfd.readouterr().err
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: 1000)
    assert Validation(checkpoint, every=0, early_stop=False, text=()).price(checkpoint, "cpu") is None
    assert "and 1000 B are free" in capfd.readouterr().err
