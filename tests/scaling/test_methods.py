"""Every way to extend a window: its angles by transformers' own rotary embedding, its logits in llama.cpp."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import WINDOW
from rotations import BASE, angles, rotary

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, UnsupportedError
from pi_gguf.models.hf import HfModel
from pi_gguf.scaling.methods import METHODS, find_method
from pi_gguf.scaling.rope import RopeScaling, check_consistent


def extended(method: str, context: int = 32768) -> RopeScaling:
    return find_method(method).extended(RopeScaling.from_hf(BASE, "config.json"), context, 64)


def frequencies(method: str) -> np.ndarray:
    return rotary(extended(method).to_hf(BASE)).inv_freq.numpy()


def test_there_are_five():
    assert list(METHODS) == ["linear", "ntk", "yarn", "none", "nope"]


def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest_by_the_factor():
    base, ntk = rotary(BASE).inv_freq.numpy(), frequencies("ntk")
    ratio = base / ntk
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(16, rel=1e-5)
    assert (np.diff(ratio) > 0).all()


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_sharpens_attention():
    ratio = rotary(BASE).inv_freq.numpy() / frequencies("yarn")
    turns = 2048 * rotary(BASE).inv_freq.numpy() / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 16, rtol=1e-5)
    assert rotary(extended("yarn").to_hf(BASE)).attention_scaling == pytest.approx(1 + 0.1 * np.log(16))


def test_direct_fine_tuning_leaves_every_angle_and_nope_takes_them_all():
    positions = [0, 1, 2047, 32767]
    for ours, theirs in zip(
        angles(rotary(extended("none").to_hf(BASE)), positions), angles(rotary(BASE), positions), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    cos, sin = angles(rotary(extended("nope").to_hf(BASE)), positions)
    assert (cos == 1).all() and abs(sin).max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_windows_and_spellings_of_a_method(method):
    rope = extended(method)
    assert rope.is_extended and check_consistent(rope, "f") == []
    assert (rope.original_max_position_embeddings, rope.max_position_embeddings) == (2048, 32768)
    config = rope.to_hf(BASE)
    again = RopeScaling.from_hf(config, "config.json")
    assert (again.rope_type, again.factor, again.rope_theta, again.own) == (
        rope.rope_type, rope.factor, rope.rope_theta, rope.own,
    )  # fmt: skip
    assert again.max_position_embeddings == 32768
    older = {k: v for k, v in config.items() if k != "rope_parameters"}  # what transformers 4 sees
    assert RopeScaling.from_hf(older, "config.json") == again
    keys = rope.to_gguf("llama", finetuned=True)
    read = RopeScaling.from_gguf({"general.architecture": "llama", **keys}, "f.gguf")
    assert (read.max_position_embeddings, read.rope_theta) == (32768, rope.rope_theta)
    assert read.factor == (16 if method in ("linear", "yarn") else rope.factor)


def test_each_method_computes_the_same_in_llama_cpp_and_another_thing_than_the_others(llama, tmp_path):
    """F32 over the whole new window, four times the old one; `check="full"` fails where logits differ."""
    ids = [0, *range(2, 200)]
    logits = {}
    for method in METHODS:
        out = tmp_path / f"{method}.gguf"
        result = pi_gguf.convert(str(llama), out, context=4 * WINDOW, method=method, steps=0, quant="F32", check="full")
        (report,) = result.checks
        assert report.prompt_tokens == 4 * WINDOW and report.kl_divergence < 1e-6, method
        shown = pi_gguf.inspect(str(out))
        assert shown.window == 4 * WINDOW and not shown.findings and not shown.warnings, method
        with pi_gguf.open(out, type_k="f32", type_v="f32") as model:
            logits[method] = np.concatenate(list(model.logits_chunks(ids, 20)))
        theirs = HfModel(load_checkpoint(str(llama)).extended(4 * WINDOW, method), device="cpu")
        np.testing.assert_allclose(logits[method], np.concatenate(list(theirs.logits_chunks(ids, 20))), atol=1e-4)
    for method in METHODS:
        for other in METHODS:
            assert method == other or abs(logits[method] - logits[other]).max() > 0.05, (method, other)


def test_a_method_is_written_down_and_converts_again(llama, tmp_path, cli):
    out = pi_gguf.extend(str(llama), tmp_path / "hf", context=4 * WINDOW, method="ntk", steps=0)
    record = json.loads((out / "pi_gguf.json").read_text())
    assert (record["method"], record["original_window"], record["context"]) == ("ntk", WINDOW, 4 * WINDOW)
    assert pi_gguf.convert(str(out), tmp_path / "m.gguf", quant="F32").checks[0].kl_divergence < 1e-6
    code, shown, _ = cli("inspect", tmp_path / "m.gguf", "--json")
    report = json.loads(shown)
    assert code == 0 and report["window"] == 4 * WINDOW and not report["findings"]
    assert "method ntk" in report["general"]["general.description"]


def test_what_a_method_cannot_do_is_refused(llama, cli, tmp_path):
    with pytest.raises(OptionError, match="method must be one of linear, ntk, yarn, none, nope, got dynamic"):
        find_method("dynamic")
    for method in METHODS:
        with pytest.raises(OptionError, match="above the model's window of 2048"):
            extended(method, 2048)
    with pytest.raises(OptionError, match="multiple of the window"):
        extended("yarn", 5000)
    scaled = RopeScaling.from_hf(BASE, "config.json").interpolated(8192, 64)
    for method in ("ntk", "yarn", "none", "nope"):
        with pytest.raises(UnsupportedError, match=f"method {method} is for models without scaling"):
            find_method(method).extended(scaled, 32768, 64)
    with pytest.raises(UnsupportedError, match="switched off"):
        find_method("linear").extended(extended("nope"), 65536, 64)
    code, _, err = cli("plan", llama, "--context", 256, "--method", "ntk", "--factor-warmup", "5", "--device", "cpu")
    assert code == 2 and "factor-warmup is for method linear" in err
