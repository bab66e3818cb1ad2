"""Build the bundled sample of long documents, `pi_gguf/bundled/novels.tar.xz`.

In: a folder of plain-text novels in the public domain. Out: one archive with two folders,
`train/` and `heldout/`; no training text ever comes from a held-out novel.

Example:
    python tools/build_sample.py path/to/novels
"""

from __future__ import annotations

import argparse
import io
import re
import tarfile
from pathlib import Path

HELD_OUT = ("Conrad_Rover_1923", "Galsworthy_Man_1906", "Haggard_Sheallan_1921", "Lee_Albany_1884")
ARCHIVE_PATH = Path(__file__).parent.parent / "pi_gguf" / "bundled" / "novels.tar.xz"


def clean(text: str) -> str:
    """Normalize white space and drop control characters; the words stay as they are."""
    text = text.replace("\r\n", "\n").replace("\u00a0", " ").replace("\t", " ")
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    text = re.sub(r" +", " ", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("novels_dir", type=Path, help="folder of *.txt files, UTF-8")
    novels_dir = parser.parse_args().novels_dir
    with tarfile.open(ARCHIVE_PATH, "w:xz", preset=9) as archive:
        for path in sorted(novels_dir.glob("*.txt")):
            data = clean(path.read_text(encoding="utf-8-sig")).encode()
            split = "heldout" if path.stem in HELD_OUT else "train"
            member = tarfile.TarInfo(f"{split}/{path.name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            print(f"{split}/{path.name}: {len(data)} bytes")
    print(f"wrote {ARCHIVE_PATH} ({ARCHIVE_PATH.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
