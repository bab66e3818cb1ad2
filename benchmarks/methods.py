"""Ways to spend the same tokens on a longer window: one model, one budget, one table.

In: MODEL. Out: `benchmarks/methods.json`, or another by `--out`: for each way perplexity at each window (the first is
the original one), k_max, the share of passkeys found, seconds and peak memory of its fine-tune, on a card the card's.
A row that is in the file already is not run again, so that a run that was stopped goes on.

Example (an hour on 2 cores for the bundled model; with --context 4096 --steps 4 a trial of two minutes; then attention
within groups beside full attention and PoSE):
    python benchmarks/methods.py bundled:tiny --context 8192 --steps 300
    python benchmarks/methods.py bundled:tiny --context 4096 --steps 600 --batch-tokens 4096 --short 512 \\
        --only "PI, full length;PI, s2;PI, PoSE" --out benchmarks/methods-s2.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from convert import measure  # noqa: E402

from pi_gguf.checkpoint.checkpoint import load_checkpoint  # noqa: E402
from pi_gguf.common.files import write_json  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.models.targets import doublings  # noqa: E402

PI_GGUF = [sys.executable, "-m", "pi_gguf"]


def ways(short_window: int, context: int) -> dict[str, list[str]]:
    """Return the options of `extend` by the name of the way; those of `untrained` take no step."""
    short = ["--train-window", str(short_window)]
    return {
        "untrained PI": [],
        "PI, full length": ["--train-window", str(context)],
        "PI, s2": ["--train-window", str(context), "--attention", "s2"],
        "PI, PoSE": short,
        "PI, mix": [*short, "--mix", "0.25"],
        "PI, LoRA, PoSE": [*short, "--train", "lora"],
        "NTK, PoSE": [*short, "--method", "ntk"],
        "YaRN, PoSE": [*short, "--method", "yarn"],
        "direct, full length": ["--train-window", str(context), "--method", "none"],
        "NoPE, PoSE": [*short, "--method", "nope"],
    }


def report(command: list[str]) -> dict[str, Any]:
    """Run a command that prints JSON and return it."""
    done = subprocess.run([*PI_GGUF, *command, "--json"], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(model: str, options: list[str], folder: Path, args: argparse.Namespace, windows: str) -> dict[str, Any]:
    """Fine-tune one way and measure it."""
    steps = ["--steps", str(args.steps)] if options else ["--steps", "0"]
    common = ["--context", str(args.context), "--batch-tokens", str(args.batch_tokens), "--schedule", "decay"]
    data = [part for path in args.data for part in ("--data", path)]
    command = [*PI_GGUF, "extend", model, str(folder), *common, *steps, *options, *data, "--device", args.device]
    measured = measure([command])
    text = [part for path in args.text for part in ("--text", path)]
    where = ["--windows", windows, "--device", args.device]
    perplexity = report(["eval", "perplexity", str(folder), *where, *text, "--samples", "2", "--stride", "256"])
    passkey = report(
        ["eval", "passkey", str(folder), *where, "--distances", str(args.distances), "--keys", str(args.keys)]
    )
    found, tried = (sum(cell[key] for cell in passkey["cells"]) for key in ("found", "keys"))
    trained = json.loads((folder / "pi_gguf.json").read_text())
    if trained.get("device") == "cuda":  # the card's, not the host's
        measured["peak_mib"] = round(trained["peak_memory_bytes"] / 2**20)
    return {
        "perplexity": {str(line["window"]): round(line["perplexity"], 3) for line in perplexity["rows"]},
        "k_max": next(iter(passkey["k_max"].values())),
        "passkeys_found": round(found / tried, 4),
        "tokens": trained.get("tokens", 0),
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder, Hub id or bundled:tiny")
    parser.add_argument("--context", type=int, default=8192, help="new window, in tokens")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each way")
    parser.add_argument("--short", type=int, help="tokens of a sequence with skips; the original window when left out")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a step, at least the context")
    parser.add_argument("--data", action="append", default=[], help="texts to train on; repeatable")
    parser.add_argument("--text", action="append", default=[], help="texts to measure perplexity on; repeatable")
    parser.add_argument("--distances", type=int, default=4, help="places of a passkey in each window")
    parser.add_argument("--keys", type=int, default=5, help="passkeys tried at each place")
    parser.add_argument("--only", help="ways to run, separated by semicolons; all when left out")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "methods.json")
    args = parser.parse_args()
    if args.batch_tokens < args.context:
        parser.error(f"batch-tokens must be at least the context, so that all ways have the same: {args.batch_tokens}")
    original = load_checkpoint(args.model, config_only=True).rope.max_position_embeddings
    windows = doublings(original, args.context)
    args.short = args.short or original
    named = {
        "model": Path(args.model).name,
        **{key: [Path(p).name for p in vars(args)[key]] for key in ("data", "text")},
    }
    chosen = {**vars(args), **named, "out": None, "only": None, "original_window": original}
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if record.get("settings", chosen) != chosen:
        parser.error(f"{args.out} holds other settings: give another --out")
    record = {"settings": chosen, "rows": record.get("rows", {}), **provenance(seed=0, device=args.device)}
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(args.model).exists() else "0")
    for name, options in ways(args.short, args.context).items():
        if name in record["rows"] or (args.only and name not in args.only.split(";")):
            continue
        scratch = Path(tempfile.mkdtemp())
        try:
            record["rows"][name] = row(args.model, options, scratch / "hf", args, ",".join(map(str, windows)))
        finally:
            shutil.rmtree(scratch)
        write_json(args.out, record)
        print(f"{name}: {record['rows'][name]}", flush=True)


if __name__ == "__main__":
    main()
