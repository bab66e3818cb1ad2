"""Write docs/options.md: every option of extend, convert, plan and the suites by concern, from their definitions.

Example:
    python tools/write_options.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from pi_gguf.common.options import flag, hints
from pi_gguf.pipeline.options import GROUPS

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
TAKEN = {
    "Fine-tune": "`extend`, `convert`, `plan`", "Several processes": "`extend`, `plan`", "File": "`convert`",
    "Proof": "`convert`", "Model": "the suites of `eval` that open a model; tokenizer of those that ask a server, too",
    "Measurement": "the suites of `eval`, each as far as it has a use for them",
}  # fmt: skip


def page() -> str:
    """Return the page."""
    lines = [
        "# Options of a fine-tune, a file, its proof and its evaluation",
        "",
        "Made by `python tools/write_options.py` from the `options` of each package. In Python they are keywords of",
        "the same name with underscores:",
        '`pi_gguf.convert("model", "out.gguf", context=32768, train_window=2048)`.',
        "",
    ]
    for group in GROUPS:
        lines += [f"## {group.title}", "", f"Of {TAKEN[group.title]}.", ""]
        kinds = hints(group)
        for one in fields(group):
            kind = str(getattr(kinds[one.name], "__name__", kinds[one.name])).replace("collections.abc.", "")
            default = "" if one.default in (None, (), False) else f", {one.default!r} when left out"
            lines.append(f"- `--{flag(one.name)}` ({kind.replace(' | None', '')}{default}): {one.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
