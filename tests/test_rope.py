"""The definition of Position Interpolation, held against transformers' own rotary embedding and against llama.cpp."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pi_gguf.errors import CheckpointError, OptionError, UnsupportedError
from pi_gguf.rope import RopeScaling, check_consistent

BASE = {"model_type": "llama", "max_position_embeddings": 2048, "rope_theta": 10000.0}


def rotary(config: dict, head_dim: int = 64) -> LlamaRotaryEmbedding:
    """transformers' own angles for a config."""
    fields = {k: v for k, v in config.items() if k != "model_type"}
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=head_dim, num_attention_heads=1, **fields))


def angles(embedding: LlamaRotaryEmbedding, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = embedding(torch.zeros(1, dtype=torch.float32), torch.tensor([positions]))
    return cos.numpy(), sin.numpy()


def test_position_times_factor_has_the_original_angle():
    base = RopeScaling.from_hf(BASE, "config.json")
    scaled = base.interpolated(32768)
    before, after = rotary(BASE), rotary(scaled.to_hf(BASE))
    positions = [0, 1, 17, 1024, 2047]
    for ours, theirs in zip(angles(after, [16 * m for m in positions]), angles(before, positions), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_factor_upside_down_is_inconsistent():
    good = RopeScaling.from_hf(BASE, "config.json").interpolated(32768)
    assert check_consistent(good, "f") == []
    upside_down = RopeScaling("linear", 1 / 16, 10000.0, 2048, 32768)
    assert len(check_consistent(upside_down, "f")) == 2
    assert len(check_consistent(RopeScaling("linear", 16.0, 10000.0, 2048, 2048), "f")) == 1


def test_rope_freq_scale_is_the_inverse_of_the_factor():
    scaled = RopeScaling.from_hf(BASE, "config.json").interpolated(32768)
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
    scaled = RopeScaling.from_hf(BASE, "config.json").interpolated(32768)
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


def test_llama3_factors_are_those_of_transformers():
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    config = {"model_type": "llama", "max_position_embeddings": 131072, "rope_parameters": rope}
    scaling = RopeScaling.from_hf(config, "config.json")
    factors = scaling.rope_factors(128)
    assert factors is not None
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / factors, rotary(config, 128).inv_freq.numpy(), rtol=1e-5)
    assert min(factors) == pytest.approx(1) and max(factors) == pytest.approx(8)
    assert RopeScaling("default", 1.0, 500000.0, 131072, 131072).rope_factors(128) is None


def test_scaling_twice_is_refused():
    scaled = RopeScaling.from_hf(BASE, "config.json").interpolated(4096)
    with pytest.raises(UnsupportedError, match="linear with factor 2"):
        scaled.interpolated(8192)


@pytest.mark.parametrize("context", [2048, 1, 0, -5])
def test_a_context_not_above_the_window_is_refused(context):
    with pytest.raises(OptionError, match="above the model's window of 2048"):
        RopeScaling.from_hf(BASE, "config.json").interpolated(context)


@pytest.mark.parametrize("factor", [0, -1, "x", float("nan"), float("inf"), None, True])
def test_a_factor_that_is_no_positive_number_is_refused(factor):
    config = {"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": factor}}
    with pytest.raises(CheckpointError, match="factor must be a positive number"):
        RopeScaling.from_hf(config, "config.json")
