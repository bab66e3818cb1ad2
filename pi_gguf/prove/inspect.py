"""What a GGUF file or a Hugging Face folder states, what llama.cpp reads of it, and what is wrong with it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import GgufError, OptionError, ResourceError
from pi_gguf.gguf.certificate import Certificate
from pi_gguf.gguf.defects import expect, find_defects
from pi_gguf.gguf.file import GgufInfo
from pi_gguf.gguf.findings import ASK, Finding
from pi_gguf.gguf.header import is_gguf
from pi_gguf.gguf.parts import name_of_all, whole
from pi_gguf.runtime.model import Model
from pi_gguf.scaling.rope import RopeScaling, check_consistent


@dataclass(frozen=True)
class Inspection:
    """The report of `pi-gguf inspect`; sizes in bytes, windows in tokens (None where they cannot be read).

    `repair` is the command that mends what can be mended, None where nothing can; `certificate` what the file says was
    measured on it; `parts` those of a split file that are there.
    """

    path: str
    format: str
    architecture: str
    window: int | None
    original_window: int | None
    rope: dict[str, Any]
    quantization: str
    tensors: dict[str, int]
    nbytes: int
    llama_cpp: dict[str, Any]
    general: dict[str, Any]
    warnings: list[str]
    findings: list[Finding]
    repair: str | None = None
    certificate: Certificate | None = None
    parts: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        certificate = self.certificate.to_json() if self.certificate else None
        findings = [finding.to_json() for finding in self.findings]
        return {**self.__dict__, "findings": findings, "certificate": certificate}


def inspect(path: str | Path, *, against: str | None = None) -> Inspection:
    """Report architecture, window, every rope key, types, sizes, what llama.cpp reads, and what is wrong.

    Args:
        path: GGUF file (any part of a split one), Hugging Face folder, Hub id or bundled:tiny.
        against: MODEL that a GGUF file was made from: what the file lost of it is named, with the right value. Of the
            Hub only config and tokenizer are fetched.

    Example:
        pi-gguf inspect model.gguf --against ./my-llama
    """
    if is_gguf(path):
        return _inspect_gguf(Path(path), against)
    if against is not None:
        raise OptionError(f"against is for GGUF files, {path} is none", "leave --against out")
    return _inspect_folder(str(path))


def _inspect_gguf(path: Path, against: str | None) -> Inspection:
    found = whole(path)
    path, info, header = found.first.path, found.info, found.header
    expected = expect(header, info.tensors, load_checkpoint(against, weights=False)) if against is not None else None
    findings = [*found.findings(), *find_defects(header, info.tensors, expected)]
    warnings: list[str] = []
    read: dict[str, Any] = {}
    try:
        with Model(path, n_ctx=512, device="cpu") as model:
            read = {
                "n_ctx_train": model.n_ctx_train,
                "rope_freq_scale_train": model.rope_freq_scale_train,
                "n_vocab": model.n_vocab,
            }
    except (GgufError, ResourceError) as error:
        warnings.append(str(error))
    certificate = None
    try:
        certificate = Certificate.read(found.first)
    except GgufError as error:
        warnings.append(f"{error}; {error.hint}")
    keys = {key: value for key, value in info.metadata.items() if ".rope." in key or key.endswith("context_length")}
    keys |= {t.name: "tensor" for t in info.tensors if t.name.startswith("rope_")}
    window, original = _windows(info)
    return Inspection(
        path=str(path),
        format="GGUF",
        architecture=info.arch,
        window=window,
        original_window=original,
        rope=keys,
        quantization=info.quantization,
        tensors=dict(Counter(t.type for t in info.tensors)),
        nbytes=found.nbytes,
        llama_cpp=read,
        general={key: value for key, value in info.metadata.items() if key.startswith("general.")},
        warnings=warnings,
        findings=findings,
        repair=_repair_command(path, findings, against),
        certificate=certificate,
        parts=[str(part) for part in found.paths] if found.is_split else [],
    )


def _windows(info: GgufInfo) -> tuple[int | None, int | None]:
    try:
        rope = info.rope
    except GgufError:
        return None, None
    return rope.max_position_embeddings, rope.original_max_position_embeddings


def _repair_command(path: Path, findings: Sequence[Finding], against: str | None) -> str | None:
    asked = [f"--set {shlex.quote(f.key)}=VALUE" for f in findings if f.remedy == ASK and f.severity == "defect"]
    if not asked and not any(finding.repairable for finding in findings):
        return None
    stem = name_of_all(path).with_suffix("")
    parts = ["pi-gguf repair", shlex.quote(str(path)), shlex.quote(f"{stem}-repaired.gguf")]
    if against is not None:
        return " ".join([*parts, "--against", shlex.quote(against), *asked])
    return " ".join([*parts, *(["--against MODEL"] if asked else [])])


def _inspect_folder(model: str) -> Inspection:
    checkpoint = load_checkpoint(model, plain=True)
    rope: RopeScaling = checkpoint.rope
    spelled = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
    tensors = checkpoint.tensors
    return Inspection(
        path=str(checkpoint.path),
        format="Hugging Face",
        architecture=str(checkpoint.config["model_type"]),
        window=rope.max_position_embeddings,
        original_window=rope.original_max_position_embeddings,
        rope={name: checkpoint.config[name] for name in spelled if name in checkpoint.config},
        quantization="/".join(sorted({t.dtype for t in tensors.values()})),
        tensors=dict(Counter(t.dtype for t in tensors.values())),
        nbytes=sum(t.nbytes for t in tensors.values()),
        llama_cpp={},
        general=record.to_json() if (record := checkpoint.record) else {},
        warnings=check_consistent(rope, str(checkpoint.path)),
        findings=[],
    )
