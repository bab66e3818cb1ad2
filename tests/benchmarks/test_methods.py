"""Ways to spend the same tokens: each is one that `extend` takes, and all but the untrained have as many."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import methods


def test_every_way_can_be_planned_and_has_the_same_tokens(cli):
    common = ("--context", "4096", "--batch-tokens", "4096", "--steps", "40", "--device", "cpu", "--json")
    found = {}
    for name, options in methods.ways(512, 4096).items():
        code, out, err = cli("plan", "bundled:tiny", *common, *options)
        assert code == 0, f"{name}: {err}"
        found[name] = json.loads(out)["training"]
    del found["untrained PI"]
    tokens = {name: sum(s["steps"] * s["micro_batch"] * s["window"] for s in t["stages"]) for name, t in found.items()}
    assert set(tokens.values()) == {40 * 4096} and len(found) == 9
    assert [name for name, training in found.items() if training["attention_group"]] == ["PI, s2"]
    assert found["PI, s2"]["attention_group"] == 1024
