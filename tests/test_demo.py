"""The main job at a small size on the bundled, trained model: what tells interpolation from a no-op."""

from __future__ import annotations

import json

import pytest

import pi_gguf
from pi_gguf.demo import demo, table_cells
from pi_gguf.tables import markdown_table


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    curriculum = {"steps": 18, "train_window": 1024, "batch_tokens": 4096, "factor_warmup": 0}
    return demo(out=str(out), context=4096, **curriculum, documents=1, stride=1024, distances=1, keys=1)


def rows(report):
    return {row.name.split(" (")[0]: row for row in report.rows}


def test_without_scaling_the_model_is_lost_beyond_its_window(report):
    base = rows(report)["base, no scaling"]
    assert base.perplexity[1].perplexity > 1.25 * base.perplexity[0].perplexity
    assert base.k_max == 2048


def test_a_few_steps_of_position_interpolation_bring_it_back(report):
    table = rows(report)
    base, before, after = table["base, no scaling"], table["PI before training"], table["PI after training"]
    assert after.perplexity[1].perplexity < 0.9 * base.perplexity[1].perplexity
    assert after.perplexity[1].perplexity < before.perplexity[1].perplexity
    assert after.perplexity[1].perplexity < 1.2 * base.perplexity[0].perplexity


def test_every_file_measures_like_the_model_it_was_made_from(report):
    table = rows(report)
    for name, tolerance in (("F16", 0.01), ("Q8_0", 0.02), ("Q4_K_M", 0.2)):
        for ours, theirs in zip(table[name].perplexity, table["PI after training"].perplexity, strict=True):
            assert ours.perplexity == pytest.approx(theirs.perplexity, rel=tolerance)
            assert ours.tokens == theirs.tokens == 1024


def test_the_folder_holds_what_was_promised(report, tmp_path_factory):
    from pathlib import Path

    out = Path(report.out)
    assert json.loads((out / "results.json").read_text())["rows"][0]["k_max"] == 2048
    assert markdown_table(*table_cells(report.to_json())) in (out / "table.md").read_text()
    for name in ("perplexity.png", "passkey.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "4096" in str(report) and "k_max" in str(report)
    with pi_gguf.open(out / "tiny-4k-Q4_K_M.gguf") as model:
        assert model.n_ctx == 4096
        assert len("".join(model.complete("The captain", max_tokens=20))) > 20
