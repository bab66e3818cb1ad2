"""What inspect, repair, certify and card print for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi_gguf.common.tables import text_table


def show_inspect(report: Any) -> str:
    from pi_gguf.common.files import human_bytes

    unmeasured = [("measured", f"no: pi-gguf certify {report.path}")] if report.format == "GGUF" else []
    rows = [
        ("format", f"{report.format}, {report.architecture}, {report.quantization}"),
        ("window", f"{report.window} tokens (original {report.original_window})" if report.window else "unknown"),
        *((key, str(value)) for key, value in report.rope.items()),
        ("tensors", ", ".join(f"{n} {kind}" for kind, n in report.tensors.items())),
        ("size", human_bytes(report.nbytes)),
        *([("parts", ", ".join(Path(part).name for part in report.parts))] if report.parts else []),
        *((f"llama.cpp reads {key}", f"{value}") for key, value in report.llama_cpp.items()),
        *((key, str(value)) for key, value in report.general.items()),
        *(report.certificate.rows() if report.certificate else unmeasured),
        *(("warning", text) for text in report.warnings),
        *((finding.severity, str(finding)) for finding in report.findings),
    ]
    table = text_table(report.path, (), rows, numbers=False)
    return f"{table}\nnext: {report.repair}" if report.repair else table


def show_certify(report: Any) -> str:
    table = text_table(report.path, (), report.certificate.rows(), numbers=False)
    return f"{table}\nnext: pi-gguf inspect {report.path}"


def show_card(card: Any) -> str:
    return f"wrote {card.path}" if card.path else str(card.text).rstrip()


def show_repair(report: Any) -> str:
    lines = [f"{change.key}: {change.old} -> {change.new}" for change in report.changes]
    lines += [f"left, {finding.severity}: {finding}" for finding in report.left]
    if not report.changes:
        return "\n".join([*lines, f"{report.source}: nothing to repair; nothing was written"])
    return "\n".join([*lines, f"wrote {report.path}", f"next: pi-gguf inspect {report.path}"])
