"""The benchmark of the KV cache's types, at toy size: each type costs what it must, and the table has every one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pi_gguf

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import kv_cache  # noqa: E402
import write_tables  # noqa: E402


@pytest.mark.slow
def test_it_runs_at_toy_size(tiny_gguf, tmp_path):
    out = tmp_path / "kv.json"
    run = [sys.executable, ROOT / "benchmarks" / "kv_cache.py", tiny_gguf, "--toy", "--out", out]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    found = record["files"][tiny_gguf.name]["512"]
    assert list(found) == [kv_cache.named(cache) for cache in kv_cache.CACHES]
    with pi_gguf.open(tiny_gguf, n_ctx=544) as model:
        ids = kv_cache.novel_ids(model, 512)
        mean = -model.score(ids, kv_cache.SCORED)[0].mean()
    for name, run in found.items():
        assert run["read, best"] >= run["read"] > 0 and run["write, best"] >= run["write"] > 0
        near = 0.05 if "q4_0" in name else 5e-3
        assert run["perplexity"] == pytest.approx(float(2.718281828**mean), rel=near)
        assert 0 <= run["passkeys"] <= 1
    sizes = [found[name]["bytes"] for name in ("K f32, V f32", "K f16, V f16", "K q8_0, V f16", "K q4_0, V f16")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 2 * sizes[1]
    table = write_tables.kv_table(record)
    assert table.count(tiny_gguf.name) == len(kv_cache.CACHES) and table.count("(1.00)") >= 2
