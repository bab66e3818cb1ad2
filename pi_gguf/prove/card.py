"""A model card for a GGUF file, as Hugging Face reads it: what the file states, and what was measured on it.

In: a file, and the report of an evaluation if there is one. Out: Markdown, with pictures beside it. Nothing is said
that does not stand in them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pi_gguf.common.files import check_writable, human_bytes, open_plain, write_text, writes
from pi_gguf.common.tables import markdown_table
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.report import (
    divergence_table,
    draw_divergences,
    draw_passkeys,
    draw_perplexity,
    passkey_table,
    perplexity_table,
    short_table,
)
from pi_gguf.gguf.certificate import Certificate
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import read_header, tensors_sha256
from pi_gguf.measure.results import PageReport
from pi_gguf.scaling.rope import RopeScaling

_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What JSON lets stand and YAML does not, or breaks lines at."""


@dataclass(frozen=True)
class Card:
    """A card and where it was written; None where it was not."""

    text: str
    path: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@writes("out")
def card(
    file: str | Path,
    *,
    report: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> Card:
    """Write a Hugging Face model card for a GGUF file: the figures of its certificate, tables and plots of a report.

    Args:
        file: GGUF file; certified, or the card says that it is not.
        report: folder that eval report wrote, with this file among its models.
        out: file to write, such as README.md, with the report's plots beside it; printed when left out.
        overwrite: replace files that are there.

    Example:
        pi-gguf card my-llama-32k.gguf --report report --out README.md
    """
    path = Path(file)
    info, header = read_gguf(path), read_header(path)
    plots: dict[str, Callable[[Path], None]] = {}
    tables: list[str] = []
    if report is not None:
        measured = _read_report(Path(report))
        _check_measured(measured, path)
        plots = _plots(measured, path.stem)
        tables = _tables(measured, [*plots])
    if out is not None:
        for name in (Path(out).name, *plots):
            check_writable(Path(out).with_name(name), overwrite)
    text = _text(path, info.metadata, info.rope, info.arch, info.quantization, Certificate.read(header), tables)
    if out is not None:
        for name, draw in plots.items():
            draw(Path(out).with_name(name))
        write_text(Path(out), text)
    return Card(text, out)


def _read_report(folder: Path) -> PageReport:
    """Read what eval report measured.

    Raises:
        OptionError: there is none.
    """
    path = folder / "report.json"
    try:
        with open_plain(path) as file:
            return PageReport.from_json(json.loads(file.read()))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise OptionError(f"{path}: no report of an evaluation ({said})", "pi-gguf eval report writes one") from error


def _check_measured(report: PageReport, file: Path) -> None:
    """Check that a file is in a report, by its tensors, whatever its name is now.

    Raises:
        OptionError: it is not.
    """
    if tensors_sha256(file) not in report.files.values():
        told = ", ".join(report.files) or "no GGUF file"
        raise OptionError(
            f"{file}: is not what was measured in {Path(report.path).parent} ({told})",
            "pi-gguf eval report measures it",
        )


def _plots(report: PageReport, stem: str) -> dict[str, Callable[[Path], None]]:
    """Return the names of the plots, and what draws each to a path."""
    found: dict[str, Callable[[Path], None]] = {
        f"{stem}-perplexity.png": lambda path: draw_perplexity(report, path),
        f"{stem}-passkeys.png": lambda path: draw_passkeys(report, path),
    }
    if report.divergences:
        found[f"{stem}-divergence.png"] = lambda path: draw_divergences(report, path)
    return found


def _tables(report: PageReport, plots: list[str]) -> list[str]:
    """Return what stands under the report's heading, in Markdown."""
    sections = [
        ("Perplexity by window, in tokens", perplexity_table(report.perplexity)),
        ("Passkeys: the largest distance up to which a fifth is found at each (k_max), and the share found by distance",
         passkey_table(report)),
    ]  # fmt: skip
    if report.divergences:
        against = Path(report.divergences[0].against).name
        sections.append((f"KL divergence from {against} in nats, by position", divergence_table(report.divergences)))
    lines = ["## Measured beside its base", ""]
    for (title, (header, *rows)), plot in zip(sections, plots, strict=True):
        cells = [[_escaped(cell) for cell in row] for row in rows]
        lines += [f"{title}:", "", markdown_table(header, cells), f"![{title}]({quote(plot)})", ""]
    if report.short:
        header, *rows = short_table(report.short)
        lines += [
            "Short tasks, percent:",
            "",
            markdown_table(header, [[_escaped(cell) for cell in row] for row in rows]),
        ]
    made = report.provenance
    return [*lines, f"By pi-gguf {made.get('pi_gguf')} (`pi-gguf eval report`, seed {made.get('seed')}).", ""]


def _text(
    path: Path,
    metadata: dict[str, Any],
    rope: RopeScaling,
    arch: str,
    quantization: str,
    certificate: Certificate | None,
    tables: list[str],
) -> str:
    file = shlex.quote(re.sub(r"[\s`]+", " ", path.name))
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
        lines.append(f"base_model: {_yaml(source)}")
    if "general.license" in metadata:
        lines.append(f"license: {_yaml(metadata['general.license'])}")
    lines += ["---", "", f"# {_escaped(name)}, {quantization}, {window:,} tokens", ""]
    lines += [markdown_table(["", ""], [[what, _escaped(value)] for what, value in facts])]
    if certificate is not None:
        lines += ["## Measured on this file", ""]
        lines += [markdown_table(["", ""], [[what, _escaped(value)] for what, value in certificate.rows()])]
        lines += [
            "Perplexity is on the same stretches of the text at each window. ppl_ratio is perplexity at the window by "
            "the reference's at its original one; k_max the largest distance, in tokens, up to which at least "
            "20 % of hidden passkeys are found at each. The figures stand in the file's header: `pi-gguf inspect`.",
            "",
        ]
    elif not tables:
        lines += ["## Not measured", "", f"It has no certificate: `pi-gguf certify {file}` measures it.", ""]
    lines += [*tables, "## Run", "", "```", f"pi-gguf run {file} < long-document.txt", "```", ""]
    lines += [f"Or in llama.cpp, with the whole window: `llama-cli -m {file} -c {window}`.", ""]
    return "\n".join(lines)


def _escaped(text: Any) -> str:
    """Return text for a cell of a Markdown table or a title: one line, and no markup of HTML."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;")


def _yaml(value: Any) -> str:
    """Return a value as YAML's front matter takes it, which reads JSON: whatever it holds, it stays one value."""
    text = json.dumps(value if isinstance(value, list) else str(value), ensure_ascii=False)
    text = text.encode(errors="replace").decode()
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
