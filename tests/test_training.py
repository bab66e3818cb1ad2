"""The run: which weights are trained and how, its memory, and the same losses whatever interrupts or shares it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import WINDOW, make_llama
from safetensors.torch import load_file
from test_families import SHAPES, make_model

import pi_gguf
from pi_gguf.adapters import with_adapters
from pi_gguf.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, ResourceError
from pi_gguf.families import FAMILIES
from pi_gguf.lora import add_adapters, parts
from pi_gguf.losses import chunked_loss
from pi_gguf.planning import default_recipe, estimate_training_memory, plan_training

OPTIONS = {"context": 4 * WINDOW, "steps": 4, "batch_tokens": 256, "learning_rate": 0.01, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    novel = next(iter(pi_gguf.bundled.novels("train").values()))
    path.write_text(novel[:30_000])
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, dtype="bfloat16")


def training_plan(model, **options):
    checkpoint = load_checkpoint(str(model))
    defaults = {
        "steps": 100, "train_window": None, "learning_rate": None, "batch_tokens": None, "schedule": "constant",
        "factor_warmup": 0, "device": "cpu",
    }  # fmt: skip
    return plan_training(checkpoint, checkpoint.extended(4 * WINDOW), **{**defaults, **options})


# The loss


def a_batch(tokens):
    torch.manual_seed(0)
    ids = torch.randint(2, 400, (2, tokens))
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_the_loss_in_chunks_is_the_loss_of_every_family(family, tmp_path):
    model = load_checkpoint(str(make_model(tmp_path, family, {}))).load_model(dtype=torch.float32).eval()
    batch = a_batch(40)
    for more in ({}, {"num_items_in_batch": torch.tensor(111)}):
        own, expected = loss_and_gradients(model, **batch, **more)
        with chunked_loss(model):
            chunked, gradients = loss_and_gradients(model, **batch, **more)
            assert model(**batch).logits.shape[-1] == (410 if family == "gemma2" else model.config.hidden_size)
        torch.testing.assert_close(chunked, own, rtol=1e-5, atol=0)
        assert list(gradients) == list(expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item(), msg=name
            )
    assert model(**batch).logits.shape[-1] == 410, "the head is itself again"


def test_the_loss_in_chunks_is_right_in_16_bits(llama):
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    batch = a_batch(300)
    exact, expected = loss_and_gradients(model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        own, rounded = loss_and_gradients(model, **batch)
        with chunked_loss(model):
            chunked, gradients = loss_and_gradients(model, **batch)
    assert abs(chunked - exact) < 2e-3 and abs(own - exact) < 2e-3
    for name, gradient in gradients.items():
        errors = [(g[name] - expected[name]).norm() / expected[name].norm() for g in (rounded, gradients)]
        assert errors[1] < 0.05 and errors[1] < 2 * errors[0] + 0.01, name
        assert gradient.dtype == torch.float32


def largest_allocation(model, batch):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_and_gradients(model, **batch)
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def test_logits_of_all_tokens_never_exist(llama):
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    batch = a_batch(300)
    logits_bytes = 4 * 600 * 410
    assert largest_allocation(model, batch) >= logits_bytes
    with chunked_loss(model):
        assert largest_allocation(model, batch) < logits_bytes


# Which weights


def test_adapters_train_embeddings_and_norms_too_and_are_merged(llama, tmp_path, text):
    from transformers import AutoModelForCausalLM

    out = pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], train="lora", lora_rank=4, **OPTIONS)
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(before) == list(after) and len(before) == 21
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert unchanged == ["lm_head.weight"]
    for name, tensor in after.items():
        change = tensor - before[name]
        if "_proj" in name:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 4, name
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.rope_parameters["factor"] == 4.0
    record = json.loads((out / "pi_gguf.json").read_text())
    assert (record["train"], record["lora_rank"], record["lora_alpha"]) == ("lora", 4, 8)
    assert not (out / "adapter_config.json").exists()


@pytest.mark.parametrize("base", ["llama", "tied"])
def test_an_adapter_alone_merges_to_the_same_model(base, tmp_path, text, request):
    base = request.getfixturevalue(base)
    merged, alone = (
        pi_gguf.extend(str(base), tmp_path / name, data=[str(text)], train="lora", adapter_only=only, **OPTIONS)
        for name, only in (("merged", False), ("alone", True))
    )
    assert sorted(path.name for path in alone.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "pi_gguf.json",
    ]  # fmt: skip
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    checkpoint = with_adapters(load_checkpoint(str(base)), [str(alone)])
    assert checkpoint.rope == load_checkpoint(str(merged)).rope and checkpoint.rope.factor == 4
    files = {}
    for name, source in load_checkpoint(str(merged)).tensors.items():
        torch.testing.assert_close(
            checkpoint.tensors[name].read(files).to(source.read({}).dtype), source.read({}), rtol=0, atol=0
        )


def test_an_adapter_alone_needs_adapters_and_a_scaling_it_can_state(llama, tmp_path):
    for said, options in {
        "for train lora and qlora, got full": {},
        "method linear on a model without scaling, got method ntk": {"train": "lora", "method": "ntk"},
    }.items():
        with pytest.raises(OptionError, match=said):
            pi_gguf.extend(str(llama), tmp_path / "out", adapter_only=True, **OPTIONS, **options)


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_the_parts_of_a_model_of_every_family(family, tmp_path):
    checkpoint = load_checkpoint(str(make_model(tmp_path, family, {})))
    model = checkpoint.load_model(dtype=torch.float32)
    found = parts(model)
    adapted = add_adapters(checkpoint, model, rank=4, alpha=8)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == found.trained(4)
    weights = [module.weight for module in (model.get_output_embeddings(), model.get_input_embeddings())]
    assert (weights[0] is weights[1]) == checkpoint.tied
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = [name for name, p in adapted.named_parameters() if not p.requires_grad]
    left = [n for n in frozen if not any(part in n for part in ("base_layer", "original_module"))]
    heads = ("lm_head.weight", "embed_out.weight", "lm_head.bias")
    assert [name for name in left if not name.endswith(heads) and "expert" not in name and "gate" not in name] == []


def test_every_family_has_parts_here():
    assert set(SHAPES) == set(FAMILIES) and len(FAMILIES) == 26


def test_qlora_says_what_it_needs(llama, tmp_path, monkeypatch, cli):
    code, _, err = cli("extend", llama, tmp_path / "out", "--context", "256", "--train", "qlora", "--device", "cpu")
    assert code == 2 and "train qlora needs a CUDA GPU, got device cpu" in err and "hint: --train lora" in err
    monkeypatch.setattr("pi_gguf.lora.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="needs bitsandbytes, which is not installed"):
        training_plan(llama, train="qlora", device="cuda", train_window=64)


def test_values_that_cannot_work_are_refused(llama):
    for said, options in {
        "train must be auto or one of full, lora, qlora, got half": {"train": "half"},
        "lora-rank must be at least 1, got 0": {"train": "lora", "lora_rank": 0},
        "lora-alpha must be at least 1, got -2": {"train": "lora", "lora_alpha": -2},
    }.items():
        with pytest.raises(OptionError, match=said):
            training_plan(llama, **options)


def test_adapters_take_a_higher_rate(llama):
    assert training_plan(llama, train="lora").learning_rate == 2e-3 == 2 * training_plan(llama).learning_rate
    assert default_recipe(7_000_000_000, "lora").learning_rate == pytest.approx(2e-4)


def test_auto_takes_the_first_way_that_fits(llama, monkeypatch, cli):
    needs = {}
    for way in ("full", "lora"):
        plan = training_plan(llama, train=way, batch_tokens=256)
        needs[way] = estimate_training_memory(load_checkpoint(str(llama)), plan, "cpu", recompute=True)
    assert needs["full"] > needs["lora"]
    for free, way in ((needs["full"], "full"), (needs["full"] - 1, "lora"), (needs["lora"] - 1, "lora")):
        monkeypatch.setattr("pi_gguf.planning.free_memory", lambda device, free=free: free)
        plan = training_plan(llama, train="auto", batch_tokens=256)
        assert plan.train == way and plan.train_reason.startswith("full takes about"), free
        code, out, _ = cli("plan", llama, "--context", "256", "--train", "auto", "--batch-tokens", "256", "--json",
                           "--device", "cpu")  # fmt: skip
        assert code == 0 and json.loads(out)["training"]["train"] == way


def test_auto_on_a_gpu_ends_with_4_bits(llama, monkeypatch):
    monkeypatch.setattr("pi_gguf.planning.free_memory", lambda device: 1)
    monkeypatch.setattr("pi_gguf.planning.fast_bf16", lambda device: True)
    monkeypatch.setattr("pi_gguf.lora.find_spec", lambda name: object())
    plan = training_plan(llama, train="auto", device="cuda")
    assert plan.train == "qlora" and "qlora takes about" in plan.train_reason


def test_auto_runs_what_it_planned(llama, tmp_path, text, monkeypatch):
    free = estimate_training_memory(
        load_checkpoint(str(llama)), training_plan(llama, batch_tokens=256), "cpu", recompute=True
    )
    for module in ("planning", "training"):
        monkeypatch.setattr(f"pi_gguf.{module}.free_memory", lambda device: free - 1)
    out = pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], train="auto", **OPTIONS)
    assert json.loads((out / "pi_gguf.json").read_text())["train"] == "lora"


def test_too_little_memory_is_an_error_that_names_a_way(llama, tmp_path, text, monkeypatch):
    monkeypatch.setattr("pi_gguf.training.free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match="training needs about") as caught:
        pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], **OPTIONS)
    assert "--train lora" in caught.value.hint
