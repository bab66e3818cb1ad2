"""What an evaluation costs in llama.cpp: time against its own prompt processing, and memory beside weights and cache.

In: a GGUF file. Out: `benchmarks/evaluation.json`: for us and for llama.cpp, alternating in one run, seconds to read
the windows of the paper's protocol, each from its start. Of each we score 256 tokens, llama.cpp computes the last one's
logits. Peak memory of a process that scores a whole window, beside the weights and the KV cache. With --passkey, the
seconds of 32 x 10 passkeys up to the largest window, in growing prompts.

Example (ten minutes for the demo's file; --windows 512,1024 is a trial):
    python benchmarks/evaluation.py out/demo/tiny-32k-F16.gguf --passkey
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pi_gguf import bundled
from pi_gguf.common.provenance import provenance
from pi_gguf.evaluate.passkey import evaluate_passkey
from pi_gguf.gguf.file import read_gguf
from pi_gguf.llamacpp.cache import predict_kv_cache
from pi_gguf.llamacpp.library import llama_cpp_library
from pi_gguf.measure.perplexity import sliding_windows
from pi_gguf.runtime.model import Model

ROOT = Path(__file__).parent.parent
STRIDE = 256
_BATCH = 512


def read_plainly(model: Model, ids: list[int]) -> None:
    """Let llama.cpp process a prompt from its start, with the logits of its last token."""
    llama_cpp = llama_cpp_library()
    model._llama.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model._llama.ctx), True)
    for start in range(0, len(ids), _BATCH):
        part = (llama_cpp.llama_token * len(ids[start : start + _BATCH]))(*ids[start : start + _BATCH])
        assert llama_cpp.llama_decode(model._llama.ctx, llama_cpp.llama_batch_get_one(part, len(part))) == 0
    llama_cpp.llama_get_logits_ith(model._llama.ctx, -1)[0]  # waits for it


def time_windows(path: Path, window: int, windows: int, rounds: int) -> dict[str, Any]:
    """Return seconds of both on the same windows, medians over rounds (more of short windows), and their ratio."""
    text = max(bundled.novels("heldout").values(), key=len)
    found: dict[str, list[float]] = {"pi-gguf": [], "llama.cpp": []}
    with Model(path, n_ctx=window, type_k="f16") as model:
        ids = model.tokenize(text)[: window + STRIDE * windows]
        jobs = [part for part, _ in sliding_windows(ids, window, STRIDE, model.bos)][1 : windows + 1]
        read_plainly(model, jobs[0][:_BATCH])
        for _ in range(rounds * max(1, 8192 // window)):
            for who, seconds in found.items():
                started = time.perf_counter()
                for job in jobs:
                    if who == "pi-gguf":
                        model.score(job, STRIDE)
                    else:
                        read_plainly(model, job)
                seconds.append(time.perf_counter() - started)
                model._evaluated = []
    medians = {who: statistics.median(seconds) for who, seconds in found.items()}
    return {**medians, "ratio": medians["pi-gguf"] / medians["llama.cpp"], "tokens": len(jobs) * window}


def memory(path: Path, window: int) -> dict[str, float]:
    """Return the peak memory in MB of a process that scores a whole window, Python and its libraries included."""
    code = (
        "import sys\nfrom pi_gguf.runtime.model import Model\nfrom pi_gguf.common.provenance import peak_memory\n"
        "model = Model(sys.argv[1], n_ctx=int(sys.argv[2]), type_k='f16')\n"
        "model.score([i % 900 + 3 for i in range(int(sys.argv[2]))], int(sys.argv[2]) - 1)\n"
        "print(peak_memory())"
    )
    run = [sys.executable, "-c", code, str(path), str(window)]
    # At least this process's own: Linux hands the mark on to what it starts.
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    cache, weights = predict_kv_cache(read_gguf(path), window, "f16", "f16"), path.stat().st_size
    return {
        "peak_mb": peak / 1e6, "weights_mb": weights / 1e6, "kv_cache_mb": cache / 1e6,
        "over_weights_and_cache_mb": (peak - weights - cache) / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--windows", default="2048,8192,32768", help="in tokens; the last one is the largest")
    parser.add_argument("--rounds", type=int, default=3, help="times both are run, of windows above 4096")
    parser.add_argument("--passkey", action="store_true", help="ask 32 x 10 passkeys up to the largest window too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "evaluation.json")
    args = parser.parse_args()
    windows = [int(window) for window in args.windows.split(",")]
    record: dict[str, Any] = {"file": args.file.name, "scoring": {}}
    for window in windows:
        record["scoring"][str(window)] = time_windows(args.file, window, max(1, 16384 // window), args.rounds)
        print(window, record["scoring"][str(window)], flush=True)
    record["memory"] = memory(args.file, windows[-1])
    print(record["memory"], flush=True)
    if args.passkey:
        started = time.perf_counter()
        report = evaluate_passkey(str(args.file), windows=windows[-1:], growing=True)
        record["passkey"] = {
            "window": windows[-1], "seconds": time.perf_counter() - started, "k_max": next(iter(report.k_max.values())),
            "keys": sum(cell.keys for cell in report.cells), "found": sum(cell.found for cell in report.cells),
        }  # fmt: skip
        print(record["passkey"], flush=True)
    record |= provenance(seed=0, device="cpu")
    record["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
