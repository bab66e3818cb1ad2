"""SentencePiece vocabularies: tokenizer.model, or a like tokenizer.json -> `tokenizer.ggml.*` keys, and back.

Two kinds: BPE is llama.cpp's "llama", Unigram its "t5". What llama.cpp does not do to a text before it looks for tokens
is an error that shows the part. Only tokens, scores, types and the treatment of white space are made here.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto

from pi_gguf.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF, the same numbers as SentencePiece's."""

_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"
_REPLACED_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}

_MERGED_UNPREFIXED = "white space is merged, with no space before a text (llama.cpp's Unigram puts one)"

ANOTHER_PROGRAM = (
    "if the model came with another tokenizer file (tokenizer.model, or tokenizer.json as it was before an edit), put "
    "that one alone into the folder; else run the model with transformers"
)


@cache
def open_sentencepiece(path: str) -> Any:
    """Return SentencePiece's own tokenizer.

    Raises:
        CheckpointError: the file is no SentencePiece model.
    """
    try:
        return SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model", "download this file again") from error


def keys_of_model(path: str) -> dict[str, Any]:
    """Return the keys of a tokenizer.model.

    Raises:
        CheckpointError: the file is no SentencePiece model.
        UnsupportedError: it does something to texts that llama.cpp does not; the message shows it.
    """
    open_sentencepiece(path)
    model = proto.ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf has kinds of its own
        raise CheckpointError(f"{path}: not a SentencePiece model ({error})", "download this file again") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    unigram = trainer.model_type == _UNIGRAM
    types = [int(piece.type) for piece in model.pieces]
    problems = {
        f"trainer_spec.model_type {trainer.model_type} (1 Unigram and 2 BPE are known)": trainer.model_type
        not in (_UNIGRAM, _BPE),
        "trainer_spec.treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "trainer_spec.byte_fallback of a Unigram model (llama.cpp gives the unknown token)": unigram
        and trainer.byte_fallback,
        f"normalizer_spec.name {normalizer.name!r} of a BPE model (llama.cpp normalizes nothing there)": not unigram
        and bool(normalizer.precompiled_charsmap),
        "normalizer_spec.remove_extra_whitespaces of a BPE model": not unigram and normalizer.remove_extra_whitespaces,
        _MERGED_UNPREFIXED: unigram and normalizer.remove_extra_whitespaces and not normalizer.add_dummy_prefix,
        f"the user-defined piece {next((p.piece for p in model.pieces if p.type == USER_DEFINED), '')!r} with "
        "add_dummy_prefix (llama.cpp puts the space behind it again)": USER_DEFINED in types
        and normalizer.add_dummy_prefix,
    }
    _refuse(path, problems)
    if not unigram:
        _check_bytes([piece.piece for piece in model.pieces], path)
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise CheckpointError(f"{path}: a score is no number", "download this file again")
    return _keys(
        unigram,
        tokens=[piece.piece for piece in model.pieces],
        scores=[float(piece.score) for piece in model.pieces],
        types=types,
        space_prefix=normalizer.add_dummy_prefix,
        charsmap=bytes(normalizer.precompiled_charsmap),
        merge_spaces=normalizer.remove_extra_whitespaces,
    )


def keys_of_bpe_json(parsed: dict[str, Any], tokens: list[str | None], path: str) -> dict[str, Any]:
    """Return the keys of a SentencePiece BPE that transformers saved as tokenizer.json: merges with byte fallback.

    Args:
        tokens: by id, None where an id is not used.

    Raises:
        UnsupportedError: it does something to texts that llama.cpp does not; the message shows it.
    """
    model = parsed["model"]
    space_prefix = _space_prefix(parsed, tokens, path)
    # SentencePiece joins the pair whose result scores highest; a merge list joins the pair that comes first.
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge), i)
    types = [BYTE if token and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    if model.get("unk_token") in tokens:
        types[tokens.index(model["unk_token"])] = UNKNOWN
    scores = [-float(rank.get(token or "", len(rank))) for token in tokens]
    _check_bytes(tokens, path)
    return _keys(False, tokens=tokens, scores=scores, types=types, space_prefix=space_prefix)


def _space_prefix(parsed: dict[str, Any], tokens: Sequence[str | None], path: str) -> bool:
    """Tell whether a SentencePiece BPE tokenizer.json puts a space before each text, as llama.cpp can.

    llama.cpp puts it behind each special token too, and before another space. Hugging Face does both where a normalizer
    puts it, neither with Metaspace and "first", the former alone with "always". Prose is the same with all of them.

    Raises:
        UnsupportedError: normalizer and pre_tokenizer do something else; the message shows them.
    """
    normalizer, pre = parsed.get("normalizer"), parsed.get("pre_tokenizer")
    normalizers, splitters = _parts(normalizer, "normalizers"), _parts(pre, "pretokenizers")
    by_regex = {**_REPLACED_SPACES, "pattern": {"Regex": " "}}
    normalizers = [_REPLACED_SPACES if part == by_regex else part for part in normalizers]
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    prefix = None
    if normalizers == [{"type": "Prepend", "prepend": _SPACE}, _REPLACED_SPACES]:
        prefix = True
    elif normalizers == [_REPLACED_SPACES] and splitters in ([], [cut]):  # no space is left that could be cut at
        prefix = False
    if splitters and splitters != [cut]:
        scheme = _metaspace_scheme(splitters)
        if scheme is not None and (prefix or normalizers in ([], [_REPLACED_SPACES])):
            prefix = prefix or scheme != "never"
            if splitters[0].get("split") and (inside := _inside_space(tokens)):
                raise UnsupportedError(
                    f"{path}: pre_tokenizer.split with the token {inside!r}, which has a space inside, and llama.cpp "
                    "splits nothing here",
                    ANOTHER_PROGRAM,
                )
        else:
            prefix = None
    if prefix is None:
        raise UnsupportedError(
            f"{path}: llama.cpp has no equivalent known here for normalizer {_shown(normalizer)} with pre_tokenizer "
            f"{_shown(pre)}",
            ANOTHER_PROGRAM,
        )
    return prefix


def _metaspace_scheme(splitters: list[dict[str, Any]]) -> str | None:
    """Return where Metaspace puts a space: `always`, `first` or `never`; None where this is not all that is done."""
    part = splitters[0]
    if len(splitters) > 1 or part.get("type") != "Metaspace" or part.get("replacement") != _SPACE:
        return None
    return str(part.get("prepend_scheme", "always"))


def _inside_space(tokens: Iterable[str | None]) -> str:
    """Return a token with a space behind another character, or the empty text."""
    return next((token for token in tokens if token and _SPACE in token[1:].lstrip(_SPACE)), "")


def _check_bytes(tokens: Iterable[str | None], path: str) -> None:
    """Check that every byte has a token: llama.cpp ends the process where it looks for one that is not there."""
    known = set(tokens)
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in known and not (0 < b < 128 and chr(b) in known)]
    if missing:
        raise UnsupportedError(
            f"{path}: no token for {len(missing)} of the 256 bytes, the first is <0x{missing[0]:02X}>; llama.cpp needs "
            "them for characters without a token",
            ANOTHER_PROGRAM,
        )


def keys_of_unigram_json(parsed: dict[str, Any], rows: int, path: str) -> dict[str, Any]:
    """Return the keys of a Unigram tokenizer.json.

    Hugging Face applies the character map to a letter with its marks at once and can lose the marks (`½` with an
    accent); llama.cpp and SentencePiece keep them.

    Args:
        rows: of the embedding.

    Raises:
        CheckpointError: the vocabulary is no list of tokens and scores, or larger than the embedding.
        UnsupportedError: it does something to texts that llama.cpp does not; the message shows it.
    """
    model, unk = parsed["model"], parsed["model"].get("unk_id")
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not vocab:
        raise CheckpointError(f"{path}: model.vocab must be a list of tokens and scores", "copy the file again")
    if len(vocab) > rows:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(vocab)} tokens, config.json's vocab_size is {rows}",
            "tokenizer and weights are of different models: copy the tokenizer of this one there",
        )
    if not isinstance(unk, int) or not 0 <= unk < len(vocab):
        raise UnsupportedError(f"{path}: model.unk_id must be a token, got {unk}", ANOTHER_PROGRAM)
    tokens = [token for token, _ in vocab]
    parts = _parts(parsed.get("normalizer"), "normalizers")
    charsmap = b""
    if parts and parts[0]["type"] == "Precompiled":
        try:
            charsmap = base64.b64decode(parts.pop(0)["precompiled_charsmap"] or "", validate=True)
        except (binascii.Error, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: normalizer.precompiled_charsmap is not base64", "copy it again") from error
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    merged = {"type": "Replace", "pattern": {"Regex": " {2,}"}}
    merge_spaces = parts in [[strip, {**merged, "content": _SPACE}], [strip, {**merged, "content": " "}]]
    splitters = _parts(parsed.get("pre_tokenizer"), "pretokenizers")
    scheme = _metaspace_scheme(splitters) if splitters else None
    inside = _inside_space(tokens)
    problems = {
        "model.byte_fallback (llama.cpp gives the unknown token)": model.get("byte_fallback"),
        f"normalizer {_shown(parts)}": parts and not (merge_spaces and charsmap),
        f"pre_tokenizer {_shown(parsed.get('pre_tokenizer'))}": scheme is None,
        f"the token {inside!r} with a space inside, and pre_tokenizer.split": inside
        and any(part.get("split", True) for part in splitters),
        "normalizer Precompiled with white space that is not merged (Hugging Face makes one space of a line end of "
        "two characters)": charsmap and not merge_spaces,
        _MERGED_UNPREFIXED: merge_spaces and scheme == "never",
    }
    _refuse(path, problems)
    types = [NORMAL] * len(tokens)
    types[unk] = UNKNOWN
    return _keys(
        True, tokens=tokens, scores=[float(score) for _, score in vocab], types=types,
        space_prefix=scheme != "never", charsmap=charsmap, merge_spaces=merge_spaces,
    )  # fmt: skip


# The way back


def bpe_json_of(
    ids: Mapping[str, int], scores: Mapping[str, float], unknown: str | None, *, space_prefix: bool
) -> dict[str, Any]:
    """Return the parts of the tokenizer.json of a SentencePiece BPE: what `keys_of_bpe_json` reads.

    SentencePiece joins the pair whose result scores highest; so every way to cut a token in two is a merge, in the
    order of the scores.

    Args:
        ids: by spelling.
        scores: by spelling.
        unknown: the unknown token.
        space_prefix: whether a space is put before each text.
    """
    cuts = [
        (-scores[token], ids[token], at)
        for token in ids
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    spelled = {i: token for token, i in ids.items()}
    merges = [[spelled[i][:at], spelled[i][at:]] for _, i, at in sorted(cuts)]
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _REPLACED_SPACES]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": dict(ids), "merges": merges,
        },
    }  # fmt: skip


def unigram_json_of(
    vocab: Sequence[tuple[str, float]], unknown: int, *, charsmap: str, space_prefix: bool, merge_spaces: bool
) -> dict[str, Any]:
    """Return the parts of a Unigram tokenizer.json: what `keys_of_unigram_json` reads.

    Args:
        vocab: tokens and scores by id.
        unknown: id of the unknown token.
        charsmap: the character map in base64; empty where there is none.
        space_prefix: whether a space is put before each text.
        merge_spaces: whether several spaces become one.
    """
    normalizers: list[dict[str, Any]] = []
    if charsmap:
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if merge_spaces:
        normalizers.append({"type": "Strip", "strip_left": False, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": _SPACE})
    scheme = {"replacement": _SPACE, "prepend_scheme": "always" if space_prefix else "never"}
    split = not _inside_space(token for token, _ in vocab)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Metaspace", **scheme, "split": split},
        "decoder": {"type": "Metaspace", **scheme, "split": split},
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "byte_fallback": False,
            "vocab": [list(pair) for pair in vocab],
        },
    }


def model_of(
    pieces: Iterable[tuple[str, float, int]],
    special: Mapping[str, int],
    *,
    unigram: bool,
    charsmap: bytes,
    space_prefix: bool,
    merge_spaces: bool,
) -> bytes:
    """Return a tokenizer.model: what `keys_of_model` reads.

    Args:
        pieces: spelling, score and type of each token.
        special: ids of special tokens by GGUF's word.
        unigram: whether it is a Unigram model, not BPE.
        charsmap: the character map; empty where there is none.
        space_prefix: whether a space is put before each text.
        merge_spaces: whether several spaces become one.
    """
    model = proto.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text.replace(" ", _SPACE) if kind == USER_DEFINED else text, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = _UNIGRAM if unigram else _BPE, len(model.pieces)
    trainer.byte_fallback = not unigram
    for name, field in (("unknown", "unk_id"), ("bos", "bos_id"), ("eos", "eos_id"), ("padding", "pad_id")):
        setattr(trainer, field, special.get(name, -1))
    normalizer.name = "nmt_nfkc" if charsmap else "identity"
    normalizer.precompiled_charsmap = charsmap
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = space_prefix, merge_spaces
    normalizer.escape_whitespaces = True
    written: bytes = model.SerializeToString()
    return written


def _keys(
    unigram: bool,
    *,
    tokens: list[Any],
    scores: list[float],
    types: list[int],
    space_prefix: bool,
    charsmap: bytes = b"",
    merge_spaces: bool = False,
) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "t5" if unigram else "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(space_prefix),
    }
    if unigram:
        keys["tokenizer.ggml.remove_extra_whitespaces"] = bool(merge_spaces)
        keys["tokenizer.ggml.unknown_token_id"] = types.index(UNKNOWN)
        if charsmap:
            keys["tokenizer.ggml.precompiled_charsmap"] = charsmap
    return keys


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the parts of a Sequence, or a single step as a list of one."""
    if step is None:
        return []
    return list(step[name]) if step.get("type") == "Sequence" else [step]


def _refuse(path: str, problems: dict[str, Any]) -> None:
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedError(f"{path}: llama.cpp has no equivalent for {'; '.join(found)}", ANOTHER_PROGRAM)


def _shown(part: Any) -> str:
    return json.dumps(part, ensure_ascii=False)[:300]
