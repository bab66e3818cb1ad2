"""Damaged tokenizer files: whatever stands in a field, two lines and an exit code."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import CheckpointError
from pi_gguf.vocabulary.keys import file_name, gguf_vocabulary
from pi_gguf.vocabulary.token_check import TokenizedTexts

WRONG: tuple[Any, ...] = (
    5, -1, None, True, 1.5, 10**30, "", "x", "a\0b", "\ud800", "x" * 1000, [], [None], ["a", {}], {}, {"a": 1},
    {"content": None},
)  # fmt: skip
SETTINGS = (
    "model_max_length", "bos_token", "eos_token", "pad_token", "added_tokens_decoder", "extra_special_tokens",
    "padding_side", "additional_special_tokens", "tokenizer_class", "add_bos_token", "add_eos_token", "auto_map",
    "add_prefix_space", "legacy",
)  # fmt: skip
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the ways to a few values of a JSON document: of long lists and vocabularies the first ones only."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, part in items[:12]:
        yield (*at, key)
        yield from places(part, (*at, key))


def damage(path: Path, source: random.Random) -> str:
    """Put something wrong in one place of a file; return what."""
    parsed = json.loads(path.read_text()) if path.exists() else {"bos_token": "<s>", "eos_token": "</s>"}
    way = source.choice(list(places(parsed)))
    if path.name == "tokenizer_config.json" and source.random() < 0.5:
        way = (source.choice(SETTINGS),)
    holder = parsed
    for key in way[:-1]:
        holder = holder[key]
    wrong = source.choice(WRONG)
    if source.random() < 0.2 and way[-1] in (holder if isinstance(holder, dict) else range(len(holder))):
        del holder[way[-1]]
    else:
        holder[way[-1]] = wrong
    path.write_text(json.dumps(parsed))
    return f"{path.name} {way} {wrong!r:.60}"


def test_a_damaged_tokenizer_is_read_or_refused_with_a_way_out(llama, tmp_path, n=120, seed=0):
    refused = 0
    for i in range(n):
        source = random.Random(f"{seed} {i}")
        folder = tmp_path / "model"
        shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        what = damage(folder / source.choice(FILES), source)
        try:
            checkpoint = load_checkpoint(str(folder), weights=False)
            tokenizer = checkpoint.load_tokenizer()
            keys = gguf_vocabulary(checkpoint, tokenizer)
            assert len({token.encode() for token in keys["tokenizer.ggml.tokens"]}) == checkpoint.vocab_size, what
            file_name("phi3", tokenizer)
            TokenizedTexts.of(checkpoint, tokenizer, strict=source.random() < 0.5)
        except CheckpointError as error:
            assert error.hint and "\n" not in str(error), what
            refused += 1
        shutil.rmtree(folder)
    assert n // 5 < refused < n


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("generation_config.json", {"eos_token_id": [["a"], {}]}),
        ("generation_config.json", {"eos_token_id": "1"}),
        ("tokenizer.json", {"added_tokens": [{"id": 10**9, "content": "<far>", "special": True}]}),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}),
    ],
)  # fmt: skip
def test_the_command_ends_with_two_lines_or_a_file(name, change, llama_copy, tmp_path, cli):
    path = llama_copy / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **change}))
    code, _, err = cli("convert", llama_copy, tmp_path / "out.gguf", "--quant", "F32", "--no-certify")
    if name == "tokenizer_config.json":
        assert code == 0
    else:
        assert code in (3, 4) and [line.partition(":")[0] for line in err.splitlines()[-2:]] == ["error", "hint"], err
