"""Every family: a small random model of odd shapes, saved by transformers, computes the same in llama.cpp."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import tensors
from safetensors.torch import load_file, save_file
from small_families import SEEDS, SHAPES, VARIANTS, WINDOW, make_model, odd_shape

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import UnsupportedError
from pi_gguf.families import FAMILIES
from pi_gguf.gguf.file import read_gguf

KL_LIMIT = {"gemma": 1e-4, "gemma2": 1e-4, "gemma3_text": 1e-4, "nemotron": 2e-5, "olmo": 1e-5, "qwen3_moe": 1e-3}
"""Nats, where llama.cpp's rounding (f16 tables of gelu, f16 products) shows more than in the others; with
experts, where it makes one token of 256 take another one."""


def test_every_family_has_a_model_here():
    assert set(SHAPES) == set(FAMILIES)
    assert len(FAMILIES) >= 26


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_family_computes_what_transformers_computes(variant, tmp_path):
    family, changes = VARIANTS[variant]
    folder = make_model(tmp_path / "model", family, changes)
    plain = pi_gguf.convert(str(folder), tmp_path / "plain.gguf", quant="F32")
    assert plain.checks[0].prompt_tokens == 600
    assert plain.checks[0].kl_divergence < KL_LIMIT.get(family, 1e-6)
    assert plain.checks[0].top1_agreement > 0.98
    pi_gguf.convert(str(folder), tmp_path / "q.gguf", quant="Q4_K_M", check="none")
    pi_gguf.quantize(tmp_path / "plain.gguf", tmp_path / "theirs.gguf", quant="Q4_K_M")
    ours, theirs = tensors(tmp_path / "q.gguf"), tensors(tmp_path / "theirs.gguf")
    assert ours == theirs and {"Q5_0", "Q8_0"} <= {kind for kind, _ in ours.values()}
    if not FAMILIES[family].alibi:
        window = load_checkpoint(str(folder)).rope.max_position_embeddings
        scaled = pi_gguf.convert(str(folder), tmp_path / "scaled.gguf", quant="F32", context=4 * window, steps=0)
        assert scaled.checks[0].kl_divergence < KL_LIMIT.get(family, 1e-6)
        assert read_gguf(tmp_path / "scaled.gguf").rope.factor == 4


def test_every_family_has_odd_shapes_and_all_kinds_of_them_are_drawn():
    drawn = [(family, odd_shape(family, seed)) for family in SHAPES for seed in SEEDS]
    assert len(drawn) >= 52
    assert {shape["tie_word_embeddings"] for _, shape in drawn} == {True, False}
    assert any(shape.get("num_key_value_heads") == 1 for _, shape in drawn)
    assert any(
        1 < (shape.get("num_key_value_heads") or 0) < shape["num_attention_heads"]
        for f, shape in drawn
        if f not in ("mpt", "bloom")
    )
    assert any(shape.get("attention_bias") for _, shape in drawn) and any(shape.get("mlp_bias") for _, shape in drawn)
    assert any(shape.get("num_experts") in (3, 5, 6) for _, shape in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", SHAPES)
def test_an_odd_shape_computes_what_transformers_computes(family, seed, tmp_path):
    shape = odd_shape(family, seed)
    folder = make_model(tmp_path / "model", family, shape, vocab_size=401 + 7 * seed)
    [check] = pi_gguf.convert(str(folder), tmp_path / "odd.gguf", quant="F32", certify=False).checks
    assert check.prompt_tokens == 600
    assert check.kl_divergence < (1e-3 if "num_experts" in shape else 10 * KL_LIMIT.get(family, 1e-6))


@pytest.mark.parametrize("family", ["mpt", "bloom"])
def test_position_interpolation_is_refused_with_the_reason(family, tmp_path):
    folder = make_model(tmp_path / "model", family, {})
    with pytest.raises(UnsupportedError, match="ALiBi"):
        pi_gguf.convert(str(folder), tmp_path / "out.gguf", context=8192, steps=0)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("family", ["gemma", "cohere"])
def test_a_head_that_llama_cpp_has_no_place_for_is_refused_with_the_reason(family, tmp_path):
    folder = make_model(tmp_path / "model", family, {"tie_word_embeddings": False})
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight has no place") as refusal:
        pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
    assert "takes the embedding for the head" in refusal.value.hint


ORIGINAL = {"rope_theta": 1e4, "original_max_position_embeddings": WINDOW // 2}
LLAMA3 = {**ORIGINAL, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ORIGINAL, "rope_type": "yarn", "factor": 2.0}


def longrope(pairs: int) -> dict[str, Any]:
    lists = {"short_factor": [1.0] * (pairs // 2) + [1.5] * (pairs // 2), "long_factor": [1 + i for i in range(pairs)]}
    return {**ORIGINAL, "rope_type": "longrope", **lists}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", LLAMA3),
        ("llama", YARN),
        ("llama", {**YARN, "attention_factor": 1.5}),
        ("llama", {**YARN, "beta_fast": 8.0, "beta_slow": 0.5}),
        ("llama", longrope(16)),
        ("granite", LLAMA3),
        ("granite", longrope(8)),
        ("phi3", longrope(8)),
    ],
    ids=[
        "llama llama3",
        "llama yarn",
        "llama yarn attention",
        "llama yarn betas",
        "llama longrope",
        "granite llama3",
        "granite longrope",
        "phi3 longrope",
    ],
)
def test_a_scaling_of_the_models_own_is_written_and_composed(family, own, tmp_path):
    changes = {"original_max_position_embeddings": WINDOW // 2} if family == "phi3" else {}
    folder = make_model(tmp_path / "model", family, {"rope_parameters": own, **changes})
    for name, context in (("as it is", None), ("interpolated", 4 * WINDOW)):
        out = tmp_path / f"{name}.gguf"
        result = pi_gguf.convert(str(folder), out, quant="F32", context=context, steps=0)
        assert result.checks[0].prompt_tokens > WINDOW // 2  # beyond LongRoPE's switch
        assert result.checks[0].kl_divergence < 1e-6


@pytest.mark.parametrize(
    ("family", "own", "context", "said"),
    [
        ("qwen2", YARN, 4 * WINDOW, "rope_type longrope needs a number for each frequency"),
        ("qwen2", {**YARN, "beta_fast": 16.0}, None, "rope_type yarn needs a number for each frequency"),
        ("qwen3", {**LLAMA3}, None, "rope_type llama3 .* only, got qwen3"),
    ],
)
def test_a_scaling_that_llama_cpp_cannot_read_is_refused(family, own, context, said, tmp_path):
    folder = make_model(tmp_path / "model", family, {"rope_parameters": own})
    with pytest.raises(UnsupportedError, match=said):
        pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32", context=context, steps=0)
    assert not list(tmp_path.glob("out*"))


def test_yarn_is_keys_where_llama_cpp_has_no_tensor(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2", {"rope_parameters": YARN})
    result = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
    assert result.checks[0].kl_divergence < 1e-6
    assert read_gguf(tmp_path / "out.gguf").metadata["qwen2.rope.scaling.type"] == "yarn"


def test_names_without_the_prefix_of_the_base_model_are_the_same(tmp_path):
    folder = make_model(tmp_path / "model", "bloom", {})
    whole = load_checkpoint(str(folder)).tensors
    path = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    assert list(load_checkpoint(str(folder)).tensors) == list(whole)
    assert pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32").checks[0].kl_divergence < 1e-6


def test_a_falcon_config_without_a_window_means_2048(tmp_path):
    folder = make_model(tmp_path / "model", "falcon", {})
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(str(folder)).rope.max_position_embeddings == 2048


def test_an_older_gemma3_config_names_both_bases(tmp_path):
    folder = make_model(tmp_path / "model", "gemma3_text", {})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5, "rope_local_base_freq": 2e4}))
    rope = load_checkpoint(str(folder)).rope
    assert (rope.rope_theta, rope.sliding_rope_theta) == (5e5, 2e4)
    result = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
    assert result.checks[0].kl_divergence < KL_LIMIT["gemma3_text"]


def test_a_window_beyond_what_slides_is_refused(tmp_path):
    folder = make_model(tmp_path / "model", "mistral", {"sliding_window": WINDOW})
    with pytest.raises(UnsupportedError, match="sliding_window must be None at 2560 tokens, got 640"):
        load_checkpoint(str(folder)).extended(4 * WINDOW)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar must be 32, got 144"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads must be 4, got 2"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob must be True, got False"),
        ("mistral", {"sliding_window": 64}, "sliding_window must be None at 640 tokens, got 64"),
        ("phi3", {"sliding_window": 64}, "sliding_window must be None at 640 tokens, got 64"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping must be a positive number, got None"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping must be a positive number, got None"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types must be"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers must be"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi must be True, got False"),
        ("falcon", {"alibi": True}, "alibi must be False, got True"),
        ("qwen2", {"head_dim": 24}, "head_dim must be 16, got 24"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias must be True, got False"),
    ],
)
def test_a_variant_that_llama_cpp_cannot_compute_is_refused(family, changes, said, tmp_path):
    with pytest.raises(UnsupportedError, match=said):
        load_checkpoint(str(make_model(tmp_path / "model", family, changes)))
