"""Write docs/models.md, the tree of docs/architecture.md and the table of docs/run.md between their marks.

In: the families, the docstrings of the packages and files of `pi_gguf`, and what `plan` says of known shapes. Out:
pages that say what they do.

Example:
    python tools/write_pages.py
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
from pathlib import Path

from pi_gguf.common.tables import markdown_table
from pi_gguf.families import FAMILIES
from pi_gguf.pipeline.plan import plan

ROOT = Path(__file__).parent.parent
MODELS, ARCHITECTURE, RUN = (ROOT / "docs" / f"{name}.md" for name in ("models", "architecture", "run"))

_SHAPES = {
    "SmolLM2 135M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "Llama 2 13B": (5120, 13824, 40, 40, 40, 128, 32000, False),
    "Llama 3.3 70B": (8192, 28672, 80, 64, 8, 128, 128256, False),
}
"""Models that people know: width, inner width, layers, heads, heads of keys and values, elements of a head, vocabulary,
and whether the embedding is the output matrix."""

_WINDOW = 32768

_MACHINES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""GiB of memory that machines have."""

_OTHERS = 2 * 2**30
"""Bytes of a machine that are left to everything else."""


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


def fits(text: str) -> str:
    """Return the page of running with its table made anew: what `plan` says of models that people know."""
    rows = []
    for name, (width, inner, layers, heads, kv_heads, head, vocabulary, tied) in _SHAPES.items():
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "head_dim": head,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
            "max_position_embeddings": _WINDOW, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            planned = plan(folder, quant="Q4_K_M", device="cpu")
        exact, small = planned.kv_cache_bytes["f16"], planned.kv_cache_bytes["q8_0"]
        sizes = (exact, (exact + small) // 2, small)
        machine = [_machine(planned.output_bytes + size) for size in (exact, small)]
        rows.append([name, *(f"{size / 2**30:.1f}" for size in (planned.output_bytes, *sizes)), *machine])
    header = ["GiB", "file, Q4_K_M", "cache in f16", "K in q8_0", "K and V in q8_0", "machine, f16", "q8_0"]
    return re.sub(
        r"<!-- fits -->.*<!-- end -->",
        lambda _: f"<!-- fits -->\n{markdown_table(header, rows)}<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def _machine(need: int) -> str:
    """Return the smallest memory, in GiB, that holds so many bytes beside everything else."""
    return next((str(size) for size in _MACHINES if need + _OTHERS <= size * 2**30), f"above {_MACHINES[-1]}")


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
    RUN.write_text(fits(RUN.read_text()))
    print(f"wrote {MODELS}, {ARCHITECTURE} and {RUN}")


if __name__ == "__main__":
    main()
