"""Pre-tokenizers: how a byte-level tokenizer.json splits a text -> llama.cpp's name for the same splitting, and back.

In: a parsed tokenizer.json. Out: a name for `tokenizer.ggml.pre`; or from such a name the steps of a tokenizer.json.
Steps and patterns decide, in their order; nothing is hashed. Each entry of the table was compared with llama.cpp on
thousands of random texts. SuperBPE, DeepSeek LLM, Tiny Aya and AFMoE are not in it: llama.cpp's splitting of that name
gave other ids.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

from pi_gguf.errors import UnsupportedError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_AFTER_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_WORDS
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER_THEN_LOWER = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING"
)
_AFTER_CASED_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
_TEKKEN = _UPPER_THEN_LOWER.replace("ENDING", "") + r"|\p{N}" + _AFTER_CASED_WORDS
_GPT4O = _UPPER_THEN_LOWER.replace("ENDING", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _AFTER_CASED_WORDS
_YOUTU = _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
_HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _REST
)
_SPARK = _DEEPSEEK3.replace(r"+[\r\n]*|\s*[\r\n]+|", r"+|[\r\n]|")
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
_SEED_CODER = QWEN2.replace(r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*", r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+")
_JAIS2 = LLAMA3.replace(
    r"\s+(?!\S)|\s+",
    "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"|\s{1}",
)
_EXAONE_MOE = _CONTRACTIONS + (
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?" + _REST
)
_UFAKZEKA = QWEN2.removeprefix(_CONTRACTIONS + "|")
_LINES = r"[^\n]+|[\n]+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+ENDING"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*ENDING"
)
_TEKKEN_OF_LLAMA_CPP = _CASED.replace("ENDING", "") + r"|\p{N}" + _AFTER_CASED_WORDS
_GPT4O_OF_LLAMA_CPP = _CASED.replace("ENDING", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _AFTER_CASED_WORDS

_COVERING = (GPT2, LLAMA3, QWEN2, _QWEN35, _TEKKEN, _GPT4O)
"""Patterns that match every character, so that removing what lies between their matches removes nothing."""

_SPELLINGS = (
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("]?+", "]?"),  # nothing in these patterns ever matches by giving a character back
    ("]++", "]+"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),  # \s* has taken all line ends but the last already
)
"""Other spellings of the same splitting -> the one of the table."""


@dataclass(frozen=True)
class _Splitting:
    """One of llama.cpp's pre-tokenizers.

    Args:
        name: for `tokenizer.ggml.pre`.
        steps: patterns, or one of the named steps, in their order.
        ignore_merges: whether words that are tokens as a whole are taken without merging.
        exact: whether it splits as the steps do whatever the vocabulary. If not, it leaves out splits between letters
            or numbers that matter only where a token spans one.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    exact: bool = True


_TABLE = (
    _Splitting("gpt-2", ("words", "bytes")),
    _Splitting("smollm", ("digits", "words", "bytes")),
    _Splitting("falcon", ("punctuation", "words", "bytes", "numbers", "[0-9][0-9][0-9]"), exact=False),
    _Splitting("llama-bpe", (LLAMA3, "bytes"), ignore_merges=True),
    _Splitting("smaug-bpe", (LLAMA3, "bytes")),
    _Splitting("qwen2", (QWEN2, "bytes")),
    _Splitting("qwen35", (_QWEN35, "bytes")),
    _Splitting("granite-embed-multi-97m", (_GPT4O, "bytes"), ignore_merges=True, exact=False),
    _Splitting("granite-embed-multi-97m", (_TEKKEN, "bytes"), ignore_merges=True, exact=False),
    _Splitting("youtu", (_YOUTU_SCRIPTS, _YOUTU, "bytes"), ignore_merges=True, exact=False),
    _Splitting("deepseek-v3", (r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3, "bytes")),
    _Splitting("spark2_5", (r"\p{N}{1,3}", _HAN_AND_KANA, _SPARK, "digits", "bytes")),
    _Splitting("bloom", (_BLOOM, "bytes")),
    _Splitting("viking", (_BLOOM, "digits", "bytes")),
    _Splitting("seed-coder", (_SEED_CODER, "bytes")),
    _Splitting("jais-2", (_JAIS2, "bytes")),
    _Splitting("minicpm5", (r"\p{N}{1,3}", QWEN2.replace(r"\p{N}|", r"\p{N}+|"), "bytes"), ignore_merges=True),
    _Splitting("ufakzeka", (_UFAKZEKA, "bytes")),
    _Splitting("exaone-moe", (_EXAONE_MOE, "bytes")),
    _Splitting("laguna", (_LINES, QWEN2, "bytes")),
    _Splitting("tekken", (_TEKKEN_OF_LLAMA_CPP, "bytes"), ignore_merges=True),
    _Splitting("gpt-4o", (_GPT4O_OF_LLAMA_CPP, "bytes")),
)
# Tekken and GPT-4o have names of their own in llama.cpp, but those split before combining marks: other ids in Hindi,
# Thai and vowelled Arabic. The name used here has the marks; theirs are those of files that were unpacked.

SAME = {
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
    "smaug-bpe": "dbrx chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open bailingmoe bailingmoe2 llada-moe "
    "grok-2",
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "bloom": "poro-chat gpt3-finnish",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
}
"""Names of the table -> others that llama.cpp has for the same splitting."""


_NOT_HERE = (
    "if tokenizer.json was edited, put the one that the model came with there; else run the model with transformers, "
    "and report the pattern"
)


def recognize_pre_tokenizer(parsed: dict[str, Any], path: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json, by its structure.

    Raises:
        UnsupportedError: none does the same; the message shows the steps, or the token that tells them apart.
    """
    pre = parsed["pre_tokenizer"]
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    steps = tuple(name for part in parts for name in _steps(part))
    skips = bool(parsed["model"].get("ignore_merges"))
    found = [splitting for splitting in _TABLE if splitting.steps == steps]
    if not found:
        raise UnsupportedError(
            f"{path}: pre_tokenizer: llama.cpp has no equivalent known here for {list(steps)} (ignore_merges {skips})",
            _NOT_HERE,
        )
    splitting = next((s for s in found if s.ignore_merges == skips), found[0])
    if splitting.ignore_merges != skips and (token := _unreachable_token(parsed)) is not None:
        raise UnsupportedError(
            f"{path}: ignore_merges {skips} matters for the token {token!r}, which merges do not reach, "
            f"and llama.cpp has this pre_tokenizer only with {not skips}: {list(steps)}",
            _NOT_HERE,
        )
    if not splitting.exact and (token := _spanning_token(parsed)) is not None:
        raise UnsupportedError(
            f"{path}: the token {token!r} spans a place where pre_tokenizer splits, and llama.cpp does not: "
            f"{list(steps)}",
            _NOT_HERE,
        )
    return splitting.name


def pre_tokenizer(name: str, path: str) -> tuple[dict[str, Any], bool]:
    """Return the `pre_tokenizer` of a tokenizer.json that splits as llama.cpp does by a name, and `ignore_merges`.

    Args:
        name: of `tokenizer.ggml.pre`.
        path: of the file, for messages.

    Raises:
        UnsupportedError: a splitting that is not known here.
    """
    known = next((table for table, others in SAME.items() if name in others.split()), name)
    splitting = next((one for one in _TABLE if one.name == known), None)
    if splitting is None:
        raise UnsupportedError(
            f"{path}: tokenizer.ggml.pre is {name[:80]!r}, of which is not known here how it splits a text",
            "if another name is right for this model, pi-gguf repair FILE OUT --set tokenizer.ggml.pre=NAME states it",
        )
    steps, parts = list(splitting.steps), []
    while steps:
        step = steps.pop(0)
        whole = step == "words" and steps[:1] == ["bytes"]
        parts.append(_part("bytes and words" if whole else step))
        steps = steps[whole:]
    return {"type": "Sequence", "pretokenizers": parts}, splitting.ignore_merges


def _part(step: str) -> dict[str, Any]:
    """Return the part of a `pre_tokenizer` that does a step."""
    if step in ("bytes", "bytes and words"):
        bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {**bytes_alone, "use_regex": step != "bytes"}
    if step in ("digits", "numbers"):
        return {"type": "Digits", "individual_digits": step == "digits"}
    if step == "punctuation":
        return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _steps(part: dict[str, Any]) -> list[str]:
    kind, behavior, pattern = part["type"], part.get("behavior"), part.get("pattern") or {}
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return ["words", "bytes"] if part.get("use_regex", True) else ["bytes"]
    if kind == "Digits":
        return ["digits" if part.get("individual_digits") else "numbers"]
    if kind == "Punctuation" and behavior == "Contiguous":
        return ["punctuation"]
    if kind == "Split" and isinstance(pattern.get("Regex"), str):
        regex = pattern["Regex"]
        for other, ours in _SPELLINGS:
            regex = regex.replace(other, ours)
        apart = behavior == "Isolated" and not part.get("invert")
        if apart or (behavior == "Removed" and part.get("invert") and regex in _COVERING):
            return [{GPT2: "words", r"\p{N}": "digits", r"\p{N}+": "numbers"}.get(regex, regex)]
    return [json.dumps(part, ensure_ascii=False)]


def _unreachable_token(parsed: dict[str, Any]) -> str | None:
    """Return a token that merging its bytes does not give, None where `ignore_merges` makes no difference."""
    from tokenizers import Tokenizer

    model = {**parsed["model"], "ignore_merges": False}
    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    added = {token["content"] for token in parsed.get("added_tokens") or ()}
    tokens = [token for token in model["vocab"] if token not in added]
    for token, encoding in zip(tokens, bare.encode_batch(tokens, add_special_tokens=False), strict=True):
        if len(encoding.ids) != 1:
            return str(token)
    return None


def _spanning_token(parsed: dict[str, Any]) -> str | None:
    """Return a token of letters or numbers that the pre-tokenizer itself would split.

    A token that holds only part of a character's bytes cannot be told.
    """
    from tokenizers import Tokenizer, decoders

    model = {"type": "BPE", "vocab": {}, "merges": []}
    splitter = Tokenizer.from_str(
        json.dumps({"version": "1.0", "pre_tokenizer": parsed["pre_tokenizer"], "model": model})
    ).pre_tokenizer
    decoder = decoders.ByteLevel()
    added = {token["content"] for token in parsed.get("added_tokens") or ()}
    for token in parsed["model"]["vocab"]:
        text = decoder.decode([token]).strip(" ")
        plain = token not in added and all(unicodedata.category(c)[0] in "LMN" for c in text)
        if plain and len(token) > 1 and len(splitter.pre_tokenize_str(text)) > 1:
            return str(text)
    return None
