"""The proof after writing: a GGUF file is opened by llama.cpp and held against the plan and the Hugging Face model.

In: a file, the checkpoint it was made from, and the scaling it must have. Out: a `CheckReport`, or `CheckError` with
every difference found. V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.config import noted
from pi_gguf.common.files import human_bytes
from pi_gguf.common.progress import phase, say, stage
from pi_gguf.errors import CheckError, CheckpointError, OptionError, one_line
from pi_gguf.gguf.file import GgufInfo, read_gguf
from pi_gguf.measure.kl import kl_divergence
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.models.hf import HfModel
from pi_gguf.restore.opened import open_file
from pi_gguf.runtime.model import Model
from pi_gguf.scaling.rope import FACTOR_TENSOR_NAMES, RopeScaling, check_consistent
from pi_gguf.vocabulary.keys import end_tokens
from pi_gguf.vocabulary.token_check import TokenizedTexts, said

LEVELS = ("quick", "full", "none")

MAX_KL_DIVERGENCE = {"F32": 1e-4, "F16": 1e-3, "BF16": 3e-2, "Q8_0": 5e-2}
"""Largest mean KL divergence that is still rounding, in nats. llama.cpp rounds activations to the type of the weights:
a mean of 1e-8, 2e-6 and 1e-4 is usual, and 1e-3 to 1e-2 for Q8_0."""

MAX_KL_DIVERGENCE |= dict.fromkeys(("Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K"), 0.5)
"""By the type of a tensor; of a file the largest of its matrices counts. Small models have 0.03 to 0.13 as Q4_K_M; rows
of one layer's Q and K in a wrong order are 0.4 to 1.7 on 600 tokens."""

MAX_KL_QUANTIZED = 1.0
"""The same for all other types, and the most for any: small models reach 0.4 with Q4_0 and 0.5 at 2 bits."""

EXPERTS_SLACK = 30
"""How many times more a model with experts may differ: where two experts score alike, rounding picks the other one
for a token, and that token's KL divergence is of another order (5e-2 where its neighbours have 1e-6)."""

_TOKENIZER_HINT = (
    "put the tokenizer files that the model came with into the folder, and leave out added tokens that are plain words "
    "or --strict-tokenizer; else run it with transformers"
)

_SCORED_TOKENS = 256
"""How many of a prompt, the last ones, have their logits compared."""

_QUICK_TOKENS = 600
"""Prompt of a quick check. A wrong factor is as visible in it as beyond the original window, as it scales all distances
alike (`benchmarks/wrong_scalings.json`)."""

_SLIDING_TOKENS = 1024
"""Sliding windows up to this, which is Gemma 3's, are read past by a quick check; of longer ones the size that
llama.cpp reads is compared."""


@dataclass(frozen=True)
class CheckReport:
    """What was compared. `kl_divergence` is the mean in nats of llama.cpp from Hugging Face, `top1_agreement` a share.

    Both are None where the Hugging Face model was not opened. Of the strings, `strings_different` have other tokens in
    llama.cpp; no prose is among them.
    """

    file: str
    quantization: str
    context_length: int
    rope_freq_scale: float
    vocabulary: int
    strings_compared: int
    strings_different: list[str]
    prompt_tokens: int | None
    kl_divergence: float | None
    top1_agreement: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        alike = f"{self.strings_compared} texts tokenized alike"
        if self.strings_different:
            alike = f"{self.strings_compared - len(self.strings_different)} of {alike}"
        lines = (
            f"checked {self.quantization}: window {self.context_length}, rope_freq_scale {self.rope_freq_scale:g}, "
            f"{self.vocabulary} tokens, {alike}"
        )
        if self.kl_divergence is None:
            return lines
        return (
            f"{lines}; on {self.prompt_tokens} tokens KL divergence {self.kl_divergence:.2g}, "
            f"top-1 agreement {self.top1_agreement:.1%}"
        )


class Reference:
    """The Hugging Face side of the comparison, opened once for several files.

    Args:
        checkpoint: of the model that was written, under the scaling that was.
        level: `quick` reads some 600 tokens, and more where the model computes otherwise behind them; `full` the whole
            window.
        strict_tokenizer: special texts must be tokenized alike too, not prose alone.
    """

    def __init__(self, checkpoint: Checkpoint, level: str, *, strict_tokenizer: bool = False) -> None:
        if level not in LEVELS:
            raise OptionError(f"check must be one of {', '.join(LEVELS)}, got {level}")
        self.rope = rope = checkpoint.rope
        self.unusual = noted(checkpoint.path)
        self.vocabulary = checkpoint.vocab_size
        self.slack = EXPERTS_SLACK if "expert_count" in checkpoint.family.keys(checkpoint.hf_config) else 1
        with phase("tokenize the texts of the check"):
            tokenizer = checkpoint.load_tokenizer()
            self.texts = TokenizedTexts.of(checkpoint, tokenizer, strict=strict_tokenizer)
        self.ends = end_tokens(checkpoint, tokenizer)
        self.ids: list[int] = []
        self.logits: np.ndarray | None = None
        self.sliding_window = _sliding_window(checkpoint)
        self.divisors = rope.factor_tensors(checkpoint.family.arch, checkpoint.rotary_dim)
        length = _prompt_length(checkpoint, level)
        need, free = 4 * checkpoint.n_parameters() + _cache_bytes(checkpoint, length), psutil.virtual_memory().available
        if need > free:
            say(
                f"check: the Hugging Face model takes {human_bytes(need)}, {human_bytes(free)} of memory are free; "
                "logits are not compared"
            )
            return
        whole = "" if length == rope.max_position_embeddings else "; --check full reads the whole window"
        say(f"check: {length} tokens are read by transformers and by llama.cpp{whole}")
        text = "\n".join(bundled.novels("heldout").values())
        lm = HfModel(checkpoint, device="cpu")
        self.ids = _first_tokens(lm, text, length)
        last = min(_SCORED_TOKENS, length - 1)
        try:
            with phase(f"transformers reads {length} tokens"):
                self.logits = np.concatenate(list(lm.logits_chunks(self.ids, last)))
        except RuntimeError as error:  # of torch: sizes that its kernels do not take
            raise CheckpointError(
                f"{checkpoint.path}: transformers does not compute the model ({one_line(error)})",
                "correct the sizes in config.json, or leave it unchecked with --check none",
            ) from error
        lm.close()


@stage("check {path} in llama.cpp")
def check_gguf(path: Path, reference: Reference) -> CheckReport:
    """Open a GGUF file with llama.cpp and compare it with the plan and with Hugging Face.

    Raises:
        CheckError: a difference; the message has them all.
    """
    info, kl, top1 = read_gguf(path), None, None
    problems = [*check_consistent(info.rope, str(path)), *_wrong_divisors(path, reference.divisors)]
    with phase(f"open {path.name} in llama.cpp"):
        model = Model(path, n_ctx=max(512, len(reference.ids)), type_k="f16", device="cpu")
    with model:
        problems += _wrong_numbers(path, model, reference)
        prose, special = reference.texts.compare(model.tokenize)
        problems += [f"{path}: {difference}" for difference in prose]
        problems += [f"{path}: llama.cpp does not end at token {i}" for i in reference.ends if not model.is_end(i)]
        if reference.logits is not None:
            with phase(f"llama.cpp reads {len(reference.ids)} tokens"):
                logits = np.concatenate(list(model.logits_chunks(reference.ids, len(reference.logits))))
            by_token, same = kl_divergence(reference.logits, logits)
            kl, top1 = float(by_token.mean()), float(same.mean())
            limit = largest_kl_divergence(info, reference.slack)
            if not kl <= limit:
                problems.append(f"{path}: KL divergence from Hugging Face is {kl:.3g}, above rounding ({limit:g})")
        report = CheckReport(
            file=str(path),
            quantization=info.quantization,
            context_length=model.n_ctx_train,
            rope_freq_scale=model.rope_freq_scale_train,
            vocabulary=model.n_vocab,
            strings_compared=len(reference.texts),
            strings_different=[difference.text for difference in special],
            prompt_tokens=len(reference.ids) or None,
            kl_divergence=kl,
            top1_agreement=top1,
        )
    if problems:
        raise CheckError("; ".join(problems), _TOKENIZER_HINT if prose else _hint(reference.unusual))
    if special:
        say(said(special, len(reference.texts)))
    return report


def largest_kl_divergence(info: GgufInfo, slack: float = 1.0) -> float:
    """Return how far a file may be from the model it was made from, in nats: as its coarsest matrix allows."""
    types = {tensor.type for tensor in info.tensors if len(tensor.shape) > 1}
    limit = max(MAX_KL_DIVERGENCE.get(name, MAX_KL_QUANTIZED) for name in types)
    return min(MAX_KL_QUANTIZED, limit * slack)


def _hint(unusual: Sequence[str]) -> str:
    """Return what to look at first: what is unusual about the folder itself, where anything is."""
    if not unusual:
        return "nothing was written; please report this with the checkpoint's name"
    return f"nothing was written; the folder itself may be the reason: {'; '.join(unusual)}"


def _prompt_length(checkpoint: Checkpoint, level: str) -> int:
    """Return how many tokens are read."""
    rope, sliding = checkpoint.rope, _sliding_window(checkpoint)
    window, length = rope.max_position_embeddings, _QUICK_TOKENS
    if rope.own is not None and rope.own.switches:
        length = max(length, rope.own.fields["original_max_position_embeddings"] + _SCORED_TOKENS)
    if sliding <= _SLIDING_TOKENS:
        length = max(length, sliding + _SCORED_TOKENS)
    return window if level == "full" else min(window, length)


def _sliding_window(checkpoint: Checkpoint) -> int:
    """Return how far layers look that do not see the whole window, in tokens; 0 where all see it."""
    size = checkpoint.family.keys(checkpoint.hf_config).get("attention.sliding_window") or 0
    return int(size) if size < checkpoint.rope.max_position_embeddings else 0


def _wrong_numbers(path: Path, model: Model, reference: Reference) -> Iterator[str]:
    """Yield which numbers that llama.cpp reads of a file are not those that are planned."""
    rope, read = reference.rope, model.info.rope
    window, original = rope.max_position_embeddings, rope.original_max_position_embeddings
    if model.n_ctx_train != window:
        yield f"{path}: llama.cpp reads a window of {model.n_ctx_train} tokens, planned {window}"
    if rope.rope_type == "linear" and abs(model.n_ctx_train * model.rope_freq_scale_train - original) > 1:
        # Stated from the windows alone, so that a factor used upside down cannot agree with itself.
        yield (
            f"{path}: llama.cpp reads position {model.n_ctx_train} as "
            f"{model.n_ctx_train * model.rope_freq_scale_train:g}, it must be the original window's {original}"
        )
    if abs(model.rope_freq_scale_train / rope.rope_freq_scale - 1) > 1e-6:
        yield (
            f"{path}: llama.cpp reads rope_freq_scale {model.rope_freq_scale_train:g}, planned {rope.rope_freq_scale:g}"
        )
    if abs(read.rope_theta / rope.rope_theta - 1) > 1e-6:
        yield f"{path}: rope.freq_base is {read.rope_theta:g}, planned {rope.rope_theta:g}"
    yield from _wrong_keys(path, model.info, rope)
    if model.n_vocab != reference.vocabulary:
        yield f"{path}: llama.cpp reads {model.n_vocab} tokens, the model has {reference.vocabulary}"
    sliding = model.sliding_window if model.sliding_window < window else 0
    if sliding != reference.sliding_window:
        yield f"{path}: llama.cpp reads a sliding window of {sliding} tokens, planned {reference.sliding_window}"


def _wrong_keys(path: Path, info: GgufInfo, rope: RopeScaling) -> Iterator[str]:
    """Yield which keys of a header differ from the plan that llama.cpp tells nobody: a missing one is its default."""
    if rope.rope_type == "alibi":
        return
    planned = rope.to_gguf(info.arch, finetuned=False)
    defaults: dict[str, Any] = {"scaling.attn_factor": 1.0}
    if rope.sliding_rope_theta is not None:
        defaults["freq_base_swa"] = 10000.0
    if rope.rope_type == "default" and f"{info.arch}.rope.scaling.type" in planned:  # a scaling of the model's own
        defaults |= {"scaling.type": "none", "scaling.original_context_length": rope.max_position_embeddings}
    for name, default in defaults.items():
        key = f"{info.arch}.rope.{name}"
        stated, wanted = info.metadata.get(key, default), planned.get(key, default)
        alike = stated == wanted if isinstance(wanted, str) else abs(stated / wanted - 1) <= 1e-5
        if not alike:
            yield f"{path}: {key} is {stated}, planned {wanted}"


def _wrong_divisors(path: Path, planned: Mapping[str, Sequence[float]]) -> list[str]:
    """Return in which tensors of a file the divisors of the frequencies are not those that are planned.

    llama.cpp chooses one of two by the window that it is opened with: no prompt shows both.
    """
    problems, opened = [], open_file(path)
    for name in FACTOR_TENSOR_NAMES:
        theirs, ours = opened.vector(name), planned.get(name)
        if (theirs is None) != (ours is None):
            problems.append(f"{path}: {name} is {'missing' if theirs is None else 'there, and none is planned'}")
        elif theirs is not None and ours is not None and not _close(theirs, ours):
            problems.append(f"{path}: {name} is {_shown(theirs)}, planned {_shown(ours)}")
    return problems


def _close(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    return len(theirs) == len(ours) and bool(np.allclose(theirs, ours, rtol=1e-5, atol=0))


def _shown(values: Sequence[float]) -> str:
    return f"{len(values)} divisors from {values[0]:g} to {values[-1]:g}" if len(values) else "empty"


def _cache_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Return the bytes of transformers' key-value cache in 32 bits."""
    return 8 * checkpoint.n_layers * checkpoint.n_kv_heads * checkpoint.head_dim * length


def _first_tokens(lm: LanguageModel, text: str, length: int) -> list[int]:
    characters = 8 * length
    return lm.tokenize(text[:characters])[:length]
