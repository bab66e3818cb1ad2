"""What a file's figures must be, as --require states it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pi_gguf.errors import CertificateError, OptionError
from pi_gguf.gguf.certificate import Certificate

FIGURES = ("window", "ppl_ratio", "k_max", "kl_divergence", "top1_agreement", "reference_perplexity")
"""What can be required."""


_COMPARE = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__, "<": float.__lt__}


@dataclass(frozen=True)
class Requirement:
    """One figure and what it must be: `k_max>=32768`."""

    name: str
    sign: str
    value: float

    def missed(self, certificate: Certificate, window: int) -> str | None:
        """Return how a certificate falls short; None where it does not.

        Args:
            window: of the file, in tokens; perplexity at less says nothing of it.
        """
        measured = getattr(certificate, self.name)
        if self.name == "ppl_ratio" and certificate.window < window:
            return f"ppl_ratio is measured to {certificate.window} of {window} tokens only"
        if measured is not None and _COMPARE[self.sign](float(measured), self.value):
            return None
        got = "not measured" if measured is None else f"{measured:.6g}"
        return f"{self.name} is {got}, required {self.sign} {self.value:g}"


def read_requirements(text: str | None) -> list[Requirement]:
    """Read `k_max>=32768,ppl_ratio<=1.02`.

    Raises:
        OptionError: not of this form.
    """
    found = []
    for part in (text or "").split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*", part)
        try:
            value = float(match[3]) if match else 0.0
        except ValueError:
            match = None
        if not match or match[1] not in FIGURES:
            raise OptionError(
                f"require must be figures with >=, <=, > or <, separated by commas, got {part!r}",
                f"the figures are {', '.join(FIGURES)}; for example k_max>=32768,ppl_ratio<=1.02",
            )
        found.append(Requirement(match[1], match[2], value))
    return found


def find_missed(certificate: Certificate, requirements: Sequence[Requirement], window: int) -> list[str]:
    """Return how the certificate of a file of `window` tokens falls short, by figure."""
    return [text for requirement in requirements if (text := requirement.missed(certificate, window))]


def check_requirements(missed: Sequence[str], path: str, hint: str) -> None:
    """Raise what `find_missed` found.

    Raises:
        CertificateError: it falls short, with every figure that does.
    """
    if missed:
        raise CertificateError(f"{path}: {'; '.join(missed)}", hint)
