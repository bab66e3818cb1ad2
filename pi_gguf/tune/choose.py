"""Choose what the user left open: the recipe by the model's size, the way to train by the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.files import human_bytes
from pi_gguf.common.machine import Machine
from pi_gguf.errors import OptionError
from pi_gguf.scaling.rope import RopeScaling
from pi_gguf.tune.lora import WAYS, check_way, no_4_bits
from pi_gguf.tune.memory import memory_of_windows
from pi_gguf.tune.options import SpreadOptions, TuneOptions
from pi_gguf.tune.plan import Stage, TrainingPlan, parse_windows
from pi_gguf.tune.processes import Spread, check_spread
from pi_gguf.tune.sparse import check_sparse, group_tokens

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


def plan_training(checkpoint: Checkpoint, tune: TuneOptions, machine: Machine) -> TrainingPlan:
    """Plan a fine-tune that is spread as when nothing is said of that."""
    return plan_run(checkpoint, tune, SpreadOptions(), machine)[0]


def plan_run(
    checkpoint: Checkpoint, tune: TuneOptions, options: SpreadOptions, machine: Machine
) -> tuple[TrainingPlan, Spread]:
    """Choose what the user left open, and check what the user chose: the fine-tune, and how it is spread.

    Args:
        checkpoint: extended to the new window.
        machine: for which it is chosen, this or another.

    Raises:
        OptionError: a value that cannot work.
    """
    if tune.steps < 1:
        raise OptionError(f"steps must be at least 1 to train, got {tune.steps}")
    way = _choose_way(checkpoint, tune, options, machine)
    lengths = _choose_lengths(checkpoint, tune, way, machine)
    if tune.attention == "s2":
        check_sparse(checkpoint)
        _check_whole(lengths, tune, way.spread)
    _check_lengths(lengths, checkpoint.rope, tune)
    given = options.cp_size or tune.attention == "s2"
    spread = way.spread if given else _shared_sequences(checkpoint, tune, way, lengths, machine)
    return _planned(checkpoint, tune, way, lengths, spread.readers), spread


def _check_whole(lengths: _Lengths, tune: TuneOptions, spread: Spread) -> None:
    """Check that nothing but whole windows is trained on, each by one process."""
    short = next((window for window, _ in lengths.windows if window != lengths.context), None)
    for found, name in (
        (short, "train-window"), (lengths.mix, "mix"), (tune.factor_warmup, "factor-warmup"),
        (spread.cp_size > 1 and spread.cp_size, "cp-size"), (spread.sp_size > 1 and spread.sp_size, "sp-size"),
    ):  # fmt: skip
        if found:
            raise OptionError(
                f"attention s2 is for sequences of the whole context of {lengths.context}, each in one process, got "
                f"{name} {found:g}",
                f"leave --{name} out, or --attention",
            )


def _planned(checkpoint: Checkpoint, tune: TuneOptions, way: _Way, lengths: _Lengths, readers: int) -> TrainingPlan:
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
    """What is trained, why, the rank and alpha of adapters, 0 without, and how that is spread over processes."""

    train: str
    reason: str
    rank: int
    alpha: int
    spread: Spread


def _choose_way(checkpoint: Checkpoint, tune: TuneOptions, options: SpreadOptions, machine: Machine) -> _Way:
    """Choose what is trained: as given, or with `auto` what fits the free memory."""
    rank, alpha = tune.lora_rank, 2 * tune.lora_rank if tune.lora_alpha is None else tune.lora_alpha
    check_way(tune.train, machine, rank, alpha)
    train, reason = tune.train, "as given by --train"
    if train == "auto":
        rope = checkpoint.rope
        usual = rope.max_position_embeddings if tune.attention == "s2" else rope.original_max_position_embeddings
        windows = parse_windows(tune.train_window or usual, tune.steps)
        longest = max(rope.max_position_embeddings if tune.mix else 0, *(window for window, _ in windows))
        train, reason = _way_that_fits(checkpoint, tune, longest, options, machine)
    spread = check_spread(machine, train, options)
    return _Way(train, reason, 0, 0, spread) if train == "full" else _Way(train, reason, rank, alpha, spread)


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


def _choose_lengths(checkpoint: Checkpoint, tune: TuneOptions, way: _Way, machine: Machine) -> _Lengths:
    """Choose the lengths: as given, or what the memory of a GPU allows; elsewhere the original window."""
    context, original = checkpoint.rope.max_position_embeddings, checkpoint.rope.original_max_position_embeddings
    mix = tune.mix
    if tune.train_window is not None:
        return _Lengths(parse_windows(tune.train_window, tune.steps), mix or 0.0, context, "as given by --train-window")
    if tune.attention == "s2":
        return _Lengths(parse_windows(context, tune.steps), mix or 0.0, context, "attention s2 is for whole windows")
    whole = _least_memory(checkpoint, tune, context, way.train, machine, way.spread)
    if mix:
        reason = f"the shorter sequences of --mix stay at the original {original} tokens"
    elif machine.device != "cuda":
        reason = f"without a GPU sequences stay at the original {original} tokens"
    elif whole < 0.8 * machine.free_bytes:
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
    recipe, context = default_recipe(checkpoint.n_parameters(), way.train), lengths.context
    accumulation = _accumulation(checkpoint, tune, way.train, lengths.longest, readers)
    tokens = (tune.batch_tokens or recipe.batch_tokens) // accumulation
    sequences, reason = _described(lengths, mixed=lengths.mix > 0)
    group = group_tokens(tune.s2_group, context) if tune.attention == "s2" else None
    training = TrainingPlan(
        steps=tune.steps,
        stages=[Stage(window, count, max(1, tokens // window)) for window, count in lengths.windows],
        sequences=sequences,
        reason=f"{reason}; attention in groups of {group} tokens" if group else reason,
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
        attention_group=group,
    )
    return replace(training, full_micro_batches=sum(training.full_length)) if training.mix else training


def _accumulation(checkpoint: Checkpoint, tune: TuneOptions, train: str, longest: int, readers: int) -> int:
    """Return how many micro-batches a step has, as many for each reader."""
    batch_tokens = tune.batch_tokens or default_recipe(checkpoint.n_parameters(), train).batch_tokens
    return -(-max(1, batch_tokens // max(_MICRO_BATCH_TOKENS, longest)) // readers) * readers


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


def _way_that_fits(
    checkpoint: Checkpoint, tune: TuneOptions, longest: int, options: SpreadOptions, machine: Machine
) -> tuple[str, str]:
    """Return the first of the ways whose memory is free, and why; the smallest where none is.

    Args:
        longest: tokens of the longest sequence.
    """
    free, said = machine.free_bytes, []
    tokens = max(longest, min(_MICRO_BATCH_TOKENS, tune.batch_tokens or _MICRO_BATCH_TOKENS))
    ways = [way for way in WAYS if way != "qlora" or not no_4_bits(machine)]
    for way in ways:
        spread = check_spread(machine, way, options)
        need = _least_memory(checkpoint, tune, tokens, way, machine, spread)
        sharded = f" in {spread.shards} shards" if spread.shards > 1 else ""
        said.append(f"{way}{sharded} takes about {human_bytes(need)}")
        if need <= free:
            break
    return way, f"{', '.join(said)}, {human_bytes(free)} are free"


def _least_memory(
    checkpoint: Checkpoint, tune: TuneOptions, tokens: int, train: str, machine: Machine, spread: Spread
) -> int:
    """Return the bytes that micro-batches of so many tokens take of a process at least."""
    accumulated = _accumulation(checkpoint, tune, train, tokens, spread.readers) > spread.readers
    return memory_of_windows(checkpoint, tokens, train, tune.lora_rank, machine, spread, accumulated=accumulated)


def _shared_sequences(
    checkpoint: Checkpoint, tune: TuneOptions, way: _Way, lengths: _Lengths, machine: Machine
) -> Spread:
    """Return how a run is spread when as few cards share a sequence as it needs to fit; one where no number does.

    Only sharded runs share sequences, each cut into two parts a card, as torch's context parallelism does.
    """
    spread = way.spread
    if not spread.fsdp or spread.sp_size > 1 or machine.device != "cuda":
        return spread
    for size in range(1, machine.each + 1):
        shared = replace(spread, cp_size=size)
        windows = [*(window for window, _ in lengths.windows), *([lengths.context] if lengths.mix else [])]
        if machine.each % size or any(window % (2 * size) for window in windows if size > 1):
            continue
        if _least_memory(checkpoint, tune, lengths.longest, way.train, machine, shared) <= machine.free_bytes:
            return shared
    return spread
