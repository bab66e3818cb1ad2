"""A short campaign of kills, pairs and full disks; `tools/kill_campaign.py` runs a long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_wrong_or_left():
    from kills import can_mount

    given = {"kills": 12, "pairs": 4, "limits": 3, "fulls": 3 if can_mount() else 0, "seed": 1, "seconds": 200}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kills.py"), json.dumps(given)], capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert sum(found["endings"]["kills"].values()) == 12 and sum(found["endings"]["pairs"].values()) == 4
