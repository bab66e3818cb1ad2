"""The bundled model and sample texts, so that every command works with no data of the user's own.

`tiny/` is a trained Llama with a window of 2048 tokens, addressed as `bundled:tiny`; `novels.tar.xz` holds
public-domain novels, some of them held out from all training. This module also makes the training
mixture of the bundled model: passages of the novels and recall tasks (see `training_mixture`).

passkey: the wording of the passkey task
"""

from __future__ import annotations

import random
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pi_gguf.bundled.passkey import INTRODUCTION, QUESTION, draw_key, key_sentence

TINY = "bundled:tiny"
TINY_DIR = Path(__file__).parent / "tiny"
NOVELS_PATH = Path(__file__).parent / "novels.tar.xz"

CHARACTERS_PER_TOKEN = 2.7
"""What the tiny model's tokenizer needs for these texts, rounded down so that a document fits its window."""

MOST_KEYS = 4
"""Keys with names in one recall task, at most; a model of this size cannot keep more apart."""

ANSWER = re.compile(r"key\? The (?:pass|\w+) key is( [0-9]{5})\.")
"""A question with its answer, the group, as recall tasks ask it."""

TOKENS_PER_WEIGHT = 256
"""Answers weigh a sequence's tokens by this in the loss: as few are asked for in 8192 tokens as in 512."""

RECALL_SHARE = 0.5
"""Share of the mixture's documents that are recall tasks; the prose inside them counts as recall too."""

THINGS = [
    "garden", "house", "river", "cellar", "tower", "bridge", "chapel", "library", "kitchen", "stable",
    "harbour", "market", "forest", "castle", "mill", "school", "prison", "theatre", "bakery", "orchard",
    "cabin", "lantern", "mirror", "cabinet", "piano", "carriage", "anchor", "basket", "candle", "ladder",
    "saddle", "window", "wardrobe", "barrel", "trunk", "desk", "drawer", "gate", "clock", "vault",
]  # fmt: skip

QUALITIES = [
    "old", "new", "empty", "open", "closed", "quiet", "narrow", "wide", "broken", "hidden", "clean", "dusty", "heavy",
    "small", "large", "round", "wooden", "silver", "painted", "lost", "locked", "warm", "cold", "dark", "bright", "dry",
    "wet", "near",
]  # fmt: skip


@cache
def novels(split: str) -> dict[str, str]:
    """Return the sample's novels by file name.

    Args:
        split: `train` or `heldout`.
    """
    found = {}
    with tarfile.open(NOVELS_PATH) as archive:
        for member in archive:
            folder, _, name = member.name.partition("/")
            stream = archive.extractfile(member)
            if folder == split and stream is not None:
                found[name] = stream.read().decode()
    return found


def passages_with_leads(passages: int = 4, characters: int = 12_000) -> list[tuple[str, str]]:
    """Return passages of the held-out novels without their first sentences, and those sentences.

    Args:
        passages: of each novel, evenly spaced.
        characters: of each.
    """
    found = []
    for text in novels("heldout").values():
        for i in range(passages):
            start = text.find(". ", len(text) * i // passages) + 2
            end = text.find(". ", start + 150) + 1
            found.append((text[end : start + characters].strip(), text[start:end].strip()))
    return found


def next_sentences(items: int = 200, choices: int = 4) -> list[dict[str, Any]]:
    """Return questions of the held-out novels: which of some sentences follows a passage; the others stand elsewhere.

    Returns:
        `context`, some 600 characters, `choices`, each with a space before it, and `label`, the place of the right one.
    """
    rng = random.Random(0)
    texts = [_split_sentences(text) for text in novels("heldout").values()]
    found: list[dict[str, Any]] = []
    while len(found) < items:
        sentences = texts[len(found) % len(texts)]
        at = rng.randrange(20, len(sentences))
        others = [sentences[rng.randrange(len(sentences))] for _ in range(choices - 1)]
        if not all(40 <= len(sentence) <= 160 for sentence in (sentences[at], *others)):
            continue
        label = rng.randrange(choices)
        shown = [f" {sentence}" for sentence in (*others[:label], sentences[at], *others[label:])]
        found.append({"context": " ".join(sentences[at - 20 : at])[-600:], "choices": shown, "label": label})
    return found


def _split_sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part.strip()]


def training_mixture(
    seed: int,
    window_tokens: int,
    far_share: float = 0.6,
    recall_share: float = RECALL_SHARE,
    characters_per_token: float = CHARACTERS_PER_TOKEN,
) -> Iterator[str]:
    """Yield documents of the bundled model's training mixture, without end.

    Passages of the training novels, and recall tasks of all lengths up to the window. The same arguments give the same
    documents.

    Args:
        seed: of the random generator.
        window_tokens: no recall task is meant to be longer than this.
        far_share: share of the recall tasks that fill the window and hide their keys near its start.
        recall_share: share of the documents that are recall tasks.
        characters_per_token: of the tokenizer, no more than it has in these texts, so that a document fits its window.
    """
    rng = random.Random(seed)
    texts = list(novels("train").values())
    while True:
        if rng.random() < recall_share:
            far = far_share > 0 and rng.random() < far_share
            tokens = window_tokens if far else rng.uniform(min(96, window_tokens), window_tokens)
            yield _recall_document(rng, texts, int(tokens * characters_per_token), far)
        else:
            yield _passage(rng, texts, int(rng.uniform(0.5, 2) * window_tokens * characters_per_token))


def _passage(rng: random.Random, texts: list[str], characters: int) -> str:
    """Cut a passage out of one novel, drawn in proportion to its length, starting at a line or sentence."""
    text = rng.choices(texts, weights=[len(t) for t in texts])[0]
    start = rng.randrange(max(1, len(text) - characters))
    start = max(text.find("\n", start, start + 200), text.find(". ", start, start + 200) + 1, start)
    return text[start : start + characters].strip()


def _filler(rng: random.Random, texts: list[str], characters: int) -> list[str]:
    """Return filler lines: running prose, or a few short sentences over and over.

    Half of these say what a thing is, as the key's sentence does: the longer a prompt, the more often something else
    followed on "is".
    """
    if characters <= 0:
        return []
    if rng.random() < 0.5:
        return [line.strip() + "\n" for line in _split_lines(_passage(rng, texts, characters))]
    sentences: list[str] = []
    if rng.random() < 0.5:
        sentences = [f"The {thing} is {rng.choice(QUALITIES)}." for thing in rng.sample(THINGS, 6)]
    while len(sentences) < 3:
        sentences += [s for s in _split_lines(_passage(rng, texts, 1000)) if 8 < len(s) < 60]
    block = " ".join(sentences[: rng.randint(3, 6)]) + "\n"
    return [block] * max(1, characters // len(block))


def _split_lines(text: str) -> list[str]:
    return [s.strip() for s in text.replace(". ", ".\n").split("\n") if s.strip()]


def _recall_document(rng: random.Random, texts: list[str], characters: int, far: bool) -> str:
    """Hide one key, or several with names, in filler and ask for each at the end.

    Keys lie anywhere, or in the first third when they are to be `far` from the end.
    """
    if rng.random() < 0.5 or characters < 400:
        key = draw_key(rng, for_evaluation=False)
        facts = [key_sentence(key)]
        questions = [f"{QUESTION} {key}.\n"]
    else:
        things = rng.sample(THINGS, rng.randint(2, min(MOST_KEYS, characters // 200)))
        keys = {thing: draw_key(rng, for_evaluation=False) for thing in things}
        facts = [f"The {thing} key is {key}. Remember it. {key} is the {thing} key.\n" for thing, key in keys.items()]
        questions = [f"What is the {thing} key? The {thing} key is {key}.\n" for thing, key in keys.items()]
        rng.shuffle(questions)
    introduction = INTRODUCTION if rng.random() < 0.5 else ""
    fixed = len(introduction) + sum(map(len, facts)) + sum(map(len, questions))
    lines = _filler(rng, texts, characters - fixed)
    for fact in facts:
        lines.insert(rng.randint(0, len(lines) // 3 if far else len(lines)), fact)
    return introduction + "".join(lines) + "".join(questions)
