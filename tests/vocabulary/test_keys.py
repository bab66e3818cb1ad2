"""Tokenizers part by part: trained on the spot, read by llama.cpp, compared id for id on thousands of texts."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers import make_llama
from small_tokenizers import BYTES, FLAGS, LLAMA3, QWEN2, WORDS, split, train_sentencepiece
from tokenizers import Tokenizer, pre_tokenizers, trainers

import pi_gguf
from pi_gguf import bundled
from pi_gguf.errors import CheckError, CheckpointError, OptionError, UnsupportedError
from pi_gguf.gguf.file import read_gguf, write_header
from pi_gguf.vocabulary.byte_level import _TABLE, pre_tokenizer, recognize_pre_tokenizer
from pi_gguf.vocabulary.keys import file_name
from pi_gguf.vocabulary.probes import sample_texts
from pi_gguf.vocabulary.sentencepiece import keys_of_model, keys_of_unigram_json

DIGITS = {"type": "Digits", "individual_digits": True}
IDS = {"<s>": 0, "</s>": 1, "<g>": 400}


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
JAIS2 = LLAMA3.replace(
    r"\s+(?!\S)|\s+",
    r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
    r"|\s{1,2}(?!\S)|\s{1}",
)
EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
KANA = "[一-龥぀-ゟ゠-ヿ]+"
SPARK = DEEPSEEK3.replace(r"[\r\n]*|\s*[\r\n]+", r"|[\r\n]")
MINICPM5 = QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")
YOUTU = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"

PRE_TOKENIZERS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "GPT-2": ("gpt-2", [WORDS]),
    "GPT-2, spelled out": ("gpt-2", [split(GPT2), BYTES]),
    "StarCoder, SmolLM, Command-R": ("smollm", [DIGITS, WORDS]),
    "Llama 3": ("llama-bpe", [split(LLAMA3), BYTES]),
    "Llama 3, merging": ("smaug-bpe", [split(LLAMA3), BYTES]),
    "GLM-4, what matches is kept": ("smaug-bpe", [split(LLAMA3, "Removed", True), BYTES]),
    "cl100k": ("smaug-bpe", [split(CL100K), BYTES]),
    "Qwen 2": ("qwen2", [split(QWEN2), BYTES]),
    "Bailing": ("qwen2", [split(CL100K.replace("{1,3}", "")), BYTES]),
    "Qwen 3.5": ("qwen35", [split(QWEN35), BYTES]),
    "DeepSeek V3": ("deepseek-v3", [split(r"\p{N}{1,3}"), split(KANA), split(DEEPSEEK3), BYTES]),
    "Spark 2.5": ("spark2_5", [split(r"\p{N}{1,3}"), split(KANA), split(SPARK), split(r"\p{N}"), BYTES]),
    "BLOOM": ("bloom", [split(BLOOM), BYTES]),
    "Viking": ("viking", [split(BLOOM), DIGITS, BYTES]),
    "Seed-Coder": ("seed-coder", [split(SEED_CODER), BYTES]),
    "Jais 2": ("jais-2", [split(JAIS2), BYTES]),
    "MiniCPM 5": ("minicpm5", [split(r"\p{N}{1,3}"), split(MINICPM5), BYTES]),
    "Ufakzeka": ("ufakzeka", [split(QWEN2.partition("|[^")[1][1:] + QWEN2.partition("|[^")[2]), BYTES]),
    "EXAONE MoE": ("exaone-moe", [split(EXAONE_MOE), BYTES]),
    "Laguna": ("laguna", [split(r"[^\n]+|[\n]+"), split(QWEN2), BYTES]),
    "Falcon": (
        "falcon",
        [
            {"type": "Punctuation", "behavior": "Contiguous"},
            WORDS,
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]"),
        ],
    ),
    "Tekken": ("granite-embed-multi-97m", [split(TEKKEN), BYTES]),
    "GPT-4o": ("granite-embed-multi-97m", [split(GPT4O), BYTES]),
    "Tekken, as llama.cpp has it": ("tekken", pre_tokenizer("tekken", "")[0]["pretokenizers"]),
    "GPT-4o, as llama.cpp has it": ("gpt-4o", pre_tokenizer("gpt-4o", "")[0]["pretokenizers"]),
    "Youtu": ("youtu", [split(YOUTU), split(GPT4O.replace("{1,3}", "")), BYTES]),
}
INEXACT = {splitting.name for splitting in _TABLE if not splitting.exact}
MERGELESS = {splitting.name for splitting in _TABLE if splitting.ignore_merges}
TEXTS = sample_texts(1500, seed=1)


def trained(parts: list[dict[str, Any]], vocab_size: int = 3000) -> dict[str, Any]:
    """Train a byte-level BPE on the very kind of texts that are compared; return its tokenizer.json."""
    pre = {"type": "Sequence", "pretokenizers": parts}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "pre_tokenizer": pre, "model": model}))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    novel = next(iter(bundled.novels("train").values()))[:30_000]
    tokenizer.train_from_iterator([novel, *sample_texts(3000, seed=2)], trainer)
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


@pytest.fixture(scope="module")
def unsplit() -> dict[str, Any]:
    """A tokenizer trained without splitting: wherever a text is split otherwise, other tokens come out."""
    return trained([BYTES], vocab_size=6000)


class LlamaCpp:
    """The tokenizer of llama.cpp, of a file without tensors."""

    def __init__(self, path: Path, keys: dict[str, Any]) -> None:
        from pi_gguf.llamacpp.library import llama_cpp_library

        self.library = llama_cpp_library()
        sizes = {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64}
        heads = {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
        rows = len(keys["tokenizer.ggml.tokens"])
        ids = {f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos")}
        adds = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
        shape = {f"llama.{key}": value for key, value in {**sizes, **heads, "vocab_size": rows}.items()}
        write_header(path, "llama", {**shape, **ids, **keys, **adds}, [])
        params = self.library.llama_model_default_params()
        params.vocab_only = True
        self.model = self.library.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, keys["tokenizer.ggml.pre"]
        self.vocab = self.library.llama_model_get_vocab(self.model)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (2 * len(data) + 16))()
        n = self.library.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:n])

    def close(self) -> None:
        self.library.llama_model_free(self.model)


def bpe_keys(parsed: dict[str, Any]) -> dict[str, Any]:
    vocab = parsed["model"]["vocab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": recognize_pre_tokenizer(parsed, "tokenizer.json"),
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
        "tokenizer.ggml.token_type": [1] * len(vocab),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in parsed["model"]["merges"]],
    }


def assert_same_ids(path: Path, keys: dict[str, Any], reference: Any, texts: list[str] = TEXTS) -> None:
    theirs = LlamaCpp(path, keys)
    try:
        different = [text for text in texts if theirs.tokenize(text) != reference(text)]
    finally:
        theirs.close()
    assert len(texts) > 1000
    assert not different, f"{len(different)} of {len(texts)}, {min(different, key=len)!r}"


def test_every_pre_tokenizer_of_the_table_is_compared_here():
    assert {name for name, _ in PRE_TOKENIZERS.values()} == {splitting.name for splitting in _TABLE}
    assert len(PRE_TOKENIZERS) == 26


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_a_pre_tokenizer_splits_in_llama_cpp_as_in_hugging_face(kind, unsplit, tmp_path):
    name, parts = PRE_TOKENIZERS[kind]
    parsed = trained(parts) if name in INEXACT else json.loads(json.dumps(unsplit))
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    parsed["model"]["ignore_merges"] = name in MERGELESS
    keys = bpe_keys(parsed)
    assert keys["tokenizer.ggml.pre"] == name
    hugging_face = Tokenizer.from_str(json.dumps(parsed))
    assert_same_ids(tmp_path / "v.gguf", keys, lambda text: hugging_face.encode(text).ids)


@pytest.mark.parametrize("kind", ["Tekken", "GPT-4o", "Falcon", "Youtu"])
def test_a_token_that_spans_a_split_llama_cpp_leaves_out_is_refused(kind, unsplit):
    parsed = json.loads(json.dumps(unsplit))
    name, parts = PRE_TOKENIZERS[kind]
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    parsed["model"]["ignore_merges"] = name in MERGELESS
    with pytest.raises(UnsupportedError, match="spans a place where pre_tokenizer splits"):
        recognize_pre_tokenizer(parsed, "tokenizer.json")


def test_ignore_merges_matters_only_for_a_token_that_merges_do_not_reach(unsplit):
    parsed = trained([split(QWEN2), BYTES], vocab_size=400)
    parsed["model"]["ignore_merges"] = True
    assert recognize_pre_tokenizer(parsed, "tokenizer.json") == "qwen2"
    parsed["model"]["vocab"]["zebra"] = 400
    with pytest.raises(UnsupportedError, match="ignore_merges True matters for the token 'zebra'"):
        recognize_pre_tokenizer(parsed, "tokenizer.json")


@pytest.mark.parametrize(
    "parts",
    [
        [BYTES, split(LLAMA3)],  # the pattern would see bytes
        [split(LLAMA3, "MergedWithNext"), BYTES],
        [split(r"\p{N}{1,3}", "Removed", True), BYTES],  # drops all but numbers
        [split(LLAMA3), {**BYTES, "add_prefix_space": True}],
        [split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), BYTES],  # SuperBPE: llama.cpp knows only ASCII digits there
        [],
    ],
)
def test_the_order_and_kind_of_every_step_counts(parts):
    parsed = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}, "model": {}}
    with pytest.raises(UnsupportedError, match="no equivalent"):
        recognize_pre_tokenizer(parsed, "tokenizer.json")


# SentencePiece

SENTENCEPIECES: dict[str, dict[str, Any]] = {
    "as T5's": {},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "as written": {"normalization_rule_name": "identity"},
    "spaces kept, none put first": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "none put first": {"add_dummy_prefix": False},
    "bytes": {"byte_fallback": True},
    "space behind": {"treat_whitespace_as_suffix": True},
    "a symbol of its own": {"user_defined_symbols": ["<tool>"]},
    "BPE, normalized": {"model_type": "bpe", "byte_fallback": True},
    "BPE, spaces merged": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "BPE": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "word": {"model_type": "word"},
}  # fmt: skip
REFUSED = {
    "none put first": "white space is merged, with no space before a text",
    "bytes": "byte_fallback of a Unigram model",
    "space behind": "treat_whitespace_as_suffix",
    "a symbol of its own": "user-defined piece '<tool>' with add_dummy_prefix",
    "BPE, normalized": "normalizer_spec.name 'nmt_nfkc' of a BPE model",
    "BPE, spaces merged": "remove_extra_whitespaces of a BPE model",
    "word": "model_type 3",
}


@pytest.mark.parametrize("kind", SENTENCEPIECES)
def test_a_sentencepiece_model_gives_sentencepieces_ids_or_is_refused(kind, tmp_path):
    from sentencepiece import SentencePieceProcessor

    path = train_sentencepiece(tmp_path / "tokenizer.model", **SENTENCEPIECES[kind])
    if kind in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[kind]):
            keys_of_model(str(path))
        return
    reference = SentencePieceProcessor(model_file=str(path))
    texts = [text for text in TEXTS if text.strip() or kind != "spaces kept"]  # llama.cpp puts no space before those
    assert_same_ids(tmp_path / "v.gguf", keys_of_model(str(path)), reference.encode, texts)


def test_a_unigram_model_converts_whole(tmp_path):
    folder = make_llama(tmp_path / "model", vocab_size=1200, bos_token_id=1, eos_token_id=2)
    for path in folder.glob("*token*"):
        path.unlink()
    train_sentencepiece(folder / "tokenizer.model", normalization_rule_name="identity")
    result = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
    assert result.checks[0].kl_divergence < 1e-6
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "t5"


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> dict[str, Any]:
    """The tokenizer.json of a Unigram model with a character map, as transformers makes it."""
    import base64

    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString(train_sentencepiece(tmp_path_factory.mktemp("unigram") / "m.model").read_bytes())
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    special = {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **FLAGS} for i, token in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing", "single": end, "pair": end * 2, "special_tokens": special,
        },
        "model": {
            "type": "Unigram", "unk_id": 0, "byte_fallback": False,
            "vocab": [[piece.piece, piece.score] for piece in model.pieces],
        },
    }  # fmt: skip


def test_a_unigram_tokenizer_json_converts_whole(unigram, tmp_path):
    folder = make_llama(tmp_path / "model", vocab_size=1200, bos_token_id=1, eos_token_id=2)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(unigram))
    result = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
    assert result.checks[0].strings_compared == 74
    assert not result.checks[0].strings_different
    info = read_gguf(tmp_path / "out.gguf")
    assert info.metadata["tokenizer.ggml.add_eos_token"] is True
    assert info.metadata["tokenizer.ggml.add_bos_token"] is False
    assert info.array_lengths["tokenizer.ggml.precompiled_charsmap"] > 10_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda j: j["pre_tokenizer"].update(prepend_scheme="never"), "white space is merged, with no space before"),
        (lambda j: j["normalizer"]["normalizers"].__delitem__(slice(1, 3)), "white space that is not merged"),
        (lambda j: j["normalizer"]["normalizers"].insert(1, {"type": "Lowercase"}), '"type": "Lowercase"'),
        (lambda j: j["normalizer"]["normalizers"].pop(0), '"type": "Strip"'),
        (lambda j: j.update(pre_tokenizer={"type": "WhitespaceSplit"}), '"type": "WhitespaceSplit"'),
        (lambda j: j["model"].update(byte_fallback=True), "model.byte_fallback"),
        (lambda j: j["model"]["vocab"].append(["of▁the", -3.0]), "the token 'of▁the' with a space inside"),
        (lambda j: j["model"].update(unk_id=None), "model.unk_id must be a token"),
    ],
)
def test_what_unigram_does_otherwise_in_llama_cpp_is_refused(unigram, change, said):
    parsed = json.loads(json.dumps(unigram))
    keys_of_unigram_json(parsed, 1200, "tokenizer.json")
    change(parsed)
    with pytest.raises(UnsupportedError, match=said):
        keys_of_unigram_json(parsed, 1200, "tokenizer.json")


def sentencepiece_bpe() -> dict[str, Any]:
    """A tokenizer.json of Llama's kind: no pre-tokenizer, spaces as ▁, bytes for what has no token."""
    corpus = (
        "▁" + line.replace(" ", "▁") for line in next(iter(bundled.novels("train").values()))[:40_000].split("\n")
    )
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(corpus, trainer)
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    parsed["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    parsed["added_tokens"] = parsed["added_tokens"][:3]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    parsed["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    return parsed


@pytest.mark.parametrize(
    ("change", "prefix", "said"),
    [
        ({}, True, ""),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, False, ""),
        (
            {
                "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                "pre_tokenizer": {
                    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
                },
            },
            False,
            "",
        ),
        ({"normalizer": None, "pre_tokenizer": {"prepend_scheme": "never"}}, False, ""),
        ({"normalizer": None, "pre_tokenizer": {"prepend_scheme": "first"}}, True, ""),
        ({"normalizer": None, "pre_tokenizer": {"prepend_scheme": "always"}}, True, ""),
        ({"pre_tokenizer": {"prepend_scheme": "always"}}, True, ""),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "▁"}}, False, ""),
        ({"normalizer": {"type": "NFKC"}, "pre_tokenizer": {"prepend_scheme": "first"}}, None, "NFKC"),
        ({"normalizer": None, "pre_tokenizer": {"prepend_scheme": "first", "replacement": "_"}}, None, '"_"'),
        ({"normalizer": None}, None, "normalizer null with pre_tokenizer null"),
        ({"normalizer": {"type": "NFKC"}}, None, "NFKC"),
    ],
)  # fmt: skip
def test_the_space_before_a_text_is_read_off_the_parts_or_refused(change, prefix, said, tmp_path):
    folder = make_llama(tmp_path / "model", vocab_size=800, bos_token_id=1, eos_token_id=2)
    for path in folder.glob("*token*"):
        path.unlink()
    parsed = {**sentencepiece_bpe(), **change}
    metaspace = "prepend_scheme" in (parsed["pre_tokenizer"] or {})
    if metaspace:
        parsed["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "split": False, **parsed["pre_tokenizer"]}
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    if prefix is None:
        with pytest.raises(UnsupportedError, match=said):
            pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
        return
    check = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32").checks[0]
    assert check.strings_compared == 74
    assert all(text[0] == " " or "<" in text for text in check.strings_different)  # such texts alone may differ
    assert bool(check.strings_different) is (metaspace and parsed["normalizer"] is None and prefix)
    assert read_gguf(tmp_path / "out.gguf").metadata["tokenizer.ggml.add_space_prefix"] is prefix


# Added and special tokens


def edit(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    parsed = json.loads(path.read_text()) if path.exists() else {}
    change(parsed)
    path.write_text(json.dumps(parsed))


def add(*tokens: tuple[str, bool], **flags: bool) -> Any:
    """Return a change that adds tokens (content, special) from id 400 on."""

    def change(parsed: dict[str, Any]) -> None:
        for i, (content, special) in enumerate(tokens):
            parsed["added_tokens"].append({"id": 400 + i, "content": content, "special": special, **FLAGS, **flags})

    return change


def check_of(folder: Path, out: Path, **options: Any) -> Any:
    return pi_gguf.convert(str(folder), out, quant="F32", certify=False, **options).checks[0]


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_an_added_token_that_llama_cpp_finds_elsewhere_is_written_and_counted(flag, llama_copy, tmp_path, capfd):
    edit(llama_copy, "tokenizer.json", add(("<tool>", False), **{flag: True}))
    check = check_of(llama_copy, tmp_path / "out.gguf")
    assert check.strings_different and all("<tool>" in text for text in check.strings_different)
    err = capfd.readouterr().err
    assert f"note: prose is tokenized alike, {len(check.strings_different)} of {check.strings_compared} texts" in err
    assert "'one <tool> two<tool>three' tokenizes differently" in err
    with pytest.raises(CheckError, match="tokenizes differently") as refused:
        check_of(llama_copy, tmp_path / "strict.gguf", strict_tokenizer=True)
    assert "--strict-tokenizer" in refused.value.hint
    assert not (tmp_path / "strict.gguf").exists()


def test_an_added_token_that_cuts_prose_otherwise_is_refused(llama_copy, tmp_path):
    edit(llama_copy, "tokenizer.json", add(("he", False), single_word=True))  # llama.cpp finds it in "the"
    with pytest.raises(CheckError, match="tokenizes differently") as refused:
        check_of(llama_copy, tmp_path / "out.gguf")
    assert "added tokens that are plain words" in refused.value.hint


def test_strict_tokenizer_needs_the_check(llama, tmp_path):
    with pytest.raises(OptionError, match="strict-tokenizer is for the check"):
        pi_gguf.convert(str(llama), tmp_path / "out.gguf", quant="F32", check="none", strict_tokenizer=True)
    check = check_of(llama, tmp_path / "out.gguf", strict_tokenizer=True)
    assert not check.strings_different and check.strings_compared == 72


def sentencepiece_folder(path: Path, parsed: dict[str, Any], rows: int = 800) -> Path:
    folder = make_llama(path, vocab_size=rows, bos_token_id=1, eos_token_id=2)
    for old in folder.glob("*token*"):
        old.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    return folder


def test_an_added_token_that_is_looked_for_after_normalizing_is_counted(tmp_path):
    parsed = sentencepiece_bpe()
    parsed["added_tokens"].append({"id": 750, "content": "<tool>", "special": False, **FLAGS, "normalized": True})
    check = check_of(sentencepiece_folder(tmp_path / "model", parsed), tmp_path / "out.gguf")
    assert check.strings_different and all("<tool>" in text for text in check.strings_different)


@pytest.mark.parametrize("prepends", [True, False], ids=["as transformers 4 saved it", "without a normalizer"])
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}], ids=str)
def test_a_llama_tokenizer_that_transformers_saved_again_converts(prepends, settings, tmp_path):
    from transformers import AutoTokenizer

    parsed = sentencepiece_bpe()
    if not prepends:
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        parsed |= {"normalizer": None, "pre_tokenizer": metaspace}
    folder = sentencepiece_folder(tmp_path / "model", parsed)
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    scheme = {False: "never", None: "always" if settings.get("legacy") else "first"}[settings.get("add_prefix_space")]
    assert (saved["pre_tokenizer"] or {}).get("prepend_scheme") == scheme
    check_of(folder, tmp_path / "out.gguf")
    theirs = AutoTokenizer.from_pretrained(folder)
    novel = next(iter(bundled.novels("train").values()))
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        for text in ("Once upon a time", "two  spaces\nand a line", "žluťoučký kůň 🐴 123", novel[5000:7000].strip()):
            assert model.tokenize(text) == theirs(text)["input_ids"]


def test_a_grown_tokenizer_json_holds_beside_an_old_tokenizer_model(tmp_path):
    model = train_sentencepiece(tmp_path / "tokenizer.model", **SENTENCEPIECES["BPE"], vocab_size=500)
    parsed = sentencepiece_bpe()
    folder = sentencepiece_folder(tmp_path / "model", parsed)
    model.rename(folder / "tokenizer.model")
    vocab = parsed["model"]["vocab"]
    whole = next(token for token, index in vocab.items() if index > 600 and len(token) > 3)
    check = check_of(folder, tmp_path / "out.gguf")
    assert not check.strings_different
    with pi_gguf.open(tmp_path / "out.gguf") as opened:
        assert vocab[whole] in opened.tokenize(whole.replace("▁", " ").strip() + " x")


def test_a_byte_without_a_token_is_refused(tmp_path):
    parsed = sentencepiece_bpe()
    parsed["model"]["vocab"] |= {"<none>": parsed["model"]["vocab"].pop("<0xE2>")}
    folder = sentencepiece_folder(tmp_path / "model", parsed)
    with pytest.raises(UnsupportedError, match=r"no token for 1 of the 256 bytes, the first is <0xE2>") as refused:
        check_of(folder, tmp_path / "out.gguf")
    assert refused.value.hint


def test_a_token_with_a_zero_byte_is_left_unused(llama_copy, tmp_path, capfd):
    edit(llama_copy, "tokenizer.json", add(("a\0b", True), ("a", True)))  # cut at the zero byte they were the same
    check = check_of(llama_copy, tmp_path / "out.gguf")
    assert all("a\0b" in text for text in check.strings_different)
    assert "the token 400, 'a\\x00b', is left unused" in capfd.readouterr().err


# The file's name


def phi3(parsed: dict[str, Any]) -> None:
    add(("<unk>", True), ("<|endoftext|>", True))(parsed)
    parsed["added_tokens"].append({"id": 402, "content": "<|user|>", "special": True, **FLAGS, "rstrip": True})
    next(token for token in parsed["added_tokens"] if token["content"] == "</s>")["rstrip"] = True


@pytest.mark.parametrize("folder", ["my-Phi-3-mini", "mine", "phi3"])
def test_spaces_behind_special_tokens_are_dropped_whatever_the_folder_is_called(folder, llama_copy, tmp_path, capfd):
    edit(llama_copy, "tokenizer.json", phi3)
    check = check_of(llama_copy.rename(tmp_path / folder), tmp_path / "out.gguf")
    assert not check.strings_different
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        assert model.tokenize("<|user|>   a") == model.tokenize("<|user|>a")
        name = model.info.metadata["general.name"]
    assert (name == folder) is ("phi" in folder.lower())
    assert ("note: general.name" in capfd.readouterr().err) is (name != folder)


@pytest.mark.parametrize("folder", ["my-Phi-3-llama", "PHI3"])
def test_a_name_with_phi_3_in_it_is_changed_for_another_tokenizer(folder, llama_copy, tmp_path):
    check = check_of(llama_copy.rename(tmp_path / folder), tmp_path / "out.gguf")
    assert not check.strings_different
    assert read_gguf(tmp_path / "out.gguf").metadata["general.name"] == folder.replace("-3", "_3").replace("I3", "I_3")


def test_a_name_with_phi_3_goes_by_most_of_the_tokens(llama_copy):
    from pi_gguf.checkpoint.checkpoint import load_checkpoint

    edit(llama_copy, "tokenizer.json", phi3)
    edit(
        llama_copy,
        "tokenizer.json",
        lambda j: j["added_tokens"].append({**j["added_tokens"][0], "id": 403, "content": "<t>"}),
    )
    assert file_name("a", load_checkpoint(str(llama_copy)).load_tokenizer()) == "a (tokens of phi-3)"
    edit(llama_copy, "tokenizer.json", lambda j: [token.update(rstrip=False) for token in j["added_tokens"]])
    assert file_name("a-phi-3", load_checkpoint(str(llama_copy)).load_tokenizer()) == "a-phi_3"


def test_padding_has_a_spelling_that_no_token_has(llama_copy, tmp_path):
    edit(llama_copy, "tokenizer.json", lambda j: j["model"]["vocab"].update({"[PAD405]": 400}))
    pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")  # llama.cpp aborts at a spelling twice
    assert read_gguf(tmp_path / "out.gguf").array_lengths["tokenizer.ggml.tokens"] == 410


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_vocabulary_and_merges_without_a_tokenizer_json_convert(llama_copy, tmp_path, kind):
    from transformers import AutoTokenizer

    model = json.loads((llama_copy / "tokenizer.json").read_text())["model"]
    for path in llama_copy.glob("tokenizer*"):
        path.unlink()
    edit(llama_copy, "vocab.json", lambda j: j.update(model["vocab"]))
    (llama_copy / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    edit(llama_copy, "added_tokens.json", lambda j: j.update({"<|im_start|>": 400}))
    names = {f"{name}_token": "</s>" for name in ("bos", "eos", "unk", "pad")}
    edit(llama_copy, "tokenizer_config.json", lambda j: j.update(tokenizer_class=kind, **names))
    assert check_of(llama_copy, tmp_path / "out.gguf", strict_tokenizer=True).strings_compared > 70
    with pi_gguf.open(tmp_path / "out.gguf") as opened:
        text = "<|im_start|>It's 1 of 12 boats."
        assert opened.tokenize(text) == AutoTokenizer.from_pretrained(llama_copy)(text)["input_ids"]
    (llama_copy / "vocab.json").unlink()
    (llama_copy / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tokenizer\.model|does not open"):
        check_of(llama_copy, tmp_path / "other.gguf")


def test_added_tokens_without_a_row_are_left_out_with_a_note(llama_copy, tmp_path, capfd):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_copy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": [f"<|{i}|>" for i in range(12)]})
    tokenizer.save_pretrained(llama_copy)
    out = tmp_path / "out.gguf"
    check_of(llama_copy, out)
    tokens = list(gguf.GGUFReader(out).fields["tokenizer.ggml.tokens"].contents())
    beyond = tokenizer.convert_ids_to_tokens(list(range(410, len(tokenizer))))
    assert len(tokens) == 410 and len(beyond) == 3
    assert tokens[400:] == tokenizer.convert_ids_to_tokens(list(range(400, 410))) and not {*beyond} & {*tokens}
    assert f"410 rows, none for 3 added tokens ({', '.join(beyond)}): they are left out" in capfd.readouterr().err
    with pi_gguf.open(out) as model:
        text = f"a {tokens[405]} b {beyond[-1]} c"
        assert 405 in model.tokenize(text) and max(model.tokenize(text)) < 410


@pytest.mark.parametrize("place", ["chat template", "end token"])
def test_an_added_token_without_a_row_that_is_needed_is_refused(llama_copy, tmp_path, place):
    edit(llama_copy, "tokenizer.json", add(*((f"<|{i}|>", True) for i in range(10)), ("<|user|>", True)))
    if place == "end token":
        edit(llama_copy, "tokenizer_config.json", lambda j: j.update(eos_token="<|user|>"))
    else:
        (llama_copy / "chat_template.jinja").write_text("<|user|>{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match=r"writes '<\|user\|>' \(410\), .* vocab_size is 410") as refusal:
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")
    assert refusal.value.hint


def test_every_end_token_ends_in_llama_cpp(llama_copy, tmp_path):
    edit(llama_copy, "tokenizer.json", add(("<A>", True), ("<B>", True), ("<C>", True), ("<|im_end|>", True)))
    edit(llama_copy, "generation_config.json", lambda j: j.update(eos_token_id=[1, 400, 403, 401]))
    pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        assert [i for i in range(410) if model.is_end(i)] == [1, 400, 401, 403]
        assert model.info.metadata["tokenizer.ggml.eot_token_id"] == 400
        assert model.info.metadata["tokenizer.ggml.eom_token_id"] == 401
    edit(llama_copy, "generation_config.json", lambda j: j.update(eos_token_id=[1, 400, 401, 402]))
    with pytest.raises(UnsupportedError, match=r"can end at two tokens more than '</s>', got \['<A>', '<B>', '<C>'\]"):
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32", overwrite=True)


def test_an_end_that_llama_cpp_does_not_know_fails_the_check(llama_copy, tmp_path, monkeypatch):
    from pi_gguf.vocabulary import keys as vocabulary

    edit(llama_copy, "tokenizer.json", add(("<A>", True)))
    edit(llama_copy, "generation_config.json", lambda j: j.update(eos_token_id=[1, 400]))
    monkeypatch.setattr(vocabulary, "_ENDS", {*vocabulary._ENDS, "<A>"})
    with pytest.raises(CheckError, match=r"llama\.cpp does not end at token 400"):
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")


def test_special_tokens_are_written_by_name(llama_copy, tmp_path):
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
    edit(llama_copy, "tokenizer.json", add(*((name, False) for name in names), ("<sep>", True)))
    settings = {"sep_token": "<sep>", "pad_token": "</s>", "unk_token": "<s>", "mask_token": "<sep>"}
    edit(llama_copy, "tokenizer_config.json", lambda j: j.update(settings))
    pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    expected = {"bos": 0, "eos": 1, "padding": 1, "unknown": 0, "seperator": 406, "mask": 406}
    expected |= {f"fim_{name}": 400 + i for i, name in enumerate(("pre", "suf", "mid", "pad", "rep", "sep"))}
    found = {key[15:-9]: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert found == expected


def post_processor(single: str, ids: dict[str, int]) -> dict[str, Any]:
    parts = [
        {"SpecialToken": {"id": part, "type_id": 0}} if part in ids else {"Sequence": {"id": "A", "type_id": 0}}
        for part in single.split()
    ]
    special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}


@pytest.mark.parametrize(
    ("single", "template", "begins", "ends", "note"),
    [
        ("A", None, False, False, ""),
        ("<s> A </s>", None, True, True, ""),
        ("<g> <s> A", "<g><s>{{ x }}", False, False, "<g><s> before each text, add_bos_token is false: the chat"),
        ("<g> <s> A", "<g>{{ bos_token }}{{ x }}", False, False, "add_bos_token is false: the chat template"),
        ("<g> <s> A", "{{ x }}", False, False, "<g><s> before each text, add_bos_token is false: write them yourself"),
        ("<g> <s> <g> A", None, False, False, "<g><s><g> before each text"),
        ("<g> A", None, True, False, ""),
        ("<g> A", "{{ bos_token }}{{ x }}", False, False, "<g> before each text"),
        ("<s> A <g>", None, True, False, "<g> behind each text, add_eos_token is false"),
        ("<s> A </s> <g>", None, True, False, "</s><g> behind each text"),
    ],
)  # fmt: skip
def test_what_the_post_processor_adds(single, template, begins, ends, note, llama_copy, tmp_path, capfd):
    edit(llama_copy, "tokenizer.json", add(("<g>", True)))
    edit(llama_copy, "tokenizer.json", lambda j: j.update(post_processor=post_processor(single, IDS)))
    if template:
        (llama_copy / "chat_template.jinja").write_text(template)
    check = check_of(llama_copy, tmp_path / "out.gguf")
    assert not check.strings_different
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is begins and metadata["tokenizer.ggml.add_eos_token"] is ends
    err = capfd.readouterr().err
    assert note in err if note else "cannot put" not in err
    hugging_face = Tokenizer.from_file(str(llama_copy / "tokenizer.json"))
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        ids = model.tokenize("a b")
        assert ids == hugging_face.encode("a b").ids if not note else set(ids) <= set(hugging_face.encode("a b").ids)
    if note:
        with pytest.raises(CheckError, match="tokenizes differently"):
            check_of(llama_copy, tmp_path / "strict.gguf", strict_tokenizer=True)


def test_a_plain_token_that_llama_cpp_takes_for_an_end_is_refused(llama_copy, tmp_path):
    edit(llama_copy, "tokenizer.json", lambda j: j["model"]["vocab"].update({"<eos>": 400}))
    with pytest.raises(UnsupportedError, match=r"\['<eos>'\] are plain tokens"):
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")


# Chat templates, normalizers, what is printed


def test_all_chat_templates_go_in(llama_copy, tmp_path):
    (llama_copy / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (llama_copy / "additional_chat_templates").mkdir()
    (llama_copy / "additional_chat_templates" / "tool_use.jinja").write_text("T {{ messages[0].content }}")
    pi_gguf.convert(str(llama_copy), tmp_path / "files.gguf", quant="F32")
    (llama_copy / "chat_template.jinja").unlink()
    (llama_copy / "additional_chat_templates" / "tool_use.jinja").unlink()
    named = [{"name": "default", "template": "{{ messages[0].content }}!"}]
    named.append({"name": "tool_use", "template": "T {{ messages[0].content }}"})
    edit(llama_copy, "tokenizer_config.json", lambda j: j.update(chat_template=named))
    pi_gguf.convert(str(llama_copy), tmp_path / "list.gguf", quant="F32")
    for name in ("files.gguf", "list.gguf"):
        info = read_gguf(tmp_path / name)
        assert info.metadata["tokenizer.chat_template"] == "{{ messages[0].content }}!"
        assert info.metadata["tokenizer.chat_template.tool_use"] == "T {{ messages[0].content }}"
        assert info.array_lengths["tokenizer.chat_templates"] == 1


def test_the_template_of_a_processor_goes_in_where_the_tokenizer_has_none(llama_copy, tmp_path, capfd):
    edit(llama_copy, "chat_template.json", lambda j: j.update(chat_template="P {{ messages[0].content }}"))
    check_of(llama_copy, tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").metadata["tokenizer.chat_template"] == "P {{ messages[0].content }}"
    assert "with the processor alone, is taken" in capfd.readouterr().err
    (llama_copy / "chat_template.jinja").write_text("T {{ messages[0].content }}")
    check_of(llama_copy, tmp_path / "own.gguf")
    assert read_gguf(tmp_path / "own.gguf").metadata["tokenizer.chat_template"] == "T {{ messages[0].content }}"


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m", "{{ messages | no_such_filter }}"])
def test_a_broken_chat_template_is_refused(template, llama_copy, tmp_path):
    edit(llama_copy, "tokenizer_config.json", lambda j: j.update(chat_template=template))
    with pytest.raises(CheckpointError, match="chat_template 'default' is broken"):
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")


def test_composing_is_said_to_be_left_out_and_any_other_normalizer_is_refused(llama_copy, tmp_path, capfd):
    edit(llama_copy, "tokenizer.json", lambda j: j.update(normalizer={"type": "NFC"}))
    pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")
    err = capfd.readouterr().err
    assert "composes accents (normalizer NFC) and llama.cpp does not" in err
    assert "72 texts tokenized alike" in err  # convert prints how many
    hugging_face = Tokenizer.from_file(str(llama_copy / "tokenizer.json"))
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        assert model.tokenize("e\u0301") != hugging_face.encode("e\u0301").ids  # the difference that the note is about
    both = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    edit(llama_copy, "tokenizer.json", lambda j: j.update(normalizer=both))
    with pytest.raises(UnsupportedError, match="Lowercase"):
        pi_gguf.convert(str(llama_copy), tmp_path / "out2.gguf", quant="F32")
