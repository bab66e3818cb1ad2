"""A model that really looks up what it is asked for, and one that is watched while it is asked."""

from __future__ import annotations

import re

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.models.hf import HfTokens

NEEDLE = re.compile(r"The secret number of the (\w+) is (\d{7})\.")


class Reader(HfTokens):
    """Answers what `read` finds in the prompt's text; the bundled model's tokenizer and no weights."""

    def __init__(self, read):
        self.name, self.window, self.read = "reader", 32768, read
        self._tokenizer = load_checkpoint(bundled.TINY, weights=False).load_tokenizer()
        self.asked = []

    def generate(self, ids, max_tokens):
        prompt = self.detokenize(ids)
        assert self.tokenize(prompt) == list(ids), "a server gets the text and must read as many tokens"
        self.asked.append((prompt, len(ids) + max_tokens))
        answer = self.tokenize(self.read(prompt), add_special=False)
        return self.detokenize(answer[:max_tokens])

    def logits_chunks(self, ids, last):
        raise NotImplementedError

    def close(self):
        pass


def look_up(prompt):
    thing = re.search(r"The secret number of the (\w+) is$", prompt)[1]
    (number,) = [number for name, number in NEEDLE.findall(prompt) if name == thing]
    return f" {number}. The pages"


def watched(kind, *arguments, **options):
    """Open a real model that also notes what it answers."""

    class Watched(kind):
        def generate(self, ids, max_tokens):
            answer = super().generate(ids, max_tokens)
            self.answers.append(answer)
            return answer

    lm = Watched(*arguments, **options)
    lm.answers = []
    return lm
