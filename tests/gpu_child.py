"""One fine-tune in a process of its own: activations treated in a given way, memory measured, or killed in the middle.

In: JSON as the only argument. `extend` are the arguments of `pi_gguf.extend`; `way` is the name of one of
`pi_gguf.tune.memory._ACTIVATIONS`, whatever the free memory; `bf16` tells whether to compute so, whatever the device;
`kill_at` is the step in which the process kills itself; `measure_only` leaves out what comes beside the steps:
checkpoints and the price. Out: pi_gguf.json on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def child(given: dict[str, Any], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run this file; the caller looks at what came of it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, json.dumps(given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)


def forced(way: str) -> Any:
    """Return a stand-in for `fit_activations` that always takes one way, and predicts what that needs."""
    from pi_gguf.tune.memory import ACTIVATIONS, estimate_training_memory

    (chosen,) = [one for one in ACTIVATIONS if one.name == way]

    def fit(checkpoint, training, machine, spread):
        return chosen, estimate_training_memory(checkpoint, training, machine, spread, chosen)

    return fit


def _die_in(step: int) -> Any:
    from transformers import TrainerCallback

    class Death(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return Death


def main() -> None:
    given = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # not the one core of the test's process
    import transformers.trainer

    import pi_gguf
    import pi_gguf.common.machine
    import pi_gguf.tune.trainer
    import pi_gguf.tune.validation

    if given.get("way"):
        pi_gguf.tune.trainer.fit_activations = forced(given["way"])
    if "bf16" in given:
        pi_gguf.common.machine.fast_bf16 = lambda device: given["bf16"]
    if given.get("kill_at"):
        transformers.trainer.DEFAULT_CALLBACKS.append(_die_in(given["kill_at"]))
    if given.get("measure_only"):
        transformers.trainer.Trainer._save_checkpoint = lambda *_, **__: None
        pi_gguf.tune.validation.Validation.price = lambda *_: None
    out = pi_gguf.extend(**given["extend"])
    print((out / "pi_gguf.json").read_text())


if __name__ == "__main__":
    main()
