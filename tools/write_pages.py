"""Write docs/models.md, and the tree of docs/architecture.md between its marks.

In: the families, and the docstrings of the packages and files of `pi_gguf`. Out: pages that say what they do.

Example:
    python tools/write_pages.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pi_gguf.common.tables import markdown_table
from pi_gguf.families import FAMILIES

ROOT = Path(__file__).parent.parent
MODELS, ARCHITECTURE = ROOT / "docs" / "models.md", ROOT / "docs" / "architecture.md"


def models() -> str:
    """Return the page of models."""
    rows = [
        [f"`{f.model_type}`", f.models, f"`{f.arch}`", "no: ALiBi" if f.alibi else "yes"] for f in FAMILIES.values()
    ]
    header = ["model_type in config.json", "models", "GGUF architecture", "Position Interpolation"]
    table = markdown_table(header, rows).replace("---:", "---")
    return (
        "# Models: which families are converted\n\n"
        f"{len(rows)} families, as `pi-gguf models` lists them; this page is made by `python tools/write_pages.py`.\n"
        "What of them llama.cpp cannot run is an error that names the field ([limits](convert.md#limits)).\n\n"
        f"{table}"
    )


def tree() -> str:
    """Return every package with its files, in the words of their docstrings."""
    parts = []
    for path in sorted((ROOT / "pi_gguf").rglob("__init__.py")):
        folder, text = path.parent, _docstring(path)
        rows = [[f"`{file.name}`", _about(file, text)] for file in sorted(folder.glob("*.py")) if file != path]
        parts.append(f"### {folder.relative_to(ROOT)}\n\n{_first(text)}\n")
        parts += [markdown_table(["file", "what it is about"], rows).replace("---:", "---")] if rows else []
    return "\n".join(parts)


def architecture(text: str) -> str:
    """Return the page of the architecture with its tree made anew."""
    return re.sub(
        r"<!-- tree -->.*<!-- end -->", lambda _: f"<!-- tree -->\n\n{tree()}\n<!-- end -->", text, flags=re.DOTALL
    )


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _about(file: Path, package: str) -> str:
    """Return what the package's docstring says of a file in the line that begins with its name, or else its own."""
    named = re.search(rf"^\W*{file.stem}(?:\.py)?`?(?:: | {{2,}}| - )(.+)", package, re.MULTILINE)
    return (named[1] if named else _first(_docstring(file))).strip()


def _first(text: str) -> str:
    """Return the first sentence of a docstring."""
    return " ".join(re.split(r"(?<=[.:])\s*\n|\n\n", text, maxsplit=1)[0].split())


def main() -> None:
    MODELS.write_text(models())
    ARCHITECTURE.write_text(architecture(ARCHITECTURE.read_text()))
    print(f"wrote {MODELS} and {ARCHITECTURE}")


if __name__ == "__main__":
    main()
