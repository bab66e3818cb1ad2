"""Speed and memory of the fine-tune on models of real shape, beside plain Trainer with gradient checkpointing.

In: nothing; a random bf16 Llama of the shape is made. Out: `benchmarks/training.json`: for us and the peer, alternating
in one run, seconds of a step, tokens a second, peak memory (predicted too, for us) and the share of the device's speed
that the model's own operations use, without credit for what is computed again. A step's time is the difference between
a longer and a shorter run, by their number of steps. The device's speed is that of a large matrix product.

Example (a GPU of the 141 GB class; with --shape toy --context 512 --device cpu a trial of two minutes anywhere):
    python benchmarks/training.py --shape 8b --train qlora --context 32768 --cap-gib 16
    python benchmarks/training.py --shape 7b --train full --context 32768
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "toy": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 2048},
}  # fmt: skip
WINDOW = 2048
SHORT, LONG = 2, 5
"""Steps of the two runs whose difference is timed."""


def make_model(folder: Path, shape: str, window: int) -> None:
    """Save a random bf16 Llama with the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pi_gguf import bundled

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=window, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in bundled.TINY_DIR.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def limit_memory(cap_gib: float, device: str) -> None:
    """Let torch take so much of the GPU at most; 0 for all of it."""
    import torch

    if cap_gib and device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / whole)


def run_ours(args: argparse.Namespace, folder: Path, out: Path, steps: int) -> dict[str, float]:
    """Fine-tune with `extend` on whole sequences of the new window."""
    import pi_gguf

    limit_memory(args.cap_gib, args.device)
    pi_gguf.extend(
        str(folder), out, context=args.context, steps=steps, train_window=args.context, batch_tokens=args.context,
        packing="join", train=args.train, report_to="none", device=args.device, learning_rate=1e-6,
    )  # fmt: skip
    record = json.loads((out / "pi_gguf.json").read_text())
    return {key: record[key] for key in ("seconds", "peak_memory_bytes", "predicted_memory_bytes")}


def run_peer(args: argparse.Namespace, folder: Path, out: Path, steps: int) -> dict[str, float]:
    """Fine-tune as one does without us: Trainer, SDPA, gradient checkpointing, fused AdamW, bf16; peft's usual adapters
    on the linear layers, on 4 bits with bitsandbytes' 8-bit AdamW."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from pi_gguf.provenance import peak_memory

    limit_memory(args.cap_gib, args.device)
    options: dict[str, Any] = {"dtype": torch.float32 if args.train == "full" else torch.bfloat16}
    if args.train == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": args.context / WINDOW}
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", rope_parameters=rope, max_position_embeddings=args.context, **options
    )
    if args.train != "full":
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if args.train == "qlora":
            model = prepare_model_for_kbit_training(model)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 2048, (steps, args.context), generator=generator)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=1, bf16=True, save_strategy="no",
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[],
            optim="adamw_bnb_8bit" if args.train == "qlora" else "adamw_torch_fused", use_cpu=args.device == "cpu",
            disable_tqdm=True, learning_rate=1e-6,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )  # fmt: skip
    seconds = trainer.train().metrics["train_runtime"]
    return {"seconds": seconds, "peak_memory_bytes": peak_memory(args.device) or 0}


def device_speed(device: str) -> float:
    """Return operations a second of a matrix product in bf16."""
    import torch

    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    return 10 * 2 * side**3 / (time.perf_counter() - started)


def operations(shape: str, train: str, context: int) -> float:
    """Return the model's own operations of a step: products forward and backward, of frozen weights without their
    gradients; causal attention over half the window."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPES[shape])
    head = config.hidden_size // config.num_attention_heads
    width, kv = config.hidden_size, head * config.num_key_value_heads
    layer = 2 * width * width + 2 * width * kv + 3 * width * config.intermediate_size
    products = 2 * (config.num_hidden_layers * layer + config.vocab_size * width)
    attention = 4 * config.num_hidden_layers * width * context / 2
    return context * ((3 if train == "full" else 2) * products + 3 * attention)


def child(who: str, args: argparse.Namespace, folder: Path, steps: int) -> dict[str, float]:
    """Run one contender in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--child", who, "--model", str(folder), "--run", f"{scratch}/run"]
        command += ["--steps", str(steps), "--train", args.train, "--context", str(args.context)]
        command += ["--cap-gib", str(args.cap_gib), "--device", args.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return {"failed": done.returncode}
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the model")
    parser.add_argument("--train", choices=("full", "lora", "qlora"), default="qlora", help="which weights")
    parser.add_argument("--context", type=int, default=32768, help="new window and length of a sequence, in tokens")
    parser.add_argument("--cap-gib", type=float, default=0, help="of the GPU's memory; 0 for all of it")
    parser.add_argument("--rounds", type=int, default=1, help="times both are run")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training.json")
    for name in ("--child", "--model", "--run"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run = run_ours if args.child == "pi-gguf" else run_peer
        print(json.dumps(run(args, Path(args.model), Path(args.run), args.steps)))
        return

    from pi_gguf.provenance import provenance

    runs: dict[str, list[dict[str, float]]] = {"pi-gguf": [], "plain Trainer": []}
    speed = device_speed(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, args.shape, min(WINDOW, args.context // 2))
        for turn in range(args.rounds):
            for who, found in runs.items():
                short, long = (child(who, args, folder, steps) for steps in (SHORT, LONG))
                if "failed" in short | long:
                    found.append({"failed": 1})
                    print(f"round {turn + 1}: {who}: failed", flush=True)
                    continue
                step = (long["seconds"] - short["seconds"]) / (LONG - SHORT)
                used = operations(args.shape, args.train, args.context) / step / speed
                found.append(
                    {**long, "step_seconds": step, "tokens_a_second": args.context / step, "utilization": used}
                )
                print(f"round {turn + 1}: {who}: {json.dumps(found[-1])}", flush=True)
    worked = {who: [run for run in found if "failed" not in run] for who, found in runs.items()}
    medians = {
        who: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for who, found in worked.items()
        if found
    }
    name = f"{args.shape}, {args.train}, {args.context}" + (f", {args.cap_gib:g} GiB" if args.cap_gib else "")
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    record[name] = {"medians": medians, "runs": runs, "operations_a_second": speed}
    record[name] |= provenance(seed=0, device=args.device)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
