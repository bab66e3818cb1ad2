"""The run: which weights are trained and how, its memory, and the same losses whatever interrupts or shares it."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from children import Command
from gpu_child import forced
from helpers import WINDOW, make_llama
from safetensors.torch import load_file, save_file
from small_families import SHAPES, make_model
from steps import a_batch, largest_allocation, loss_and_gradients
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

import pi_gguf
from pi_gguf.adapters.adapted import with_adapters
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.checkpoint.tensors import open_files
from pi_gguf.common import machine
from pi_gguf.common import products as fast
from pi_gguf.common.machine import Machine, fast_bf16
from pi_gguf.common.progress import progress_bar
from pi_gguf.errors import OptionError, PiGgufError, ResourceError
from pi_gguf.families import FAMILIES
from pi_gguf.tune import losses
from pi_gguf.tune.choose import default_recipe, plan_training
from pi_gguf.tune.lora import add_adapters, parts
from pi_gguf.tune.losses import chunked_loss
from pi_gguf.tune.memory import ACTIVATIONS, _weights, estimate_training_memory, fit_activations, memory_of_windows
from pi_gguf.tune.options import SpreadOptions, TuneOptions
from pi_gguf.tune.processes import Spread, check_spread
from pi_gguf.tune.speed import train_operations
from pi_gguf.tune.tiles import tiled_mlps
from pi_gguf.tune.trainer import _as_known, check_reports

OPTIONS = {"context": 4 * WINDOW, "steps": 4, "batch_tokens": 256, "learning_rate": 0.01, "device": "cpu"}
KEPT, RECOMPUTED, TILED, OFFLOADED = ACTIVATIONS
ALONE, CARD_HERE = (Machine("cpu"), Spread()), Machine("cuda")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    novel = next(iter(pi_gguf.bundled.novels("train").values()))
    path.write_text(novel[:30_000])
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, dtype="bfloat16")


def training_plan(model, device="cpu", readers=1, **options):
    checkpoint = load_checkpoint(str(model))
    tune = TuneOptions(**{"steps": 100, **options})
    return plan_training(checkpoint.extended(4 * WINDOW), tune, Machine(device, processes=readers))


# The loss


@pytest.fixture(params=["this torch", "a torch before 2.13"])
def any_torch(request, monkeypatch):
    """Take away what only newer versions of torch have; chunks are small, as a small model's logits fit in one."""
    monkeypatch.setattr(losses, "CPU_CHUNK", 0)
    if request.param != "this torch":
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_the_loss_in_chunks_is_the_loss_of_every_family(family, tmp_path, any_torch):
    model = load_checkpoint(str(make_model(tmp_path, family, {}))).load_model(dtype=torch.float32).eval()
    batch = a_batch(40)
    for more in ({}, {"num_items_in_batch": torch.tensor(111)}):
        own, expected = loss_and_gradients(model, **batch, **more)
        with chunked_loss(model):
            chunked, gradients = loss_and_gradients(model, **batch, **more)
            assert model(**batch).logits.shape[-1] == (410 if family == "gemma2" else model.config.hidden_size)
            with torch.no_grad():
                torch.testing.assert_close(model(**batch, **more).loss, own, rtol=1e-6, atol=0)
                assert model(**batch).logits.shape[-1] == 410
        torch.testing.assert_close(chunked, own, rtol=1e-5, atol=0)
        assert list(gradients) == list(expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item(), msg=name
            )
    assert model(**batch).logits.shape[-1] == 410, "the head is itself again"


def test_the_loss_in_chunks_is_right_in_16_bits(llama, any_torch):
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


def test_on_a_cpu_the_head_is_read_few_times(tmp_path):
    """A chunk reads it twice and adds to its gradient once, however targets count."""
    sizes = {"cpu": 2**24, "cuda": 2048 * 576}
    assert {device: losses.chunk_logits(2048, 576, 49152, device) for device in sizes} == sizes
    assert losses.chunk_logits(100, 64, 410, "cpu") == 100 * 410
    hidden, head, targets = torch.randn(1, 96, 16), torch.nn.Linear(16, 500, bias=False), torch.randint(0, 500, (1, 96))

    expected = torch.nn.functional.cross_entropy(head(hidden)[0], targets[0])
    few = (torch.arange(96) % 3 == 0).float()[None]  # what does not count is not read
    for weights in (None, torch.ones(1, 96), torch.full((1, 96), 0.5), few):
        for size, products in ((500 * 32, 3 if weights is few else 9), (500 * 96, 3)):
            given = hidden.clone().requires_grad_()
            with pytest.MonkeyPatch.context() as patch, torch.profiler.profile() as seen:
                patch.setattr(losses, "CPU_CHUNK", size)
                loss = losses._cross_entropy(given, head, targets, None, weights)
                loss.backward()
            if weights is not few:
                torch.testing.assert_close(loss, expected)
            names = [event.name for event in seen.events()]
            assert sum(names.count(f"aten::{name}") for name in ("mm", "addmm", "addmm_")) == products, (size, names)


def test_a_cpu_has_the_gradient_of_the_head_before_all_others(llama, monkeypatch):
    monkeypatch.setattr("pi_gguf.common.machine.fast_bf16", lambda device: True)
    monkeypatch.setattr(losses, "CPU_CHUNK", 0)  # chunks as on a GPU
    checkpoint = load_checkpoint(str(llama))
    cpu, gpu = (
        memory_of_windows(checkpoint, 2**14, "full", 0, Machine(one), Spread(), KEPT) for one in ("cpu", "cuda")
    )
    assert cpu - gpu == 6 * checkpoint.vocab_size * checkpoint.hidden_size


def test_a_frozen_head_has_no_gradient_and_a_product_less():
    hidden, head, targets = torch.randn(1, 96, 16), torch.nn.Linear(16, 500), torch.randint(0, 500, (1, 96))
    gradients = {}
    for frozen in (False, True):
        head.requires_grad_(not frozen)
        given = hidden.clone().requires_grad_()
        with torch.profiler.profile() as seen:
            losses._cross_entropy(given, head, targets, None, None).backward()
        names = [event.name for event in seen.events()]
        assert sum(names.count(f"aten::{name}") for name in ("mm", "addmm", "addmm_")) == (2 if frozen else 3), names
        gradients[frozen] = given.grad
        assert (head.weight.grad is None) == (head.bias.grad is None) == frozen
        head.zero_grad()
    torch.testing.assert_close(gradients[True], gradients[False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["answers", "several weights"])
@pytest.mark.parametrize("count", [None, 50])
def test_a_loss_counts_targets_by_their_weights(dtype, kind, count):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 500, bias=False).to(dtype), torch.randint(0, 500, (1, 96))
    targets[0, ::7] = -100
    weights = (torch.rand(1, 96) < 0.3).float() * (1 if kind == "answers" else torch.arange(96) / 7)
    there, hidden = targets[0] != -100, torch.randn(1, 96, 16)
    found = {}
    for way in ("ours", "by hand"):
        given = hidden.clone().requires_grad_()
        if way == "ours":
            loss = losses._cross_entropy(given.to(dtype), head, targets, count, weights)
        else:
            each = torch.nn.functional.cross_entropy(given[0] @ head.weight.float().T, targets[0], reduction="none")
            counted = weights[0] * there
            mean = (each * counted).sum() / counted.sum()
            loss = mean if count is None else mean * there.sum() / count
        (gradient,) = torch.autograd.grad(loss, given)
        found[way] = loss.detach().float(), gradient
    near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, **near)


def test_logits_of_all_tokens_never_exist(llama, any_torch):
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    batch = a_batch(300)
    logits_bytes = 4 * 600 * 410
    assert largest_allocation(model, batch) >= logits_bytes
    with chunked_loss(model):
        assert largest_allocation(model, batch) < logits_bytes


def test_a_run_computes_its_loss_in_chunks(llama, tmp_path, text, any_torch):
    widths = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim > 1 and result.numel() and result.is_floating_point():
                widths.append((result.numel() // result.shape[-1], result.shape[-1]))
            return result

    with Seen():
        pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], **{**OPTIONS, "steps": 1})
    assert (4 * WINDOW, 96) in widths, "the inner width of the feed-forward is seen, of 4 rows"
    assert (4 * WINDOW, 410) not in widths


def test_the_time_left_follows_the_lengths_of_the_sequences(llama, tmp_path, text, monkeypatch):
    told = []

    def shown(*given):
        told.append(given)
        return progress_bar(*given)

    monkeypatch.setattr("pi_gguf.tune.trainer.progress_bar", shown)
    lengths = {"train_window": f"{WINDOW}x2,{2 * WINDOW}", "steps": 3, "batch_tokens": 2 * WINDOW}
    pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], **{**OPTIONS, **lengths})
    ((title, total, unit, costs),) = told
    assert (title, total, unit, len(costs)) == ("fine-tune", 3, "steps", 3)
    short, long = (train_operations(load_checkpoint(str(llama)), n) for n in (WINDOW, 2 * WINDOW))
    assert costs == pytest.approx([2 * WINDOW * short] * 2 + [2 * WINDOW * long])


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
    rows = [weights["model.embed_tokens.weight"][400:] for weights in (before, after)]
    assert torch.equal(*rows), "rows of tokens that no text has are as they were, to the bit"
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
        "adapter_config.json", "adapter_model.safetensors", "losses.json", "pi_gguf.json",
    ]  # fmt: skip
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    checkpoint = with_adapters(load_checkpoint(str(base)), [str(alone)])
    assert checkpoint.rope == load_checkpoint(str(merged)).rope and checkpoint.rope.factor == 4
    with open_files() as files:
        for name, source in load_checkpoint(str(merged)).tensors.items():
            theirs = source.read(files)
            torch.testing.assert_close(checkpoint.tensors[name].read(files).to(theirs.dtype), theirs, rtol=0, atol=0)


def test_adapters_begin_where_the_whole_model_does(llama, tmp_path, text, monkeypatch):
    """B is zero at first, so that the first loss is that of the same rows, positions and scaling without adapters."""
    monkeypatch.setattr("pi_gguf.common.machine.fast_bf16", lambda device: False)
    losses = []
    for train in ("full", "lora"):
        out = pi_gguf.extend(str(llama), tmp_path / train, data=[str(text)], train=train, **OPTIONS)
        losses.append(json.loads((out / "losses.json").read_text()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6) and losses[0][1:] != losses[1][1:]


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
    monkeypatch.setattr("pi_gguf.tune.lora.find_spec", lambda name: None)
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
        needs[way] = estimate_training_memory(load_checkpoint(str(llama)), plan, *ALONE, RECOMPUTED)
    assert needs["full"] > needs["lora"]
    for free, way in ((needs["full"], "full"), (needs["full"] - 1, "lora"), (needs["lora"] - 1, "lora")):
        monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device, free=free: free)
        plan = training_plan(llama, train="auto", batch_tokens=256)
        assert plan.train == way and plan.train_reason.startswith("full takes about"), free
        code, out, _ = cli("plan", llama, "--context", "256", "--train", "auto", "--batch-tokens", "256", "--json",
                           "--device", "cpu")  # fmt: skip
        assert code == 0 and json.loads(out)["training"]["train"] == way


def test_auto_on_a_gpu_ends_with_4_bits(llama, monkeypatch):
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: 1)
    monkeypatch.setattr("pi_gguf.common.machine.fast_bf16", lambda device: True)
    monkeypatch.setattr("pi_gguf.tune.lora.find_spec", lambda name: object())
    plan = training_plan(llama, train="auto", device="cuda")
    assert plan.train == "qlora" and "qlora takes about" in plan.train_reason


def test_whole_windows_that_fit_a_gpu_are_mixed_in(llama, monkeypatch):
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: 1e12)
    plan = training_plan(llama, device="cuda", batch_tokens=256)
    assert (plan.sequences, plan.mix, plan.full_window) == ("PoSE and full length", 0.25, 4 * WINDOW)
    assert [stage.window for stage in plan.stages] == [WINDOW] and "fit the GPU" in plan.reason
    assert plan.tokens_by_window()[4 * WINDOW] == pytest.approx(0.25 * plan.tokens, rel=0.05)
    for options, sequences in (
        ({"mix": 0.0}, "PoSE"), ({"train_window": 4 * WINDOW}, "full length"), ({"factor_warmup": 5}, "PoSE"),
        ({"device": "cpu"}, "PoSE"), ({"steps": 1, "batch_tokens": 64}, "PoSE"),
    ):  # fmt: skip
        plan = training_plan(llama, **{"device": "cuda", "batch_tokens": 256, **options})
        assert (plan.sequences, plan.mix, plan.full_micro_batches) == (sequences, 0.0, 0), options
        assert "of the tokens in" not in plan.reason
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: 0)
    assert training_plan(llama, device="cuda").sequences == "PoSE"


def test_auto_runs_what_it_planned(llama, tmp_path, text, monkeypatch):
    free = estimate_training_memory(
        load_checkpoint(str(llama)), training_plan(llama, batch_tokens=256), *ALONE, RECOMPUTED
    )
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: free - 1)
    out = pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], train="auto", **OPTIONS)
    assert json.loads((out / "pi_gguf.json").read_text())["train"] == "lora"


def test_too_little_memory_is_an_error_that_names_a_way(llama, tmp_path, text, monkeypatch):
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match="training needs about") as caught:
        pi_gguf.extend(str(llama), tmp_path / "out", data=[str(text)], **OPTIONS)
    assert "--train lora" in caught.value.hint


# Memory


@pytest.mark.parametrize("train", ["full", "lora"])
def test_recomputed_activations_give_the_same_losses(train, llama, tmp_path, text, monkeypatch):
    checkpoint, plan = load_checkpoint(str(llama)), training_plan(llama, train=train, batch_tokens=256)
    losses = {}
    for name, free in (("kept", 2**40), ("recomputed", estimate_training_memory(checkpoint, plan, *ALONE) - 1)):
        monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device, free=free: free)
        assert fit_activations(checkpoint, plan, *ALONE)[0].name == name
        out = pi_gguf.extend(str(llama), tmp_path / name, data=[str(text)], train=train, **OPTIONS)
        losses[name] = json.loads((out / "losses.json").read_text())
    assert len(losses["kept"]) == 4 and losses["kept"] == pytest.approx(losses["recomputed"], rel=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_products_of_another_library_give_the_same_losses(llama, tmp_path, text, monkeypatch):
    found, asked, product = [], [], fast.onednn_product
    monkeypatch.setattr(fast, "_LEAST", 0)
    monkeypatch.setattr(fast, "onednn_product", lambda *given: asked.append(1) or product(*given))
    for maker in ("GenuineIntel", "AuthenticAMD"):
        monkeypatch.setattr(machine, "_cpu_flags", lambda maker=maker: f"vendor_id : {maker}")
        out = pi_gguf.extend(str(llama), tmp_path / maker, data=[str(text)], report_to="none", **OPTIONS)
        found.append((json.loads((out / "losses.json").read_text()), len(asked)))
    (theirs, none), (ours, many) = found
    assert none == 0 and many > 100
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == OPTIONS["steps"]


def test_tiles_and_the_hosts_memory_when_a_gpu_is_full(llama, monkeypatch):
    checkpoint, plan = load_checkpoint(str(llama)), training_plan(llama, batch_tokens=8192, train_window=256)
    monkeypatch.setattr("pi_gguf.common.machine.fast_bf16", lambda device: True)
    needs = []
    for way, share in ((KEPT, 0.75), (RECOMPUTED, 0.85), (TILED, 0.92), (TILED, 0.0)):
        free = int(estimate_training_memory(checkpoint, plan, CARD_HERE, Spread(), way) / share) + 1 if share else 1
        monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device, free=free: free)
        needs.append(fit_activations(checkpoint, plan, CARD_HERE, Spread()))
    assert [way.recompute for way, _ in needs] == [False, True, True, True]
    assert [way.tiled for way, _ in needs] == [False, False, True, True]
    assert [way.offload for way, _ in needs] == [False, False, False, True]
    mlp = 4 * 64 + 8 * 96  # of a token: hidden and inner units, in the one layer
    assert needs[1][1] - needs[2][1] == (8192 - 2048) * mlp
    n = checkpoint.n_parameters()
    kept = 4 * 8192 * 64 * 2 + 2 * n  # 32 bits of a token, hidden unit and layer, and weights in 16 bits
    assert needs[2][1] - needs[3][1] == kept - 4 * n > 0, "gradients alone are left"


CARD = {
    ("full", KEPT, 8192): 5.99, ("full", KEPT, 32768): 18.43, ("full", RECOMPUTED, 8192): 2.39,
    ("full", RECOMPUTED, 32768): 4.50, ("full", TILED, 32768): 3.95, ("full", OFFLOADED, 32768): 3.11,
    ("lora", KEPT, 8192): 4.99, ("lora", OFFLOADED, 32768): 1.86, ("qlora", OFFLOADED, 32768): 1.68,
}  # fmt: skip
"""GB of peak memory that tests/test_gpu.py saw on a card (recipes/gpu) for a Llama of 125 M parameters."""


@pytest.mark.parametrize("case", CARD, ids=str)
def test_the_predicted_memory_is_what_a_card_took(case, tmp_path, monkeypatch):
    config = {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64,
        "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(str(tmp_path), config_only=True)
    train, activations, tokens = case
    monkeypatch.setattr("pi_gguf.common.machine.fast_bf16", lambda device: True)
    found = memory_of_windows(checkpoint, tokens, train, 16, CARD_HERE, Spread(), activations)
    assert found / 1e9 == pytest.approx(CARD[case], rel=0.1)


def test_tiles_are_left_out_where_they_save_nothing(llama, monkeypatch):
    checkpoint, plan = load_checkpoint(str(llama)), training_plan(llama, batch_tokens=2048, train_window=256)
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: 1)
    assert fit_activations(checkpoint, plan, *ALONE)[0] == RECOMPUTED


def test_a_run_in_tiles_has_the_same_losses(llama, tmp_path, text, monkeypatch):
    losses, used = [], []
    monkeypatch.setattr(
        "pi_gguf.tune.tiles.tiled_mlps", lambda model, tile: used.append(tile) or tiled_mlps(model, tile)
    )
    monkeypatch.setattr("pi_gguf.tune.trainer.fit_activations", forced("recomputed, MLPs in tiles"))
    for tile in (2048, 50):
        monkeypatch.setattr("pi_gguf.tune.tiles.TILE", tile)
        out = pi_gguf.extend(str(llama), tmp_path / str(tile), data=[str(text)], **OPTIONS)
        losses.append(json.loads((out / "losses.json").read_text()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert used == [2048, 50]


def test_the_memory_of_a_known_model(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(str(tmp_path), config_only=True)
    n, linear, whole = 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096 + 65 * 4096
    adapters = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert parts(checkpoint.skeleton).trained(16) == adapters + whole
    frozen = {"full": 0, "lora": (2 if fast_bf16("cpu") else 4) * n, "qlora": 2 * (n - linear) + 0.55 * linear}
    for way, base in frozen.items():
        trained = n if way == "full" else adapters + whole
        assert _weights(checkpoint, way, 16, Machine("cpu")) == (trained, pytest.approx(base)), way


def test_with_adapters_layers_hand_on_the_bits_of_the_base(llama):
    checkpoint = load_checkpoint(str(llama))
    for dtype in (torch.bfloat16, torch.float32):
        model = add_adapters(checkpoint, checkpoint.load_model(dtype=dtype), 4, 8)
        seen = []
        for layer in model.get_base_model().model.layers:
            layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].dtype))
        model(torch.arange(2, 12)[None])
        assert seen == [dtype] * 2
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_recomputation_goes_by_the_name_that_transformers_knows():
    @dataclass
    class Older:
        gradient_checkpointing: bool = False
        seed: int = 0

    assert _as_known({"activation_checkpointing": True, "seed": 3}, Older) == {
        "gradient_checkpointing": True,
        "seed": 3,
    }
    assert "activation_checkpointing" in _as_known({"activation_checkpointing": True}, TrainingArguments)


# A long run

COMMAND = ("--context", "256", "--steps", "30", "--batch-tokens", "256", "--learning-rate", "0.001", "--device", "cpu")


def run_extend(model, out, text, *more):
    return Command("extend", model, out, "--data", text, *COMMAND, *more)


def finish(command):
    code, out, err = command.wait()
    assert code == 0, err
    return out, err


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_losses(train, llama, tmp_path, text):
    finish(run_extend(llama, tmp_path / "whole", text, "--train", train))
    killed = run_extend(llama, tmp_path / "killed", text, "--train", train)
    deadline = time.time() + 120
    while not list((tmp_path / "killed.partial").glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.3))
    killed.kill()
    assert not (tmp_path / "killed").exists()
    assert "resume from" in finish(run_extend(llama, tmp_path / "killed", text, "--train", train))[1]
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "killed")]
    assert len(losses[0]) == 30 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_run_that_ended_behind_its_last_step_tells_of_all_of_them(llama, tmp_path, text, monkeypatch):
    def ended(*_):
        raise KeyError

    options = {"data": [str(text)], "report_to": "none", **OPTIONS}
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("pi_gguf.tune.validation.Validation.price", ended)
        clock = SimpleNamespace(monotonic=itertools.count().__next__)  # a second between any two looks at it
        patch.setattr("pi_gguf.tune.callbacks.time", clock)
        pi_gguf.extend(str(llama), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    (last,) = (tmp_path / "out.partial").glob(f"checkpoint-{OPTIONS['steps']}")
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    record = load_checkpoint(str(pi_gguf.extend(str(llama), tmp_path / "out", **options))).record
    assert record.loss == round(history[-1]["loss"], 4) > 1 and record.steps_done == len(history) == OPTIONS["steps"]
    assert [entry["seconds"] for entry in history] == [1] * OPTIONS["steps"]
    assert record.seconds == OPTIONS["steps"], "a clock of another process has no part in it"


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_batch(llama_copy, tmp_path, text):
    weights = load_file(llama_copy / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, llama_copy / "model.safetensors", metadata={"format": "pt"})
    said = "the loss of step 1, micro-batches 1 to 1 of the run, is not a number"
    with pytest.raises(PiGgufError, match=said):
        pi_gguf.extend(str(llama_copy), tmp_path / "out", data=[str(text)], **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_losses_are_reported_where_asked(llama, tmp_path):
    assert check_reports("none") == []
    installed = get_available_reporting_integrations()
    assert check_reports("auto") == [name for name in installed if name == "tensorboard"]
    with pytest.raises(OptionError, match=r"report-to must be auto, none or some of .*tensorboard.*, got 'paper'"):
        check_reports("paper")
    for name in {"tensorboard", "wandb", "mlflow"} - set(installed):
        with pytest.raises(OptionError, match=f"report-to {name}: it is not installed"):
            pi_gguf.extend(str(llama), tmp_path / "out", report_to=name, **OPTIONS)


# More than one process


def run_processes(n, model, out, text, *more):
    return Command("extend", model, out, "--data", text, "--context", "256", "--device", "cpu", *more, n=n, exact=True)


TWO_MICRO_BATCHES = ("--batch-tokens", "16384", "--steps", "4", "--eval-steps", "2")


@pytest.mark.slow
@pytest.mark.parametrize(("base", "way"), [
    ("llama", ()), ("tied", ()), ("llama", ("--no-fsdp",)), ("llama", ("--train", "lora")),
])  # fmt: skip
def test_two_processes_train_like_one(base, way, tmp_path, text, request):
    model = request.getfixturevalue(base)
    for n in (1, 2):
        out, err = finish(run_processes(n, model, tmp_path / str(n), text, *TWO_MICRO_BATCHES, *way))
        assert out.count("wrote") == err.count("by method linear") == 1, "one process speaks"
    losses = [json.loads((tmp_path / n / "losses.json").read_text()) for n in ("1", "2")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    records = [json.loads((tmp_path / n / "pi_gguf.json").read_text()) for n in ("1", "2")]
    found, expected = (record["validations"] for record in records)
    assert [entry["step"] for entry in found] == [2, 4]
    assert [pytest.approx(entry, rel=1e-5) for entry in found] == expected
    before, after = ([record["price"][name] for record in records] for name in ("before", "after"))
    assert (before[0], after[0]) == pytest.approx((before[1], after[1]), rel=1e-5)
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("1", "2")]
    assert list(weights[0]) == list(weights[1])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, msg=name)
    assert not (tmp_path / "2.partial").exists()


@pytest.mark.slow
def test_torchrun_starts_it(llama, tmp_path, text):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pi_gguf", "extend"]
    options = ["--data", text, "--context", "256", "--device", "cpu", "--steps", "1", "--batch-tokens", "16384"]
    done = subprocess.run([*command, llama, tmp_path / "out", *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == done.stderr.count("by method linear") == 1, "one process speaks"


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_with_four(llama, tmp_path, text):
    options = ("--batch-tokens", str(4 * 8192), "--steps", "12")
    finish(run_processes(1, llama, tmp_path / "whole", text, *options))
    killed = run_processes(2, llama, tmp_path / "killed", text, *options)
    deadline = time.time() + 200
    while not list((tmp_path / "killed.partial").glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.02)
    killed.kill()
    code, _, err = run_processes(1, llama, tmp_path / "killed", text, *options).wait()
    assert code == 2 and "unfinished run with sharded True, now False" in err
    assert "resume from" in finish(run_processes(4, llama, tmp_path / "killed", text, *options))[1]
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "killed")]
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_step_is_shared_out_in_whole_micro_batches(llama):
    for readers, tokens, expected in ((1, 256, 1), (2, 256, 2), (3, 4 * 8192, 6), (2, 4 * 8192, 4)):
        plan = training_plan(llama, batch_tokens=tokens, readers=readers)
        assert plan.accumulation == expected
    assert training_plan(llama, batch_tokens=256, readers=2).stages[0].micro_batch == 2


def test_a_spread_that_cannot_work_is_refused_early(llama, tmp_path, monkeypatch, cli):
    command = ("extend", llama, tmp_path / "out", "--context", "256", "--device", "cpu")
    for said, options in {
        "cp-size needs CUDA GPUs, got 2 on device cpu": ("--cp-size", "2"),
        "sp-size needs CUDA GPUs, got 4 on device cpu": ("--sp-size", "4"),
        "cp-size must be at least 1, got 0": ("--cp-size", "0"),
        "deepspeed: no such file as absent.json": ("--deepspeed", "absent.json"),
    }.items():
        code, _, err = cli(*command, *options)
        assert code == 2 and said in err, options
    (tmp_path / "zero.json").write_text("{}")
    monkeypatch.setattr("pi_gguf.tune.processes.find_spec", lambda name: None)
    code, _, err = cli(*command, "--deepspeed", tmp_path / "zero.json")
    assert code == 2 and "deepspeed is not installed" in err
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = {"fsdp": True, "cp_size": 1, "sp_size": 1, "deepspeed": None}
    for said, changes in {
        "exclude each other, got 2 and 2": {"cp_size": 2, "sp_size": 2},
        "3 processes to a sequence do not divide the 4": {"cp_size": 3},
        "cp-size goes with --train full and --fsdp only": {"cp_size": 2, "fsdp": False},
    }.items():
        with pytest.raises(OptionError, match=said):
            check_spread(Machine.here("cuda"), "full", SpreadOptions(**{**settings, **changes}))
    spread = check_spread(Machine.here("cuda"), "full", SpreadOptions(**{**settings, "cp_size": 2}))
    assert (spread.readers, spread.fsdp) == (2, True)
    arguments = spread.arguments(recompute=True, offload=False)
    assert arguments["parallelism_config"].cp_size == 2
    assert arguments["fsdp_config"]["activation_checkpointing"] and "activation_checkpointing" not in arguments
    assert spread.arguments(recompute=True, offload=True)["activation_checkpointing_kwargs"] == {"offload": True}
    assert not check_spread(Machine.here("cuda"), "lora", SpreadOptions(**settings)).fsdp
    code, _, err = cli("convert", llama, tmp_path / "m.gguf", "--context", "256")
    assert code == 2 and "convert runs in one process, got 4" in err
    code, _, err = cli(*command, "--steps", "0")
    assert code == 2 and "steps 0 is for one process" in err


def test_a_deepspeed_config_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pi_gguf.tune.processes.find_spec", lambda name: object())
    path = tmp_path / "zero.json"
    path.write_text("{}")
    spread = check_spread(Machine.here("cuda"), "full", SpreadOptions(deepspeed=str(path)))
    arguments = spread.arguments(recompute=True, offload=False)
    assert arguments["deepspeed"] == str(path) and "fsdp" not in arguments and arguments["activation_checkpointing"]
