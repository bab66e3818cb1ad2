"""Whole commands, measured: seconds and peak memory, the start of Python and its imports included.

It imports nothing large: a child's peak begins with its parent's memory.
"""

from __future__ import annotations

import os
import time


def measure(commands: list[list[str]]) -> dict[str, float]:
    """Run commands one after the other; return seconds of all and the largest peak memory in MiB."""
    started, peak = time.perf_counter(), 0
    for command in commands:
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ])  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)[:300]}: ended with {os.waitstatus_to_exitcode(status)}")
        peak = max(peak, usage.ru_maxrss)
    return {"seconds": round(time.perf_counter() - started, 2), "peak_mib": round(peak / 1024)}
