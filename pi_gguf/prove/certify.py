"""Measure a GGUF file at its window and write the figures into its header."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.checkpoint.record import Record
from pi_gguf.common import machine
from pi_gguf.common.files import human_bytes, writes
from pi_gguf.common.progress import phase, say, stage
from pi_gguf.common.provenance import library_versions, package_version
from pi_gguf.errors import CheckError, OptionError, ResourceError, TextError
from pi_gguf.gguf.certificate import Certificate, store
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import read_header
from pi_gguf.measure.passkey import k_max, passkey_cells
from pi_gguf.measure.perplexity import Yardstick
from pi_gguf.models.hf import HfModel
from pi_gguf.prove.check import CheckReport, Reference, check_gguf
from pi_gguf.prove.requirements import check_requirements, find_missed, read_requirements
from pi_gguf.runtime.model import Model
from pi_gguf.scaling.rope import RopeScaling

SECONDS = 600
"""What measuring may take, about: a window that would take longer is measured as far as it goes, and that is said."""


_PROBE = 512
"""Tokens of the prompt that tells how fast a model is here; no shorter window is measured, but a model's own."""


DISTANCES, KEYS = 4, 4
"""Passkeys: asked for after each quarter of the window, so many at each; a key is read once for all of them."""


@dataclass(frozen=True)
class Base:
    """Perplexity at the original window before a fine-tune, with what it was measured on (`Yardstick.record`)."""

    perplexity: float
    record: dict[str, Any]

    @classmethod
    def of_fine_tune(cls, record: Record | None) -> Base | None:
        """Read it from the record of a fine-tune; None where it was not measured."""
        price = record.price if record else None
        if price is None or "before" not in price:
            return None
        return cls(price["before"], {key: price.get(key) for key in ("text", "text_sha256", "largest", "stride")})


@stage("certify {path} in llama.cpp")
def measure(
    path: Path,
    *,
    text: Sequence[str] = (),
    base: Base | Checkpoint | None = None,
    check: CheckReport | None = None,
    against: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Certificate:
    """Measure a file in llama.cpp.

    Args:
        path: of the file, or the first of its parts.
        text: to read; the longest held-out novel of the bundled sample when empty.
        base: what the perplexity at the window is held against; the file at its original window when None.
        check: what a check of the same file found.
        against: what it was checked against.
        seed: of the passkeys.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        TextError: the text is too short for the original window.
    """
    started = time.monotonic()
    rope = read_gguf(path).rope
    with phase(f"certify {path.name}: how fast it reads here"):
        window, seconds_a_prompt = _window_that_fits(path, rope, text, device)
    original = min(rope.original_max_position_embeddings, window)
    yardstick = Yardstick.of(text, original, window)
    windows = sorted({original, window})
    say(
        f"certify {path.name}: perplexity at {' and '.join(map(str, windows))} tokens, passkeys at {window}"
        + (f"; about {_minutes(seconds_a_prompt)}" if seconds_a_prompt > 1 else "")
    )
    with phase(f"open {path.name} in llama.cpp"):
        model = Model(path, n_ctx=window, type_k="f16", device=device)
    with model:
        perplexity = yardstick.perplexities(model, windows)
        try:
            cells = passkey_cells(model, windows=(window,), distances=DISTANCES, keys=KEYS, growing=True, seed=seed)
        except OptionError as error:
            say(f"certify without passkeys: {error}")
            cells = []
    reference, whose = _reference(base, yardstick, original)
    if reference is None:
        reference, whose = perplexity[original], "itself"
    versions = [f"pi-gguf {package_version()}", *(f"{name} {number}" for name, number in library_versions().items())]
    return Certificate(
        window=window,
        perplexity=perplexity,
        reference_perplexity=reference,
        reference=whose,
        ppl_ratio=perplexity[window] / reference,
        k_max=k_max(cells, growing=True) if cells else None,
        passkeys_found=sum(cell.found for cell in cells) if cells else None,
        passkeys_asked=sum(cell.keys for cell in cells) if cells else None,
        kl_divergence=check.kl_divergence if check else None,
        top1_agreement=check.top1_agreement if check else None,
        against=against if check and check.kl_divergence is not None else None,
        text=Path(yardstick.name).name,
        text_sha256=yardstick.record()["text_sha256"],
        date=time.strftime("%Y-%m-%d"),
        seconds=round(time.monotonic() - started, 1),
        device=device,
        versions=", ".join(versions),
    )


def _minutes(seconds_a_prompt: float) -> str:
    prompts = Yardstick.SAMPLES + KEYS
    return f"{prompts * seconds_a_prompt / 60:.1f} minutes"


def _window_that_fits(path: Path, rope: RopeScaling, text: Sequence[str], device: str) -> tuple[int, float]:
    """Return the window to measure, in tokens, and the seconds of a prompt of that many, about.

    The file's own, or the largest of its halves that the text, the memory and `SECONDS` have room for.

    Raises:
        TextError: the text has no room for the least of them.
    """
    window = rope.max_position_embeddings
    least = min(window, rope.original_max_position_embeddings, _PROBE)
    yardstick = Yardstick.of(text, least, window)
    with Model(path, n_ctx=max(512, least), type_k="f16", device=device) as model:
        ids = model.tokenize(yardstick.text)
        if len(ids) < least + Yardstick.SAMPLES * yardstick.stride:
            raise TextError(f"{yardstick.name}: {len(ids)} tokens, too few to measure at {least}", "give a longer text")
        model.score(ids[: min(64, least)], 1)  # what only the first prompt waits for
        started = time.monotonic()
        model.score(ids[-least:], 1)
        measured = time.monotonic() - started
    while True:
        # Between linear, where products with weights take the time, and square, where attention does.
        seconds = measured * (window / least) ** 1.5
        reason = None
        if len(ids) < window + Yardstick.SAMPLES * yardstick.stride:
            reason = f"{yardstick.name} has {len(ids)} tokens"
        elif (Yardstick.SAMPLES + KEYS) * seconds > SECONDS:
            reason = f"it would take about {_minutes(seconds)}"
        elif window > least:
            try:
                Model(path, n_ctx=window, type_k="f16", device=device).close()
            except ResourceError as error:
                reason = str(error)
        if reason is None or window // 2 < least:
            return window, seconds
        say(f"certify {path.name}: not at {window} tokens, {reason}")
        window //= 2


def _reference(base: Base | Checkpoint | None, yardstick: Yardstick, original: int) -> tuple[float | None, str]:
    """Return the base's perplexity at the original window on the stretches of the yardstick; None where not known."""
    if isinstance(base, Base):
        return (base.perplexity, "base") if base.record == yardstick.record() else (None, "")
    if base is None or base.rope.max_position_embeddings < original:
        return None, ""
    need, free = 4 * base.n_parameters(), machine.free_memory("cpu")
    if need > free:
        say(f"certify: {base.source} takes {human_bytes(need)}, {human_bytes(free)} are free; no base to compare with")
        return None, ""
    lm = HfModel(base, device="cpu")
    perplexity = yardstick.perplexities(lm, (original,))[original]
    lm.close()
    return perplexity, "base"


@dataclass(frozen=True)
class Certified:
    """What `pi-gguf certify` reports: the file, and what now stands in it."""

    path: str
    certificate: Certificate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@writes("file")
def certify(
    file: str | Path,
    *,
    against: str | None = None,
    context: int | None = None,
    method: str = "linear",
    strict_tokenizer: bool = False,
    require: str | None = None,
    text: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
) -> Certified:
    """Measure a GGUF file of any producer at its window, and write the figures into its header.

    Perplexity at the original and at the whole window on the same text, and passkeys at the whole one, in llama.cpp.
    With --against the file is first held against that model as convert does it: windows, factor, tokenizer and logits.
    Where the whole window would take more than about ten minutes, a half, a quarter and so on of it is measured.

    Args:
        file: GGUF file; its tensors stay as they are.
        against: MODEL that the file was made from.
        context: window that MODEL was extended to without training; MODEL's own when left out.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        strict_tokenizer: as for convert, with --against.
        require: figures and what they must be, e.g. k_max>=32768,ppl_ratio<=1.02. The figures are stored in any case.
        text: text file or folder of them, of which the longest is read; the longest held-out novel of the bundled
            sample when left out. Repeatable.
        seed: of the passkeys.
        device: auto, cpu or cuda.

    Example:
        pi-gguf certify model.gguf --against ./my-llama --context 32768 --require "k_max>=32768,ppl_ratio<=1.02"
    """
    path, requirements = Path(file), read_requirements(require)
    if context is not None and against is None:
        raise OptionError(f"context is for --against, got {context}", "give the model, --against MODEL")
    read_header(path)
    checkpoint = check = None
    if against is not None:
        checkpoint = load_checkpoint(against)
        if context is not None:
            checkpoint = checkpoint.extended(context, method)
        try:
            check = check_gguf(path, Reference(checkpoint, "quick", strict_tokenizer=strict_tokenizer))
        except CheckError as error:
            raise CheckError(
                str(error), f"convert it again, or: pi-gguf repair {path} OUT --against {against}"
            ) from error
        say(str(check))
    base: Base | Checkpoint | None = None if checkpoint is None else checkpoint.original
    if checkpoint is not None and context is None and checkpoint.rope.is_extended:
        base = Base.of_fine_tune(checkpoint.record)
    if against is not None and Path(against).is_dir():
        against = Path(against).name  # where a folder is on this machine is nobody's business
    certificate = measure(path, text=text, base=base, check=check, against=against, seed=seed, device=device)
    store(path, certificate)
    missed = find_missed(certificate, requirements, read_gguf(path).rope.max_position_embeddings)
    check_requirements(missed, str(path), "the figures are stored in the file: pi-gguf inspect")
    return Certified(str(path), certificate)
