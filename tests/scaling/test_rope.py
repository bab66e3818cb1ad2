"""The definition of Position Interpolation, held against transformers' own rotary embedding and against llama.cpp."""

from __future__ import annotations

import numpy as np
import pytest
from rotations import BASE, angles, rotary

from pi_gguf.errors import CheckpointError, OptionError
from pi_gguf.scaling.rope import RopeScaling, check_consistent


def test_position_times_factor_has_the_original_angle():
    base = RopeScaling.from_hf(BASE, "config.json")
    scaled = base.interpolated(32768, 64)
    before, after = rotary(BASE), rotary(scaled.to_hf(BASE))
    positions = [0, 1, 17, 1024, 2047]
    for ours, theirs in zip(angles(after, [16 * m for m in positions]), angles(before, positions), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_factor_upside_down_is_inconsistent():
    good = RopeScaling.from_hf(BASE, "config.json").interpolated(32768, 64)
    assert check_consistent(good, "f") == []
    upside_down = RopeScaling("linear", 1 / 16, 10000.0, 2048, 32768)
    assert len(check_consistent(upside_down, "f")) == 2
    assert len(check_consistent(RopeScaling("linear", 16.0, 10000.0, 2048, 2048), "f")) == 1


def test_rope_freq_scale_is_the_inverse_of_the_factor():
    scaled = RopeScaling.from_hf(BASE, "config.json").interpolated(32768, 64)
    assert scaled.factor == 16.0
    assert scaled.rope_freq_scale == 0.0625
    assert RopeScaling.from_hf(BASE, "config.json").rope_freq_scale == 1.0


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5000.0},
        {"rope_scaling": {"type": "linear", "factor": "4"}, "rope_theta": 5000},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5000.0},
    ],
)
def test_every_spelling_of_a_config_is_read(spelling):
    config = {"max_position_embeddings": 8192, **spelling}
    assert RopeScaling.from_hf(config, "config.json") == RopeScaling("linear", 4.0, 5000.0, 2048, 8192)


def test_an_unedited_window_with_its_length_beside_it_is_read():
    config = {
        "max_position_embeddings": 4096,
        "max_sequence_length": 16384,
        "rope_scaling": {"type": "linear", "factor": 4},
    }
    scaling = RopeScaling.from_hf(config, "config.json")
    assert (scaling.original_max_position_embeddings, scaling.max_position_embeddings) == (4096, 16384)


def test_what_is_written_for_hugging_face_and_gguf_reads_back():
    scaled = RopeScaling.from_hf(BASE, "config.json").interpolated(32768, 64)
    config = scaled.to_hf(BASE)
    assert RopeScaling.from_hf(config, "config.json") == scaled
    older = {k: v for k, v in config.items() if k != "rope_parameters"}  # what transformers 4 sees
    assert RopeScaling.from_hf(older, "config.json") == scaled
    keys = scaled.to_gguf("llama", finetuned=True)
    assert keys == {
        "llama.context_length": 32768,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 16.0,
        "llama.rope.scaling.original_context_length": 2048,
        "llama.rope.scaling.finetuned": True,
    }
    assert RopeScaling.from_gguf({"general.architecture": "llama", **keys}, "f.gguf") == scaled


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 1024, "factor": 4.0,
    "short_factor": [1 + i / 32 for i in range(32)], "long_factor": [1 + i / 8 for i in range(32)],
}  # fmt: skip
OWN = {
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, other betas": {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False},
    "yarn, attention": {**YARN, "attention_factor": 1.25},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "longrope": LONGROPE,
    "longrope, attention": {**LONGROPE, "attention_factor": 1.5},
    "longrope, factor by its windows": {k: v for k, v in LONGROPE.items() if k != "factor"},
}


def own_config(name: str) -> dict:
    return {**BASE, "max_position_embeddings": 4096, "rope_parameters": {**OWN[name], "rope_theta": 10000.0}}


@pytest.mark.parametrize("name", OWN)
def test_a_scaling_of_the_models_own_is_that_of_transformers(name):
    config = own_config(name)
    scaling = RopeScaling.from_hf(config, "config.json")
    theirs = rotary(config)
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    divisors = scaling.own.divisors(10000.0, 64, short=True)
    np.testing.assert_allclose(plain / divisors, theirs.inv_freq.numpy(), rtol=1e-5)
    assert scaling.own.attention_factor == pytest.approx(theirs.attention_scaling)
    assert scaling.factor == 1.0 and scaling.max_position_embeddings == 4096
    again = RopeScaling.from_hf(scaling.to_hf(config), "config.json")
    assert again == scaling


@pytest.mark.parametrize("name", OWN)
def test_interpolation_composes_with_a_scaling_of_the_models_own(name):
    config = own_config(name)
    scaled = RopeScaling.from_hf(config, "config.json").interpolated(16384, 64)
    assert (scaled.factor, scaled.original_max_position_embeddings) == (4.0, 4096)
    before, after = rotary(config), rotary(scaled.to_hf(config))
    positions = [0, 1, 17, 1024, 4095]  # the last one is beyond LongRoPE's switch to its long list
    for ours, theirs in zip(angles(after, [4 * m for m in positions]), angles(before, positions), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # 4095 radians as 32-bit float: 2^-12 of an angle
    again = RopeScaling.from_hf(scaled.to_hf(config), "config.json")
    assert (again.rope_type, again.factor) == ("linear", 4.0)
    assert again.own.fields["long_factor"] == pytest.approx(scaled.own.fields["long_factor"])
    keys = scaled.to_gguf("llama", finetuned=True)
    assert keys["llama.rope.scaling.type"] == "linear" and keys["llama.rope.scaling.factor"] == 4.0
    assert keys.get("llama.rope.scaling.attn_factor", 1.0) == pytest.approx(before.attention_scaling)
    (divisors,) = scaled.factor_tensors("llama", 64).values()
    assert divisors == RopeScaling.from_hf(config, "config.json").own.divisors(10000.0, 64)


def test_interpolating_twice_multiplies_the_factors():
    base = RopeScaling.from_hf(BASE, "config.json")
    assert base.interpolated(4096, 64).interpolated(16384, 64) == base.interpolated(16384, 64)


@pytest.mark.parametrize(
    ("rope", "windows"),
    [
        ({"rope_type": "linear", "factor": 4, "original_max_position_embeddings": 4096}, (4096, 16384)),
        ({"rope_type": "yarn", "factor": "4", "original_max_position_embeddings": 4096}, (16384, 16384)),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 3072}, (12288, 12288)),
    ],
)
def test_an_unedited_window_with_the_original_in_the_scaling_is_read(rope, windows):
    scaling = RopeScaling.from_hf({"max_position_embeddings": 4096, "rope_scaling": rope}, "config.json")
    assert (scaling.original_max_position_embeddings, scaling.max_position_embeddings) == windows


@pytest.mark.parametrize("context", [2048, 1, 0, -5])
def test_a_context_not_above_the_window_is_refused(context):
    with pytest.raises(OptionError, match="above the model's window of 2048"):
        RopeScaling.from_hf(BASE, "config.json").interpolated(context, 64)


@pytest.mark.parametrize("factor", [0, -1, "x", float("nan"), float("inf"), None, True])
def test_a_factor_that_is_no_positive_number_is_refused(factor):
    config = {"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": factor}}
    with pytest.raises(CheckpointError, match="factor must be a positive number"):
        RopeScaling.from_hf(config, "config.json")
