"""A plan reads no more than it needs: no torch, no transformers; and says what it says with them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import make_llama
from safetensors.torch import load_file, save_file
from small_families import SHAPES, make_config, make_model

import pi_gguf
from pi_gguf.checkpoint import config as configs
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.cli.make import show_plan
from pi_gguf.common import machine
from pi_gguf.errors import CheckpointError, PiGgufError
from pi_gguf.families import FAMILIES
from pi_gguf.pipeline import convert as converting

HEAVY = ("torch", "transformers", "scipy", "sympy", "datasets", "matplotlib", "pandas", "pyarrow", "huggingface_hub")
PLANNED = "pi_gguf.plan(sys.argv[1], context=1024, device=sys.argv[2], train=sys.argv[3]).training.tokens"


def heavy_after(code, *arguments):
    """Return what is loaded after a line of Python, in a process of its own."""
    program = f"import sys, pi_gguf\nassert {code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_is_planned_and_inspected_without_what_trains(tied, tmp_path):
    folder = make_llama(tmp_path / "model", tie_word_embeddings=tied)
    for train in ("full", "lora"):
        assert heavy_after(PLANNED, folder, "cpu", train) == "[]"
    assert heavy_after("pi_gguf.inspect(sys.argv[1]).tensors", folder) == "[]"


def test_a_file_is_planned_without_what_trains_the_first_time_and_the_next(f32_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):  # it is at another window already, which a folder of ours spells in two ways
        assert heavy_after(PLANNED, f32_gguf, "cpu", "full") == "[]"


def test_a_dry_run_needs_no_torch_and_a_file_that_is_not_checked_no_model_of_transformers(tmp_path):
    folder = make_llama(tmp_path / "model")
    wanted = (
        "pi_gguf.convert(sys.argv[1], sys.argv[2], quant='F16', check='none', certify=False, "
        "dry_run=sys.argv[3:] == ['dry']).nbytes"
    )
    assert (
        heavy_after(wanted, folder, tmp_path / "x.gguf", "dry") == "['transformers', 'huggingface_hub']"
    )  # a tokenizer's
    loaded = "'transformers.models.llama.modeling_llama' in sys.modules"
    assert (
        heavy_after(f"{wanted} and not {loaded}", folder, tmp_path / "x.gguf")
        == "['torch', 'transformers', 'huggingface_hub']"
    )


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_file_is_the_same_without_the_model_of_transformers(family, tmp_path, monkeypatch):
    folder = make_model(tmp_path / "model", family, {})
    options = {"quant": "F16", "check": "none", "certify": False}
    opened = []

    def thorough(*args, **kwargs):
        opened.append(kwargs.pop("plain"))
        return load_checkpoint(*args, **kwargs)

    pi_gguf.convert(str(folder), tmp_path / "plain.gguf", **options)
    monkeypatch.setattr(converting, "load_checkpoint", thorough)
    pi_gguf.convert(str(folder), tmp_path / "thorough.gguf", **options)
    assert opened == [True]
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "thorough.gguf").read_bytes()


def test_what_is_not_as_usual_is_left_to_transformers(tmp_path, capfd):
    folder = make_llama(tmp_path / "model", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for change, tied in (({}, True), ({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, False)):
        save_file({**tensors, **change}, path, {"format": "pt"})
        checkpoint = load_checkpoint(str(folder), config_only=True)
        assert checkpoint.configuration.is_plain and checkpoint.tied == tied
        assert ("skeleton" in vars(checkpoint)) == bool(change)
        assert {*checkpoint.tensors} == {*tensors, *change}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert pi_gguf.inspect(folder).quantization == "F32"
    assert "says the weights are quantized, but they are not" in capfd.readouterr().err
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensor, said in (
        ("model.norm.bias", tensors["model.norm.weight"].clone(), r"model\.norm\.bias is not part of a llama model"),
        ("model.norm.weight", tensors["model.norm.weight"].to(torch.int16), "must be F32, F16 or BF16, got I16"),
        ("model.norm.weight", tensors["model.norm.weight"][:9].clone(), r"must have shape \[64\] by config.json"),
    ):
        save_file({**tensors, name: tensor}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            pi_gguf.inspect(folder)
    model = load_checkpoint(str(folder), config_only=True).extended(1024)
    assert model._scaled_config().rope_parameters["factor"] == 16 and model.skeleton.num_parameters() > 0


SMALL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = {**SMALL, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8}


def planned(folder, config, **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return pi_gguf.plan(str(folder), context=32768, device="cpu", **options)


def test_what_takes_days_here_has_a_start_of_an_hour_or_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "operations_a_second", lambda device: 1e11)
    plan = planned(tmp_path / "small", SMALL)
    assert plan.training_seconds > 86400
    words = shlex.split(plan.start)
    options = dict(zip((word[2:].replace("-", "_") for word in words[4::2]), words[5::2], strict=True))
    assert words[:3] == ["pi-gguf", "extend", str(tmp_path / "small")] and options.pop("context") == "32768"
    assert options["method"] == "yarn" and float(options.pop("recall")) == 0.5, "what finds keys after an hour"
    assert "--recall 0.2" in planned(tmp_path / "small", SMALL, recall=0.2).start
    tiny = pi_gguf.plan("bundled:tiny", context=2**20, steps=10**5, device="cpu")
    assert "--method yarn" in tiny.start and "recall" not in tiny.start, "the bundled mixture has such tasks"
    assert "--method ntk" in planned(tmp_path / "small", SMALL, method="ntk").start, "as it was asked for"
    again = planned(
        tmp_path / "small", SMALL, steps=int(options.pop("steps")), batch_tokens=int(options.pop("batch_tokens")),
        learning_rate=float(options.pop("learning_rate")), **options,
    )  # fmt: skip
    assert 3400 < again.training_seconds <= 3600 and not again.start
    lengths = [stage.window for stage in again.training.stages]
    tokens = [again.training.tokens_by_window()[window] / again.training.tokens for window in lengths]
    assert lengths == [512, 2048, 8192] and tokens == pytest.approx([10 / 21, 5 / 21, 6 / 21], abs=0.04)
    monkeypatch.setattr(machine, "free_memory", lambda device: 2.8e9)
    assert "--train-window 512x" in (little := planned(tmp_path / "small", SMALL).start)
    assert "8192x" not in little, "for which the memory is too small"
    monkeypatch.setattr(machine, "free_memory", lambda device: 20e9)
    short = planned(tmp_path / "short", {**SMALL, "max_position_embeddings": 2048}).start
    assert "2048x" in short and "8192" not in short
    assert plan.start in show_plan(plan) and "--on 4090" in show_plan(plan)
    assert show_plan(again).endswith(f"\nnext: {again.command}")
    assert planned(tmp_path / "large", LARGE).start == "", "too slow for an hour to be a start"
    untrained = shlex.split(plan.untrained)
    assert untrained[:3] == ["pi-gguf", "convert", str(tmp_path / "small")] and plan.untrained in show_plan(plan)
    assert untrained[-6:] == ["--steps", "0", "--quant", "Q4_K_M", "--method", "yarn"]
    scaled = planned(tmp_path / "scaled", {**SMALL, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.training_seconds > 86400 and scaled.untrained == "", "YaRN does not compose with a scaling"
    assert scaled.start and "yarn" not in scaled.start


def test_what_is_not_trained_is_converted_next(tmp_path):
    plan = planned(tmp_path / "small", SMALL, steps=0, quant="q8_0")
    expected = ["pi-gguf", "convert", str(tmp_path / "small"), "small-Q8_0.gguf", "--context", "32768", "--steps", "0"]
    assert shlex.split(plan.command) == [*expected, "--quant", "Q8_0"]
    assert show_plan(plan).endswith(f"\nnext: {plan.command}")


def test_without_a_driver_no_gpu_is_looked_for(monkeypatch):
    monkeypatch.setattr(machine, "_has_driver", lambda: False)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    assert machine.torch_device("auto") == "cpu"
    for flags in ("avx2", "avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(machine, "_cpu_flags", lambda flags=flags: flags)
        machine.operations_a_second.cache_clear()
        assert machine.operations_a_second("cpu") > 1e8
    machine.operations_a_second.cache_clear()


SCALED = {
    "": {},
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 160},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 160},
}  # fmt: skip


def outcome(folder, options):
    """Return what is planned, but for a measured speed, or why nothing is."""
    try:
        plan = pi_gguf.plan(str(folder), device="cpu", **options).to_json()
    except PiGgufError as error:
        return str(error)
    del plan["training_seconds"], plan["start"], plan["untrained"]
    return plan


def scalings(family):
    """Return the scalings that a config of a family may have in transformers."""
    if FAMILIES[family].alibi or family == "gemma3_text":
        return [""]
    return ["", "longrope"] if family == "phi3" else [name for name in SCALED if name != "longrope"]


@pytest.mark.parametrize(("family", "scaling"), [(family, one) for family in SHAPES for one in scalings(family)])
def test_a_plan_is_the_same_as_with_transformers(family, scaling, tmp_path, monkeypatch):
    rotated = not FAMILIES[family].alibi
    fields = json.loads(make_config(family, {}).to_json_string())
    if scaling:
        rope = SCALED[scaling]
        if scaling == "longrope":
            rope = {**rope, "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0] * 8}
        share = {n: v for n, v in fields.pop("rope_parameters").items() if n != "rope_type"}
        fields["rope_scaling"] = {**rope, **share}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = [{}, *([{"context": 2560}, {"context": 2560, "train": "lora"}] if rotated else [])]
    ours = [outcome(tmp_path, one) for one in options]
    monkeypatch.setattr(configs, "open_plain", lambda fields: None)
    assert ours == [outcome(tmp_path, one) for one in options]
    assert all(isinstance(one, dict) for one in ours) or (scaling and scaling not in ("linear", "longrope"))
