"""What tests of reading share: small models that read, texts of a length, templates, what a progress was told."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from pi_gguf import bundled
from pi_gguf.documents.formats import Document
from pi_gguf.gguf.header import Entry, read_header, write_changed
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.reading import Answer, Reading

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content.split('</think>')[-1] }}\n{% endfor %}[assistant] <think>\n"
)
TRIMMING = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>\n{% endfor %}[assistant]"


def words(count: int, skip: int = 0) -> str:
    """The first words of a novel, after some."""
    novel = next(iter(bundled.novels("train").values()))
    return " ".join(novel.split()[skip : skip + count])


def document(count: int = 400, **changes: Any) -> Document:
    return Document(**{"name": "book.txt", "format": "txt", "text": words(count), **changes})


def with_template(source: Path, target: Path, template: str) -> Path:
    """Write a file with a chat template."""
    write_changed(read_header(source).changed({"tokenizer.chat_template": Entry.of(template)}), target)
    return target


class Told:
    """What a progress was told: tokens read in all, and how many had to be at most."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, read: int, to_read: int, written: int) -> None:
        self.calls.append((read, to_read, written))

    @property
    def most(self) -> int:
        return max((to_read for _, to_read, _ in self.calls), default=0)


def answer(parts: Generator[str, None, Answer]) -> Answer:
    """What an asking returns, with all its text yielded."""
    text = []
    while True:
        try:
            text.append(next(parts))
        except StopIteration as end:
            assert end.value.text == "".join(text)
            return end.value


def last_logits(model: Model, ids: list[int]) -> np.ndarray:
    return np.concatenate(list(model.logits_chunks(ids, 1)))[0]


def after_question(reading: Reading) -> np.ndarray:
    """The logits behind the document and some tokens more."""
    return last_logits(reading.model, [*reading.ids, 50, 60, 70])
