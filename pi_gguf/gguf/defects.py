"""What is wrong in the metadata of a GGUF file, and what it should be.

In: the header of a file, its tensors, and what the checkpoint it was made from says, where that is at hand. Out: a
`Finding` for each key that is missing or wrong, and the header in which all is mended that keys can mend.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.gguf.file import TensorInfo, tensor_types
from pi_gguf.gguf.findings import ASK, CONVERT, REMOVE, SET, Finding, in_short
from pi_gguf.gguf.header import Entry, Header, type_of_key
from pi_gguf.gguf.keys import model_metadata
from pi_gguf.gguf.loadable import find_fatal
from pi_gguf.scaling.rope import FACTOR_TENSOR_NAMES, GGUF_ROPE_TYPES, NOPE_FACTOR, RopeScaling, check_consistent
from pi_gguf.vocabulary.keys import gguf_vocabulary
from pi_gguf.vocabulary.sentencepiece import CONTROL

_TOKENIZER = "tokenizer.ggml."
_ARRAYS = ("tokens", "token_type", "scores", "merges")
_INSTRUCTED = re.compile(r"(?i)(^|[\W_])(instruct|chat|it)([\W_]|$)")
_EXACT = {"tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id"}
"""Keys that are always stated, whatever llama.cpp takes without them."""

_OPTIONAL = ("unknown_token_id", "padding_token_id", "chat_template", "rope.scaling.finetuned")
"""Ends of keys whose lack changes no token and no logit."""

_LLAMA3_NAMES = {
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
}  # fmt: skip
SAME_SPLITTING: tuple[set[str], ...] = (
    {
        "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum",
        "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
    },
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"},
    {"smaug-bpe", "dbrx", "chatglm-bpe", "glm4", "glm5"},
    {"qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open"},
    _LLAMA3_NAMES,
)  # fmt: skip
"""Names of pre-tokenizers that are one and the same in llama.cpp."""


# What a file should state


@dataclass(frozen=True)
class Expectation:
    """What the checkpoint says that a file must state.

    Args:
        checkpoint: the file was made from, extended where the file is.
        metadata: keys of the architecture and the tokenizer, in the order in which `convert` writes them.
    """

    checkpoint: Checkpoint
    metadata: dict[str, Any]


def expect(header: Header, tensors: Sequence[TensorInfo], checkpoint: Checkpoint) -> Expectation:
    """Work out what a file must state by the checkpoint it was made from.

    Where the file scales its positions and the checkpoint does not, the file is an interpolation of the checkpoint by
    the factor that the file states.

    Raises:
        OptionError: the file was made from another model.
    """
    _check_same_model(header, tensors, checkpoint)
    arch, metadata, rope = header.arch, header.metadata, checkpoint.rope
    factor, kind = _factor(metadata, arch), metadata.get(f"{arch}.rope.scaling.type")
    before, window = rope.max_position_embeddings, metadata.get(f"{arch}.context_length")
    if kind == "linear" and not factor > 1 and _is_window(window):
        factor = window / before
    if rope.rope_type == "default" and kind in (None, "linear") and 1 < factor < 1e6 and not checkpoint.family.alibi:
        checkpoint = checkpoint.extended(round(factor * before))
    record = checkpoint.record
    finetuned = metadata.get(f"{arch}.rope.scaling.finetuned", record is not None and record.steps > 0)
    vocabulary = gguf_vocabulary(checkpoint, checkpoint.load_tokenizer())
    return Expectation(checkpoint, {**model_metadata(checkpoint, finetuned=bool(finetuned)), **vocabulary})


def _check_same_model(header: Header, tensors: Sequence[TensorInfo], checkpoint: Checkpoint) -> None:
    shapes = {t.name: t.shape for t in tensors}
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d+)\.", name))}
    compared: list[tuple[str, Any, Any]] = [("architecture", header.arch, checkpoint.family.arch)]
    if "token_embd.weight" in shapes:
        embedding = (checkpoint.vocab_size, checkpoint.hidden_size)
        compared.append(("embedding", shapes["token_embd.weight"], embedding))
    if layers and not _is_split(header):
        compared.append(("number of layers", max(layers) + 1, checkpoint.n_layers))
    for name, ours, theirs in compared:
        if ours != theirs:
            raise OptionError(
                f"{header.path}: was not made from {checkpoint.source}: its {name} is {ours}, there {theirs}",
                "give the model that the file was made from",
            )


def _is_split(header: Header) -> bool:
    return bool(header.metadata.get("split.count", 1) != 1)


def _factor(metadata: Mapping[str, Any], arch: str) -> float:
    """Return the factor as llama.cpp reads it, of either spelling; 1 where there is none."""
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear"))
    return factor if isinstance(factor, float) and factor != 0 else 1.0


# What is wrong


def find_defects(header: Header, tensors: Sequence[TensorInfo], expected: Expectation | None = None) -> list[Finding]:
    """Return everything that is wrong in a file; what the checkpoint says goes before what the file itself tells.

    Args:
        header: of the file, or of what it is to become.
        tensors: of the file.
        expected: what it should state; None where the checkpoint is not at hand.
    """
    findings = list(_against(header, tensors, expected)) if expected is not None else []
    mended = mend(header, findings, expected)
    found = {finding.key for finding in findings}
    own = (*_types(mended), *find_fatal(mended, tensors), *_positions(mended, tensors), *_tokenizer(mended, tensors))
    for finding in own:
        if finding.key not in found and not (expected is not None and _is_meant(finding, expected)):
            findings.append(finding)
            found.add(finding.key)
    return findings


def mend(header: Header, findings: Sequence[Finding], expected: Expectation | None = None) -> Header:
    """Return a header in which all is mended that a change of keys mends."""
    changes: dict[str, Entry | None] = {}
    for finding in findings:
        if finding.remedy == REMOVE:
            changes[finding.key] = None
        elif finding.remedy == SET:
            there = header.entries.get(finding.key)
            kind = type_of_key(finding.key) or (there.type if there is not None else None)
            changes[finding.key] = Entry.of(finding.expected, None if isinstance(finding.expected, list) else kind)
    return header.changed(changes, list(expected.metadata) if expected is not None else ())


def _is_meant(finding: Finding, expected: Expectation) -> bool:
    """Tell whether the checkpoint itself is without what is missed."""
    return finding.severity == "note" or (finding.found is None and finding.key not in expected.metadata)


def _against(header: Header, tensors: Sequence[TensorInfo], expected: Expectation) -> Iterator[Finding]:
    """Compare with the checkpoint."""
    metadata, source = header.metadata, expected.checkpoint.source
    defaults = _defaults(header, expected)
    for key, value in expected.metadata.items():
        if isinstance(value, list) or (key == "tokenizer.chat_template" and key in metadata):
            continue
        entry = header.entries.get(key)
        if entry is None:
            same = key in defaults and _equal(defaults[key], value)
            if same and key not in _EXACT and not key.startswith(_TOKENIZER):
                continue
            optional = key.endswith(_OPTIONAL) and not (value is True and expected.checkpoint.family.rope_finetuned)
            note = (same and key not in _EXACT) or optional
            taken = f"llama.cpp takes {in_short(defaults[key])}" if key in defaults else f"{source} has it"
            yield Finding(key, None, value, f"{taken}.", severity="note" if note else "defect")
        elif entry.type[0] == "[":
            if any(not _equal(part, value) for part in entry.value):
                yield Finding(key, entry.value, value, f"not all of its values are those of {source}.", CONVERT)
        elif not _equal(entry.value, value) and not (
            key == "tokenizer.ggml.pre" and any({entry.value, value} <= names for names in SAME_SPLITTING)
        ):
            yield Finding(key, entry.value, value, f"it differs from {source}.")
    yield from _against_scaling(header, expected)
    yield from _against_arrays(header, expected)
    wanted = expected.checkpoint.rope.factor_tensors(header.arch, expected.checkpoint.rotary_dim)
    there = {t.name for t in tensors if t.name in FACTOR_TENSOR_NAMES}
    for name in wanted if not _is_split(header) else ():
        if name not in there:
            yield Finding(name, None, "a tensor", f"the rope factors of {source} are lost; convert again.", CONVERT)
    for name in sorted(there):
        if not _equal_factors(header, name, wanted.get(name)):
            text = f"its values are not the rope factors of {source}; convert again."
            yield Finding(name, "a tensor", None, text, CONVERT)


def _defaults(header: Header, expected: Expectation) -> dict[str, Any]:
    """Return what llama.cpp takes where a key is not there, as far as it is known."""
    arch, checkpoint = header.arch, expected.checkpoint
    head_dim = checkpoint.hidden_size // checkpoint.n_heads
    rows = header.entries.get("tokenizer.ggml.tokens")
    return {
        f"{arch}.attention.head_count_kv": checkpoint.n_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": header.metadata.get(f"{arch}.attention.key_length", head_dim),
        f"{arch}.vocab_size": rows.length if rows is not None else None,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.rope.freq_base_swa": 10000.0,
        f"{arch}.rope.scaling.factor": 1.0,
        **{f"{_TOKENIZER}{name}": value for name, value in _flags(header.metadata).items()},
    }


def _flags(metadata: Mapping[str, Any]) -> dict[str, bool]:
    """Return the flags of the tokenizer as llama.cpp takes them where they are not there."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "llama":
        return {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    if kind == "gpt2":
        return {"add_bos_token": pre in {*_LLAMA3_NAMES, "tekken", "chameleon"}, "add_eos_token": False}
    return {}


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        return abs(ours - theirs) <= 1e-6 * abs(theirs)
    return bool(ours == theirs)


def _equal_factors(header: Header, name: str, factors: list[float] | None) -> bool:
    place = next(t for t in header.tensors if t.name == name)
    if factors is None or (place.type, place.sides) != (tensor_types()["F32"], (len(factors),)):
        return False
    path, at = place.elsewhere or (header.path, header.data_offset + place.offset)
    with path.open("rb") as file:
        file.seek(at)
        values = struct.unpack(f"<{len(factors)}f", file.read(4 * len(factors)))
    return all(map(_equal, values, factors))


def _against_scaling(header: Header, expected: Expectation) -> Iterator[Finding]:
    """Find keys that scale positions where the checkpoint does not."""
    arch = header.arch
    harmless = {f"{arch}.rope.scaling.type": ("none",), f"{arch}.rope.scaling.factor": (0.0, 1.0)}
    kind, factor = header.metadata.get(f"{arch}.rope.scaling.type", "none"), _factor(header.metadata, arch)
    if expected.checkpoint.rope.rope_type != "linear" and kind == "none" and factor == 1:
        return
    for key, value in header.metadata.items():
        ours = key.startswith(f"{arch}.rope.scaling.") or key == f"{arch}.rope.scale_linear"
        if ours and key not in expected.metadata and value not in harmless.get(key, ()):
            yield Finding(key, value, None, f"positions of {expected.checkpoint.source} are not scaled so.", REMOVE)


def _against_arrays(header: Header, expected: Expectation) -> Iterator[Finding]:
    """Find lists of the vocabulary that are missing, or of another length; then all of them are the checkpoint's."""
    entries, metadata, source = header.entries, header.metadata, expected.checkpoint.source
    wanted = {
        name: expected.metadata[f"{_TOKENIZER}{name}"] for name in _ARRAYS if _TOKENIZER + name in expected.metadata
    }
    lengths = {name: entries[_TOKENIZER + name].length if _TOKENIZER + name in entries else None for name in wanted}
    other = metadata.get("tokenizer.ggml.model") != expected.metadata["tokenizer.ggml.model"]
    other = other or lengths["tokens"] != len(wanted["tokens"])
    eos = expected.metadata.get("tokenizer.ggml.eos_token_id")
    for name, values in wanted.items():
        key = _TOKENIZER + name
        found = entries[key].value if key in entries else None
        if not isinstance(found, list):
            yield Finding(key, None, values, f"{source} has it.")
        elif other or (name != "merges" and len(found) != len(values)):
            yield Finding(key, found, values, f"it is not the vocabulary of {source}.")
        elif name == "token_type" and eos is not None and found[eos] != CONTROL == values[eos]:
            yield Finding(key, found, values, f"the end token {eos} must be of type {CONTROL} (control).")


# What a file tells by itself


def _types(header: Header) -> Iterator[Finding]:
    for key, entry in header.entries.items():
        wanted = type_of_key(key)
        if wanted in (None, entry.type) or entry.type[0] == "[" or key.startswith("general."):
            continue
        value, text = entry.value, f"it is stored as {entry.type}; llama.cpp reads {wanted} only."
        try:
            Entry.of(value, wanted)
        except ValueError:
            yield Finding(key, value, None, text, ASK)
        else:
            yield Finding(key, value, value, text)


def _positions(header: Header, tensors: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Find windows and factors that do not fit together."""
    arch, metadata = header.arch, header.metadata
    scaling = f"{arch}.rope.scaling"
    window, factor = metadata.get(f"{arch}.context_length"), _factor(metadata, arch)
    original, kind = metadata.get(f"{scaling}.original_context_length"), metadata.get(f"{scaling}.type")
    if not any(t.name == "token_embd.weight" for t in tensors):
        return  # no language model, or its vocabulary alone
    if not _is_window(window):
        product = round(original * factor) if _is_window(original) and 1 <= factor < 1e6 else None
        text = "it must be the window in tokens, a positive whole number."
        yield Finding(f"{arch}.context_length", window, product, text, SET if product else ASK)
        return
    base = metadata.get(f"{arch}.rope.freq_base", 10000.0)
    if isinstance(base, float) and not 1e-37 < base < 1e38:
        yield Finding(f"{arch}.rope.freq_base", base, None, "it must be a positive number.", ASK)
    if kind is None and factor != 1:
        text = "there is a factor; llama.cpp takes linear, other programs no scaling at all."
        yield Finding(f"{scaling}.type", None, "linear", text)
        kind = "linear"
    if kind is not None and kind not in GGUF_ROPE_TYPES:
        text = f"llama.cpp knows {', '.join(GGUF_ROPE_TYPES)}, and ends at any other."
        yield Finding(f"{scaling}.type", kind, None, text, ASK)
    if kind == "linear":
        yield from _interpolation(arch, window, factor, original, metadata.get(f"{scaling}.factor"))
    elif _is_window(original) and 1 < factor < 1e6 and original * factor - window > max(1.0, 1e-3 * window):
        yield _narrow(arch, window, factor, original)  # yarn, longrope
    lost = not any(t.name == "rope_freqs.weight" for t in tensors) and not _is_split(header)
    if lost and (arch, window, base) == ("llama", 131072, 500000.0) and kind in (None, "none"):
        text = "window and base are those of Llama 3.1, which has rope factors; if it is one, convert it again."
        yield Finding("rope_freqs.weight", None, None, text, CONVERT, "note")


def _interpolation(arch: str, window: int, factor: float, original: Any, stated: Any) -> Iterator[Finding]:
    scaling = f"{arch}.rope.scaling"
    if factor == NOPE_FACTOR:
        return  # rotary positions are switched off; no window follows from the factor
    if not 1 < factor < 1e6:
        grown = window / original if _is_window(original) and window > original else None
        reads = "llama.cpp reads 1, no scaling." if stated is None else "linear scaling needs one above 1."
        yield Finding(f"{scaling}.factor", stated, grown, reads, SET if grown else ASK)
    elif not _is_window(original):
        whole = round(window / factor) if abs(window / factor - round(window / factor)) < 1e-3 else None
        text = "it is the window before the scaling, context_length / factor."
        yield Finding(f"{scaling}.original_context_length", original, whole or None, text, SET if whole else ASK)
    elif check_consistent(RopeScaling("linear", factor, 1.0, original, window), ""):
        if window < original * factor:
            yield _narrow(arch, window, factor, original)
        else:
            text = f"it is beyond the original window {original} times factor {factor:g}; one of the three is wrong."
            yield Finding(f"{arch}.context_length", window, None, text, ASK)


def _narrow(arch: str, window: int, factor: float, original: int) -> Finding:
    text = f"the original window is {original} and the factor {factor:g}; programs open the smaller window."
    return Finding(f"{arch}.context_length", window, round(original * factor), text)


def _is_window(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _tokenizer(header: Header, tensors: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Find what the vocabulary lacks: lists, special tokens and flags."""
    metadata, entries = header.metadata, header.entries
    rows = next((t.shape[0] for t in tensors if t.name == "token_embd.weight"), None)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        if kind is None and rows is not None and not _is_split(header):
            yield Finding("tokenizer.ggml.model", None, None, "the file has no tokenizer.", ASK)
        return
    tokens = entries.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.type != "[STRING]":
        yield Finding("tokenizer.ggml.tokens", None, None, "there is no vocabulary.", ASK)
        return
    if rows is not None and tokens.length != rows:
        text = f"{tokens.length} tokens for the {rows} rows of the embedding; llama.cpp does not open it."
        yield Finding("tokenizer.ggml.tokens", tokens.value, None, text, ASK)
    lost = {"token_type": "special tokens are not told from words"}
    lost |= {"merges": "without them nothing is tokenized"} if kind == "gpt2" else {"scores": "pieces join at random"}
    for name, text in lost.items():
        entry = entries.get(_TOKENIZER + name)
        if entry is None or entry.type[0] != "[":
            yield Finding(_TOKENIZER + name, None, None, f"{text}.", ASK)
        elif name != "merges" and entry.length != tokens.length:
            yield Finding(_TOKENIZER + name, entry.value, None, f"there are {tokens.length} tokens.", ASK)
    if kind == "gpt2" and metadata.get("tokenizer.ggml.pre", "default") == "default":
        text = "llama.cpp then splits words in a way of its own, and texts get other tokens than in training."
        yield Finding("tokenizer.ggml.pre", metadata.get("tokenizer.ggml.pre"), None, text, ASK)
    yield from _special_tokens(header, tokens.length)
    for name, taken in _flags(metadata).items():
        if _TOKENIZER + name not in entries:
            yield Finding(_TOKENIZER + name, None, None, f"llama.cpp takes {str(taken).lower()}.", ASK, "note")
    named = " ".join(str(metadata.get(f"general.{name}", "")) for name in ("name", "basename", "finetune"))
    if "tokenizer.chat_template" not in metadata and _INSTRUCTED.search(named):
        text = "by its name the model is for conversations; programs then guess a template."
        yield Finding("tokenizer.chat_template", None, None, text, ASK, "note")


def _special_tokens(header: Header, n_tokens: int) -> Iterator[Finding]:
    metadata, types = header.metadata, header.entries.get("tokenizer.ggml.token_type")
    ids = {key: value for key, value in metadata.items() if key.startswith(_TOKENIZER) and key.endswith("_token_id")}
    for key, value in ids.items():
        if not isinstance(value, int) or not 0 <= value < n_tokens:
            yield Finding(key, value, None, f"the vocabulary has {n_tokens} tokens.", ASK)
    eos = ids.get("tokenizer.ggml.eos_token_id")
    if eos is None:
        yield Finding("tokenizer.ggml.eos_token_id", None, None, "generation does not know where to end.", ASK)
    elif (
        types is not None
        and types.type == "[INT32]"
        and types.length == n_tokens
        and isinstance(eos, int)
        and eos in range(n_tokens)
    ):
        kind = types.value[eos]
        if kind != CONTROL:
            text = f"this token is of type {kind}, an end token must be of type {CONTROL} (control)."
            yield Finding("tokenizer.ggml.eos_token_id", eos, None, text, ASK)
    begins = metadata.get("tokenizer.ggml.add_bos_token", _flags(metadata).get("add_bos_token"))
    if begins and "tokenizer.ggml.bos_token_id" not in ids:
        text = "texts are to begin with a token that is not named."
        yield Finding("tokenizer.ggml.bos_token_id", None, None, text, ASK)
