"""MLPs in tiles: the same numbers in less memory."""

from __future__ import annotations

import pytest
import torch
from small_families import SHAPES, make_model
from steps import a_batch, largest_allocation, loss_and_gradients

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.tune.tiles import tiled_mlps

WITHOUT = {"bloom", "mixtral", "mpt", "olmoe", "qwen3_moe"}
"""Families whose only MLPs are experts, or take more than hidden states."""


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_tiles_change_nothing_in_any_family(family, tmp_path):
    model = load_checkpoint(str(make_model(tmp_path, family, {}))).load_model(dtype=torch.float32).train()
    batch = a_batch(40)
    own, expected = loss_and_gradients(model, **batch)
    with tiled_mlps(model, 7) as count:
        tiled, gradients = loss_and_gradients(model, **batch)
    assert (count == 0) == (family in WITHOUT), count
    torch.testing.assert_close(tiled, own, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item())


def test_what_lies_between_two_products_exists_for_a_tile_only(tmp_path):
    model = load_checkpoint(str(make_model(tmp_path, "llama", {"intermediate_size": 4096}))).load_model(
        dtype=torch.float32
    )
    batch = a_batch(300)
    whole = 4 * 600 * 4096
    assert largest_allocation(model, batch) >= whole
    with tiled_mlps(model, 64):
        assert largest_allocation(model, batch) < whole / 2


def test_a_tile_is_forgotten_until_its_gradient_is_due(tmp_path):
    folder = make_model(tmp_path, "llama", {"intermediate_size": 4096})
    model = load_checkpoint(str(folder)).load_model(dtype=torch.float32)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = []

    def keep(tensor):
        if 4096 in tensor.shape and tensor.data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**a_batch(300))
        assert kept
        kept.clear()
        with tiled_mlps(model, 64):
            model(**a_batch(300))
        assert not kept
