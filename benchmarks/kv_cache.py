"""What types of the KV cache cost on a CPU: speed, memory and quality, by how much the cache holds.

In: GGUF files. Out: `benchmarks/kv_cache.json`, for each file, length and type of K and V: tokens/s read and written,
medians and the best in turn; perplexity of the last tokens of so much of a held-out novel; share of passkeys found,
hidden at distances up to it; bytes of the cache. A length is left out where a file's window does not hold it. V in a
type of blocks needs flash attention, which on a CPU is another kernel; K does not.

Example (two hours for a 32k file of 135 M parameters; --toy is a trial of seconds):
    python benchmarks/kv_cache.py SmolLM2-135M-Instruct.Q4_1.gguf tiny-32k.gguf
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from runtime import novel_ids  # noqa: E402

import pi_gguf  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.gguf.file import read_gguf  # noqa: E402
from pi_gguf.runtime.model import Model  # noqa: E402
from pi_gguf.runtime.sampling import Sampling  # noqa: E402

CACHES = (
    ("f16", "f16", False), ("f32", "f32", False), ("q8_0", "f16", False), ("q4_0", "f16", False),
    ("f16", "f16", True), ("q8_0", "q8_0", True), ("q4_0", "q4_0", True),
)  # fmt: skip
"""Types of K and V, and whether with flash attention."""

SCORED, WRITTEN = 256, 32
"""Tokens whose perplexity is measured, and that are written, behind each length."""

Cache = tuple[str, str, bool]


def named(cache: Cache) -> str:
    type_k, type_v, flash = cache
    return f"K {type_k}, V {type_v}{', flash attention' if flash else ''}"


def run_once(path: Path, length: int, cache: Cache) -> dict[str, float]:
    """Read a novel and write on: tokens/s of both, and the mean loss of the last tokens read."""
    type_k, type_v, flash = cache
    with Model(path, n_ctx=length + WRITTEN, type_k=type_k, type_v=type_v, flash_attn=flash, device="cpu") as model:
        ids = novel_ids(model, length)
        for _ in model.session.read(ids[:32], 1):  # what comes first only
            pass
        model.session.clear()
        started = time.perf_counter()
        chunks = [_losses(logits) for logits in model.session.read(ids, SCORED + 1)]
        read = time.perf_counter() - started
        logs = np.concatenate(chunks)[:-1]
        losses = -logs[np.arange(SCORED), ids[-SCORED:]]
        times = []
        for _ in model.session.write(ids, WRITTEN, Sampling()):
            times.append(time.perf_counter())
        write = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan
        return {"read": length / read, "write": write, "loss": float(losses.mean()), "bytes": model.kv_cache_bytes}


def _losses(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities (tokens, V)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def passkeys(path: Path, length: int, cache: Cache, keys: int) -> float:
    """Return the share of passkeys that are found, at distances up to a length."""
    type_k, type_v, flash = cache
    with Model(path, n_ctx=length, type_k=type_k, type_v=type_v, flash_attn=flash, device="cpu") as model:
        cells = pi_gguf.evaluate_passkey(model, windows=[length], distances=4, keys=keys, growing=True).cells
    return sum(cell.found for cell in cells) / sum(cell.keys for cell in cells)


def measure(path: Path, length: int, caches: Sequence[Cache], rounds: int, keys: int) -> dict[str, dict[str, Any]]:
    """Return by type of the cache what it costs, each in its turn in each round."""
    runs: dict[Cache, list[dict[str, float]]] = {cache: [] for cache in caches}
    for turn in range(rounds):
        for cache in caches if turn % 2 else reversed(caches):
            runs[cache].append(run_once(path, length, cache))
    found: dict[str, dict[str, Any]] = {}
    for cache, each in runs.items():
        speeds = {
            f"{what}{name}": round(of(run[what] for run in each), 1)
            for what in ("read", "write")
            for name, of in (("", statistics.median), (", best", max))
        }
        found[named(cache)] = {
            **speeds, "perplexity": round(math.exp(each[0]["loss"]), 3), "bytes": int(each[0]["bytes"]),
            **({"passkeys": passkeys(path, length, cache, keys)} if keys else {}),
        }  # fmt: skip
        print(path.name, length, named(cache), found[named(cache)], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--toy", action="store_true", help="512 tokens, once")
    parser.add_argument("--lengths", default="4096,32768", help="tokens that the cache holds, separated by commas")
    parser.add_argument("--plain", action="store_true", help="leave out flash attention, by which a CPU reads slowly")
    parser.add_argument("--types", default="", help="of K that are measured, e.g. f16,q8_0; all when left out")
    parser.add_argument("--rounds", type=int, default=2, help="times that each is measured")
    parser.add_argument("--keys", type=int, default=2, help="passkeys at each of four distances; 0 asks for none")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kv_cache.json")
    args = parser.parse_args()
    types = args.types.split(",") if args.types else [cache[0] for cache in CACHES]
    caches = [cache for cache in CACHES if cache[0] in types and not (args.plain and cache[2])]
    lengths, rounds, keys = ([512], 1, 1) if args.toy else (map(int, args.lengths.split(",")), args.rounds, args.keys)
    found: dict[str, Any] = json.loads(args.out.read_text())["files"] if args.out.exists() else {}
    for length in lengths:
        for path in args.files:
            window = read_gguf(path).rope.max_position_embeddings
            if length <= window:
                tokens = min(length, window - WRITTEN)
                found.setdefault(path.name, {})[str(length)] = measure(path, tokens, caches, rounds, keys)
            args.out.write_text(json.dumps({"files": found, **provenance(seed=0, device="cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
