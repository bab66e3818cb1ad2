"""`plan --on`: cards as they are written, the choice that `extend` makes on them, and figures from outside."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from memory_child import memory_of_extend

import pi_gguf.bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.cli.app import _COMMANDS
from pi_gguf.common.cards import CARDS, parse_cards
from pi_gguf.common.machine import Machine
from pi_gguf.errors import OptionError, ResourceError
from pi_gguf.pipeline.plan import plan
from pi_gguf.tune.choose import plan_run
from pi_gguf.tune.memory import fit_activations, memory_of_windows
from pi_gguf.tune.options import SpreadOptions, TuneOptions
from pi_gguf.tune.processes import Spread
from pi_gguf.tune.speed import training_seconds

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("plans_benchmark", ROOT / "benchmarks" / "plans.py")
bench = sys.modules["plans_benchmark"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)
RECORDED = json.loads((ROOT / "benchmarks" / "plans.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def seven(place):
    return str(bench.folder(place, "LLaMA 7B"))


# Cards


@pytest.mark.parametrize(("text", "expected"), [
    ("4090", (1, 1, "4090-24GB")), ("rtx 4090", (1, 1, "4090-24GB")), ("NVIDIA GeForce RTX4090", (1, 1, "4090-24GB")),
    ("H100", (1, 1, "H100-80GB")), ("8xh100-80gb", (1, 8, "H100-80GB")), ("8 × H100 SXM5 80 GB", (1, 8, "H100-80GB")),
    ("H100 PCIe", (1, 1, "H100-PCIe-80GB")), ("A100-40GB", (1, 1, "A100-40GB")),
    ("2x8xA100-80GB", (2, 8, "A100-80GB")), ("RTX 6000 Ada Generation", (1, 1, "6000-Ada-48GB")),
    ("rtx a6000", (1, 1, "A6000-48GB")), ("4xL40S", (1, 4, "L40S-48GB")),
    ("NVIDIA H100 80GB HBM3", (1, 1, "H100-80GB")), ("NVIDIA A100-SXM4-40GB", (1, 1, "A100-40GB")),
    ("NVIDIA A100 80GB PCIe", (1, 1, "A100-80GB")), ("NVIDIA H100 80GB PCIe", (1, 1, "H100-PCIe-80GB")),
    ("a100-80", (1, 1, "A100-80GB")), ("rtx6000ada", (1, 1, "6000-Ada-48GB")), ("512x16xH100", (512, 16, "H100-80GB")),
])  # fmt: skip
def test_cards_are_read_as_people_write_them(text, expected):
    nodes, each, card = parse_cards(text)
    assert (nodes, each, card.name) == expected


def test_every_card_is_known_by_its_own_name():
    assert len(CARDS) == 15
    for card in CARDS:
        assert parse_cards(f"3x2x{card.name}") == (3, 2, card)
        box = int(re.search(r"(\d+)GB", card.name)[1])
        assert 0.9 * box < card.memory_gib < box and card.share_source


@pytest.mark.parametrize(("text", "said"), [
    ("8xV100", "no such card as 'V100'"), ("A100", "is one of A100-80GB and A100-40GB"), ("", "got ''"),
    ("0x4090", "must be of 1 to 16 cards in each of 1 to 512 machines"), ("17xH100", "of 1 to 16 cards"),
    ("513x1xH100", "of 1 to 512 machines"), ("2x3x4xH100", "no such card as '4xH100'"),
    ("8xL40", "no such card as 'L40'"),
    ("8x", "no such card as '8x'"), ("8x8", "no such card as '8'"),
    ("\u0668x4090", "got '\u0668x4090'"), ("H100\u00e9", "got 'H100\u00e9'"),
    ("9" * 5000 + "x4090", "no such card"), ("4090-80GB", "no such card"),
])  # fmt: skip
def test_unknown_cards_are_refused_with_those_that_are_known(text, said, seven, cli):
    code, _, err = cli("plan", seven, "--context", "32768", "--on", text)
    assert code == 2 and said in err and err.count("\n") == 2
    if said.startswith("no such") or "got" in said:
        assert "e.g. 8xH100-80GB, 4090 or 2x8xA100-80GB" in err and all(card.name in err for card in CARDS)


def test_on_is_for_a_fine_tune_elsewhere(seven):
    for said, options in {
        "on and device exclude each other": {"context": 32768, "device": "cpu"},
        "on is for a fine-tune": {"context": 32768, "steps": 0}, "without one": {},
    }.items():  # fmt: skip
        with pytest.raises(OptionError, match=said):
            plan(seven, on="H100", **options)


def test_the_command_names_folders_that_can_be(place, seven, tiny_gguf, monkeypatch):
    def words(model: str, cards: str, context: int) -> list[str]:
        return shlex.split(plan(model, on=cards, context=context, train="auto").command)

    monkeypatch.chdir(seven)
    assert words(".", "H100", 32768)[2:4] == [".", f"{Path(seven).name}-32k"]
    assert words(".", "H100", 5000)[3] == f"{Path(seven).name}-5000"
    one, several = words(str(tiny_gguf), "4090", 8192), words(str(tiny_gguf), "2x4090", 8192)
    assert one[:4] == ["pi-gguf", "extend", str(tiny_gguf), "model-8k"], "one process unpacks it on the way"
    assert several[:5] == ["pi-gguf", "unpack", str(tiny_gguf), "model", "&&"]
    assert several[several.index("extend") :][1:3] == ["model", "model-8k"]


# The choice


@pytest.mark.parametrize(("cards", "options"), [
    ("8xH100-80GB", {}), ("8xA100-40GB", {"train_window": 32768}), ("2x8xA100-80GB", {"train": "auto"}),
    ("4090", {"train": "auto"}), ("4x4090", {"train": "lora", "train_window": 32768}),
])  # fmt: skip
def test_it_is_what_extend_chooses_on_such_a_machine(cards, options, seven, monkeypatch):
    there = Machine.elsewhere(cards)
    found = plan(seven, context=32768, on=cards, **options)
    monkeypatch.setattr("pi_gguf.common.machine.free_memory", lambda device: there.free_bytes)
    monkeypatch.setattr("pi_gguf.common.machine.fast_bf16", lambda device: True)
    monkeypatch.setattr("pi_gguf.tune.lora.find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", str(there.processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(there.each))
    here = Machine.here("cuda")
    assert (here.processes, here.nodes, here.each, here.name) == (
        there.processes,
        there.nodes,
        there.each,
        "this machine",
    )
    checkpoint = load_checkpoint(seven, config_only=True).extended(32768)
    training, spread = plan_run(checkpoint, TuneOptions(**options), SpreadOptions(), here)
    way, need = fit_activations(checkpoint, training, here, spread)
    assert training == found.training and (way.name, need) == (found.activations, found.training_memory_bytes)
    assert found.elsewhere.sharding == ("none" if here.processes == 1 else "FSDP2" if spread.fsdp else "copies")


def test_auto_takes_what_the_shards_allow(seven):
    ways = {
        cards: plan(seven, context=32768, on=cards, train="auto").training
        for cards in ("8xH100", "H100", "4090", "4080-16GB")
    }
    assert [training.train for training in ways.values()] == ["full", "lora", "lora", "qlora"]
    assert ways["8xH100"].train_reason.startswith("full in 8 shards takes about")


def test_as_few_cards_share_a_sequence_as_it_needs(place):
    model, window = str(bench.folder(place, "Llama 3 8B")), 1_048_576
    found = plan(model, context=window, on="8xH100", train_window=window, batch_tokens=window)
    checkpoint, machine = load_checkpoint(model, config_only=True), Machine.elsewhere("8xH100")
    needs = {n: memory_of_windows(checkpoint, window, "full", 16, machine, Spread(8, True, n)) for n in (1, 2, 4, 8)}
    fitting = [n for n, need in needs.items() if need <= machine.free_bytes]
    assert found.elsewhere.cp_size == fitting[0] > 1 and f"--cp-size {fitting[0]}" in found.command
    assert found.training.accumulation == 8 // fitting[0], "a micro-batch for each group of cards"
    short = plan(model, context=window, on="8xH100", train_window=8192)
    assert short.elsewhere.cp_size == 1 and "--cp-size" not in short.command


@pytest.mark.parametrize(("cards", "start"), [
    ("H100", "pi-gguf extend"), ("8xH100", "torchrun --nproc-per-node 8 -m pi_gguf extend"),
    ("2x8xH100", "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 --nproc-per-node 8 -m pi_gguf "
     "extend"),
])  # fmt: skip
def test_the_command_takes_what_was_planned(cards, start, seven):
    options = {
        "context": 16384, "train_window": "2048x10,16384", "steps": 20, "learning_rate": 1e-5, "longest_first": True,
        "data": ["my books", "chats.jsonl:0.3"],
    }  # fmt: skip
    command = plan(seven, on=cards, train="auto", fsdp=False, **options).command
    assert command.startswith(start)
    words = shlex.split(command)
    taken = _COMMANDS["extend"][1]().make_context("extend", words[words.index("extend") + 1 :]).params
    expected = {**options, "model": seven, "train": "lora" if cards == "H100" else taken["train"], "fsdp": False}
    assert taken["train"] in ("full", "lora")
    assert {name: taken[name] if name != "data" else list(taken[name]) for name in expected} == expected


@pytest.mark.parametrize(("name", "options"), [
    ("LLaMA 65B", {"on": "4090"}), ("LLaMA 13B", {"on": "A100-40GB", "train_window": 32768}),
    ("LLaMA 13B", {"on": "4080", "attention": "s2", "s2_group": 0.5}),
])  # fmt: skip
def test_what_would_do_does(name, options, place):
    model = str(bench.folder(place, name))
    with pytest.raises(
        ResourceError, match=r"--train full takes about \S+ [GT]iB a card of 1x\S+, \S+ GiB are free"
    ) as error:
        plan(model, context=32768, **options)
    hints = error.value.hint.removesuffix(" would do").split(" or ")
    assert len(hints) >= 2
    for hint in hints:
        words = iter(shlex.split(hint.partition(" without ")[0]))
        changed = {word.removeprefix("--"): next(words) for word in words}
        assert "without" in hints[0] or "attention" not in options
        if "without" in hint:
            left_out = "--train-window and --" + ("attention" if "attention" in options else "mix")
            assert hint.endswith(f" without {left_out}")
            changed |= {"train_window": None, "attention": "full", "s2_group": 0.25}
        plan(model, context=32768, **{**options, **changed})


def test_the_page_says_all_of_it(seven, cli):
    code, out, _ = cli("plan", seven, "--context", "32768", "--on", "2x8xA100-40GB", "--train-window", "32768")
    flat = re.sub(r"[\s│]+", " ", out)
    assert code == 0 and "on 2x8xA100-40GB: weights, gradients and moments sharded by FSDP2" in flat
    assert "40% of the cards' rate; assumed: torchtitan" in flat and "GiB a card of 38.6 GiB" in flat
    assert "tokens/s" in flat and "16 x 1 micro-batches of 1" in flat
    assert "next on each machine, FIRST being the name of the first: torchrun --nnodes 2" in out
    code, out, _ = cli("plan", seven, "--context", "32768", "--on", "H100", "--train", "lora", "--json")
    assert code == 0 and json.loads(out)["elsewhere"]["cards"] == 1


# Time


def test_time_is_operations_by_rate_or_what_is_sent(seven):
    checkpoint = load_checkpoint(seven, config_only=True).extended(32768)

    def seconds(cards, **options):
        machine = Machine.elsewhere(cards)
        training, spread = plan_run(checkpoint, TuneOptions(**options), SpreadOptions(), machine)
        return training_seconds(checkpoint, training, machine, spread), training

    whole = {"train_window": 32768, "batch_tokens": 64 * 32768, "steps": 1}
    alone, training = seconds("H200", **whole)
    n, attention = 6_738_415_616 - 32000 * 4096, 12 * 32 * 4096 * 32768 / 2
    assert training.tokens == 64 * 32768
    assert alone == pytest.approx(64 * 32768 * (6 * n + attention) / (0.30 * 989e12), rel=1e-3)
    assert seconds("8xH200", **whole)[0] == pytest.approx(alone / 8, rel=1e-3)
    assert seconds("H200", train="lora", **whole)[0] == pytest.approx(
        alone * (4 * n + attention) / (6 * n + attention), rel=1e-3
    )
    short = {"train_window": 2048, "batch_tokens": 8 * 8 * 8192, "steps": 1}
    sent = 8 * 6_738_415_616 * 63 / 64 / (12.5e9 / 8)  # 64 cards on a slow network: a micro-batch each
    assert seconds("8x8x4090", **short)[0] == pytest.approx(sent, rel=1e-2)


# Figures from outside, and our own


def test_the_recorded_tables_are_what_is_planned_now(place):
    now = json.loads(json.dumps(bench.record(place)))
    assert {name: len(rows) for name, rows in now.items()} == {"paper": 16, "torchtitan": 4, "unsloth": 7, "ours": 8}
    for name, rows in now.items():
        for row, recorded in zip(rows, RECORDED[name], strict=True):
            assert row == {
                key: pytest.approx(value) if isinstance(value, float) else value for key, value in recorded.items()
            }


def test_tokens_a_second_are_torchtitans_within_a_fifth():
    assert [round(row["planned"] / row["recorded"], 2) for row in RECORDED["torchtitan"]] == [
        pytest.approx(1, abs=limit) for limit in (0.18, 0.18, 0.05, 0.05)
    ]
    for row in RECORDED["torchtitan"]:
        if row["recorded_gib"]:
            assert row["recomputed_gib"] < row["recorded_gib"] < row["kept_gib"]


def test_unsloths_longest_sequences_take_a_little_less_than_their_cards_without_the_embeddings():
    for row in RECORDED["unsloth"]:
        assert 0.78 * row["gb"] < row["without_gib"] < 0.96 * row["gb"], row
        assert row["need_gib"] - row["without_gib"] == pytest.approx(16 * 128256 * 4096 / 2**30)


def test_plans_for_an_h200_are_what_one_took():
    seconds = {"8b:qlora:32768:32": 0.37, "8b:qlora:81920:8": 0.18}
    memory = {"8b:qlora": 0.27, "8b:qlora:32768:32": 0.16, "8b:qlora:81920:8": 0.12}
    assert len(RECORDED["ours"]) == 8
    for row in RECORDED["ours"]:
        assert row["planned_seconds"] == pytest.approx(row["seconds"], rel=seconds.get(row["case"], 0.15)), row
        assert row["planned_gb"] == pytest.approx(row["gb"], rel=memory.get(row["case"], 0.05)), row


def test_the_papers_runs_fit_the_cards_it_had():
    fitting = {(row["model"], row["on"]) for row in RECORDED["paper"] if "error" not in row}
    assert {(name, "16x8xA100-80GB") for name in ("LLaMA 7B", "LLaMA 13B", "LLaMA 33B", "LLaMA 65B")} <= fitting
    assert ("LLaMA 65B", "4x8xA100-40GB") not in fitting and len(fitting) == 15


# Memory of processes


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("n", "micro_batches", "options"), [
    (1, 1, {}), (2, 1, {}), (4, 1, {}), (2, 2, {}), (2, 1, {"fsdp": False}),
], ids=str)  # fmt: skip
def test_a_process_takes_what_is_planned(n, micro_batches, options, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model, text = tmp_path / "model", tmp_path / "text.txt"
    config = LlamaConfig(
        hidden_size=448, intermediate_size=1152, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=2048, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((load_checkpoint("bundled:tiny").path / name).read_bytes())
    text.write_text(next(iter(pi_gguf.bundled.novels("train").values()))[:30_000])
    given = {
        "model": str(model), "out_dir": str(tmp_path / "out"), "context": 256, "data": [str(text)], "steps": 3,
        "train_window": 64, "batch_tokens": 64 * n * micro_batches, "device": "cpu", "report_to": "none", **options,
    }  # fmt: skip
    found = memory_of_extend(given, n, 64)
    assert len(found) == n
    for process in found:
        assert process["predicted"] == pytest.approx(process["taken"], rel=0.12), found
