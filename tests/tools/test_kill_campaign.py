"""A short campaign of kills, pairs and full disks; `tools/kill_campaign.py` runs a long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pi_gguf.errors import OptionError
from pi_gguf.measure.journal import Kept

KEPT = """
import resource, sys
from pi_gguf.measure.journal import Kept
kept = Kept(sys.argv[1])
kept.put({"i": 1}, "x" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
try:
    kept.put({"i": 2}, "y" * 100)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits")
def test_a_finished_item_that_does_not_fit_leaves_no_part_of_it(tmp_path):
    path = tmp_path / "kept.jsonl"
    done = subprocess.run([sys.executable, "-c", KEPT, path], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ResourceError\n", done.stderr
    assert path.read_text().endswith("\n") and [json.loads(line)["item"] for line in path.open()] == [{"i": 1}]


@pytest.mark.parametrize(
    "theirs", [b"my notes, without a line break at the end", b"\0" * 2**27, b"[1]\n", b"5", b'{"a": 1}']
)
def test_a_file_of_something_else_is_no_file_of_finished_items(tmp_path, theirs):
    path = tmp_path / "notes.txt"
    path.write_bytes(theirs)
    with pytest.raises(OptionError, match="line 1 is no finished item"):
        Kept(str(path))
    assert path.read_bytes() == theirs


def test_what_a_kill_cut_off_is_written_again(tmp_path):
    path = tmp_path / "kept.jsonl"
    Kept(str(path)).put({"i": 1}, 1)
    whole = path.read_bytes()
    for end in (2, 9, len(whole) - 3):
        path.write_bytes(whole + whole[:end])
        kept = Kept(str(path))
        assert kept.get({"i": 1}) == 1
        kept.put({"i": 2}, 2)
        assert path.read_bytes().startswith(whole) and Kept(str(path)).get({"i": 2}) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_wrong_or_left():
    from kills import can_mount

    given = {"kills": 12, "pairs": 4, "limits": 3, "fulls": 3 if can_mount() else 0, "seed": 1, "seconds": 200}
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "kills.py", json.dumps(given)], capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert sum(found["endings"]["kills"].values()) == 12 and sum(found["endings"]["pairs"].values()) == 4
