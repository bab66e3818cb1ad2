"""Damage small files of every kind at random, run commands on them, and count how the commands end.

In: how many mutants and from which seed. Out: JSON with counts by kind and end, and what failed; each failed mutant can
be made again with --again. Every mutant ends in success or in a refusal of two lines, or this exits 1.

Example:
    python tools/mutate.py --count 20000 --out mutants.json
    python tools/mutate.py --again "gguf llama" 1234 --into /tmp/mutant
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", GGML_NO_BACKTRACE="1")

from mutants import make_kinds, make_mutant, run_mutants, to_json

from pi_gguf.common.provenance import provenance


def main() -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="mutants in total, as many of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of each kind")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further mutants after so many")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--again", nargs=2, metavar=("KIND", "SEED"), help="make one mutant and print its command")
    parser.add_argument("--into", type=Path, default=Path("mutant"), help="folder for --again")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.again:
        name, seed = options.again
        options.into.mkdir(parents=True)
        kind = make_kinds(options.into.absolute())[name]
        print("pi-gguf", *make_mutant(kind, name, int(seed), options.into.absolute() / "mutant"))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = {name: kind for name, kind in make_kinds(Path(folder)).items() if options.only in name}
        each = -(-options.count // len(kinds))
        seeds = [(name, seed) for seed in range(options.seed, options.seed + each) for name in kinds]
        counts, failed, saved, started = defaultdict(Counter), [], [], time.monotonic()
        for outcome, by_trial in run_mutants(
            kinds, Path(folder) / "mutant", seeds[: options.count], seconds=options.seconds
        ):
            counts[outcome.kind][outcome.ended] += 1
            saved += [to_json(outcome)] if by_trial else []
            if not outcome.well:
                failed.append(to_json(outcome))
                print(
                    f"{outcome.kind} {outcome.seed}: {outcome.ended} {outcome.code}: {outcome.said[-200:]!r}",
                    file=sys.stderr,
                )
        seconds = round(time.monotonic() - started, 1)
    result = {
        "mutants": sum(map(Counter.total, counts.values())), "seconds": seconds, "saved_by_a_child": len(saved),
        "ends": dict(sum(counts.values(), Counter())), "kinds": {name: dict(ends) for name, ends in counts.items()},
        "failed": failed, "saved": saved, **provenance(seed=options.seed, device="cpu"),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key not in ("failed", "saved")}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
