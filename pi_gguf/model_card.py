"""A model card for a GGUF file, as Hugging Face reads it: what the file states, and what was measured on it.

In: a file. Out: Markdown. Nothing is said that does not stand in the file.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.certificate import Certificate
from pi_gguf.files import check_writable, human_bytes, replace_when_complete
from pi_gguf.gguf_file import read_gguf
from pi_gguf.gguf_header import read_header
from pi_gguf.rope import RopeScaling
from pi_gguf.tables import markdown_table


@dataclass(frozen=True)
class Card:
    """A card and where it was written; None where it was not."""

    text: str
    path: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def card(
    file: str | Path, *, out: str | None = None, overwrite: bool = False, seed: int = 0, device: str = "cpu"
) -> Card:
    """Write a Hugging Face model card for a GGUF file, with the figures of its certificate.

    Args:
        file: GGUF file; certified, or the card says that it is not.
        out: file to write, such as README.md; printed when left out.
        overwrite: replace the file that is there.
        seed: taken like everywhere; nothing is random here.
        device: taken like everywhere; only metadata are read.

    Example:
        pi-gguf card my-llama-32k.gguf --out README.md
    """
    path = Path(file)
    if out is not None:
        check_writable(Path(out), overwrite)
    info, header = read_gguf(path), read_header(path)
    text = _text(path, info.metadata, info.rope, info.arch, info.quantization, Certificate.read(header))
    if out is not None:
        with replace_when_complete(Path(out)) as partial:
            partial.write_text(text, encoding="utf-8")
    return Card(text, out)


def _text(
    path: Path,
    metadata: dict[str, Any],
    rope: RopeScaling,
    arch: str,
    quantization: str,
    certificate: Certificate | None,
) -> str:
    source = str(metadata.get("general.source.repository", ""))
    name = metadata.get("general.name", path.stem)
    window, original = rope.max_position_embeddings, rope.original_max_position_embeddings
    facts = [
        ["architecture", arch],
        ["quantization", f"{quantization}, {human_bytes(path.stat().st_size)}"],
        ["window", f"{window:,} tokens" + (f", {original:,} before it was extended" if rope.is_extended else "")],
    ]
    if rope.is_extended:
        facts.append(["rope scaling", f"{rope.rope_type}, factor {rope.factor:g}"])
    for key, what in (("general.description", "made by"), ("general.pi_gguf.versions", "versions")):
        if key in metadata:
            facts.append([what, str(metadata[key])])
    lines = ["---", "library_name: gguf", "tags: [gguf, llama.cpp, long-context, position-interpolation]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        lines.append(f"base_model: {source}")
    if "general.license" in metadata:
        lines.append(f"license: {metadata['general.license']}")
    lines += ["---", "", f"# {_escaped(name)}, {quantization}, {window:,} tokens", ""]
    lines += [markdown_table(["", ""], [[what, _escaped(value)] for what, value in facts])]
    lines += ["## Measured on this file", ""]
    if certificate is None:
        lines += [f"Nothing: it has no certificate (`pi-gguf certify {path.name}`).", ""]
    else:
        lines += [markdown_table(["", ""], [[what, _escaped(value)] for what, value in certificate.rows()])]
        lines += [
            "Perplexity is on the same stretches of the text at each window. ppl_ratio is perplexity at the window by "
            "the reference's at its original one; k_max the largest distance, in tokens, at which at least 20 % of "
            "hidden passkeys are found. The figures stand in the file's header: `pi-gguf inspect`.",
            "",
        ]
    lines += ["## Run", "", "```", f"pi-gguf run {path.name} < long-document.txt", "```", ""]
    lines += [f"Or in llama.cpp, with the whole window: `llama-cli -m {path.name} -c {window}`.", ""]
    return "\n".join(lines)


def _escaped(text: Any) -> str:
    """Return text for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|")
