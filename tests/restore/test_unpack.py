"""Unpacking: a GGUF file becomes the Hugging Face folder that it was made from, in every family, or nothing."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import contents, in_place, make_llama, make_tokenizer, tensors
from safetensors.torch import load_file
from small_families import SHAPES, VARIANTS, WINDOW, make_model
from small_tokenizers import train_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.checkpoint.tensors import open_files
from pi_gguf.errors import GgufError, OptionError, PiGgufError
from pi_gguf.families import FAMILIES
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import Entry, read_header
from pi_gguf.gguf.places import places
from pi_gguf.measure.kl import kl_divergence
from pi_gguf.models.hf import HfModel
from pi_gguf.restore.opened import open_file
from pi_gguf.restore.rotation import agree, llama3
from pi_gguf.restore.unpack import restore
from pi_gguf.runtime.model import Model
from pi_gguf.scaling.own import OwnScaling
from pi_gguf.vocabulary.byte_level import SAME
from pi_gguf.vocabulary.probes import sample_texts

ADDED_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")
"""Families whose norms GGUF holds plus one, in 32 bits."""

OTHER_ACTIVATION = ("gemma, erf",)
"""llama.cpp computes these with the family's usual function, and a file does not say which it was."""


def convert(folder: Path, out: Path, **options: Any) -> Path:
    pi_gguf.convert(str(folder), out, **{"quant": "F32", "check": "none", "certify": False, **options})
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def keys_of_model(path: Path) -> dict[str, Any]:
    info = read_gguf(path)
    return {key: value for key, value in info.metadata.items() if key.startswith((f"{info.arch}.", "tokenizer."))}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(5, 45)[None]).logits
    return result


def test_every_family_can_be_unpacked():
    assert len(FAMILIES) >= 26
    by_arch = {family.arch for family in FAMILIES.values()}
    assert {family.arch for family in FAMILIES.values() if family.fields} == by_arch


@pytest.mark.parametrize("family", SHAPES)
def test_what_is_done_to_a_tensor_is_undone(family, tmp_path):
    changes = VARIANTS["falcon, new decoder"][1] if family == "falcon" else {}  # of one group nothing is reordered
    checkpoint = load_checkpoint(str(make_model(tmp_path / "model", family, changes)))
    changed = set()
    with open_files() as files:
        for place in places(checkpoint, checkpoint.tensors):
            if place.transform is None:
                continue
            tensor = checkpoint.tensors[place.names[0]].read(files).bfloat16()  # exact in the sum with one
            there = place.transform(tensor, checkpoint.hf_config)
            assert torch.equal(place.transform.undo(there, checkpoint.hf_config).bfloat16(), tensor), place.written
            if not torch.equal(there, tensor):
                changed.add(place.transform)
    assert changed == set(FAMILIES[family].transforms.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_family_comes_back_bit_for_bit(variant, tmp_path):
    family, changes = VARIANTS[variant]
    folder = make_model(tmp_path / "model", family, changes)
    file = convert(folder, tmp_path / "file.gguf")
    result = pi_gguf.unpack(file, tmp_path / "back")
    assert result.dtype == "f32"
    before, after = weights(folder), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if family in ADDED_ONE and name.endswith("norm.weight"):
            assert (tensor - after[name]).abs().max() <= 2**-23, name
        else:
            assert torch.equal(tensor, after[name]), name
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "back", folder))
    for text in sample_texts():
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    again = convert(tmp_path / "back", tmp_path / "again.gguf")
    assert tensors(again) == tensors(file)
    assert keys_of_model(again) == keys_of_model(file)
    if variant not in OTHER_ACTIVATION:
        assert torch.allclose(logits(folder), logits(tmp_path / "back"), atol=1e-5)


def test_norms_around_zero_of_16_bits_come_back_whole(tmp_path):
    folder = make_model(tmp_path / "model", "gemma", {})
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    pi_gguf.unpack(convert(folder, tmp_path / "file.gguf"), tmp_path / "back", dtype="bf16")
    before, after = weights(folder), weights(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


ORIGINAL = {"rope_theta": 1e4, "original_max_position_embeddings": WINDOW // 2}
LLAMA3 = {**ORIGINAL, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ORIGINAL, "rope_type": "yarn", "factor": 2.0}
LONGROPE = {
    **ORIGINAL, "rope_type": "longrope", "short_factor": [1.0] * 4 + [1.5] * 4,
    "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip


@pytest.mark.parametrize("context", [None, 4 * WINDOW])
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {}),
        ("llama", LLAMA3),
        ("llama", YARN),
        ("llama", {**YARN, "attention_factor": 1.5}),
        ("granite", LONGROPE),
        ("phi3", LONGROPE),
        ("phi3", {}),
        ("gemma3_text", {}),
    ],
    ids=["llama", "llama3", "yarn", "yarn attention", "granite longrope", "phi3 longrope", "phi3", "gemma3"],
)
def test_a_scaling_comes_back(family, own, context, tmp_path):
    changes: dict[str, Any] = {"rope_parameters": own} if own else {}
    changes |= {"original_max_position_embeddings": WINDOW // 2} if own and family == "phi3" else {}
    folder = make_model(tmp_path / "model", family, changes)
    file = convert(folder, tmp_path / "file.gguf", context=context, steps=0)
    pi_gguf.unpack(file, tmp_path / "back")
    expected = load_checkpoint(str(folder))
    expected = expected.extended(context) if context else expected
    back = load_checkpoint(str(tmp_path / "back"))
    assert agree(back.rope, expected.rope, expected.rotary_dim)
    parameters = json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"]
    if own and not context:
        assert parameters["rope_type"] == own["rope_type"]
    elif context and not own and family == "llama":
        assert (parameters["rope_type"], parameters["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("theta", "dim", "original", "factor"), [(5e5, 128, 8192, 8.0), (5e5, 64, 8192, 32.0), (1e4, 16, 320, 8.0)]
)
def test_llama_3s_formula_is_found_in_its_numbers(theta, dim, original, factor):
    fields = {"original_max_position_embeddings": original, "factor": factor, "low_freq_factor": 1.0}
    own = OwnScaling("llama3", {**fields, "high_freq_factor": 4.0})
    listed = [float(np.float32(divisor)) for divisor in own.divisors(theta, dim)]
    assert llama3(listed, theta, dim, 131072) == own
    other = [*listed[:-2], listed[-2] * 1.01, listed[-1]]
    assert llama3(other, theta, dim, 131072) is None


# Quantized and split files


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama whose rows are whole blocks of every type."""
    return make_llama(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512, head_dim=64,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q4_1", "IQ4_XS"])
def test_a_quantized_file_gives_the_numbers_that_llama_cpp_computes_with(quant, wide, tmp_path):
    import gguf

    file = convert(wide, tmp_path / "file.gguf", quant=quant)
    assert pi_gguf.unpack(file, tmp_path / "half").dtype == "bf16"
    pi_gguf.unpack(file, tmp_path / "back", dtype="f32")
    again = convert(tmp_path / "back", tmp_path / "again.gguf")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    for t in gguf.GGUFReader(again).tensors:
        assert np.array_equal(t.data, stored[t.name].astype("<f4")), t.name
    half, whole = weights(tmp_path / "half"), weights(tmp_path / "back")
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    ids = [5 + i % 400 for i in range(200)]
    with Model(file, n_ctx=256, type_k="f16", device="cpu") as model:
        theirs = np.concatenate(list(model.logits_chunks(ids, 100)))
    ours = np.concatenate(list(HfModel(load_checkpoint(str(tmp_path / "back")), device="cpu").logits_chunks(ids, 100)))
    plain = np.concatenate(list(HfModel(load_checkpoint(str(wide)), device="cpu").logits_chunks(ids, 100)))
    rounding = float(kl_divergence(ours, theirs)[0].mean())  # of activations, which llama.cpp quantizes too
    assert rounding < 1e-2
    assert quant == "Q8_0" or rounding < float(kl_divergence(plain, theirs)[0].mean()) / 3


def test_a_split_file_is_the_same_as_a_whole_one(wide, tmp_path):
    whole = convert(wide, tmp_path / "whole.gguf")
    convert(wide, tmp_path / "split.gguf", split_max_size="2M")
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 1
    pi_gguf.unpack(whole, tmp_path / "one")
    pi_gguf.unpack(parts[0], tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    pi_gguf.unpack(parts[1], tmp_path / "by the second")
    assert contents(tmp_path / "one") == contents(tmp_path / "by the second")
    parts[-1].unlink()
    with pytest.raises(GgufError, match=f"{parts[-1].name}: no such file, and it is one of"):
        pi_gguf.unpack(parts[0], tmp_path / "third")
    assert not list(tmp_path.glob("third*"))


def test_shards_are_as_transformers_opens_them(wide, tmp_path, monkeypatch):
    monkeypatch.setattr("pi_gguf.restore.weights._SHARD_BYTES", 1_000_000)
    pi_gguf.unpack(convert(wide, tmp_path / "file.gguf"), tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "back"), logits(wide))


def test_one_matrix_of_q_k_and_v_is_taken_apart(wide, tmp_path):
    from pi_gguf.gguf.file import write_values

    file = convert(wide, tmp_path / "file.gguf")
    import gguf

    values = {t.name: t.data.reshape(tuple(reversed(t.shape))) for t in gguf.GGUFReader(file).tensors}
    for layer in range(2):
        parts = [values.pop(f"blk.{layer}.attn_{letter}.weight") for letter in "qkv"]
        values[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)
    header = read_header(file)
    write_values(tmp_path / "fused.gguf", "llama", {}, values)
    fused = read_header(tmp_path / "fused.gguf")
    entries = {key: entry for key, entry in header.entries.items() if key not in fused.entries}
    data = (tmp_path / "fused.gguf").read_bytes()[fused.data_offset :]
    (tmp_path / "fused.gguf").write_bytes(fused.changed(entries).to_bytes() + data)
    pi_gguf.unpack(tmp_path / "fused.gguf", tmp_path / "back")
    before, after = weights(wide), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# Tokenizers


def sentencepiece_folder(path: Path, **settings: Any) -> Path:
    """A Llama with a tokenizer.model of its own."""
    make_llama(path, vocab_size=1200, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
    train_sentencepiece(path / "tokenizer.model", **settings)
    return path


KINDS = {
    "BPE": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False},
    "BPE without a first space": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                                  "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "Unigram": {},
    "Unigram as it is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_tokenizer_comes_back(kind, tmp_path):
    folder = sentencepiece_folder(tmp_path / "model", **KINDS[kind])
    file = convert(folder, tmp_path / "file.gguf")
    pi_gguf.unpack(file, tmp_path / "back")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    texts = [text for text in sample_texts() if text.isprintable()]
    assert len(texts) > 20
    if kind.startswith("BPE"):
        with Model(file, n_ctx=64, type_k="f16", device="cpu") as model:
            assert all(tokenizer(text)["input_ids"] == model.tokenize(text) for text in texts)
    assert (tmp_path / "back" / "tokenizer.model").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as bare as it was
        (tmp_path / "back" / name).unlink()
    theirs, ours = (
        read_gguf(convert(path, tmp_path / "x.gguf", overwrite=True)).header.entries
        for path in (folder, tmp_path / "back")
    )
    for name in ("tokens", "scores", "token_type", "add_space_prefix", "add_bos_token", "eos_token_id"):
        assert ours[f"tokenizer.ggml.{name}"].value == theirs[f"tokenizer.ggml.{name}"].value, name


@pytest.mark.slow
def test_every_splitting_that_is_known_comes_back(tmp_path):
    """A vocabulary of many merges, in a file that states each of llama.cpp's names of a splitting in turn."""
    folder = make_llama(tmp_path / "model", vocab_size=2000)
    make_tokenizer(folder, vocab_size=2000)
    file = convert(folder, tmp_path / "file.gguf")
    names = {"llama-bpe", "smollm", "gpt-2", "falcon", "qwen2", "deepseek-v3", "tekken", "gpt-4o", "bloom"}
    names |= {name for others in SAME.values() for name in others.split()}
    assert len(names) > 50
    for name in sorted(names):
        odd = in_place(file, tmp_path / "odd.gguf", {"tokenizer.ggml.pre": Entry.of(name)})
        restore(open_file(odd), tmp_path / "back", weights=False)
        shutil.rmtree(tmp_path / "back")


def test_templates_special_tokens_and_ends_come_back(tmp_path):
    folder = make_llama(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    more = ["<|im_end|>", "<|im_start|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more, "pad_token": "<pad>"})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}<|im_end|>", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    file = convert(folder, tmp_path / "file.gguf")
    pi_gguf.unpack(file, tmp_path / "back")
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == tokenizer.chat_template
    assert (back.bos_token, back.eos_token, back.pad_token) == ("<s>", "</s>", "<pad>")
    assert (
        json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == ends["eos_token_id"]
    )
    assert {t.content: t.special for t in back.added_tokens_decoder.values()} == {
        t.content: t.special for t in tokenizer.added_tokens_decoder.values()
    }
    assert keys_of_model(convert(tmp_path / "back", tmp_path / "again.gguf")) == keys_of_model(file)


# What is refused


CHANGES = {
    "an architecture": ({"general.architecture": "mamba"}, "general.architecture|llama.cpp|mamba"),
    "a key that nobody knows": ({"llama.attention.sink_count": 3}, "attention.sink_count is 3, which config.json"),
    "a layer more": ({"llama.block_count": 3}, "block_count"),
    "other heads": ({"llama.attention.head_count": 8}, "head_count|attn_q|shape"),
    "a rotation of its own": ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5 without YaRN"),
    "an unknown splitting": ({"tokenizer.ggml.pre": "superbpe"}, "tokenizer.ggml.pre is 'superbpe'"),
    "another splitting": ({"tokenizer.ggml.pre": "bloom"}, None),
    "a broken template": ({"tokenizer.chat_template": "{% if %}"}, "chat_template"),
    "a template's name": ({"tokenizer.chat_template.../../x": "a"}, "a template's name is made of"),
    "an infinite epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "epsilon"),
    "a window of nothing": ({"llama.context_length": 0}, "context_length"),
    "no window": ({"llama.context_length": None}, "context_length"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens|vocab"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_unpacked_is_refused_and_nothing_is_left(change, f32_gguf, tmp_path):
    changes, said = CHANGES[change]
    entries = {key: None if value is None else Entry.of(value) for key, value in changes.items()}
    file = in_place(f32_gguf, tmp_path / "odd.gguf", entries)
    if said is None:  # a file that says so is that; llama.cpp reads it so
        pi_gguf.unpack(file, tmp_path / "back")
        return
    with pytest.raises(PiGgufError, match=said):
        pi_gguf.unpack(file, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_a_number_that_is_none_is_refused(f32_gguf, tmp_path):
    data = bytearray(f32_gguf.read_bytes())
    header = read_header(f32_gguf)
    place = next(t for t in header.tensors if t.name == "blk.1.ffn_up.weight")
    data[header.data_offset + place.offset + 400 : header.data_offset + place.offset + 404] = struct.pack("<f", np.nan)
    (tmp_path / "odd.gguf").write_bytes(data)
    with pytest.raises(GgufError, match=r"blk\.1\.ffn_up\.weight holds NaN"):
        pi_gguf.unpack(tmp_path / "odd.gguf", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_what_is_there_stays_unless_it_may_be_replaced(f32_gguf, tmp_path):
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine").write_text("mine")
    with pytest.raises(OptionError, match="exists"):
        pi_gguf.unpack(f32_gguf, tmp_path / "back")
    with pytest.raises(OptionError, match="dtype must be one of bf16, f32, got f16"):
        pi_gguf.unpack(f32_gguf, tmp_path / "back", dtype="f16", overwrite=True)
    with pytest.raises(GgufError, match="no such file"):
        pi_gguf.unpack(tmp_path / "absent.gguf", tmp_path / "back", overwrite=True)
    assert contents(tmp_path) == {"back": None, "back/mine": b"mine"}
    pi_gguf.unpack(f32_gguf, tmp_path / "back", overwrite=True)
    assert not (tmp_path / "back" / "mine").exists() and (tmp_path / "back" / "config.json").exists()


def test_a_file_cut_short_is_refused(f32_gguf, tmp_path):
    shutil.copyfile(f32_gguf, tmp_path / "cut.gguf")
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.truncate(f32_gguf.stat().st_size - 1000)
    with pytest.raises(GgufError, match="beyond the end"):
        pi_gguf.unpack(tmp_path / "cut.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_command_says_what_it_wrote(cli, f32_gguf, tmp_path):
    code, out, _ = cli("unpack", f32_gguf, tmp_path / "back", "--dtype", "bf16", "--json")
    report = json.loads(out)
    assert code == 0 and report["model_type"] == "llama" and report["dtype"] == "bf16"
    assert (
        report["nbytes"] == 2 * report["parameters"] == 2 * sum(t.numel() for t in weights(tmp_path / "back").values())
    )
    code, out, _ = cli("unpack", f32_gguf, tmp_path / "other")
    assert code == 0 and f"wrote {tmp_path / 'other'} (llama" in out and "--context 1024" in out
