"""What people have in their folders: leftovers, two spellings of one thing, other forms of the same weights.

Each is held against what transformers makes of the folder, or of the same folder before anything was left in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file

import pi_gguf
from pi_gguf.checkpoint import checkpoint
from pi_gguf.checkpoint import config as configs
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.checkpoint.hub import model_name, public_source
from pi_gguf.checkpoint.tensors import open_files
from pi_gguf.errors import CheckpointError, UnsupportedError
from pi_gguf.families import FAMILIES, family
from pi_gguf.gguf.file import read_gguf
from pi_gguf.measure.kl import kl_divergence
from pi_gguf.scaling.own import OwnScaling
from pi_gguf.scaling.rope import RopeScaling

IDS = [7 + (i * 41) % 380 for i in range(56)]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def notes_again():
    configs.note.cache_clear()


def convert(folder: Path, **options: Any) -> Path:
    out = folder.with_name(folder.name + ".gguf")
    pi_gguf.convert(str(folder), out, **{"quant": "F32", "certify": False, **options})
    return out


def theirs(model: Any) -> np.ndarray:
    """Logits of transformers, of a folder or an opened model."""
    from transformers import AutoModelForCausalLM

    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return model.float().eval()(torch.tensor([IDS])).logits[0].numpy()


def distance(gguf: Path, reference: np.ndarray) -> float:
    """Mean KL divergence of llama.cpp from logits, in nats."""
    with pi_gguf.open(gguf, n_ctx=512, type_k="f16", device="cpu") as model:
        logits = np.concatenate(list(model.logits_chunks(IDS, len(IDS))))
    return float(kl_divergence(reference, logits)[0].mean())


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file({name: t.contiguous().clone() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})


# Two spellings of one thing


LINEAR, YARN = {"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LINEAR},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}},
        {"rope_scaling": LINEAR, "rope_theta": 3e4},
        {"rope_theta": 3e4},
        {"rope_scaling": {"factor": 8.0}},
        {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", **YARN}},
        {"rope_scaling": YARN, "original_max_position_embeddings": 16},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_of_two_spellings_of_a_scaling_that_of_transformers_is_written(llama_copy, capfd, changes):
    plain = theirs(llama_copy)
    edit(llama_copy, **changes)
    reference = theirs(llama_copy)
    assert distance(convert(llama_copy), reference) < 1e-6
    assert "note: " in capfd.readouterr().err
    scaled = changes.get("rope_scaling", {}).get("type", changes.get("rope_scaling", {}).get("rope_type"))
    assert (np.abs(reference - plain).max() > 1e-3) == (scaled in ("linear", "yarn"))


def test_a_base_that_transformers_would_drop_is_refused_naming_both(llama_copy):
    edit(llama_copy, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_scaling=LINEAR)
    with pytest.raises(CheckpointError, match=r"rope_scaling stands beside rope_parameters.* 500000"):
        load_checkpoint(str(llama_copy))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"rope_scaling": {"type": None}}, {}),
        ({"rope_scaling": {"rope_type": None, **LINEAR}}, {"rope_scaling": LINEAR}),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, {"rope_scaling": LINEAR}),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": None}}, {"rope_scaling": YARN}),
        ({"rope_theta": "20000", "rms_norm_eps": "1e-6"}, {"rope_theta": 2e4}),
        ({"num_attention_heads": "4", "max_position_embeddings": 64.0}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_types_that_transformers_stumbles_over_are_read_with_a_note(llama_copy, capfd, changes, same):
    path = llama_copy / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps({**fields, **same}))
    reference = theirs(llama_copy)
    path.write_text(json.dumps({**fields, **changes}))
    assert distance(convert(llama_copy), reference) < 1e-6
    assert "note: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"rope_scaling": {"type": None, "factor": 4.0}}, CheckpointError, "nobody can tell"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 8]}}, UnsupportedError, "got 'mrope'"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": LINEAR}, CheckpointError, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": LINEAR}}, CheckpointError, "scales the positions of all layers alike"),
        ({"num_key_value_heads": 3}, CheckpointError, "must be a multiple of num_key_value_heads 3"),
        ({"partial_rotary_factor": 2.0}, CheckpointError, "must be a share of the head's 32"),
        ({"head_dim": 15}, CheckpointError, "must be even, got 15|transformers does not open it"),
        ({"max_position_embeddings": 1}, CheckpointError, "must be at least 2 tokens, got 1"),
        ({"num_hidden_layers": 5000}, CheckpointError, "must be at most 1000, got 5000"),
    ],
)
def test_what_has_no_one_meaning_is_refused(llama_copy, changes, error, said):
    edit(llama_copy, **changes)
    with pytest.raises(error, match=said) as refusal:
        load_checkpoint(str(llama_copy))
    assert refusal.value.hint


# What was read is held against what transformers builds


def _broken(monkeypatch, *where: tuple[Any, str], by: Callable[[Any], Any]) -> None:
    for module, name in where:
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, whole=whole, **named: by(whole(*given, **named)))


def _broken_rope(monkeypatch, **changes: Callable[[RopeScaling], Any]) -> None:
    read = configs._rope_of
    monkeypatch.setattr(
        configs,
        "_rope_of",
        lambda *given: dataclasses.replace(rope := read(*given), **{k: v(rope) for k, v in changes.items()}),
    )


EPSILON = "attention.layer_norm_rms_epsilon"
WRONG_READINGS: dict[str, Callable[[Any], None]] = {
    "head size": lambda m: _broken(
        m, (family, "head_dim"), (checkpoint, "head_dim"), (configs, "head_dim"), by=lambda size: size * 2
    ),
    "key-value heads": lambda m: _broken(
        m, (family, "kv_heads"), (checkpoint, "kv_heads"), (configs, "kv_heads"), by=lambda heads: heads * 2
    ),
    "rotated dimensions": lambda m: _broken(
        m, (family, "rotary_dim"), (checkpoint, "rotary_dim"), by=lambda rotated: rotated // 2
    ),
    "base": lambda m: _broken_rope(m, rope_theta=lambda rope: rope.rope_theta * 2),
    "factor": lambda m: _broken_rope(m, factor=lambda rope: 1 / rope.factor),
    "type": lambda m: _broken_rope(m, rope_type=lambda rope: "default", factor=lambda rope: 1.0),
    "own scaling": lambda m: _broken_rope(m, own=lambda rope: None),
    "attention factor": lambda m: m.setattr(OwnScaling, "attention_factor", property(lambda own: 1.1)),
    "original window": lambda m: m.setattr(
        OwnScaling, "_kept_yarn", lambda own, *given, kept=OwnScaling._kept_yarn: kept(
            OwnScaling(own.rope_type, {**own.fields, "original_max_position_embeddings": 4096}), *given
        ),
    ),
    "layers": lambda m: _broken(m, (family, "common_keys"), by=lambda keys: {**keys, "block_count": 3}),
    "width": lambda m: _broken(m, (family, "common_keys"), by=lambda keys: {**keys, "embedding_length": 32}),
    "inner width": lambda m: _broken(m, (family, "common_keys"), by=lambda keys: {**keys, "feed_forward_length": 64}),
    "heads": lambda m: _broken(m, (family, "common_keys"), by=lambda keys: {**keys, "attention.head_count": 8}),
    "vocabulary": lambda m: _broken(m, (family, "common_keys"), by=lambda keys: {**keys, "vocab_size": 400}),
    "epsilon": lambda m: m.setitem(
        FAMILIES, "llama",
        dataclasses.replace(FAMILIES["llama"], keys=lambda config: {**family.rms_keys(config), EPSILON: 1e-5}),
    ),
    "tie": lambda m: m.setattr(checkpoint.Checkpoint, "tied", True),
}  # fmt: skip
SCALED = {"own scaling", "attention factor", "original window"}


@pytest.mark.parametrize("what", WRONG_READINGS)
def test_a_config_read_wrongly_is_found_before_anything_is_written(what, llama_copy, monkeypatch):
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    if what in SCALED:
        rope = {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    edit(llama_copy, rope_parameters=rope)
    WRONG_READINGS[what](monkeypatch)
    out = llama_copy.with_name("out.gguf")
    with pytest.raises(CheckpointError, match=r"was read as .*, transformers reads"):
        pi_gguf.convert(str(llama_copy), out, quant="F32", check="quick")
    assert not list(out.parent.glob("out*"))


# Precedence and leftovers


def test_one_file_comes_before_an_index_and_shards(tmp_path):
    folder = make_llama(tmp_path / "model", max_shard_size="60KB")
    left = {path.name: path.read_bytes() for path in folder.glob("model*")}
    rewritten = make_llama(tmp_path / "other", rms_norm_eps=1e-5)
    rewrite(rewritten, lambda tensors: {name: tensor * 1.25 for name, tensor in tensors.items()})
    for name, data in left.items():
        (rewritten / name).write_bytes(data)
    (rewritten / "consolidated.safetensors").write_bytes(b"not read")
    assert distance(convert(rewritten), theirs(rewritten)) < 1e-6
    (rewritten / "model.safetensors").unlink()
    sorted(rewritten.glob("model-0*"))[0].unlink()
    with pytest.raises(CheckpointError, match="which is absent from the folder"):
        load_checkpoint(str(rewritten)).tensors  # noqa: B018


def test_an_adapter_beside_the_weights_is_left_aside(llama_copy, capfd):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_copy, dtype=torch.float32)
    reference = theirs(model)
    settings = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(llama_copy)
    assert distance(convert(llama_copy), reference) < 1e-6
    assert "adapter_config.json) is left aside" in capfd.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}, "quantization": {"bits": 4}},
        {"quantization": {"group_size": 32, "bits": 8}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_quantization_that_is_no_more_is_ignored_with_a_note(llama_copy, capfd, fields):
    reference = theirs(llama_copy)
    edit(llama_copy, **fields)
    assert distance(convert(llama_copy), reference) < 1e-6
    assert "says the weights are quantized, but they are not" in capfd.readouterr().err
    extended = pi_gguf.extend(str(llama_copy), llama_copy.with_name("longer"), context=128, steps=0)
    assert not set(fields) & set(json.loads((extended / "config.json").read_text()))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"q_proj.qweight": torch.int32, "q_proj.qzeros": torch.int32}, "GPTQ or AWQ"),
        ({"q_proj.weight": torch.uint8, "q_proj.weight.absmax": torch.float32}, "4-bit weights of bitsandbytes"),
        ({"q_proj.weight": torch.int8, "q_proj.SCB": torch.float32}, "8-bit weights of bitsandbytes"),
        ({"q_proj.weight": torch.uint32, "q_proj.scales": torch.float16, "q_proj.biases": torch.float16}, "MLX"),
        ({"q_proj.weight_packed": torch.int32}, "compressed-tensors"),
        ({"q_proj.weight": torch.int8}, "got I8"),
    ],
)
def test_weights_that_are_quantized_are_named_for_what_they_are(llama_copy, tensors, said):
    layer = "model.layers.0.self_attn."
    packed = {layer + name: torch.zeros(8, 8).to(dtype) for name, dtype in tensors.items()}
    rewrite(llama_copy, lambda all_: {**{k: v for k, v in all_.items() if layer + "q_proj" not in k}, **packed})
    with pytest.raises(UnsupportedError, match=said) as refusal:
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018
    assert refusal.value.hint


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(llama_copy, capfd):
    edit(llama_copy, tie_word_embeddings=True)
    reference = theirs(llama_copy)
    out = convert(llama_copy)
    assert distance(out, reference) < 1e-6
    assert "lm_head.weight and model.embed_tokens.weight differ" in capfd.readouterr().err
    assert "output.weight" in {tensor.name for tensor in read_gguf(out).tensors}
    longer = pi_gguf.extend(str(llama_copy), llama_copy.with_name("longer"), context=128, steps=0)
    assert np.abs(theirs(longer) - reference).max() > 1e-3  # the positions are scaled
    assert distance(convert(longer), theirs(longer)) < 1e-6


def test_a_head_that_is_the_embedding_is_written_once(llama_copy):
    edit(llama_copy, tie_word_embeddings=True)
    rewrite(llama_copy, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    out = convert(llama_copy)
    assert distance(out, theirs(llama_copy)) < 1e-6
    assert "output.weight" not in {tensor.name for tensor in read_gguf(out).tensors}


def test_an_embedding_that_is_there_as_the_head_only_is_found(llama_copy):
    edit(llama_copy, tie_word_embeddings=True)
    rewrite(llama_copy, lambda tensors: {k: v for k, v in tensors.items() if "embed_tokens" not in k})
    assert distance(convert(llama_copy), theirs(llama_copy)) < 1e-6


def test_an_absent_head_is_refused_with_the_field_that_mends_it(llama_copy, cli):
    rewrite(llama_copy, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    code, _, err = cli("convert", llama_copy, llama_copy.with_name("out.gguf"))
    assert code == 3
    assert "lm_head.weight is missing" in err and "set tie_word_embeddings to true" in err


def test_the_value_head_of_a_trainer_is_left_out(llama_copy, capfd):
    reference = theirs(llama_copy)
    head = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    rewrite(llama_copy, lambda all_: {**{f"pretrained_model.{k}": v for k, v in all_.items()}, **head})
    assert distance(convert(llama_copy), reference) < 1e-6
    assert "v_head, which rated texts in training, is left out" in capfd.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_writes_no_text_is_refused_as_one(llama_copy, tied):
    from transformers import AutoModelForSequenceClassification

    edit(llama_copy, tie_word_embeddings=tied, pad_token_id=1)
    AutoModelForSequenceClassification.from_pretrained(llama_copy).save_pretrained(llama_copy)
    with pytest.raises(UnsupportedError, match=r"score\.weight is the head of a classifier") as refusal:
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018
    assert "language model" in str(refusal.value.hint)


def test_shards_may_lie_in_a_folder_inside_but_not_outside(tmp_path):
    folder = make_llama(tmp_path / "model", max_shard_size="60KB")
    reference, index = theirs(folder), folder / "model.safetensors.index.json"
    (folder / "weights").mkdir()
    for path in folder.glob("model-0*"):
        path.rename(folder / "weights" / path.name)
    listed: dict[str, dict[str, str]] = json.loads(index.read_text())
    (folder / "adapter_config.json").write_text("{}")  # a folder of links is opened in the place of this one

    def point_to(place: str) -> None:
        shards = {name: place + shard for name, shard in listed["weight_map"].items()}
        index.write_text(json.dumps({**listed, "weight_map": shards}))

    point_to("weights/")
    assert distance(convert(folder), reference) < 1e-6
    for outside in ("../model/weights/", f"{folder}/weights/"):
        point_to(outside)
        with pytest.raises(CheckpointError, match="which is absent from the folder"):
            load_checkpoint(str(folder)).tensors  # noqa: B018


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model-00001-of-00002.safetensors", r"model\.safetensors\.index\.json .*download it too"),
        ("consolidated.safetensors", "Mistral's own format"),
        ("model.fp16.safetensors", r"call it model\.safetensors"),
        ("pytorch_model.bin", "safe_serialization"),
        ("model.Q4_K_M.gguf", "quantize"),
        ("checkpoint-500/model.safetensors", r"weights in .*checkpoint-500: give that folder"),
        ("notes.txt", r"put model\.safetensors there"),
    ],
)
def test_without_weights_the_hint_says_what_is_there(llama_copy, name, hint):
    (llama_copy / name).parent.mkdir(exist_ok=True)
    (llama_copy / "model.safetensors").rename(llama_copy / name)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors") as refusal:
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018
    assert re.search(hint, str(refusal.value.hint))


def test_the_folder_of_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is missing") as refusal:
        load_checkpoint(str(tmp_path))
    assert "--lora" in str(refusal.value.hint)


def test_an_embedding_that_was_resized_alone_names_the_field(llama_copy):
    edit(llama_copy, vocab_size=400)
    with pytest.raises(CheckpointError, match=r"shape \[400, 64\] by config\.json, got \[410, 64\]") as refusal:
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018
    assert "set vocab_size to 410" in str(refusal.value.hint)
    edit(llama_copy, vocab_size=410, hidden_size=32)
    with pytest.raises(CheckpointError, match="must have shape") as refusal:
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018
    assert "different models" in str(refusal.value.hint)


# Forms of the same weights


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "model.", "language_model."])
def test_one_prefix_more_is_seen_through(llama_copy, prefix):
    reference = theirs(llama_copy)
    rewrite(llama_copy, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert distance(convert(llama_copy), reference) < 1e-6


def test_two_models_in_one_folder_are_refused_naming_both(llama_copy):
    rewrite(llama_copy, lambda all_: {f"{part}.{k}": v for part in ("student", "teacher") for k, v in all_.items()})
    with pytest.raises(CheckpointError, match=r"student\.model\.embed_tokens.* or teacher\.model\.embed_tokens"):
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018


def test_mixed_dtypes_and_64_bits_are_read(llama_copy):
    reference = theirs(llama_copy)
    kinds = [torch.float64, torch.float32]
    rewrite(llama_copy, lambda all_: {k: v.to(kinds[i % 2]) for i, (k, v) in enumerate(all_.items())})
    assert distance(convert(llama_copy), reference) < 1e-6
    extended = pi_gguf.extend(str(llama_copy), llama_copy.with_name("longer"), context=128, steps=0)
    assert {t.dtype for t in load_file(extended / "model.safetensors").values()} == {torch.float32}


def _in_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a matrix to 8-bit floats; return these, a scale for each block, and what they stand for."""
    bits, exact = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    grid = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            grid[i, j] = weight[place].abs().max() / 448
            bits[place] = (weight[place] / grid[i, j]).to(torch.float8_e4m3fn)
            exact[place] = bits[place].float() * grid[i, j]
    return bits, grid, exact


@pytest.mark.parametrize(
    ("block", "suffix", "settings"),
    [
        ((32, 32), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ((40, 24), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [40, 24]}),
        ((128, 128), "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ((1, 128), "_scale", {"quant_method": "fbgemm_fp8"}),
        ((16, 32), "_scale_inv", None),
    ],
)
def test_8_bit_floats_are_multiplied_by_their_scales(llama_copy, block, suffix, settings):
    if settings:
        edit(llama_copy, quantization_config=settings)
    exact: Tensors = {}

    def quantized(tensors: Tensors) -> Tensors:
        written = {}
        for name, tensor in tensors.items():
            if "proj" in name:
                written[name], written[name + suffix], exact[name] = _in_blocks(tensor, *block)
            else:
                written[name] = exact[name] = tensor
        return written

    rewrite(llama_copy, quantized)
    sources = load_checkpoint(str(llama_copy)).tensors
    with open_files() as files:
        for name, tensor in exact.items():
            assert sources[name].read(files).equal(tensor), name
    clean = llama_copy.with_name("clean")
    shutil.copytree(llama_copy, clean)
    edit(clean, quantization_config=None)
    rewrite(clean, lambda _: exact)
    assert distance(convert(llama_copy), theirs(clean)) < 1e-6


EXPERTS = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "num_experts": 5},
    "qwen3_moe": {"moe_intermediate_size": 40, "num_experts": 3, "norm_topk_prob": True, "head_dim": 32},
    "olmoe": {"num_experts": 3, "num_key_value_heads": 4},
}  # fmt: skip
SMALL = {
    "vocab_size": 410, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "initializer_range": 0.2,
}  # fmt: skip


def _random(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_fused_in_memory_are_those_of_a_tensor_each(kind, tmp_path, capfd):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind, **{**SMALL, "num_experts_per_tok": 2, "tie_word_embeddings": False, **EXPERTS[kind]}
    )
    model = _random(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    make_tokenizer(tmp_path / "fused")
    each, fused = (load_checkpoint(str(tmp_path / name)).tensors for name in ("each", "fused"))
    assert list(each) == list(fused) and len(load_file(tmp_path / "fused" / "model.safetensors")) < len(each)
    with open_files() as files:
        assert all(fused[name].read(files).equal(source.read(files)) for name, source in each.items())
    assert "experts are fused" in capfd.readouterr().err
    assert distance(convert(tmp_path / "fused"), theirs(tmp_path / "fused")) < 1e-4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.mlp.switch_mlp.gate_proj.weight", "experts stacked as MLX keeps them"),
        ("model.layers.0.mlp.experts.gate_proj.weight", "experts stacked in one matrix of each kind"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "Granite and ScatterMoE"),
        ("model.layers.0.self_attn.qkv_proj.weight", "projections fused as vLLM keeps them"),
    ],
)
def test_tensors_of_other_tools_are_named_for_what_they_are(llama_copy, name, said):
    rewrite(llama_copy, lambda tensors: {**tensors, name: torch.zeros(2, 8, 8)})
    with pytest.raises(UnsupportedError, match=said):
        load_checkpoint(str(llama_copy)).tensors  # noqa: B018


# Text parts of vision-language models

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
SIGLIP = {key: CLIP[key] for key in CLIP if key not in ("model_type", "projection_dim")}
TEXT = {key: value for key, value in SMALL.items() if not key.endswith("_id")}
WHOLES = {
    "gemma3": {
        "text_config": {
            **TEXT, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
        },
        "vision_config": SIGLIP, "mm_tokens_per_image": 4,
    },
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP},
    "llava_next": {"text_config": {**TEXT, "model_type": "mistral", "sliding_window": None}, "vision_config": CLIP},
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 32},
        "vision_config": {**SIGLIP, "model_type": "pixtral"},
    },
    "idefics3": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": SIGLIP},
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLES)
def test_the_text_model_of_a_vision_language_model_is_converted(kind, tmp_path, capfd):
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(2)
    token = {"image_token_id" if kind == "idefics3" else "image_token_index": 409}
    config = AutoConfig.for_model(kind, **WHOLES[kind], **token, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    whole = _random(AutoModelForImageTextToText.from_config(config))
    folder = tmp_path / "model"
    whole.save_pretrained(folder)
    make_tokenizer(folder)
    assert distance(convert(folder), theirs(whole)) < 1e-4
    said = capfd.readouterr().err
    assert "is a vision-language model" in said and "others are left out" in said
    longer = pi_gguf.extend(str(folder), tmp_path / "longer", context=128, steps=0)
    assert json.loads((longer / "config.json").read_text())["model_type"] == config.text_config.model_type
    assert distance(convert(longer), theirs(longer)) < 1e-4
    assert read_gguf(tmp_path / "longer.gguf").rope.factor == 2


def test_a_vision_language_model_of_another_text_model_is_refused(llama_copy):
    edit(llama_copy, model_type="qwen2_vl", text_config={**TEXT, "model_type": "qwen2_vl_text"})
    with pytest.raises(UnsupportedError, match="text model of 'qwen2_vl_text'"):
        load_checkpoint(str(llama_copy))


# Files that are none, and names


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing"])
def test_what_is_no_file_is_refused_at_once(llama_copy, cli, name, kind):
    path = llama_copy / name
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "nothing": lambda path: path.symlink_to("nowhere")}[kind](path)
    code, _, err = cli("inspect", llama_copy)
    assert code == 3
    assert [line.partition(":")[0] for line in err.splitlines()[-2:]] == ["error", "hint"]


def test_a_folder_is_called_by_its_name_and_a_cached_one_by_its_hub_id(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--some-one--Small-Model" / "snapshots" / "0a1b2c"
    (tmp_path / "My-Model").mkdir()
    snapshot.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "My-Model")
    assert (model_name("."), public_source(".")) == ("My-Model", "My-Model")
    assert (model_name(str(snapshot)), public_source(str(snapshot))) == ("Small-Model", "some-one/Small-Model")
    assert (model_name("some-one/Small-Model"), public_source("some-one/Small-Model")) == (
        "Small-Model", "some-one/Small-Model",
    )  # fmt: skip
    assert (model_name("bundled:tiny"), public_source("bundled:tiny")) == ("tiny", "bundled:tiny")
    assert public_source("/home/me/secret/model-that-is-gone") == "model-that-is-gone"


def test_a_published_file_holds_no_place_of_this_machine(llama, tmp_path):
    base = tmp_path / "private" / "clients" / "model"
    shutil.copytree(llama, base)
    longer = pi_gguf.extend(str(base), tmp_path / "longer", context=128, steps=0)
    assert "private" not in (longer / "pi_gguf.json").read_text()
    base.rename(base.with_name("moved"))
    assert b"private" not in convert(longer).read_bytes()


def test_what_is_unusual_about_a_folder_is_said_where_its_check_fails(llama_copy, monkeypatch):
    from pi_gguf.errors import CheckError
    from pi_gguf.prove import check

    edit(llama_copy, quantization_config={"quant_method": "gptq"})
    monkeypatch.setattr(check, "MAX_KL_DIVERGENCE", {"F32": -1.0})
    with pytest.raises(CheckError) as failed:
        convert(llama_copy)
    assert "the folder itself may be the reason" in failed.value.hint and "quantized" in failed.value.hint
