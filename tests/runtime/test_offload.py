"""What fits: types of the cache by free memory, layers by a GPU's, fewer where llama.cpp has not what it asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import make_llama

import pi_gguf
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.llamacpp.cache import predict_kv_cache
from pi_gguf.runtime import model as module
from pi_gguf.runtime.offload import KV_CHOICES, choose_kv, choose_layers, gpu_memory

CONTEXT = 4096


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    model = make_llama(folder / "model", num_hidden_layers=5, hidden_size=128, num_attention_heads=4)
    pi_gguf.convert(str(model), folder / "m.gguf", quant="F16", context=CONTEXT, steps=0, check="none")
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def info(path):
    return read_gguf(path)


def weights(info):
    return sum(tensor.nbytes for tensor in info.tensors)


@pytest.mark.parametrize(
    ("how", "usual"), [({"gpu": True}, 0), ({"gpu": False, "flash_attn": True}, 0), ({"gpu": False}, 1)]
)
def test_the_cache_is_the_usual_one_or_the_next_that_fits(info, how, usual):
    sizes = [weights(info) + predict_kv_cache(info, CONTEXT, *pair) for pair in KV_CHOICES]
    assert sizes[0] > sizes[1] > sizes[2]
    for size, pair in [*zip(sizes, KV_CHOICES, strict=True)][usual:]:
        chosen = choose_kv(info, CONTEXT, size, **how)
        assert (chosen.type_k, chosen.type_v) == pair
        assert bool(chosen.why) == (pair != KV_CHOICES[usual])
    chosen = choose_kv(info, CONTEXT, sizes[0], **how)
    assert (chosen.type_k, chosen.type_v) == KV_CHOICES[usual]
    if usual == 0:
        chosen = choose_kv(info, CONTEXT, sizes[1], **how)
        assert "K in q8_0, V in f16" in chosen.why and "half its speed" not in chosen.why
    chosen = choose_kv(info, CONTEXT, 1000, **how)
    assert (chosen.type_k, chosen.type_v) == KV_CHOICES[-1] and "half its speed" in chosen.why
    chosen = choose_kv(info, CONTEXT, 1000, **{**how, "flash_attn": False})
    assert (chosen.type_k, chosen.type_v) == KV_CHOICES[1]


def test_heads_that_are_no_blocks_keep_the_exact_cache(tmp_path):
    folder = make_llama(tmp_path / "model", head_dim=24)
    pi_gguf.convert(str(folder), tmp_path / "m.gguf", quant="F32", check="none")
    chosen = choose_kv(read_gguf(tmp_path / "m.gguf"), 64, 1000, gpu=False)
    assert (chosen.type_k, chosen.type_v, chosen.why) == ("f16", "f16", "")


def test_keys_and_values_that_are_one_are_of_one_type(info, path, monkeypatch):
    """As llama.cpp wants it of DeepSeek's latent attention."""
    latent = replace(info, metadata={**info.metadata, f"{info.arch}.attention.key_length_mla": 192})
    between = weights(info) + predict_kv_cache(info, CONTEXT, "q8_0", "f16")
    for size, types in ((2**40, "f16"), (between, "q8_0"), (1000, "q8_0")):
        chosen = choose_kv(latent, CONTEXT, size, gpu=False)
        assert (chosen.type_k, chosen.type_v) == (types, types)
    monkeypatch.setattr(module, "read_gguf", lambda _: latent)
    with pi_gguf.open(path) as model:
        assert model.identity["type_k"] == "f16"
    with pytest.raises(OptionError, match="type_k q8_0 and type_v f16 must be the same"):
        pi_gguf.open(path, type_k="q8_0")


def test_as_many_layers_as_fit(info):
    assert choose_layers(info, CONTEXT, ("f16", "f16"), 512, 2**40).layers == -1
    counts = [choose_layers(info, CONTEXT, ("f16", "f16"), 512, size * 2**20).layers for size in range(256, 400)]
    whole = counts.index(-1)
    assert counts[0] == 0 and counts[:whole] == sorted(counts[:whole])
    assert counts[whole - 1] == 5, "five layers and the output matrix are six"
    some = choose_layers(info, CONTEXT, ("f16", "f16"), 512, (256 + whole - 1) * 2**20)
    assert some.why.startswith("5 of 6 layers on the GPU: all, with cache and buffers, take about ")
    smaller = [choose_layers(info, CONTEXT, ("q8_0", "q8_0"), 512, size * 2**20).layers for size in range(256, 400)]
    assert smaller.index(-1) < whole


def test_a_smaller_cache_is_opened_and_said(path, info, capfd, monkeypatch):
    free = weights(info) + predict_kv_cache(info, CONTEXT, "q8_0", "q8_0")
    real = module.choose_kv
    monkeypatch.setattr(module, "choose_kv", lambda info, n_ctx, _, **more: real(info, n_ctx, free, **more))
    with pi_gguf.open(path, kv="auto") as model:
        assert model.kv_cache_bytes == predict_kv_cache(info, CONTEXT, "q8_0", "q8_0")
        small = "".join(model.complete("It was", max_tokens=3))
    assert "K in q8_0, V in q8_0" in capfd.readouterr().err
    monkeypatch.undo()
    with pi_gguf.open(path, kv="auto") as model, pi_gguf.open(path) as plain:
        assert model.kv_cache_bytes == plain.kv_cache_bytes and small
    with pytest.raises(OptionError, match="kv must be auto, got q8_0"):
        pi_gguf.open(path, kv="q8_0")


@pytest.mark.parametrize(("room", "tried"), [(6, [-1]), (4, [-1, 4]), (2, [-1, 4, 3, 2]), (0, [-1, 4, 3, 2, 1, 0])])
def test_fewer_layers_are_tried_where_there_is_no_room(info, room, tried, capfd):
    asked = []

    def opening(n_gpu_layers):
        asked.append(n_gpu_layers)
        if (n_gpu_layers if n_gpu_layers >= 0 else 6) > room:
            raise GgufError("failed to allocate", "")
        return "open"

    assert module._open_what_fits(opening, -1, info) == "open"
    assert asked == tried and capfd.readouterr().err.count("the GPU has no room") == len(tried) - 1


def test_what_does_not_open_at_all_is_said(info):
    def opening(n_gpu_layers):
        asked.append(n_gpu_layers)
        raise GgufError("an adapter of another model", "")

    asked = []
    with pytest.raises(GgufError, match="an adapter of another model"):
        module._open_what_fits(opening, 3, info)
    assert asked == [3], "no room is not what is wrong"


def test_without_a_gpu_there_is_none(path, cli):
    if gpu_memory() is not None:
        pytest.skip("llama.cpp sees a GPU here")
    with pi_gguf.open(path, gpu_layers="auto") as model:
        assert "".join(model.complete("It was", max_tokens=2)) is not None
    code, _, err = cli("run", path, "--gpu-layers", "many", "--prompt", "a")
    assert code == 2 and "must be a number or auto, got 'many'" in err
    code, _, err = cli("run", path, "--gpu-layers", "auto", "--kv", "auto", "--prompt", "It was", "--max-tokens", "2")
    assert code == 0, err


def test_plain_attention_takes_longer_than_its_operations(path):
    with pi_gguf.open(path) as model:
        near, far = model.reading_cost(0, 100), model.reading_cost(4000, 4100)
        weights = 2 * near - model.reading_cost(0, 200) / 2  # attention grows with the square
        model.flash_attn = True
        flash = model.reading_cost(4000, 4100)
        assert near < far and (far - weights) / (flash - weights) == pytest.approx(2)
