"""Ways side by side: the figures of the evaluations, the right way under the right name, and going on."""

from __future__ import annotations

import pytest
from helpers import WINDOW, make_llama

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.errors import OptionError

CONTEXT = 8 * WINDOW


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(next(iter(novels("heldout").values()))[:5000])
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With weights so large that positions matter."""
    return str(make_llama(tmp_path_factory.mktemp("model"), initializer_range=0.5, max_position_embeddings=256))


def test_each_row_is_what_eval_measures(model, text, cli):
    options = {"text": [text], "samples": 1}
    report = pi_gguf.compare(model, context=1024, distances=2, keys=1, **options)
    assert [row.method for row in report.rows] == ["none", "linear", "linear", "ntk", "yarn", "nope"]
    for row in report.rows:
        assert [p.window for p in row.perplexity] == [256, 512, 1024]
        alone = pi_gguf.evaluate_perplexity(
            model, windows=(256, 512, 1024), stride=255, context=row.context, method=row.method, **options
        )
        assert row.perplexity == alone.rows
        passkeys = pi_gguf.evaluate_passkey(
            model, windows=(256, 512, 1024), distances=2, keys=1, context=row.context, method=row.method
        )
        assert (row.k_max, row.asked) == (passkeys.k_max[model], 6)
    base = pi_gguf.evaluate_perplexity(model, windows=(256, 1024), stride=255, **options)
    assert report.rows[0].perplexity[0].perplexity == pytest.approx(base.rows[0].perplexity), "none is the base"
    figures = [row.perplexity[-1].perplexity for row in report.rows]
    assert figures[1] == figures[2], "to four times the window they are one"
    assert len(set(figures)) == 5, "the others differ"


def test_superhot_keeps_its_factor(model, text):
    report = pi_gguf.compare(model, context=2048, text=[text], samples=1, distances=1, keys=1)
    assert [row.context for row in report.rows] == [2048, 2048, 1024, 2048, 2048, 2048]


def test_a_comparison_goes_on(model, text, tmp_path, monkeypatch, cli):
    command = ("eval", "compare", model, "--context", "512", "--text", text, "--samples", "1", "--distances", "1")
    command += ("--keys", "1", "--keep", tmp_path / "kept.jsonl", "--plot", tmp_path / "compare.png")
    code, first, _ = cli(*command)
    assert code == 0 and "SuperHOT" in first and (tmp_path / "compare.png").exists()
    monkeypatch.setattr("pi_gguf.evaluate.compare.evaluate_perplexity", None)  # nothing is measured again
    code, again, _ = cli(*command, "--overwrite")
    assert code == 0 and again == first


def test_a_window_that_is_no_longer_is_refused(model):
    with pytest.raises(OptionError, match="context must be above the window of 256 tokens, got 256"):
        pi_gguf.compare(model, context=256)
