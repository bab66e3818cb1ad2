"""A file's own measurements, in its header: how far its window really reaches, measured in llama.cpp on the file.

In: a GGUF file of any producer and, where there is one, the model it was made from. Out: a `Certificate`, stored under
`pi_gguf.*` keys, and an error where it is less than was required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pi_gguf.common.files import replace_when_complete
from pi_gguf.errors import GgufError
from pi_gguf.gguf.header import MEASURED, Entry, Header, read_header, write_changed

VERSION = 2

_LARGEST = 3.4e38
"""Perplexities of models that know nothing are stored as this."""

ROOM_KEY = f"{MEASURED}room"
ROOM = {ROOM_KEY: " " * 2048}
"""Key of a file that is to be certified: the certificate takes its room, so that the file's size stays as planned."""


@dataclass(frozen=True)
class Certificate:
    """Figures of one file. None where something was not measured.

    Args:
        window: tokens that were measured; the file's own window, or less where that would have taken too long.
        perplexity: by window, the original one and `window`, on the same stretches of the text.
        reference_perplexity: at the original window, on the same stretches.
        reference: whose that is: `base` before the fine-tune, or `itself`.
        ppl_ratio: perplexity at `window` by the reference's.
        k_max: largest distance, in tokens, up to which at least 20 % of the passkeys were found at each.
        passkeys_found: of `passkeys_asked`, after each quarter of `window`, in growing prompts.
        kl_divergence: mean, in nats, from the model the file was made from, in 32 bits.
        top1_agreement: share of equal first choices.
        against: that model.
        text: what was read, with its hash.
        date: day it was measured.
        seconds: that measuring took.
        device: `auto`, `cpu` or `cuda`.
        versions: of this package and its libraries.
    """

    window: int
    perplexity: dict[int, float]
    reference_perplexity: float
    reference: str
    ppl_ratio: float
    k_max: int | None
    passkeys_found: int | None
    passkeys_asked: int | None
    kl_divergence: float | None
    top1_agreement: float | None
    against: str | None
    text: str
    text_sha256: str
    date: str
    seconds: float
    device: str
    versions: str
    version: int = field(default=VERSION)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def keys(self) -> dict[str, Any]:
        """Return the keys of a GGUF header, whose numbers of 32 bits end at `_LARGEST`."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "perplexity":
                found |= {f"{MEASURED}perplexity.{window}": float(p) for window, p in value.items()}
            elif value is not None:
                found[MEASURED + name] = value
        return {key: min(value, _LARGEST) if isinstance(value, float) else value for key, value in found.items()}

    @classmethod
    def read(cls, header: Header) -> Certificate | None:
        """Read it from a file's header; None where there is none.

        Raises:
            GgufError: it is incomplete, of a later version, or was measured on a file with another header.
        """
        path, metadata = header.path, header.metadata
        own = {key.removeprefix(MEASURED): value for key, value in metadata.items() if key.startswith(MEASURED)}
        if "version" not in own:
            return None
        if own["version"] != VERSION:
            raise GgufError(
                f"{path}: {MEASURED}version is {own['version']}, {VERSION} is known", "update pi-gguf, or certify again"
            )
        if own.get("header_sha256") != header.fingerprint():
            raise GgufError(f"{path}: its certificate is of a file with another header", "certify it again")
        names = {f.name for f in fields(cls)} - {"perplexity"}
        try:
            perplexity = {int(key.split(".")[1]): own.pop(key) for key in list(own) if key.startswith("perplexity.")}
            values: dict[str, Any] = {name: own.get(name) if name in _OPTIONAL else own[name] for name in names}
            return cls(perplexity=perplexity, **values)
        except KeyError as error:
            raise GgufError(f"{path}: {MEASURED}{error.args[0]} is missing", "certify the file again") from error
        except ValueError as error:
            raise GgufError(f"{path}: {MEASURED}perplexity of no window ({error})", "certify the file again") from error

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values for people."""
        perplexities = ", ".join(f"{p:.4g} at {window}" for window, p in sorted(self.perplexity.items()))
        found = [
            ("measured", f"{self.date} in llama.cpp, to {self.window} tokens; {self.text}"),
            ("perplexity", perplexities),
            ("ppl_ratio", f"{self.ppl_ratio:.4f} (reference: {self.reference}, {self.reference_perplexity:.4g})"),
        ]
        if self.k_max is not None:
            found.append(("k_max", f"{self.k_max} ({self.passkeys_found} of {self.passkeys_asked} passkeys)"))
        if self.kl_divergence is not None:
            agreement = f"top-1 agreement {self.top1_agreement:.1%}"
            found.append(("kl_divergence", f"{self.kl_divergence:.3g} nats from {self.against}, {agreement}"))
        return found


_OPTIONAL = {"k_max", "passkeys_found", "passkeys_asked", "kl_divergence", "top1_agreement", "against"}


def store(path: Path, certificate: Certificate) -> None:
    """Write a certificate into a file's header, in place of one that is there; the tensors are copied as they are."""
    header = read_header(path)
    old = {key: entry for key, entry in header.entries.items() if key.startswith(MEASURED)}
    keys = {**certificate.keys(), f"{MEASURED}header_sha256": header.fingerprint()}
    new = {key: Entry.of(value) for key, value in keys.items()}
    room = _size(old) - _size(new) - _size({ROOM_KEY: Entry.of("")})
    if ROOM_KEY in old and room >= 0:
        new[ROOM_KEY] = Entry.of(" " * room)
    with replace_when_complete(path) as partial:
        write_changed(header.changed({**dict.fromkeys(old), **new}), partial)


def _size(entries: Mapping[str, Entry]) -> int:
    """Return the bytes of entries in a header: a key with its length, the number of its type, the value."""
    return sum(8 + len(key.encode()) + 4 + len(entry.data) for key, entry in entries.items())
