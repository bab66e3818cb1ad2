"""A finding: something wrong in the metadata of a GGUF file, with what mends it, where something does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SET, REMOVE, ASK, CONVERT = "set", "remove", "ask", "convert"
"""What mends a finding: `pi-gguf repair` sets or removes the key; the checkpoint or the user must say the value; or no
change of keys does, only another conversion."""


@dataclass(frozen=True)
class Finding:
    """Something wrong in a file.

    Args:
        key: of the metadata, or the name of a tensor.
        found: what is there; None where nothing is.
        expected: what it should be; None where that is unknown, or where it should not be there.
        text: one sentence: what is wrong and what follows.
        remedy: `set`, `remove`, `ask` or `convert`.
        severity: `defect`, or `note` where it may well be meant so.
    """

    key: str
    found: Any
    expected: Any
    text: str
    remedy: str = SET
    severity: str = "defect"

    @property
    def repairable(self) -> bool:
        return self.remedy in (SET, REMOVE)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "found": in_short(self.found), "expected": in_short(self.expected)}

    def __str__(self) -> str:
        found = "is missing" if self.found is None else f"is {in_short(self.found)}"
        expected = f", should be {in_short(self.expected)}" if self.expected is not None else ""
        return " ".join(f"{self.key} {found}{expected}: {self.text}".split())  # a value may have lines of its own


def in_short(value: Any) -> Any:
    """Return a value as it is shown: long ones only by their length, numbers of 32 bits without the tail of 64."""
    if isinstance(value, list):
        return f"{len(value)} values"
    if isinstance(value, str) and len(value) > 80:
        return f"{len(value)} characters"
    return float(f"{value:.7g}") if isinstance(value, float) else value
