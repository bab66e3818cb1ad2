"""Time of `pi-gguf repair` against `cp` of the same file, alternating in one run; both end with the data on the disk.

In: nothing; a GGUF file of random bytes with a large vocabulary is made. Out: `benchmarks/repair.json`, with every run
and the ratios of medians and of the least times, as a disk in use makes single runs several times slower. `repair` is
the function, without the start of Python; `cp` is the command, and `sync` of its file, as repair has it. Who goes first
changes from round to round, and before each run all that waits to be written is written.

Example (a minute, 2 GB of disk):
    python benchmarks/repair.py --gigabytes 1 --rounds 12
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pi_gguf  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.gguf.file import TensorInfo, write_header  # noqa: E402


def make_file(path: Path, nbytes: int) -> None:
    """Write a Llama's header with a vocabulary of 128,000 tokens, and one tensor of random bytes."""
    tokens = [f"token{i}" for i in range(128_000)]
    metadata = {
        "llama.context_length": 2048,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 16.0,
        "llama.rope.scaling.original_context_length": 2048,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": [f"a{i} b{i}" for i in range(250_000)],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    columns = nbytes // (4 * len(tokens))
    shape = (len(tokens), columns)
    write_header(path, "llama", metadata, [TensorInfo("token_embd.weight", shape, "F32", 4 * len(tokens) * columns)])
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % 32))
        left = 4 * len(tokens) * columns
        while left:
            left -= file.write(os.urandom(min(left, 2**24)))
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1, help="size of the file")
    parser.add_argument("--rounds", type=int, default=12, help="times everything is run")
    parser.add_argument("--folder", type=Path, help="where to write; the temporary folder when left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "repair.json")
    args = parser.parse_args()
    runs: dict[str, list[float]] = {"repair": [], "cp": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, target = Path(scratch) / "source.gguf", Path(scratch) / "target.gguf"
        make_file(source, int(args.gigabytes * 1e9))
        nbytes = source.stat().st_size
        for turn in range(args.rounds + 1):
            for name in (list(runs), list(reversed(runs)))[turn % 2]:
                os.sync()
                started = time.perf_counter()
                if name == "repair":
                    result = pi_gguf.repair(source, target, check="none")
                    assert [change.new for change in result.changes] == [32768]
                else:
                    subprocess.run(["cp", source, target], check=True)
                    subprocess.run(["sync", target], check=True)
                if turn:  # the first round warms the page cache
                    runs[name].append(round(time.perf_counter() - started, 3))
                target.unlink()
    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    least = {name: min(seconds) for name, seconds in runs.items()}
    record: dict[str, Any] = {
        "file_bytes": nbytes,
        "median_seconds": medians,
        "least_seconds": least,
        "repair / cp": {
            "of medians": round(medians["repair"] / medians["cp"], 3),
            "of the least": round(least["repair"] / least["cp"], 3),
        },
        "runs": runs,
        **provenance(seed=0, device="cpu"),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("median_seconds", "least_seconds", "repair / cp")}, indent=1))


if __name__ == "__main__":
    main()
