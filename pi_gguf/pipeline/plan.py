"""What a run will do and cost, before it starts: factor, training, time, memory, disk. Reads the config only.

The time and memory of training are estimates from operation counts; sizes and windows are exact but for the mixture
of a quantization, which llama.cpp decides tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.common.machine import Machine, operations_a_second, torch_device
from pi_gguf.common.options import flat, take
from pi_gguf.errors import OptionError
from pi_gguf.llamacpp.cache import CACHE_TYPES, kv_cache_bytes
from pi_gguf.llamacpp.quantizer import spelled
from pi_gguf.pipeline.elsewhere import Elsewhere, convert_command, placed, start_command, too_large
from pi_gguf.restore.models import as_folder
from pi_gguf.scaling.methods import takes_yarn
from pi_gguf.texts import shares
from pi_gguf.tune.choose import plan_run
from pi_gguf.tune.memory import ACTIVATIONS, fit_activations, training_disk_bytes
from pi_gguf.tune.options import ExtendKeywords, SpreadOptions, TuneOptions
from pi_gguf.tune.plan import TrainingPlan
from pi_gguf.tune.processes import Spread
from pi_gguf.tune.speed import train_operations, training_seconds

BITS_PER_WEIGHT = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.57, "Q5_K_M": 5.70, "Q5_K_S": 5.57, "Q5_1": 6.0,
    "Q5_0": 5.57, "Q4_K_M": 4.89, "Q4_K_S": 4.67, "Q4_1": 5.0, "Q4_0": 4.67, "IQ4_NL": 4.68, "IQ4_XS": 4.46,
    "Q3_K_L": 4.30, "Q3_K_M": 4.00, "Q3_K_S": 3.64, "Q2_K": 3.16,
}  # fmt: skip
"""Mean bits a weight of a file of this type, about; the mixtures as for an 8-billion-parameter Llama."""


_A_DAY = 86400.0

_START_STEPS = {512: 80, 2048: 40, 8192: 12}
"""What a CPU trains in about an hour, steps by tokens of a sequence: short ones for what is far apart, long ones for
what long texts are. By YaRN SmolLM2 finds keys to 32,768 tokens then, and its perplexity is lowest there
(`recipes/smollm2-32k`)."""

_START_BATCH, _START_RATE, _START_RECALL = 2048, 1e-4, 0.5
"""Tokens a step, unless a sequence has more; the rate; and the share of the tokens that are recall tasks."""

_START_TOKENS = 100_000
"""An hour in which fewer tokens are trained is no start."""

_READING = 0.9
"""Time of an operation in reading by its time in training as planned: small models in windows of 2048 to 32768 read
at 0.57 of a plain product's speed (`recipes/demo`)."""


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
    data: dict[str, float | None]
    """Share of the tokens by the name of the source; None where no weights are given and the lengths decide."""
    loss: str
    elsewhere: Elsewhere | None = None
    """How it runs on the machine of `on`; None of this machine."""
    command: str = ""
    """What does it."""
    start: str = ""
    """What this machine can do of it in an hour, where the whole takes more than a day and an hour is worth it."""
    untrained: str = ""
    """What writes a file without training, where the whole takes more than a day here: by YaRN, if the model takes it,
    which loses little untrained (`recipes/smollm2-32k`)."""

    def to_json(self) -> dict[str, Any]:
        tokens = {"tokens": self.training.tokens} if self.training else {}
        return {**asdict(self), **tokens}


@flat(TuneOptions, SpreadOptions)
def plan(
    model: str,
    *,
    context: int | None = None,
    quant: str = "Q4_K_M",
    on: str | None = None,
    device: str = "auto",
    **options: Unpack[ExtendKeywords],
) -> Plan:
    """Say what a conversion would do and cost; reads the config only.

    Args:
        model: Hugging Face folder, Hub id, GGUF file or bundled:tiny.
        context: new window, in tokens; the model's own when left out.
        quant: type of the output file, e.g. F16, Q8_0 or Q4_K_M.
        on: cards of a machine that is not here: 4090, 8xH100-80GB, or machines x cards x kind as in 2x8xA100-80GB;
            this machine when left out.
        device: auto, cpu or cuda, of this machine.

    Raises:
        ResourceError: the fine-tune does not fit the cards of `on`.

    Example:
        pi-gguf plan bundled:tiny --context 32768 --quant Q4_K_M
    """
    tune, spread_options = take(TuneOptions, options), take(SpreadOptions, options)
    machine = _machine(on, device, context, tune)
    original = load_checkpoint(as_folder(model, weights=False, tokenizer=False), config_only=True)
    known = spelled(quant, BITS_PER_WEIGHT)
    if known is None:
        raise OptionError(
            f"quant must be one of {', '.join(BITS_PER_WEIGHT)} to be planned, got {quant}",
            "convert --dry-run gives the exact size of any type, from the weights",
        )
    checkpoint = original if context is None else original.extended(context, tune.method)
    rope = checkpoint.rope
    training, seconds, memory, activations, elsewhere = None, 0.0, 0, ACTIVATIONS[0], None
    command, instead = convert_command(model, context, known), dict[str, str]()
    n = checkpoint.n_parameters()
    if context is not None and tune.steps:
        training, spread = plan_run(checkpoint, tune, spread_options, machine)
        activations, memory = fit_activations(checkpoint, training, machine, spread)
        if machine.card and memory > machine.free_bytes:
            raise too_large(checkpoint, training, memory, tune, spread_options, machine)
        seconds = training_seconds(checkpoint, training, machine, spread)
        if machine.card:
            elsewhere = placed(checkpoint, training, spread, activations, machine, seconds)
        elif seconds > _A_DAY:
            untrained = f"{command} --method yarn" if takes_yarn(original.rope, context) else ""
            instead = {"start": _start(model, context, checkpoint, tune, machine), "untrained": untrained}
        command = start_command(model, context, tune, spread_options, training, spread, machine)
    output = int(n * BITS_PER_WEIGHT[known] / 8)
    extended = training_disk_bytes(checkpoint, training) if training else 0
    unquantized = 0 if known in ("F32", "F16", "BF16") else 4 * n
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
        kv_cache_bytes=_cache_sizes(checkpoint),
        disk_bytes=output + unquantized + extended,
        data=shares(tune.data),
        loss=tune.loss,
        elsewhere=elsewhere,
        command=command,
        **instead,
    )


def _start(model: str, context: int, checkpoint: Checkpoint, tune: TuneOptions, machine: Machine) -> str:
    """Return the command of what this machine trains in an hour; nothing where that is too little to be a start."""
    original = checkpoint.rope.original_max_position_embeddings
    mixed = model == bundled.TINY and not tune.data  # its own mixture has recall tasks
    yarn = tune.method == "linear" and takes_yarn(checkpoint.original.rope, context)
    start = replace(
        tune, method="yarn" if yarn else tune.method, batch_tokens=_START_BATCH, learning_rate=_START_RATE, mix=None,
        schedule="decay", factor_warmup=0, attention=TuneOptions.attention,
        recall=tune.recall or (0 if mixed else _START_RECALL),
    )  # fmt: skip

    def of(steps: Mapping[int, int], share: float) -> tuple[TuneOptions, TrainingPlan, Spread]:
        each = {window: max(1, int(n * share)) for window, n in steps.items()}
        words = ",".join(f"{window}x{n}" for window, n in each.items())
        so = replace(start, steps=sum(each.values()), train_window=words)
        return so, *plan_run(checkpoint, so, SpreadOptions(), machine)

    steps = {w: n for w, n in _START_STEPS.items() if w <= original} or {original: sum(_START_STEPS.values())}
    _, training, spread = of(steps, 1)
    while len(steps) > 1 and fit_activations(checkpoint, training, machine, spread)[1] > machine.free_bytes:
        del steps[max(steps)]
        _, training, spread = of(steps, 1)
    chosen, training, spread = of(steps, 3600 / training_seconds(checkpoint, training, machine, spread))
    if training.tokens < _START_TOKENS:
        return ""
    return start_command(model, context, chosen, SpreadOptions(), training, spread, machine)


def _cache_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the bytes of a KV cache of the whole window by its type."""
    return {
        name: kv_cache_bytes(
            n_layers=checkpoint.n_layers, n_kv_heads=checkpoint.n_kv_heads, head_dim=checkpoint.head_dim,
            n_ctx=checkpoint.rope.max_position_embeddings, type_k=name, type_v=name,
        )
        for name in CACHE_TYPES
    }  # fmt: skip


def _machine(on: str | None, device: str, context: int | None, tune: TuneOptions) -> Machine:
    """Return the machine that is planned for."""
    if on is None:
        return Machine.here(torch_device(device))
    if device != "auto":
        raise OptionError(f"on and device exclude each other, got {on!r} and {device}", "leave --device out")
    if context is None or not tune.steps:
        raise OptionError(f"on is for a fine-tune, got {on!r} without one", "give --context, and --steps above 0")
    return Machine.elsewhere(on)


def reading_seconds(checkpoint: Checkpoint, tokens_by_window: Mapping[int, int], device: str) -> float:
    """Return about how long a model reads so many tokens, in prompts of these lengths, without learning from them."""
    operations = sum(tokens * train_operations(checkpoint, window) / 3 for window, tokens in tokens_by_window.items())
    return _READING * operations / operations_a_second(device)
