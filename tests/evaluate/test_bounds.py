"""The paper's theory on a model's weights: the very scores of the model, and bounds that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import WINDOW
from small_families import make_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, UnsupportedError
from pi_gguf.evaluate.bounds import _draw_products, _partial_sums


def rotated_scores(q, k, distances, theta):
    """Return the scores of a query at each distance from a key, by transformers' own rotation."""
    angles = torch.outer(torch.tensor(distances, dtype=torch.float64), torch.tensor(theta)).repeat(1, 2)
    cos, sin = angles.cos()[None], angles.sin()[None]
    many = torch.tensor(q).expand(1, 1, len(distances), -1)
    query, _ = apply_rotary_pos_emb(many, many, cos, sin)
    return (query[0, 0] @ torch.tensor(k)).numpy()


def test_scores_are_those_of_rotated_queries_and_keys(llama, monkeypatch):
    """The largest scores inside and beyond the window, and between positions, from transformers' rotation."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=32), rng.normal(size=32)
    product = (q[:16] + 1j * q[16:]) * (k[:16] - 1j * k[16:])
    monkeypatch.setattr("pi_gguf.evaluate.bounds._draw_products", lambda *_: (product[None], 32))
    report = pi_gguf.evaluate_bounds(str(llama), context=256)
    theta = 10000.0 ** (-np.arange(16) / 16)
    scores = rotated_scores(q, k, np.arange(256), theta)
    inside = abs(scores[:WINDOW]).max()
    assert report.extrapolated == pytest.approx(abs(scores[WINDOW:]).max() / inside)
    divided = rotated_scores(q, k, np.arange(256) / 4, theta)
    assert report.interpolated == pytest.approx(abs(divided).max() / inside)
    middle = rotated_scores(q, k, np.arange(WINDOW - 1) + 0.5, theta)
    error = abs(middle - (scores[1:WINDOW] + scores[: WINDOW - 1]) / 2).max()
    assert report.error_share == pytest.approx(error / (abs(product).max() * sum(theta**2) / 8))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi", "gpt_neox", "falcon", "cohere", "olmo2"])
def test_the_bound_holds_on_a_models_own_queries_and_keys(family, tmp_path):
    report = pi_gguf.evaluate_bounds(str(make_model(tmp_path, family, {})), context=2048, pairs=20)
    assert 0 < report.error_share <= 1
    assert report.bound < report.bound_exact
    assert report.bound == pytest.approx(report.rotary_dim / (32 * math.log(report.rope_theta)))
    assert 0 < report.bound_ratio_least < report.bound_ratio


def test_the_ratio_of_bounds_is_the_papers():
    """Section 2.3: with base 10000 and 128 dimensions the bound of interpolation is some 600 times smaller."""
    theta = 10000.0 ** (-2 * np.arange(64) / 128)
    sums = _partial_sums(np.arange(0, 4096), theta)
    direct = sum(abs(sum(np.exp(1j * 77 * theta[: k + 1]))) for k in range(64))
    assert sums[77] == pytest.approx(direct)
    ratio = 2 * sums / (128 / (32 * math.log(10000)))
    assert 32 * math.log(10000) == pytest.approx(294.73, abs=0.01)
    assert ratio.min() > 500


def test_pairs_are_drawn_by_the_seed(llama):
    checkpoint = load_checkpoint(str(llama))
    a, b, c = (_draw_products(checkpoint, 8, seed)[0] for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()


def test_figure_2_is_drawn(llama, tmp_path, cli):
    code, out, _ = cli("eval", "bounds", llama, "--context", "256", "--pairs", "4", "--plot", tmp_path / "bounds.png")
    assert code == 0 and "bound of extrapolation by that of interpolation" in out
    assert (tmp_path / "bounds.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_followed_is_refused(llama, tmp_path):
    with pytest.raises(OptionError, match="context must be above the window of 64 tokens, got 64"):
        pi_gguf.evaluate_bounds(str(llama), context=WINDOW)
    with pytest.raises(OptionError, match="pairs must be at least 1"):
        pi_gguf.evaluate_bounds(str(llama), pairs=0)
    pi_gguf.extend(str(llama), tmp_path / "extended", context=256, steps=0)
    with pytest.raises(UnsupportedError, match="before it is extended"):
        pi_gguf.evaluate_bounds(str(tmp_path / "extended"))
    with pytest.raises(UnsupportedError):
        pi_gguf.evaluate_bounds(str(make_model(tmp_path / "mpt", "mpt", {})), context=2048)
