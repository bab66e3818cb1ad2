"""What a run will do and cost, before it starts: factor, training, time, memory, disk. Reads the config only.

The time and memory of training are estimates from operation counts; sizes and windows are exact but for the mixture
of a quantization, which llama.cpp decides tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Unpack

from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.common.files import human_bytes
from pi_gguf.common.machine import fast_bf16, free_memory, operations_a_second, planned_device
from pi_gguf.common.options import TuneKeywords, TuneOptions, flat, take
from pi_gguf.errors import OptionError
from pi_gguf.lora import WAYS, check_way, no_4_bits, parts
from pi_gguf.losses import loss_is_chunked
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.tiles import TILE

BITS_PER_WEIGHT = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.57, "Q5_K_M": 5.70, "Q5_K_S": 5.57, "Q5_1": 6.0,
    "Q5_0": 5.57, "Q4_K_M": 4.89, "Q4_K_S": 4.67, "Q4_1": 5.0, "Q4_0": 4.67, "IQ4_NL": 4.68, "IQ4_XS": 4.46,
    "Q3_K_L": 4.30, "Q3_K_M": 4.00, "Q3_K_S": 3.64, "Q2_K": 3.16,
}  # fmt: skip
"""Mean bits a weight of a file of this type, about; the mixtures as for an 8-billion-parameter Llama."""


_READING = 0.9
"""Time of an operation in reading by its time in training as planned: small models in windows of 2048 to 32768 read
at 0.57 of a plain product's speed (`recipes/demo`)."""

_MICRO_BATCH_TOKENS = 8192

DEFAULT_MIX = 0.25
"""Share of the tokens in whole windows, where these fit a GPU: in `benchmarks/methods.json` such a mix finds most
passkeys of all ways to interpolate, whole windows alone none at as many tokens."""


@dataclass(frozen=True)
class Recipe:
    """Defaults of a fine-tune for a model's size: peak learning rate and tokens of one optimizer step."""

    learning_rate: float
    batch_tokens: int


def default_recipe(n_parameters: int, train: str = "full") -> Recipe:
    """Return the paper's rates for 7B and 13B, 33B and 65B; for tiny models what `docs/log.md` records.

    The paper's batch is 64 sequences of the new window; 64 sequences of 2048 tokens are the most a desktop bears.
    Adapters begin at zero and take ten times the rate (LongLoRA's released code trains 7B at 2e-4); a tiny model's rate
    is high as it is, and doubles.
    """
    adapters = train != "full"
    if n_parameters < 100_000_000:
        return Recipe(2e-3 if adapters else 1e-3, 8192)
    rate = 2e-5 if n_parameters < 20_000_000_000 else 1e-5
    return Recipe(10 * rate if adapters else rate, 131072)


@dataclass(frozen=True)
class Stage:
    """Steps of a fine-tune that train on sequences of one length.

    Args:
        window: tokens of a sequence.
        steps: optimizer steps.
        micro_batch: sequences computed at once.
    """

    window: int
    steps: int
    micro_batch: int


@dataclass(frozen=True)
class TrainingPlan:
    """How a fine-tune is run.

    Args:
        steps: optimizer steps.
        stages: lengths of the training sequences, one after the other.
        sequences: `full length`, `PoSE` where positions skip, or `PoSE and full length` where both are mixed.
        reason: why these.
        accumulation: micro-batches of one optimizer step.
        learning_rate: at its peak.
        warmup_steps: linear, from a tenth of the peak.
        schedule: `constant` (the paper's) or `decay` (linear to a tenth of the peak over the last third).
        factor_warmup_steps: steps over which the factor grows from 1; 0 (the paper's) starts with the whole.
        mix: share of the tokens that is asked for in sequences of the whole new window, among shorter ones.
        full_window: tokens of those sequences; 0 without a mix.
        full_micro_batch: of those sequences, how many are computed at once.
        full_micro_batches: of the run's micro-batches, how many are of those sequences.
        train: `full`, or adapters: `lora` on weights in 16 bits, `qlora` in 4.
        train_reason: why this way.
        lora_rank: of the adapters; 0 where every weight is trained.
        lora_alpha: an adapter counts alpha / rank times.
    """

    steps: int
    stages: list[Stage]
    sequences: str
    reason: str
    accumulation: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    factor_warmup_steps: int
    mix: float = 0.0
    full_window: int = 0
    full_micro_batch: int = 0
    full_micro_batches: int = 0
    train: str = "full"
    train_reason: str = "as given by --train"
    lora_rank: int = 0
    lora_alpha: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_window().values())

    def tokens_by_window(self) -> dict[int, int]:
        """Return the tokens of the run by the length of their sequences."""
        tokens: dict[int, int] = {}
        shorts = (stage for stage in self.stages for _ in range(stage.steps * self.accumulation))
        for stage, whole in zip(shorts, self.full_length, strict=True):
            window, n = (self.full_window, self.full_micro_batch) if whole else (stage.window, stage.micro_batch)
            tokens[window] = tokens.get(window, 0) + n * window
        return tokens

    @cached_property
    def full_length(self) -> list[bool]:
        """Whether each micro-batch of the run is of the whole window, by the mix.

        Each time that brings the share of the tokens so far nearer to `mix`; so they are spread evenly over the run.
        """
        chosen: list[bool] = []
        full, tokens, new = 0, 0, self.full_micro_batch * self.full_window
        for stage in self.stages:
            short = stage.micro_batch * stage.window
            for _ in range(stage.steps * self.accumulation):
                above, below = full + new - self.mix * (tokens + new), full - self.mix * (tokens + short)
                chosen.append(self.mix > 0 and abs(above) < abs(below))
                full += new if chosen[-1] else 0
                tokens += new if chosen[-1] else short
        return chosen

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(self.full_micro_batch * self.full_window, *(s.micro_batch * s.window for s in self.stages))

    def steps_by_window(self) -> dict[int, int]:
        """Return the steps on sequences of each length, in the order they first come."""
        steps: dict[int, int] = {}
        for stage in self.stages:
            steps[stage.window] = steps.get(stage.window, 0) + stage.steps
        return steps

    def step_tokens(self, stage: Stage) -> int:
        """Return the tokens of one optimizer step in a stage where nothing of the whole window is mixed in."""
        return self.accumulation * stage.micro_batch * stage.window


def parse_windows(train_window: int | str, steps: int) -> list[tuple[int, int]]:
    """Read the lengths of training sequences: one, or several with their steps.

    Args:
        train_window: tokens, e.g. 2048; or `512x500,2048x200,8192`: 500 steps on 512 tokens, 200 on 2048, the rest on
            8192; or `512x500,8192+512x200`: the last 200 steps on 8192 and 512 tokens in turn.
        steps: of the whole run.

    Returns:
        Pairs of tokens and steps.

    Raises:
        OptionError: not of this form, or the steps do not add up.
    """
    text = str(train_window)
    turn = r"[0-9]+(\+[0-9]+)*"
    if not re.fullmatch(rf"({turn}x[0-9]+,)*{turn}(x[0-9]+)?", text):
        raise OptionError(
            f"train-window must be tokens, or tokens x steps separated by commas, got {train_window!r}",
            "for example 2048, or 512x500,2048x200,8192 (the last takes the steps that are left)",
        )
    counted: list[tuple[list[int], int]] = []
    for part in text.split(","):
        windows, _, count = part.partition("x")
        left = steps - sum(n for _, n in counted)
        counted.append(([int(window) for window in windows.split("+")], int(count) if count else left))
    if any(n < 1 for _, n in counted) or sum(n for _, n in counted) != steps:
        counts = " + ".join(str(n) for _, n in counted)
        raise OptionError(
            f"train-window {train_window!r} does not divide the {steps} steps: {counts}",
            f"let its steps add up to {steps}, or leave the last one's out",
        )
    pairs: list[tuple[int, int]] = []
    for in_turn, n in counted:
        pairs += [(in_turn[0], n)] if len(in_turn) == 1 else [(in_turn[i % len(in_turn)], 1) for i in range(n)]
    return pairs


def plan_training(checkpoint: Checkpoint, tune: TuneOptions, *, device: str, readers: int = 1) -> TrainingPlan:
    """Choose what the user left open, and check what the user chose.

    Args:
        checkpoint: extended to the new window.
        readers: processes that read micro-batches of their own; each gets as many of a step.

    Raises:
        OptionError: a value that cannot work.
    """
    if tune.steps < 1:
        raise OptionError(f"steps must be at least 1 to train, got {tune.steps}")
    way = _choose_way(checkpoint, tune, device)
    lengths = _choose_lengths(checkpoint, tune, way, device)
    _check_lengths(lengths, checkpoint.rope, tune)
    training = _divided(checkpoint, tune, way, lengths, readers)
    if training.full_micro_batches or not lengths.mix:
        return training
    if tune.mix is None:  # a few steps, too few for one
        sequences, reason = _described(lengths, mixed=False)
        return replace(training, mix=0.0, full_window=0, full_micro_batch=0, sequences=sequences, reason=reason)
    raise OptionError(
        f"mix {lengths.mix:g} of the run's {training.tokens:,} tokens is not one micro-batch of "
        f"{training.full_window} tokens",
        "give more --steps or a larger --mix, or leave it out",
    )


@dataclass(frozen=True)
class _Way:
    """What is trained, why, and the rank and alpha of adapters, 0 without."""

    train: str
    reason: str
    rank: int
    alpha: int


def _choose_way(checkpoint: Checkpoint, tune: TuneOptions, device: str) -> _Way:
    """Choose what is trained: as given, or with `auto` what fits the free memory."""
    rank, alpha = tune.lora_rank, 2 * tune.lora_rank if tune.lora_alpha is None else tune.lora_alpha
    check_way(tune.train, device, rank, alpha)
    train, reason = tune.train, "as given by --train"
    if train == "auto":
        rope = checkpoint.rope
        windows = parse_windows(tune.train_window or rope.original_max_position_embeddings, tune.steps)
        longest = max(rope.max_position_embeddings if tune.mix else 0, *(window for window, _ in windows))
        tokens = max(longest, min(_MICRO_BATCH_TOKENS, tune.batch_tokens or _MICRO_BATCH_TOKENS))
        train, reason = _way_that_fits(checkpoint, tokens, rank, device)
    return _Way(train, reason, 0, 0) if train == "full" else _Way(train, reason, rank, alpha)


@dataclass(frozen=True)
class _Lengths:
    """How long training sequences are.

    Args:
        windows: pairs of tokens and steps, one after the other.
        mix: share of the tokens in sequences of the whole new window among them.
        context: the whole new window, in tokens.
        reason: why these.
    """

    windows: list[tuple[int, int]]
    mix: float
    context: int
    reason: str

    @property
    def longest(self) -> int:
        return max(self.context if self.mix else 0, *(window for window, _ in self.windows))


def _choose_lengths(checkpoint: Checkpoint, tune: TuneOptions, way: _Way, device: str) -> _Lengths:
    """Choose the lengths: as given, or what the memory of a GPU allows; elsewhere the original window."""
    context, original = checkpoint.rope.max_position_embeddings, checkpoint.rope.original_max_position_embeddings
    mix = tune.mix
    if tune.train_window is not None:
        return _Lengths(parse_windows(tune.train_window, tune.steps), mix or 0.0, context, "as given by --train-window")
    whole = _memory(
        checkpoint, context, activations=_least(device), train=way.train, rank=tune.lora_rank, device=device
    )
    if mix:
        reason = f"the shorter sequences of --mix stay at the original {original} tokens"
    elif device != "cuda":
        reason = f"without a GPU sequences stay at the original {original} tokens"
    elif whole < 0.8 * free_memory(device):
        reason = "sequences of the whole new window fit the GPU"
        if mix is None and not tune.factor_warmup and context > original:
            mix = DEFAULT_MIX
    else:
        reason = f"{human_bytes(whole)} for whole windows do not fit the GPU"
    return _Lengths(parse_windows(original, tune.steps), mix or 0.0, context, reason)


def _check_lengths(lengths: _Lengths, rope: RopeScaling, tune: TuneOptions) -> None:
    """Check that the lengths go with the window, and with a factor that grows."""
    original, factor_warmup = rope.original_max_position_embeddings, tune.factor_warmup
    for window, _ in lengths.windows:
        if not 2 <= window <= lengths.context:
            raise OptionError(f"train-window must be from 2 to the context of {lengths.context}, got {window}")
    if not 0 <= factor_warmup <= tune.steps:
        raise OptionError(f"factor-warmup must be from 0 to the {tune.steps} steps, got {factor_warmup}")
    if factor_warmup and rope.rope_type != "linear":
        raise OptionError("factor-warmup is for method linear: the others have no factor that grows", "leave it out")
    begun = 0
    for window, count in lengths.windows:
        if begun < factor_warmup and window > original:
            raise OptionError(
                f"factor-warmup needs sequences that fit the original window of {original} tokens, got {window}",
                f"begin with --train-window {original}x{factor_warmup}, or leave --factor-warmup out",
            )
        begun += count
    if lengths.mix:
        _check_mix(lengths.windows, lengths.context, factor_warmup)


def _divided(checkpoint: Checkpoint, tune: TuneOptions, way: _Way, lengths: _Lengths, readers: int) -> TrainingPlan:
    """Divide each step's tokens into micro-batches; the rates are as given or by the model's size."""
    recipe = default_recipe(checkpoint.n_parameters(), way.train)
    batch_tokens, context = tune.batch_tokens or recipe.batch_tokens, lengths.context
    accumulation = max(1, batch_tokens // max(_MICRO_BATCH_TOKENS, lengths.longest))
    accumulation = -(-accumulation // readers) * readers
    tokens = batch_tokens // accumulation
    sequences, reason = _described(lengths, mixed=lengths.mix > 0)
    training = TrainingPlan(
        steps=tune.steps,
        stages=[Stage(window, count, max(1, tokens // window)) for window, count in lengths.windows],
        sequences=sequences,
        reason=reason,
        accumulation=accumulation,
        learning_rate=tune.learning_rate or recipe.learning_rate,
        warmup_steps=min(20, tune.steps),
        schedule=tune.schedule,
        factor_warmup_steps=tune.factor_warmup,
        mix=lengths.mix,
        full_window=context if lengths.mix else 0,
        full_micro_batch=max(1, tokens // context) if lengths.mix else 0,
        train=way.train,
        train_reason=way.reason,
        lora_rank=way.rank,
        lora_alpha=way.alpha,
    )
    return replace(training, full_micro_batches=sum(training.full_length))


def _described(lengths: _Lengths, *, mixed: bool) -> tuple[str, str]:
    """Return what a plan has as `sequences` and `reason`."""
    sequences, reason = "full length", lengths.reason
    if any(window < lengths.context for window, _ in lengths.windows):
        sequences = "PoSE"
        reason += f"; positions skip so that distances up to {lengths.context} are seen"
    if mixed:
        sequences += " and full length"
        reason += f"; {lengths.mix:.1%} of the tokens in sequences of {lengths.context}"
    return sequences, reason


def _check_mix(windows: list[tuple[int, int]], context: int, factor_warmup: int) -> None:
    if any(window >= context for window, _ in windows):
        raise OptionError(
            f"mix needs training sequences shorter than the context of {context}, got a train-window of {context}",
            "give a shorter --train-window, or leave --mix out",
        )
    if factor_warmup:
        raise OptionError(
            f"mix and factor-warmup exclude each other: {context} tokens do not fit the window while the factor grows",
            "leave one of them out",
        )


def _way_that_fits(checkpoint: Checkpoint, tokens: int, rank: int, device: str) -> tuple[str, str]:
    """Return the first of the ways whose memory is free, and why; the smallest where none is.

    Args:
        tokens: of a micro-batch.
    """
    free, said = free_memory(device), []
    ways = [way for way in WAYS if way != "qlora" or not no_4_bits(device)]
    for way in ways:
        need = _memory(checkpoint, tokens, activations=_least(device), train=way, rank=rank, device=device)
        said.append(f"{way} takes about {human_bytes(need)}")
        if need <= free:
            break
    return way, f"{', '.join(said)}, {human_bytes(free)} are free"


@dataclass(frozen=True)
class Plan:
    """What `pi-gguf plan` reports; sizes in bytes, times in seconds, windows in tokens."""

    model: str
    parameters: int
    method: str
    factor: float
    rope_theta: float
    original_window: int
    context: int
    quant: str
    training: TrainingPlan | None
    training_seconds: float
    training_memory_bytes: int
    activations: str
    output_bytes: int
    kv_cache_bytes: dict[str, int]
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        tokens = {"tokens": self.training.tokens} if self.training else {}
        return {**asdict(self), **tokens}


@flat(TuneOptions)
def plan(
    model: str,
    *,
    context: int | None = None,
    quant: str = "Q4_K_M",
    device: str = "auto",
    **options: Unpack[TuneKeywords],
) -> Plan:
    """Say what a conversion would do and cost; reads the config only.

    Args:
        model: Hugging Face folder, Hub id or bundled:tiny.
        context: new window, in tokens; the model's own when left out.
        quant: type of the output file, e.g. F16, Q8_0 or Q4_K_M.
        device: auto, cpu or cuda.

    Example:
        pi-gguf plan bundled:tiny --context 32768 --quant Q4_K_M
    """
    from pi_gguf.llamacpp.cache import CACHE_TYPES, kv_cache_bytes
    from pi_gguf.llamacpp.quantizer import spelled

    tune = take(TuneOptions, options)
    checkpoint = load_checkpoint(model, config_only=True)
    known = spelled(quant, BITS_PER_WEIGHT)
    if known is None:
        raise OptionError(
            f"quant must be one of {', '.join(BITS_PER_WEIGHT)} to be planned, got {quant}",
            "convert --dry-run gives the exact size of any type, from the weights",
        )
    if context is not None:
        checkpoint = checkpoint.extended(context, tune.method)
    rope, device = checkpoint.rope, planned_device(device)
    training, seconds, memory, activations = None, 0.0, 0, _ACTIVATIONS[0]
    n = checkpoint.n_parameters()
    if context is not None and tune.steps:
        training = plan_training(checkpoint, tune, device=device)
        operations = sum(
            tokens * _train_operations(checkpoint, window) for window, tokens in training.tokens_by_window().items()
        )
        seconds = operations / operations_a_second(device)
        activations, memory = fit_activations(checkpoint, training, device)
    output = int(n * BITS_PER_WEIGHT[known] / 8)
    extended = training_disk_bytes(checkpoint, training) if training else 0
    unquantized = 0 if known in ("F32", "F16", "BF16") else 4 * n
    sizes = {
        name: kv_cache_bytes(
            n_layers=checkpoint.n_layers, n_kv_heads=checkpoint.n_kv_heads, head_dim=checkpoint.head_dim,
            n_ctx=rope.max_position_embeddings, type_k=name, type_v=name,
        )
        for name in CACHE_TYPES
    }  # fmt: skip
    return Plan(
        model=model,
        parameters=n,
        method=tune.method,
        factor=rope.factor,
        rope_theta=rope.rope_theta,
        original_window=rope.original_max_position_embeddings,
        context=rope.max_position_embeddings,
        quant=known,
        training=training,
        training_seconds=seconds,
        training_memory_bytes=memory,
        activations=activations.name,
        output_bytes=output,
        kv_cache_bytes=sizes,
        disk_bytes=output + unquantized + extended,
    )


def reading_seconds(checkpoint: Checkpoint, tokens_by_window: Mapping[int, int], device: str) -> float:
    """Return about how long a model reads so many tokens, in prompts of these lengths, without learning from them."""
    operations = sum(tokens * _train_operations(checkpoint, window) / 3 for window, tokens in tokens_by_window.items())
    return _READING * operations / operations_a_second(device)


def training_disk_bytes(checkpoint: Checkpoint, training: TrainingPlan) -> int:
    """Return the disk a fine-tune needs: three checkpoints with Adam's moments (12 bytes a trained parameter;
    the oldest goes when the newest is complete), and the result."""
    n = checkpoint.n_parameters()
    trained = n if training.train == "full" else parts(checkpoint.skeleton).trained(training.lora_rank)
    return 3 * 12 * trained + 4 * n


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


_ACTIVATIONS = (
    Activations("kept"),
    Activations("recomputed", recompute=True),
    Activations("recomputed, MLPs in tiles", recompute=True, tiled=True),
    Activations(
        "recomputed, MLPs in tiles, inputs of layers in the host's memory", recompute=True, tiled=True, offload=True
    ),
)


def fit_activations(
    checkpoint: Checkpoint, training: TrainingPlan, device: str, *, shards: int = 1
) -> tuple[Activations, int]:
    """Return what must become of the activations for a run to fit the free memory, and what it needs then, in bytes.

    The first way that leaves some of the memory free; the last where none does. Only a GPU has another memory beside.

    Args:
        shards: processes that share weights, gradients and moments; what it needs is one process's.
    """
    free = free_memory(device)
    ways = _ACTIVATIONS if device == "cuda" else _ACTIVATIONS[:-1]
    found: tuple[Activations, int] | None = None
    for way, share in zip(ways, (0.75, 0.85, 0.92, 1.0), strict=False):
        need = estimate_training_memory(checkpoint, training, device, way, shards=shards)
        if found and need >= found[1]:
            continue  # it takes time and saves nothing, as tiles do where there is one
        found = way, need
        if need <= share * free:
            break
    assert found
    return found


def _least(device: str) -> Activations:
    """Return what takes the least memory on a device."""
    return _ACTIVATIONS[-1 if device == "cuda" else -2]


def estimate_training_memory(
    checkpoint: Checkpoint,
    training: TrainingPlan,
    device: str,
    activations: Activations = _ACTIVATIONS[0],
    *,
    shards: int = 1,
) -> int:
    """Return bytes for weights, gradients, two Adam moments, activations and logits."""
    return _memory(
        checkpoint, training.micro_batch_tokens, activations=activations, train=training.train,
        rank=training.lora_rank, device=device, shards=shards,
    )  # fmt: skip


def _memory(
    checkpoint: Checkpoint,
    tokens: int,
    *,
    activations: Activations,
    train: str,
    rank: int,
    device: str,
    shards: int = 1,
) -> int:
    """Return the bytes of training on `tokens` at once, within 15 % of what a GPU takes (tests/test_gpu.py).

    A layer keeps for its gradient, with flash attention and products in 16 bits: per token 26 bytes a hidden unit and 4
    of each of K and V's, and in the MLP 4 a hidden unit and 8 an inner one (counted; arXiv 2205.05198, section 4.1,
    counts another layer). Adapters read their inputs in 32 bits. What goes from layer to layer is in 32 bits, with
    adapters in the base's. Gradients come as what is kept for them goes, so the larger of both counts.
    """
    hidden = tokens * checkpoint.hidden_size
    inner = checkpoint.hf_config.intermediate_size
    tile = min(tokens, TILE if activations.tiled else tokens)
    kv = checkpoint.n_kv_heads / checkpoint.n_heads
    layer = (26 + 4 * kv) * hidden + tile * (4 * checkpoint.hidden_size + 8 * inner)
    kept = 0.0 if activations.recompute else layer * checkpoint.n_layers
    if activations.recompute and not activations.offload:
        kept = hidden * checkpoint.n_layers * (4 if train == "full" else _frozen_bytes(device))
    at_once = (layer if activations.recompute else 0) + (0 if train == "full" else 4 * (hidden + tile * inner))
    # Logits, their gradient and a copy in 32 bits; in chunks as large together as the hidden states.
    logits = 12 * (hidden if loss_is_chunked(checkpoint.hf_config) else tokens * checkpoint.vocab_size)
    trained, frozen = _weights(checkpoint, train, rank, device)
    copies = 2 * trained if train == "full" and fast_bf16(device) else 0  # of weights, for products in 16 bits
    return int((12 * trained + frozen) / shards + max(4 * trained / shards, kept + copies) + at_once + logits)


_NF4_BYTES = 0.55
"""Of a parameter in 4 bits: with its share of the scales, about (QLoRA, arXiv 2305.14314, section 3: 4.127 bits) and of
the buffer that one layer is unpacked into."""


def _frozen_bytes(device: str) -> int:
    """Return the bytes of a parameter that is not trained: 16 bits, or 32 where 16 are slow."""
    return 2 if fast_bf16(device) else 4


def _weights(checkpoint: Checkpoint, train: str, rank: int, device: str) -> tuple[int, float]:
    """Return how many parameters are trained, in 32 bits with a gradient and two Adam moments, and the bytes of the
    frozen base under adapters: in 16 bits (32 where 16 are slow) or, its linear layers, in 4."""
    n = checkpoint.n_parameters()
    if train == "full":
        return n, 0.0
    found = parts(checkpoint.skeleton)
    frozen: float = n * _frozen_bytes(device)
    if train == "qlora":
        frozen = 2 * n - (2 - _NF4_BYTES) * found.linear_parameters
    return found.trained(rank), frozen


def _train_operations(checkpoint: Checkpoint, length: int) -> float:
    """Return floating-point operations a token: 6 a parameter, and causal attention over half the length."""
    attention = 12 * checkpoint.n_layers * checkpoint.n_heads * checkpoint.head_dim * length / 2
    tied = checkpoint.vocab_size * checkpoint.hidden_size
    return 6 * (checkpoint.n_parameters() - (0 if checkpoint.tied else tied)) + attention
