"""Write pi_gguf/families/declared.json: what each family's config class of the installed transformers declares.

Example:
    python tools/write_declared.py
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin

from pi_gguf.families import FAMILIES
from pi_gguf.families.declared import PATH

WORDS = {int: "int", float: "float", bool: "bool", str: "str", dict: "dict", NoneType: "null"}


def words(kind: Any) -> list[str]:
    """Return the kinds of values that a type takes; `other` stands for any that JSON has not or that are listed."""
    if isinstance(kind, type) and issubclass(kind, dict):
        return ["dict"]
    if get_origin(kind) is list:
        [inner] = get_args(kind)
        return [f"list[{WORDS[inner]}]"]
    if kind in WORDS:
        return [WORDS[kind]]
    parts = get_args(kind) if get_origin(kind) not in (None, dict) and "Literal" not in str(get_origin(kind)) else ()
    return sorted({word for part in parts for word in words(part)}) or ["other"]


def fields_of(kind: type) -> dict[str, list[Any]]:
    """Return kinds and default of each field; a field that has rules beside its kind is of `checked` too."""
    found = {}
    for one in fields(kind):
        assert one.default is not MISSING, one.name
        checked = ["checked"] if one.metadata.get("validator") else []
        found[one.name] = ["|".join(words(one.type) + checked), one.default]
    return found


def attributes(kind: type) -> list[str]:
    """Return the public names that a config has beside its fields."""
    return sorted(name for name in dir(kind) if not name.startswith("_") and name not in fields_of(kind))


def declared() -> dict[str, Any]:
    """Return all of it."""
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    every, reserved, families = fields_of(PretrainedConfig), attributes(PretrainedConfig), {}
    for name in FAMILIES:
        kind = CONFIG_MAPPING[name]
        rope = getattr(kind(), "rope_parameters", None) or {}
        own = {field: told for field, told in fields_of(kind).items() if every.get(field) != told}
        families[name] = {
            "model": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name],
            "theta": kind.default_theta,
            "share": rope.get("partial_rotary_factor"),
            "aliases": kind.attribute_map,
            "reserved": [word for word in attributes(kind) if word not in reserved],
            "fields": own,
        }
        for part, inner in kind.sub_configs.items():
            families[name][part] = {field: told for field, told in fields_of(inner).items() if every.get(field) != told}
    return {"every": every, "reserved": reserved, "families": families}


def text() -> str:
    """Return the file: a line for each field."""
    lines = json.dumps(declared(), indent=1).split("\n")
    whole, row = [], ""
    for line in lines:  # what is in brackets stands on one line
        row += line.strip() if row else line
        if row.count("[") - row.count('"["') <= row.count("]"):
            whole.append(row)
            row = ""
        else:
            row += " " if line.endswith(",") else ""
    return "\n".join(whole) + "\n"


def main() -> None:
    PATH.write_text(text())
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
