"""Tokenizers: what a Hugging Face folder says -> the `tokenizer.*` keys of a GGUF file.

The files decide by their structure: byte-level BPE, SentencePiece BPE or Unigram. Begin and end tokens are read off the
behaviour of the opened tokenizer. What llama.cpp would do otherwise is an error; `check` proves the rest by tokenizing
the same texts with both.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint import Checkpoint, read_json
from pi_gguf.errors import CheckpointError, UnsupportedError
from pi_gguf.pre_tokenizers import recognize_pre_tokenizer
from pi_gguf.progress import say
from pi_gguf.sentencepieces import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    check_space_prefix,
    keys_of_bpe_json,
    keys_of_model,
    keys_of_unigram_json,
    open_sentencepiece,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST_SCORE = -1000.0
"""Of tokens that are never to be chosen."""

_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip
"""Tokens at which llama.cpp ends a text because of their spelling."""

_FILL_IN_THE_MIDDLE = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> ▁<PRE> <｜fim▁begin｜> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> ▁<SUF> <｜fim▁hole｜> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <MID> ▁<MID> <｜fim▁end｜> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad>",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <reponame>",
    "fim_sep": "<|file_sep|>",
}
"""Keys -> spellings of the tokens around a gap to fill."""

_KEEPS_SPACE_RIGHT = ("<unk>", "<s>", "<|endoftext|>")
"""The only special tokens of a file named phi-3 behind which llama.cpp keeps spaces."""


def gguf_vocabulary(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata.

    Raises:
        CheckpointError: tokenizer files are missing or do not fit the embedding.
        UnsupportedError: a kind of tokenizer, or a part of it, that llama.cpp has no equivalent for.
    """
    json_path, model_path = checkpoint.tokenizer_dir / "tokenizer.json", checkpoint.tokenizer_dir / "tokenizer.model"
    parsed = read_json(json_path) if json_path.exists() else {}
    rows, path = checkpoint.vocab_size, str(json_path)
    model = parsed.get("model") or {}
    kind = model.get("type")
    if parsed and "ByteLevel" in str(parsed.get("pre_tokenizer")):
        keys = _byte_level_bpe(parsed, rows, path)
    elif kind == "Unigram":
        keys = keys_of_unigram_json(parsed, rows, path)
    elif parsed and (kind != "BPE" or not model.get("byte_fallback")):
        raise UnsupportedError(
            f"{path}: model must be Unigram, byte-level BPE or BPE with byte_fallback, got {kind!r}",
            "put the original tokenizer.model alone into the folder",
        )
    elif model_path.exists():
        keys = keys_of_model(str(model_path))
        if parsed:
            keys["tokenizer.ggml.add_space_prefix"] = check_space_prefix(parsed, path)
    elif parsed:
        keys = keys_of_bpe_json(parsed, _tokens_by_id(model, rows, path), path)
    else:
        raise CheckpointError(
            f"{checkpoint.tokenizer_dir}: no tokenizer.json or tokenizer.model", "copy the tokenizer of the model there"
        )
    _check_added_tokens(parsed, tokenizer, path)
    _add_tokens(keys, tokenizer)
    _pad_to_embedding(keys, checkpoint)
    _special_tokens(keys, checkpoint, tokenizer)
    keys |= _chat_templates(tokenizer, str(checkpoint.tokenizer_dir))
    if not parsed:
        keys["tokenizer.ggml.add_bos_token"] = _begins(checkpoint, tokenizer)
    return keys


def reference_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids that a text must have: Hugging Face's, or SentencePiece's own where there is only its model.

    transformers 5 opens a bare `tokenizer.model` with a splitter that drops the leading space of a text that begins
    with one (or follows a special token); the model was trained with SentencePiece, which keeps it, as llama.cpp does.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    model_path = checkpoint.tokenizer_dir / "tokenizer.model"
    if (checkpoint.tokenizer_dir / "tokenizer.json").exists() or not model_path.exists():
        return ids
    begin = [tokenizer.bos_token_id] if _begins(checkpoint, tokenizer) else []
    end = [] if tokenizer.eos_token_id is None or ids[-1:] != [tokenizer.eos_token_id] else ids[-1:]
    pieces: list[int] = open_sentencepiece(str(model_path)).encode(text)
    return begin + pieces + end


def _begins(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether texts get a begin token where a folder has only `tokenizer.model`.

    Without settings they do, as these models were trained; transformers 5 leaves it out for some families.
    """
    if tokenizer.bos_token_id is None:
        return False
    if not (checkpoint.tokenizer_dir / "tokenizer_config.json").exists():
        return True
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id]


def end_tokens(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids at which generation ends in Hugging Face, the tokenizer's end token first."""
    path = checkpoint.path / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    named = settings.get("eos_token_id") or getattr(checkpoint.hf_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(int(i) for i in ids if isinstance(i, int) and 0 <= i < checkpoint.vocab_size))


def check_name(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a `general.name` by which llama.cpp would treat the spaces behind special tokens otherwise.

    Raises:
        UnsupportedError: llama.cpp drops them in files that have phi-3 in their name, and only there.
    """
    added = tokenizer.added_tokens_decoder.values()
    drops = any(word in name.lower() for word in ("phi-3", "phi3"))
    said = "llama.cpp drops the spaces behind special tokens in a file with phi-3 in its name"
    if drops and not _drops_space_right(tokenizer):
        raise UnsupportedError(
            f"{name}: {said}, and this tokenizer does not", "rename the folder, without phi-3 or phi3 in its name"
        )
    if not drops and (token := next((added.content for added in added if added.rstrip), None)):
        raise UnsupportedError(
            f"{name}: added token {token!r}: rstrip: {said} only", "rename the folder, with phi-3 in its name"
        )


def _drops_space_right(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether exactly those tokens have rstrip that llama.cpp gives it in Phi 3."""
    added = {added.content: added.rstrip for added in tokenizer.added_tokens_decoder.values()}
    needed = all(token in added for token in ("</s>", *_KEEPS_SPACE_RIGHT))
    return needed and all(rstrip == (token not in _KEEPS_SPACE_RIGHT) for token, rstrip in added.items())


def _byte_level_bpe(parsed: dict[str, Any], rows: int, path: str) -> dict[str, Any]:
    model = parsed.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{path}: model.type must be BPE with ByteLevel, got {model.get('type')!r}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise UnsupportedError(f"{path}: model.{field} must be empty with ByteLevel, got {model[field]!r}")
    normalizer = parsed.get("normalizer")
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if any(part.get("type") != "NFC" for part in parts):
        raise UnsupportedError(
            f"{path}: normalizer must be null or NFC, llama.cpp normalizes nothing here; got "
            f"{json.dumps(normalizer, ensure_ascii=False)[:300]}"
        )
    if parts:
        say(
            "note: this tokenizer composes accents (normalizer NFC) and llama.cpp does not: text in decomposed form "
            "gets other ids there, as macOS file names do"
        )
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


def _check_added_tokens(parsed: dict[str, Any], tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse added tokens that llama.cpp would find in other places than Hugging Face."""
    if not parsed:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    problems = []
    for added in tokenizer.added_tokens_decoder.values():
        flags = {
            "single_word": added.single_word,
            "lstrip": added.lstrip,
            "rstrip": added.rstrip and not _drops_space_right(tokenizer),
            f"normalized to {added.normalized and normalizer and normalizer.normalize_str(added.content)!r}": (
                added.normalized and normalizer and normalizer.normalize_str(added.content) != added.content
            ),
        }
        problems += [f"{added.content!r} is {flag}" for flag, present in flags.items() if present]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UnsupportedError(
            f"{path}: added tokens: llama.cpp finds them exactly as they are spelled: {', '.join(problems[:5])}{more}",
            "set the flag to false if the model does not depend on it",
        )


def _add_tokens(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Enter the added tokens: special ones as control tokens, others as words never split."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = keys.get("tokenizer.ggml.scores")
    for index, added in sorted(tokenizer.added_tokens_decoder.items()):
        while len(tokens) <= index:
            tokens.append(None)
            types.append(UNUSED)
            if scores is not None:
                scores.append(_LOWEST_SCORE)
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
        keys["tokenizer.ggml.scores"] += [_LOWEST_SCORE] * missing
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token is not None and (before := seen.setdefault(token, index)) != index:
            raise CheckpointError(
                f"{checkpoint.path}: the tokens {before} and {index} are both {token!r}",
                "llama.cpp needs a spelling of its own for each",
            )
    for index, token in enumerate(tokens):
        if token is None:
            padding = f"[PAD{index}]"
            while padding in seen:
                padding = f"[{padding}]"
            tokens[index], types[index] = padding, UNUSED


def _special_tokens(keys: dict[str, Any], checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, behind = whole[:start], whole[start + len(bare) :]
    ends = end_tokens(checkpoint, tokenizer)
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = before[0] if before else getattr(checkpoint.hf_config, "bos_token_id", None)
    eos = ends[0] if ends else None
    if before not in ([], [bos]) or behind not in ([], [eos]):
        put = [tokenizer.convert_ids_to_tokens(ids) for ids in (before, behind)]
        raise UnsupportedError(
            f"{checkpoint.path}: {put[0]} come before a text and {put[1]} behind it; llama.cpp can put the begin token "
            f"{bos} before it and the end token {eos} behind it"
        )
    kind, tokens = keys["tokenizer.ggml.model"], keys["tokenizer.ggml.tokens"]
    plain = {token for token, type in zip(tokens, keys["tokenizer.ggml.token_type"], strict=True) if type == NORMAL}
    if taken := sorted(plain & _ENDS):
        raise UnsupportedError(
            f"{checkpoint.path}: {taken} are plain tokens, llama.cpp takes them for special ones by their spelling",
            "name them in added_tokens of tokenizer.json if they are meant to be special",
        )
    if eos is None and kind != "llama":
        raise CheckpointError(
            f"{checkpoint.path}: no end token; llama.cpp would take the token {11 if kind == 'gpt2' else 1} for one",
            "name eos_token in tokenizer_config.json or eos_token_id in config.json",
        )
    named = {"bos": bos, "eos": eos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    named |= {"seperator": getattr(tokenizer, "sep_token_id", None), "mask": getattr(tokenizer, "mask_token_id", None)}
    unnamed = [i for i in ends if i != eos and tokens[i] not in _ENDS]
    if len(unnamed) > 2:
        raise UnsupportedError(
            f"{checkpoint.path}: eos_token_id: llama.cpp can end at two tokens more than {tokens[eos]!r}, "
            f"got {[tokens[i] for i in unnamed]}"
        )
    named |= dict(zip(("eot", "eom"), unnamed, strict=False))
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    for name, spellings in _FILL_IN_THE_MIDDLE.items():
        named[name] = next((added[token] for token in spellings.split() if token in added), None)
    for name, index in named.items():
        if index is not None and 0 <= int(index) < len(tokens):
            keys[f"tokenizer.ggml.{name}_token_id"] = int(index)
    keys["tokenizer.ggml.add_bos_token"] = bool(before)
    keys["tokenizer.ggml.add_eos_token"] = bool(behind)


def _chat_templates(tokenizer: PreTrainedTokenizerBase, path: str) -> dict[str, Any]:
    """Return the chat templates: the default one, and others by name. They are compiled, not run."""
    from jinja2 import Environment, TemplateError

    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    for name, template in templates.items():
        try:
            environment.compile(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))  # a tag of transformers alone
        except TemplateError as error:
            raise CheckpointError(
                f"{path}: chat_template {name!r} is broken ({str(error).splitlines()[0]})", "correct or remove it"
            ) from error
    keys: dict[str, Any] = {}
    others = sorted(name for name in templates if name != "default")
    for name in others:
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise UnsupportedError(
                f"{path}: chat_template {name!r}: a name in GGUF is made of a-z, 0-9 and _", "rename it"
            )
        keys[f"tokenizer.chat_template.{name}"] = templates[name]
    if others:
        keys["tokenizer.chat_templates"] = others
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates["default"]
    return keys
