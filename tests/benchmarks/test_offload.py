"""The benchmark of llama.cpp on a card, at toy size on the CPU: it runs, its files are sound, deaths are recorded."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import offload  # noqa: E402


def test_measurements_have_names_of_their_own():
    for scale, count in (("toy", 11), ("full", 32)):
        names = [job["name"] for job in offload.list_jobs(scale)]
        assert len(names) == len(set(names)) == count, scale


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_a_random_file_is_a_sound_one(kind, tmp_path):
    import gguf

    import pi_gguf

    pattern, path, shape = tmp_path / "pattern.gguf", tmp_path / "random.gguf", offload.SHAPES["toy"]
    offload.convert_plainly("bundled:tiny", pattern, 32768, "F16")
    offload.write_random(path, shape, kind, pattern, 1024)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(found) == 3 + 9 * shape.layers
    assert found["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert found["blk.1.ffn_down.weight"].shape.tolist() == [shape.inner, shape.width]
    assert found["blk.1.attn_k.weight"].shape.tolist() == [shape.width, shape.kv_heads * shape.head]
    matrices = [t for t in found.values() if t.tensor_type.name == kind]
    assert sum(int(t.n_elements) for t in matrices) == shape.parameters - 5 * shape.width + 2048 * shape.width
    read = sum(int(t.n_bytes) for t in found.values()) - int(found["token_embd.weight"].n_bytes)
    assert read == shape.weight_bytes(kind)
    with pi_gguf.open(path, device="cpu") as model:
        logprobs, _ = model.score(model.tokenize("It was a dark and stormy night"), 4)
        assert model.window == 1024 and (logprobs < 0).all()


def test_operations_are_those_of_a_known_model():
    shape = offload.SHAPES["8b"]
    assert shape.parameters == pytest.approx(6.98e9 + 2048 * 4096, rel=1e-3)  # Llama 3 8B has 6.98 B in its layers
    assert shape.operations(1) == pytest.approx(2 * shape.parameters, rel=1e-3)


@pytest.mark.slow
def test_it_runs_at_toy_size(tmp_path):
    out = tmp_path / "out.json"
    run = [sys.executable, ROOT / "benchmarks" / "offload.py", "--device", "cpu", "--scale", "toy", "--limit", "300"]
    done = subprocess.run([*run, "--out", out, "--folder", tmp_path], capture_output=True, text=True, check=True)
    record = json.loads(out.read_text())
    results = record["results"]
    assert len(results) == 11 and not [r for r in results.values() if "error" in r or "skipped" in r], done.stdout
    flash, plain, small = (r for r in results.values() if r["kind"] == "kl")
    for way in ("prose 3072, batches", "passkey 3072, batches"):
        assert 0 <= plain[way]["kl_mean"] < 1e-4 and plain[way]["top1"] > 0.98, way
        assert flash[way]["kl_mean"] < 1e-4, way
    assert small["prose 1024, batches"]["kl_mean"] > 100 * plain["prose 512, batches"]["kl_mean"]
    for result in results.values():
        if result["kind"] == "speed":
            assert set(result["read"]) == {"64", "512"} and set(result["write"]) == {"0", "512"}
            assert all(share > 0 for what in ("read", "write") for share in result[f"{what}_share"].values())
            assert any("KV" in place for place in result["buffers_mib"])
    assert "tokens per second" in done.stdout and "KL, F16 file, plain, f16 cache" in done.stdout


def test_what_ends_a_child_is_recorded_and_the_rest_is_measured(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "for job in json.load(open(sys.argv[2]))['jobs']:\n"
        "    print('@' + json.dumps({'started': job['name']}), flush=True)\n"
        "    if job['name'] == 'b':\n"
        "        os.write(2, b'GGML_ASSERT(everything) failed')\n"
        "        os.abort()\n"
        "    print('noise\\n@' + json.dumps({'name': job['name'], 'result': {'read': {'1': 2.0}, 'write': {}}}))\n"
    )
    monkeypatch.setattr(offload, "__file__", str(child))
    jobs = [{"name": name, "kind": "speed", "about": 1.0} for name in "abc"]
    args = argparse.Namespace(started=time.time(), limit=60, out=tmp_path / "out.json", device="cpu", model="m")
    record = {"results": {}}
    offload.carry_out(jobs, args, tmp_path, record)
    assert list(record["results"]) == ["a", "b", "c"] and json.loads(args.out.read_text()) == record
    assert "GGML_ASSERT(everything) failed" in record["results"]["b"]["error"]
    assert record["results"]["c"]["read"] == {"1": 2.0}
