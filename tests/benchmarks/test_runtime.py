"""The benchmark of the runtime, at toy size: it runs, its figures are those of its runs, its tables can be written."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import pi_gguf

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import write_tables  # noqa: E402


@pytest.mark.slow
def test_it_runs_at_toy_size(tmp_path):
    path, out = tmp_path / "tiny.gguf", tmp_path / "runtime.json"
    pi_gguf.convert("bundled:tiny", path, context=4096, steps=0, quant="F16", check="none")
    run = [sys.executable, ROOT / "benchmarks" / "runtime.py", path, "--toy", "--out", out]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    (found,) = record["runtime"].values()
    assert list(found["loops"]) == ["64", "512"]
    for runs in found["loops"].values():
        for run in runs.values():
            assert list(run["medians"]) == ["pi-gguf", "llama-cpp-python", "llama.cpp"]
            for who, rates in run["runs"].items():
                assert run["medians"][who] == pytest.approx(statistics.median(rates), abs=0.1)
                assert run["best"][who] == max(rates) > 0
            ours = run["medians"]["pi-gguf"]
            assert run["ratios"]["llama.cpp"] == pytest.approx(ours / run["medians"]["llama.cpp"], abs=0.001)
    document = found["document"]
    assert document["tokens"] > 500 and 0 < document["second"] < document["first"]
    assert document["kept"]["bytes"] > 2**20
    tables = {write_tables.loops_table: 4, write_tables.waits_table: 1}
    assert {table: table(record).count("tiny.gguf") for table in tables} == tables
