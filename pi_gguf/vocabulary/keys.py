"""Tokenizers: what a Hugging Face folder says -> the `tokenizer.*` keys of a GGUF file.

The files decide by their structure: byte-level BPE, SentencePiece BPE or Unigram. Begin and end tokens are read off the
behaviour of the opened tokenizer. What llama.cpp would do otherwise is an error; `check` proves the rest by tokenizing
the same texts with both.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.config import read_json
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckpointError, UnsupportedError
from pi_gguf.vocabulary.byte_level import recognize_pre_tokenizer
from pi_gguf.vocabulary.sentencepiece import (
    ANOTHER_PROGRAM,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    keys_of_bpe_json,
    keys_of_model,
    keys_of_unigram_json,
    open_sentencepiece,
)
from pi_gguf.vocabulary.templates import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST_SCORE = -1000.0
"""Of tokens that are never to be chosen."""

_OTHER_MODEL = "tokenizer and weights are of different models: copy the tokenizer of this one there"

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

PHI3_TOKENS = ("</s>", *_KEEPS_SPACE_RIGHT)
"""Those without which llama.cpp ends at a file of this name."""


def gguf_vocabulary(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata.

    Args:
        checkpoint: the model.
        tokenizer: its tokenizer, opened.

    Raises:
        CheckpointError: tokenizer files are missing or do not fit the embedding.
        UnsupportedError: a kind of tokenizer, or a part of it, that llama.cpp has no equivalent for.
    """
    json_path, model_path = checkpoint.tokenizer_dir / "tokenizer.json", checkpoint.tokenizer_dir / "tokenizer.model"
    if not any((checkpoint.tokenizer_dir / name).exists() for name in (json_path.name, model_path.name, "vocab.json")):
        raise CheckpointError(
            f"{checkpoint.tokenizer_dir}: no tokenizer.json or tokenizer.model", "copy the tokenizer of the model there"
        )
    # As it was opened: the library has filled in defaults and spelled out older forms.
    parsed = {} if checkpoint.bare_sentencepiece else json.loads(tokenizer.backend_tokenizer.to_str())
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
            "put the original tokenizer.model alone into the folder, if there is one; else run it with transformers",
        )
    elif parsed:
        keys = keys_of_bpe_json(parsed, _tokens_by_id(model, rows, path), path)
    else:
        keys = keys_of_model(str(model_path))
    _add_tokens(keys, tokenizer, checkpoint)
    _pad_to_embedding(keys, checkpoint)
    _special_tokens(keys, checkpoint, tokenizer)
    return keys | _chat_templates(tokenizer, str(checkpoint.tokenizer_dir))


@dataclass(frozen=True)
class Surroundings:
    """Tokens that Hugging Face puts before and behind each text, and what llama.cpp can do of it.

    Args:
        bos: the begin token.
        eos: the end token.
        before: tokens before a text.
        behind: tokens behind it.
        add_bos: whether llama.cpp puts the begin token before a text.
        add_eos: whether it puts the end token behind it.
    """

    bos: int | None
    eos: int | None
    before: list[int]
    behind: list[int]
    add_bos: bool
    add_eos: bool

    @property
    def exact(self) -> bool:
        return self.before == [self.bos] * self.add_bos and self.behind == [self.eos] * self.add_eos

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Surroundings:
        """Read them off the behaviour of an opened tokenizer."""
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        before, behind = whole[:start], whole[start + len(bare) :]
        bos = tokenizer.bos_token_id
        if checkpoint.bare_sentencepiece:
            before = [bos] if _begins(checkpoint, tokenizer) else []
        if bos is None:
            bos = before[0] if before else getattr(checkpoint.hf_config, "bos_token_id", None)
        elif len(before) == 1 and "bos_token" not in str(tokenizer.chat_template):
            bos = before[0]  # nobody asks for the other one
        ends = end_tokens(checkpoint, tokenizer)
        eos = behind[0] if len(behind) == 1 and behind[0] in ends else next(iter(ends), None)
        return cls(bos, eos, before, behind, before == [bos], behind == [eos])

    def note(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Say what llama.cpp does otherwise."""
        said, template = [], str(tokenizer.chat_template)
        if self.before != [self.bos] * self.add_bos:
            tokens = tokenizer.convert_ids_to_tokens(self.before)
            written = all(t in template or (t == tokenizer.bos_token and "bos_token" in template) for t in tokens)
            who = "the chat template writes them" if written else "write them yourself"
            said.append(f"{''.join(tokens)} before each text, add_bos_token is false: {who} before a prompt")
        if self.behind != [self.eos] * self.add_eos:
            tokens = "".join(tokenizer.convert_ids_to_tokens(self.behind))
            said.append(f"{tokens} behind each text, add_eos_token is false: a prompt that goes on has none")
        return f"note: llama.cpp cannot put what Hugging Face does, {'; '.join(said)}"


def reference_ids(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, text: str, surroundings: Surroundings | None = None
) -> list[int]:
    """Return the ids that a text must have: Hugging Face's, or SentencePiece's own where there is only its model.

    transformers 5 opens a bare `tokenizer.model` with a splitter that drops the leading space of a text that begins
    with one (or follows a special token); the model was trained with SentencePiece, which keeps it, as llama.cpp does.

    Args:
        checkpoint: the model.
        tokenizer: its tokenizer, opened.
        text: to tokenize.
        surroundings: with those that llama.cpp can put around a text; as in Hugging Face when None.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if surroundings is not None and not surroundings.exact:
        ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        begin = [surroundings.bos] if surroundings.add_bos and surroundings.bos is not None else []
        ids = begin + ids + ([surroundings.eos] if surroundings.add_eos and surroundings.eos is not None else [])
    if not checkpoint.bare_sentencepiece:
        return ids
    begin = [tokenizer.bos_token_id] if _begins(checkpoint, tokenizer) else []
    end = [] if tokenizer.eos_token_id is None or ids[-1:] != [tokenizer.eos_token_id] else ids[-1:]
    pieces: list[int] = open_sentencepiece(str(checkpoint.tokenizer_dir / "tokenizer.model")).encode(text)
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
    """Return the ids at which generation ends in Hugging Face, the tokenizer's end token first.

    Raises:
        CheckpointError: eos_token_id is neither an id nor a list of them.
    """
    path = checkpoint.path / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    if named is None or named == []:
        path, named = checkpoint.path / "config.json", getattr(checkpoint.hf_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    if any(isinstance(i, bool) or not isinstance(i, int | None) for i in listed):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token's id or a list of ids, got {str(named)[:80]}", "correct it"
        )
    found = dict.fromkeys([tokenizer.eos_token_id, *listed])
    return [i for i in found if i is not None and 0 <= i < checkpoint.vocab_size]


def file_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `general.name` such that llama.cpp treats the spaces behind special tokens as this tokenizer does.

    In a file with phi-3 or phi3 in its name, and there only, it drops those behind all special tokens but three, and
    does not open a file without these tokens. Where either is wrong for some token, the name by which fewer are holds.
    """
    added = {added.content: bool(added.rstrip) for added in tokenizer.added_tokens_decoder.values()}
    opens = set(PHI3_TOKENS) <= tokenizer.get_vocab().keys()
    right = sum(rstrip == (token not in _KEEPS_SPACE_RIGHT) for token, rstrip in added.items())
    named = re.search("phi-?3", name, re.IGNORECASE) is not None
    if opens and 2 * right > len(added):
        return name if named else f"{name} (tokens of phi-3)"
    return re.sub("(phi)-?3", r"\1_3", name, flags=re.IGNORECASE)


def _byte_level_bpe(parsed: dict[str, Any], rows: int, path: str) -> dict[str, Any]:
    model = parsed.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"{path}: model.type must be BPE with ByteLevel, got {model.get('type')!r}", ANOTHER_PROGRAM
        )
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise UnsupportedError(
                f"{path}: model.{field} must be empty with ByteLevel, got {model[field]!r}", ANOTHER_PROGRAM
            )
    normalizer = parsed.get("normalizer")
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if any(part.get("type") != "NFC" for part in parts):
        raise UnsupportedError(
            f"{path}: normalizer must be null or NFC, llama.cpp normalizes nothing here; got "
            f"{json.dumps(normalizer, ensure_ascii=False)[:300]}",
            ANOTHER_PROGRAM,
        )
    if parts:
        say(
            "note: this tokenizer composes accents (normalizer NFC) and llama.cpp does not: text in decomposed form "
            "gets other ids there, as macOS file names do"
        )
    tokens = _tokens_by_id(model, rows, path)
    merges = [" ".join(merge) for merge in model["merges"]]
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
            _OTHER_MODEL,
        )
    tokens: list[str | None] = [None] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if (other := tokens[index]) is not None:
            raise CheckpointError(
                f"{path}: model.vocab: {other!r} and {token!r} both have the id {index}", "give one of them another id"
            )
        tokens[index] = token
    return tokens


def _add_tokens(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> None:
    """Enter the added tokens: special ones as control tokens, others as words never split."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    _fill(keys, max(tokenizer.added_tokens_decoder, default=-1) + 1, checkpoint)
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index] = added.content
        if types[index] != UNKNOWN:
            types[index] = CONTROL if added.special else USER_DEFINED


def _fill(keys: dict[str, Any], length: int, checkpoint: Checkpoint) -> None:
    """Fill a vocabulary up to `length` with unused tokens.

    Raises:
        CheckpointError: it is, or would be, larger than the embedding.
    """
    tokens = keys["tokenizer.ggml.tokens"]
    if (longest := max(length, len(tokens))) > checkpoint.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {longest} tokens, config.json's vocab_size is "
            f"{checkpoint.vocab_size}",
            _OTHER_MODEL,
        )
    missing = length - len(tokens)
    tokens += [None] * missing
    keys["tokenizer.ggml.token_type"] += [UNUSED] * missing
    if "tokenizer.ggml.scores" in keys:
        keys["tokenizer.ggml.scores"] += [_LOWEST_SCORE] * missing


def _pad_to_embedding(keys: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Fill holes, and rows of the embedding beyond the vocabulary, with unused tokens; so tokens none can spell."""
    _fill(keys, checkpoint.vocab_size, checkpoint)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    for index, token in enumerate(tokens):
        if token is not None and (not token or "\0" in token):
            say(
                f"note: the token {index}, {token!r}, is left unused: llama.cpp reads a token up to its first zero byte"
            )
            tokens[index] = None
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token is not None and (before := seen.setdefault(token, index)) != index:
            raise CheckpointError(
                f"{checkpoint.path}: the tokens {before} and {index} are both {token!r}",
                "llama.cpp needs a spelling of its own for each: rename one of them in tokenizer.json",
            )
    for index, token in enumerate(tokens):
        if token is None:
            padding = f"[PAD{index}]"
            while padding in seen:
                padding = f"[{padding}]"
            tokens[index], types[index] = padding, UNUSED


def _special_tokens(keys: dict[str, Any], checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    around = Surroundings.of(checkpoint, tokenizer)
    if not around.exact:
        say(around.note(tokenizer))
    ends, eos = end_tokens(checkpoint, tokenizer), around.eos
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
    named = {"bos": around.bos, "eos": eos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    named |= {"seperator": getattr(tokenizer, "sep_token_id", None), "mask": getattr(tokenizer, "mask_token_id", None)}
    unnamed = [i for i in ends if i != eos and tokens[i] not in _ENDS]
    if len(unnamed) > 2:
        raise UnsupportedError(
            f"{checkpoint.path}: eos_token_id: llama.cpp can end at two tokens more than {tokens[eos]!r}, "
            f"got {[tokens[i] for i in unnamed]}",
            "leave those that do not end an answer out of eos_token_id in generation_config.json",
        )
    named |= dict(zip(("eot", "eom"), unnamed, strict=False))
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    for name, spellings in _FILL_IN_THE_MIDDLE.items():
        named[name] = next((added[token] for token in spellings.split() if token in added), None)
    for name, index in named.items():
        if isinstance(index, int) and 0 <= index < len(tokens):
            keys[f"tokenizer.ggml.{name}_token_id"] = index
    keys["tokenizer.ggml.add_bos_token"] = around.add_bos
    keys["tokenizer.ggml.add_eos_token"] = around.add_eos


def _chat_templates(tokenizer: PreTrainedTokenizerBase, path: str) -> dict[str, Any]:
    """Return the chat templates: the default one, and others by name."""
    templates = tokenizer.chat_template or {}
    if not isinstance(templates, dict):
        templates = {"default": templates}
    for name, template in templates.items():
        check_template(template, f"{path}: chat_template {name!r}")
    keys: dict[str, Any] = {}
    others = sorted((name for name in templates if name != "default"), key=str)
    for name in others:
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
            raise UnsupportedError(
                f"{path}: chat_template {name!r}: a name in GGUF is made of a-z, 0-9 and _", "rename it in the folder"
            )
        keys[f"tokenizer.chat_template.{name}"] = templates[name]
    if others:
        keys["tokenizer.chat_templates"] = others
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates["default"]
    return keys
