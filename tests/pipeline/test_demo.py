"""The main job at a small size on the bundled, trained model: what tells interpolation from a no-op."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr

import pytest

import pi_gguf
from pi_gguf.common.tables import markdown_table
from pi_gguf.pipeline.demo import BASE, ROWS, _Table, demo, table_cells


@pytest.fixture(scope="module")
def told() -> io.StringIO:
    """What the demo says while it goes on."""
    return io.StringIO()


@pytest.fixture(scope="module")
def report(tmp_path_factory, told):
    out = tmp_path_factory.mktemp("demo")
    curriculum = {"steps": 18, "train_window": 1024, "batch_tokens": 4096, "factor_warmup": 0}
    with redirect_stderr(told):
        return demo(out=str(out), context=4096, **curriculum, documents=1, stride=1024, distances=1, keys=1)


def rows(report):
    return {row.name.split(" (")[0]: row for row in report.rows}


@pytest.mark.slow
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


def test_each_row_is_told_when_it_is_measured_and_the_base_before_the_training(report, told):
    first, head, *lines = told.getvalue().splitlines()
    assert "2048 to 4096 tokens" in first and "18 steps" in first
    assert re.search(r"about [\d.]+ (s|min|h) here$", first)
    header, cells = table_cells(report.to_json())
    assert re.split("  +", head) == header
    places = []
    for row in cells:
        (place,) = (i for i, line in enumerate(lines) if re.split("  +", line)[: len(row)] == row)
        places.append(place)
        end = lines[place].removeprefix(lines[place][: len(head)])
        assert re.fullmatch(r"   about [\d.]+ (s|min|h) left" if row != cells[-1] else "", end)
        assert lines[place][: len(head)].rstrip()[-1].isdigit()  # k_max stands under its name
    training = next(i for i, line in enumerate(lines) if line.startswith("no --data"))
    assert places == sorted(places) and places[1] < training < places[2]


def test_the_time_left_follows_what_the_parts_so_far_took(monkeypatch):
    settings = {
        "context": 4096, "samples": 1, "documents": 1, "distances": 4, "other_distances": 1, "keys": 2, "device": "cpu"
    }  # fmt: skip
    monkeypatch.setattr("pi_gguf.pipeline.demo.reading_seconds", lambda model, tokens, device: tokens[2048] / 2048)
    table = _Table([], settings, training_seconds=30)
    assert table._left() == "54 s"  # 5 rows of 3 prompts a window, one of 9
    table._taken[BASE] = 6.0
    assert table._left() == "102 s"  # twice as slow
    table.training_seconds = 0
    table._taken |= dict.fromkeys(ROWS[1:3], 4.5)
    assert table._left() == "9 s"  # 9 planned, the other 15 took 15


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
