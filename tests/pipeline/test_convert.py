"""The whole path with real llama.cpp: what is written reads back and computes what Hugging Face computes."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from helpers import SHARED_MODELS, WINDOW, make_llama
from small_llamas import VARIANTS

import pi_gguf
from pi_gguf.checkpoint import checkpoint as checkpoint_module
from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.common import progress
from pi_gguf.errors import CheckError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.models.hf import HfModel
from pi_gguf.pipeline import convert as convert_module
from pi_gguf.prove import certify, check
from pi_gguf.prove.check import Reference, check_gguf
from pi_gguf.runtime.model import Model
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.vocabulary.keys import gguf_vocabulary
from pi_gguf.vocabulary.token_check import TokenizedTexts
from pi_gguf.write.layout import plan_file
from pi_gguf.write.writer import write_file


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exact_file_agrees_with_hugging_face(variant, tmp_path):
    folder = make_llama(tmp_path / "model", **VARIANTS[variant])
    result = pi_gguf.convert(str(folder), tmp_path / "model.gguf", quant="F32")
    assert len(result.checks) == 1
    assert result.checks[0].kl_divergence < 1e-6
    assert result.checks[0].top1_agreement > 0.99
    assert (result.checks[0].strings_compared, result.checks[0].strings_different) == (72, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_an_interpolated_file_agrees_beyond_the_original_window(llama, tmp_path):
    result = pi_gguf.convert(str(llama), tmp_path / "out.gguf", context=4 * WINDOW, steps=0, quant="F32", check="full")
    assert result.checks[0].prompt_tokens == 4 * WINDOW
    assert result.checks[0].kl_divergence < 1e-6
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["llama.context_length"] == 256
    assert metadata["llama.rope.scaling.type"] == "linear"
    assert metadata["llama.rope.scaling.factor"] == 4.0
    assert metadata["llama.rope.scaling.original_context_length"] == 64
    assert metadata["llama.rope.scaling.finetuned"] is False
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        assert (model.n_ctx, model.n_ctx_train, model.rope_freq_scale_train) == (256, 256, 0.25)


def test_tensors_are_those_of_the_checkpoint_but_for_the_order_of_rotary_rows(llama, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "out.gguf", quant="F32", check="none")
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    written = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert len(written) == 2 * 9 + 3
    layer = model.model.layers[1]
    np.testing.assert_array_equal(written["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight.detach().numpy())
    np.testing.assert_array_equal(written["output.weight"], model.lm_head.weight.detach().numpy())
    q = layer.self_attn.q_proj.weight.detach().numpy()
    assert not np.array_equal(written["blk.1.attn_q.weight"], q)
    for head in range(4):  # row 2j of a head is Hugging Face's row j, row 2j + 1 its row j + 16
        ours, theirs = written["blk.1.attn_q.weight"][32 * head : 32 * head + 32], q[32 * head : 32 * head + 32]
        np.testing.assert_array_equal(ours[0::2], theirs[:16])
        np.testing.assert_array_equal(ours[1::2], theirs[16:])


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q5_0"])
def test_other_types_stay_close(llama, tmp_path, quant):
    result = pi_gguf.convert(str(llama), tmp_path / "out.gguf", context=128, steps=0, quant=quant)
    assert read_gguf(tmp_path / "out.gguf").quantization == quant
    assert result.checks[-1].quantization == quant
    assert result.checks[-1].kl_divergence < 0.1
    assert len(result.checks) == 1


def test_quantize_writes_any_type_llama_cpp_has(llama, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "f16.gguf", quant="F16", check="none")
    pi_gguf.quantize(tmp_path / "f16.gguf", tmp_path / "q.gguf", quant="q4_0")
    assert read_gguf(tmp_path / "q.gguf").quantization == "Q4_0"
    before, after = read_gguf(tmp_path / "f16.gguf").metadata, read_gguf(tmp_path / "q.gguf").metadata
    assert {k: v for k, v in before.items() if k != "general.file_type"} == {
        k: v for k, v in after.items() if k != "general.file_type"
    }


def test_a_model_is_opened_once_and_then_the_folder_it_became(llama, tmp_path, monkeypatch):
    opened, read = [], checkpoint_module.read_config

    def watched(path, **how):
        opened.append(path.name)
        return read(path, **how)

    monkeypatch.setattr(checkpoint_module, "read_config", watched)
    text = tmp_path / "text.txt"
    text.write_text("The captain went on board. " * 200)
    options = {"context": 16 * WINDOW, "method": "ntk", "quant": "F32", "certify": False, "device": "cpu"}
    for steps, folders in ((0, []), (1, ["out-hf", "out-hf"])):  # once to see what the old window pays
        opened.clear()
        made = pi_gguf.convert(
            str(llama), tmp_path / "out.gguf", steps=steps, data=[str(text)], batch_tokens=64, overwrite=True, **options
        )
        assert opened == [llama.name, *folders]
        assert made.checks[0].prompt_tokens == 600


def test_whatever_may_take_long_runs_under_a_name_that_is_said(llama, tmp_path, monkeypatch):
    names, under, said = [], {}, []

    class Told(progress.Lines):
        def begin(self, work):
            names.append(work.title)
            super().begin(work)

        def end(self, work):
            names.remove(work.title)
            super().end(work)

    def watch(owner, name, key):
        function = getattr(owner, name)

        def watched(*arguments, **more):
            under.setdefault(key, []).append(names[-1] if names else None)
            return function(*arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(convert_module, "load_checkpoint", "load_checkpoint")
    watch(convert_module, "plan_file", "plan_file")
    watch(Checkpoint, "_open_model", "open in transformers")
    watch(HfModel, "logits_chunks", "read by transformers")
    watch(check, "Model", "open in llama.cpp")
    watch(certify, "Model", "open in llama.cpp")
    watch(Model, "logits_chunks", "read by llama.cpp")
    watch(TokenizedTexts, "of", "texts")
    monkeypatch.setattr(check, "say", lambda line: said.append((line, dict(under))))
    monkeypatch.setattr(progress, "Lines", Told)
    with progress.output("plain"):
        pi_gguf.convert(str(llama), tmp_path / "out.gguf", context=16 * WINDOW, steps=0, quant="F16")
    speed = "certify out.gguf: how fast it reads here"
    assert {key: list(dict.fromkeys(titles)) for key, titles in under.items()} == {
        "load_checkpoint": [f"open {llama}"],
        "plan_file": ["plan the file"],
        "texts": ["tokenize the texts of the check"],
        "open in transformers": [f"open {llama} in transformers"],
        "read by transformers": ["transformers reads 600 tokens", "perplexity at 64"],
        "open in llama.cpp": ["open out.gguf in llama.cpp", speed],
        "read by llama.cpp": ["llama.cpp reads 600 tokens", speed, "perplexity at 64", "perplexity at 1024", "passkey"],
    }
    line, before = said[0]
    assert line == "check: 600 tokens are read by transformers and by llama.cpp; --check full reads the whole window"
    assert "open in transformers" not in before and "open in llama.cpp" not in before, "said before either begins"


def written_with(checkpoint, tmp_path):
    path = tmp_path / "wrong.gguf"
    vocabulary = gguf_vocabulary(checkpoint, checkpoint.load_tokenizer())
    plan = plan_file(checkpoint, vocabulary=vocabulary, general={}, finetuned=False, quantization="F32")
    write_file(plan, path)
    return path


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"factor": 1 / 4}, "factor must be above 1"),
        ({"factor": 1 / 4}, "must be the original window's 64"),
        ({"factor": 2.0}, "KL divergence"),
        ({"factor": 2.0}, "is not original window 64 times factor 2"),
        ({"max_position_embeddings": 64}, "llama.cpp reads a window of 64 tokens, planned 256"),
        ({"rope_theta": 5000.0}, "rope.freq_base is 5000, planned 10000"),
        ({"rope_type": "default", "factor": 1.0}, "reads rope_freq_scale 1, planned 0.25"),
    ],
)
def test_the_check_finds_a_wrong_scaling(llama, tmp_path, wrong, complaint):
    planned = load_checkpoint(str(llama)).extended(4 * WINDOW)
    path = written_with(planned.scaled(dataclasses.replace(planned.rope, **wrong)), tmp_path)
    with pytest.raises(CheckError, match=complaint):
        check_gguf(path, Reference(planned, "quick"))


def test_a_factor_used_upside_down_on_both_sides_is_found(llama, tmp_path):
    """The file and the Hugging Face model may share a mistake; the windows alone tell."""
    wrong = load_checkpoint(str(llama)).scaled(RopeScaling("linear", 1 / 4, 10000.0, 64, 256))
    path = written_with(wrong, tmp_path)
    with pytest.raises(CheckError, match="must be the original window's 64"):
        check_gguf(path, Reference(wrong, "quick"))


def test_the_check_finds_another_tokenizer(llama, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(str(llama))
    path = written_with(checkpoint, tmp_path)
    reference = Reference(checkpoint, "quick")
    wrong = [0, *reference.texts.prose["a"]]
    reference.texts.special["doubled"] = wrong
    assert check_gguf(path, reference).strings_different == ["doubled"]
    reference.texts.prose["doubled"] = wrong
    with pytest.raises(CheckError, match="tokenizes differently"):
        check_gguf(path, reference)
    monkeypatch.setattr(check, "MAX_KL_DIVERGENCE", {"F32": -1.0})
    del reference.texts.prose["doubled"]
    with pytest.raises(CheckError, match="above rounding"):
        check_gguf(path, reference)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_MODELS.is_dir(), reason="needs real foreign checkpoints in ../shared/assets/models")
@pytest.mark.parametrize(("name", "window"), [("stories260K", 512), ("stories15M", 256)])
def test_real_foreign_checkpoints_convert_and_run(name, window, tmp_path):
    plain = pi_gguf.convert(str(SHARED_MODELS / name), tmp_path / "plain.gguf", quant="F32")
    assert plain.checks[0].kl_divergence < 1e-4
    scaled = pi_gguf.convert(
        str(SHARED_MODELS / name), tmp_path / "scaled.gguf", context=4 * window, steps=0, quant="Q8_0"
    )
    assert [c.context_length for c in scaled.checks] == [4 * window]
    with pi_gguf.open(tmp_path / "plain.gguf") as model:
        text = "".join(model.complete("Once upon a time", max_tokens=12))
    assert text.startswith((", there was a", " there was a")), text
