"""How far a file with a wrong position scaling is from transformers, by the length of the prompt that is read.

In: MODEL and a longer window. Out: `benchmarks/wrong_scalings.json`, or another by `--out`: for each type, way to be
wrong and length, the mean KL divergence in nats of llama.cpp from transformers over the last 256 tokens, beside the
limit of the check. Rows that are in the file already are not measured again.

Example (two minutes on 2 cores):
    python benchmarks/wrong_scalings.py bundled:tiny --context 131072 --lengths 600,2304
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent

from pi_gguf import bundled, convert  # noqa: E402
from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from pi_gguf.common.files import write_json  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.gguf.file import read_gguf  # noqa: E402
from pi_gguf.gguf.header import Entry, read_header, write_changed  # noqa: E402
from pi_gguf.measure.kl import kl_divergence  # noqa: E402
from pi_gguf.models.hf import HfModel  # noqa: E402
from pi_gguf.prove.check import largest_kl_divergence  # noqa: E402
from pi_gguf.runtime.model import Model  # noqa: E402

SCORED = 256


def ways(arch: str, factor: float, theta: float) -> dict[str, dict[str, Entry | None]]:
    """Return the keys of a header that are changed, by what is wrong then."""
    scaling = f"{arch}.rope.scaling"
    missing = ("type", "factor", "original_context_length", "finetuned")

    def factor_of(value: float) -> dict[str, Entry | None]:
        return {f"{scaling}.factor": Entry.of(float(value))}

    return {
        "sound": {},
        "upside down": factor_of(1 / factor),
        "missing": dict.fromkeys(f"{scaling}.{name}" for name in missing),
        "half": factor_of(factor / 2),
        "twice": factor_of(2 * factor),
        "5 % more": factor_of(1.05 * factor),
        "1 % more": factor_of(1.01 * factor),
        "base twice": {f"{arch}.rope.freq_base": Entry.of(2 * theta)},
        "base 5 % more": {f"{arch}.rope.freq_base": Entry.of(1.05 * theta)},
    }


def reference(checkpoint: Checkpoint, length: int) -> tuple[list[int], np.ndarray]:
    """Return a prompt, and transformers' logits of its last tokens."""
    lm = HfModel(checkpoint, device="cpu")
    ids = lm.tokenize("\n".join(bundled.novels("heldout").values())[: 8 * length])[:length]
    logits = np.concatenate(list(lm.logits_chunks(ids, SCORED)))
    lm.close()
    return ids, logits


def divergence(path: Path, ids: list[int], logits: np.ndarray) -> float:
    """Return the mean KL divergence of llama.cpp, in nats."""
    with Model(path, n_ctx=max(512, len(ids)), device="cpu") as model:
        by_token, _ = kl_divergence(logits, np.concatenate(list(model.logits_chunks(ids, SCORED))))
    return float(by_token.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, required=True, help="new window, in tokens")
    parser.add_argument("--lengths", default="600", help="of prompts, in tokens; comma-separated")
    parser.add_argument("--types", default="F32,F16,Q8_0,Q4_K_M", help="of the file; comma-separated")
    parser.add_argument("--only", default="", help="ways to be wrong; comma-separated, all when left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "wrong_scalings.json")
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    checkpoint = load_checkpoint(args.model).extended(args.context)
    rope, arch = checkpoint.rope, checkpoint.family.arch
    chosen = ways(arch, rope.factor, rope.rope_theta)
    chosen = {name: chosen[name] for name in (args.only.split(",") if args.only else chosen)}
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.gguf"
        prompts = {length: reference(checkpoint, length) for length in map(int, args.lengths.split(","))}
        for quant in args.types.split(","):
            sound = Path(folder) / f"{quant}.gguf"
            convert(
                args.model, sound, context=args.context, steps=0, quant=quant, check="none", certify=False,
                overwrite=True,
            )  # fmt: skip
            for name, changes in chosen.items():
                header = read_header(sound)
                write_changed(header.changed(changes), wrong)
                for length, (ids, logits) in prompts.items():
                    item = {
                        "model": checkpoint.name,
                        "factor": rope.factor,
                        "quant": quant,
                        "wrong": name,
                        "tokens": length,
                    }
                    if any(item.items() <= row.items() for row in record["rows"]):
                        continue
                    limit = largest_kl_divergence(read_gguf(sound))
                    found = divergence(wrong, ids, logits)
                    record["rows"].append({**item, "kl_divergence": float(f"{found:.3g}"), "limit": limit})
                    print(item, f"{found:.3g}", flush=True)
                    write_json(args.out, {**record, **provenance(seed=0, device="cpu")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
