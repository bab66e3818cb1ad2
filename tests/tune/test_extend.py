"""Fine-tuning: rows, positions, schedule, and a run that is interrupted and resumed."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
import torch
from children import Command
from helpers import WINDOW, corpus_of
from safetensors.torch import load_file

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.machine import Machine
from pi_gguf.data.packing import pack, pose_positions
from pi_gguf.data.tokens import TOKEN
from pi_gguf.tune.batches import batch_positions, padded, training_batches
from pi_gguf.tune.choose import plan_training
from pi_gguf.tune.losses import chunked_loss
from pi_gguf.tune.options import TuneOptions
from pi_gguf.tune.plan import Stage
from pi_gguf.tune.trainer import rate_share


def test_documents_that_fit_are_never_cut_and_no_token_is_lost():
    rng = np.random.default_rng(0)
    documents = [np.full(int(n), i) for i, n in enumerate(rng.integers(1, 30, 200))]
    rows = [np.concatenate(row).tolist() for row in pack(documents, 20)]
    assert sorted(t for row in rows for t in row) == sorted(t for d in documents for t in d)
    assert max(map(len, rows)) == 20
    for i, document in enumerate(documents):
        if len(document) <= 20:
            assert sum(i in row for row in rows) == 1, f"document {i} of {len(document)} tokens was cut"


def test_skips_reach_every_distance_and_keep_the_order():
    rng = np.random.default_rng(0)
    drawn = [pose_positions(16, 256, rng) for _ in range(3000)]
    for positions in drawn:
        assert len(positions) == 16 and positions[0] >= 0 and positions[-1] < 256
        assert (np.diff(positions) >= 1).all() and (np.diff(positions) > 1).sum() <= 1
    assert max(p[-1] - p[0] for p in drawn) == 255
    far = sum(p[-1] - p[0] >= 240 for p in drawn) / len(drawn)
    assert 0.09 < far < 0.16, "of one draw the last sixteenth of the skips would be 0.06"
    np.testing.assert_array_equal(pose_positions(16, 16, rng), np.arange(16))


def test_attention_crosses_a_skip_in_the_positions(llama):
    """transformers takes a skip for a new document unless a mask is given; then nothing before it is seen."""
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    ids = torch.arange(2, 34)[None]
    changed = ids.clone()
    changed[0, 3] = 99
    positions = torch.from_numpy(np.r_[0:16, 40:56])[None]
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        seen = [model(x, position_ids=positions, attention_mask=mask).logits[0, -1] for x in (ids, changed)]
    assert not torch.equal(seen[0], seen[1])


def training_plan(llama, device="cpu", **options):
    checkpoint = load_checkpoint(str(llama))
    tune = TuneOptions(**{"steps": 100, **options})
    return plan_training(checkpoint.extended(4 * WINDOW), tune, Machine.here(device))


def test_the_rate_warms_up_from_a_tenth_and_stays(llama):
    plan = training_plan(llama)
    assert [rate_share(step, plan) for step in (0, 10, 20, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    decay = training_plan(llama, schedule="decay", steps=300)
    assert [rate_share(step, decay) for step in (20, 200, 250, 300)] == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_the_plan_says_which_way_it_trains(llama):
    assert training_plan(llama).sequences == "PoSE"
    assert [stage.window for stage in training_plan(llama).stages] == [WINDOW]
    assert training_plan(llama, train_window=4 * WINDOW).sequences == "full length"
    plan = training_plan(llama, train_window=2 * WINDOW, batch_tokens=1000)
    assert (plan.stages, plan.accumulation) == ([Stage(128, 100, 7)], 1)


def test_sequences_of_several_lengths_share_the_steps(llama):
    plan = training_plan(llama, train_window="64x50,128x30,256", batch_tokens=512)
    assert plan.stages == [Stage(64, 50, 8), Stage(128, 30, 4), Stage(256, 20, 2)]
    assert plan.sequences == "PoSE" and plan.tokens == 100 * 512
    long = training_plan(llama, train_window="64x99,256", batch_tokens=100)
    assert [long.step_tokens(stage) for stage in long.stages] == [64, 256], "no step is shorter than a sequence"
    big = training_plan(llama, train_window="64x99,256", batch_tokens=4 * 8192)
    assert (big.accumulation, [stage.micro_batch for stage in big.stages]) == (4, [128, 32])
    for wrong in ("64x50,128x51", "64x50,128x49", "64x100,128"):
        with pytest.raises(pi_gguf.errors.OptionError, match="does not divide the 100 steps"):
            training_plan(llama, train_window=wrong)
    for wrong in ("", "64,", "64,128", "64x", "x50,64", "64*50,128", "-64", "64x1.5,128", "64x50,128x50,"):
        with pytest.raises(pi_gguf.errors.OptionError, match="must be tokens, or tokens x steps"):
            training_plan(llama, train_window=wrong)
    with pytest.raises(pi_gguf.errors.OptionError, match="context of 256, got 257"):
        training_plan(llama, train_window="64x50,257")


def test_batches_have_the_lengths_of_their_stage(llama):
    plan = training_plan(llama, steps=6, train_window="32x2,64x3,128", batch_tokens=256)
    texts = {"a.txt": "the quick brown fox " * 60, "b.txt": "one two three " * 20}
    batches = training_batches(load_checkpoint(str(llama)), plan, corpus_of(llama, texts.values()), seed=0)
    assert [max(len(row) for (row,) in batch) for batch in batches] == [32] * 2 + [64] * 3 + [128]
    assert [len(batch) for batch in batches] == [8, 8, 4, 4, 4, 2]


COMMAND = ("--context", "256", "--steps", "30", "--batch-tokens", "256", "--learning-rate", "0.001", "--device", "cpu")


def run_extend(llama, out, text, *more):
    return Command("extend", llama, out, "--data", text, *COMMAND, *more)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    novel = next(iter(pi_gguf.bundled.novels("train").values()))
    path.write_text(novel[:30_000])
    return path


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(llama, tmp_path, text):
    code, _, err = run_extend(llama, tmp_path / "whole", text).wait()
    assert code == 0, err

    killed = run_extend(llama, tmp_path / "killed", text)
    work_dir = tmp_path / "killed.partial"
    deadline = time.time() + 120
    while not list(work_dir.glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.05)
    killed.kill()
    assert not (tmp_path / "killed").exists()

    for step, last_file in ((28, "model.safetensors"), (29, "trainer_state.json")):  # as a kill while saving leaves it
        torn = work_dir / f"checkpoint-{step}"
        torn.mkdir()
        (torn / last_file).write_bytes(b'{"half')

    code, _, err = run_extend(llama, tmp_path / "killed", text, "--seed", "1").wait()
    assert code == 2 and "seed 0, now 1" in err

    code, _, err = run_extend(llama, tmp_path / "killed", text).wait()
    assert code == 0 and "resume from" in err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    start = load_file(llama / "model.safetensors")
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor)
        assert not torch.equal(tensor, start[name]), f"{name} was not trained"
    assert not work_dir.exists()

    code, _, err = run_extend(llama, tmp_path / "killed", text).wait()
    assert code == 0 and "holds this fine-tune already" in err


def test_the_written_folder_opens_with_its_scaling(llama, tmp_path, text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = pi_gguf.extend(
        str(llama), tmp_path / "out", context=4 * WINDOW, data=[str(text)], steps=2, batch_tokens=256, device="cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["factor"] == 4.0
    original = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq * 4, original.model.rotary_emb.inv_freq)
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"]
    record = json.loads((out / "pi_gguf.json").read_text())
    assert (record["steps"], record["tokens"], record["original_window"]) == (2, 512, 64)


def test_an_extended_checkpoint_is_the_same_weights_under_its_own_scaling(llama):
    before = load_checkpoint(str(llama))
    tensors = before.tensors
    after = before.extended(4 * WINDOW)
    assert (before.rope.factor, after.rope.factor) == (1.0, 4.0) and after.original is before is before.original
    assert [c.hf_config.max_position_embeddings for c in (before, after)] == [WINDOW, 4 * WINDOW]
    assert [c.config["max_position_embeddings"] for c in (before, after)] == [WINDOW, 4 * WINDOW]
    assert (
        after.tensors is tensors and after.skeleton is before.skeleton and after.fingerprint() == before.fingerprint()
    )
    frequencies = [c.load_model(dtype=torch.float32).model.rotary_emb.inv_freq for c in (before, after)]
    torch.testing.assert_close(frequencies[1] * 4, frequencies[0])
    again = load_checkpoint(str(llama)).extended(4 * WINDOW)
    assert again.original.tensors is again.tensors, "the files are read once, whoever asks first"
    twice = after.extended(8 * WINDOW)
    assert twice.rope.factor == 8 and twice.original is after and twice.tensors is tensors


def test_a_growing_factor_has_the_angles_of_the_smaller_scaling(llama):
    checkpoint = load_checkpoint(str(llama))
    rope = checkpoint.extended(16 * WINDOW).rope
    assert (rope.grown(0).factor, rope.grown(0.5).factor, rope.grown(1.0)) == (1.0, 4.0, rope)
    half = rope.grown(0.5)
    assert half.max_position_embeddings == 4 * WINDOW
    positions = np.array([0, 1, 7, 255])
    ours, theirs = (
        checkpoint.scaled(scaling)
        .load_model(dtype=torch.float32)
        .model.rotary_emb(torch.zeros(1), torch.from_numpy(given)[None])[0]
        for scaling, given in ((rope, rope.positions_as_under(half, positions)), (half, positions))
    )
    torch.testing.assert_close(ours, theirs)


def test_the_factor_grows_step_by_step_and_reaches_the_whole(llama):
    rope = load_checkpoint(str(llama)).extended(4 * WINDOW).rope
    training = training_plan(llama, batch_tokens=2 * 8192, factor_warmup=2)  # factors 2, 4, then plain
    assert training.accumulation == 2
    rows = [[np.zeros(WINDOW, np.int32)], [np.zeros(WINDOW - 3, np.int32)]]
    for i, (spacing, kind) in {0: (2, "f"), 1: (2, "f"), 2: (1, "f"), 3: (1, "f"), 4: (1, "i")}.items():
        for row, positions in zip(rows, batch_positions(i, rows, rope, training, seed=0), strict=True):
            assert len(positions) == len(row[0]) and positions.dtype.kind == kind, i
            assert np.diff(positions).min() == spacing, i
            assert positions[0] >= 0 and positions[-1] < rope.max_position_embeddings, i


def test_a_growing_factor_trains_otherwise_and_is_recorded(llama, tmp_path, text):
    weights = []
    for steps in (0, 3):
        out = pi_gguf.extend(
            str(llama), tmp_path / f"warm{steps}", context=4 * WINDOW, data=[str(text)], steps=4, batch_tokens=256,
            factor_warmup=steps, device="cpu",
        )  # fmt: skip
        assert json.loads((out / "pi_gguf.json").read_text())["factor_warmup_steps"] == steps
        weights.append(load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(*weights)


def test_a_growing_factor_needs_rows_of_the_original_window(llama):
    assert training_plan(llama, factor_warmup=100).factor_warmup_steps == 100
    assert training_plan(llama, factor_warmup=9, train_window="64x9,128").factor_warmup_steps == 9
    refused = {"from 0 to the 100 steps": {"factor_warmup": 101},
               "original window of 64 tokens": {"factor_warmup": 9, "train_window": 2 * WINDOW},
               "original window of 64 tokens, got 128": {"factor_warmup": 9, "train_window": "64x8,128"}}  # fmt: skip
    for said, options in refused.items():
        with pytest.raises(pi_gguf.errors.OptionError, match=said):
            training_plan(llama, **options)


def test_texts_that_are_used_up_begin_again_in_another_order(llama):
    plan = training_plan(llama, steps=8, train_window="16", batch_tokens=16 * 8)
    corpus = corpus_of(llama, [next(iter(pi_gguf.bundled.novels("train").values()))[:900]])
    batches = training_batches(load_checkpoint(str(llama)), plan, corpus, seed=0)
    rows = [tuple(row) for batch in batches for (row,) in batch]
    once = len(set(rows))
    first, second = rows[:once], rows[once : 2 * once]
    assert 3 < once <= 32 and set(first) == set(second) and first != second


def test_lengths_come_in_turn(llama):
    plan = training_plan(llama, steps=9, train_window="32x2,128+128+64x6,64", batch_tokens=256)
    assert [stage.window for stage in plan.stages for _ in range(stage.steps)] == [32] * 2 + [128, 128, 64] * 2 + [64]
    assert plan.steps_by_window() == {32: 2, 128: 4, 64: 3}
    corpus = corpus_of(llama, [next(iter(pi_gguf.bundled.novels("train").values()))[:20_000]])
    batches = training_batches(load_checkpoint(str(llama)), plan, corpus, seed=0)
    assert [max(len(row) for (row,) in batch) for batch in batches] == [32] * 2 + [128, 128, 64] * 2 + [64]
    rows = [tuple(row) for batch in batches[2:] for (row,) in batch if len(row) == 64]
    assert len(set(rows)) == len(rows), "the short rows go on where their last turn ended"
    for wrong in ("64+x9", "+64", "64+64x", "64++64x9"):
        with pytest.raises(pi_gguf.errors.OptionError, match="must be tokens, or tokens x steps"):
            training_plan(llama, steps=9, train_window=wrong)


def test_answers_of_recall_tasks_weigh_by_the_length_of_the_sequence():
    tiny = load_checkpoint("bundled:tiny")
    tune = TuneOptions(steps=6, train_window="512x3,4096")
    training = plan_training(tiny.extended(8192), tune, Machine("cpu"))
    batches = training_batches(tiny, training, None, seed=0)
    tokenizer = tiny.load_tokenizer()
    found = 0
    for i, batch in enumerate([row for (row,) in batch] for batch in batches):
        text = "".join(tokenizer.decode(row["id"]) for row in batch)
        heavy = "".join(tokenizer.decode(row["id"][row["weight"] > 1]) for row in batch)
        asked = re.findall(r"\? The \w+ key is( \d{5})\.", text)
        assert set(np.concatenate(batch)["weight"]) <= {1.0, 2.0 if i < 3 else 16.0}
        assert set(asked) <= set(re.findall(r" \d{5}", heavy))
        assert len(heavy) <= 6 * (len(asked) + 2 * len(batch)), "an answer may be cut by the end of its row, no more"
        found += len(asked)
    assert found > 20


def test_the_loss_is_the_mean_by_weights(llama):
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    rows = [np.array([(i, 1.0 + i % 3) for i in range(5, 25)], TOKEN), np.array([(9, 7.0), (8, 2.0)], TOKEN)]
    batch = padded([[row] for row in rows], [np.arange(20), np.arange(2)])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(**{k: v for k, v in batch.items() if "label" not in k}).logits, -1)
        told = [(row["weight"][t + 1], -logprobs[i, t, row["id"][t + 1]].item())
                for i, row in enumerate(rows) for t in range(len(row) - 1)]  # fmt: skip
        mean = sum(w * nll for w, nll in told) / sum(w for w, _ in told)
    with chunked_loss(model):  # with gradients; without, the model's own loss is as ever
        assert model(**batch).loss.item() == pytest.approx(mean)
        half = model(**batch, num_items_in_batch=2 * len(told)).loss.item()
        assert half == pytest.approx(mean / 2), "a micro-batch counts by its tokens, whatever they weigh"
    assert "label_weights" not in padded([[np.arange(5, 25)]], [np.arange(20)])
