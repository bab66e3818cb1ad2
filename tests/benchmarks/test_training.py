"""The benchmark of training: what it counts, beside torch's own counter, and a whole run at toy size."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.tune.tiles import tiled_mlps

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
_SPEC = importlib.util.spec_from_file_location("training_benchmark", SCRIPT)
bench = sys.modules["training_benchmark"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)

TOKENS, TILE = 128, 16


@pytest.mark.parametrize(("recomputed", "tiled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("name", "train"), [("7b", "full"), ("7b", "lora"), ("8b", "lora"), ("135m", "full")])
def test_operations_are_those_that_torch_counts(name, train, recomputed, tiled):
    shape = bench.SHAPES[name].toy()
    sizes = asdict(shape)
    del sizes["all_measured"]
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager")).train()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if train == "lora" and isinstance(module, torch.nn.Linear):
            module.weight.requires_grad_(False)
    ids = torch.arange(TOKENS)[None]
    tiles = tiled_mlps(model, TILE) if tiled else nullcontext()
    with FlopCounterMode(display=False) as counter, tiles:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # Eager attention computes the half above the diagonal, too.
    layers, width = shape.num_hidden_layers, shape.hidden_size
    above = layers * (3 + recomputed) * 4 * width * TOKENS**2 / 2
    counted = counter.get_total_flops() - above
    expected = bench.operations(shape, layers, train, TOKENS, recomputed=recomputed, tiled=tiled)
    last_tile = layers * 6 * width * shape.intermediate_size * TILE if tiled else 0
    assert counted == pytest.approx(expected - last_tile, rel=1e-4)


def test_shapes_have_the_parameters_they_are_called_by():
    for name, millions in {"135m": 134.5, "1b": 1235.8, "7b": 6738.4, "8b": 8030.3}.items():
        sizes = asdict(bench.SHAPES[name])
        del sizes["all_measured"]
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1), name


def test_the_line_through_two_counts_of_layers():
    assert bench.line([4, 2], [11.0, 7.0], 32) == 3 + 32 * 2
    assert bench.line([16], [5.0], 16) == 5


def test_folders_share_their_layers_and_open(tmp_path):
    shape = bench.SHAPES["8b"].toy()
    for layers in (2, 4):
        folder = bench.make_config(tmp_path, "8b", shape, layers, 64)
        bench.add_weights(folder, "8b", shape, layers, "cpu")
        checkpoint = load_checkpoint(str(folder))
        assert len(checkpoint.tensors) == 9 * layers + 3
        weights = checkpoint.load_model(dtype=torch.float32).state_dict()
        assert 0.01 < weights["model.layers.1.mlp.up_proj.weight"].std() < 0.03
    assert len(list((tmp_path / "8b").iterdir())) == 1 + 4


def test_a_failure_is_what_was_found(tmp_path, capsys):
    job = {"folder": str(tmp_path), "train": "full", "context": 64, "rows": [np.arange(9)] * 3, "work_dir": "."}
    found = bench.measure("loop", "cpu", job)
    assert "no file named" in found["failed"] or "model_type" in found["failed"], found
    case, shape = bench.Case.of("7b:full", 64), bench.SHAPES["7b"].toy()
    assert bench.summary(case, shape, [4, 2], [found], 1e9) == {"failed": found["failed"]}
    assert "Traceback" in capsys.readouterr().err


def test_what_is_not_begun_in_time_is_listed(tmp_path, capsys):
    args = argparse.Namespace(device="cpu", scale="toy", limit=-1, out=tmp_path / "training.json")
    bench.bench(args, [bench.Case.of(name, 64) for name in ("7b:full", "1b:lora")], [], tmp_path)
    assert json.loads(args.out.read_text())["not_reached"] == ["7b:full", "1b:lora"]
    assert "not reached: 7b:full, 1b:lora" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_at_toy_size(tmp_path):
    out = tmp_path / "training.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--scale", "toy", "--out", str(out)]
    cases = "7b:full,8b:qlora,1b:lora,8b:lora:512:2"
    done = subprocess.run([*command, "--cases", cases], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["not_reached"] == [] and list(record["cases"]) == cases.split(",")
    assert "CUDA" in record["cases"]["8b:qlora"]["skipped"]
    full, lora, least = (record["cases"][name] for name in ("7b:full", "1b:lora", "8b:lora:512:2"))
    assert set(full["contenders"]) == set(lora["contenders"]) == {"pi-gguf", "Trainer", "loop"}
    assert set(least["contenders"]) == {"pi-gguf"}
    assert (full["measured_layers"], full["layers"], full["extrapolated"]) == ([4, 2], 4, True)
    assert (lora["measured_layers"], lora["layers"], lora["extrapolated"]) == ([2], 2, False)
    assert least["runs"]["pi-gguf"][0]["again"]["tiled"] and least["context"] == 512
    speed = record["operations_a_second"]
    for case, shape, train in ((full, "7b", "full"), (lora, "1b", "lora")):
        for found in case["contenders"].values():
            used = bench.operations(bench.SHAPES[shape].toy(), case["layers"], train, 256)
            assert found["share"] == pytest.approx(used / found["step_seconds"] / speed)
            assert found["hardware_share"] >= found["share"]
            assert found["tokens_a_second"] == pytest.approx(256 / found["step_seconds"])
            trainer = case["contenders"]["Trainer"]["step_seconds"]
            assert found["times_the_trainer"] == pytest.approx(trainer / found["step_seconds"])
        assert all(len(run["all_step_seconds"]) == 3 for runs in case["runs"].values() for run in runs)
    runs = full["runs"]["pi-gguf"]
    assert runs[0]["predicted_whole_bytes"] == runs[0]["predicted_memory_bytes"] > runs[1]["predicted_memory_bytes"]
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(record["libraries"])
    for who in ("pi-gguf", "Trainer", "loop"):
        assert f" {who} " in done.stdout[done.stdout.index("contender") :]
