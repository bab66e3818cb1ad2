"""Running a file: window from its metadata, memory predicted, prompts that do not fit refused, scores in the open."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_llama

import pi_gguf
from pi_gguf.errors import GgufError, OptionError, ResourceError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.llamacpp import library as ggml
from pi_gguf.llamacpp.cache import CACHE_TYPES, kv_cache_bytes, predict_kv_cache
from pi_gguf.llamacpp.library import compute
from pi_gguf.llamacpp.quantizer import quantizations
from pi_gguf.runtime.model import _scores_batch


@pytest.fixture(scope="module")
def path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=256, steps=0)
    return path


def test_text_streams_and_a_seed_repeats_it(path):
    with pi_gguf.open(path) as model:
        one, two, greedy = (
            "".join(model.complete("Once", max_tokens=20, temperature=t, seed=1)) for t in (0.9, 0.9, 0.0)
        )
        assert one == two
        assert one != greedy
        assert len(list(model.complete("Once", max_tokens=5))) >= 2


def test_a_prompt_that_does_not_fit_is_an_error_with_both_numbers(path, cli):
    with pi_gguf.open(path) as model:
        long = "word " * 400
        with pytest.raises(OptionError, match=rf"prompt of {len(model.tokenize(long))} tokens .* window of 256"):
            list(model.complete(long))
        with pytest.raises(OptionError, match="and 300 to write"):
            list(model.complete("a", max_tokens=300))
    code, _, err = cli("run", path, "--prompt", long)
    assert code == 2 and "256 tokens" in err and "hint:" in err


def test_score_is_what_complete_would_choose(path):
    with pi_gguf.open(path) as model:
        ids = model.tokenize("Once upon a time there was a house")
        logprobs, first = model.score(ids, 4)
        logits = np.concatenate(list(model.logits_chunks(ids[:-1], 4))).astype(np.float64)
        total = np.log(np.exp(logits).sum(1))
        np.testing.assert_allclose(logprobs, logits[range(4), ids[-4:]] - total, atol=1e-5)
        np.testing.assert_array_equal(first, logits.argmax(1) == ids[-4:])


def test_chat_needs_a_template(path):
    with pi_gguf.open(path) as model, pytest.raises(GgufError, match="chat_template is missing"):
        list(model.chat([{"role": "user", "content": "hello"}]))


def test_the_size_of_the_cache_is_known_before(path):
    llama7b = {"n_layers": 32, "n_kv_heads": 32, "head_dim": 128, "n_ctx": 32768}
    assert kv_cache_bytes(**llama7b, type_k="f16", type_v="f16") == 16 * 2**30
    assert kv_cache_bytes(**llama7b, type_k="q8_0", type_v="q4_0") == 2**32 * (34 + 18) / 32
    info = read_gguf(path)
    assert predict_kv_cache(info, 256, "f16", "f16") == 2 * 2 * 2 * 32 * 2 * 256
    with pytest.raises(ResourceError, match="of KV cache at 1000000000 tokens"):
        pi_gguf.open(path, n_ctx=1_000_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type_k": "q3"}, "type_k must be one of"),
        ({"n_ctx": 0}, "n_ctx must be at least 1"),
        ({"type_v": "q8_0", "flash_attn": False}, "needs flash attention"),
        ({"device": "tpu"}, "device must be"),
        ({"gpu_layers": -1}, "gpu_layers must be auto or at least 0, got -1"),
        ({"gpu_layers": 0, "device": "cpu"}, "gpu_layers is for a GPU, device is cpu"),
    ],
)
def test_options_that_cannot_work_are_refused(path, options, message):
    with pytest.raises(OptionError, match=message):
        pi_gguf.open(path, **options)


@pytest.mark.parametrize("types", [("f32", "f32"), ("q8_0", "q8_0")])
def test_other_cache_types_give_close_scores(path, types):
    with pi_gguf.open(path) as model, pi_gguf.open(path, type_k=types[0], type_v=types[1]) as other:
        ids = model.tokenize("The captain looked at the sea for a long time")
        np.testing.assert_allclose(model.score(ids, 8)[0], other.score(ids, 8)[0], atol=0.3)


def test_flash_attention_is_for_quantized_caches_and_gpus_and_k_in_8_bits_for_plain_attention(path, monkeypatch):
    asked = {}
    monkeypatch.setattr("pi_gguf.runtime.model._use_gpu", lambda device: device == "cuda")
    monkeypatch.setattr("pi_gguf.runtime.model.open_llama", lambda *_, **options: asked.update(options) or 1 / 0)
    f16, q8_0 = CACHE_TYPES["f16"][0], CACHE_TYPES["q8_0"][0]
    for options, flash, at_once, k in (
        ({}, False, 64, q8_0), ({"type_k": "f16"}, False, 64, f16), ({"type_v": "q8_0"}, True, 512, f16),
        ({"device": "cuda"}, True, 512, f16), ({"flash_attn": True}, True, 512, f16),
        ({"device": "cuda", "flash_attn": False}, False, 512, f16),
        ({"device": "cuda", "gpu_layers": 1}, False, 512, f16), ({"flash_attn": False}, False, 64, q8_0),
    ):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            pi_gguf.open(path, n_ctx=32768, **options)
        assert (asked["flash_attn"], asked["n_ubatch"], asked["type_k"]) == (flash, at_once, k), options


def test_layers_on_the_gpu_are_counted_as_llama_cpp_does(path, monkeypatch):
    asked = {}
    monkeypatch.setattr("pi_gguf.runtime.model._use_gpu", lambda device: device != "cpu")
    monkeypatch.setattr("pi_gguf.runtime.model.open_llama", lambda *_, **options: asked.update(options) or 1 / 0)
    for options, layers, flash in (  # two blocks and the output matrix
        ({}, -1, True), ({"gpu_layers": 3}, -1, True), ({"gpu_layers": 2}, 2, False), ({"gpu_layers": 0}, 0, False),
        ({"device": "cpu"}, 0, False), ({"gpu_layers": 1, "flash_attn": True}, 1, True),
    ):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            pi_gguf.open(path, **options)
        assert (asked["n_gpu_layers"], asked["flash_attn"]) == (layers, flash), options
        assert asked["op_offload"] is (options.get("device") != "cpu"), options
    with pytest.raises(ResourceError, match="of KV cache at 1000000000 tokens"):  # of this computer's memory
        pi_gguf.open(path, n_ctx=1_000_000_000, gpu_layers=0)


def test_a_quantized_cache_needs_heads_of_whole_blocks(tmp_path):
    model = make_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    path = tmp_path / "model.gguf"
    pi_gguf.convert(str(model), path, quant="F32", check="none", certify=False)
    for name in ("type_k", "type_v"):
        with pytest.raises(OptionError, match=f"{name} q8_0 needs heads of a multiple of 32, .* has heads of 16"):
            pi_gguf.open(path, **{name: "q8_0"})
    with pi_gguf.open(path) as model:
        assert model.identity["type_k"] == "f16"


def test_scores_of_a_batch_take_little_memory(path):
    info = read_gguf(path)  # four heads
    assert [_scores_batch(info, n) for n in (256, 8192, 32768, 40000, 131072, 10**7)] == [512, 256, 64, 32, 32, 32]


def test_small_batches_of_tokens_give_the_same_scores(path, monkeypatch):
    ids = [0, *range(2, 250)]
    with pi_gguf.open(path, type_k="f32", type_v="f32") as model:
        expected = model.score(ids, 200)[0]
    monkeypatch.setattr("pi_gguf.runtime.model._scores_batch", lambda *_: 32)
    with pi_gguf.open(path, type_k="f32", type_v="f32") as model:
        np.testing.assert_allclose(model.score(ids, 200)[0], expected, atol=1e-5)


def test_llama_cpp_names_its_quantizations():
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS"} <= set(quantizations())


def test_torch_products_in_16_bits_between_two_readings_change_nothing(path, tmp_path):
    """On a CPU with AMX they leave tiles in another configuration than llama.cpp's."""
    import torch

    quantized = tmp_path / "q8.gguf"
    pi_gguf.quantize(path, quantized, quant="Q8_0")
    ids = list(range(5, 45))
    with pi_gguf.open(quantized, n_ctx=64) as model:
        before = model.score(ids, 20)[0]
        text = "".join(model.complete("the captain", max_tokens=5))
        matrix = torch.ones(512, 512, dtype=torch.bfloat16)
        assert (matrix @ matrix).sum() > 0
        assert "".join(model.complete("the captain", max_tokens=5)) == text
        assert (model.score(ids, 20)[0] == before).all()


def test_llama_cpp_is_not_left_while_it_computes():
    import signal
    import threading
    import time

    ended = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run with it ignored
    threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        compute(lambda: time.sleep(0.6) or ended.append(True), interrupted=lambda: ended.append(False))
    signal.signal(signal.SIGINT, before)
    assert ended == [False, True]


def test_what_a_card_says_before_llama_cpp_ends_is_printed(capfd):
    ggml.llama_cpp_library()
    collect = ggml._callbacks[-1]
    collect(4, b"CUDA error: invalid argument\n", None)
    collect(4, b"another error\n", None)
    assert capfd.readouterr().err == "CUDA error: invalid argument\n" and ggml.log[-1] == "another error\n"
