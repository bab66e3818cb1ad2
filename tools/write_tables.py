"""Write the recorded tables into README.md, between the marks `<!-- table FILE -->` and `<!-- end -->`.

In: `recipes/*/results.json`, as `pi-gguf demo` writes them, and `benchmarks/*.json`. Out: README.md with their tables.

Example:
    python tools/write_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pi_gguf.demo import table_cells
from pi_gguf.tables import markdown_table

ROOT = Path(__file__).parent.parent


def benchmark_table(record: dict[str, Any]) -> str:
    """Return the medians of a benchmark, and each of ours by the peer's."""
    lines = ["| | seconds | peak memory, MiB |", "| --- | ---: | ---: |"]
    for name, median in record["medians"].items():
        ratio = {key: record["ratios"].get(f"{name.removesuffix(', pi-gguf')}, {key}") for key in median}
        cells = [
            f"{median[key]:,.1f}" if key == "seconds" else f"{median[key]:,.0f}" for key in ("seconds", "peak_mib")
        ]
        if name.endswith("pi-gguf"):
            cells = [f"{cell} ({ratio[key]:.2f} x)" for cell, key in zip(cells, ("seconds", "peak_mib"), strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def methods_table(record: dict[str, Any]) -> str:
    """Return the ways to spend the same tokens, one row each."""
    windows = [str(window) for window in next(iter(record["rows"].values()))["perplexity"]]
    header = [
        "",
        *(f"perplexity at {window}" for window in windows),
        "k_max",
        "passkeys",
        "seconds",
        "peak memory, MiB",
    ]
    rows = [
        [
            name, *(f"{row['perplexity'][window]:.1f}" for window in windows), str(row["k_max"]),
            f"{row['passkeys_found']:.0%}", f"{row['seconds']:,.0f}", f"{row['peak_mib']:,}",
        ]
        for name, row in record["rows"].items()
    ]  # fmt: skip
    return markdown_table(header, rows)


def with_tables(text: str) -> str:
    """Return a text with what lies between its marks made anew."""

    def table(match: re.Match[str]) -> str:
        record = json.loads((ROOT / match[1]).read_text())
        if "settings" in record and "original_window" in record["settings"]:
            made = methods_table(record)
        else:
            made = benchmark_table(record) if "medians" in record else markdown_table(*table_cells(record))
        return f"<!-- table {match[1]} -->\n{made}<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    print(f"wrote {readme}")


if __name__ == "__main__":
    main()
