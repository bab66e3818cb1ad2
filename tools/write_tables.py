"""Write the recorded tables into README.md, between the marks `<!-- table FILE -->` and `<!-- end -->`.

In: `recipes/*/results.json`, as `pi-gguf demo` writes them. Out: README.md with the tables they hold.

Example:
    python tools/write_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pi_gguf.demo import markdown_table

ROOT = Path(__file__).parent.parent


def main() -> None:
    readme = ROOT / "README.md"

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / match[1]).read_text())
        return f"<!-- table {match[1]} -->\n{markdown_table(results)}<!-- end -->"

    text = re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)
    print(f"wrote {readme}")


if __name__ == "__main__":
    main()
