"""Training texts: where they come from, the cache, rows whose documents do not see each other, mixed lengths."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import WINDOW, corpus_of
from small_families import SHAPES, make_model
from small_families import WINDOW as FAMILY_WINDOW

import pi_gguf
from pi_gguf import texts as texts_module
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import replace_when_complete
from pi_gguf.common.machine import Machine
from pi_gguf.data import rows as rows_module
from pi_gguf.data import tokens as corpus_module
from pi_gguf.data.packing import describe_lengths, pack, pack_alone, pose_positions
from pi_gguf.data.rows import takes_block_mask
from pi_gguf.data.tokens import load_corpus
from pi_gguf.errors import OptionError, TextError
from pi_gguf.families import FAMILIES
from pi_gguf.texts import HUB_DOCUMENTS, LONGEST, hub_documents, open_texts, read_texts
from pi_gguf.tune.batches import batch_positions, padded, training_batches
from pi_gguf.tune.choose import plan_training
from pi_gguf.tune.memory import estimate_training_memory
from pi_gguf.tune.options import TuneOptions
from pi_gguf.tune.plan import Stage
from pi_gguf.tune.processes import Spread

DOCUMENTS = ["One day a ship came in.", "Größe, 船, \U0001f600\nand\tmore.", "The captain went on board. " * 9]


def plan_of(llama, device="cpu", **options):
    checkpoint = load_checkpoint(str(llama))
    tune = TuneOptions(**{"steps": 100, **options})
    return plan_training(checkpoint.extended(4 * WINDOW), tune, Machine(device))


# Where texts come from


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_texts(folder, documents):
    folder.mkdir(parents=True)
    for i, text in enumerate(documents):
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture
def sources(tmp_path):
    """The same documents in every form, by the name of the form."""
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    mixed = write_texts(tmp_path / "mixed" / "inner", DOCUMENTS[:1]).parent
    write_jsonl(mixed / "m.jsonl", rows[1:2])
    write_parquet(mixed / "n.parquet", rows[2:])
    return {
        "files": [str(path) for path in sorted(write_texts(tmp_path / "texts", DOCUMENTS).iterdir())],
        "folder": [str(tmp_path / "texts")],
        "jsonl": [str(write_jsonl(tmp_path / "rows.jsonl", [*rows[:2], {"text": " "}, rows[2], {"text": None}]))],
        "parquet": [str(write_parquet(tmp_path / "rows.parquet", [*rows, {"id": 3, "text": None}]))],
        "folder of all": [str(mixed)],
        "given twice": [str(tmp_path / "texts"), str(tmp_path / "texts" / "1.txt")],
    }


def test_every_form_gives_the_same_tokens(llama, sources, tmp_path):
    checkpoint = load_checkpoint(str(llama))
    wanted = corpus_of(llama, DOCUMENTS)
    for form, names in sources.items():
        corpus = load_corpus(checkpoint, open_texts(names), tmp_path)
        assert len(corpus) == len(DOCUMENTS), form
        for i in range(len(DOCUMENTS)):
            np.testing.assert_array_equal(corpus[i], wanted[i], form)
            assert corpus[i].dtype == np.int32 and corpus[i][0] == 0 and corpus[i][-1] == 1
        assert corpus.lengths.tolist() == [len(wanted[i]) for i in range(len(DOCUMENTS))]


def test_a_folder_laid_out_as_a_data_set_is_streamed_by_the_library_of_the_hub(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in DOCUMENTS])
    write_jsonl(folder / "test.jsonl", [{"text": "held out"}, {"text": None}])
    stream = hub_documents(str(folder), None)
    assert next(stream) == DOCUMENTS[0]
    assert list(stream) == DOCUMENTS[1:]
    assert list(hub_documents(f"{folder}:test", None)) == ["held out"]
    with pytest.raises(TextError, match="data set cannot be read"):
        list(hub_documents(f"{folder}:validation", None))


def test_the_code_of_a_data_set_is_not_run(tmp_path):
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    folder.mkdir()
    (folder / "hostile.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(TextError, match="cannot be read"):
        list(hub_documents(str(folder), None))
    assert not marker.exists()


def test_a_data_set_of_the_hub_without_a_network_is_an_error(cli, llama, tmp_path):
    for name in ("someone/books", "someone/books:test"):
        code, _, err = cli("extend", llama, tmp_path / "out", "--context", "256", "--steps", "1", "--data", name)
        assert code == 5 and f"error: {name}: no such file or folder" in err and "Hub" in err
        assert list(tmp_path.iterdir()) == []


def test_the_commit_of_a_data_set_is_part_of_the_hash_and_given_to_the_library(monkeypatch):
    asked = []
    monkeypatch.setattr(texts_module, "hub_documents", lambda name, revision: asked.append((name, revision)) or [])
    hashes = []
    for revision in ("a1", "b2"):
        monkeypatch.setattr(texts_module, "_hub_revision", lambda name, revision=revision: revision)
        found = open_texts(["someone/books:test"])
        assert found.names == found.labels == ["someone/books:test"]
        assert list(found.read(LONGEST)) == []
        hashes.append(found.sha256)
    assert asked == [("someone/books:test", "a1"), ("someone/books:test", "b2")] and hashes[0] != hashes[1]


BROKEN = {
    "no field": (".jsonl", b'{"id": 1, "n": 2}\n', ":1: must have a field text, its fields are: id, n"),
    "no JSON": (".jsonl", b'{"text": "a"}\n{"text": \n', ":2: no JSON"),
    "no object": (".jsonl", b'["text"]\n', ":1: must be an object with a field text, got list"),
    "a number": (".jsonl", b'{"text": 5}\n', ":1: text must be a string, got int"),
    "half a surrogate": (".jsonl", b'{"text": "\\ud800"}\n', ":1: text is no valid Unicode"),
    "not UTF-8": (".jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8"),
    "nested too deep": (".jsonl", b"[" * 200_000 + b"\n", ":1: no JSON"),
    "no rows": (".jsonl", b"", ": there is no text in it"),
    "only blank rows": (".jsonl", b'{"text": " "}\n{"text": null}\n', ": there is no text in it"),
    "no Parquet": (".parquet", b"PAR1 but not really", ": no readable Parquet"),
    "empty": (".parquet", b"", ": no readable Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_is_an_error_that_names_it(cli, llama, tmp_path, kind):
    suffix, data, says = BROKEN[kind]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    code, _, err = cli("extend", llama, tmp_path / "out", "--context", "256", "--steps", "1", "--data", path)
    assert code == 5 and f"error: {path}{says}" in err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tables_without_the_field_say_which_one_to_rename(tmp_path):
    rows = [{"n": 1, "body": "a text"}]
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "b.parquet", rows)):
        with pytest.raises(TextError, match="its fields are: n, body") as error:
            list(open_texts([str(path)]).read(LONGEST))
        assert error.value.hint == "rename body to text"
    truncated = tmp_path / "c.parquet"
    truncated.write_bytes(write_parquet(tmp_path / "b.parquet", [{"text": "a"}] * 9).read_bytes()[:-20])
    with pytest.raises(TextError, match="no readable Parquet"):
        list(open_texts([str(truncated)]).read(LONGEST))


def test_a_missing_file_is_not_taken_for_a_data_set(tmp_path):
    for name in ("books/one.txt", "books/rows.jsonl", "books/rows.parquet", "nothing", "a/b/c", str(tmp_path / "x")):
        with pytest.raises(TextError, match=r"no such file or folder$"):
            open_texts([name])
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(TextError, match=r"no \.txt or \.md or \.jsonl or \.parquet files"):
        open_texts([str(tmp_path)])


# The cache


@pytest.fixture
def tokenized(monkeypatch):
    """Count how many documents are tokenized."""
    seen = []

    def counting(checkpoint):
        encode = encoder(checkpoint)
        return lambda batch: seen.extend(batch) or encode(batch)

    encoder = corpus_module.encoder
    monkeypatch.setattr(corpus_module, "encoder", counting)
    return seen


def same(corpus, wanted):
    return len(corpus) == len(wanted) and all(np.array_equal(corpus[i], wanted[i]) for i in range(len(wanted)))


def test_texts_are_tokenized_once(llama, llama_copy, sources, tmp_path, tokenized):
    checkpoint, texts, folder = load_checkpoint(str(llama)), sources["jsonl"], tmp_path / "work"
    folder.mkdir()
    first = load_corpus(checkpoint, open_texts(texts), folder)
    assert len(tokenized) == len(DOCUMENTS)
    again = load_corpus(checkpoint, open_texts(texts), folder)
    assert len(tokenized) == len(DOCUMENTS) and same(again, first)
    assert len(list(folder.iterdir())) == 1

    write_jsonl(tmp_path / "rows.jsonl", [{"text": "Another text."}])  # other texts are another cache
    assert len(load_corpus(checkpoint, open_texts(texts), folder)) == 1
    settings = llama_copy / "tokenizer.json"  # and so is another tokenizer
    settings.write_text(settings.read_text() + "\n")
    load_corpus(load_checkpoint(str(llama_copy)), open_texts(texts), folder)
    assert len(tokenized) == len(DOCUMENTS) + 2
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", ["ids cut", "ids gone", "offsets cut", "offsets gone", "offsets zero", "offsets mixed up", "only begun"]
)
def test_a_torn_cache_is_made_again(llama, sources, tmp_path, tokenized, damage):
    checkpoint, texts, folder = load_checkpoint(str(llama)), open_texts(sources["folder"]), tmp_path / "work"
    folder.mkdir()
    wanted = corpus_of(llama, DOCUMENTS)
    load_corpus(checkpoint, texts, folder)
    (cache,) = folder.iterdir()
    ids, offsets = cache / "ids.bin", cache / "offsets.npy"
    if damage == "ids cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "offsets cut":
        offsets.write_bytes(offsets.read_bytes()[:-8])
    elif damage == "offsets zero":
        np.save(offsets, np.zeros(4, np.int64))
    elif damage == "offsets mixed up":
        np.save(offsets, np.load(offsets)[[0, 2, 1, 3]])
    elif damage == "only begun":  # as a kill while writing leaves it
        child = os.fork()
        if not child:
            with replace_when_complete(cache) as partial:
                cache.rename(partial)
                (partial / "offsets.npy").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert [path.name for path in folder.iterdir()] == [f"{cache.name}.partial"]
    else:
        (ids if damage == "ids gone" else offsets).unlink()
    tokenized.clear()
    assert same(load_corpus(checkpoint, texts, folder), wanted)
    assert len(tokenized) == len(DOCUMENTS)
    assert [path.name for path in folder.iterdir()] == [cache.name]


def test_a_run_that_goes_on_does_not_tokenize_again(llama, tmp_path, tokenized, monkeypatch):
    from pi_gguf.tune import extend as finetune

    text = tmp_path / "text.txt"
    text.write_text(DOCUMENTS[2] * 20)

    def stopped(run):
        (run.work_dir / "checkpoint-1").mkdir(exist_ok=True)
        (run.work_dir / "checkpoint-1" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run_training", stopped)
    options = {"context": 256, "data": [str(text)], "steps": 1, "device": "cpu"}
    for seed, overwrite in ((0, False), (0, False), (1, True)):
        with pytest.raises(KeyboardInterrupt):
            pi_gguf.extend(str(llama), tmp_path / "out", seed=seed, overwrite=overwrite, **options)
    assert len(tokenized) == 1
    record = json.loads((tmp_path / "out.partial" / "run.json").read_text())
    assert (record["data"], record["packing"], record["longest_first"]) == (["text.txt"], "isolate", False)


# Rows


def test_texts_too_short_for_the_window_are_counted_by_length(llama):
    corpus = corpus_of(llama, ["a", "b", "one two three " * 4, "the ship " * 5])
    by_hand = {}
    for n in corpus.lengths.tolist():
        bound = next(power for power in (1, 2, 4, 8, 16, 32, 64, 128) if n <= power)
        by_hand.setdefault(bound, []).append(n)
    with pytest.raises(TextError) as error:
        training_batches(load_checkpoint(str(llama)), plan_of(llama), corpus, 0)
    assert f"fewer than the training window of {WINDOW}" in str(error.value)
    for bound, found in by_hand.items():
        noun = "document" if len(found) == 1 else "documents"
        assert f"<={bound}: {len(found)} {noun}, {sum(found)} tokens" in str(error.value)
    assert str(int(corpus.lengths.max())) in error.value.hint
    assert describe_lengths([1024, 1025, 1500, 700, 9000], 1500) == (
        "<=1024: 2 documents, 1,724 tokens; <=1500: 2 documents, 2,525 tokens; >1500: 1 document, 9,000 tokens"
    )


def test_the_papers_texts_are_read_by_name(tmp_path, monkeypatch):
    """From a folder laid out as the data set of the Hub that the name stands for; only its commit is not asked for."""
    texts = ["too short", *(f"{i} " + "word " * 100 for i in range(HUB_DOCUMENTS + 3))]
    (tmp_path / "emozilla" / "pg19").mkdir(parents=True)
    write_jsonl(tmp_path / "emozilla" / "pg19" / "test.jsonl", [{"text": text} for text in texts])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pi_gguf.texts._hub_revision", lambda name: None)
    found = read_texts(["pg19"], characters=400)
    assert list(found.values()) == texts[1 : HUB_DOCUMENTS + 1] and next(iter(found)) == "pg19 1"
    with pytest.raises(TextError, match="pg19: no document has 4000 characters"):
        read_texts(["pg19"], characters=4000)


def test_rows_of_tables_are_documents_to_evaluate_on(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert read_texts([str(tmp_path / "a.jsonl")]) == {f"{tmp_path}/a.jsonl:1": "one", f"{tmp_path}/a.jsonl:2": "two"}


def test_a_mix_needs_a_document_of_the_whole_window(llama):
    corpus = corpus_of(llama, ["the quick brown fox " * 15])
    training_batches(load_checkpoint(str(llama)), plan_of(llama), corpus, 0)
    with pytest.raises(TextError, match="training window of 256"):
        training_batches(load_checkpoint(str(llama)), plan_of(llama, mix=0.1), corpus, 0)


def isolated_row(lengths, seed=0):
    rng = np.random.default_rng(seed)
    row = [rng.integers(2, 400, n).astype(np.int32) for n in lengths]
    return row, np.concatenate([pose_positions(n, 256, rng) for n in lengths])


@pytest.mark.parametrize("packing", ["isolate", "join"])
def test_no_document_learns_from_another_in_its_row(llama, packing):
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    lengths = (20, 25, 1, 10)
    row, positions = isolated_row(lengths)
    if packing == "join":
        row = [np.concatenate(row)]
    batch = padded([row, [np.arange(2, 42)]], [positions, np.arange(40)])
    assert batch["attention_mask"].ndim == (4 if packing == "isolate" else 2)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    labels, ends = batch.pop("labels"), np.cumsum(lengths)
    for first, last in zip(ends - lengths, ends, strict=True):
        if last - first == 1:
            continue
        given = embeddings.detach().requires_grad_()
        own = torch.full_like(labels, -100)
        own[0, first:last] = labels[0, first:last]
        model(inputs_embeds=given, labels=own, use_cache=False, **batch).loss.backward()
        assert (given.grad[0, first : last - 1].abs().sum(-1) > 0).all()  # the last token of all predicts nothing
        others = torch.cat([given.grad[0, :first], given.grad[0, last:], given.grad[1]])
        if packing == "isolate":
            assert others.abs().max() == 0
    if packing == "join":
        assert given.grad[0, : ends[2]].abs().max() > 0, "this test cannot fail"


def test_labels_begin_behind_the_first_token_of_each_later_document():
    row, positions = isolated_row((3, 1, 4))
    batch = padded([row, row[:1]], [positions, positions[:3]])
    ids = np.concatenate(row)
    assert batch["labels"][0].tolist() == [*ids[:3], -100, -100, *ids[5:]]
    assert batch["labels"][1].tolist() == [*ids[:3], *[-100] * 5]
    mask = batch["attention_mask"]
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 8, 8)
    blocks = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask[0, 0, :3, :3].int().tolist() == blocks and mask[0, 0, :3, 3:].sum() == mask[0, 0, 3:, :3].sum() == 0
    assert mask.any(-1).all(), "a row without anything to attend to would be not a number"
    assert padded([row[:1], row[2:]], [positions[:3], positions[4:]])["attention_mask"].tolist() == [
        [1, 1, 1, 0],
        [1] * 4,
    ]


@pytest.mark.parametrize("family", [name for name in SHAPES if not FAMILIES[name].alibi])
def test_a_document_in_a_row_is_computed_as_if_it_were_alone(family, tmp_path):
    checkpoint = load_checkpoint(str(make_model(tmp_path / "model", family, {})))
    assert takes_block_mask(checkpoint) == (family not in ("gemma2", "gemma3_text"))
    if not takes_block_mask(checkpoint):
        return
    model = checkpoint.extended(4 * FAMILY_WINDOW).load_model(dtype=torch.float32).eval()
    row, positions = isolated_row((20, 25, 10))
    with torch.inference_mode():
        together = padded([row], [positions])
        del together["labels"]
        logits = model(**together).logits[0]
        for i, first in enumerate((0, 20, 45)):
            alone = padded([row[i : i + 1]], [positions[first : first + len(row[i])]])
            del alone["labels"]
            torch.testing.assert_close(
                logits[first : first + len(row[i])], model(**alone).logits[0], atol=1e-3, rtol=1e-3
            )


def test_a_router_that_wants_the_mask_of_padding_gets_rows_of_one_document(tmp_path):
    folder = make_model(tmp_path / "model", "olmoe", {"output_router_logits": True})
    assert not takes_block_mask(load_checkpoint(str(folder)))


def test_positions_begin_anew_for_each_document_and_cover_every_distance(llama):
    rope = load_checkpoint(str(llama)).extended(4 * WINDOW).rope
    training = plan_of(llama, train_window=2 * WINDOW)
    distances = set()
    row = [np.zeros(n, np.int32) for n in (WINDOW, 40, 24)]
    for i in range(1500):
        (positions,) = batch_positions(i, [row], rope, training, seed=0)
        assert len(positions) == 2 * WINDOW
        for first, last in ((0, 64), (64, 104), (104, 128)):
            own = positions[first:last]
            assert own[0] == 0 and own[-1] < 4 * WINDOW and (np.diff(own) >= 1).all() and (np.diff(own) > 1).sum() <= 1
            if first == 64:
                distances |= set((own[:, None] - own[None, :]).ravel().tolist())
    assert {d for d in distances if d > 0} == set(range(1, 4 * WINDOW))


def test_rows_hold_whole_documents_and_isolation_keeps_them_apart(llama):
    texts = [f"text number {i} " * 9 for i in range(7)] + ["the quick brown fox " * 40]
    corpus, checkpoint = corpus_of(llama, texts), load_checkpoint(str(llama))
    plan = plan_of(llama, steps=4, batch_tokens=512, train_window=128)
    isolated, joined = (training_batches(checkpoint, plan, corpus, 0, packing=p) for p in ("isolate", "join"))
    assert any(len(row) > 1 for batch in isolated for row in batch)
    for apart, together in zip(isolated, joined, strict=True):
        for row, (one,) in zip(apart, together, strict=True):
            np.testing.assert_array_equal(np.concatenate(row), one)
    ends = [row for batch in isolated for row in batch if len(row) > 1]
    assert all(piece[0] == 0 for row in ends for piece in row[:-1])  # each begins with the first token of a text


def test_long_rows_hold_one_document_each(llama, monkeypatch, capfd):
    texts = ["a b c d e f " * n for n in (1, 2, 8, 30, 100)]
    corpus = corpus_of(llama, texts)
    monkeypatch.setattr(rows_module, "MASKED_TOKENS", 127)
    plan = plan_of(llama, steps=3, train_window="64x1,128")
    first, *others = training_batches(load_checkpoint(str(llama)), plan, corpus, 0, packing="isolate")
    assert any(len(row) > 1 for row in first)
    assert all(len(row) == 1 and len(row[0]) >= 64 for batch in others for row in batch)
    assert "a row of 128 tokens holds one document" in capfd.readouterr().err
    rows = list(pack_alone([np.arange(300), np.arange(63), np.arange(64)], 128))
    assert [len(row[0]) for row in rows] == [128, 128, 64]


def test_the_longest_documents_come_first(llama):
    corpus = corpus_of(llama, [f"{i} " * n for i, n in enumerate((3, 60, 5, 33, 20, 9, 31, 2, 44))])
    plan = plan_of(llama, steps=2, batch_tokens=64, train_window=64)
    checkpoint = load_checkpoint(str(llama))
    chosen = training_batches(checkpoint, plan, corpus, 3, packing="isolate", longest_first=True)
    order = np.argsort(-corpus.lengths)
    wanted = [row for row, _ in zip(pack([corpus[i] for i in order], 64), range(2), strict=False)]
    assert sorted(len(row[0]) for batch in chosen for row in batch) == sorted(len(row[0]) for row in wanted)
    at_random = training_batches(checkpoint, plan, corpus, 3, packing="isolate")
    assert sum(len(row) for batch in at_random for row in batch) > sum(len(row) for batch in chosen for row in batch)


# Mixed lengths


@pytest.mark.parametrize("mix", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("batch_tokens", [64, 256, 4 * 8192])
@pytest.mark.parametrize("train_window", [None, "32x30,64x50,128", "64x20,128+32"])
def test_a_mix_has_its_share_of_the_tokens_spread_evenly(llama, mix, batch_tokens, train_window):
    plan = plan_of(llama, mix=mix, batch_tokens=batch_tokens, train_window=train_window)
    assert plan.sequences == "PoSE and full length" and plan.full_window == 256
    full = plan.full_micro_batch * 256
    shorts = [stage.micro_batch * stage.window for stage in plan.stages for _ in range(stage.steps * plan.accumulation)]
    tokens = np.where(plan.full_length, full, shorts)
    assert plan.tokens == tokens.sum() == sum(plan.tokens_by_window().values())
    assert plan.tokens_by_window()[256] == full * plan.full_micro_batches == full * sum(plan.full_length)
    so_far = np.cumsum(np.where(plan.full_length, full, 0)) - mix * np.cumsum(tokens)
    assert np.abs(so_far).max() <= max(full, *shorts), "never further from the share than one micro-batch"
    if len(plan.stages) == 1:
        gaps = np.diff(np.flatnonzero(plan.full_length))
        assert gaps.max() - gaps.min() <= 1


def test_a_mix_that_rounds_to_nothing_is_refused(llama):
    with pytest.raises(OptionError, match=r"mix 0\.01 of the run's 64 tokens is not one micro-batch of 256 tokens"):
        plan_of(llama, mix=0.01, steps=1, batch_tokens=64)


def test_a_mix_is_in_the_batches_and_in_the_memory(llama):
    plan = plan_of(llama, steps=8, mix=0.5, batch_tokens=256)
    assert plan.stages == [Stage(64, 8, 4)] and plan.full_micro_batches == 4 and plan.tokens == 8 * 256
    corpus = corpus_of(llama, ["the quick brown fox " * 400])
    batches = training_batches(load_checkpoint(str(llama)), plan, corpus, 0, packing="isolate")
    lengths = [[len(row[0]) for row in batch] for batch in batches]
    assert sorted(lengths) == [[64] * 4] * 4 + [[256]] * 4
    assert [256 in found for found in lengths] == plan.full_length
    rope = load_checkpoint(str(llama)).extended(4 * WINDOW).rope
    for i, batch in enumerate(batches):
        for row, positions in zip(batch, batch_positions(i, batch, rope, plan, 0), strict=True):
            assert len(row[0]) == 64 or positions.tolist() == list(range(256))
    checkpoint = load_checkpoint(str(llama))
    small, large = (plan_of(llama, mix=mix, batch_tokens=64) for mix in (0.0, 0.1))
    whole = plan_of(llama, train_window=256, batch_tokens=64)
    memory = [estimate_training_memory(checkpoint, p, Machine("cpu"), Spread()) for p in (small, large, whole)]
    assert memory[0] < memory[1] == memory[2]


def test_the_bundled_mixture_can_be_isolated_and_mixed():
    tiny = load_checkpoint("bundled:tiny")
    tune = TuneOptions(steps=8, train_window=512, batch_tokens=4096, mix=0.5)
    plan = plan_training(tiny.extended(4096), tune, Machine("cpu"))
    batches = training_batches(tiny, plan, None, 0, packing="isolate")
    assert [len(batch) == 1 for batch in batches] == plan.full_length
    assert any(len(row) > 1 for batch in batches for row in batch)
    heaviest = {max(piece["weight"].max() for row in batch for piece in row) for batch in batches}
    assert heaviest <= {1.0, 2.0, 16.0} and 16.0 in heaviest, "answers weigh by the length of their sequence"


def test_recall_tasks_have_their_share_beside_the_texts():
    tiny = load_checkpoint("bundled:tiny")
    texts = [corpus_of("bundled:tiny", ["fox " * 4000]), corpus_of("bundled:tiny", ["dog " * 4000])]
    texts[0].weight = 3.0
    tune = TuneOptions(steps=20, train_window=256, batch_tokens=4096)
    plan = plan_training(tiny.extended(4096), tune, Machine("cpu"))
    rows = [row for batch in training_batches(tiny, plan, texts, 0, recall=0.4) for row in batch]
    tokenizer, of = tiny.load_tokenizer(), {"fox": 0, "dog": 0, "recall": 0}
    for (piece,) in rows:
        of["recall" if piece.dtype.names else "fox" if "fox" in tokenizer.decode(piece) else "dog"] += len(piece)
    shares = {what: count / sum(of.values()) for what, count in of.items()}
    assert shares == pytest.approx({"fox": 0.45, "dog": 0.15, "recall": 0.4}, abs=0.02)
    asked = [piece for (piece,) in rows if piece.dtype.names]
    assert max(map(len, asked)) == 256 and np.mean([*map(len, asked)]) > 200, "rows are full of tasks"
    keys = [" key is " in tokenizer.decode(piece["id"]) for piece in asked]
    assert sum(keys) > 0.9 * len(keys), "a passage of a novel is none"


def test_recall_tasks_are_beside_texts(tmp_path):
    with pytest.raises(OptionError, match=r"recall must be from 0 to below 1, got 1.0"):
        TuneOptions(recall=1.0)
    with pytest.raises(OptionError, match=r"recall is beside texts, got 0.3"):
        pi_gguf.extend("bundled:tiny", tmp_path / "out", context=4096, steps=1, recall=0.3)
    assert not [*tmp_path.iterdir()]


def test_a_run_with_recall_tasks_says_so_and_is_another_one(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    run = {"context": 4096, "steps": 1, "train_window": 128, "batch_tokens": 1024, "device": "cpu"}
    run |= {"data": [str(tmp_path / "text.txt")], "report_to": "none"}
    losses = []
    for share in (0.0, 0.5):
        out = pi_gguf.extend("bundled:tiny", tmp_path / f"out-{share}", recall=share, **run)
        record = json.loads((out / "pi_gguf.json").read_text())
        assert record.get("recall") == (share or None) and "options" not in record
        losses.append(record["loss"])
    assert losses[0] != losses[1]
    with pytest.raises(OptionError, match=r"out-0.5"):
        pi_gguf.extend("bundled:tiny", tmp_path / "out-0.5", recall=0.25, **run)


def test_a_row_of_which_nothing_is_predicted_is_left_out(llama):
    corpus = corpus_of(llama, ["a b c d e f " * 20])
    corpus = type(corpus)(corpus[0][:65], np.array([0, 65]), "text")  # rows of 64 tokens and of one
    plan = plan_of(llama, steps=8, batch_tokens=64)
    for packing in ("isolate", "join"):
        batches = training_batches(load_checkpoint(str(llama)), plan, corpus, 0, packing=packing)
        assert [len(batch[0][0]) for batch in batches] == [64] * 8


def test_a_step_with_a_mix_is_no_longer_than_it_is_asked_for(llama):
    checkpoint = load_checkpoint(str(llama))
    tune = TuneOptions(steps=10, batch_tokens=32768, mix=0.5)
    plan = plan_training(checkpoint.extended(16384), tune, Machine("cpu"))
    assert (plan.accumulation, plan.full_micro_batch) == (2, 1) and plan.tokens == 10 * 32768


def test_a_mix_is_in_the_plan_that_is_printed(cli, llama):
    code, out, _ = cli("plan", llama, "--context", "256", "--mix", "0.25", "--batch-tokens", "256", "--device", "cpu")
    assert code == 0 and "25 of 100" not in out
    assert "250 of 1000 micro-batches are 1 x 256 tokens, 25.0% of all" in out
    code, out, _ = cli("plan", llama, "--context", "256", "--mix", "0.25", "--json", "--device", "cpu")
    training = json.loads(out)["training"]
    assert (training["mix"], training["full_window"]) == (0.25, 256)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mix": -0.1}, "mix must be from 0 to below 1, got -0.1"),
        ({"mix": 1.0}, "mix must be from 0 to below 1, got 1.0"),
        ({"mix": float("nan")}, "mix must be from 0 to below 1, got nan"),
        ({"mix": float("inf")}, "mix must be from 0 to below 1, got inf"),
        ({"mix": 0.1, "train_window": 256}, "shorter than the context of 256"),
        ({"mix": 0.1, "train_window": "64x50,256"}, "shorter than the context of 256"),
        ({"mix": 0.1, "factor_warmup": 10}, "mix and factor-warmup exclude each other"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(llama, options, says):
    with pytest.raises(OptionError, match=says):
        plan_of(llama, **options)


@pytest.mark.parametrize("command", ["extend", "convert"])
def test_options_of_the_data_that_cannot_work(cli, llama, tmp_path, command):
    out = tmp_path / ("out.gguf" if command == "convert" else "out")
    for options, says in {
        ("--packing", "blend"): "packing must be isolate or join, got blend",
        ("--mix", "1.5"): "mix must be from 0 to below 1, got 1.5",
    }.items():
        code, _, err = cli(command, llama, out, "--context", "256", "--steps", "2", *options)
        assert code == 2 and f"error: {says}" in err
    code, _, err = cli(command, llama, out, "--context", "256", "--mix", "much")
    assert code == 2 and "not a valid float" in err
    code, _, err = cli(command, "bundled:tiny", out, "--context", "4096", "--steps", "2", "--longest-first")
    assert code == 2 and "longest-first is for documents of yours" in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_all_of_it(llama, tmp_path):
    """Isolated documents, mixed lengths and the longest first, through the trainer to a written folder."""
    rows = [{"text": "The captain went on board. " * n} for n in (1, 3, 5, 7, 60, 90)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = pi_gguf.extend(
        str(llama), tmp_path / "out", context=256, data=[str(data)], steps=4, batch_tokens=256, mix=0.5,
        longest_first=True, device="cpu",
    )  # fmt: skip
    record = json.loads((out / "pi_gguf.json").read_text())
    assert (record["mix"], record["packing"], record["longest_first"]) == (0.5, "isolate", True)
    assert record["full_micro_batches"] == 2
    assert np.isfinite(record["loss"]) and not (tmp_path / "out.partial").exists()
    shutil.rmtree(out)
    joined = pi_gguf.extend(
        str(llama), tmp_path / "out", context=256, data=[str(data)], steps=4, batch_tokens=256, packing="join",
        device="cpu",
    )  # fmt: skip
    assert json.loads((joined / "pi_gguf.json").read_text())["packing"] == "join"
