"""Fine-tunes in processes of their own, each of which tells what training takes of it beside what was there before.

What it takes is the anonymous memory of a process at its highest, from the second step to the last; the C library is
told to give back at once what is freed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_server = multiprocessing.get_context("forkserver")


def _kibibytes() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[0].startswith(("Vm", "Rss"))}


def _anonymous(which: str) -> int:
    """Return what is of no file of `VmRSS` or of the highest since it was reset, `VmHWM`, in bytes."""
    now = _kibibytes()
    return 1024 * (now[which] - now["RssFile"] - now["RssShmem"])


def _measure(given: dict[str, Any], micro_batch_tokens: int, environment: dict[str, str], answers: Any) -> None:
    for name, value in ((_M_TRIM_THRESHOLD, 1 << 16), (_M_MMAP_THRESHOLD, 1 << 16)):
        ctypes.CDLL(None).mallopt(name, value)
    os.environ.update(environment)
    import torch
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    import pi_gguf
    import pi_gguf.common.machine
    import pi_gguf.tune.choose
    import pi_gguf.tune.trainer
    import pi_gguf.tune.validation

    torch.set_num_threads(1)
    found: dict[str, int] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            if state.global_step == state.max_steps:
                found["taken"] = _anonymous("VmHWM") - found.pop("before")

    def opened(*arguments: Any) -> Any:
        gc.collect()
        found["before"] = _anonymous("VmRSS")
        return open_model(*arguments)

    def fitted(*arguments: Any) -> Any:
        fit = fit_activations(*arguments)
        found["predicted"] = fit[1]
        return fit

    open_model, fit_activations = pi_gguf.tune.trainer._open_model, pi_gguf.tune.trainer.fit_activations
    pi_gguf.tune.trainer._open_model, pi_gguf.tune.trainer.fit_activations = opened, fitted
    pi_gguf.common.machine.fast_bf16 = lambda device: False
    pi_gguf.tune.choose._MICRO_BATCH_TOKENS = micro_batch_tokens
    transformers_trainer.DEFAULT_CALLBACKS.append(Clock)
    transformers_trainer.Trainer._save_checkpoint = lambda *_, **__: None
    pi_gguf.tune.validation.Validation.price = lambda *_: None
    pi_gguf.extend(**given)
    answers.put(found)


def memory_of_extend(given: dict[str, Any], n: int, micro_batch_tokens: int) -> list[dict[str, int]]:
    """Run `pi_gguf.extend` in `n` processes; return what was `predicted` and `taken` of each, in bytes.

    Args:
        given: its arguments.
        micro_batch_tokens: as few, so that small runs have several micro-batches.
    """
    _server.set_forkserver_preload(["transformers.trainer", "pi_gguf.tune.extend", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    answers: Any = _server.Queue()
    processes = []
    for rank in range(n):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
        processes.append(_server.Process(target=_measure, args=(given, micro_batch_tokens, environment, answers)))
        processes[-1].start()
    for process in processes:
        process.join(200)
        process.kill()
    return [answers.get(timeout=1) for _ in processes if not answers.empty()]
