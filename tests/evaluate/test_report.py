"""The page: its figures are those of the suites, its tables are all there, and it goes on where it stopped."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_llama

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.evaluate.report import passkey_table
from pi_gguf.gguf.header import Entry, read_header, tensors_sha256, write_changed
from pi_gguf.measure.results import PageReport, PasskeyCell, ShortReport

BASE, CONTEXT = 512, 1024


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, the folder it became, with validations, and a file."""
    folder = tmp_path_factory.mktemp("report")
    base = make_llama(folder / "base", max_position_embeddings=BASE)
    (folder / "train.txt").write_text(next(iter(novels("train").values()))[:12_000])
    extended = pi_gguf.extend(
        str(base), folder / "extended", context=CONTEXT, data=[str(folder / "train.txt")], steps=4, batch_tokens=1024,
        eval_steps=2, device="cpu", report_to="none",
    )  # fmt: skip
    pi_gguf.convert(str(extended), folder / "model.gguf", quant="F16", check="none", certify=False)
    return str(base), str(extended), str(folder / "model.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(next(iter(novels("heldout").values()))[:4000])
    return str(path)


def options(out, text):
    few = {"samples": 1, "distances": 2, "keys": 1, "limit": 5}
    return {"out": str(out), "text": [text], "second_text": [text], **few}


@pytest.fixture(scope="module")
def report(made, text, tmp_path_factory):
    return pi_gguf.evaluate_all(*made, **options(tmp_path_factory.mktemp("page") / "report", text))


def test_the_page_has_the_papers_tables_and_figure(report, made):
    page = Path(report.path).read_text()
    titles = re.findall(r"<h2>([^:<]+)", page)
    assert titles == [*(f"Table {i}" for i in range(1, 6)), "What quantization costs, by position", "Figure 2"]
    assert page.count("data:image/png;base64,") == 4, "perplexity, passkeys, divergence, figure 2"
    assert "Not recorded" not in page and "Not measured" not in page
    for paper in ("7.23", "6.77", "2.82", "2.48", "112.13", "2560", "18432", "76.1", "about 600"):
        assert f"<td>{paper}</td>" in page
    labels = ["base, no scaling", "base, PI, untrained", "extended", "model.gguf"]
    assert list(report.perplexity) == list(report.passkeys) == labels
    for label in labels:
        cells = "".join(f"<td>{row.perplexity:.2f}</td>" for row in report.perplexity[label])
        assert f"<td>{label}</td>{cells}" in page


def test_its_figures_are_those_of_the_suites(report, made, text):
    base, extended, file = made
    measured = {"text": [text], "windows": [BASE, CONTEXT], "samples": 1}
    for label, model, scaled_to in (
        ("base, no scaling", base, None), ("base, PI, untrained", base, CONTEXT), ("extended", extended, None),
        ("model.gguf", file, None),
    ):  # fmt: skip
        rows = pi_gguf.evaluate_perplexity(model, context=scaled_to, **measured).rows
        assert [r.perplexity for r in report.perplexity[label]] == [r.perplexity for r in rows]
    for label, model, scaled_to in (("base, PI, untrained", base, CONTEXT), ("model.gguf", file, None)):
        asked = {"windows": [CONTEXT], "distances": 2, "keys": 1, "growing": True, "context": scaled_to}
        cells = pi_gguf.evaluate_passkey(model, **asked).cells
        assert report.passkeys[label] == [replace(cell, model=label) for cell in cells]
    assert report.texts == report.second_texts == [Path(text).name]
    assert report.perplexity["base, no scaling"] != report.perplexity["base, PI, untrained"]
    recorded = json.loads(Path(extended, "pi_gguf.json").read_text())["validations"]
    assert report.steps == {"extended": recorded} and [entry["step"] for entry in recorded] == [2, 4]
    assert report.short.models == list(made) and {row.difference for row in report.short.rows[:2]} == {None}
    kl = pi_gguf.evaluate_kl(file, against=extended)
    assert [r.mean for r in report.divergences[0].rows] == [r.mean for r in kl.rows]
    assert json.loads(Path(report.path).with_suffix(".json").read_text())["context"] == CONTEXT


def test_it_goes_on_where_it_stopped(report, made, text, monkeypatch):
    monkeypatch.setattr("pi_gguf.measure.language_model.LanguageModel.score", None)
    again = pi_gguf.evaluate_all(*made, **options(Path(report.path).parent, text))
    assert (again.perplexity, again.passkeys) == (report.perplexity, report.passkeys)
    assert again.short.rows == report.short.rows


def test_it_goes_on_with_the_texts_of_the_sample_too(made, text, tmp_path, monkeypatch):
    monkeypatch.setattr("pi_gguf.bundled.novels", lambda split: {f"{split}.txt": Path(text).read_text()})
    sample = {**options(tmp_path / "out", ""), "text": (), "second_text": ()}
    first = pi_gguf.evaluate_all(*made, **sample)
    monkeypatch.setattr("pi_gguf.measure.language_model.LanguageModel.score", None)
    assert pi_gguf.evaluate_all(*made, **sample).perplexity == first.perplexity


def test_what_makes_no_page_is_refused(made, cli, tmp_path):
    base, extended, _ = made
    code, _, err = cli("eval", "report", base, base, "--out", tmp_path / "out")
    assert code == 2 and "models must differ" in err
    code, _, err = cli("eval", "report", extended, base, "--out", tmp_path / "out")
    assert code == 2 and "models must have one window above the base's 1024 tokens" in err
    assert not (tmp_path / "out").exists()
    code, _, err = cli("eval", "report", base)
    assert code == 2


def test_a_table_that_cannot_be_measured_is_named(report, made, text, tmp_path):
    shutil.copytree(Path(report.path).parent, tmp_path / "out")
    again = pi_gguf.evaluate_all(*made, **options(tmp_path / "out", text), tasks=",")
    assert again.short is None and "Table 5 was not measured: tasks must be names" in Path(again.path).read_text()


def test_a_model_card_shows_its_tables_and_plots(report, made, cli, tmp_path):
    _, _, file = made
    folder = Path(report.path).parent
    renamed = tmp_path / "other name.gguf"
    header = read_header(Path(file))
    write_changed(header.changed({"general.name": Entry.of("Another")}), renamed)
    code, out, _ = cli("card", renamed, "--report", folder, "--out", tmp_path / "README.md")
    assert code == 0 and out.strip() == f"wrote {tmp_path}/README.md"
    text = (tmp_path / "README.md").read_text()
    plots = [f"other name-{kind}.png" for kind in ("perplexity", "passkeys", "divergence")]
    assert re.findall(r"!\[.+\]\((.+)\)", text) == [name.replace(" ", "%20") for name in plots]
    for name, of_page in zip(plots, ("perplexity", "passkeys", "divergence"), strict=True):
        assert (tmp_path / name).read_bytes() == (folder / f"{of_page}.png").read_bytes()
    for label, rows in report.perplexity.items():
        assert f"| {label} | {' | '.join(f'{row.perplexity:.2f}' for row in rows)} |" in text
    assert "| model.gguf | 0 | 0% | 0% |" in text and "Not measured" not in text
    means = " | ".join(f"{row.mean:.2g}" for row in report.divergences[0].rows)
    assert f"| model.gguf | {means} | " in text and "next_sentence acc" in text
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "README.md").unlink()
    code, _, err = cli("card", renamed, "--report", folder, "--out", tmp_path / "README.md")
    assert code == 2 and "perplexity.png: exists" in err and not (tmp_path / "README.md").exists()
    code, out, _ = cli("card", renamed, "--report", folder, "--out", tmp_path / "README.md", "--overwrite")
    assert code == 0 and {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_card_takes_no_report_of_another_file(report, made, cli, tmp_path):
    base, _, file = made
    other = tmp_path / "model.gguf"
    pi_gguf.convert(base, other, quant="F16", check="none", certify=False, context=CONTEXT, steps=0)
    folder = Path(report.path).parent
    code, _, err = cli("card", other, "--report", folder, "--out", tmp_path / "README.md")
    assert code == 2 and "is not what was measured in" in err and "(model.gguf)" in err
    (tmp_path / "report.json").write_text('{"path": 1}')
    for where, says in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "no PageReport (PageReport.__init__() missing"),
    ):
        code, _, err = cli("card", file, "--report", where, "--out", tmp_path / "README.md")
        assert code == 2 and "report.json: no report of an evaluation" in err and says in err
    (tmp_path / "report.json").write_text("no JSON")
    assert cli("card", file, "--report", tmp_path)[0] == 2
    assert not (tmp_path / "README.md").exists()


def test_keys_found_are_counted_by_distance(report):
    cells = [PasskeyCell(d, d, d, found, 4) for d, found in ((256, 4), (512, 2), (768, 0), (1024, 1))]
    table = passkey_table(replace(report, passkeys={"a": cells}))
    assert table == [["", "k_max", "1-512", "513-1024"], ["a", "512", "75%", "12%"]]


def test_what_was_measured_is_known_by_its_tensors(made, tmp_path):
    _, _, file = made
    header = read_header(Path(file))
    known = tensors_sha256(Path(file))
    for changed, same in (
        (header.changed({"llama.context_length": Entry.of(7)}), True),
        (replace(header, tensor_infos=header.tensor_infos.replace(b"attn_q.", b"attn_x.")), False),
    ):
        write_changed(changed, tmp_path / "changed.gguf")
        assert (tensors_sha256(tmp_path / "changed.gguf") == known) is same
    data = bytearray(Path(file).read_bytes())
    data[-40] ^= 1
    (tmp_path / "changed.gguf").write_bytes(data)
    assert tensors_sha256(tmp_path / "changed.gguf") != known


def test_a_report_comes_back_from_json(report):
    told = report.to_json()
    again = PageReport.from_json(json.loads(json.dumps(told)))
    assert again.to_json() == json.loads(json.dumps(told))
    assert replace(again, path=report.path, base=report.base).perplexity == report.perplexity
    assert str(Path(report.path).parent) not in json.dumps(told)
    with pytest.raises(ValueError, match="no ShortReport"):
        ShortReport.from_json({"models": [], "rows": [{"task": "a"}]})
    with pytest.raises(ValueError, match="no PageReport"):
        PageReport.from_json([])
