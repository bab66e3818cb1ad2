"""Start one of the package's modules in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def run_child(module: str, *arguments: str, seconds: float, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a module of this package in a process of its own, which imports what this one does.

    Args:
        module: its name, without the package's.
        seconds: after which it is killed.
        options: of `subprocess.run`.
    """
    # -P: the folder that one stands in may be a stranger's, and what lies there is not to be imported
    command = [sys.executable, "-P", "-m", f"pi_gguf.{module}", *arguments]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
    environment = {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
    return subprocess.run(command, env=environment, timeout=seconds, check=False, **options)


def limit_child(memory_bytes: int, cpu_seconds: int) -> None:
    """Bound the memory and the CPU time of this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
