"""The tokenizer's part of the check: the same texts tokenized by Hugging Face and by llama.cpp.

In: a checkpoint with its tokenizer, then llama.cpp's tokenizer of the file made from it. Out: what differs, of prose
(which must not) and of special texts (which is counted and shown, or refused where that is asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import Checkpoint, is_panic
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckpointError
from pi_gguf.vocabulary.keys import Surroundings, reference_ids
from pi_gguf.vocabulary.probes import PROSE, special_texts

_MOST_ADDED = 50
"""Added tokens that have texts of their own; some models have thousands that are alike."""

_SHOWN = 3
"""Differences that are shown; the others are counted."""


@dataclass(frozen=True)
class Difference:
    """A text with the ids that llama.cpp and Hugging Face give it."""

    text: str
    ours: list[int]
    theirs: list[int]

    def __str__(self) -> str:
        at = next(
            (i for i, (a, b) in enumerate(zip(self.ours, self.theirs, strict=False)) if a != b),
            min(len(self.ours), len(self.theirs)),
        )
        return (
            f"{self.text[:40]!r} tokenizes differently from token {at} on: "
            f"llama.cpp {self.ours[at : at + 4]}, Hugging Face {self.theirs[at : at + 4]}"
        )


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts with the ids that they have in Hugging Face.

    Args:
        prose: what people write; it must be the same in llama.cpp.
        special: what tells tokenizers apart.
    """

    prose: dict[str, list[int]]
    special: dict[str, list[int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Any, *, strict: bool) -> TokenizedTexts:
        """Tokenize the sample texts, passages of novels, and texts with the added tokens.

        Args:
            checkpoint: the model.
            tokenizer: its tokenizer, opened.
            strict: every text is prose, and is to have what Hugging Face puts around it even where llama.cpp cannot.
        """
        around = None if strict else Surroundings.of(checkpoint, tokenizer)
        passages = [novel[1000:3000].strip() for novel in bundled.novels("heldout").values()]

        def tokenized(texts: list[str]) -> dict[str, list[int]]:
            found = {}
            for text in texts:
                try:
                    found[text] = reference_ids(checkpoint, tokenizer, text, around)
                except BaseException as error:  # two added tokens that strip the same white space: tokenizers gives up
                    if not is_panic(error):
                        raise
            return found

        prose = tokenized([*PROSE, *passages])
        _compare_with_class(checkpoint, tokenizer)
        special = tokenized([*special_texts(), *_with_added_tokens(checkpoint, tokenizer)])
        return cls({**prose, **special}, {}) if strict else cls(prose, special)

    def __len__(self) -> int:
        return len(self.prose) + len(self.special)

    def compare(self, tokenize: Callable[[str], list[int]]) -> tuple[list[Difference], list[Difference]]:
        """Return the differences of prose, and of special texts.

        Args:
            tokenize: llama.cpp's.
        """
        prose, special = (
            [Difference(text, ours, theirs) for text, theirs in texts.items() if (ours := tokenize(text)) != theirs]
            for texts in (self.prose, self.special)
        )
        return prose, special


def said(differences: Sequence[Difference], n_texts: int) -> str:
    """Return a note on special texts that differ, with the shortest of them."""
    shown = sorted(differences, key=lambda difference: len(difference.text))[:_SHOWN]
    return "\n".join(
        (
            f"note: prose is tokenized alike, {len(differences)} of {n_texts} texts are not "
            "(--strict-tokenizer refuses such a file):",
            *(f"  {difference}" for difference in shown),
        )
    )


def _compare_with_class(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """Say where the class that transformers chooses for this model reads its tokenizer.json otherwise."""
    try:
        other = checkpoint.open_tokenizer(by_class=True)
    except CheckpointError:
        return
    text = next((t for t in PROSE if tokenizer(t)["input_ids"] != other(t)["input_ids"]), None)
    if text is not None:
        say(
            f"note: {type(other).__name__} of transformers reads this tokenizer.json otherwise, {text[:40]!r} for one; "
            "the file is taken at its word"
        )


def _with_added_tokens(checkpoint: Checkpoint, tokenizer: Any) -> list[str]:
    """Return texts with added tokens inside; none for a bare SentencePiece model, which reads them as plain text."""
    if checkpoint.bare_sentencepiece:
        return []
    added = sorted(
        tokenizer.added_tokens_decoder.values(),
        key=lambda token: not (token.lstrip or token.rstrip or token.single_word or token.normalized),
    )
    return [
        text
        for token in added[:_MOST_ADDED]
        for text in (f"one {token.content} two{token.content}three", f"{token.content}  one  {token.content}\ntwo")
    ]
