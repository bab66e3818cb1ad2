"""What a fine-tune takes: memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.machine import Machine
from pi_gguf.tune import tiles
from pi_gguf.tune.losses import chunk_logits, loss_is_chunked
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.processes import Spread


def training_disk_bytes(checkpoint: Checkpoint, training: TrainingPlan) -> int:
    """Return the disk a fine-tune needs: three checkpoints with Adam's moments (12 bytes a trained parameter;
    the oldest goes when the newest is complete), and the result."""
    return 3 * 12 * trained_parameters(checkpoint, training) + 4 * checkpoint.n_parameters()


def trained_parameters(checkpoint: Checkpoint, training: TrainingPlan) -> int:
    """Return how many parameters are trained."""
    if training.train == "full":
        return checkpoint.n_parameters()
    return checkpoint.adapted.trained(training.lora_rank)


@dataclass(frozen=True)
class Activations:
    """What becomes of a layer's activations until they are needed again, from the most memory to the least.

    Args:
        name: for people.
        recompute: they are computed again, layer by layer, from each layer's input.
        tiled: those of a layer's MLP, a tile of tokens at a time.
        offload: these inputs wait in the host's memory.
    """

    name: str
    recompute: bool = False
    tiled: bool = False
    offload: bool = False


ACTIVATIONS = (
    Activations("kept"),
    Activations("recomputed", recompute=True),
    Activations("recomputed, MLPs in tiles", recompute=True, tiled=True),
    Activations(
        "recomputed, MLPs in tiles, inputs of layers in the host's memory", recompute=True, tiled=True, offload=True
    ),
)


def fit_activations(
    checkpoint: Checkpoint, training: TrainingPlan, machine: Machine, spread: Spread
) -> tuple[Activations, int]:
    """Return what must become of the activations for a run to fit the free memory, and the bytes of a process then.

    The first way that leaves some of the memory free; the last where none does. Only a GPU has another memory beside.
    """
    ways = ACTIVATIONS if machine.device == "cuda" else ACTIVATIONS[:-1]
    found: tuple[Activations, int] | None = None
    for way, share in zip(ways, (0.75, 0.85, 0.92, 1.0), strict=False):
        need = estimate_training_memory(checkpoint, training, machine, spread, way)
        if found and need >= found[1]:
            continue  # it takes time and saves nothing, as tiles do where there is one
        found = way, need
        if need <= share * machine.free_bytes:
            break
    assert found
    return found


def estimate_training_memory(
    checkpoint: Checkpoint, training: TrainingPlan, machine: Machine, spread: Spread,
    activations: Activations = ACTIVATIONS[0],
) -> int:  # fmt: skip
    """Return bytes of one process for weights, gradients, two Adam moments, activations and logits."""
    return memory_of_windows(
        checkpoint, training.micro_batch_tokens, training.train, training.lora_rank, machine, spread, activations,
        accumulated=training.accumulation > spread.readers,
    )  # fmt: skip


def memory_of_windows(
    checkpoint: Checkpoint, tokens: int, train: str, rank: int, machine: Machine, spread: Spread,
    activations: Activations | None = None, *, accumulated: bool = False,
) -> int:  # fmt: skip
    """Return the bytes of a process that trains on `tokens` at once, as a GPU takes within 15 % (tests/test_gpu.py).

    A layer keeps for its gradient, with flash attention and products in 16 bits: per token 26 bytes a hidden unit and 4
    of each of K and V's, and in the MLP 4 a hidden unit and 8 an inner one (counted; arXiv 2205.05198, section 4.1,
    counts another layer). Adapters read their inputs in 32 bits. What goes from layer to layer is in 32 bits, with
    adapters in the base's. Gradients come as what is kept for them goes, so the larger of both counts; but where those
    of the micro-batch before are there already, both.

    Args:
        tokens: of a micro-batch; cards that share a sequence have a part of them each.
        activations: what becomes of them; what takes the least memory when left out.
        accumulated: whether a step has several micro-batches.
    """
    if activations is None:
        activations = ACTIVATIONS[-1 if machine.device == "cuda" else -2]
    tokens = -(-tokens // (spread.cp_size * spread.sp_size))
    hidden = tokens * checkpoint.hidden_size
    inner = checkpoint.family.keys(checkpoint.hf_config)["feed_forward_length"]
    tile = min(tokens, tiles.TILE if activations.tiled else tokens)
    kv = checkpoint.n_kv_heads / checkpoint.n_heads
    layer = (26 + 4 * kv) * hidden + tile * (4 * checkpoint.hidden_size + 8 * inner)
    kept = 0.0 if activations.recompute else layer * checkpoint.n_layers
    if activations.recompute and not activations.offload:
        kept = float(layer_inputs_bytes(checkpoint, tokens, train, machine))
    at_once = (layer if activations.recompute else 0) + (0 if train == "full" else 4 * (hidden + tile * inner))
    # Logits, their gradient and a copy in 32 bits, of a chunk or of all.
    vocabulary, chunked = checkpoint.vocab_size, loss_is_chunked(checkpoint.hf_config)
    some = chunk_logits(tokens, checkpoint.hidden_size, vocabulary, machine.device)
    logits = 12 * (some if chunked else tokens * vocabulary)
    # A CPU has the gradient of the head, and a chunk's of it in 16 bits, before all others (`head`).
    first = 6 * vocabulary * checkpoint.hidden_size if chunked and machine.device == "cpu" else 0
    trained, frozen = _weights(checkpoint, train, rank, machine)
    shards = spread.shards
    copies = 2 * trained if train == "full" and machine.fast_bf16 and shards == 1 else 0  # for products in 16 bits
    gradients, kept = 4 * trained / shards, kept + copies
    held = 12 * trained / shards + frozen + (gradients + kept if accumulated else max(gradients, kept + first))
    return int(held + _of_processes(checkpoint, trained, machine, spread) + at_once + logits)


def _of_processes(checkpoint: Checkpoint, trained: int, machine: Machine, spread: Spread) -> float:
    """Return the bytes that one process needs because there are others.

    Where weights are sharded (FSDP2), the embeddings, the head and two layers are gathered to compute with them, and
    the gradients of the former and of one layer are whole before they are shared out. Where each process has all, the
    gradients have copies that are sent (DDP's buckets).
    """
    if spread.processes == 1:
        return 0
    if spread.shards == 1:
        return 4 * trained
    ends = checkpoint.vocab_size * checkpoint.hidden_size * (1 if checkpoint.tied else 2)
    layer = (checkpoint.n_parameters() - ends) / checkpoint.n_layers
    return _frozen_bytes(machine) * (ends + 2 * layer) + 4 * max(ends, layer)


def layer_inputs_bytes(checkpoint: Checkpoint, tokens: int, train: str, machine: Machine) -> int:
    """Return the bytes of the inputs of all layers for so many tokens, from which all else is computed again."""
    return tokens * checkpoint.hidden_size * checkpoint.n_layers * (4 if train == "full" else _frozen_bytes(machine))


_NF4_BYTES = 0.55
"""Of a parameter in 4 bits: with its share of the scales, about (QLoRA, arXiv 2305.14314, section 3: 4.127 bits) and of
the buffer that one layer is unpacked into."""


def _frozen_bytes(machine: Machine) -> int:
    """Return the bytes of a parameter that is not trained: 16 bits, or 32 where 16 are slow."""
    return 2 if machine.fast_bf16 else 4


def _weights(checkpoint: Checkpoint, train: str, rank: int, machine: Machine) -> tuple[int, float]:
    """Return how many parameters are trained, in 32 bits with a gradient and two Adam moments, and the bytes of the
    frozen base under adapters: in 16 bits (32 where 16 are slow) or, its linear layers, in 4."""
    n = checkpoint.n_parameters()
    if train == "full":
        return n, 0.0
    found = checkpoint.adapted
    frozen: float = n * _frozen_bytes(machine)
    if train == "qlora":
        frozen = 2 * n - (2 - _NF4_BYTES) * found.linear_parameters
    return found.trained(rank), frozen
