"""SentencePiece vocabularies: tokenizer.model, or a tokenizer.json of the same kind -> `tokenizer.ggml.*` keys.

Two kinds: BPE is llama.cpp's "llama", Unigram its "t5". What llama.cpp does not do to a text before it looks for tokens
is an error that shows the part. Only tokens, scores, types and the treatment of white space are made here.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pi_gguf.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF, the same numbers as SentencePiece's."""

_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"
_REPLACED_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


@cache
def open_sentencepiece(path: str) -> Any:
    """Return SentencePiece's own tokenizer.

    Raises:
        CheckpointError: the file is no SentencePiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model", "download this file again") from error


def keys_of_model(path: str) -> dict[str, Any]:
    """Return the keys of a tokenizer.model.

    Raises:
        CheckpointError: the file is no SentencePiece model.
        UnsupportedError: it does something to texts that llama.cpp does not; the message shows it.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    open_sentencepiece(path)
    model = proto.ModelProto()
    model.ParseFromString(Path(path).read_bytes())
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
        **_white_space_problems(unigram, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces),
        f"the user-defined piece {next((p.piece for p in model.pieces if p.type == USER_DEFINED), '')!r} with "
        "add_dummy_prefix (llama.cpp puts the space behind it again)": USER_DEFINED in types
        and normalizer.add_dummy_prefix,
    }
    _refuse(path, problems)
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
    space_prefix = check_space_prefix(parsed, path)
    # SentencePiece joins the pair whose result scores highest; a merge list joins the pair that comes first.
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    types = [BYTE if token and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    if model.get("unk_token") in tokens:
        types[tokens.index(model["unk_token"])] = UNKNOWN
    scores = [-float(rank.get(token or "", len(rank))) for token in tokens]
    return _keys(False, tokens=tokens, scores=scores, types=types, space_prefix=space_prefix)


def check_space_prefix(parsed: dict[str, Any], path: str) -> bool:
    """Tell whether a SentencePiece BPE tokenizer.json puts a space before each text, as llama.cpp can.

    Raises:
        UnsupportedError: normalizer and pre_tokenizer do something else; the message shows them.
    """
    normalizer, pre = parsed.get("normalizer"), parsed.get("pre_tokenizer")
    parts = _parts(normalizer, "normalizers")
    metaspace = pre if isinstance(pre, dict) and pre.get("type") == "Metaspace" else None
    if parts == [{"type": "Prepend", "prepend": _SPACE}, _REPLACED_SPACES] and pre is None:
        return True
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if parts == [_REPLACED_SPACES] and pre in (None, cut):  # no space is left that could be cut at
        return False
    if not parts and metaspace and metaspace.get("replacement") == _SPACE and not metaspace.get("split", True):
        scheme = metaspace.get("prepend_scheme", "always")
        if scheme == "never":
            return False
        raise UnsupportedError(
            f"{path}: pre_tokenizer.prepend_scheme {scheme!r}: llama.cpp puts a space before each text and behind each "
            f"special token, even before another space, or nowhere ({json.dumps(pre, ensure_ascii=False)})"
        )
    raise UnsupportedError(
        f"{path}: llama.cpp has no equivalent known here for normalizer {json.dumps(normalizer, ensure_ascii=False)} "
        f"with pre_tokenizer {json.dumps(pre, ensure_ascii=False)}"
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
            "tokenizer and weights are of different models",
        )
    if not isinstance(unk, int):
        raise UnsupportedError(f"{path}: model.unk_id must be a token, got {unk}")
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
    pre = parsed.get("pre_tokenizer") or {}
    scheme = pre.get("prepend_scheme", "always") if pre.get("type") == "Metaspace" else None
    inside = next((token for token in tokens if _SPACE in token[1:].lstrip(_SPACE)), "")
    problems = {
        "model.byte_fallback (llama.cpp gives the unknown token)": model.get("byte_fallback"),
        f"normalizer {json.dumps(parts, ensure_ascii=False)[:300]}": parts and not (merge_spaces and charsmap),
        f"pre_tokenizer {json.dumps(pre, ensure_ascii=False)}": scheme is None or pre.get("replacement") != _SPACE,
        "pre_tokenizer.prepend_scheme 'first' (llama.cpp puts a space before each text and behind each special "
        "token, or nowhere)": scheme == "first",
        f"the token {inside!r} with a space inside, and pre_tokenizer.split": inside and pre.get("split", True),
        "normalizer Precompiled with white space that is not merged (Hugging Face makes one space of a line end of "
        "two characters)": charsmap and not merge_spaces,
        **_white_space_problems(True, scheme == "always", merge_spaces),
    }
    _refuse(path, problems)
    types = [NORMAL] * len(tokens)
    types[unk] = UNKNOWN
    return _keys(
        True, tokens=tokens, scores=[float(score) for _, score in vocab], types=types,
        space_prefix=scheme == "always", charsmap=charsmap, merge_spaces=merge_spaces,
    )  # fmt: skip


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


def _white_space_problems(unigram: bool, space_prefix: bool, merge_spaces: bool) -> dict[str, bool]:
    """Return what llama.cpp's Unigram does otherwise: merging spaces always puts one first, a prefix needs a word."""
    return {
        "white space is merged, with no space before a text (llama.cpp puts one)": unigram
        and merge_spaces
        and not space_prefix,
        "a space before each text, and white space is not merged (llama.cpp puts none before a text of spaces "
        "only)": unigram and space_prefix and not merge_spaces,
    }


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the parts of a Sequence, or a single step as a list of one."""
    if step is None:
        return []
    return list(step[name]) if step.get("type") == "Sequence" else [step]


def _refuse(path: str, problems: dict[str, Any]) -> None:
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedError(f"{path}: llama.cpp has no equivalent for {'; '.join(found)}")
