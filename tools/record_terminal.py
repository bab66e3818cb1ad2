"""Record commands in a terminal as a picture: each is run in a pseudo-terminal, what it leaves on the screen is drawn.

In: commands, run one after another in an empty folder. Out: an SVG of text, with whatever font of fixed width is there.

Example:
    python tools/record_terminal.py docs/pictures/terminal.svg \\
        "pi-gguf plan bundled:tiny --context 4096 --quant Q8_0" \\
        "pi-gguf convert bundled:tiny tiny-4k.gguf --context 4096 --quant Q8_0 --steps 120 --train-window 512 \\
--factor-warmup 90 --batch-tokens 4096" "pi-gguf inspect tiny-4k.gguf"
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH, HEIGHT = 110, 200
_CODES = re.compile(r"\x1b\[(?:\?25[lh]|(\d*)([AK]))|(\n)|\r|(\x1b\[[\d;]*m|[^\x1b\r\n]+)")


def screen(output: str) -> list[str]:
    """Return the lines that are left after what was printed over others, colours and the like still in them."""
    lines, row = [""], 0
    for count, move, newline, text in _CODES.findall(output):
        if newline:
            row += 1
            lines += [""] * (row == len(lines))
        elif move == "K":
            lines[row] = ""
        elif move == "A":
            row = max(0, row - int(count or 1))
        else:
            lines[row] += text
    return lines


def run(command: str, folder: str) -> str:
    """Run a command in a pseudo-terminal and return all that it prints.

    Raises:
        SystemExit: the command fails.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    arguments = [sys.executable, "-m", "pi_gguf", *shlex.split(command)[1:]]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    with subprocess.Popen(arguments, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        parts = []
        while part := _read(ours):
            parts.append(part)
    os.close(ours)
    output = b"".join(parts).decode(errors="replace")
    if child.returncode:
        raise SystemExit(f"{command}: exit code {child.returncode}\n{output}")
    return output


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side was closed
        return b""


def draw(commands: list[str], outputs: list[str]) -> str:
    """Return an SVG of commands and what they left on the screen; nothing is fetched when it is shown."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for command, output in zip(commands, outputs, strict=True):
        lines = textwrap.wrap(command, WIDTH - 4, subsequent_indent="    ", break_on_hyphens=False)
        console.print(Text.assemble(("$ ", "green"), (" \\\n".join(lines), "bold")))
        console.print(Text.from_ansi("\n".join(screen(output)).rstrip()), "\n")
    picture = console.export_svg(title="pi-gguf")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    return re.sub(r"Fira Code", "ui-monospace, Menlo, Consolas", picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("commands", nargs="+", help="commands that begin with pi-gguf")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [run(command, folder) for command in given.commands]
    given.out.write_text(draw(given.commands, outputs))
    print(f"wrote {given.out}, {given.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
