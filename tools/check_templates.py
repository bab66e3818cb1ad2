"""Find the answers of a conversation by every chat template in llama.cpp's source, and look at what was found.

In: the templates beside the reference converter of the installed llama-cpp-python, which is fetched where it is not
there. Out: a line for each template: how many of three answers are found in a conversation as it is, with a system
prompt, and with thoughts, or why it is refused. The exit code is 1 if what is found is not the answers.

Example (a quarter of a minute):
    python tools/check_templates.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from compare_with_reference import fetch_reference

from pi_gguf.vocabulary.templates import render_chats

QUESTIONS = ("How long was the ship?", "What was she?", "Did assistants go on board?")
ANSWERS = ("Größe 船 is 12 feet.", "It was\n\na {brig}", "No.")
SPECIAL = re.compile(r"<\|?/?\w+\|?>|<[|｜][^<>]*[|｜]>|\[/?[A-Z_]+\]")
"""What spells out a special token in one of these templates."""


def conversations() -> dict[str, list[dict[str, Any]]]:
    """Return the same three turns, as they are, with a system prompt, and with thoughts before each answer."""
    plain: list[dict[str, Any]] = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        plain += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    thoughts = [{**turn, "reasoning_content": "Let me see."} if turn["role"] == "assistant" else turn for turn in plain]
    return {"plain": plain, "system": [{"role": "system", "content": "Be brief."}, *plain], "thoughts": thoughts}


def check(path: Path) -> tuple[list[str], bool]:
    """Return what is found of each conversation, and whether all of that is answers and nothing else."""
    cells, good = [], True
    chats = [{"messages": turns, "tools": None} for turns in conversations().values()]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for one in render_chats(path.read_text(), chats, tokens, path.name, special=SPECIAL):
        found = [one.text[begin:end] for begin, end in one.spans]
        # what is left out is what came earlier
        for text, answer in zip(reversed(found), reversed(ANSWERS), strict=False):
            good &= answer in text and not any(words in text for words in (*QUESTIONS, "Be brief."))
            good &= not any(other in text for other in ANSWERS if other != answer)
        good &= bool(one.error) or len(found) + one.others == len(ANSWERS)
        cells.append(one.error or str(len(found)))
    return cells, good


def main() -> None:
    wrong = []
    folder = fetch_reference() / "models" / "templates"
    print(f"{'':52} {' | '.join(conversations())}")
    for path in sorted(folder.glob("*.jinja")):
        cells, good = check(path)
        wrong += [] if good else [path.name]
        print(f"{path.name[:52]:52} {' | '.join(cells)}", flush=True)
    if wrong:
        sys.exit(f"error: not the answers: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
