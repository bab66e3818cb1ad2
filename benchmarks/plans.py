"""What `plan --on` says beside what others have recorded: the paper's runs, torchtitan's, Unsloth's, and our own.

In: nothing; the config of each model is written to a folder of its own. Out: `benchmarks/plans.json`, and its tables in
docs/results.md by `python tools/write_tables.py`. Nothing is trained, so the figures are the same on any machine.

- paper: LLaMA 7B to 65B to 32768 tokens, 1000 steps (arXiv 2306.15595, section 3.1: 32 or 128 A100, 64 or 128
  sequences a step); how long it took is not said there.
- torchtitan: tokens a second and GiB of a card, Llama 3 8B and 70B in sequences of 8192 (its docs/performance.md: 64
  A100; benchmarks/llama3_h100_202412_torchtitan.md: 8 and 128 H100 of 96 GB, at 500 W). It saves some of what is
  computed again, and compiles where it says so.
- unsloth: the longest sequence of Llama 3.1 8B on a card, QLoRA of rank 32, one sequence
  (docs.unsloth.ai/basics/unsloth-benchmarks), beside what we need for it: embeddings and norms, which we train whole,
  are given apart.
- ours: seconds of a step and GB, measured on an H200 (recipes/gpu/training.json), beside what is planned for one.

Example:
    python benchmarks/plans.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.common.files import write_json
from pi_gguf.common.machine import Machine
from pi_gguf.pipeline.plan import Plan, plan
from pi_gguf.tune.choose import plan_run
from pi_gguf.tune.memory import ACTIVATIONS, estimate_training_memory, memory_of_windows
from pi_gguf.tune.options import SpreadOptions, TuneOptions
from pi_gguf.tune.processes import Spread
from pi_gguf.tune.speed import training_seconds

ROOT = Path(__file__).parent.parent

LLAMAS = {
    "LLaMA 7B": (4096, 11008, 32, 32, 32, 32000, 2048), "LLaMA 13B": (5120, 13824, 40, 40, 40, 32000, 2048),
    "LLaMA 33B": (6656, 17920, 60, 52, 52, 32000, 2048), "LLaMA 65B": (8192, 22016, 80, 64, 64, 32000, 2048),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128256, 8192), "Llama 3 70B": (8192, 28672, 80, 64, 8, 128256, 8192),
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128256, 8192), "SmolLM2 135M": (576, 1536, 30, 9, 3, 49152, 2048),
}  # fmt: skip
"""Hidden and inner units, layers, heads, heads of keys and values, vocabulary, window."""

TIED = ("Llama 3.2 1B", "SmolLM2 135M")

PAPER = [
    (name, cards, 64 if cards.startswith("4x") else 128)
    for name in ("LLaMA 7B", "LLaMA 13B", "LLaMA 33B", "LLaMA 65B")
    for cards in ("4x8xA100-40GB", "4x8xA100-80GB", "16x8xA100-40GB", "16x8xA100-80GB")
]

TORCHTITAN = [
    ("Llama 3 8B", "8x8xA100-80GB", 1, "some layers", 2904, None),
    ("Llama 3 70B", "8x8xA100-80GB", 1, "all", 331, None),
    ("Llama 3 8B", "8xH100-80GB", 2, "some products", 5762, 82.4),
    ("Llama 3 8B", "16x8xH100-80GB", 2, "some products", 5605, 67.0),
]  # fmt: skip
"""Model, cards, sequences of a card, what is computed again, tokens a second and GiB of a card."""

UNSLOTH = {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733}
"""Tokens of the longest sequence by the GB of a card."""

OURS = {
    "7b:full": ("LLaMA 7B", TuneOptions(train="full")), "8b:qlora": ("Llama 3 8B", TuneOptions(train="qlora")),
    "1b:full": ("Llama 3.2 1B", TuneOptions(train="full")), "8b:full": ("Llama 3 8B", TuneOptions(train="full")),
    "8b:qlora:32768:32": ("Llama 3 8B", TuneOptions(train="qlora")),
    "8b:qlora:81920:8": ("Llama 3 8B", TuneOptions(train="qlora")),
    "1b:lora": ("Llama 3.2 1B", TuneOptions(train="lora")), "135m:full": ("SmolLM2 135M", TuneOptions(train="full")),
}  # fmt: skip
"""Shapes by the names of the cases in recipes/gpu/training.json."""


def folder(place: Path, name: str) -> Path:
    """Return a folder with a model's config alone."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    path = place / name.replace(" ", "-")
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "tie_word_embeddings": name in TIED, **dict(zip(names, LLAMAS[name], strict=True))}
    (path / "config.json").write_text(json.dumps(config))
    return path


def paper_row(place: Path, name: str, cards: str, sequences: int) -> dict[str, Any]:
    """Return what is planned for one of the paper's runs; where it does not fit, what is said."""
    row: dict[str, Any] = {"model": name, "on": cards, "sequences": sequences}
    try:
        found: Plan = plan(
            str(folder(place, name)), context=32768, on=cards, train_window=32768, batch_tokens=sequences * 32768
        )
    except Exception as error:  # told in the table
        return row | {"error": str(error).partition(": ")[2], "hint": getattr(error, "hint", "")}
    there = found.elsewhere
    assert there is not None
    return row | {
        "memory_bytes": found.training_memory_bytes, "activations": found.activations, "cp_size": there.cp_size,
        "micro_batches": there.micro_batches, "seconds": found.training_seconds,
        "tokens_a_second": there.tokens_a_second, "host_memory_bytes": there.host_memory_bytes,
    }  # fmt: skip


def torchtitan_row(place: Path, case: tuple[str, str, int, str, int, float | None]) -> dict[str, Any]:
    """Return tokens a second and memory of a card, recorded and planned, with all but the inputs of layers computed
    again where all is, and otherwise with everything kept, which brackets what is recorded."""
    name, cards, sequences, again, rate, gib = case
    machine = Machine.elsewhere(cards)
    checkpoint = load_checkpoint(str(folder(place, name)), config_only=True)
    tune = TuneOptions(steps=10, train_window=8192, batch_tokens=sequences * 8192 * machine.processes)
    training, spread = plan_run(checkpoint.extended(16384), tune, SpreadOptions(), machine)
    training = replace(
        training, accumulation=machine.processes, stages=[replace(training.stages[0], micro_batch=sequences)]
    )
    kept, recomputed = (
        estimate_training_memory(checkpoint, training, machine, spread, way) / 2**30 for way in ACTIVATIONS[:2]
    )
    planned = training.tokens / training_seconds(checkpoint, training, machine, spread) / machine.processes
    return {
        "model": name, "on": cards, "again": again, "recorded": rate, "planned": planned, "recorded_gib": gib,
        "kept_gib": kept, "recomputed_gib": recomputed,
    }  # fmt: skip


def unsloth_row(checkpoint: Checkpoint, gb: int, tokens: int) -> dict[str, Any]:
    """Return what we need for Unsloth's longest sequence on a card, in GiB."""
    card = Machine.elsewhere("H100-80GB")
    need = memory_of_windows(checkpoint, tokens, "qlora", 32, card, Spread())
    embeddings = 16 * checkpoint.vocab_size * checkpoint.hidden_size
    return {"gb": gb, "tokens": tokens, "need_gib": need / 2**30, "without_gib": (need - embeddings) / 2**30}


def our_row(place: Path, case: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return seconds of a step and GB, measured on an H200 and planned for one; activations as they were there."""
    name, tune = OURS[case]
    run, window = measured["contenders"]["pi-gguf"], measured["context"]
    (way,) = [one for one in ACTIVATIONS if one.name == measured["runs"]["pi-gguf"][0]["activations"]]
    machine = Machine.elsewhere("H200")
    checkpoint = load_checkpoint(str(folder(place, name)), config_only=True).extended(2 * window)
    tune = replace(tune, steps=10, train_window=window, batch_tokens=window)
    training, spread = plan_run(checkpoint, tune, SpreadOptions(), machine)
    return {
        "case": case, "activations": way.name, "seconds": run["step_seconds"],
        "planned_seconds": training_seconds(checkpoint, training, machine, spread) / training.steps,
        "gb": run["peak_memory_bytes"] / 1e9,
        "planned_gb": estimate_training_memory(checkpoint, training, machine, spread, way) / 1e9,
    }  # fmt: skip


def record(place: Path) -> dict[str, Any]:
    """Return all tables."""
    eight = load_checkpoint(str(folder(place, "Llama 3 8B")), config_only=True)
    measured = json.loads((ROOT / "recipes" / "gpu" / "training.json").read_text())["cases"]
    return {
        "paper": [paper_row(place, *case) for case in PAPER],
        "torchtitan": [torchtitan_row(place, case) for case in TORCHTITAN],
        "unsloth": [unsloth_row(eight, gb, tokens) for gb, tokens in UNSLOTH.items()],
        "ours": [our_row(place, case, measured[case]) for case in OURS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "plans.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_json(args.out, record(Path(place)))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
