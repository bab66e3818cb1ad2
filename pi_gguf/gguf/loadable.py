"""What llama.cpp does not survive in a GGUF file: it ends the process at some headers instead of refusing them.

In: a header and its tensors. Out: a `Finding` for each thing that makes llama.cpp abort, loop or read what is not
there; or a `GgufError` that names the first. What llama.cpp refuses by itself is left to it. No weight is read.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from pi_gguf.errors import GgufError
from pi_gguf.families import FAMILIES
from pi_gguf.gguf.file import GgufInfo, TensorInfo
from pi_gguf.gguf.findings import ASK, CONVERT, REMOVE, SET, Finding, in_short
from pi_gguf.gguf.header import ALIGNMENT, Entry, Header
from pi_gguf.scaling.rope import FACTOR_TENSOR_NAMES, GGUF_ROPE_TYPES
from pi_gguf.vocabulary.keys import PHI3_TOKENS
from pi_gguf.vocabulary.sentencepiece import BYTE

MOST_LAYERS, MOST_EXPERTS = 512, 1024

_TOKENIZER = "tokenizer.ggml."
_LLAMA, _BERT, _GPT2, _RWKV, _NONE = "llama", "bert", "gpt2", "rwkv", ("none", "no_vocab")
TOKENIZERS = (_LLAMA, _GPT2, "gemma4", "t5", _BERT, _RWKV, "plamo2", "hybriddna", "whitespace")
"""Kinds of tokenizers that llama.cpp reads texts with."""

_USUAL = {_LLAMA: (1, 2), _BERT: (101, None), _GPT2: (11, 11), "hybriddna": (11, 11), "whitespace": (11, 11),
          "t5": (None, 1), "plamo2": (1, 2)}  # fmt: skip
"""Begin and end token that llama.cpp takes where no key names them, by kind of tokenizer."""

_BEGINS = {
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
    "chameleon",
}  # fmt: skip
"""Pre-tokenizers with which texts begin with a token unless a flag says otherwise."""

_NO_WRITERS = {
    "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert", "eurobert", "modern-bert",
    "gemma-embedding", "t5", "t5encoder", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1", "clip",
}  # fmt: skip
"""Architectures that do not continue a text token by token."""

_WHOLE_HEADS = {
    "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "falcon", "starcoder2", "olmo", "olmo2", "olmoe", "granite",
    "smollm3",
}  # fmt: skip
"""Architectures of ours whose heads llama.cpp rotates as a whole."""

_OURS = frozenset(family.arch for family in FAMILIES.values())
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
"""Types that llama.cpp multiplies nothing with: they are of indices, or of inputs."""

_ADDED = re.compile(r"(blk\.\d+\.|output|token_embd)\S*_norm\.(weight|bias)|blk\.\d+\.\S+\.bias")
"""Tensors that llama.cpp adds, or multiplies element by element, in 32 bits only."""

_MULTIPLIED = re.compile(r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(up|down|gate)(_exps)?))\.weight")
"""Tensors that are matrices in every architecture."""

_NO_MODELS = {
    "adapter": "apply it to the file of its model: pi-gguf run MODEL.gguf --lora ADAPTER.gguf",
    "imatrix": "give it with --imatrix beside the model",
    "mmproj": "take the file of the model itself",
}
"""What else lies in GGUF files, and what is done with it."""

_PROSE = frozenset(map(chr, range(32, 127))) | {"\n"}


def check_loadable(info: GgufInfo, *, texts: bool = True) -> None:
    """Check that llama.cpp survives a file.

    Args:
        info: what the file states.
        texts: whether it is to read and write texts; quantizing does neither.

    Raises:
        GgufError: it does not, or it is no model; the hint says what mends it.
    """
    kind = info.metadata.get("general.type")
    if kind in _NO_MODELS and not any(t.name == "token_embd.weight" for t in info.tensors):
        raise GgufError(f"{info.path}: general.type is {kind}, it is no model", _NO_MODELS[kind])
    for finding in find_fatal(info.header, info.tensors, texts=texts):
        raise GgufError(f"{info.path}: {finding}", _hint(info.header, finding))


def _hint(header: Header, finding: Finding) -> str:
    target = f"pi-gguf repair {shlex.quote(str(header.path))} REPAIRED.gguf"
    if finding.severity == "note":
        return "take a model that writes texts"
    if finding.remedy == CONVERT:
        return "convert the checkpoint again, or copy the file again"
    if finding.remedy == ASK:
        return f"{target} --set {finding.key}=VALUE, or --against MODEL with the model it was made from"
    return f"{target} writes it as it should be"


def find_fatal(header: Header, tensors: Sequence[TensorInfo], *, texts: bool = True) -> Iterator[Finding]:
    """Yield what llama.cpp does not survive in a header and its tensors; `texts` as `check_loadable` has it."""
    yield from find_misplaced(header, tensors)
    yield from _layers(header, tensors)
    yield from _experts(header, tensors)
    yield from _numbers(header)
    if texts:
        yield from _kinds(tensors)
        yield from _heads(header)
        yield from _reading(header)


def _whole(header: Header, name: str, default: int = 0) -> int:
    """Return a whole number of the architecture; the default where there is none that llama.cpp reads."""
    value = header.metadata.get(f"{header.arch}.{name}")
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _per_layer(header: Header, name: str) -> list[int]:
    """Return whole numbers that may be given layer by layer; a single one where they are given once."""
    entry = header.entries.get(f"{header.arch}.{name}")
    if entry is None or entry.type.strip("[]") not in ("UINT32", "INT32"):
        return []
    return [value % 2**32 for value in (entry.value if entry.type[0] == "[" else [entry.value])]


def _is_split(header: Header) -> bool:
    return bool(header.metadata.get("split.count", 1) != 1)


# Data and layers


def find_misplaced(header: Header, tensors: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Find tensors that are not where llama.cpp looks for them: one behind the other, at whole blocks of memory."""
    alignment, expected = header.metadata.get("general.alignment", ALIGNMENT), 0
    for place, tensor in zip(header.tensors, tensors, strict=True):
        if place.offset != expected:
            text = "tensors must follow each other without holes; the file is damaged."
            yield Finding(place.name, f"at {place.offset}", f"at {expected}", text, CONVERT)
            return
        expected += -(-tensor.nbytes // alignment) * alignment
    if tensors and header.data_offset % ALIGNMENT:
        text = f"the data begin at {header.data_offset}, no multiple of {ALIGNMENT}; llama.cpp maps no such file."
        yield Finding("general.alignment", alignment, ALIGNMENT, text, CONVERT)


def _layers(header: Header, tensors: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Find a number of layers that is not that of the tensors."""
    key = f"{header.arch}.block_count"
    count, extra = header.metadata.get(key), _whole(header, "nextn_predict_layers")
    numbers = [int(match[1]) for t in tensors if (match := re.match(r"blk\.(\d{1,9})\.", t.name))]
    there = max(numbers, default=-1) + 1
    if not isinstance(count, int) or isinstance(count, bool):
        return
    right = there if 0 < there <= MOST_LAYERS and not _is_split(header) else None
    if not 0 < count <= MOST_LAYERS:
        text = f"llama.cpp ends at a file without 1 to {MOST_LAYERS} layers."
        yield Finding(key, count, right, text, ASK if right is None else SET)
    elif right and (count - extra > there or (header.arch in _OURS and not extra and count != there)):
        yield Finding(key, count, right, f"there are tensors of {there} layers.")
    elif extra > count:
        yield Finding(f"{header.arch}.nextn_predict_layers", extra, None, f"there are {count} layers.", REMOVE)


def _experts(header: Header, tensors: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Find numbers of experts that contradict each other or the tensors."""
    arch = header.arch
    count, used = _whole(header, "expert_count"), max(_per_layer(header, "expert_used_count"), default=0)
    groups, taken = _whole(header, "expert_group_count"), _whole(header, "expert_group_used_count")
    if arch.startswith("hunyuan") and count <= 1:
        count = used = 0
    stacks = {t.shape[0] for t in tensors if len(t.shape) == 3 and re.search(r"\.ffn_\w+_exps\.weight$", t.name)}
    whole = arch in _OURS and not _is_split(header) and any(t.name.startswith("blk.") for t in tensors)
    key, there = f"{arch}.expert_count", stacks.pop() if len(stacks) == 1 else None
    if whole and there is not None and count != there:
        yield Finding(key, count or None, there, f"its tensors are of {there} experts.")
    elif whole and there is None and count:
        yield Finding(key, count, None, "it has no tensors of experts.", REMOVE)
    elif count > MOST_EXPERTS:
        yield Finding(key, count, None, f"llama.cpp reads {MOST_EXPERTS} at most.", ASK)
    elif count and not used:
        yield Finding(f"{arch}.expert_used_count", used or None, None, f"of {count} experts none is used.", ASK)
    elif used > count:
        text = f"there are {count or 'no'} experts."
        yield Finding(f"{arch}.expert_used_count", used, None, text, ASK if count else REMOVE)
    elif groups and (groups >= count or (groups > 1 and (count % groups or not 0 < taken < groups))):
        text = f"{count} experts are not {groups} groups of which {taken} are used."
        yield Finding(f"{arch}.expert_group_count", groups, None, text, ASK)


def _numbers(header: Header) -> Iterator[Finding]:
    """Find values at which a calculation of llama.cpp ends."""
    arch, metadata = header.arch, header.metadata
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        value = metadata.get(f"{arch}.attention.{name}")
        if isinstance(value, float) and not 0 <= value < math.inf:
            yield Finding(f"{arch}.attention.{name}", value, None, "it must be a small number from 0 on.", ASK)
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if isinstance(kind, str) and kind not in GGUF_ROPE_TYPES:
        text = f"llama.cpp knows {', '.join(GGUF_ROPE_TYPES)}, and ends at any other."
        yield Finding(f"{arch}.rope.scaling.type", kind, None, text, ASK)


# Calculating


def _kinds(tensors: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Find tensors of types that llama.cpp does not calculate with where they are."""
    for t in tensors:
        added = t.name in FACTOR_TENSOR_NAMES or _ADDED.fullmatch(t.name)
        if t.type != "F32" if added else _MULTIPLIED.fullmatch(t.name) and t.type in _NO_WEIGHTS:
            yield Finding(t.name, t.type, "F32", "llama.cpp calculates with no other type there.", CONVERT)


def _heads(header: Header) -> Iterator[Finding]:
    """Find heads that llama.cpp cannot share keys among, or cannot rotate."""
    arch = header.arch
    heads = _per_layer(header, "attention.head_count")
    shared = _per_layer(header, "attention.head_count_kv") or heads
    if len(shared) == 1 < len(heads):
        shared *= len(heads)
    for many, few in zip(heads, shared, strict=False):
        if few and many % few:
            text = f"{many} heads cannot share the keys of {few}."
            yield Finding(f"{arch}.attention.head_count_kv", few, None, text, ASK)
            break
    width = _whole(header, "embedding_length")
    if not heads or not heads[0] or arch not in _OURS:
        return
    key = _whole(header, "attention.key_length", width // heads[0])
    value = _whole(header, "attention.value_length", width // heads[0])
    rotated = _whole(header, "rope.dimension_count", key)
    if key != value:
        yield Finding(f"{arch}.attention.value_length", value, key, f"keys have {key} elements a head.", ASK)
    elif rotated < 2 or rotated % 2 or rotated > key or (arch in _WHOLE_HEADS and rotated != key):
        text = f"llama.cpp does not rotate {rotated} of the {key} elements of a head."
        yield Finding(f"{arch}.rope.dimension_count", rotated, key if arch in _WHOLE_HEADS else None, text, ASK)


# Reading texts


def _reading(header: Header) -> Iterator[Finding]:
    """Find what keeps llama.cpp from reading and writing texts."""
    arch, metadata = header.arch, header.metadata
    if arch in _NO_WRITERS:
        text = "models of this architecture do not continue a text token by token; they are not run here."
        yield Finding("general.architecture", arch, None, text, CONVERT, "note")
    if metadata.get(f"{arch}.attention.causal") is False:
        text = "every token sees all others; such a model does not continue texts."
        yield Finding(f"{arch}.attention.causal", False, None, text, CONVERT, "note")
    kind = metadata.get(f"{_TOKENIZER}model")
    tokens = header.entries.get(f"{_TOKENIZER}tokens")
    if kind not in TOKENIZERS and isinstance(kind, str) and kind != "test":
        text = f"llama.cpp reads texts with {', '.join(TOKENIZERS)} only."
        yield Finding(f"{_TOKENIZER}model", kind, None, text, ASK)
    elif tokens is not None and tokens.type == "[STRING]":
        texts = _tokens(tokens)
        yield from _twice(texts)
        yield from _special_tokens(header, str(kind), len(texts))
        if kind in _OF_KIND:
            yield from _OF_KIND[str(kind)](header, texts)
        name = str(metadata.get("general.name", "")).lower()
        lost = [text for text in PHI3_TOKENS if text.encode() not in set(texts)] if re.search("phi-?3", name) else []
        if lost and "jina" not in f"{metadata.get(_TOKENIZER + 'pre')}{arch}":
            text = f"of a model called so llama.cpp wants the tokens {', '.join(lost)}; another name will do."
            yield Finding("general.name", metadata["general.name"], None, text, ASK)


def _tokens(entry: Entry) -> list[bytes]:
    """Return the tokens as llama.cpp has them: up to a zero byte, and with names for empty ones."""
    return [text.split(b"\0")[0] or b"[EMPTY_%d]" % i for i, text in enumerate(entry.texts)]


def _twice(texts: Sequence[bytes]) -> Iterator[Finding]:
    if len(set(texts)) == len(texts):
        return
    first: dict[bytes, int] = {}
    for i, text in enumerate(texts):
        if text in first:
            shown = text.decode(errors="replace")[:40]
            reason = f"tokens {first[text]} and {i} are both {shown!r} to llama.cpp, which ends there."
            yield Finding(f"{_TOKENIZER}tokens", len(texts), None, reason, CONVERT)
            return
        first[text] = i


def _special_tokens(header: Header, kind: str, n_tokens: int) -> Iterator[Finding]:
    """Find tokens that texts are to begin or end with and that there are not."""
    metadata = header.metadata
    pre = str(metadata.get(f"{_TOKENIZER}pre"))
    defaults = {"bos": kind == _LLAMA or pre in _BEGINS or "gemma4" in (kind, pre), "eos": kind == "t5"}
    for name, usual in zip(defaults, _USUAL.get(kind, (None, None)), strict=True):
        taken = None if name == "bos" and pre in ("chatglm-bpe", "glm4", "glm5") else usual
        stated = metadata.get(f"{_TOKENIZER}{name}_token_id")
        in_range = isinstance(stated, int) and 0 <= stated < n_tokens
        wanted = metadata.get(f"{_TOKENIZER}add_{name}_token", defaults[name])
        if wanted is True and not in_range and (taken is None or taken >= n_tokens):
            text = f"texts are to have it, as {_TOKENIZER}add_{name}_token says; the vocabulary has {n_tokens} tokens."
            yield Finding(f"{_TOKENIZER}{name}_token_id", stated, None, text, ASK)


def _pieces(header: Header, texts: Sequence[bytes]) -> Iterator[Finding]:
    lost = unreadable(set(texts), _PROSE)
    if lost:
        text = f"it has no pieces and no bytes for {len(lost)} characters of plain text such as {sorted(lost)[-1]!r}."
        yield Finding(f"{_TOKENIZER}tokens", len(texts), None, text, CONVERT)


def pieces_without_bytes(header: Header) -> set[bytes] | None:
    """Return the tokens of a SentencePiece vocabulary that has not all bytes; None of any other.

    llama.cpp ends at a character that is none of them and whose bytes are none either.
    """
    tokens = header.entries.get(f"{_TOKENIZER}tokens")
    if header.metadata.get(f"{_TOKENIZER}model") != _LLAMA or tokens is None or tokens.type != "[STRING]":
        return None
    texts = set(_tokens(tokens))
    return texts if any(not _has_byte(texts, b) for b in (*range(0xC0), *range(0xC2, 0xF5))) else None


def unreadable(tokens: set[bytes], characters: frozenset[str]) -> set[str]:
    """Return the characters that are no tokens of a SentencePiece vocabulary, and whose bytes are none either."""
    spaced = {c: ("▁" if c == " " else c).encode(errors="replace") for c in characters}
    return {c for c, text in spaced.items() if text not in tokens and not all(_has_byte(tokens, b) for b in text)}


def _has_byte(tokens: set[bytes], byte: int) -> bool:
    return b"<0x%02X>" % byte in tokens or bytes([byte]) in tokens


def _words(header: Header, texts: Sequence[bytes]) -> Iterator[Finding]:
    types = header.entries.get(f"{_TOKENIZER}token_type")
    if types is not None and types.type == "[INT32]" and BYTE in types.value:
        text = f"its vocabulary has bytes (type {BYTE}), which no {_BERT} tokenizer has."
        yield Finding(f"{_TOKENIZER}model", _BERT, None, text, ASK)
    for key, usual in (("bos_token_id", 101), ("seperator_token_id", 102)):
        stated = header.metadata.get(_TOKENIZER + key)
        if usual >= len(texts) and not (isinstance(stated, int) and 0 <= stated < len(texts)):
            text = f"texts are to have it; the vocabulary has {len(texts)} tokens."
            yield Finding(_TOKENIZER + key, stated, None, text, ASK)


def _bytes(header: Header, texts: Sequence[bytes]) -> Iterator[Finding]:
    escapes = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}
    there = {
        re.sub(
            rb"(?s)\\(?:x([0-9a-f]{2})|(.))",
            lambda m: bytes.fromhex(m[1].decode()) if m[1] else escapes.get(m[2], m[2]),
            text,
        )
        for text in texts
    }
    lost = {text[0] for text in there if text} - {text[0] for text in there if len(text) == 1}
    if lost:
        text = f"{len(lost)} bytes that its tokens begin with are no tokens; llama.cpp reads such a text for ever."
        yield Finding(f"{_TOKENIZER}model", _RWKV, None, text, ASK)


_OF_KIND = {_LLAMA: _pieces, _BERT: _words, _RWKV: _bytes}


# Adapters

_AGAIN = "write the adapter again, for example with pi-gguf convert --adapter-only"


def check_adapter(adapter: GgufInfo, base: GgufInfo) -> None:
    """Check that llama.cpp survives an adapter, and that it is one of a model.

    Raises:
        GgufError: otherwise.
    """
    for key, found, wanted in _wrong_keys(adapter.header, base.arch):
        got = "it is missing" if found is None else f"got {in_short(found)!r}"
        raise GgufError(f"{adapter.path}: {key} must be {wanted}, {got}", _AGAIN)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for t in adapter.tensors:
        name, _, side = t.name.rpartition(".lora_")
        if t.name.endswith("_norm.weight"):
            continue
        if side not in ("a", "b"):
            raise GgufError(f"{adapter.path}: {t.name} is neither a lora_a nor a lora_b", _AGAIN)
        if t.type in _NO_WEIGHTS:
            raise GgufError(f"{adapter.path}: {t.name} is {t.type}, which llama.cpp does not multiply with", _AGAIN)
        pairs.setdefault(name, {})[side] = t
    if not pairs:
        raise GgufError(f"{adapter.path}: it has no pairs of lora_a and lora_b", _AGAIN)
    for name, pair in pairs.items():
        _check_pair(adapter, base, name, pair)


def _wrong_keys(header: Header, arch: str) -> Iterator[tuple[str, Any, str]]:
    wanted = {"general.type": "adapter", "general.architecture": arch, "adapter.type": "lora"}
    for key, value in wanted.items():
        entry = header.entries.get(key)
        if entry is None or entry.type != "STRING" or entry.value != value:
            yield key, None if entry is None else entry.value, repr(value)
    alpha = header.entries.get("adapter.lora.alpha")
    if alpha is not None and (alpha.type != "FLOAT32" or not math.isfinite(alpha.value)):
        yield "adapter.lora.alpha", alpha.value, "a number of 32 bits"


def _check_pair(adapter: GgufInfo, base: GgufInfo, name: str, pair: dict[str, TensorInfo]) -> None:
    """Check the factors of one tensor: A (rank, in) and B (out, rank), of stacked experts one of each.

    Raises:
        GgufError: one is missing, or they are not factors of the tensor.
    """
    hint = f"it must be an adapter of {base.path}, written with --adapter-only"
    if len(pair) < 2:
        raise GgufError(f"{adapter.path}: {name} has no lora_{'b' if 'a' in pair else 'a'}", _AGAIN)
    of = next((t for t in base.tensors if t.name == name), None)
    if of is None:
        if not _is_split(base.header):
            raise GgufError(f"{adapter.path}: {name} is no tensor of {base.path}", hint)
        return
    shape, a, b = (_matrices(t.shape) for t in (of, pair["a"], pair["b"]))
    if name == "token_embd.weight":  # llama.cpp takes rows of A there: (vocabulary, rank) and (in, rank)
        if not any(t.name == "output.weight" for t in base.tensors):
            reason = "the embedding is the head, too; llama.cpp then takes it for both, and ends"
            raise GgufError(f"{adapter.path}: {name}: {reason}", "merge the adapter with pi-gguf convert --adapter")
        fits = shape == (1, a[1], b[1]) and a[2] == b[2]
    else:
        fits = shape == (a[0], b[1], a[2]) and a[0] == b[0] and a[1] == b[2]
    if not fits:
        shapes = f"{pair['a'].shape} and {pair['b'].shape}"
        raise GgufError(f"{adapter.path}: {name} of {shapes} does not fit {of.shape} of {base.path}", hint)


def _matrices(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as matrices, rows, columns."""
    return (1, 1, 1, *shape)[-3:]
