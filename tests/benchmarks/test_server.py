"""The benchmark of the server: what it counts and finds, and a run at toy size whose tables can be written."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import pi_gguf

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "server.py"
sys.path.insert(0, str(ROOT / "tools"))

import write_tables  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("server_benchmark", SCRIPT)
bench = sys.modules["server_benchmark"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)


def test_a_batch_lasts_as_long_as_reading_its_tokens():
    even = bench.seconds_of_batches([(0.0, 10.0), (512, 11.0), (1024, 12.0)])
    assert even == {"mean": 1.0, "longest": 1.0}
    slower = bench.seconds_of_batches([(0.0, 0.0), (512, 1.0), (1024, 3.0), (1280, 5.0)])
    assert slower["mean"] == pytest.approx(5.0 * 512 / 1280)
    assert slower["longest"] == pytest.approx(3.0), "the last 512: half of what took 2, and what took 2"
    small = bench.seconds_of_batches([(0.0, 0.0), (128, 1.0), (256, 2.0), (384, 3.0), (512, 4.0)])
    assert small == {"mean": 4.0, "longest": 4.0}
    with pytest.raises(SystemExit, match="no progress"):
        bench.seconds_of_batches([(0.0, 0.0), (100, 1.0)])


def test_what_a_page_loads_is_found():
    page = (
        '<link rel="stylesheet" href="/desk/a.css"><script type="module" src="desk/b.js"></script>'
        "<img src='data:image/png;base64,x'><a href='/elsewhere'>x</a><script src=\"https://example.org/c.js\"></script>"
    )
    assert sorted(bench.links("text/html", page, "/")) == ["/desk/a.css", "/desk/b.js"]
    module = (
        'import { a } from "./a.js"; import "./b.js"; export { c } from "../c.js"; const d = await import("./d.js");'
    )
    assert bench.links("text/javascript", module, "/desk/b.js") == ["/desk/a.js", "/desk/b.js", "/c.js", "/desk/d.js"]
    style = "@import 'x.css'; a { background: url(y.svg) } b { background: url(data:image/png;base64,x) }"
    assert bench.links("text/css", style, "/desk/a.css") == ["/desk/x.css", "/desk/y.svg"]
    assert bench.links("image/png", page, "/") == []


def test_tokens_are_timed_from_the_first_to_the_end():
    found, clock = bench.Answer(), iter([2.0])
    for chunk in (
        {"choices": [], "prompt_progress": {"processed": 3}},
        {"choices": [{"text": "a"}]},
        {"choices": [{"delta": {"content": "b"}}]},
        {"choices": [{"text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 5}},
    ):
        found.add(chunk, lambda: next(clock))
    found.ended = 3.0
    assert (found.first, found.tokens, found.milliseconds) == (2.0, 5, 250.0)


@pytest.mark.slow
def test_it_runs_at_toy_size(tmp_path):
    pytest.importorskip("starlette", reason="needs pi-gguf[serve]")
    path, out = tmp_path / "tiny.gguf", tmp_path / "server.json"
    pi_gguf.convert("bundled:tiny", path, context=4096, steps=0, quant="F16", check="none")
    run = [sys.executable, SCRIPT, path, "--toy", "--peer", "none", "--out", out]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    (found,) = record["server"].values()
    assert list(found["write"]) == ["1", "2"]
    for run in found["write"].values():
        assert run["medians"]["pi-gguf"] == pytest.approx(statistics.median(run["runs"]["pi-gguf"]), abs=0.1)
        assert run["medians"]["pi-gguf"] > 0
    assert list(found["added"]) == ["1", "2"]
    for part in found["added"].values():
        medians = part["medians"]
        assert part["added"]["pi-gguf"] == pytest.approx(medians["pi-gguf"] - medians["session"], abs=0.002)
    (gap,) = found["gap"]["runs"]["pi-gguf"]
    assert gap["by a mean batch"] == pytest.approx(gap["gap"] / gap["mean"], rel=0.01)
    assert 0 < gap["mean"] <= gap["longest"] * 2, "windows of a batch cover the text, the last one in part"
    document = found["document"]
    assert document["tokens"] > 400 and document["kept bytes"] > 2**19
    assert set(document["medians"]["pi-gguf"]) == {"first", "second", "after a restart"}
    assert found["page"]["bytes"] > 1000 and found["page"]["files"] >= 3
    tables = {write_tables.clients_table: 2, write_tables.streams_table: 1, write_tables.served_table: 1}
    assert {table: table(record).count("tiny.gguf") for table in tables} == tables
