"""Freed memory that is kept: blocks that come again cost no pages, and what was kept is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pi_gguf.common.heap import _glibc

CHILD = """
import resource
import numpy as np
import psutil
from pi_gguf.common.heap import kept_heap

SIZE = 2**26

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(SIZE, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

usual, empty = pages(), resident()
with kept_heap("{device}"):
    with kept_heap("{device}"):
        pages()
    kept, held = pages(), resident()
after = pages()
print(usual, kept, after, held - empty > SIZE // 2, resident() - empty > SIZE // 2)
"""


@pytest.mark.skipif(_glibc() is None, reason="a C library other than glibc")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_that_come_again_have_their_pages(device):
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(device=device)], capture_output=True, text=True, check=True
    )
    usual, kept, after, held, left = done.stdout.split()
    assert int(usual) > 500 and int(after) > 500, "64 MiB have 16,384 pages, or 32 large ones"
    assert left == "False", "what was kept was given back"
    if device == "cpu":
        assert int(kept) < 50 and held == "True"
    else:
        assert int(kept) > 500 and held == "False"
