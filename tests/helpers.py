"""Small real models made on the spot: random Llamas of odd shapes saved by transformers, with trained tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pi_gguf import bundled

SHARED_MODELS = Path(__file__).parent.parent.parent / "shared" / "assets" / "models"


WINDOW = 64


def make_tokenizer(path: Path, *, digits: bool = True, vocab_size: int = 400) -> None:
    """Save a byte-level BPE tokenizer trained on a little of the sample."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from pi_gguf.vocabulary.byte_level import LLAMA3, QWEN2

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2 if digits else LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    novel = next(iter(bundled.novels("train").values()))
    tokenizer.train_from_iterator([novel[:100_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)


def make_llama(path: Path, *, max_shard_size: str = "1GB", dtype: str = "float32", **config: Any) -> Path:
    """Save a random Llama with grouped heads and a head size that is not hidden / heads; `config` overrides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 410,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    for parameter in model.parameters():  # norms and biases too, so that a lost one shows
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path)
    return path


def make_chat_model(
    path: Path, template: str, special: Iterable[str], bos: str | None, eos: str | None, rstrip: bool = False
) -> Path:
    """Give a model special tokens and a chat template; its vocabulary has 410 tokens, and so many rows it has."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    make_tokenizer(path, vocab_size=400)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, rstrip=rstrip, normalized=False) for name in special])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    saved.chat_template = template
    saved.save_pretrained(path)
    return path


def corpus_of(model: Path, texts: Iterable[str]) -> Any:
    """Tokenize texts with a model's tokenizer, in memory."""
    import numpy as np

    from pi_gguf.checkpoint.checkpoint import load_checkpoint
    from pi_gguf.data.tokens import Corpus, encoder

    documents = encoder(load_checkpoint(str(model)))(list(texts))
    offsets = np.cumsum([0, *map(len, documents)])
    return Corpus(np.concatenate(documents).astype(np.int32), offsets, "texts")


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return type and data of every tensor of a GGUF file."""
    import gguf

    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Return all that is in a folder: bytes of files, targets of links, None for folders."""

    def of(path: Path) -> bytes | str | None:
        return str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {str(p.relative_to(folder)): of(p) for p in sorted(folder.rglob("*"))}


def in_place(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """Write a file with other values in the places of the old ones."""
    from pi_gguf.gguf.header import read_header

    header = read_header(source)
    target.write_bytes(header.changed(changes).to_bytes() + source.read_bytes()[header.data_offset :])
    return target


def change_data(path: Path, name: str, change: Callable[[bytes, int], bytes]) -> None:
    """Change the bytes of one tensor of a file, by a function of them and of how many rows they are."""
    from pi_gguf.gguf.file import read_gguf
    from pi_gguf.gguf.header import read_header

    header = read_header(path)
    place = next(t for t in header.tensors if t.name == name)
    tensor = next(t for t in read_gguf(path).tensors if t.name == name)
    begin = header.data_offset + place.offset
    with path.open("r+b") as file:
        file.seek(begin)
        data = file.read(tensor.nbytes)
        file.seek(begin)
        file.write(change(data, tensor.shape[0]))


def reversed_rows(data: bytes, rows: int) -> bytes:
    size = len(data) // rows
    return b"".join(data[i : i + size] for i in range(0, len(data), size)[::-1])
