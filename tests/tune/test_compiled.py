"""Compiled layers: the losses of others to rounding, where a run is long enough, and nothing left of it afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import WINDOW, make_llama
from small_families import make_model

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common import machine
from pi_gguf.common.machine import Machine
from pi_gguf.tune import compiled
from pi_gguf.tune.choose import plan_training
from pi_gguf.tune.compiled import compiled_layers, compiling_pays
from pi_gguf.tune.memory import Activations
from pi_gguf.tune.options import TuneOptions

CONTEXT = 4 * WINDOW
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(machine, "fast_bf16", lambda device: True)


@needs_compiler
def test_long_runs_on_a_cpu_with_fast_products_compile(tmp_path, fast, monkeypatch):
    checkpoint = load_checkpoint(str(make_llama(tmp_path / "model"))).extended(CONTEXT)
    training = plan_training(checkpoint, TuneOptions(steps=100), Machine("cpu"))
    monkeypatch.setattr(compiled, "LEAST_OPERATIONS", compiled.training_operations(checkpoint, training))
    assert compiling_pays(checkpoint, training, "cpu", 1)
    assert not compiling_pays(checkpoint, training, "cuda", 1) and not compiling_pays(checkpoint, training, "cpu", 2)
    grouped = replace(training, attention_group=64)
    monkeypatch.setattr(compiled, "LEAST_OPERATIONS", 0)
    assert not compiling_pays(checkpoint, grouped, "cpu", 1), "half the layers are another program"
    monkeypatch.setattr(compiled, "LEAST_OPERATIONS", 1.01 * compiled.training_operations(checkpoint, training))
    assert not compiling_pays(checkpoint, training, "cpu", 1), "it is over before it has paid"
    monkeypatch.setattr(compiled, "LEAST_OPERATIONS", 0)
    monkeypatch.setattr(machine, "fast_bf16", lambda device: False)
    assert not compiling_pays(checkpoint, training, "cpu", 1)
    monkeypatch.setattr(machine, "fast_bf16", lambda device: True)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert not compiling_pays(checkpoint, training, "cpu", 1)


@needs_compiler
@pytest.mark.parametrize(("train", "recompute"), [("full", False), ("lora", False), ("full", True)])
def test_a_compiled_run_has_the_losses_of_another(train, recompute, tmp_path, monkeypatch, capfd):
    model, texts = make_llama(tmp_path / "model"), tmp_path / "texts"
    texts.mkdir()
    (texts / "novel.txt").write_text(next(iter(novels("train").values()))[:30_000])
    options = {"context": CONTEXT, "steps": 4, "batch_tokens": 512, "learning_rate": 1e-3, "device": "cpu"}
    options |= {"data": [str(texts)], "report_to": "none", "train": train}
    found, way = {}, Activations("recomputed", recompute=True)
    if recompute:
        monkeypatch.setattr("pi_gguf.tune.trainer.fit_activations", lambda *_: (way, 0))
    for name, pays in (("as ever", False), ("compiled", True)):
        monkeypatch.setattr("pi_gguf.tune.trainer.compiling_pays", lambda *_, pays=pays: pays)
        out = pi_gguf.extend(str(model), tmp_path / name, **options)
        found[name] = json.loads((out / "losses.json").read_text())
        assert ("compiling 2 layers" in capfd.readouterr().err) == pays
    assert found["compiled"] == pytest.approx(found["as ever"], rel=2e-3)
    assert min(found["compiled"]) < found["compiled"][0]


@needs_compiler
def test_layers_are_compiled_while_it_is_open(tmp_path):
    model = load_checkpoint(str(make_llama(tmp_path / "model"))).load_model(dtype=torch.float32)
    ids = torch.arange(2 * WINDOW)[None] % 400
    expected = model(input_ids=ids, use_cache=False).logits
    before = torch._dynamo.utils.counters["frames"]["ok"]
    with compiled_layers(model) as layers:
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    seen = torch._dynamo.utils.counters["frames"]["ok"]
    assert layers == 2 and seen > before
    torch._dynamo.reset()
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= seen


def test_layers_with_experts_are_not(tmp_path, capfd):
    model = load_checkpoint(str(make_model(tmp_path, "mixtral", {}))).load_model(dtype=torch.float32)
    with compiled_layers(model) as layers:
        assert layers == 0
    assert "compiling" not in capfd.readouterr().err
