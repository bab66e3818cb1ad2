"""Tokenizers: real ones and odd ones give in llama.cpp the ids that they give in Hugging Face."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import SHARED_MODELS, make_llama, make_tokenizer

import pi_gguf
from pi_gguf.gguf.file import read_gguf

TOKENIZERS = SHARED_MODELS.parent / "tokenizers"


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="needs real tokenizers in ../shared/assets/tokenizers")
@pytest.mark.parametrize(
    ("name", "rows", "compared"),
    [
        ("pythia.tokenizer.json", 50304, 120),
        ("gpt-neox-20b.tokenizer.json", 50432, 124),
        ("mistral_v1.tokenizer.model", 32000, 68),
    ],
)
def test_a_real_tokenizer_gives_the_same_ids(name, rows, compared, tmp_path):
    folder = make_llama(tmp_path / "model", vocab_size=rows, hidden_size=32)
    for path in folder.glob("*token*"):
        path.unlink()
    shutil.copyfile(TOKENIZERS / name, folder / f"tokenizer.{name.rpartition('.')[2]}")
    result = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F16")
    assert result.checks[0].strings_compared == compared
    assert not result.checks[0].strings_different
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is name.endswith(".model")


def test_the_file_decides_and_not_the_class_that_model_type_names(tmp_path, capfd):
    """transformers 5 opens a Qwen 2 with Qwen's own pre-tokenizer and a padding token, whatever tokenizer.json says."""
    from small_families import make_model

    folder = make_model(tmp_path / "model", "qwen2", {})
    make_tokenizer(folder, digits=False)
    parsed = json.loads((folder / "tokenizer.json").read_text())
    for token in ("12", "123"):  # so that groups of digits matter
        parsed["model"]["vocab"][token] = len(parsed["model"]["vocab"])
    parsed["model"]["merges"] += [["1", "2"], ["12", "3"]]
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    result = pi_gguf.convert(str(folder), tmp_path / "out.gguf", quant="F32")
    assert result.checks[0].kl_divergence < 1e-6
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "smaug-bpe"
    assert "tokenizer.ggml.padding_token_id" not in metadata
    assert "note: Qwen2Tokenizer of transformers reads this tokenizer.json otherwise" in capfd.readouterr().err


def test_a_fine_tune_with_added_tokens_still_converts(llama_copy: Path, tmp_path):
    parsed = json.loads((llama_copy / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parsed["added_tokens"] += [
        {"id": 400, "content": "<|im_start|>", "special": True, **flags},
        {"id": 401, "content": "<tool>", "special": False, **flags},
    ]
    (llama_copy / "tokenizer.json").write_text(json.dumps(parsed))
    result = pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F32")
    assert result.checks[0].strings_compared == 76  # two for each added token more
    with pi_gguf.open(tmp_path / "out.gguf") as model:
        assert 401 in model.tokenize("a <tool> b")
