"""Kill commands at random, start them twice and fill the disk, some hundred times; print what came of it as JSON.

    python tools/kill_campaign.py --kills 300 --pairs 100 --limits 60 --fulls 60 > kills.json

Full disks need to be allowed to mount one. Exits with 1 where anything was lost, wrong or left behind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent)]

from kills import can_mount, run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 300), ("pairs", 100), ("limits", 60), ("fulls", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no trial begins after them")
    args = parser.parse_args()
    fulls = args.fulls if can_mount() else 0
    with tempfile.TemporaryDirectory() as folder:
        summary = run(
            Path(folder), kills=args.kills, pairs=args.pairs, limits=args.limits, fulls=fulls, seed=args.seed,
            seconds=args.seconds,
        )  # fmt: skip
    print(json.dumps(summary.to_json(), indent=1))
    return 1 if summary.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
