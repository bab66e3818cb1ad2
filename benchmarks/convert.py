"""Time and peak memory of `pi-gguf convert` against llama.cpp's own two steps, alternating in one run.

In: nothing; a random bf16 Llama of about 2 GB is made. Out: `benchmarks/convert.json`, with every run and the ratios of
medians. The peers are the converter of llama-cpp-python's source distribution and llama.cpp's quantizer; `cp` of the
checkpoint's folder is the physical limit of a conversion that changes nothing. All are whole commands, the start of
Python and its imports included; the checkpoint is in the page cache, and numba's search of K-quants was compiled before
(`benchmarks/quantizer.py` says what that takes).

Example (about 10 minutes on 2 cores, 9 GB of disk):
    python benchmarks/convert.py --rounds 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from commands import measure  # noqa: E402
from compare_with_reference import REFERENCE, fetch_reference  # noqa: E402

from pi_gguf import bundled  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.write import kquants  # noqa: E402

REFERENCE_ONCE = REFERENCE.replace("for line in sys.stdin:", "for line in [sys.argv[2]]:")


def make_model(folder: Path, layers: int) -> int:
    """Save a random bf16 Llama, 2048 wide, with the bundled tokenizer; return the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=32000, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
        dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in bundled.TINY_DIR.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="times everything is run")
    parser.add_argument("--layers", type=int, default=18, help="of the model; 18 make 2.08 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "convert.json")
    args = parser.parse_args()
    vendor = fetch_reference()
    if not all(kquants.gives_ggml_bytes(kind) for kind in kquants.KINDS):
        print("note: this machine's ggml has other arithmetic; K-quants are its own")
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, out, exact = Path(scratch) / "model", Path(scratch) / "out.gguf", Path(scratch) / "exact.gguf"
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a child's peak begins with its parent's memory
            nbytes = pool.apply(make_model, (folder, args.layers))
        ours = [sys.executable, "-m", "pi_gguf", "convert", str(folder), str(out), "--check", "none", "--quant"]
        theirs = [sys.executable, "-c", REFERENCE_ONCE, str(vendor), f"{folder}\tf16\t{exact}"]
        quantize = [sys.executable, "-m", "pi_gguf", "quantize", str(exact), str(out), "--quant"]
        contenders = {
            "cp": [["cp", "-r", str(folder), str(Path(scratch) / "copy")]],
            "F16, pi-gguf": [[*ours, "F16"]],
            "F16, llama.cpp": [theirs],
            "Q8_0, pi-gguf": [[*ours, "Q8_0"]],
            "Q8_0, llama.cpp": [theirs, [*quantize, "Q8_0"]],
            "Q4_K_M, pi-gguf": [[*ours, "Q4_K_M"]],
            "Q4_K_M, llama.cpp": [theirs, [*quantize, "Q4_K_M"]],
            "Q4_K_M by ggml, pi-gguf": [[*ours, "Q4_K_M", "--quantizer", "ggml"]],
        }
        for turn in range(args.rounds):
            for name, commands in contenders.items():
                measured = measure(commands)
                runs.setdefault(name, []).append(measured)
                print(f"round {turn + 1}: {name}: {measured['seconds']} s, {measured['peak_mib']} MiB", flush=True)
                for path in (out, exact):
                    path.unlink(missing_ok=True)
                shutil.rmtree(Path(scratch) / "copy", ignore_errors=True)
    medians = {
        name: {key: statistics.median(run[key] for run in all_runs) for key in ("seconds", "peak_mib")}
        for name, all_runs in runs.items()
    }
    theirs_by_ours = {quant: quant for quant in ("F16", "Q8_0", "Q4_K_M")} | {"Q4_K_M by ggml": "Q4_K_M"}
    ratios: dict[str, Any] = {
        f"{quant}, {key}": round(medians[f"{quant}, pi-gguf"][key] / medians[f"{peer}, llama.cpp"][key], 3)
        for quant, peer in theirs_by_ours.items()
        for key in ("seconds", "peak_mib")
    }
    ratios["F16, seconds, pi-gguf / cp"] = round(medians["F16, pi-gguf"]["seconds"] / medians["cp"]["seconds"], 2)
    record = {
        "model_bytes": nbytes,
        "medians": medians,
        "ratios": ratios,
        "runs": runs,
        **provenance(seed=0, device="cpu"),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
