"""The tokenizer of a GGUF file -> the files that Hugging Face opens, and their proof.

In: an opened file. Out: tokenizer.json, tokenizer_config.json, generation_config.json, chat templates, and for
SentencePiece vocabularies tokenizer.model. What kind a token is, and which tokens begin and end a text, llama.cpp is
asked; what it makes of the sample texts is what the new tokenizer must make of them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckpointError, GgufError, UnsupportedError, one_line
from pi_gguf.gguf.header import Entry
from pi_gguf.gguf.loadable import pieces_without_bytes
from pi_gguf.llamacpp.library import compute, last_error, llama_cpp_library, log
from pi_gguf.llamacpp.opening import open_llama
from pi_gguf.restore.opened import OpenedFile
from pi_gguf.vocabulary.byte_level import pre_tokenizer
from pi_gguf.vocabulary.probes import PROSE
from pi_gguf.vocabulary.sentencepiece import (
    NORMAL,
    UNKNOWN,
    UNUSED,
    bpe_json_of,
    model_of,
    open_sentencepiece,
    unigram_json_of,
)
from pi_gguf.vocabulary.templates import check_template
from pi_gguf.vocabulary.token_check import TokenizedTexts, said

_KEYS = "tokenizer.ggml."

_NAMES = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token",
    "mask": "mask_token",
}  # fmt: skip
"""Special tokens: GGUF's word -> the one of tokenizer_config.json."""

_ATTRIBUTES = (
    "NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE", "SINGLE_WORD", "LSTRIP", "RSTRIP",
)  # fmt: skip
"""llama.cpp's words for what a token is; the first six in the order of SentencePiece's numbers."""

_TEMPLATE = "tokenizer.chat_template"

_OWN = "take the model's own tokenizer from where the file was made"


@dataclass(frozen=True)
class Token:
    """A token as llama.cpp has it.

    Args:
        text: its spelling.
        score: of SentencePiece.
        attributes: llama.cpp's bits.
    """

    text: str
    score: float
    attributes: int


class Vocabulary:
    """The vocabulary of a file, opened in llama.cpp without its weights.

    Args:
        llama: llama_cpp's `Llama`.
        path: of the file, for messages.
        entries: keys of the file.
    """

    def __init__(self, llama: Any, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self._entries = path, entries
        self._library = llama_cpp_library()
        self._bits = {kind: getattr(self._library, f"LLAMA_TOKEN_ATTR_{kind}") for kind in _ATTRIBUTES}
        self._vocab = self._library.llama_model_get_vocab(llama.model)
        library, vocab = self._library, self._vocab
        self.tokens = []
        for i in range(library.llama_vocab_n_tokens(vocab)):
            try:
                text = library.llama_vocab_get_text(vocab, i).decode()
            except UnicodeDecodeError as error:
                raise UnsupportedError(f"{path}: token {i} is not UTF-8", _OWN) from error
            score = float(library.llama_vocab_get_score(vocab, i))
            self.tokens.append(Token(text, score, int(library.llama_vocab_get_attr(vocab, i))))

    def value(self, name: str, default: Any = None) -> Any:
        """Return the value of one of the keys of tokenizers."""
        entry = self._entries.get(_KEYS + name)
        return default if entry is None else entry.value

    def templates(self) -> dict[str, Any]:
        """Return the chat templates by key."""
        return {
            key: entry.value
            for key, entry in self._entries.items()
            if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
        }

    def is_a(self, token: Token, *kinds: str) -> bool:
        return any(token.attributes & self._bits[kind] for kind in kinds)

    @cached_property
    def added(self) -> dict[int, Token]:
        """Tokens that are looked for in a text before it is split."""
        return {
            i: token
            for i, token in enumerate(self.tokens)
            if self.is_a(token, "CONTROL", "USER_DEFINED", "UNKNOWN") and token.text
        }

    @cached_property
    def used(self) -> dict[str, int]:
        """Ids by spelling, without those that only fill the embedding up."""
        return {token.text: i for i, token in enumerate(self.tokens) if not self.is_a(token, "UNUSED")}

    @property
    def add_bos(self) -> bool:
        return bool(self._library.llama_vocab_get_add_bos(self._vocab)) and self.special["bos"] is not None

    @property
    def add_eos(self) -> bool:
        return bool(self._library.llama_vocab_get_add_eos(self._vocab)) and self.special["eos"] is not None

    @cached_property
    def special(self) -> dict[str, int | None]:
        """Ids of special tokens by GGUF's word; None where the file has none."""
        found: dict[str, int | None] = {}
        for name in _NAMES:
            stated = self.value(f"{name}_token_id")
            found[name] = stated if isinstance(stated, int) and 0 <= stated < len(self.tokens) else None
        if self.value("model") != "gpt2":  # where no key says so, byte-level files have none
            for name, ask in (("bos", self._library.llama_vocab_bos), ("eos", self._library.llama_vocab_eos)):
                usual = ask(self._vocab)
                found[name] = usual if found[name] is None and 0 <= usual < len(self.tokens) else found[name]
        if found["unknown"] is None:
            found["unknown"] = next((i for i, token in enumerate(self.tokens) if self.is_a(token, "UNKNOWN")), None)
        return found

    def ends(self) -> list[int]:
        """Return the tokens at which llama.cpp ends a text, the end token first; not those between files of code."""
        library, vocab = self._library, self._vocab
        between = {getattr(library, f"llama_vocab_fim_{name}")(vocab) for name in ("pad", "rep", "sep")}
        found = [i for i in range(len(self.tokens)) if i not in between and library.llama_vocab_is_eog(vocab, i)]
        eos = self.special["eos"]
        return list(dict.fromkeys([*([] if eos is None else [eos]), *found]))

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return token ids, special tokens that are written out among them."""
        data = text.encode()
        room = 2 * len(data) + 8
        ids = (self._library.llama_token * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, True)
        assert 0 <= count <= room
        return list(ids[:count])


@contextmanager
def open_vocabulary(opened: OpenedFile) -> Iterator[Vocabulary]:
    """Open the vocabulary of a file in llama.cpp.

    Raises:
        GgufError: llama.cpp does not open it.
        UnsupportedError: texts cannot be tried with it.
    """
    if pieces_without_bytes(opened.info.header) is not None:
        raise UnsupportedError(
            f"{opened.path}: its vocabulary has not all bytes, and llama.cpp ends at a character that it has not", _OWN
        )
    log.clear()
    try:
        llama = open_llama(opened.path, fast_buffers=False, vocab_only=True, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise GgufError(
            f"{opened.path}: llama.cpp does not open it ({last_error() or one_line(error)})",
            f"pi-gguf inspect {opened.path} shows what it states; or copy or convert it again",
        ) from error
    try:
        yield Vocabulary(llama, opened.path, opened.info.header.entries)
    finally:
        compute(llama.close)


# Files


def write_tokenizer(folder: Path, vocabulary: Vocabulary, window: int) -> None:
    """Write the files of a tokenizer.

    Args:
        window: of the model, in tokens.

    Raises:
        UnsupportedError: a kind of vocabulary, or a splitting, that is not known here.
    """
    kind = vocabulary.value("model")
    makers = {"gpt2": _byte_level, "llama": _pieces, "t5": _unigram}
    if kind not in makers:
        raise UnsupportedError(
            f"{vocabulary.path}: {_KEYS}model is {repr(kind)[:80]}, of which no tokenizer is made here",
            f"these are: {', '.join(makers)}; take the model's own tokenizer from where the file was made",
        )
    parsed = makers[kind](vocabulary)
    parsed = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(vocabulary), **parsed,
        "post_processor": _post_processor(vocabulary),
    }  # fmt: skip
    _write_json(folder / "tokenizer.json", parsed)
    _check_opens(parsed, vocabulary)
    special = {_NAMES[name]: i for name, i in vocabulary.special.items() if i is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": window,
        "clean_up_tokenization_spaces": False, **{name: vocabulary.tokens[i].text for name, i in special.items()},
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", settings)
    ids = special_ids(vocabulary)
    _write_json(folder / "generation_config.json", {name: i for name, i in ids.items() if i is not None})
    _write_templates(folder, vocabulary)
    if kind in ("llama", "t5"):
        _write_model(folder / "tokenizer.model", vocabulary, unigram=kind == "t5")


def special_ids(vocabulary: Vocabulary) -> dict[str, int | list[int] | None]:
    """Return begin, end and padding tokens as config.json has them; None for one that the file has not."""
    special, ends = vocabulary.special, vocabulary.ends()
    return {
        "bos_token_id": special["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": special["padding"],
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the parts of a byte-level BPE tokenizer.json."""
    path, merges = str(vocabulary.path), []
    used, every = dict(vocabulary.used), {token.text: i for i, token in enumerate(vocabulary.tokens)}
    splitter, ignore_merges = pre_tokenizer(str(vocabulary.value("pre", "default")), path)
    listed = vocabulary.value("merges", [])
    for merge in listed if isinstance(listed, list) else []:
        pair = str(merge).split(" ")
        parts = [*pair, "".join(pair)]
        if len(pair) != 2 or not all(part in every for part in parts):
            raise UnsupportedError(
                f"{path}: {_KEYS}merges: {str(merge)[:80]!r} joins what are no tokens, or gives none",
                _OWN,
            )
        used |= {part: every[part] for part in parts}
        merges.append(pair)
    if not merges:
        raise GgufError(f"{path}: {_KEYS}merges is missing", "convert the model again")
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
        "vocab": used, "merges": merges,
    }  # fmt: skip
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"normalizer": None, "pre_tokenizer": splitter, "decoder": decoder, "model": model}


def _pieces(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the parts of the tokenizer.json of a SentencePiece BPE."""
    scores = {token.text: token.score for token in vocabulary.tokens}
    unknown = vocabulary.special["unknown"]
    name = None if unknown is None else vocabulary.tokens[unknown].text
    return bpe_json_of(vocabulary.used, scores, name, space_prefix=bool(vocabulary.value("add_space_prefix", True)))


def _unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the parts of a Unigram tokenizer.json."""
    unknown = vocabulary.special["unknown"]
    if unknown is None:
        raise UnsupportedError(f"{vocabulary.path}: its Unigram vocabulary has no unknown token")
    charsmap = bytes(byte % 256 for byte in vocabulary.value("precompiled_charsmap", []))
    return unigram_json_of(
        [(token.text, token.score) for token in vocabulary.tokens], unknown,
        charsmap=base64.b64encode(charsmap).decode(),
        space_prefix=bool(vocabulary.value("add_space_prefix", True)),
        merge_spaces=bool(vocabulary.value("remove_extra_whitespaces", False)),
    )  # fmt: skip


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "id": i, "content": token.text, "single_word": vocabulary.is_a(token, "SINGLE_WORD"),
            "lstrip": vocabulary.is_a(token, "LSTRIP"), "rstrip": vocabulary.is_a(token, "RSTRIP"),
            "normalized": False, "special": not vocabulary.is_a(token, "USER_DEFINED"),
        }
        for i, token in vocabulary.added.items()
    ]  # fmt: skip


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Return what puts tokens before and behind a text, as llama.cpp does."""
    special = vocabulary.special
    before = [special["bos"]] if vocabulary.add_bos else []
    behind = [special["eos"]] if vocabulary.add_eos else []
    names = {vocabulary.tokens[i].text: i for i in (*before, *behind) if i is not None}
    if not names:
        return None

    def around(sequence: str, number: int) -> list[dict[str, Any]]:
        tokens = [
            [{"SpecialToken": {"id": vocabulary.tokens[i].text, "type_id": number}} for i in side if i is not None]
            for side in (before, behind)
        ]
        return [*tokens[0], {"Sequence": {"id": sequence, "type_id": number}}, *tokens[1]]

    known = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in names.items()}
    pair = [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": known}


def _check_opens(parsed: dict[str, Any], vocabulary: Vocabulary) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(parsed))
    except Exception as error:  # of a Rust library, of no kind of its own
        raise UnsupportedError(
            f"{vocabulary.path}: no tokenizer can be made of its vocabulary ({one_line(error)})",
            _OWN,
        ) from error


def _write_templates(folder: Path, vocabulary: Vocabulary) -> None:
    """Write chat templates: the default one, and others by name.

    Raises:
        GgufError: one is broken.
    """
    for key, template in vocabulary.templates().items():
        name = key.removeprefix(_TEMPLATE).removeprefix(".")
        if name and not re.fullmatch(r"[a-z0-9_]+", name):
            raise UnsupportedError(f"{vocabulary.path}: {key[:80]!r}: a template's name is made of a-z, 0-9 and _")
        try:
            check_template(template, f"{vocabulary.path}: {key}")
        except CheckpointError as error:
            raise GgufError(str(error), f"pi-gguf repair FILE OUT --set {key}=... states another") from error
        path = folder / "additional_chat_templates" / f"{name}.jinja" if name else folder / "chat_template.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _write_model(path: Path, vocabulary: Vocabulary, *, unigram: bool) -> None:
    """Write tokenizer.model where SentencePiece then tokenizes as llama.cpp does; say so where it does not."""
    special = {name: i for name, i in vocabulary.special.items() if i is not None}
    charsmap = bytes(byte % 256 for byte in vocabulary.value("precompiled_charsmap", []))
    path.write_bytes(
        model_of(
            [(token.text, token.score, _piece_type(vocabulary, i)) for i, token in enumerate(vocabulary.tokens)],
            special, unigram=unigram, charsmap=charsmap,
            space_prefix=bool(vocabulary.value("add_space_prefix", True)),
            merge_spaces=bool(vocabulary.value("remove_extra_whitespaces", False)),
        )
    )  # fmt: skip
    try:
        model = open_sentencepiece(str(path))
        differs = next((t for t in PROSE if model.encode(t) != vocabulary.tokenize(t, add_special=False)), None)
        why = differs and f"it tokenizes {differs[:40]!r} otherwise"
    except CheckpointError:
        why = "SentencePiece does not open one of such tokens"
    if why:
        path.unlink()
        say(f"note: no tokenizer.model is written ({why}); tokenizer.json is enough")


def _piece_type(vocabulary: Vocabulary, index: int) -> int:
    """Return SentencePiece's number of the kind of a token; it takes one unknown token, where a file may have more."""
    if index == vocabulary.special["unknown"]:
        return UNKNOWN
    kinds = enumerate(_ATTRIBUTES[:6], 1)
    found = next((number for number, kind in kinds if vocabulary.is_a(vocabulary.tokens[index], kind)), NORMAL)
    return UNUSED if found == UNKNOWN else found


# Proof


def check_tokenizer(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Check that the tokenizer of a folder makes of the sample texts what llama.cpp makes of them.

    Raises:
        UnsupportedError: a text of prose has other ids; the message shows where.
    """
    texts = TokenizedTexts.of(checkpoint, checkpoint.load_tokenizer(), strict=False)
    prose, special = texts.compare(vocabulary.tokenize)
    if prose:
        raise UnsupportedError(
            f"{vocabulary.path}: the tokenizer made of it is not the same: {prose[0]} ({len(prose)} of {len(texts)} "
            "texts)",
            "take the model's own folder, or its tokenizer, from where the file was made",
        )
    if special:
        say(said(special, len(texts)))
