"""How long a fine-tune takes on a machine: what is computed, and what its processes send each other meanwhile.

The processes compute side by side. What they send is hidden behind that where it takes less time, and the longer of the
two counts. Adam passes over memory after each step. A step waits for nobody else; loading, writing and validation are
not counted.
"""

from __future__ import annotations

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.cards import Card
from pi_gguf.common.machine import Machine
from pi_gguf.tune.memory import trained_parameters
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.processes import Spread

_ADAM_BYTES = 28
"""Of a trained parameter, read and written in 32 bits: weight, gradient and two moments, and three of them again."""


def training_seconds(checkpoint: Checkpoint, training: TrainingPlan, machine: Machine, spread: Spread) -> float:
    """Return about how long a run takes."""
    operations = training_operations(checkpoint, training)
    computing = machine.processes if machine.device == "cuda" else machine.nodes  # processes on a CPU share its cores
    seconds = operations / (machine.operations_a_second * computing)
    if machine.card is None:
        return seconds
    trained = trained_parameters(checkpoint, training)
    sent = training.steps * _sent_bytes(checkpoint.n_parameters(), trained, training, spread)
    adam = training.steps * _ADAM_BYTES * trained / spread.shards / (machine.card.bandwidth * 1e9)
    return max(seconds, sent / _slowest_link(machine, machine.card)) + adam


def training_operations(checkpoint: Checkpoint, training: TrainingPlan) -> float:
    """Return the floating-point operations of a run, without those that are done again to save memory."""
    return sum(step_operations(checkpoint, training))


def step_operations(checkpoint: Checkpoint, training: TrainingPlan) -> list[float]:
    """Return the same of each step."""
    windows = training.tokens_by_window()
    each = {w: w * train_operations(checkpoint, training.attended(w), training.train) for w in windows}
    steps = [0.0] * training.steps
    for i, (window, n) in enumerate(training.micro_batches()):
        steps[i // training.accumulation] += n * each[window]
    return steps


def _slowest_link(machine: Machine, card: Card) -> float:
    """Return the bytes a second that each process sends."""
    return 1e9 * (card.link if machine.nodes == 1 else min(card.link, card.network))


def _sent_bytes(n: int, trained: int, training: TrainingPlan, spread: Spread) -> float:
    """Return the bytes that a process sends in a step.

    Sharded weights are gathered in 16 bits, forward and again backward, and gradients reduced in 32, with each
    micro-batch; gradients of copies are added up in a ring, once a step.
    """
    others = (spread.processes - 1) / spread.processes
    if spread.shards == 1:
        return 2 * 4 * trained * others
    return training.accumulation / spread.readers * (2 * 2 + 4) * n * others


def train_operations(checkpoint: Checkpoint, length: int, train: str = "full") -> float:
    """Return floating-point operations a token: 6 a parameter, 4 a frozen one, whose gradient is none, and causal
    attention over half the length of a sequence, or of a group within which is attended."""
    attention = 12 * checkpoint.n_layers * checkpoint.n_heads * checkpoint.head_dim * length / 2
    tied = checkpoint.vocab_size * checkpoint.hidden_size
    return (6 if train == "full" else 4) * (checkpoint.n_parameters() - (0 if checkpoint.tied else tied)) + attention
