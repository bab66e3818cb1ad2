"""How cost grows, at toy size: every command has its points, powers are those of the points, tables have all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import growth  # noqa: E402
import write_tables  # noqa: E402


def test_the_power_is_that_of_the_last_two_points():
    points = [{"tokens": n, "seconds": s, "peak_mib": 100} for n, s in ((1000, 50.0), (2000, 3.0), (8000, 48.0))]
    assert growth.slopes({"a": points, "b": points[:1]}) == {"a": {"seconds": 2.0, "peak_mib": 0.0}}


@pytest.mark.slow
def test_it_runs_at_toy_size(tmp_path):
    out = tmp_path / "growth.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "growth.py", "--toy", "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    for half, what in (("size", "parameters"), ("window", "tokens")):
        for title, points in record[half].items():
            assert len(points) == 2 and points[0][what] < points[1][what], title
            assert all(point["seconds"] >= 0 and point["peak_mib"] > 0 for point in points), title
        assert (tmp_path / f"growth-{half}.png").stat().st_size > 10_000
        table = write_tables.growth_table(record, half)
        assert all(f"`{title}`" in table for title in record[half])
    assert {"plan", "unpack", "inspect"} <= set(record["size"]) and "certify" not in record["window"]
