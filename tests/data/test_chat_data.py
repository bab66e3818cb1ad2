"""Conversations and weighed sources as training data: read, cached, packed, and what of them the loss counts."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from children import Command
from helpers import WINDOW, make_chat_model
from torch.nn.functional import cross_entropy

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.machine import Machine
from pi_gguf.data.tokens import TOKEN, load_corpus
from pi_gguf.errors import OptionError, TextError
from pi_gguf.texts import Conversation, open_mixture, open_texts, read_texts, shares, weighed
from pi_gguf.tune.batches import batch_positions, padded, training_batches
from pi_gguf.tune.choose import plan_training
from pi_gguf.tune.losses import chunked_loss
from pi_gguf.tune.options import TuneOptions

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [("user", f"Question {i}, how long was the ship?"), ("assistant", f"It was {i} feet. " * (1 + i % 4)),
     ("user", "And the captain?"), ("assistant", "He went on board.")]
    for i in range(12)
]  # fmt: skip
TEXTS = ["The captain went on board. " * n for n in (3, 9, 30, 60)]


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    """A small Llama with ChatML's template. Not to be changed by a test."""
    path = shutil.copytree(llama, tmp_path_factory.mktemp("chat") / "model")
    return make_chat_model(path, TEMPLATE, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")


def as_messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(chat):
    """The text of a conversation, and of each of its characters whether it is an answer's."""
    text, counted = "", []
    for role, content in chat:
        head, body = f"<|im_start|>{role}\n", f"{content}<|im_end|>"
        text += head + body + "\n"
        counted += [False] * len(head) + [role == "assistant"] * len(body) + [False]
    return text, counted


def by_hand(model, chat):
    """Ids, and whether each counts, by characters."""
    text, counted = written(chat)
    tokenizer = load_checkpoint(str(model)).load_tokenizer()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [counted[first] for first, _ in encoded["offset_mapping"]]


def cached(checkpoint, texts, folder, **options):
    folder.mkdir(exist_ok=True)
    return load_corpus(checkpoint, texts, folder, **options)


def plan_of(model, **options):
    tune = TuneOptions(**{"steps": 8, "batch_tokens": 256, **options})
    return plan_training(load_checkpoint(str(model)).extended(4 * WINDOW), tune, Machine("cpu"))


@pytest.fixture
def sources(tmp_path):
    """The same conversations in every form."""
    rows = [{"id": i, "messages": as_messages(chat)} for i, chat in enumerate(CHATS)]
    speakers = {"user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": speakers[role], "value": content} for role, content in chat]} for chat in CHATS
    ]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=5)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows[:7])
    write_jsonl(folder / "b.jsonl", shared[7:])
    return {
        "messages": write_jsonl(tmp_path / "m.jsonl", [*rows, {"messages": []}, {"messages": None}]),
        "ShareGPT": write_jsonl(tmp_path / "s.jsonl", shared),
        "Parquet": tmp_path / "p.parquet",
        "folder": folder,
    }


def test_every_form_gives_the_same_tokens_and_the_same_of_them_count(model, sources, tmp_path):
    checkpoint = load_checkpoint(str(model))
    for form, path in sources.items():
        texts = open_texts([str(path)])
        assert texts.chats, form
        corpus = cached(checkpoint, texts, tmp_path)
        assert len(corpus) == len(CHATS), form
        for i, chat in enumerate(CHATS):
            ids, counted = by_hand(model, chat)
            assert corpus[i].dtype == np.dtype(TOKEN)
            assert corpus[i]["id"].tolist() == ids and corpus[i]["weight"].tolist() == counted, form
            place = corpus.place(i)
            assert corpus.tokens(place[3:20]).tolist() == corpus[i][3:20].tolist()
            assert corpus.teaches([place]) and not corpus.teaches([place[:5], place[5:8]])


def test_with_all_that_counts_no_mask_is_kept(model, sources, tmp_path):
    checkpoint, texts = load_checkpoint(str(model)), open_texts([str(sources["messages"])])
    corpus = cached(checkpoint, texts, tmp_path / "all", loss="all")
    assert [corpus[i].tolist() for i in range(len(CHATS))] == [by_hand(model, chat)[0] for chat in CHATS]
    (cache,) = (tmp_path / "all").iterdir()
    assert sorted(path.name for path in cache.iterdir()) == ["ids.bin", "offsets.npy"]


def test_the_mask_is_bits_beside_the_ids_and_a_torn_one_is_made_again(model, sources, tmp_path):
    checkpoint, texts, folder = load_checkpoint(str(model)), open_texts([str(sources["messages"])]), tmp_path / "work"
    corpus = cached(checkpoint, texts, folder)
    (cache,) = folder.iterdir()
    counted = [one for chat in CHATS for one in by_hand(model, chat)[1]]
    bits = (cache / "counted.bin").read_bytes()
    assert len(bits) == -(-len(counted) // 8) == -(-int(corpus.lengths.sum()) // 8)
    assert np.unpackbits(np.frombuffer(bits, np.uint8))[: len(counted)].tolist() == counted
    wanted = [corpus[i].tolist() for i in range(len(corpus))]
    for damage in (bits[:-1], None):
        (cache / "counted.bin").unlink()
        if damage is not None:
            (cache / "counted.bin").write_bytes(damage)
        again = cached(checkpoint, texts, folder)
        assert [again[i].tolist() for i in range(len(again))] == wanted
    assert (cache / "counted.bin").read_bytes() == bits
    inode = (cache / "ids.bin").stat().st_ino
    cached(checkpoint, texts, folder)
    assert (cache / "ids.bin").stat().st_ino == inode, "a sound one is used"


def test_answers_that_the_template_writes_otherwise_later_are_counted(model, tmp_path, capfd):
    """One that leaves earlier answers out, as Qwen 3 does with thoughts."""
    shortened = TEMPLATE.replace("m.content", "(m.content if loop.last or m.role != 'assistant' else '')")
    assert shortened != TEMPLATE
    other = make_chat_model(
        shutil.copytree(model, tmp_path / "other"), shortened, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"
    )
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    texts = open_texts([str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns[:2]}, {"messages": turns}]))])
    assert len(cached(load_checkpoint(str(other)), texts, tmp_path / "work")) == 2
    said = capfd.readouterr().err
    assert "1 of 3 answers do not count: " in said and "a.jsonl:2" in said


def test_another_template_or_loss_is_another_cache(model, sources, tmp_path):
    texts, folder = open_texts([str(sources["messages"])]), tmp_path / "work"
    other = shutil.copytree(model, tmp_path / "other")
    make_chat_model(other, TEMPLATE.replace("\n{{", "\n> {{"), ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    cached(load_checkpoint(str(model)), texts, folder)
    cached(load_checkpoint(str(model)), texts, folder, loss="all")
    cached(load_checkpoint(str(other)), texts, folder)
    assert len(list(folder.iterdir())) == 3


def test_of_texts_among_conversations_everything_counts(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    chats = write_jsonl(tmp_path / "b.jsonl", [{"messages": as_messages(chat)} for chat in CHATS[:2]])
    corpus = cached(load_checkpoint(str(model)), open_texts([str(tmp_path)]), tmp_path / "work")
    assert len(corpus) == 3 and chats.exists()
    assert corpus[0]["weight"].all() and 0 < corpus[1]["weight"].mean() < 1


def test_conversations_without_an_answer_are_left_out_and_counted(model, tmp_path, capfd):
    rows = [{"messages": as_messages(chat)} for chat in (CHATS[0], CHATS[1][:1], CHATS[2][:3], CHATS[3][2:3])]
    texts = open_texts([str(write_jsonl(tmp_path / "a.jsonl", rows))])
    assert len(cached(load_checkpoint(str(model)), texts, tmp_path / "work")) == 2
    assert "2 conversations without an answer that counts are left out" in capfd.readouterr().err
    silent = open_texts([str(write_jsonl(tmp_path / "b.jsonl", rows[1:2]))])
    with pytest.raises(TextError, match="there is no answer in it"):
        cached(load_checkpoint(str(model)), silent, tmp_path / "work")
    assert len(cached(load_checkpoint(str(model)), silent, tmp_path / "work", loss="all")) == 1


def test_the_first_row_says_what_a_file_holds(tmp_path):
    chat, text = {"messages": as_messages(CHATS[0])}, {"text": TEXTS[0]}
    for rows, said in (
        ([chat, text], ":2: must have a field messages, its"),
        ([text, chat], ":2: must have a field text"),
    ):
        with pytest.raises(TextError, match=said):
            list(open_texts([str(write_jsonl(tmp_path / "a.jsonl", rows))]).read(1000))
    both = open_texts([str(write_jsonl(tmp_path / "a.jsonl", [{**chat, **text}]))])
    assert list(both.read(1000)) == TEXTS[:1] and not both.chats
    (one,) = open_texts([str(write_jsonl(tmp_path / "a.jsonl", [chat]))]).read(1000)
    assert one == Conversation(f"{tmp_path / 'a.jsonl'}:1", chat["messages"])
    with pytest.raises(TextError, match=r"a\.jsonl:1: holds a conversation, texts are read here"):
        read_texts([str(tmp_path / "a.jsonl")])


def test_a_hub_folder_of_conversations_is_streamed(tmp_path):
    from pi_gguf.texts import hub_documents

    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"messages": as_messages(chat), "id": 1} for chat in CHATS[:2]])
    found = list(hub_documents(str(folder), None))
    assert [one.turns for one in found] == [as_messages(chat) for chat in CHATS[:2]]
    assert found[1].where == f"{folder} row 2"


# Weights


def test_a_weight_is_taken_off_a_name_unless_the_whole_name_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:2", "b.txt"):
        (tmp_path / name).write_text("text")
    assert {name: weighed(name) for name in ("a:2", "a:2:0.5", "b.txt", "b.txt:3", "c.txt:1e-2", "c.txt:x")} == {
        "a:2": ("a:2", None), "a:2:0.5": ("a:2", 0.5), "b.txt": ("b.txt", None), "b.txt:3": ("b.txt", 3.0),
        "c.txt:1e-2": ("c.txt", 0.01), "c.txt:x": ("c.txt:x", None),
    }  # fmt: skip
    windows = "C:\\texts\\a.jsonl"
    assert weighed(windows) == (windows, None) and weighed(f"{windows}:.25") == (windows, 0.25)
    assert weighed("some/books:train:0.5") == ("some/books:train", 0.5) and weighed("s/b:train") == ("s/b:train", None)
    for wrong in ("b.txt:0", "b.txt:-1", "b.txt:1e999"):
        with pytest.raises(OptionError, match="the weight must be above 0"):
            weighed(wrong)
    with pytest.raises(TextError, match=r"c\.txt: no such file"):
        open_mixture(["c.txt:2"])


def test_shares_are_by_weight_and_one_where_none_was_given(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    name = str(tmp_path / "a.txt")
    assert shares([f"{name}:3", "b"]) == {name: 0.75, "b": 0.25} and shares([name, "b"]) == {name: None, "b": None}
    assert [texts.weight for texts in open_mixture([f"{name}:3", name])] == [3.0, 1.0]
    (one,) = open_mixture([name, name])
    assert one.weight is None


@pytest.mark.parametrize("packing", ["isolate", "join"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_sources_share_the_tokens_by_their_weights(model, tmp_path, share, packing):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    (tmp_path / "long.txt").write_text("The captain went on board. " * 400)
    checkpoint = load_checkpoint(str(model))
    texts = open_mixture([f"{chats}:{share}", f"{tmp_path / 'long.txt'}:{1 - share}"])
    corpora = [cached(checkpoint, some, tmp_path / "work") for some in texts]
    plan = plan_of(model, steps=40)
    rows = [row for batch in training_batches(checkpoint, plan, corpora, 0, packing=packing) for row in batch]
    of_chats = [row[0].dtype == np.dtype(TOKEN) for row in rows]
    lengths = [sum(map(len, row)) for row in rows]
    assert len(rows) == 160
    for n in range(20, 161):
        drawn = sum(length for length, is_chat in zip(lengths[:n], of_chats, strict=False) if is_chat)
        assert abs(drawn - share * sum(lengths[:n])) <= WINDOW, "never further from its share than one sequence"


def test_the_order_is_the_same_again_and_the_longest_come_first(model, tmp_path):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    checkpoint = load_checkpoint(str(model))
    sources = [f"{chats}:1", *(str(tmp_path / f"{i}.txt") for i in range(4))]
    corpora = [cached(checkpoint, some, tmp_path / "work") for some in open_mixture(sources)]
    for longest_first in (False, True):
        first, again = (
            training_batches(checkpoint, plan_of(model), corpora, 3, packing="isolate", longest_first=longest_first)
            for _ in range(2)
        )
        flat = [[piece.tolist() for batch in one for row in batch for piece in row] for one in (first, again)]
        assert flat[0] == flat[1]


def test_a_source_of_which_no_sequence_can_be_made_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pi_gguf.data.rows.MASKED_TOKENS", 63)
    (tmp_path / "short.txt").write_text("Short.")
    (tmp_path / "long.txt").write_text(TEXTS[3])
    checkpoint = load_checkpoint(str(model))
    texts = open_mixture([f"{tmp_path / 'short.txt'}:1", str(tmp_path / "long.txt")])
    corpora = [cached(checkpoint, some, tmp_path / "work") for some in texts]
    with pytest.raises(TextError, match=r"short\.txt: no sequence of 64 tokens can be made of it"):
        training_batches(checkpoint, plan_of(model), corpora, 0, packing="isolate")


# The loss


@pytest.fixture(scope="module")
def corpus(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    return cached(load_checkpoint(str(model)), open_texts([str(path)]), folder / "work")


def test_labels_are_the_tokens_that_count(model, corpus):
    checkpoint = load_checkpoint(str(model))
    plan = plan_of(model)
    of = {chat[0][1]: dict(enumerate(zip(*by_hand(model, chat), strict=True))) for chat in CHATS}
    sequences = [[each for _, each in sorted(tokens.items())] for tokens in of.values()]
    seen = 0
    for packing in ("isolate", "join"):
        for i, rows in enumerate(training_batches(checkpoint, plan, corpus, 0, packing=packing)):
            positions = batch_positions(i, rows, checkpoint.extended(4 * WINDOW).rope, plan, 0)
            batch = padded(rows, positions)
            assert "label_weights" not in batch
            for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                assert any(label != -100 for label in labels)
                tokens = np.concatenate(row)
                firsts = np.cumsum([0, *(len(piece) for piece in row)])[1:-1].tolist()
                for at, (token, label) in enumerate(zip(tokens, labels, strict=False)):
                    assert ids[at] == token["id"]
                    assert label == (token["id"] if token["weight"] and at not in firsts else -100)
                assert set(labels[len(tokens) :]) <= {-100}
                for piece in row if packing == "isolate" else ():
                    run = [(int(token["id"]), bool(token["weight"])) for token in piece]
                    assert any(
                        run == sequence[at : at + len(run)] for sequence in sequences for at in range(len(sequence))
                    ), "a piece is a stretch of a conversation, with what of it counts by hand"
                    seen += len(run)
    assert seen > 1000


def test_sequences_of_a_long_conversation_that_hold_no_answer_are_left_out(model, tmp_path, capfd):
    chat = [("user", "How long was the ship? " * 60), ("assistant", "It was 12 feet."), ("user", "Was she? " * 200)]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)}])
    checkpoint = load_checkpoint(str(model))
    corpus = cached(checkpoint, open_texts([str(path)]), tmp_path / "work")
    _, counted = by_hand(model, chat)
    pieces = [counted[at : at + WINDOW] for at in range(0, len(counted), WINDOW)]
    hold = sum(any(piece[1:]) for piece in pieces)
    for packing in ("isolate", "join"):
        rows = [
            row for batch in training_batches(checkpoint, plan_of(model), corpus, 0, packing=packing) for row in batch
        ]
        assert len(rows) == 32 and all(row[0]["weight"][1:].any() for row in rows)
        err = capfd.readouterr().err
        assert f"{len(pieces) - hold} sequences of {WINDOW} tokens hold no answer and are left out" in err
        assert f"{len(counted):,} tokens ({sum(counted):,} of them count); 1 are as long" in err
    assert 0 < hold <= 2 and len(pieces) - hold > 8


def test_nothing_is_learned_of_tokens_that_do_not_count(model, corpus):
    """Against transformers' own loss of labels made by hand, and in the gradient of the logits."""
    checkpoint = load_checkpoint(str(model)).extended(4 * WINDOW)
    (rows, *_), plan = training_batches(checkpoint, plan_of(model), corpus, 0, packing="isolate"), plan_of(model)
    batch = padded(rows, batch_positions(0, rows, checkpoint.rope, plan, 0))
    net = checkpoint.load_model(dtype=torch.float32)
    by_name = dict(net.named_parameters())

    labels = torch.full_like(batch["input_ids"], -100)
    for i, row in enumerate(rows):
        at = 0
        for piece in row:
            for j, token in enumerate(piece):
                if token["weight"] and j:
                    labels[i, at + j] = int(token["id"])
            at += len(piece)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    own = net(**inputs, labels=labels)
    expected = dict(zip(by_name, torch.autograd.grad(own.loss, list(by_name.values())), strict=True))
    with chunked_loss(net):
        ours = net(**batch).loss
        found = dict(zip(by_name, torch.autograd.grad(ours, list(by_name.values())), strict=True))
    torch.testing.assert_close(ours, own.loss, rtol=1e-5, atol=0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)

    out = net(**batch)
    (gradient,) = torch.autograd.grad(out.loss, [out.logits])
    predicted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    assert torch.equal(gradient.abs().amax(-1) > 0, predicted) and 0 < predicted.float().mean() < 0.9


def test_a_run_has_the_mean_loss_of_what_counts(model, tmp_path, corpus):
    """Over all micro-batches of a step: the sum of the tokens that count, by their number."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    options = {"steps": 1, "batch_tokens": 4 * 8192, "train_window": WINDOW}
    plan, checkpoint = plan_of(model, **options), load_checkpoint(str(model)).extended(4 * WINDOW)
    assert plan.accumulation == 4
    net = checkpoint.load_model(dtype=torch.float32)
    total = count = 0.0
    with torch.inference_mode():
        for i, rows in enumerate(training_batches(checkpoint, plan, corpus, 0, packing="isolate")):
            batch = padded(rows, batch_positions(i, rows, checkpoint.rope, plan, 0))
            labels = batch.pop("labels")[:, 1:].flatten()
            total += cross_entropy(net(**batch).logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
            count += (labels != -100).sum().item()
    out = pi_gguf.extend(str(model), tmp_path / "out", context=4 * WINDOW, data=[str(chats)], device="cpu", **options)
    record = json.loads((out / "pi_gguf.json").read_text())
    assert record["loss"] == pytest.approx(total / count, rel=1e-2 if torch.backends.mkldnn.enabled else 1e-4)
    assert (record["counted"], record["data"]) == ("assistant", ["chats.jsonl"])
    assert "data_weights" not in record and "options" not in record


@pytest.mark.slow
@pytest.mark.parametrize("way", [(), ("--no-fsdp",)])
def test_two_processes_count_like_one(model, tmp_path, way):
    """Of their micro-batches not equally many tokens count."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    losses = []
    for n in (1, 2):
        out = tmp_path / str(n)
        options = ("--context", "256", "--steps", "3", "--batch-tokens", "16384", "--device", "cpu", *way)
        code, _, err = Command("extend", model, out, "--data", chats, *options, n=n, exact=True).wait()
        assert code == 0, err
        losses.append(json.loads((out / "losses.json").read_text()))
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-6)


# The command


OPTIONS = ("--context", "256", "--steps", "2", "--batch-tokens", "128", "--device", "cpu")


def test_extend_mixes_texts_and_conversations_and_records_it(model, tmp_path, cli):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    (tmp_path / "long.txt").write_text("The captain went on board. " * 100)
    data = ("--data", f"{chats}:0.25", "--data", f"{tmp_path / 'long.txt'}:0.75")
    code, _, err = cli("extend", model, tmp_path / "out", *data, *OPTIONS)
    assert code == 0 and "25.0% of what is drawn" in err and "is a chat model" not in err
    record = json.loads((tmp_path / "out" / "pi_gguf.json").read_text())
    assert (record["data"], record["data_weights"]) == (["chats.jsonl", "long.txt"], [0.25, 0.75])
    assert (record["counted"], record["packing"]) == ("assistant", "isolate")
    code, _, err = cli("extend", model, tmp_path / "out", *data, *OPTIONS)
    assert code == 0 and "holds this fine-tune already" in err
    for more, said in (
        ((*data, "--loss", "all"), "out"),
        (("--data", f"{chats}:0.5", "--data", f"{tmp_path / 'long.txt'}:0.5"), "out"),
    ):
        code, _, err = cli("extend", model, tmp_path / "out", *more, *OPTIONS)
        assert code == 2 and said in err and "already; it is used" not in err, "another fine-tune"


def test_an_unfinished_run_of_another_loss_or_other_weights_is_refused(model, tmp_path, cli, monkeypatch):
    from pi_gguf.tune import extend as finetune

    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": as_messages(chat)} for chat in CHATS])
    (tmp_path / "long.txt").write_text("The captain went on board. " * 100)
    text = str(tmp_path / "long.txt")

    def stopped(run):
        (run.work_dir / "checkpoint-1").mkdir(exist_ok=True)
        (run.work_dir / "checkpoint-1" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run_training", stopped)
    with pytest.raises(KeyboardInterrupt):
        pi_gguf.extend(
            str(model), tmp_path / "out", context=256, steps=2, device="cpu", data=[f"{chats}:1", f"{text}:2"]
        )
    for data, loss, said in (
        ([f"{chats}:1", f"{text}:2"], "all", "an unfinished run with counted 'assistant', now 'all'"),
        ([f"{chats}:1", f"{text}:3"], "assistant", r"with data_weights \[1.0, 2.0\], now \[1.0, 3.0\]"),
    ):
        with pytest.raises(OptionError, match=said):
            pi_gguf.extend(str(model), tmp_path / "out", context=256, steps=2, device="cpu", data=data, loss=loss)


def test_a_chat_model_on_texts_is_told_what_that_costs(model, llama, tmp_path, cli):
    (tmp_path / "long.txt").write_text("The captain went on board. " * 100)
    said = []
    for i, one in enumerate((model, llama)):
        code, _, err = cli("extend", one, tmp_path / str(i), "--data", tmp_path / "long.txt", *OPTIONS)
        assert code == 0
        said.append([line for line in err.splitlines() if "is a chat model" in line])
    assert [len(lines) for lines in said] == [1, 0] and "its answers get worse" in said[0][0]


def test_conversations_that_cannot_be_used_leave_nothing_behind(model, llama, tmp_path, cli):
    work = tmp_path / "work"
    work.mkdir()
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": "user"}]}])
    for one, said in ((model, "message 1: content must be a text"), (llama, "chat_template is missing")):
        code, _, err = cli("extend", one, work / "out", "--data", chats, *OPTIONS)
        assert code in (3, 5) and said in err and [line.partition(":")[0] for line in err.splitlines()[-2:]] == [
            "error", "hint",
        ]  # fmt: skip
        assert not (work / "out").exists() and not any(itertools.chain(*(p.iterdir() for p in work.iterdir())))


def test_the_plan_shows_sources_and_loss(llama, tmp_path, cli):
    code, out, _ = cli("plan", llama, "--context", "256", "--data", "a.jsonl:3", "--data", "b.txt", "--device", "cpu")
    assert code == 0 and "a.jsonl 75.0%, b.txt 25.0%" in out and "the assistant's turns of conversations" in out
    code, out, _ = cli(
        "plan", llama, "--context", "256", "--data", "b.txt", "--loss", "all", "--json", "--device", "cpu"
    )
    assert (json.loads(out)["data"], json.loads(out)["loss"]) == ({"b.txt": None}, "all")
    code, out, _ = cli("plan", llama, "--context", "256", "--device", "cpu")
    assert "conversations" not in out
    code, _, err = cli("plan", llama, "--context", "256", "--data", "b.txt:0", "--device", "cpu")
    assert code == 2 and "error: data b.txt:0: the weight must be above 0, got 0" in err
