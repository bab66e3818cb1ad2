"""A checkpoint's config.json: read as transformers reads it, and what is unusual about it.

In: a folder. Out: a `Configuration`: the text model's fields, the same opened, its position scaling.
Of two spellings of one thing that one is taken which transformers takes, and a note says so; where nobody can tell
which was meant, it is an error that names both.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint.plain import open_plain
from pi_gguf.common.progress import say
from pi_gguf.errors import CheckpointError, UnsupportedError, one_line
from pi_gguf.families import FAMILIES, Family
from pi_gguf.families.declared import Field, declared
from pi_gguf.families.family import head_dim, kv_heads, rotary_dim
from pi_gguf.scaling.own import positive_int, positive_number
from pi_gguf.scaling.rope import DEFAULT_ROPE_THETA, FACTOR_TENSORS, RopeScaling

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_LIMITS = {
    "num_hidden_layers": 1000, "head_dim": 2**14, "num_attention_heads": 2**14, "num_key_value_heads": 2**14,
    "hidden_size": 2**20, "intermediate_size": 2**22, "vocab_size": 2**24, "num_experts": 2**13,
    "num_local_experts": 2**13, "moe_intermediate_size": 2**22, "shared_expert_intermediate_size": 2**22,
    "n_layers": 1000, "n_layer": 1000, "d_model": 2**20, "n_heads": 2**14, "n_head": 2**14, "num_kv_heads": 2**14,
    "ffn_hidden_size": 2**22, "expansion_ratio": 2**6,
}  # fmt: skip
"""No model is as large; a larger number is a damaged config, and would be built before it is found to be one."""


_OF_HEADS = ("head_dim", "num_key_value_heads")
"""Read of any config, declared or not."""


_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


_NOT_ALONE = {"paligemma": "its text model looks at a prompt in both directions, which llama.cpp does not"}
"""Vision-language models whose text part is another model when it is alone."""


_LEFT_BEHIND = ("quantization_config", "quantization", "compression_config")


_ANY_WINDOW = 2**17
"""Of a text model whose config leaves it to transformers' defaults."""


_ROPE_FIELDS = ("rope_parameters", "rope_scaling")


_ORIGINAL = "original_max_position_embeddings"


_noted: list[str] = []


_OF_ROPE = ("rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rope_local_base_freq")
"""Numbers of the position scaling beside these objects, as older configs have them."""


@dataclass(frozen=True)
class Configuration:
    """What a config.json says of a text model.

    Args:
        path: of the file.
        fields: of the text model, corrected where transformers would stumble.
        opened: the text model's config with its defaults and standard names, as transformers opens it.
        read: the config of the folder as transformers opens it, untouched; of a vision-language model all of it. None
            where it was opened without transformers.
        rope: the position scaling.
        quantization: what it says of quantized weights, which may be left from before; empty where nothing.
        is_part: whether the text model is one part of a vision-language model.
    """

    path: Path
    fields: dict[str, Any]
    opened: Any
    read: PretrainedConfig | None
    rope: RopeScaling
    quantization: dict[str, Any]
    is_part: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.fields["model_type"]]

    @property
    def is_plain(self) -> bool:
        """Whether it was opened without transformers."""
        return self.read is None

    @cached_property
    def by_transformers(self) -> Configuration:
        """The same, opened by transformers."""
        return read_config(self.path.parent) if self.is_plain else self

    @property
    def whole(self) -> PretrainedConfig:
        """The config of the folder as transformers opens it, untouched."""
        read = self.by_transformers.read
        assert read is not None
        return read


def read_config(folder: Path, *, plain: bool = False) -> Configuration:
    """Read config.json of a folder.

    Args:
        plain: a usual one need not be opened by transformers.

    Raises:
        CheckpointError: it is missing, or a field is of a wrong kind or size.
        UnsupportedError: a family or a rope type that is not handled.
    """
    path = folder / "config.json"
    if not path.exists():
        adapter = (folder / "adapter_config.json").exists()
        hint = "this is an adapter's folder: give its base as MODEL and this folder with --lora"
        raise CheckpointError(
            f"{folder}: config.json is missing", hint if adapter else "MODEL must be a Hugging Face folder"
        )
    raw = fields = read_json(path)
    opened: Any
    read: PretrainedConfig | None
    of_text = fields.get("text_config")
    model_type = fields.get("model_type")
    is_part = isinstance(of_text, dict) and model_type not in FAMILIES
    if isinstance(of_text, dict) and is_part:
        read = _open_whole(folder, fields, of_text)
        opened = copy.deepcopy(read.get_text_config())
        opened.tie_word_embeddings = bool(getattr(read, "tie_word_embeddings", False))
        fields = json.loads(opened.to_json_string(use_diff=False))
        note(
            f"{path}: {model_type} is a vision-language model; its text model ({opened.model_type}) is read, the rest "
            "is left out"
        )
    else:
        _check_family(model_type, path)
        corrected = _corrected(fields, str(path))
        opened, read = open_plain(corrected) if plain else None, None
        if opened is None:
            read = _open(corrected, path, folder if _same(corrected, fields) else None)
            opened = copy.deepcopy(read)
        fields = corrected
    _standardize(opened)
    _check_heads(opened, str(path))
    rope = _rope_of(opened, fields, FAMILIES[fields["model_type"]], str(path))
    quantization: dict[str, Any] = next((raw[name] for name in _LEFT_BEHIND if isinstance(raw.get(name), dict)), {})
    fields = {name: value for name, value in fields.items() if name not in _LEFT_BEHIND}
    return Configuration(path, fields, opened, read, rope, quantization, is_part)


def read_rope(config: dict[str, Any], family: Family, path: str) -> RopeScaling:
    """Return window and scaling of a config that is a parsed config.json.

    Raises:
        CheckpointError: a field is missing or no number.
        UnsupportedError: an unknown rope type.
    """
    corrected = _corrected({**config, "model_type": family.model_type}, path)
    opened = _open(corrected, Path(path), None)
    _standardize(opened)
    return _rope_of(opened, corrected, family, path)


@cache
def note(text: str) -> None:
    """Say what is unusual about a checkpoint, once."""
    _noted.append(text)
    say(f"note: {text}")


_MOST_BYTES = 2**27
"""Of a file that is read as a whole; the largest vocabularies have a quarter of it."""


def noted(folder: Path) -> list[str]:
    """Return what was unusual about a folder."""
    return [text for text in _noted if text.startswith(str(folder))]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is no file, not readable or something else.
    """
    try:
        check_size(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable JSON ({one_line(error)})", "download this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: must hold a JSON object, got {type(value).__name__}", "download this file again"
        )
    return value


def check_size(path: Path) -> None:
    """Check that what is read as a whole is a file, and of a size that such files have.

    Raises:
        CheckpointError: otherwise.
    """
    if not path.is_file():  # a FIFO would be waited for
        raise CheckpointError(f"{path}: is not a file", "put the checkpoint's own file there")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise CheckpointError(f"{path}: of {size:,} bytes, more than any such file has", "download this file again")


def _check_family(model_type: Any, path: Path) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _unknown_family(path, repr(model_type))


def _unknown_family(path: Path, got: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {got}",
        "this family is not handled here; llama.cpp's own convert_hf_to_gguf.py may know it",
    )


def _open_whole(folder: Path, fields: dict[str, Any], of_text: dict[str, Any]) -> PretrainedConfig:
    """Open the config of a vision-language model."""
    path, model_type = folder / "config.json", fields.get("model_type")
    if reason := _NOT_ALONE.get(str(model_type)):
        raise UnsupportedError(f"{path}: model_type {model_type}: {reason}", "its text model cannot be taken alone")
    text_type = of_text.get("model_type", f"{model_type}_text")
    named = {**of_text, "model_type": text_type}
    corrected = _corrected(named, str(path), complete=False) if text_type in FAMILIES else named
    untouched = _same(corrected, named)
    whole = _open(fields if untouched else {**fields, "text_config": corrected}, path, folder if untouched else None)
    found = getattr(whole.get_text_config(), "model_type", None)
    if found not in FAMILIES:
        raise _unknown_family(path, f"{model_type!r} with a text model of {found!r}")
    return whole


def _same(corrected: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Tell whether nothing was corrected; 4 for 4.0 is."""
    return json.dumps(corrected, sort_keys=True) == json.dumps(fields, sort_keys=True)


def _open(fields: dict[str, Any], path: Path, folder: Path | None) -> PretrainedConfig:
    """Open a config with transformers.

    Args:
        folder: to open it from, untouched; `fields` are opened when None.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise _unknown_family(path, repr(model_type))
    try:
        if folder is not None:
            opened: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            opened = AutoConfig.for_model(**copy.deepcopy(fields))
    except Exception as error:  # transformers raises many kinds for a field it does not take
        raise CheckpointError(f"{path}: transformers does not open it ({one_line(error)})", "correct it") from error
    return opened


def _standardize(config: Any) -> None:
    """Complete the position scaling as transformers does when a model computes with it."""
    if getattr(config, "rope_parameters", None):
        config.standardize_rope_params()


def _corrected(fields: dict[str, Any], path: str, *, complete: bool = True) -> dict[str, Any]:
    """Check the numbers of a config; return it with numbers where transformers asks for them.

    Args:
        complete: whether every size must be there.

    Raises:
        CheckpointError: a size is missing, no number or absurd.
    """
    told = declared(fields["model_type"])
    kinds = told.fields
    fields = {name: _as_declared(name, value, kinds.get(name), path) for name, value in fields.items()}
    spelled = {name: alias for name, alias in told.aliases.items() if name not in fields}
    family = FAMILIES[fields["model_type"]]
    needed = {spelled.get(name, name) for name in _NEEDED} & set(kinds) if complete else set()
    needed |= {family.window} if complete and family.default_window is None else set()
    for name in [*needed, *({family.window} & set(fields) - needed)]:
        positive_int(fields, name, path)
    for name, limit in _LIMITS.items():
        if (
            fields.get(name) is not None
            and (name in kinds or name in _OF_HEADS)
            and positive_int(fields, name, path) > limit
        ):
            raise CheckpointError(f"{path}: {name} must be at most {limit}, got {fields[name]}", "correct the config")
    for name, value in fields.items():
        if isinstance(value, int) and value >= 2**31:
            raise CheckpointError(f"{path}: {name} must be below 2^31, got {value}", "correct the config")
        if isinstance(value, float) and not math.isfinite(value) and name in kinds:
            raise CheckpointError(f"{path}: {name} must be a number, got {value}", "correct the config")
        if name.endswith(("norm_eps", "norm_epsilon")) and name in kinds:
            positive_number(value, name, path)
    fields = _corrected_rope(fields, path)
    if not family.alibi:  # for its errors, which name the field
        RopeScaling.from_hf(fields, path, window=fields.get(family.window) or _ANY_WINDOW)
    return fields


def _as_declared(name: str, value: Any, field: Field | None, path: str) -> Any:
    """Return a number that is written as text, or as 4.0 for 4, as the number that transformers asks for."""
    kinds: frozenset[str] = field.kinds if field else frozenset()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    number = _number(value)
    if number is None or "bool" in kinds or (isinstance(value, str) and "str" in kinds):
        return value
    wanted: Any = value
    if "int" in kinds and number.is_integer() and (isinstance(value, str) or "float" not in kinds):
        wanted = int(number)
    elif ("float" in kinds and "int" not in kinds) or (
        isinstance(value, str) and ("float" in kinds or name in _OF_ROPE)
    ):
        wanted = number
    if type(wanted) is not type(value):
        note(f"{path}: {name} is {value!r}, read as {wanted!r}")
    return wanted


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_heads(config: Any, path: str) -> None:
    """Check that the sizes of heads fit together, as transformers does only when it computes."""
    heads, groups, size = config.num_attention_heads, kv_heads(config), head_dim(config)
    if heads % groups:
        raise CheckpointError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads {groups}, got {heads}",
            "correct the config",
        )
    if size < 2 or size % 2:
        raise CheckpointError(f"{path}: the size of a head must be even, got {size}", "correct the config")
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1 or int(size * share) < 2:
        raise CheckpointError(
            f"{path}: partial_rotary_factor must be a share of the head's {size} dimensions, got {repr(share)[:80]}",
            "correct the config",
        )


def _corrected_rope(fields: dict[str, Any], path: str) -> dict[str, Any]:
    """Return a config whose position scaling transformers can compute with, where only one meaning is possible."""
    fields = dict(fields)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in fields and fields[name] is None:
            del fields[name]
    for field in _ROPE_FIELDS:
        rope = fields.get(field)
        if not rope:
            continue
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{path}: {field} must be an object, got {repr(rope)[:80]}", "correct the config")
        for name in ("full_attention", "sliding_attention"):
            if not isinstance(rope.get(name, {}), Mapping | None):
                raise CheckpointError(
                    f"{path}: {field}.{name} must be an object, got {repr(rope[name])[:80]}", "correct the config"
                )
        nested = {name: part for name, part in rope.items() if isinstance(part, Mapping)}
        if nested and not declared(fields["model_type"]).layered:
            raise CheckpointError(
                f"{path}: {field} holds {', '.join(nested)}, but this family scales the positions of all layers alike",
                f"put the fields into {field} itself",
            )
        parts = {name: _corrected_scaling(part, f"{field}.{name}", path) for name, part in nested.items()}
        flat = {name: part for name, part in rope.items() if name not in nested}
        kind = flat.get("rope_type", flat.get("type"))
        if kind in ("yarn", "llama3", "longrope") and not nested and not (flat.get(_ORIGINAL) or fields.get(_ORIGINAL)):
            note(f"{path}: {field}.{_ORIGINAL} is absent; the window is taken for it, as transformers does")
        fields[field] = {**(_corrected_scaling(flat, field, path) if flat and not nested else flat), **parts}
    _check_two_spellings(fields, path)
    return fields


def _corrected_scaling(rope: Mapping[str, Any], field: str, path: str) -> dict[str, Any]:
    fixed = dict(rope)
    for name, value in rope.items():
        if isinstance(value, str) and name not in ("type", "rope_type") and (number := _number(value)) is not None:
            fixed[name] = int(number) if number.is_integer() and "max_position" in name else number
        elif isinstance(value, float) and value.is_integer() and name == _ORIGINAL:
            fixed[name] = int(value)
        elif value is None and name in (_ORIGINAL, "rope_theta", "partial_rotary_factor"):
            del fixed[name]
    keys = [name for name in ("rope_type", "type") if name in rope]
    stated = [rope[name] for name in keys if rope[name] is not None]
    if keys and not stated:
        if scaled := next((name for name, value in rope.items() if "factor" in name and value is not None), None):
            raise CheckpointError(
                f"{path}: {field}.rope_type is null, and {field}.{scaled} is {repr(rope[scaled])[:40]}: nobody can "
                "tell whether positions are scaled",
                "name the rope_type, or remove the field",
            )
        fixed |= dict.fromkeys(keys, "default")
    elif keys and (stated[0] == "su" or rope[keys[0]] is None):
        fixed[keys[0]] = "longrope" if stated[0] == "su" else stated[0]
    for name in {**rope, **fixed}:
        before, after = rope.get(name), fixed.get(name)
        if (before, type(before)) != (after, type(after)):
            note(f"{path}: {field}.{name} is {before!r}, read as {'the default' if after is None else repr(after)}")
    return fixed


def _check_two_spellings(fields: dict[str, Any], path: str) -> None:
    """Say which of two spellings transformers takes; refuse where it would drop a base that only the other one has."""
    parameters, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    layered = "full_attention" in parameters
    parameters = parameters.get("full_attention") or parameters
    theta = parameters.get("rope_theta")
    if scaling and parameters and {**parameters, **scaling} != dict(parameters):
        if theta is not None and not layered and scaling.get("rope_theta", fields.get("rope_theta")) is None:
            default = declared(fields["model_type"]).theta
            if theta != fields.get("rotary_emb_base", default):
                raise CheckpointError(
                    f"{path}: rope_scaling stands beside rope_parameters, whose rope_theta {theta} transformers then "
                    "drops for its default; nobody can tell which is meant",
                    "put the fields of rope_scaling into rope_parameters and remove rope_scaling",
                )
        note(f"{path}: both rope_scaling and rope_parameters are there; rope_scaling is taken, as transformers does")
    elif not scaling and None not in (theta, fields.get("rope_theta")) and fields["rope_theta"] != theta:
        note(
            f"{path}: rope_theta is {fields['rope_theta']} beside rope_parameters.rope_theta {theta}; the latter is "
            "taken, as transformers does"
        )


def _rope_of(config: Any, fields: Mapping[str, Any], family: Family, path: str) -> RopeScaling:
    """Return window and scaling of an opened config."""
    absent = family.default_window is not None and fields.get(family.window) is None
    window = family.default_window if absent else positive_int(fields, family.window, path)
    assert window is not None
    if window < 2:
        raise CheckpointError(
            f"{path}: {family.window} must be at least 2 tokens, got {window}: nothing follows a token",
            "correct the config",
        )
    if family.alibi:
        return RopeScaling("alibi", 1.0, DEFAULT_ROPE_THETA, window, window)
    read = {
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        _ORIGINAL: getattr(config, _ORIGINAL, None),
        "max_sequence_length": fields.get("max_sequence_length"),
    }
    sliding = None
    if declared(family.model_type).layered:  # layers with a sliding window have a base of their own
        nested = config.rope_parameters.get("sliding_attention") or {}
        kind = nested.get("rope_type", "default")
        if kind != "default":
            raise UnsupportedError(
                f"{path}: rope_parameters.sliding_attention.rope_type must be default, got {kind!r}",
                "llama.cpp scales the layers that see the whole window only",
            )
        sliding = positive_number(nested.get("rope_theta"), "rope_parameters.sliding_attention.rope_theta", path)
    rope = RopeScaling.from_hf(read, path, window=window, sliding_theta=sliding)
    for problem in _unusual(config.rope_parameters, rope):
        note(f"{path}: {problem}")
    return rope


def _unusual(parameters: Mapping[str, Any], rope: RopeScaling) -> Iterator[str]:
    given = parameters.get("full_attention") or parameters
    kind = given.get("rope_type")
    if kind == "dynamic":
        yield (
            f"rope_type dynamic changes nothing up to the window of {rope.max_position_embeddings} tokens, and "
            "llama.cpp cannot go on as it does beyond; the file has this window"
        )
    elif given.get("type") not in (None, kind):
        yield f"type {given['type']!r} stands beside rope_type {kind!r}, which transformers takes"


def check_variant(family: Family, config: Any, path: Path) -> None:
    if complaint := family.complaint(config):
        name, value, handled = complaint
        raise UnsupportedError(
            f"{path}: {name} must be {handled} at {config.max_position_embeddings} tokens, got {value!r}"
            if name == "sliding_window"
            else f"{path}: {name} must be {handled}, got {value!r}",
            "llama.cpp has no such variant of this family; a config edited to that converts as what it then says",
        )


def check_rope(rope: RopeScaling, family: Family, config: Any, path: Path) -> None:
    """Refuse frequencies that llama.cpp has no way to read for this family."""
    if rope.needs_factor_tensors and family.arch not in FACTOR_TENSORS:
        assert rope.own is not None
        raise UnsupportedError(
            f"{path}: rope_type {rope.own.rope_type} needs a number for each frequency, which llama.cpp reads in "
            f"{', '.join(FACTOR_TENSORS)} only, got {family.arch}",
            "leave --context out to convert as is" if rope.own.has_keys else "take a checkpoint without this scaling",
        )
    pairs = rotary_dim(config) // 2
    for name, divisors in rope.factor_tensors(family.arch, 2 * pairs).items():
        if len(divisors) != pairs:
            field = "short_factor" if "short" in name else "long_factor"
            raise CheckpointError(
                f"{path}: {field} must be a list of {pairs} numbers, got {len(divisors)}", "correct the config"
            )
