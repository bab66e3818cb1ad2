"""Adapters as peft and others save them: each is merged as peft merges it; spellings, vocabularies, damaged folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_llama
from random_adapters import (
    VOCABULARY,
    Case,
    _open,
    difference,
    make_models,
    merged_by_peft,
    merged_here,
    random_case,
    save_adapter,
    try_case,
)
from safetensors.torch import load_file, save_file

import pi_gguf
from pi_gguf.adapters.adapted import with_adapters
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.checkpoint.tensors import open_files
from pi_gguf.errors import CheckpointError, PiGgufError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import read_header
from pi_gguf.measure.kl import kl_divergence

pytestmark = pytest.mark.filterwarnings("ignore")  # peft has much to say of embeddings

PLAIN: dict[str, Any] = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def adapter_of(base: Path, folder: Path, grown: int = 0, **settings: Any) -> Path:
    save = {"save_embedding_layers": True} if grown else {}
    save_adapter(_open(base, grown), {**PLAIN, **settings}, folder, 1, **save)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def renamed(folder: Path, change: Any, extra: dict[str, torch.Tensor] | None = None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, **(extra or {})}, path, {"format": "pt"})


# The property


@pytest.mark.slow
def test_random_adapters_are_merged_as_peft_merges_them(models, tmp_path):
    outcomes = {seed: try_case(random_case(seed), models, tmp_path, seed) for seed in range(5000, 5054)}
    differ = {
        seed: said for seed, said in outcomes.items() if said.split(":")[0] not in ("merged", "refused", "not made")
    }
    assert not differ
    assert list(outcomes.values()).count("merged") >= 40


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "block-diagonal": (
        "llama",
        {"target_modules": ["q_proj", "o_proj", "v_proj"], "use_bdlora": {
            "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2, "match_strict": False}},
    ),
    "without the smallest components": ("llama", {"kasa_config": {}}),
    "orthogonal start": ("llama", {"init_lora_weights": "olora"}),
    "both ends taken": ("llama", {"kasa_config": {}, "init_lora_weights": "pissa"}),
    "smallest components": ("llama", {"init_lora_weights": "mica"}),
    "principal components, weight-decomposed": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "trained with compressed activations": ("llama", {"velora_config": {"num_groups": 4}}),
    "trained with sampled weights": ("llama", {"monteclora_config": {}}),
    "a weight named as a parameter": ("llama", {"target_parameters": ["embed_tokens.weight", "k_proj.weight"]}),
    "biases of B": ("llama", {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}),
    "ranks and alphas by pattern": (
        "llama",
        {"target_modules": ["q_proj", "up_proj", "down_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3},
         "alpha_pattern": {"p_proj": 7, r"layers\.1\.mlp\..*": 5}},
    ),
    "a whole block": ("llama", {"modules_to_save": ["layers.1.mlp"]}),
    "fused experts whole": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "router whole": ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}),
    "experts and router": (
        "qwen3_moe",
        {"target_parameters": ["experts.down_proj", "experts.gate_up_proj", "gate.weight"], "use_rslora": True,
         "target_modules": ["q_proj"], "rank_pattern": {"experts.down_proj": 3}},
    ),
    "no module but parameters": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "tied, head replaced and embedding adapted": (
        "tied", {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "tied, both adapted": ("tied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tied, both adapted and kept alike": (
        "tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tied, other rows of each": (
        "tied", {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2, 5]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged_as_peft_merges_it(models, tmp_path, kind):
    model, settings = KINDS[kind]
    assert try_case(Case(model, [{**PLAIN, **settings}]), models, tmp_path, 0) == "merged"


def test_the_property_sees_a_difference(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    theirs = merged_by_peft(models["llama"], [folder], 0, tmp_path / "merged")
    assert difference(merged_here(models["llama"], [folder]), theirs) == ""
    edit(folder, lora_alpha=3.001)
    assert "apart" in difference(merged_here(models["llama"], [folder]), theirs)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_in_64_bits_is_merged_as_peft_merges_it(models, tmp_path, name):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    wide = {stored: tensor.double() for stored, tensor in load_file(path).items()}
    path.unlink()
    (save_file if name.endswith(".safetensors") else torch.save)(wide, folder / name)
    theirs = merged_by_peft(models["llama"], [folder], 0, tmp_path / "merged")
    assert difference(merged_here(models["llama"], [folder]), theirs) == ""


# Spellings


def test_copies_of_embeddings_that_peft_writes_three_times(models, tmp_path):
    base = models["llama"]
    folder = adapter_of(base, tmp_path / "adapter", 3, modules_to_save=["embed_tokens", "lm_head"])
    names = set(load_file(folder / "adapter_model.safetensors"))
    stem = "base_model.model.model.embed_tokens"
    assert {f"{stem}.weight", f"{stem}.modules_to_save.weight", f"{stem}.original_module.weight"} <= names
    theirs = merged_by_peft(base, [folder], 3, tmp_path / "merged")
    assert difference(merged_here(base, [folder]), theirs) == ""
    assert theirs["lm_head.weight"].shape == (VOCABULARY + 3, 16)


@pytest.mark.parametrize("model", ["llama", "tied"])
@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.weight"),
        lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
        lambda name: name.replace("base_model.model.", "module.base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
        lambda name: name.replace("model.model.layers", "model.layers"),
        lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
        lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
    ],
)
def test_spellings_of_other_releases_and_tools_mean_the_same(models, tmp_path, spell, model):
    base = models[model]
    folder = adapter_of(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    theirs = merged_by_peft(base, [folder], 0, tmp_path / "merged")
    before = set(load_file(folder / "adapter_model.safetensors"))
    renamed(folder, spell)
    assert set(load_file(folder / "adapter_model.safetensors")) != before
    assert difference(merged_here(base, [folder]), theirs) == ""


def test_fields_that_other_tools_write_are_no_obstacle(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    theirs = merged_by_peft(models["llama"], [folder], 0, tmp_path / "merged")
    edit(
        folder, base_model_name_or_path="unsloth/llama-bnb-4bit", peft_version="9.9.9", a_future_field=None, another=[],
        auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, loftq_config={}, task_type=None,
        runtime_config={"ephemeral_gpu_offload": False}, exclude_modules=["x"], megatron_core="megatron.core",
    )  # fmt: skip
    assert difference(merged_here(models["llama"], [folder]), theirs) == ""


def test_an_extracted_adapter_of_full_rank_with_mixed_types(models, tmp_path):
    base, folder = models["llama"], tmp_path / "adapter"
    before = load_file(base / "model.safetensors")
    after = {name: tensor + torch.randn_like(tensor) for name, tensor in before.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name in ("lm_head", "model.layers.0.self_attn.q_proj"):
        u, s, v = torch.linalg.svd(after[f"{name}.weight"] - before[f"{name}.weight"], full_matrices=False)
        tensors |= {f"base_model.model.{name}.lora_A.weight": v, f"base_model.model.{name}.lora_B.weight": u * s}
    tensors["base_model.model.model.norm.weight"] = after["model.norm.weight"].bfloat16()
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16, "modules_to_save": ["norm"],
                    "target_modules": ["lm_head", "q_proj"], "layers_to_transform": [0]})
    )  # fmt: skip
    ours = merged_here(base, [folder])
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        torch.testing.assert_close(ours[name], after[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours["model.norm.weight"], after["model.norm.weight"].bfloat16().float())
    assert torch.equal(ours["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_adapters_of_single_experts_that_older_releases_saved(models, tmp_path):
    """peft itself fuses them for the model of transformers 5."""
    base, folder = models["mixtral"], tmp_path / "adapter"
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(2)
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".block_sparse_moe." in name or "q_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, tensor.shape[1])
            tensors[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], 2)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "bias": "none"}
    config["target_modules"] = ["w1", "w2", "w3", "gate", "q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    theirs = merged_by_peft(base, [folder], 0, tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    assert all(not torch.equal(theirs[name], before[name]) for name in before if ".block_sparse_moe." in name)
    assert difference(merged_here(base, [folder]), theirs) == ""


def test_vision_tensors_are_left_out_and_counted(models, tmp_path, capfd):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    theirs = merged_by_peft(models["llama"], [folder], 0, tmp_path / "merged")
    eye = "base_model.model.model.vision_tower.encoder.layers.0.q_proj.lora"
    extra = {f"{eye}_A.weight": torch.ones(2, 4), f"{eye}_B.weight": torch.ones(4, 2)}
    renamed(folder, lambda name: name.replace("model.model.layers", "model.model.language_model.layers"), extra)
    assert difference(merged_here(models["llama"], [folder]), theirs) == ""
    assert "note: " in (said := capfd.readouterr().err) and "1 tensors are of the vision part" in said


def test_pickled_adapters_are_read_without_running_them(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    theirs = merged_by_peft(models["llama"], [folder], 0, tmp_path / "merged")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    for old in (False, True):
        torch.save(tensors, folder / "adapter_model.bin", _use_new_zipfile_serialization=not old)
        assert difference(merged_here(models["llama"], [folder]), theirs) == ""

    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Runs()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="not tensors alone") as caught:
        merged_here(models["llama"], [folder])
    assert caught.value.hint and not (tmp_path / "ran").exists()


def test_principal_components_found_at_random_are_found_again(models, tmp_path, capfd):
    base, weights = tmp_path / "base", load_file(models["llama"] / "model.safetensors")
    shutil.copytree(models["llama"], base)
    for name in weights:  # two components far above the rest: random search finds exactly these
        if name.endswith("q_proj.weight"):
            u, s, v = torch.linalg.svd(weights[name], full_matrices=False)
            weights[name] = (u * torch.tensor([50.0, 40.0, *s[2:].mul(0.01)])) @ v
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    folder = adapter_of(base, tmp_path / "adapter", init_lora_weights="pissa_niter_16", target_modules=["q_proj"])
    theirs = merged_by_peft(base, [folder], 0, tmp_path / "merged")
    assert difference(merged_here(base, [folder]), theirs) == ""
    assert "random numbers, which nobody kept" in capfd.readouterr().err


# Vocabularies


ROWS = 410


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("with tokens")
    return {
        "untied": make_llama(root / "untied", vocab_size=ROWS),
        "tied": make_llama(root / "tied", vocab_size=ROWS, tie_word_embeddings=True),
    }


def adapter_with_tokens(base: Path, folder: Path, rows: int, added: list[str], **settings: Any) -> tuple[Path, Any]:
    """Save an adapter that was trained with more tokens, and its tokenizer; return it and the model it makes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(added, special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(**{**PLAIN, **settings}, task_type="CAUSAL_LM"))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tuned.merge_and_unload().eval()


def far_from(model: Any, path: Path) -> float:
    """Return the KL divergence of llama.cpp's logits from a model of transformers."""
    ids = [5 + (37 * i) % 300 for i in range(40)]
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0].float().numpy()
    with pi_gguf.open(path, n_ctx=64, type_k="f16", device="cpu") as opened:
        ours = np.concatenate(list(opened.logits_chunks(ids, len(ids))))
    return float(kl_divergence(theirs, ours)[0].mean())


GROWN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "embedding and head saved": ("untied", ROWS + 3, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "layers of attention alone": ("untied", ROWS + 3, {}),
    "head and embedding adapted": ("untied", ROWS + 3, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "rows of tokens": ("untied", ROWS + 3, {"trainable_token_indices": [400, ROWS + 1]}),
    "tied, saved once": ("tied", ROWS + 3, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, weight-decomposed": ("tied", ROWS + 3, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "fewer rows": ("untied", ROWS - 4, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("case", GROWN)
def test_a_resized_vocabulary_comes_with_the_adapter_and_its_tokenizer(with_tokens, tmp_path, capfd, case):
    base, rows, settings = GROWN[case]
    added = ["<|im_start|>", "<|im_end|>"]
    folder, model = adapter_with_tokens(with_tokens[base], tmp_path / "adapter", rows, added, **settings)
    out = tmp_path / "out.gguf"
    result = pi_gguf.convert(str(with_tokens[base]), out, quant="F32", lora=[str(folder)], certify=False)
    assert result.checks[0].kl_divergence < 1e-4
    said = capfd.readouterr().err
    assert f"the vocabulary has {rows} rows, MODEL's {ROWS}" in said and "own tokenizer is taken" in said
    assert read_header(out).entries["tokenizer.ggml.tokens"].value[400:402] == added
    assert far_from(model, out) < 1e-5


def test_tokens_that_fit_the_rows_there_are_come_along(with_tokens, tmp_path, capfd):
    folder, model = adapter_with_tokens(with_tokens["tied"], tmp_path / "adapter", ROWS, ["<|im_start|>"])
    out = tmp_path / "out.gguf"
    pi_gguf.convert(str(with_tokens["tied"]), out, quant="F32", lora=[str(folder)], certify=False)
    assert read_header(out).entries["tokenizer.ggml.tokens"].value[400] == "<|im_start|>"
    assert "own tokenizer is taken, with 401 tokens" in capfd.readouterr().err
    assert far_from(model, out) < 1e-5


def test_the_chat_template_that_was_trained_with_comes_along(with_tokens, tmp_path):
    folder, _ = adapter_with_tokens(with_tokens["tied"], tmp_path / "adapter", ROWS, [])
    out, options = tmp_path / "out.gguf", {"quant": "F32", "check": "none", "lora": [str(folder)], "overwrite": True}
    pi_gguf.convert(str(with_tokens["tied"]), out, **options)
    assert "tokenizer.chat_template" not in read_gguf(out).metadata
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    pi_gguf.convert(str(with_tokens["tied"]), out, **options)
    assert read_gguf(out).metadata["tokenizer.chat_template"] == template


def test_tokens_without_rows_are_not_the_models(with_tokens, tmp_path, capfd):
    added = [f"<|{i}|>" for i in range(20)]
    folder, _ = adapter_with_tokens(with_tokens["untied"], tmp_path / "adapter", ROWS, added)
    pi_gguf.convert(str(with_tokens["untied"]), tmp_path / "out.gguf", quant="F32", lora=[str(folder)], check="none")
    assert "its tokenizer has 420 tokens, the model 410 rows: MODEL's tokenizer is taken" in capfd.readouterr().err


def test_a_tokenizer_that_does_not_open_is_refused_with_the_way_out(with_tokens, tmp_path):
    folder, _ = adapter_with_tokens(with_tokens["untied"], tmp_path / "adapter", ROWS, ["<|im_start|>"])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer does not open") as caught:
        with_adapters(load_checkpoint(str(with_tokens["untied"])), [str(folder)])
    assert "delete the tokenizer files" in str(caught.value.hint)


def test_new_rows_of_a_tied_embedding_are_enough(models, tmp_path):
    """Trained rows alone: what peft saves where it does not find the base's config."""
    base, rows = models["tied"], [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    folder = adapter_of(base, tmp_path / "adapter", 3, trainable_token_indices=rows)
    renamed(folder, lambda name: name)
    kept = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in kept.items() if "lm_head" not in name and "base_layer" not in name},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    theirs = merged_by_peft(base, [folder], 3, tmp_path / "merged")
    ours = merged_here(base, [folder])
    assert difference(ours, theirs) == "" and ours["model.embed_tokens.weight"].shape == (VOCABULARY + 3, 16)
    edit(folder, trainable_token_indices=[VOCABULARY, VOCABULARY + 1, VOCABULARY + 5])
    with pytest.raises(CheckpointError, match=f"is of token {VOCABULARY + 5}"):
        merged_here(base, [folder])


def test_a_head_that_peft_did_not_save_is_named(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter", 3, target_modules=["embed_tokens"])
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight has 43 rows, lm_head\.weight has 40 rows"
    ) as caught:
        merged_here(models["llama"], [folder])
    assert "save_embedding_layers=True" in str(caught.value.hint)


def test_a_later_adapter_that_replaces_what_an_earlier_one_changed_is_noted(models, tmp_path, capfd):
    base = models["llama"]
    one = adapter_of(base, tmp_path / "one", target_modules=["lm_head"])
    two = adapter_of(base, tmp_path / "two", modules_to_save=["lm_head"])
    for folders in ([one, two], [two, one]):
        theirs = merged_by_peft(base, folders, 0, tmp_path / folders[0].name)
        assert difference(merged_here(base, folders), theirs) == ""
        assert "replaces lm_head.weight, which" in capfd.readouterr().err


def test_tied_embeddings_changed_by_one_side_are_noted(models, tmp_path, capfd):
    folder = adapter_of(models["tied"], tmp_path / "adapter", target_modules=["embed_tokens"])
    merged_here(models["tied"], [folder])
    assert "one tensor in MODEL; it changes by what is one of the two in training" in capfd.readouterr().err
    folder = adapter_of(models["tied"], tmp_path / "second", modules_to_save=["embed_tokens"])
    merged_here(models["tied"], [folder])
    assert "are one tensor in MODEL, and two with this adapter" in capfd.readouterr().err


def test_two_saved_bases_that_differ_untie_the_model(models, tmp_path):
    folder = adapter_of(models["tied"], tmp_path / "adapter")
    embedding, head = torch.randn(VOCABULARY, 16), torch.randn(VOCABULARY, 16)
    stem = "base_model.model."
    extra = {f"{stem}model.embed_tokens.weight": embedding, f"{stem}lm_head.weight": embedding.clone()}
    renamed(folder, lambda name: name, extra)
    assert "lm_head.weight" not in merged_here(models["tied"], [folder])
    renamed(folder, lambda name: name, {f"{stem}lm_head.weight": head})
    ours = merged_here(models["tied"], [folder])
    assert torch.equal(ours["model.embed_tokens.weight"], embedding) and torch.equal(ours["lm_head.weight"], head)


# From the Hub


def test_an_adapter_is_found_by_its_id_on_the_hub(models, tmp_path, monkeypatch):
    """In the Hub's own cache, laid out as its client lays it out."""
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    theirs = merged_by_peft(models["llama"], [folder], 0, tmp_path / "merged")
    repository, commit = tmp_path / "hub" / "models--someone--an-adapter", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert difference(merged_here(models["llama"], [Path("someone/an-adapter")]), theirs) == ""
    checkpoint = with_adapters(load_checkpoint(str(models["llama"])), ["someone/an-adapter"])
    assert checkpoint.adapters[0].name == "someone/an-adapter"
    with pytest.raises(CheckpointError, match="someone/another: not a folder here") as caught:
        merged_here(models["llama"], [Path("someone/another")])
    assert caught.value.hint


def test_where_an_adapter_lies_is_said(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "run" / "named")
    for given in (tmp_path / "run", folder / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="is missing") as caught:
            merged_here(models["llama"], [given])
        assert caught.value.hint == f"try --lora {folder}"


@pytest.mark.parametrize(("name", "hint"), [("adapters.safetensors", "mlx_lm.fuse"), ("lora.gguf", "run --lora")])
def test_an_adapter_of_another_tool_is_named(models, tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is missing") as caught:
        merged_here(models["llama"], [tmp_path / name if name.endswith(".gguf") else tmp_path])
    assert hint in str(caught.value.hint)


# Damaged and hostile folders


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    float("nan"),
    "x",
    "",
    [],
    [1],
    ["q_proj"],
    {},
    {"q_proj": 1},
    {"a": []},
]


def test_no_value_of_any_field_is_a_crash(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    refused, checkpoint = 0, load_checkpoint(str(models["llama"]))
    for i, name in enumerate(config):
        for value in (VALUES * 2)[i % len(VALUES) :][:6]:
            (folder / "adapter_config.json").write_text(json.dumps({**config, name: value}))
            try:
                _ = with_adapters(checkpoint, [str(folder)]).tensors
            except PiGgufError as error:
                assert error.hint and "\n" not in str(error) and len(str(error)) < 700, (name, value)
                refused += 1
    assert refused > 50


def test_infinity_that_a_merge_makes_is_the_adapters_fault(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * 1e30 for n, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"merged into model\S+ it makes infinity or NaN") as caught:
        merged_here(models["llama"], [folder])
    assert "lora_alpha" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(models, tmp_path, name):
    folder = adapter_of(models["llama"], tmp_path / "adapter")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        merged_here(models["llama"], [folder])


def test_random_damage_to_the_weights_is_an_error_or_harmless(models, tmp_path):
    folder = adapter_of(models["llama"], tmp_path / "adapter", modules_to_save=["lm_head"])
    path = folder / "adapter_model.safetensors"
    data, draw = path.read_bytes(), np.random.default_rng(0)
    checkpoint = load_checkpoint(str(models["llama"]))
    for _ in range(300):
        damaged = bytearray(data[: int(draw.integers(0, len(data)))] if draw.random() < 0.3 else data)
        for at in draw.integers(0, max(1, min(len(damaged), 2000)), 3):
            if damaged:
                damaged[at] = int(draw.integers(0, 256))
        path.write_bytes(bytes(damaged))
        try:
            merged = with_adapters(checkpoint, [str(folder)])
            with open_files() as files:
                for source in merged.merged.values():
                    source.read(files)
        except PiGgufError as error:
            assert error.hint
