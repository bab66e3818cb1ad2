"""Weights a second of the two searches of K-quants and IQ4: ggml's own, and the same by numba, many blocks at a time.

In: nothing; weights drawn as a trained model's lie. Out: `benchmarks/quantizer.json`: for each type, weighed by an
importance matrix and not, millions of weights a second on all cores, in turn, and how many bytes differ; and the
seconds that numba's compiler takes where nothing is kept of an earlier run.

Example (a minute and a half on 2 cores):
    python benchmarks/quantizer.py
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pi_gguf.common.machine import cores  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.gguf.file import tensor_nbytes  # noqa: E402
from pi_gguf.llamacpp import quantizer as ggml  # noqa: E402
from pi_gguf.write import kquants  # noqa: E402

COLUMNS = 2048
CHUNK = 2**18
"""Weights that a core quantizes at once, as a conversion does."""

COMPILE = """
import time, numpy as np
from pi_gguf.write import kquants
started = time.perf_counter()
for kind in kquants.KINDS:
    assert kquants.gives_ggml_bytes(kind)
print(time.perf_counter() - started)
"""


def seconds_to_compile() -> float:
    """Return what the first use of a machine takes, with the comparison with ggml."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def rate(quantize: Callable[..., None], kind: str, rows: np.ndarray, out: np.ndarray, weights: Any) -> float:
    """Return millions of weights a second on all cores."""
    step = CHUNK // rows.shape[1]
    with ThreadPoolExecutor(cores()) as pool:
        started = time.perf_counter()
        parts = [slice(start, start + step) for start in range(0, len(rows), step)]
        list(pool.map(lambda part: quantize(kind, rows[part], out[part], weights), parts))
        return rows.size / (time.perf_counter() - started) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times each is measured")
    parser.add_argument("--rows", type=int, default=8192, help=f"of {COLUMNS} weights")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quantizer.json")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = rng.standard_t(5, (args.rows, COLUMNS)).astype(np.float32) * np.float32(0.02)
    importance = rng.random((COLUMNS,)).astype(np.float32)
    compiled = seconds_to_compile()
    results: dict[str, Any] = {}
    for kind in kquants.KINDS:
        assert kquants.gives_ggml_bytes(kind)
        for weighed in (False, True):
            ours, theirs = (np.empty((len(rows), tensor_nbytes(kind, (COLUMNS,))), np.uint8) for _ in range(2))
            runs: dict[str, list[float]] = {"ggml": [], "numba": []}
            for _ in range(args.rounds):
                weights = importance if weighed else None
                runs["ggml"].append(round(rate(ggml.quantize_rows, kind, rows, theirs, weights), 2))
                runs["numba"].append(round(rate(kquants.quantize_rows, kind, rows, ours, weights), 2))
            medians = {name: statistics.median(found) for name, found in runs.items()}
            results[f"{kind}, importance matrix" if weighed else kind] = {
                "medians": medians,
                "ratio": round(medians["numba"] / medians["ggml"], 2),
                "bytes that differ": int((ours != theirs).sum()),
                "bytes": ours.nbytes,
                "runs": runs,
            }
            print(kind, "weighed" if weighed else "", medians, flush=True)
    record = {
        "weights": rows.size,
        "compile_seconds": round(compiled, 1),
        "quantizers": results,
        **provenance(seed=0, device="cpu"),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
