"""A plan for a machine that is not here: how the run is spread over its cards, and the command that starts it there.

In: a fine-tune planned for that machine, by the functions that `extend` calls on it. Out: what `plan --on` says beyond
a plan for this machine, or an error with what would do.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.cards import CARDS
from pi_gguf.common.files import human_bytes
from pi_gguf.common.machine import Machine
from pi_gguf.common.options import Options, flag
from pi_gguf.errors import OptionError, ResourceError
from pi_gguf.gguf.header import is_gguf
from pi_gguf.gguf.parts import name_of_all
from pi_gguf.tune.choose import plan_run
from pi_gguf.tune.memory import Activations, fit_activations, layer_inputs_bytes
from pi_gguf.tune.options import SpreadOptions, TuneOptions
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.processes import Spread

_MOST_NODES = 64
"""So many machines are tried where fewer do not do."""


@dataclass(frozen=True)
class Elsewhere:
    """How a fine-tune runs on a machine that is not here.

    Args:
        machine: its cards.
        nodes: machines.
        cards: in all of them.
        sharding: `FSDP2`, `DeepSpeed`, or `copies` where each card has all; `none` of one card.
        cp_size: cards that share one sequence.
        micro_batch: sequences that these compute at once.
        micro_batches: of each of them, in a step.
        step_tokens: of an optimizer step, on all cards.
        free_memory_bytes: of a card.
        host_memory_bytes: of each machine: every process opens a model that is sharded in 32 bits, and the inputs of
            layers may wait there.
        tokens_a_second: all cards together.
        share: of the cards' dense rate in bf16 that is assumed.
        share_source: where that comes from.
    """

    machine: str
    nodes: int
    cards: int
    sharding: str
    cp_size: int
    micro_batch: int
    micro_batches: int
    step_tokens: int
    free_memory_bytes: int
    host_memory_bytes: int
    tokens_a_second: float
    share: float
    share_source: str


def placed(
    checkpoint: Checkpoint, training: TrainingPlan, spread: Spread, activations: Activations, machine: Machine,
    seconds: float,
) -> Elsewhere:  # fmt: skip
    """Return how a planned run is placed on a machine of `Machine.elsewhere`."""
    assert machine.card
    opened = 4 * checkpoint.n_parameters() if spread.shards > 1 else 0
    shared = spread.cp_size * spread.sp_size
    waiting = layer_inputs_bytes(checkpoint, training.micro_batch_tokens // shared, training.train, machine)
    sharding = "DeepSpeed" if spread.deepspeed else "FSDP2" if spread.fsdp else "copies"
    last = training.stages[-1]
    return Elsewhere(
        machine=machine.name,
        nodes=machine.nodes,
        cards=machine.processes,
        sharding=sharding if machine.processes > 1 else "none",
        cp_size=shared,
        micro_batch=last.micro_batch,
        micro_batches=training.accumulation // spread.readers,
        step_tokens=training.step_tokens(last),
        free_memory_bytes=machine.free_bytes,
        host_memory_bytes=machine.each * max(opened, waiting if activations.offload else 0),
        tokens_a_second=training.tokens / seconds,
        share=machine.card.share,
        share_source=machine.card.share_source,
    )


def start_command(
    model: str, context: int, tune: TuneOptions, options: SpreadOptions, training: TrainingPlan, spread: Spread,
    machine: Machine,
) -> str:  # fmt: skip
    """Return the command that starts a run on a machine; on several of them the same on each.

    A GGUF file is unpacked before, as several processes do not do that on the way.
    """
    words, before, name = ["pi-gguf"], "", _name(model)
    if machine.processes > 1:
        words = ["torchrun", "--nproc-per-node", str(machine.each), "-m", "pi_gguf"]
    if machine.nodes > 1:
        words[1:1] = ["--nnodes", str(machine.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST:29500"]
    if machine.processes > 1 and is_gguf(model):
        before, model = shlex.join(["pi-gguf", "unpack", model, name]) + " && ", name
    window = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    words += ["extend", model, f"{name}-{window}", "--context", str(context)]
    if tune.train == "auto":
        tune = replace(tune, train=training.train)
    if spread.cp_size > 1:
        options = replace(options, cp_size=spread.cp_size)
    return before + shlex.join([*words, *_given(tune), *_given(options)])


def convert_command(model: str, context: int | None, quant: str) -> str:
    """Return the command that writes a file without training."""
    scaled = [] if context is None else ["--context", str(context), "--steps", "0"]
    return shlex.join(["pi-gguf", "convert", model, f"{_name(model)}-{quant}.gguf", *scaled, "--quant", quant])


def _name(model: str) -> str:
    """Return what a model is called in names of folders."""
    path = Path(model)
    path = name_of_all(path.resolve() if path.exists() else path)
    return path.name.removesuffix(".gguf").replace(":", "-")


def _given(options: Options) -> Iterator[str]:
    """Return the words of all options that are not as they would be when left out."""
    for one in fields(options):
        value, name = getattr(options, one.name), flag(one.name)
        if value == one.default or one.default is MISSING:
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
            continue
        for part in value if isinstance(value, tuple) else (value,):
            yield from (f"--{name}", str(part))


def too_large(
    checkpoint: Checkpoint, training: TrainingPlan, need: int, tune: TuneOptions, options: SpreadOptions,
    machine: Machine,
) -> ResourceError:  # fmt: skip
    """Return the error of a run that a machine is too small for, with what would do."""
    found = []
    for changes in (_less(tune, machine), _larger(machine, tune), _more(machine, tune)):
        found += [change.words for change in changes if _fits(checkpoint, options, change)][:1]
    return ResourceError(
        f"{checkpoint.source}: --train {training.train} takes about {human_bytes(need)} a card of {machine.name}, "
        f"{human_bytes(machine.free_bytes)} are free",
        f"{' or '.join(found)} would do" if found else f"{_MOST_NODES} such machines of 8 cards are too few, too",
    )


@dataclass(frozen=True)
class _Change:
    """What may be tried instead, and how it is said."""

    words: str
    tune: TuneOptions
    machine: Machine


def _less(tune: TuneOptions, machine: Machine) -> Iterator[_Change]:
    """Yield less to train, then shorter sequences too, on the same cards."""
    ways = [way for way in ("lora", "qlora") if way != tune.train]
    for way in ways:
        yield _Change(f"--train {way}", replace(tune, train=way), machine)
    if tune.train_window or tune.mix or tune.attention == "s2":
        usual = {name: getattr(TuneOptions, name) for name in ("train_window", "mix", "attention", "s2_group")}
        without = "--train-window and --mix" if tune.attention == "full" else "--train-window and --attention"
        for way in (tune.train, *ways):
            yield _Change(f"--train {way} without {without}", replace(tune, train=way, **usual), machine)


def _larger(machine: Machine, tune: TuneOptions) -> Iterator[_Change]:
    """Yield as many of the larger cards, from the smallest, with the same and with the least to train."""
    assert machine.card
    for card in sorted(CARDS, key=lambda card: card.memory_gib):
        if card.memory_gib > machine.card.memory_gib:
            larger = replace(machine, card=card)
            yield _Change(f"--on {larger.name}", tune, larger)
            yield _Change(f"--train qlora --on {larger.name}", replace(tune, train="qlora"), larger)


def _more(machine: Machine, tune: TuneOptions) -> Iterator[_Change]:
    """Yield more of the cards: up to eight in a machine, then more machines."""
    nodes, each = machine.nodes, machine.each
    while nodes < _MOST_NODES:
        nodes, each = (nodes, min(8, 2 * each)) if each < 8 else (2 * nodes, each)
        more = replace(machine, nodes=nodes, processes=nodes * each)
        yield _Change(f"--on {more.name}", tune, more)


def _fits(checkpoint: Checkpoint, options: SpreadOptions, change: _Change) -> bool:
    try:
        training, spread = plan_run(checkpoint, change.tune, options, change.machine)
    except OptionError:
        return False
    return fit_activations(checkpoint, training, change.machine, spread)[1] <= change.machine.free_bytes
