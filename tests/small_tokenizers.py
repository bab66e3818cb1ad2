"""Tokenizers trained on the spot, and the texts and parts that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi_gguf import bundled
from pi_gguf.vocabulary.probes import sample_texts

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


WORDS = {**BYTES, "use_regex": True}


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


QWEN2 = LLAMA3.replace("{1,3}", "")


def train_sentencepiece(path: Path, **settings: Any) -> Path:
    import sentencepiece

    novel = next(iter(bundled.novels("train").values()))[:50_000]
    lines = [line for text in (novel, *sample_texts(500, seed=3)) for line in text.replace("\0", "").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line.strip()), model_prefix=str(path.with_suffix("")),
        hard_vocab_limit=False, minloglevel=2,
        **{"model_type": "unigram", "vocab_size": 1000, "character_coverage": 0.98, **settings},
    )  # fmt: skip
    path.with_suffix(".vocab").unlink()
    return path
