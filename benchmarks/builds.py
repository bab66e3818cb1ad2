"""What a way to compile llama.cpp is worth on this CPU: reading and writing speed, with fast and with plain buffers.

In: GGUF files, and folders of llama.cpp's libraries by name. Out: `benchmarks/builds.json`: tokens per second of each,
alternating in one run, medians over rounds; the signal where a build does not live through it. Each measurement is a
process of its own.

Example (the libraries of three builds; an idle machine; five minutes):
    python benchmarks/builds.py smollm2-Q4_1.gguf --library stores-kept=A/llama_cpp/lib --library no-amx=B/llama_cpp/lib
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pi_gguf.common.provenance import provenance

ROOT = Path(__file__).parent.parent

_CODE = """
import sys, time
from pi_gguf.common.machine import cores
from pi_gguf.llamacpp.opening import open_llama
path, fast, tokens, written = sys.argv[1], sys.argv[2] == "fast", int(sys.argv[3]), int(sys.argv[4])
n = cores()
llama = open_llama(path, fast_buffers=fast, n_ctx=tokens + written + 8, n_batch=512, n_ubatch=512, n_threads=n,
                   n_threads_batch=n, verbose=False)
llama.eval(range(5, 5 + 33))
llama.reset()
started = time.perf_counter()
llama.eval([i % 500 + 5 for i in range(tokens)])
read = time.perf_counter()
for i in range(written):
    llama.eval([i + 5])
print(tokens / (read - started), written / (time.perf_counter() - read))
"""


def measure(path: Path, library: str, buffers: str, tokens: int, written: int) -> tuple[float, float] | str:
    """Return tokens per second read and written; the name of the signal where the process died."""
    command = [sys.executable, "-c", _CODE, str(path), buffers, str(tokens), str(written)]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": library, "GGML_NO_BACKTRACE": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode < 0:
        return signal.Signals(-child.returncode).name
    read, wrote = child.stdout.split()
    return float(read), float(wrote)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("--library", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--tokens", type=int, default=1024, help="read")
    parser.add_argument("--written", type=int, default=64, help="tokens, one by one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "builds.json")
    args = parser.parse_args()
    libraries = dict(item.split("=", 1) for item in args.library)
    found: dict[tuple[str, str, str], list[Any]] = {}
    for _ in range(args.rounds):
        for path in args.files:
            for name, folder in libraries.items():
                for buffers in ("fast", "plain"):
                    got = measure(path, folder, buffers, args.tokens, args.written)
                    found.setdefault((path.name, name, buffers), []).append(got)
    rows = []
    for (file, name, buffers), values in found.items():
        row: dict[str, Any] = {"file": file, "build": name, "buffers": buffers}
        if died := [value for value in values if isinstance(value, str)]:
            row["died"] = died[0]
        else:
            row |= {"read": statistics.median(v[0] for v in values), "written": statistics.median(v[1] for v in values)}
        rows.append(row)
        print(row, flush=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    features = next((line for line in lines if line.startswith("flags")), "")
    record = {"cpu": cpu, "amx": "amx_int8" in features, "tokens": args.tokens, "written": args.written, "rows": rows}
    args.out.write_text(json.dumps({**record, **provenance(seed=0, device="cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
