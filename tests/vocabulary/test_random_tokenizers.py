"""Random tokenizers of each kind, with random added tokens: alike on prose in llama.cpp, or refused with a way out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import BYTES, FLAGS, LLAMA3, QWEN2, WORDS, split, train_sentencepiece
from tokenizers import Tokenizer, pre_tokenizers, trainers

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import CheckpointError
from pi_gguf.gguf.file import write_header
from pi_gguf.vocabulary.keys import gguf_vocabulary
from pi_gguf.vocabulary.token_check import TokenizedTexts

ROWS = 900
PIECES = (
    "<tool>",
    "<|im_start|>",
    "[INST]",
    "<a",
    "<a>",
    "[gMASK]",
    "\n\n",
    "  ",
    "▁▁",
    "123",
    "é",
    "ship",
    "he",
    "a b",
    " x",
    "x ",
)
CONFIG = {
    "model_type": "llama", "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NOVELS = list(bundled.novels("train").values())


def prose(source: random.Random) -> list[str]:
    """Stretches of novels that the check does not read."""
    found = []
    for _ in range(12):
        novel = source.choice(NOVELS)
        start = source.randrange(100_000, len(novel) - 1000)
        found.append(novel[start : start + 400].strip())
    return found


def bpe(special: list[str], alphabet: list[str], pre: Any, text: str) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "pre_tokenizer": pre, "model": model}))
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    parsed["added_tokens"] = parsed["added_tokens"][:3]
    return parsed


SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(source: random.Random) -> dict[str, Any]:
    parts = source.choice(([WORDS], [split(QWEN2), BYTES], [split(LLAMA3), BYTES]))
    pre = {"type": "Sequence", "pretokenizers": parts}
    return bpe(SPECIAL, pre_tokenizers.ByteLevel.alphabet(), pre, source.choice(NOVELS)[:20_000])


def sentencepiece_bpe(source: random.Random) -> dict[str, Any]:
    """Llama's kind: every way to cut a token in two is a merge, as transformers makes them."""
    text = "\n".join("▁" + line.replace(" ", "▁") for line in source.choice(NOVELS)[:20_000].split("\n"))
    parsed = bpe([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], [], None, text)
    model = parsed["model"]
    model |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    if source.random() < 0.8:
        rank = {"".join(merge): i for i, merge in enumerate(model["merges"])}
        cuts = ([token[:i], token[i:]] for token in rank for i in range(1, len(token)))
        known = [cut for cut in cuts if cut[0] in model["vocab"] and cut[1] in model["vocab"]]
        model["merges"] = sorted(known, key=lambda cut: rank["".join(cut)])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": source.random() < 0.2}
    normalizer, pre = source.choice(
        (
            ([{"type": "Prepend", "prepend": "▁"}, spaces], None),
            ([spaces], None),
            ([{"type": "NFKC"}, spaces], None),
            ([], {**metaspace, "prepend_scheme": "first"}),
            ([], {**metaspace, "prepend_scheme": "always"}),
            ([], {**metaspace, "prepend_scheme": "never"}),
            ([spaces], {**metaspace, "prepend_scheme": "first"}),
        )
    )
    parsed["normalizer"] = {"type": "Sequence", "normalizers": normalizer} if normalizer else None
    parsed["pre_tokenizer"] = pre
    return parsed


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> list[list[Any]]:
    """The vocabulary of a Unigram model."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    path = train_sentencepiece(tmp_path_factory.mktemp("unigram") / "m.model", normalization_rule_name="identity")
    model.ParseFromString(path.read_bytes())
    return [[piece.piece, piece.score] for piece in model.pieces][:700]


def unigram(source: random.Random, pieces: list[list[Any]]) -> dict[str, Any]:
    scheme = source.choice(("always", "first", "never"))
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, "special": True, **FLAGS} for i, t in enumerate(SPECIAL)],
        "normalizer": source.choice((None, None, {"type": "Lowercase"})),
        "pre_tokenizer": {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": source.random() < 0.5,
        },
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": source.random() < 0.1, "vocab": pieces},
    }  # fmt: skip


def add_tokens(source: random.Random, parsed: dict[str, Any]) -> None:
    for i, content in enumerate(source.sample(PIECES, source.randint(0, 4))):
        flags = {flag: source.random() < 0.25 for flag in FLAGS}
        parsed["added_tokens"].append({"id": 800 + i, "content": content, "special": source.random() < 0.5, **flags})


def llama_cpp_tokenizer(path: Path, keys: dict[str, Any]) -> Any:
    from pi_gguf.llamacpp.library import llama_cpp_library

    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64}
    sizes |= {"attention.head_count": 4, "vocab_size": ROWS}
    shape = {f"llama.{name}": value for name, value in sizes.items()} | {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    write_header(path, "llama", {**shape, **keys}, [])
    return llama_cpp_library().Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece BPE", "Unigram"])
def test_a_random_tokenizer_is_alike_on_prose_or_refused(kind, pieces, tmp_path, record_property, n=25, seed=0):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    counted: Counter[str] = Counter()
    for i in range(n):
        source = random.Random(f"{kind} {seed} {i}")
        parsed = unigram(source, pieces) if kind == "Unigram" else MAKERS[kind](source)
        add_tokens(source, parsed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
        try:
            checkpoint = load_checkpoint(str(tmp_path), weights=False)
            tokenizer = checkpoint.load_tokenizer()
            keys = gguf_vocabulary(checkpoint, tokenizer)
        except CheckpointError as error:
            assert error.exit_code in (3, 4) and error.hint, error
            counted["refused"] += 1
            continue
        texts = TokenizedTexts.of(checkpoint, tokenizer, strict=False)
        model = llama_cpp_tokenizer(tmp_path / "v.gguf", keys)
        try:

            def tokenize(text: str, model: Any = model) -> list[int]:
                return list(model.tokenize(text.encode(), add_bos=True, special=True))

            different, special = texts.compare(tokenize)
            counted["fails the check" if different else "counted" if special else "alike"] += 1
            if not different:
                reference = Tokenizer.from_str(json.dumps(parsed))
                for text in prose(source):
                    assert tokenize(text) == reference.encode(text).ids, (i, parsed["added_tokens"][3:], text)
        finally:
            model.close()
    record_property("counted", dict(counted))
    assert counted["alike"] and counted["counted"] and len(counted) > 2, counted


MAKERS = {"byte-level": byte_level, "SentencePiece BPE": sentencepiece_bpe}
