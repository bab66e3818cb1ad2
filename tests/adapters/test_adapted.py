"""LoRA adapters that peft saved: merged they are what peft merges, alone they do the same in llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_llama
from safetensors.torch import load_file, save_file
from small_adapters import make_adapter
from small_families import make_model

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.measure.kl import kl_divergence

pytestmark = pytest.mark.filterwarnings("ignore")  # peft has much to say of embeddings

LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merge_with_peft(base: Path, adapters: list[Path], path: Path) -> Path:
    """Save the model as peft itself merges it, one adapter after the other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, path)
    return path


def values(path: Path) -> dict[str, np.ndarray]:
    import gguf

    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models by family; Llama and Qwen 2 with grouped heads, Qwen 2 with biases, the others fused."""
    root = tmp_path_factory.mktemp("models")
    made = {name: make_model(root / name, name, {}) for name in ("qwen2", "gpt_neox", "falcon", "gemma")}
    return {
        **made,
        "llama": make_llama(root / "llama"),
        "bfloat16": make_llama(root / "bfloat16", dtype="bfloat16"),
        "tied": make_llama(root / "tied", tie_word_embeddings=True),
        "mixtral": make_model(root / "mixtral", "mixtral", {}),
        "qwen3_moe": make_model(root / "qwen3_moe", "qwen3_moe", {}),
    }


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of the Llama, on every linear layer. Not to be changed by a test."""
    return make_adapter(models["llama"], tmp_path_factory.mktemp("adapter") / "plain", target_modules=LLAMA_MODULES)


@pytest.fixture
def adapter_copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, every linear layer": ("llama", {"target_modules": LLAMA_MODULES}),
    "llama, embeddings, head and norms": (
        "llama",
        {"target_modules": ["k_proj", "embed_tokens", "lm_head"], "modules_to_save": ["norm"]},
    ),
    "llama, replaced embeddings and head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "llama, rslora, ranks and alphas by pattern": (
        "llama",
        {
            "target_modules": LLAMA_MODULES, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"v_proj": 3, r".*\.0\.mlp\..*": 5},
        },
    ),
    "llama, fan_in_fan_out": ("llama", {"target_modules": ["o_proj"], "fan_in_fan_out": True}),
    "llama, one layer only": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "bfloat16": ("bfloat16", {"target_modules": LLAMA_MODULES}),
    "tied, both replaced alike": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "qwen2, all biases": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "qwen2, biases of adapted layers": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "qwen2, biases of B": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_4h_to_h", "embed_in"]}),
    "falcon": ("falcon", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "gemma, offset norms": ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "mixtral, attention": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "mixtral, every linear layer, experts and routers among them": ("mixtral", {"target_modules": "all-linear"}),
    "qwen3_moe, one parameter of experts": (
        "qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "llama, weight-decomposed, embeddings and head too": (
        "llama", {"target_modules": [*LLAMA_MODULES, "embed_tokens", "lm_head"], "use_dora": True},
    ),
    "llama, rows of tokens": (
        "llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4]}},
    ),
    "llama, principal components": ("llama", {"target_modules": LLAMA_MODULES, "init_lora_weights": "pissa"}),
    "llama, orthogonal start": ("llama", {"target_modules": LLAMA_MODULES, "init_lora_weights": "olora"}),
    "tied, embedding alone": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, head alone": ("tied", {"target_modules": ["lm_head"], "use_dora": True}),
    "tied, embedding replaced": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, both replaced": (
        "tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied, rows of tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merged_adapter_is_what_peft_merges(case, models, tmp_path):
    family, config = CASES[case]
    base = models[family]
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    theirs = merge_with_peft(base, [adapter], tmp_path / "merged")
    pi_gguf.convert(str(theirs), tmp_path / "theirs.gguf", quant="F32", check="none")
    pi_gguf.convert(str(base), tmp_path / "base.gguf", quant="F32", check="none")
    result = pi_gguf.convert(str(base), tmp_path / "ours.gguf", quant="F32", lora=[str(adapter)], certify=False)
    assert result.checks[0].kl_divergence < (1e-3 if "experts" in case else 1e-4)
    plain, merged, expected = (values(tmp_path / f"{name}.gguf") for name in ("base", "ours", "theirs"))
    assert list(merged) == list(expected)
    changed = [name for name in merged if not np.array_equal(merged[name], plain.get(name))]
    assert changed == [name for name in expected if not np.array_equal(expected[name], plain.get(name))] != []
    for name in merged:
        np.testing.assert_allclose(merged[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)


def test_the_same_arithmetic_gives_the_same_bytes(models, adapter, tmp_path):
    theirs = merge_with_peft(models["llama"], [adapter], tmp_path / "merged")
    pi_gguf.convert(str(theirs), tmp_path / "theirs.gguf", quant="F32", check="none")
    pi_gguf.convert(str(models["llama"]), tmp_path / "ours.gguf", quant="F32", check="none", lora=[str(adapter)])
    ours, expected = values(tmp_path / "ours.gguf"), values(tmp_path / "theirs.gguf")
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def test_two_adapters_are_merged_one_after_the_other(models, adapter, tmp_path):
    second = make_adapter(models["llama"], tmp_path / "second", target_modules=["q_proj"], r=2, use_rslora=True)
    theirs = merge_with_peft(models["llama"], [adapter, second], tmp_path / "merged")
    pi_gguf.convert(str(theirs), tmp_path / "theirs.gguf", quant="F32", check="none")
    result = pi_gguf.convert(
        str(models["llama"]), tmp_path / "ours.gguf", quant="F32", lora=[str(adapter), str(second)]
    )
    assert result.checks[0].kl_divergence < 1e-6
    ours, expected = values(tmp_path / "ours.gguf"), values(tmp_path / "theirs.gguf")
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)
    assert read_gguf(tmp_path / "ours.gguf").metadata["general.pi_gguf.adapters"] == "plain, second"


def test_a_quantized_file_with_an_adapter_is_checked_and_planned_to_the_byte(models, adapter, tmp_path):
    options: dict[str, Any] = {"quant": "Q8_0", "lora": [str(adapter)]}
    planned = pi_gguf.convert(str(models["llama"]), tmp_path / "out.gguf", dry_run=True, **options)
    result = pi_gguf.convert(str(models["llama"]), tmp_path / "out.gguf", **options)
    assert result.nbytes == planned.nbytes
    assert result.checks[0].kl_divergence < 5e-2


def adapter_of_an_expert(base: Path, adapter: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save an adapter of one expert, as peft did before transformers fused them; return it and the merged weights."""
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    out_width, in_width = weights[name].shape
    a, b = torch.randn(4, in_width), torch.randn(out_width, 4)
    adapter.mkdir()
    module = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    weights[name] += 0.5 * (b @ a)
    return adapter, weights


def test_experts_of_an_adapter_saved_by_older_releases_are_merged(models, tmp_path):
    base = models["mixtral"]
    adapter, weights = adapter_of_an_expert(base, tmp_path / "adapter")
    theirs = Path(shutil.copytree(base, tmp_path / "merged"))
    save_file(weights, theirs / "model.safetensors", {"format": "pt"})
    pi_gguf.convert(str(theirs), tmp_path / "theirs.gguf", quant="F32", check="none")
    result = pi_gguf.convert(str(base), tmp_path / "ours.gguf", quant="F32", lora=[str(adapter)])
    assert result.checks[0].kl_divergence < 1e-5
    ours, expected = values(tmp_path / "ours.gguf"), values(tmp_path / "theirs.gguf")
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)


# The adapter alone


def logits(path: Path, **options: Any) -> np.ndarray:
    with pi_gguf.open(path, n_ctx=64, type_k="f16", device="cpu", **options) as model:
        return np.concatenate(list(model.logits_chunks(list(range(5, 55)), 50)))


ALONE = [
    "llama, every linear layer", "llama, rslora, ranks and alphas by pattern", "gpt_neox", "falcon",
    "mixtral, attention",
]  # fmt: skip


@pytest.mark.parametrize("quant", ["F32", "F16"])
@pytest.mark.parametrize("case", [*ALONE, "llama, embeddings and head", "qwen2"])
def test_an_adapter_file_does_in_llama_cpp_what_the_merged_file_does(case, quant, models, tmp_path):
    family, config = {
        **CASES,
        "llama, embeddings and head": ("llama", {"target_modules": ["k_proj", "embed_tokens", "lm_head"]}),
        "qwen2": ("qwen2", {"target_modules": LLAMA_MODULES}),
    }[case]
    base = models[family]
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    if case == "llama, embeddings and head":  # the norms of the base stay; peft saves the bases of embeddings along
        assert any("base_layer" in name for name in load_file(adapter / "adapter_model.safetensors"))
    pi_gguf.convert(str(base), tmp_path / "base.gguf", quant="F32", check="none")
    pi_gguf.convert(str(base), tmp_path / "merged.gguf", quant="F32", check="none", lora=[str(adapter)])
    result = pi_gguf.convert(str(base), tmp_path / "lora.gguf", quant=quant, lora=[str(adapter)], adapter_only=True)
    assert result.nbytes == (tmp_path / "lora.gguf").stat().st_size
    merged = logits(tmp_path / "merged.gguf")
    applied = logits(tmp_path / "base.gguf", lora=[tmp_path / "lora.gguf"])
    plain = logits(tmp_path / "base.gguf")
    assert kl_divergence(merged, plain)[0].mean() > 1e-2
    assert kl_divergence(merged, applied)[0].mean() < (1e-7 if quant == "F32" else 1e-3)


def test_an_adapter_file_says_what_it_is(models, adapter, tmp_path, cli):
    out = tmp_path / "lora.gguf"
    code, said, _ = cli("convert", models["llama"], out, "--lora", adapter, "--adapter-only", "--quant", "F16")
    info = read_gguf(out)
    assert code == 0 and f"next: pi-gguf run BASE.gguf --lora {out}" in said
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    assert [info.metadata[key] for key in keys] == ["adapter", "llama", "lora", 6.0]
    assert info.tensors[0].name == "blk.0.ffn_down.weight.lora_a" and {t.type for t in info.tensors} == {"F16"}
    pi_gguf.convert(str(models["llama"]), tmp_path / "base.gguf", quant="F32", check="none")
    run = ("run", tmp_path / "base.gguf", "--prompt", "The captain", "--max-tokens", "20", "--n-ctx", "64")
    pi_gguf.convert(str(models["llama"]), tmp_path / "merged.gguf", quant="F32", check="none", lora=[str(adapter)])
    with_adapter, without = cli(*run, "--lora", out)[1], cli(*run)[1]
    assert with_adapter != without
    code, _, err = cli(*run, "--lora", tmp_path / "merged.gguf")
    assert code == 6 and "general.type must be 'adapter', got 'model'" in err and "Traceback" not in err


def test_an_adapter_file_of_another_model_is_an_error(models, adapter, tmp_path):
    pi_gguf.convert(str(models["qwen2"]), tmp_path / "qwen2.gguf", quant="F32", check="none")
    pi_gguf.convert(str(models["llama"]), tmp_path / "lora.gguf", quant="F32", lora=[str(adapter)], adapter_only=True)
    with pytest.raises(GgufError, match=r"general\.architecture must be 'qwen2', got 'llama'"):
        pi_gguf.open(tmp_path / "qwen2.gguf", n_ctx=64, lora=[tmp_path / "lora.gguf"])


# Position scaling


def test_an_adapter_without_a_statement_takes_the_window_it_is_given(models, adapter, tmp_path):
    options: dict[str, Any] = {"quant": "F32", "lora": [str(adapter)]}
    result = pi_gguf.convert(str(models["llama"]), tmp_path / "out.gguf", context=256, steps=0, **options)
    assert result.checks[0].kl_divergence < 1e-6
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["llama.rope.scaling.factor"] == 4 and metadata["llama.context_length"] == 256
    assert metadata["llama.rope.scaling.finetuned"] is False


@pytest.mark.parametrize("stated", ["new window", "old window", "record", "both"])
def test_the_scaling_that_an_adapter_states_ends_in_the_file(models, adapter_copy, tmp_path, stated):
    config = json.loads((models["llama"] / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000.0}
    if stated != "old window":
        config["max_position_embeddings"] = 256
    record = {"rope_type": "linear", "factor": 4.0, "original_window": 64, "context": 256, "steps": 30, "tokens": 9}
    if stated != "record":
        (adapter_copy / "config.json").write_text(json.dumps(config))
    if stated in ("record", "both"):
        (adapter_copy / "pi_gguf.json").write_text(json.dumps(record))
    for context in (None, 256):
        result = pi_gguf.convert(
            str(models["llama"]), tmp_path / "out.gguf", quant="F32", lora=[str(adapter_copy)], context=context,
            steps=0, overwrite=True,
        )  # fmt: skip
        assert result.checks[0].kl_divergence < 1e-6 and result.checks[0].rope_freq_scale == 0.25
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["llama.rope.scaling.type"] == "linear" and metadata["llama.rope.scaling.factor"] == 4
    assert metadata["llama.rope.scaling.original_context_length"] == 64 and metadata["llama.context_length"] == 256
    assert metadata["llama.rope.scaling.finetuned"] is True
    assert metadata.get("general.pi_gguf.steps") == (30 if stated in ("record", "both") else None)
    with pytest.raises(OptionError, match="context must be the adapter's 256 tokens, got 512"):
        pi_gguf.convert(str(models["llama"]), tmp_path / "other.gguf", lora=[str(adapter_copy)], context=512, steps=0)


def test_a_statement_that_is_the_models_own_changes_nothing(models, adapter_copy, tmp_path):
    shutil.copy(models["llama"] / "config.json", adapter_copy)
    pi_gguf.convert(str(models["llama"]), tmp_path / "out.gguf", quant="F32", lora=[str(adapter_copy)], check="none")
    assert read_gguf(tmp_path / "out.gguf").rope == load_checkpoint(str(models["llama"])).rope


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"model_type": "qwen2"}, "model_type must be the model's llama, got 'qwen2'"),
        ("config.json", {"max_position_embeddings": 300}, "max_position_embeddings must be the model's 64 or 256"),
        ("config.json", {"rope_theta": 5e5}, "rope_theta must be the model's 10000, got 500000"),
        ("config.json", {"rope_scaling": None, "max_position_embeddings": 256}, "states rope_type default"),
        ("config.json", {"rope_scaling": YARN}, "states rope_type yarn"),
        ("pi_gguf.json", {"original_window": 32}, "original_window must be the model's 64, got 32"),
        ("pi_gguf.json", {"context": 512}, "context 512 must be above original_window 64, by factor 4"),
        ("pi_gguf.json", {"context": "x"}, "context must be a positive integer"),
        ("pi_gguf.json", {"rope_type": "yarn"}, "rope_type must be linear, got 'yarn'"),
        ("pi_gguf.json", {"steps": -1}, "steps must be a whole number"),
        ("pi_gguf.json", {"context": 128, "factor": 2.0}, "config.json states factor 4, pi_gguf.json 2"),
    ],
)
def test_a_statement_that_does_not_fit_is_an_error(models, adapter_copy, tmp_path, cli, name, change, said):
    config = json.loads((models["llama"] / "config.json").read_text())
    del config["rope_parameters"]
    stated = {
        "config.json": {
            **config, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e4,
            "max_position_embeddings": 256,
        },
        "pi_gguf.json": {"rope_type": "linear", "factor": 4.0, "original_window": 64, "context": 256},
    }  # fmt: skip
    stated[name] |= change
    for file, content in stated.items():
        (adapter_copy / file).write_text(json.dumps(content))
    refused(cli, models["llama"], tmp_path, said, "--lora", adapter_copy)


def test_adapters_of_two_scalings_exclude_each_other(models, adapter_copy, tmp_path, cli):
    second = Path(shutil.copytree(adapter_copy, tmp_path / "second"))
    for folder, context in ((adapter_copy, 128), (second, 256)):
        record = {"rope_type": "linear", "original_window": 64, "context": context}
        (folder / "pi_gguf.json").write_text(json.dumps(record))
    refused(cli, models["llama"], tmp_path, "trained with factor 4", "--lora", adapter_copy, "--lora", second)


# Going on after a stop


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a conversion stop after some tensors."""
    from pi_gguf.write import writer

    encode, left = writer._encode, [count]

    def stop_later(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(writer, "_encode", stop_later)


@pytest.mark.parametrize("alone", [False, True])
def test_a_stopped_conversion_goes_on_with_the_same_adapter_only(
    models, adapter_copy, tmp_path, monkeypatch, capfd, alone
):
    options: dict[str, Any] = {"quant": "F16", "check": "none", "lora": [str(adapter_copy)], "adapter_only": alone}
    base, out, whole = str(models["llama"]), tmp_path / "out.gguf", tmp_path / "whole.gguf"
    pi_gguf.convert(base, whole, **options)

    def stop() -> None:
        stop_after(monkeypatch, 12)
        with pytest.raises(KeyboardInterrupt):
            pi_gguf.convert(base, out, **options)
        monkeypatch.undo()

    stop()
    if not alone:
        with pytest.raises(OptionError, match="other settings"):
            pi_gguf.convert(base, out, **{**options, "lora": []})
    pi_gguf.convert(base, out, **options)
    assert "tensors are there" in capfd.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    out.unlink()
    stop()
    weights = adapter_copy / "adapter_model.safetensors"
    changed = load_file(weights)
    changed[next(iter(changed))] *= 2
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(OptionError, match=r"what adapter 1 \(adapter\) was before it changed"):
        pi_gguf.convert(base, out, **options)
    assert not out.exists()
    pi_gguf.convert(base, out, **options, overwrite=True)
    assert out.read_bytes() != whole.read_bytes()


# What is refused


def refused(cli, base: Path, folder: Path, said: str, *options: Any) -> str:
    """Check that a conversion ends in one error line that has `said` in it, and in no file; return the line."""
    code, _, err = cli("convert", base, folder / "refused.gguf", "--check", "none", "--quant", "F32", *options)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code in (2, 3, 4) and "Traceback" not in err and len(errors) == 1, err
    assert said in errors[0] and "\nhint: " in err, err
    assert not list(folder.glob("refused*"))
    return errors[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        ({"use_dora": True}, "proj.lora_magnitude_vector is missing"),
        ({"use_dora": 1}, "use_dora must be true or false"),
        ({"use_dora": True, "kasa_config": {"beta": 1}}, "use_dora and kasa_config exclude each other"),
        ({"kasa_config": {"beta": 1}}, "proj.lora_diag is missing"),
        ({"use_bdlora": [1]}, "use_bdlora must have fields"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks must be a positive integer"),
        ({"target_parameters": "x"}, "target_parameters must be a list of names"),
        ({"trainable_token_indices": [1.5]}, "trainable_token_indices must list token numbers"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices must list token numbers"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens cannot be merged"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config cannot be merged"),
        ({"layer_replication": [[0, 1]]}, "layer_replication cannot be merged"),
        ({"some_future_field": 3}, "some_future_field must be unset, got 3"),
        ({"init_lora_weights": "corda"}, "'corda' changes the base weights before training"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes the base weights before training"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights must be true, false or a name that peft knows"),
        ({"init_lora_weights": [1]}, "init_lora_weights"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 8}, "must have rank 8 by adapter_config.json, got shape [4,"),
        ({"r": None}, "r must be a positive integer, got nothing"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"rank_pattern": {"q_proj": 9}}, "q_proj.lora_A.weight must have rank 9"),
        ({"rank_pattern": {"(": 9}}, "rank_pattern: '(' is not a regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern must map modules to numbers"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(models, adapter_copy, tmp_path, cli, change, said):
    path = adapter_copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "adapter" in refused(cli, models["llama"], tmp_path, said, "--lora", adapter_copy)


HEAD, FIRST, NOWHERE = (f"base_model.model.{name}" for name in ("lm_head", "model.layers.0.self_attn.q_proj", "visual"))
WRONG_TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "without its B": ({f"{FIRST}.lora_B.weight": None}, "q_proj must have lora_A and lora_B, got lora_A alone"),
    "of no module": (
        {f"{NOWHERE}.lora_A.weight": torch.ones(4, 8), f"{NOWHERE}.lora_B.weight": torch.ones(8, 4)},
        "visual.lora_A.weight fits no tensor of the model, which has no visual.weight",
    ),
    "left over": ({f"{FIRST}.lora_magnitude_vector": torch.ones(128)}, "lora_magnitude_vector fits no field"),
    "too wide": ({f"{FIRST}.lora_A.weight": torch.ones(4, 65)}, "makes [128, 65] of"),
    "resized alone": ({f"{HEAD}.weight": torch.ones(412, 64)}, "lm_head.weight has 412 rows"),
    "of another width": ({f"{HEAD}.weight": torch.ones(410, 32)}, "lm_head.weight makes [410, 32] of"),
    "of two adapters": (
        {f"{HEAD}.lora_A.one.weight": torch.ones(4, 64), f"{HEAD}.lora_B.two.weight": torch.ones(410, 4)},
        "holds several adapters: one, two",
    ),
    "rows of no tokens": (
        {f"{HEAD}.token_adapter.trainable_tokens_delta": torch.ones(2, 64)}, "does not say of which tokens",
    ),
    "of a parameter that is not named": (
        {f"{HEAD}.base_layer.lora_A.weight": torch.ones(4, 64), f"{HEAD}.base_layer.lora_B.weight": torch.ones(410, 4)},
        "is of a parameter that target_parameters",
    ),
    "not gathered": ({f"{FIRST}.lora_A.weight": torch.ones(0)}, "must have rank 4 by adapter_config.json"),
    "whole numbers": ({f"{FIRST}.lora_A.weight": torch.ones(4, 64, dtype=torch.int64)}, "must be F32, F16 or BF16"),
    "no number": ({f"{FIRST}.lora_A.weight": torch.full((4, 64), float("nan"))}, "lora_A.weight holds NaN"),
    "a bias that is not there": ({f"{FIRST}.lora_B.bias": torch.ones(128)}, "fits no tensor of the model"),
    "twice": (
        {f"{HEAD}.weight": torch.ones(410, 64), f"{HEAD}.base_layer.weight": torch.ones(410, 64)},
        "is there under two names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(models, adapter_copy, tmp_path, cli, case):
    change, said = WRONG_TENSORS[case]
    path = adapter_copy / "adapter_model.safetensors"
    changed = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, {"format": "pt"})
    assert str(path) in refused(cli, models["llama"], tmp_path, said, "--lora", adapter_copy)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_broken_file_is_an_error(models, adapter_copy, tmp_path, cli, name):
    data = (adapter_copy / name).read_bytes()
    (adapter_copy / name).write_bytes(data[: len(data) // 2])
    assert name in refused(cli, models["llama"], tmp_path, "", "--lora", adapter_copy)
    (adapter_copy / name).unlink()
    refused(cli, models["llama"], tmp_path, f"{name} is missing", "--lora", adapter_copy)
    for nowhere in (tmp_path / "nowhere", "x" * 5000, "~nobody/x", ""):
        refused(cli, models["llama"], tmp_path, "adapter_config.json is missing", "--lora", nowhere)


def test_an_adapter_of_single_experts_does_not_fit_an_adapter_file(models, tmp_path, cli):
    adapter = adapter_of_an_expert(models["mixtral"], tmp_path / "adapter")[0]
    said = "experts.2.w1.weight is part of another tensor in llama"
    refused(cli, models["mixtral"], tmp_path, said, "--lora", adapter, "--adapter-only")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--context", "256"), "steps must be 0 with lora and context, got 1000"),
        (("--adapter-only", "--context", "256", "--steps", "0"), "adapter-only has no window"),
        (("--adapter-only", "--quant", "Q8_0"), "quant must be F32 or F16 with adapter-only, got Q8_0"),
    ],
)
def test_options_that_exclude_each_other_are_refused(models, adapter, tmp_path, cli, options, said):
    refused(cli, models["llama"], tmp_path, said, "--lora", adapter, *options)


def test_an_adapter_file_needs_one_adapter(models, adapter, tmp_path, cli):
    refused(cli, models["llama"], tmp_path, "adapter-only writes one adapter, got 0", "--adapter-only")
    two = ("--lora", adapter, "--lora", adapter)
    refused(cli, models["llama"], tmp_path, "adapter-only writes one adapter, got 2", "--adapter-only", *two)


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "llama",
            {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
            "changes as a whole model.layers.0.input_layernorm",
        ),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}, "changes as a whole model.layers.0.self_attn.k_proj"),
        ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}, "changes as a whole model.layers.0.self_attn.q"),
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "(DoRA) sets the length of the rows of"),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "(pissa) counts from other values of"),
        (
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
            "replaces rows of model.embed_tokens",
        ),
        ("tied", {"target_modules": ["embed_tokens"]}, "changes, as input and output at once, model.embed_tokens"),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "changes as a whole lm_head.weight"),
        ("mixtral", {"target_modules": "all-linear"}, "changes, in a form of its own, model.layers.0.block_sparse_moe"),
    ],
)
def test_an_adapter_file_holds_products_alone(models, tmp_path, cli, family, config, said):
    adapter = make_adapter(models[family], tmp_path / "adapter", **config)
    refused(cli, models[family], tmp_path, said, "--lora", adapter, "--adapter-only")
