"""Tables for people, on standard output and in Markdown."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Draw a table; with `numbers` every column but the first is aligned to the right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", show_header=bool(columns))
    for i in range(len(rows[0])):
        table.add_column(columns[i] if columns else "", justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    drawn = io.StringIO()
    terminal = sys.stdout.isatty()
    Console(file=drawn, force_terminal=terminal, width=None if terminal else 120).print(table)
    return drawn.getvalue().rstrip()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; every column but the first is aligned to the right where columns have names."""
    aligned = ["---", *(["---:"] * (len(columns) - 1) if any(columns) else ["---"] * (len(columns) - 1))]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (columns, aligned, *rows))
