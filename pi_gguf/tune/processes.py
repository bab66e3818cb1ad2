"""More than one process: those that torchrun and accelerate launch start.

In: the environment they set. Out: which one writes, and the arguments of transformers' Trainer that spread a run; a
value that cannot work is refused before anything is read.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pi_gguf.common.machine import Machine
from pi_gguf.common.private import shared_state
from pi_gguf.common.progress import process_count, process_rank
from pi_gguf.errors import OptionError
from pi_gguf.tune.options import SpreadOptions

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
"""How long the others wait for the first one to tokenize or to write."""


@dataclass(frozen=True)
class Spread:
    """How a run is spread over processes.

    Args:
        processes: all there are.
        fsdp: weights, gradients and moments are sharded (FSDP2); otherwise each process holds all (DDP).
        cp_size: processes that share one sequence by torch's context parallelism.
        sp_size: the same by DeepSpeed's sequence parallelism.
        deepspeed: its config file; None without.
    """

    processes: int = 1
    fsdp: bool = False
    cp_size: int = 1
    sp_size: int = 1
    deepspeed: str | None = None

    @property
    def shards(self) -> int:
        """Return how many processes share weights, gradients and moments; 1 where each holds all."""
        return self.processes if self.fsdp or self.deepspeed else 1

    @property
    def readers(self) -> int:
        """Return how many processes read micro-batches of their own."""
        return self.processes // (self.cp_size * self.sp_size)

    def arguments(self, recompute: bool, offload: bool) -> dict[str, Any]:
        """Return arguments of transformers' TrainingArguments.

        Args:
            recompute: activations are recomputed layer by layer; by FSDP2's own way it gathers weights once less.
            offload: the inputs of layers wait in the host's memory, which that way cannot.
        """
        found: dict[str, Any] = {"ddp_find_unused_parameters": False}
        by_fsdp = self.fsdp and recompute and not offload
        if recompute and not by_fsdp:
            found["activation_checkpointing"] = True
            found["activation_checkpointing_kwargs"] = {"offload": True} if offload else None
        if self.deepspeed:
            found["deepspeed"] = self.deepspeed
        elif self.fsdp:
            sharding = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": by_fsdp}
            found |= {"fsdp": True, "fsdp_config": sharding}
            # Otherwise gradients stay whole on each process until the step's last micro-batch.
            found["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        if self.cp_size * self.sp_size > 1:
            from accelerate import ParallelismConfig

            found["parallelism_config"] = ParallelismConfig(
                dp_shard_size=self.readers, cp_size=self.cp_size, sp_size=self.sp_size,
                sp_backend="deepspeed" if self.sp_size > 1 else None,
            )  # fmt: skip
        return found


def check_spread(machine: Machine, train: str, options: SpreadOptions) -> Spread:
    """Return how a run is spread over a machine's processes; adapters are never sharded.

    Args:
        train: full, lora or qlora.

    Raises:
        OptionError: it cannot work there.
    """
    processes, sp_size, deepspeed = machine.processes, options.sp_size, options.deepspeed
    cp_size = 1 if options.cp_size is None else options.cp_size
    for name, size in (("cp-size", cp_size), ("sp-size", sp_size)):
        if size < 1:
            raise OptionError(f"{name} must be at least 1, got {size}")
        if size > 1 and machine.device != "cuda":
            raise OptionError(
                f"{name} needs CUDA GPUs, got {size} on device {machine.device}: torch shares no attention among CPUs",
                "leave it out; shorter sequences with skips (--train-window) need less memory",
            )
    if cp_size > 1 and sp_size > 1:
        raise OptionError(f"cp-size and sp-size exclude each other, got {cp_size} and {sp_size}", "give one of them")
    if processes % (cp_size * sp_size):
        raise OptionError(f"{cp_size * sp_size} processes to a sequence do not divide the {processes} there are")
    if machine.card is None:
        _check_deepspeed(deepspeed, sp_size)
    sharded = options.fsdp and train == "full" and processes > 1 and deepspeed is None
    if cp_size > 1 and not sharded:
        raise OptionError("cp-size goes with --train full and --fsdp only", "leave it out")
    return Spread(processes, sharded, cp_size, sp_size, deepspeed)


def _check_deepspeed(config: str | None, sp_size: int) -> None:
    if config is not None and not Path(config).is_file():
        raise OptionError(f"deepspeed: no such file as {config}", "give a DeepSpeed config in JSON")
    if (config is not None or sp_size > 1) and find_spec("deepspeed") is None:
        raise OptionError("deepspeed is not installed", "pip install deepspeed, or leave --deepspeed and --sp-size out")


@contextmanager
def first_process_first(device: str) -> Iterator[None]:
    """Let the first process through while the others wait, then these."""
    if process_count() == 1:
        yield
        return
    with _state(device).main_process_first():
        yield


def wait_for_everyone(device: str) -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        _state(device).wait_for_everyone()


def agree(value: T, device: str) -> T:
    """Return the first process's value in every process."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state(device)

    agreed: T = broadcast_object_list([value])[0]
    return agreed


def is_first_process() -> bool:
    """Tell whether this is the process that speaks and writes."""
    return process_rank() == 0


def _state(device: str) -> Any:
    from accelerate import PartialState

    atexit.unregister(_part)
    atexit.register(_part)
    return PartialState(cpu=device == "cpu", timeout=_PATIENCE)


def _part() -> None:
    """Close the connections to the others before Python ends: one that sees them break off may be aborted."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def shard_on_cpu() -> None:
    """Let accelerate shard on CPUs, which torch can: it offers FSDP for what it knows as accelerators only."""
    from accelerate.utils import DistributedType

    state = shared_state()
    if state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def set_precision(accelerator: Any, bf16: bool) -> None:
    """Let FSDP2 gather and compute in bfloat16 and add gradients up in 32 bits: accelerate would add them in 16, and
    round the loss."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
    )
