"""Tokenizers: what a Hugging Face folder says -> the `tokenizer.*` keys of a GGUF file.

The files decide by their structure, SentencePiece or byte-level BPE; flags (begin and end tokens, leading space) are
read off the behaviour of the opened tokenizer. `check` proves the result by tokenizing the same texts with both.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint import Checkpoint, read_json
from pi_gguf.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF, the same numbers as SentencePiece's."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# Steps of a tokenizer.json pre-tokenizer, and whether merges are skipped for words in the vocabulary -> llama.cpp's
# name for the same splitting. ("words" is ByteLevel's own GPT-2 pattern, "digits" splits single digits off.)
_PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
}


def gguf_vocabulary(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata.

    Raises:
        CheckpointError: tokenizer files are missing or do not fit the embedding.
        UnsupportedError: a kind of tokenizer, or a pre-tokenizer, that llama.cpp has no equivalent for.
    """
    json_path, model_path = checkpoint.path / "tokenizer.json", checkpoint.path / "tokenizer.model"
    parsed = read_json(json_path) if json_path.exists() else {}
    rows = checkpoint.vocab_size
    byte_level = parsed and "ByteLevel" in str(parsed.get("pre_tokenizer"))
    if byte_level:
        keys = _byte_level_bpe(parsed, rows, str(json_path))
    elif model_path.exists():
        keys = _sentencepiece(str(model_path))
    elif parsed:
        keys = _sentencepiece_from_json(parsed, rows, str(json_path))
    else:
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer.json or tokenizer.model", "copy the tokenizer of the model there"
        )
    _add_tokens(keys, tokenizer)
    _pad_to_embedding(keys, checkpoint)
    _special_tokens(keys, tokenizer)
    if keys["tokenizer.ggml.model"] == "llama":
        if parsed:
            first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
        else:
            first = _open_sentencepiece(str(model_path)).encode("a", out_type=str)[0]
            keys["tokenizer.ggml.add_bos_token"] = _begins(checkpoint, tokenizer)
        keys["tokenizer.ggml.add_space_prefix"] = first.startswith("▁")
    return keys


def reference_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids that a text must have: Hugging Face's, or SentencePiece's own where there is only its model.

    transformers 5 opens a bare `tokenizer.model` with a splitter that drops the leading space of a text that begins
    with one (or follows a special token); the model was trained with SentencePiece, which keeps it, as llama.cpp does.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    model_path = checkpoint.path / "tokenizer.model"
    if (checkpoint.path / "tokenizer.json").exists() or not model_path.exists():
        return ids
    begin = [tokenizer.bos_token_id] if _begins(checkpoint, tokenizer) else []
    end = [] if tokenizer.eos_token_id is None or ids[-1:] != [tokenizer.eos_token_id] else ids[-1:]
    pieces: list[int] = _open_sentencepiece(str(model_path)).encode(text)
    return begin + pieces + end


def _begins(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether texts get a begin token where a folder has only `tokenizer.model`.

    Without settings they do, as these models were trained; transformers 5 leaves it out for some families.
    """
    if tokenizer.bos_token_id is None:
        return False
    if not (checkpoint.path / "tokenizer_config.json").exists():
        return True
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id]


def _byte_level_bpe(parsed: dict[str, Any], rows: int, path: str) -> dict[str, Any]:
    model = parsed.get("model", {})
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{path}: model.type must be BPE with ByteLevel, got {model.get('type')!r}")
    normalizer = parsed.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UnsupportedError(f"{path}: normalizer must be null or NFC, got {normalizer.get('type')!r}")
    tokens = _tokens_by_id(model, rows, path)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": recognize_pre_tokenizer(parsed, path),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        "tokenizer.ggml.merges": merges,
    }


def _tokens_by_id(model: dict[str, Any], rows: int, path: str) -> list[str | None]:
    """Return the vocabulary of a tokenizer.json in the order of its ids; None where an id is not used."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise CheckpointError(f"{path}: model.vocab must map tokens to ids", "copy the file again")
    if max(vocab.values()) >= rows:
        raise CheckpointError(
            f"{path}: the tokenizer has {max(vocab.values()) + 1} tokens, config.json's vocab_size is {rows}",
            "tokenizer and weights are of different models",
        )
    tokens: list[str | None] = [None] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        tokens[index] = token
    return tokens


def recognize_pre_tokenizer(parsed: dict[str, Any], path: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json, by its structure.

    Raises:
        UnsupportedError: none does the same; the message shows the pattern.
    """
    pre = parsed["pre_tokenizer"]
    steps: list[str] = []
    for step in pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]:
        pattern = step.get("pattern") or {}
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            steps += ["words"] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            steps.append("digits")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(str(pattern.get("Regex") or pattern.get("String")))
        else:
            steps.append(str(step))
    skip_merges = bool(parsed["model"].get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((tuple(steps), skip_merges))
    if name is None:
        raise UnsupportedError(
            f"{path}: pre_tokenizer: llama.cpp has no equivalent known here for {steps} (ignore_merges {skip_merges})",
            "report this pattern, so that it can be added",
        )
    return name


@cache
def _open_sentencepiece(path: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model", "download this file again") from error


def _sentencepiece(path: str) -> dict[str, Any]:
    sp = _open_sentencepiece(path)
    tokens = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    types: list[int] = []
    for i in range(sp.vocab_size()):
        kinds = ((sp.is_unknown, UNKNOWN), (sp.is_control, CONTROL), (sp.is_byte, BYTE), (sp.is_unused, UNUSED))
        types.append(next((kind for test, kind in kinds if test(i)), NORMAL))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(sp.vocab_size())],
        "tokenizer.ggml.token_type": types,
    }


def _sentencepiece_from_json(parsed: dict[str, Any], rows: int, path: str) -> dict[str, Any]:
    """Read a SentencePiece BPE that transformers saved as tokenizer.json: merges with byte fallback."""
    model = parsed.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UnsupportedError(
            f"{path}: model must be byte-level BPE or BPE with byte_fallback, got {model.get('type')!r}",
            "put the original tokenizer.model into the folder",
        )
    tokens = _tokens_by_id(model, rows, path)
    # SentencePiece joins the pair whose result scores highest; a merge list joins the pair that comes first.
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    types = [BYTE if token and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    if model.get("unk_token") in tokens:
        types[tokens.index(model["unk_token"])] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token or "", len(rank))) for token in tokens],
        "tokenizer.ggml.token_type": types,
    }


def _add_tokens(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Enter the added tokens: special ones as control tokens, others as words never split."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = keys.get("tokenizer.ggml.scores")
    for index, added in sorted(tokenizer.added_tokens_decoder.items()):
        while len(tokens) <= index:
            tokens.append(None)
            types.append(UNUSED)
            if scores is not None:
                scores.append(-1000.0)
        tokens[index] = added.content
        if types[index] != UNKNOWN:
            types[index] = CONTROL if added.special else USER_DEFINED


def _pad_to_embedding(keys: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Fill holes, and rows of the embedding beyond the vocabulary, with unused tokens."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    rows = checkpoint.vocab_size
    if len(tokens) > rows:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {len(tokens)} tokens, config.json's vocab_size is {rows}",
            "tokenizer and weights are of different models",
        )
    missing = rows - len(tokens)
    tokens += [None] * missing
    types += [UNUSED] * missing
    if "tokenizer.ggml.scores" in keys:
        keys["tokenizer.ggml.scores"] += [-1000.0] * missing
    for index, token in enumerate(tokens):
        if token is None:
            tokens[index], types[index] = f"[PAD{index}]", UNUSED


def _special_tokens(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, index in named.items():
        if index is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = int(index)
    ids = tokenizer("a")["input_ids"]
    keys["tokenizer.ggml.add_bos_token"] = named["bos"] is not None and ids[:1] == [named["bos"]]
    keys["tokenizer.ggml.add_eos_token"] = named["eos"] is not None and ids[-1:] == [named["eos"]]
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
