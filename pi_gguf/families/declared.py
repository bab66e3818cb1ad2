"""What each family's config class of transformers declares, as data: fields, defaults, other names, base of the angles.

In: `declared.json`, which `tools/write_declared.py` writes and a test holds equal to the installed transformers. So a
config is checked, and a usual one opened, without transformers, whose import takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Field:
    """A declared field.

    Args:
        kinds: of its values: int, float, bool, str, dict, `list[int]`, `list[str]`, null; `other` where transformers
            takes what JSON has no word for, or anything; `checked` where it has rules beside.
        default: of a config that leaves it out.
    """

    kinds: frozenset[str]
    default: Any

    def takes(self, value: Any) -> bool:
        """Tell whether a value is of one of the kinds."""
        if isinstance(value, list):
            return any(self.kinds >= {f"list[{kind.__name__}]"} and _all(value, kind) for kind in (int, str))
        return ("null" if value is None else type(value).__name__) in self.kinds


def _all(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


@dataclass(frozen=True)
class Declared:
    """What the config class of a family declares.

    Args:
        model: transformers' name of the model's class.
        fields: by name.
        aliases: a name that a field has beside its own -> the field.
        reserved: names that a config has and that are no fields, such as those of methods.
        theta: base of the angles where a config names none; by kind of layer where these differ.
        share: of a head's dimensions that are rotated where a config names none; None where a family rotates whole
            heads whatever it names.
        parts: fields of an object in the config, by its name.
    """

    model: str
    fields: Mapping[str, Field]
    aliases: Mapping[str, str]
    reserved: frozenset[str]
    theta: float | Mapping[str, float]
    share: float | None
    parts: Mapping[str, Mapping[str, Field]]

    @property
    def layered(self) -> bool:
        """Whether layers of one kind have another base than those of another."""
        return not isinstance(self.theta, float)


@cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


@cache
def declared(model_type: str) -> Declared:
    """Return what a family of `FAMILIES` declares."""
    read = _read()
    own = dict(read["families"][model_type])
    every, plain = _fields(read["every"]), ("model", "theta", "share", "aliases", "reserved", "fields")
    return Declared(
        model=own["model"],
        fields={**every, **_fields(own["fields"])},
        aliases=own["aliases"],
        reserved=frozenset([*read["reserved"], *own["reserved"]]),
        theta=own["theta"],
        share=own["share"],
        parts={name: {**every, **_fields(part)} for name, part in own.items() if name not in plain},
    )


def _fields(read: Mapping[str, Any]) -> dict[str, Field]:
    return {name: Field(frozenset(kinds.split("|")), default) for name, (kinds, default) in read.items()}
