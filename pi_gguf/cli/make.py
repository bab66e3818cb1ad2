"""What plan, extend, convert, quantize, unpack and imatrix print for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi_gguf.common.tables import text_table


def show_plan(plan: Any) -> str:
    from pi_gguf.common.files import human_bytes

    rows = [
        ("model", f"{plan.model}, {plan.parameters / 1e6:,.1f} M parameters"),
        ("window", f"{plan.original_window} -> {plan.context} tokens, method {plan.method}, factor {plan.factor:g}"),
    ]
    if plan.training:
        t = plan.training
        rows += [
            *(
                ("fine-tune", f"{steps} steps in sequences of {window} tokens")
                for window, steps in t.steps_by_window().items()
            ),
            *([("full length", _mix_text(t))] if t.full_window else []),
            ("sequences", f"{t.sequences}: {t.reason}"),
            ("weights", f"{_way(t)} ({t.train_reason})"),
            ("tokens", f"{t.tokens / 1e6:,.1f} M"),
            *([("data", _data_text(plan.data)), ("loss", _LOSSES[plan.loss])] if plan.data else []),
            ("learning rate", f"{t.learning_rate:g}, {t.schedule} after {t.warmup_steps} steps of warm-up"),
            *([("factor", f"grows from 1 over {t.factor_warmup_steps} steps")] if t.factor_warmup_steps else []),
            *_time_and_memory(plan),
        ]
    rows += [
        (f"output, {plan.quant}, about", human_bytes(plan.output_bytes)),
        ("disk needed, about", human_bytes(plan.disk_bytes)),
        *((f"KV cache at {plan.context}, {name}", human_bytes(n)) for name, n in plan.kv_cache_bytes.items()),
    ]
    table = text_table("", (), rows, numbers=False)
    return f"{table}\n{_next_of_plan(plan)}"


def _time_and_memory(plan: Any) -> list[tuple[str, str]]:
    """Return the rows of what a fine-tune takes; on a machine that is not here also how it is spread."""
    from pi_gguf.common.files import human_bytes

    memory = f"{human_bytes(plan.training_memory_bytes)}{' a card' if plan.elsewhere else ''}"
    there, activations = plan.elsewhere, f"activations are {plan.activations}"
    if there is None:
        return [("time, about", human_seconds(plan.training_seconds)), ("memory, about", f"{memory}; {activations}")]
    spread = {"none": "one card", "copies": "every card has all"}.get(
        there.sharding, f"weights, gradients and moments sharded by {there.sharding}"
    )
    shared = f"; {there.cp_size} cards share a sequence" if there.cp_size > 1 else ""
    host = f"{human_bytes(there.host_memory_bytes)} a machine beside Python" if there.host_memory_bytes else ""
    return [
        ("on", f"{there.machine}: {spread}{shared}"),
        ("step", f"{there.step_tokens:,} tokens: {there.cards // there.cp_size} x {there.micro_batches} micro-batches "
         f"of {there.micro_batch}"),
        ("time, about", f"{human_seconds(plan.training_seconds)}, {there.tokens_a_second:,.0f} tokens/s"),
        ("at", f"{there.share:.0%} of the cards' rate; {there.share_source}"),
        ("memory, about", f"{memory} of {human_bytes(there.free_memory_bytes)}; {activations}"),
        *([("host's memory, about", host)] if host else []),
    ]  # fmt: skip


def _next_of_plan(plan: Any) -> str:
    """Return the command that does what was planned; of what takes too long here, what else there is."""
    there = plan.elsewhere
    where = "" if there is None else " there"
    if there and there.nodes > 1:
        where = " on each machine, FIRST being the name of the first"
    if there or plan.training_seconds < 86400:
        return f"next{where}: {plan.command}"
    lines = [f"next, on a card: pi-gguf plan {plan.model} --context {plan.context} --on 4090"]
    if plan.untrained:
        lines.append(f"or untrained, at once, at some cost in quality: {plan.untrained}")
    if plan.start:
        lines.append(f"or an hour here, which is a start: {plan.start}")
    return "\n".join([*lines, f"or all of it here: {plan.command}"])


def _mix_text(training: Any) -> str:
    share = training.tokens_by_window()[training.full_window] / training.tokens
    return (
        f"{training.full_micro_batches} of {training.steps * training.accumulation} micro-batches are "
        f"{training.full_micro_batch} x {training.full_window} tokens, {share:.1%} of all"
    )


_LOSSES = {
    "assistant": "every token of texts, the assistant's turns of conversations",
    "all": "every token, of conversations too",
}
"""What counts in the loss, by the option's value."""


def _data_text(data: dict[str, float | None]) -> str:
    return ", ".join(name if share is None else f"{name} {share:.1%}" for name, share in data.items())


def _way(training: Any) -> str:
    if training.train == "full":
        return "full: every one is trained"
    return f"{training.train}: adapters of rank {training.lora_rank}, alpha {training.lora_alpha}"


def human_seconds(seconds: float) -> str:
    """Write a duration for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def show_extend(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return f"wrote {path}\nnext: pi-gguf convert MODEL {path}.gguf --lora {path} --quant Q8_0"
    return f"wrote {path}\nnext: pi-gguf convert {path} {path}.gguf --quant Q8_0"


def show_convert(result: Any) -> str:
    from pi_gguf.common.files import human_bytes
    from pi_gguf.pipeline.convert import DryRun

    if isinstance(result, DryRun):
        rows = [(name, "x".join(map(str, shape)), kind, f"{n:,}") for name, shape, kind, n in result.tensors]
        title = f"{result.files[0][0]}, {result.quantization}"
        table = text_table(title, ("tensor", "shape", "type", "bytes"), rows, numbers=False)
        files = "".join(f"{path}: {nbytes:,} bytes\n" for path, nbytes in result.files)
        return (
            f"{table}\n{files}all: {result.nbytes:,} bytes, {result.header_bytes:,} of them before the first tensor\n"
            f"memory: about {human_bytes(result.memory_bytes)} beside Python and its libraries; disk: "
            f"{human_bytes(result.disk_bytes)}\nnothing was written"
        )
    wrote = f"wrote {result.path} ({result.quantization}, {human_bytes(result.nbytes)})\n"
    if result.certificate:
        wrote += "".join(f"  {name}: {value}\n" for name, value in result.certificate.rows())
    if result.adapter_only:
        return f'{wrote}next: pi-gguf run BASE.gguf --lora {result.path} --prompt "..."'
    return f'{wrote}next: pi-gguf run {result.path} --prompt "..."\n      pi-gguf eval passkey {result.path} --growing'


def show_quantize(path: Path) -> str:
    from pi_gguf.common.files import human_bytes

    return f"wrote {path} ({human_bytes(path.stat().st_size)})\nnext: pi-gguf inspect {path}"


def show_unpack(result: Any) -> str:
    from pi_gguf.common.files import human_bytes

    return (
        f"wrote {result.path} ({result.model_type}, {result.parameters / 1e6:,.1f} M parameters in {result.dtype}, "
        f"{human_bytes(result.nbytes)})\nnext: pi-gguf plan {result.path} --context {4 * result.window}"
    )


def show_imatrix(report: Any) -> str:
    from pi_gguf.gguf.header import is_gguf

    text = (
        f"wrote {report.path} ({report.tensors} tensors, {report.tokens:,} tokens in {report.windows} windows of "
        f"{report.context})\nnext: pi-gguf "
    )
    verb = "quantize" if is_gguf(report.model) else "convert"
    return f"{text}{verb} {report.model} OUT.gguf --quant IQ3_XXS --imatrix {report.path}"
