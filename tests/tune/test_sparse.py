"""Shifted sparse attention: what it computes, that nothing sees what is later, full attention in evaluation."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from helpers import WINDOW, corpus_of, make_llama
from small_families import SHAPES, make_model
from steps import loss_and_gradients

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.machine import Machine, fast_bf16
from pi_gguf.errors import Interrupted, OptionError
from pi_gguf.families import FAMILIES
from pi_gguf.measure.perplexity import Yardstick
from pi_gguf.tune import trainer
from pi_gguf.tune.batches import training_batches
from pi_gguf.tune.choose import plan_run, plan_training
from pi_gguf.tune.lora import add_adapters
from pi_gguf.tune.options import SpreadOptions, TuneOptions
from pi_gguf.tune.processes import Spread
from pi_gguf.tune.sparse import attend_in_groups, check_sparse, sparse_attention
from pi_gguf.tune.speed import train_operations, training_seconds

CONTEXT = 4 * WINDOW
OPTIONS = {
    "context": CONTEXT, "steps": 4, "batch_tokens": CONTEXT, "learning_rate": 0.01, "device": "cpu", "attention": "s2",
    "report_to": "none",
}  # fmt: skip


def seen(length, group, heads):
    """Return which tokens each one sees in each head, (1, H, T, T): the definition, written as a mask."""
    at = torch.arange(length)
    mask = torch.zeros(1, heads, length, length, dtype=torch.bool)
    for head in range(heads):
        of = at // group if head < heads // 2 else (at + group - group // 2) // group
        mask[0, head] = (of[:, None] == of[None]) & (at[None] <= at[:, None])
    return mask


class Layer(torch.nn.Module):
    """Stands for a layer's attention, which is asked for its mode only."""


# What is computed


def test_the_groups_are_those_of_the_paper_but_for_the_last_one_of_the_shifted():
    first, second = seen(8, 4, 2)[0]
    assert first.int().sum(1).tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert second.int().sum(1).tolist() == [1, 2, 1, 2, 3, 4, 1, 2], "the last two and the first two are apart"
    assert second[5].nonzero().flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 3), (9, 3), (5, 1), (2, 2)])
@pytest.mark.parametrize(
    ("length", "group"), [(32, 8), (33, 8), (31, 8), (36, 8), (30, 7), (20, 19), (5, 8), (3, 8), (1, 8), (9, 2)]
)
def test_heads_attend_within_their_groups(heads, kv_heads, length, group):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, length, 6) for n in (heads, kv_heads, kv_heads)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    weight = torch.randn(2, length, heads, 6, generator=generator, dtype=torch.float64)
    found, weights = attend_in_groups(group, Layer(), *states, None, scaling=0.3)
    assert weights is None and found.shape == (2, length, heads, 6)
    query, key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in states)
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(~seen(length, group, heads), -math.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((weight * x).sum(), states) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


REFUSED = {
    "falcon": "falcon computes its attention itself",
    "gemma2": "gemma2 caps the scores of its attention .attn_logit_softcapping 50",
    "gemma3_text": "gemma3_text has layers that see 64 tokens only",
    "mpt": "mpt computes its attention itself",
    "bloom": "bloom computes its attention itself",
}


def inputs(length, batch=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 400, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def compared(model, batch, group, kind):
    """Hold a model's loss and gradients in training against those under an explicit mask; return the former's loss."""
    heads, (rows, length) = model.config.num_attention_heads, batch["input_ids"].shape
    with sparse_attention(model, group):
        loss, gradients = loss_and_gradients(model, **batch)
        assert model.config._attn_implementation == f"s2-{group}"
    assert model.config._attn_implementation == "sdpa"
    masked = batch | {"attention_mask": seen(length, group, heads).expand(rows, -1, -1, -1)}
    expected, wanted = loss_and_gradients(model, **masked)
    close = {"rtol": 1e-9, "atol": 1e-12} if kind == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss, expected, **close)
    assert list(gradients) == list(wanted)
    for name, gradient in gradients.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4 * scale + 1e-9, msg=name)
    return loss


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_of_every_family_computes_it_or_is_refused_by_name(family, tmp_path):
    checkpoint = load_checkpoint(str(make_model(tmp_path, family, {"num_hidden_layers": 2, "num_layers": 2})))
    if family in REFUSED:
        with pytest.raises(OptionError, match=f"attention s2 is not for this model: {REFUSED[family]}"):
            check_sparse(checkpoint)
        return
    check_sparse(checkpoint)
    kind = torch.float32 if "experts" in str(SHAPES[family]) else torch.float64
    model = checkpoint.load_model(dtype=kind).train()
    batch = inputs(45)
    full = loss_and_gradients(model, **batch)[0]
    assert abs(compared(model, batch, 16, kind) / full - 1) > 1e-5, "and full attention is another"
    with sparse_attention(model, 16), torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(**batch).loss, full)


def test_families_that_are_refused_are_few():
    assert len(FAMILIES) - len(REFUSED) >= 21


@pytest.mark.parametrize("way", ["recomputed", "adapters", "bfloat16"])
def test_it_goes_with_what_else_training_does(way, llama):
    checkpoint = load_checkpoint(str(llama))
    kind = torch.float32 if way == "adapters" else torch.float64
    model = checkpoint.load_model(dtype=kind).train()
    if way == "recomputed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if way == "adapters":
        model = add_adapters(checkpoint, model, 4, 8).train()
    if way == "bfloat16":
        exact = compared(model.float(), inputs(64), 16, torch.float32)
        with torch.autocast("cpu", torch.bfloat16), sparse_attention(model, 16):
            assert abs(loss_and_gradients(model, **inputs(64))[0] / exact - 1) < 1e-2
        return
    compared(model, inputs(64), 16, kind)


@pytest.mark.parametrize("length", [64, 61])
def test_no_token_sees_a_later_one_and_news_reach_the_next_group(length, llama):
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float64).train()
    ids = inputs(length, 1)["input_ids"]
    with sparse_attention(model, 16), torch.no_grad():
        before = model(ids).logits
        for at in (1, 7, 8, 15, 16, 40, length - 1):
            changed = ids.clone()
            changed[:, at:] = (changed[:, at:] + 1) % 400
            after = model(changed).logits
            assert torch.equal(after[:, :at], before[:, :at]), f"a token before {at} saw what comes there"
            assert not torch.equal(after[:, at:], before[:, at:])
        changed = ids.clone()
        changed[:, 15] += 1
        news = (model(changed).logits != before).any(-1)[0].nonzero().flatten()
        assert news.tolist() == list(range(15, 32)), "by half a group a layer: to 23, then to the end of its group"


# A run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, part in (("train", 30_000), ("heldout", 4000)):
        (folder / name).write_text(next(iter(novels(name).values()))[:part])
    return {"data": [str(folder / "train")], "eval_text": [str(folder / "heldout")]}


@pytest.fixture(scope="module")
def run(llama, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return pi_gguf.extend(str(llama), out, **OPTIONS, **texts, eval_steps=2)


def test_it_trains_and_is_recorded(run, llama, texts, tmp_path, capfd):
    losses, record = (json.loads((run / name).read_text()) for name in ("losses.json", "pi_gguf.json"))
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert record["attention_group"] == 64 and "options" not in record
    assert record["stages"] == [{"window": CONTEXT, "steps": 4, "micro_batch": 1}]
    config = (run / "config.json").read_text()
    assert "attn_implementation" not in config and "s2" not in config
    for other in ({"s2_group": 0.5}, {"attention": "full", "train_window": CONTEXT}):
        with pytest.raises(OptionError, match="exists"):
            pi_gguf.extend(str(llama), run, **{**OPTIONS, **texts, "eval_steps": 2, **other})
    options = {**OPTIONS, **texts, "attention": "full", "train_window": CONTEXT, "steps": 1}
    full = pi_gguf.extend(str(llama), tmp_path / "full", **options)
    assert abs(json.loads((full / "losses.json").read_text())[0] / losses[0] - 1) > 1e-4, "another attention"
    assert "attention_group" not in json.loads((full / "pi_gguf.json").read_text()), "as before there was a choice"


def test_what_is_measured_attends_fully(run, texts):
    record = json.loads((run / "pi_gguf.json").read_text())
    windows = (WINDOW, CONTEXT)
    report = pi_gguf.evaluate_perplexity(
        str(run), text=texts["eval_text"], windows=windows, stride=WINDOW - 1, samples=Yardstick.SAMPLES
    )
    measured = [row.perplexity for row in report.rows]
    last = [record["validations"][-1][f"eval_perplexity_{window}"] for window in windows]
    near = 1e-3 if fast_bf16("cpu") else 1e-4  # a run validates in the type it computes in
    assert last == pytest.approx(measured, rel=near)
    assert record["price"]["after"] == pytest.approx(measured[0], rel=near)
    model = load_checkpoint(str(run)).load_model(dtype=torch.float32).train()
    with torch.no_grad(), sparse_attention(model, 64):
        within = model(**inputs(CONTEXT)).loss
        fully = model.eval()(**inputs(CONTEXT)).loss
    assert abs(math.exp(within - fully) - 1) > 1e-3, "within groups it would be measured otherwise"


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(train, llama, texts, tmp_path, monkeypatch, capfd):
    options = {**OPTIONS, **texts, "train": train}
    whole = pi_gguf.extend(str(llama), tmp_path / "whole", **options)
    is_due = trainer.Validation.is_due

    def stop_after_two(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return is_due(self, step)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.Validation, "is_due", stop_after_two)
        pi_gguf.extend(str(llama), tmp_path / "stopped", **options)
    with pytest.raises(OptionError, match="holds an unfinished run with attention_group 64, now 128"):
        pi_gguf.extend(str(llama), tmp_path / "stopped", **options, s2_group=0.5)
    capfd.readouterr()
    stopped = pi_gguf.extend(str(llama), tmp_path / "stopped", **options)
    assert "resume from" in capfd.readouterr().err
    for name in ("model.safetensors", "losses.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


# What is planned


def planned(model, machine=None, spread=None, **options):
    checkpoint = load_checkpoint(str(model)).extended(CONTEXT)
    tune = TuneOptions(**{"steps": 100, "attention": "s2", **options})
    return plan_run(checkpoint, tune, SpreadOptions(**(spread or {})), machine or Machine("cpu"))


@pytest.mark.parametrize(("share", "group"), [(0.25, 64), (0.1, 26), (0.008, 2), (0.999, 256)])
def test_every_sequence_is_the_whole_window_and_a_group_its_share(llama, share, group):
    for given in ({}, {"train_window": CONTEXT}, {"train_window": f"{CONTEXT}x40,{CONTEXT}"}, {"mix": 0.0}):
        plan, _ = planned(llama, s2_group=share, **given)
        assert {stage.window for stage in plan.stages} == {CONTEXT} and not plan.mix
        assert plan.sequences == "full length" and plan.attention_group == plan.attended(CONTEXT) == group
        assert f"attention in groups of {group} tokens" in plan.reason


def test_whole_windows_stay_alone_and_unshared_whatever_memory_there_is(llama, monkeypatch):
    machine, shared, mixed = Machine.elsewhere("4xH100"), 0, 0
    for free in (2**20, 2**20 + 2**18, 2**21, 3 * 2**20, 2**22, 2**40):
        monkeypatch.setattr(Machine, "free_bytes", free)
        plan, spread = planned(llama, machine)
        assert [stage.window for stage in plan.stages] == [CONTEXT] and plan.mix == 0
        assert (spread.cp_size, spread.readers) == (1, 4)
        shared += planned(llama, machine, attention="full", train_window=CONTEXT)[1].cp_size > 1
        mixed += planned(llama, machine, attention="full")[0].mix > 0
        chosen = [
            planned(llama, machine, train="auto", batch_tokens=64, attention=attention, train_window=window)[0]
            for attention, window in (("s2", None), ("full", CONTEXT), ("full", WINDOW))
        ]
        assert chosen[0].train_reason == chosen[1].train_reason != chosen[2].train_reason
    assert shared and mixed, "as full attention does"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_window": WINDOW}, "whole context of 256, each in one process, got train-window 64"),
        ({"train_window": f"{CONTEXT}x50,128"}, "got train-window 128"),
        ({"mix": 0.25}, "got mix 0.25"),
        ({"factor_warmup": 20}, "got factor-warmup 20"),
        ({"s2_group": 0.003}, "s2-group must leave groups of 2 tokens or more, got 0.003 of 256"),
        ({"s2_group": 0.0}, "s2-group must be between 0 and 1, got 0.0"),
        ({"s2_group": 1.0}, "s2-group must be between 0 and 1, got 1.0"),
        ({"s2_group": math.nan}, "s2-group must be between 0 and 1, got nan"),
        ({"s2_group": 0.5, "attention": "full"}, "s2-group is for attention s2, got 0.5 with full"),
        ({"attention": "sparse"}, "attention must be full or s2, got sparse"),
    ],
)
def test_what_does_not_go_with_it_is_refused(llama, options, said):
    with pytest.raises(OptionError, match=said):
        planned(llama, **options)


@pytest.mark.parametrize("name", ["cp-size", "sp-size"])
def test_a_sequence_that_several_gpus_share_is_refused(llama, name):
    with pytest.raises(OptionError, match=f"each in one process, got {name} 2"):
        planned(llama, Machine.elsewhere("4xH100"), {name.replace("-", "_"): 2})


def test_one_head_cannot_be_halved(tmp_path):
    model = make_llama(tmp_path, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(OptionError, match="llama has one head, of which no half can be shifted"):
        planned(model)


def test_a_window_that_slides_beyond_the_context_is_none(tmp_path):
    def check(sliding_window):
        changes = {"sliding_window": sliding_window}
        check_sparse(load_checkpoint(str(make_model(tmp_path / str(sliding_window), "phi3", changes))))

    check(4 * 640)


def test_documents_that_share_a_row_would_need_a_mask(llama):
    corpus = corpus_of(llama, [f"{i} " * n for i, n in enumerate((30, 200, 90, 400, 70))])
    checkpoint = load_checkpoint(str(llama)).extended(CONTEXT)
    for attention, alone in (("s2", True), ("full", False)):
        tune = TuneOptions(steps=6, attention=attention, train_window=CONTEXT, batch_tokens=CONTEXT)
        plan = plan_training(checkpoint, tune, Machine("cpu"))
        rows = [row for batch in training_batches(checkpoint, plan, corpus, 0, packing="isolate") for row in batch]
        assert all(len(row) == 1 for row in rows) == alone
    with pytest.raises(AssertionError, match="several documents"):
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        attend_in_groups(2, Layer(), *(torch.ones(1, 2, 4, 2) for _ in range(3)), mask)


def test_the_plan_counts_the_attention_that_is_left(llama, cli):
    checkpoint = load_checkpoint(str(llama)).extended(CONTEXT)
    times = {}
    for attention in ("full", "s2"):
        tune = TuneOptions(steps=10, attention=attention, train_window=CONTEXT)
        plan = plan_training(checkpoint, tune, Machine("cpu"))
        times[attention] = training_seconds(checkpoint, plan, Machine("cpu"), Spread())
    by_hand = train_operations(checkpoint, CONTEXT) - 12 * 2 * 4 * 32 * (CONTEXT - 64) / 2
    assert times["s2"] / times["full"] == pytest.approx(by_hand / train_operations(checkpoint, CONTEXT), rel=1e-9)
    code, out, _ = cli("plan", llama, "--context", CONTEXT, "--attention", "s2", "--steps", "10")
    flat = " ".join(out.replace("│", " ").split())
    assert code == 0 and "attention s2 is for whole windows; attention in groups of 64 tokens" in flat
    code, out, _ = cli("plan", llama, "--context", CONTEXT, "--attention", "s2", "--s2-group", "0.5", "--json")
    assert code == 0 and json.loads(out)["training"]["attention_group"] == 128
    where = ("--attention", "s2", "--on", "2xH100")
    code, out, _ = cli("plan", llama, "--context", CONTEXT, *where, "--s2-group", "0.5", "--json")
    assert code == 0 and "--attention s2 --s2-group 0.5" in json.loads(out)["command"]
