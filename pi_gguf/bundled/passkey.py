"""The passkey task: a five-digit key hidden in filler text and asked for at the end.

One place for its wording, so that what is trained on and what is measured stay comparable and apart:
evaluation keys and the evaluation filler appear in no training text of ours.

Source: Mohtashami & Jaggi 2023, arXiv 2305.16300; protocol of k_max in arXiv 2306.15595, section 3.3.
"""

from __future__ import annotations

import random

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
EVALUATION_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
QUESTION = "What is the pass key? The pass key is"


def key_sentence(key: str) -> str:
    """Return the line that hides `key` in the text."""
    return f"The pass key is {key}. Remember it. {key} is the pass key.\n"


def is_evaluation_key(key: str) -> bool:
    """Tell whether `key` is set apart for evaluation: one five-digit number in seven is."""
    return int(key) % 7 == 3


def draw_key(rng: random.Random, *, for_evaluation: bool) -> str:
    """Draw a five-digit key, 10000 to 99999, from the evaluation keys or from the others."""
    while True:
        key = str(rng.randint(10000, 99999))
        if is_evaluation_key(key) == for_evaluation:
            return key
