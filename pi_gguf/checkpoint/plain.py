"""A usual config opened without transformers, whose import takes seconds.

In: the corrected fields of a config.json. Out: a `PlainConfig` with the attributes that transformers gives it, or None
where anything is unusual: then transformers opens it, and says what is wrong. What is opened here has the shapes and
the angles that transformers computes, as tests show for every family.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Self

from pi_gguf.families.declared import Declared, Field, declared
from pi_gguf.families.family import head_dim

Fields = dict[str, Any]

_LAYERS = ("full_attention", "sliding_attention")
_ORIGINAL = "original_max_position_embeddings"
_GROUPED_ALL = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "phi", "phi3", "olmo", "olmo2", "olmoe", "granite", "cohere",
    "smollm3",
)  # fmt: skip
"""Families in which null key-value heads are as many as heads."""

_HARMLESS = {
    "_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_sliding_window_pattern",
    "model_type", "torch_dtype", "rope_scaling",
}  # fmt: skip
"""Names that a config reserves or hides, and that say nothing of a model, or are read here."""

_UNUSUAL = {
    "n_embed", "text_config", "configuration_files", "num_heads", "embed_dim", "mlp_layer_types", "mtp_layer_types",
    "use_bidirectional_attention", "output_attentions", "is_encoder_decoder", "id2label", "label2id", "problem_type",
}  # fmt: skip
"""Fields that change what transformers makes of others; they may be false."""

_SHARES = ("dropout", "pdrop", "initializer_range")
"""Ends of names of numbers from 0 to 1, which models are built with."""

_DTYPES = (None, "float32", "float16", "bfloat16")
_ATTENTIONS = (None, "eager", "sdpa")

_SHARED = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL}
_SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), {"factor"}),
    "dynamic": ({"factor"}, set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": ({"factor"}, {"attention_factor", "beta_fast", "beta_slow", "truncate"}),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
}
"""What a scaling must state, and what it may."""


class PlainConfig:
    """A config with attributes as transformers has them: fields, defaults and what follows from them.

    Args:
        model_type: of a family of `FAMILIES`.
    """

    model_type: str

    def __init__(self, model_type: str) -> None:
        self.__dict__["model_type"] = model_type

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[declared(self.model_type).aliases.get(name, name)] = value

    def __getattr__(self, name: str) -> Any:
        told = self.__dict__.get("model_type")
        field = declared(told).aliases.get(name) if told and not name.startswith("__") else None
        if field is None or field not in self.__dict__:
            raise AttributeError(f"a config of {told} has no {name}")
        return self.__dict__[field]

    def get_text_config(self) -> Self:
        """Return the config itself, as it is of a text model."""
        return self

    def standardize_rope_params(self) -> None:
        """Complete the position scaling."""
        rope = self.rope_parameters
        of_layers = [rope[name] for name in rope if name in (getattr(self, "layer_types", None) or ())]
        for part in of_layers or [rope]:
            part.setdefault("rope_type", part.get("type", "default"))
            if part["rope_type"] in ("llama3", "yarn", "longrope"):
                if hasattr(self, _ORIGINAL):
                    part[_ORIGINAL] = getattr(self, _ORIGINAL)
                part.setdefault(_ORIGINAL, self.max_position_embeddings)


def open_plain(fields: Mapping[str, Any]) -> PlainConfig | None:
    """Open a config as transformers does; return None where anything about it is unusual.

    Args:
        fields: of config.json, checked and corrected, of a family of `FAMILIES`.
    """
    told = declared(fields["model_type"])
    more = {name: copy.deepcopy(value) for name, value in fields.items() if name not in told.fields}
    if not (_known(fields, told.fields) and _harmless(fields, more, told)):
        return None
    config = PlainConfig(fields["model_type"])
    for name, field in told.fields.items():
        setattr(config, name, copy.deepcopy(fields.get(name, field.default)))
    if not (_derived(config) and _with_layer_types(config, more) and _scaled(config, more, told)):
        return None
    for name, value in more.items():
        setattr(config, name, value)
    return config if _sound(config, told) else None


def _known(values: Mapping[str, Any], fields: Mapping[str, Field]) -> bool:
    """Tell whether values are of the declared kinds; a field of other kinds must be left out, or be a usual one."""
    given = {name: field for name, field in fields.items() if name in values and field.kinds != {"other"}}
    return all(field.takes(values[name]) for name, field in given.items())


def _harmless(fields: Mapping[str, Any], more: Mapping[str, Any], told: Declared) -> bool:
    """Tell whether no field changes what others mean, or is one that only transformers knows how to take."""
    hidden = {name for name in more if name in told.reserved or name.startswith("_")} - _HARMLESS
    if hidden - {"_attn_implementation", "output_attentions"} or any(fields.get(name) for name in _UNUSUAL):
        return False
    if any(fields.get(name) not in _DTYPES for name in ("dtype", "torch_dtype")):
        return False
    if any(fields.get(name) not in _ATTENTIONS for name in ("_attn_implementation", "attn_implementation")):
        return False
    if any(more.get(alias) is not None and field in fields for alias, field in told.aliases.items()):
        return False
    code = fields.get("auto_map", {})
    aliased = {told.aliases[name]: value for name, value in more.items() if name in told.aliases}
    return (
        _known(aliased, told.fields)
        and isinstance(code, dict)
        and all(isinstance(name, str) for name in code.values())
        and (isinstance(fields.get("head_dim"), int) or "head_dim" not in more)
        and "layer_types" not in more
        and type(fields.get(_ORIGINAL, 1)) is int
        and fields.get("use_sliding_window") in (None, False)
    )


def _derived(config: PlainConfig) -> bool:
    """Set what follows from other fields; tell whether all is usual."""
    kind, layers = config.model_type, range(config.num_hidden_layers)
    if kind in ("llama", "mistral", "nemotron") and config.head_dim is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if kind in _GROUPED_ALL and config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    if kind in ("qwen2", "qwen3", "qwen3_moe", "qwen2_moe"):
        config.sliding_window = 0 if kind == "qwen2_moe" else None
    if kind in ("qwen2_moe", "qwen3_moe") and config.mlp_only_layers is None:
        config.mlp_only_layers = []
    if kind == "smollm3" and config.no_rope_layers is None and config.no_rope_layer_interval > 0:
        config.no_rope_layers = [int((i + 1) % config.no_rope_layer_interval != 0) for i in layers]
    if kind == "gemma" and config.hidden_act == "gelu":
        config.hidden_act = "gelu_pytorch_tanh"
    if kind == "glm4" and config.eos_token_id is None:
        config.eos_token_id = [151329, 151336, 151338]
    if kind == "falcon":
        config.head_dim = config.hidden_size // config.num_attention_heads
        config.num_kv_heads = config.num_attention_heads if config.num_kv_heads is None else config.num_kv_heads
        config.ffn_hidden_size = config.ffn_hidden_size or 4 * config.hidden_size
        if config.new_decoder_architecture and config.num_ln_in_parallel_attn is None:
            config.num_ln_in_parallel_attn = 2
    if kind == "mpt":
        return _with_attention(config)
    return True


def _with_layer_types(config: PlainConfig, more: Mapping[str, Any]) -> bool:
    """Set which layers slide where the config leaves it out; tell whether the pattern is usual."""
    if getattr(config, "layer_types", ()) is None:
        pattern = {"gemma2": 2, "gemma3_text": more.get("sliding_window_pattern", 6)}.get(config.model_type, 1)
        if type(pattern) is not int or pattern < 1:
            return False
        config.layer_types = [_LAYERS[bool((i + 1) % pattern)] for i in range(config.num_hidden_layers)]
    return True


def _with_attention(config: PlainConfig) -> bool:
    """Open MPT's object in the config."""
    given, fields = config.attn_config or {}, declared("mpt").parts["attn_config"]
    usual = given.get("attn_type", fields["attn_type"].default) == fields["attn_type"].default
    if not usual or not _known(given, fields) or set(given) - {*fields, *_HARMLESS, "output_attentions"}:
        return False
    config.attn_config = SimpleNamespace(**{name: given.get(name, field.default) for name, field in fields.items()})
    return True


def _scaled(config: PlainConfig, more: Fields, told: Declared) -> bool:
    """Gather the position scaling from its fields, which are taken out of `more`; tell whether it is usual."""
    if "rope_parameters" not in told.fields:
        return not any(more.get(name) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    stated, scaling = config.rope_parameters or {}, more.pop("rope_scaling", None) or {}
    if stated and scaling and (told.layered or {**stated, **scaling} != stated):
        return False
    if told.layered:
        return _layered(config, stated, scaling, more)
    rope = scaling or stated
    theta, share = "rope_theta", "partial_rotary_factor"
    if config.model_type == "gpt_neox":
        theta, share = "rotary_emb_base", "rotary_pct"
    rope.setdefault("rope_theta", more.pop(theta, told.theta))
    if told.share is not None:
        rope.setdefault("partial_rotary_factor", more.pop(share, told.share))
    elif "partial_rotary_factor" in {*rope, *more}:  # which most families take no notice of
        return False
    config.rope_parameters = rope
    config.standardize_rope_params()
    return True


def _layered(config: PlainConfig, stated: Fields, scaling: Fields, more: Fields) -> bool:
    """Set the position scalings of the two kinds of layers."""
    if (stated and set(stated) != {*_LAYERS}) or not all(isinstance(part, dict) for part in stated.values()):
        return False
    if "partial_rotary_factor" in more:
        return False
    rope = stated or {name: {"rope_type": "default"} for name in reversed(_LAYERS)}
    rope["full_attention"].update(scaling)
    rope["full_attention"].setdefault("rope_theta", more.pop("rope_theta", _theta(config, "global")))
    rope["sliding_attention"].setdefault("rope_theta", more.pop("rope_local_base_freq", _theta(config, "local")))
    config.rope_parameters = rope
    config.standardize_rope_params()
    return all(
        part.get("rope_type") in ("default", "linear", "dynamic") and "partial_rotary_factor" not in part
        for part in rope.values()
    )


def _theta(config: PlainConfig, kind: str) -> float:
    theta = declared(config.model_type).theta
    assert not isinstance(theta, float)
    return theta[kind]


def _usual(rope: Fields, config: PlainConfig) -> bool:
    """Tell whether a scaling has what transformers computes it from, as numbers of a size that models have."""
    kind = rope.get("rope_type")
    if (
        not isinstance(kind, str)
        or kind not in _SCALINGS
        or (config.model_type == "phi3" and kind not in ("default", "longrope"))
    ):
        return False
    if kind not in ("default", "linear") and getattr(config, "head_dim", 0) is None:  # of Mixtral
        return False
    needed, optional = _SCALINGS[kind]
    if needed - set(rope) or set(rope) - needed - optional - _SHARED:
        return False
    share = rope.get("partial_rotary_factor", 1.0)
    numbers = {name: rope[name] for name in rope if name.endswith(("factor", "theta")) or name.startswith("beta")}
    lists = [numbers.pop(name) for name in ("short_factor", "long_factor") if name in rope]
    if not all(map(_is_number, [share, *numbers.values()])) or not 0 < share <= 1:
        return False
    pairs = int(head_dim(config) * share) // 2
    if not all(isinstance(one, list) and len(one) == pairs and all(map(_is_number, one)) for one in lists):
        return False
    return (
        10 <= rope["rope_theta"] <= 1e12
        and 1 <= numbers.get("factor", 1) <= 1e4
        and numbers.get("low_freq_factor", 1) < numbers.get("high_freq_factor", 2)
        and numbers.get("beta_slow", 1) < numbers.get("beta_fast", 32)
        and type(rope.get("truncate", True)) is bool
        and (type(rope.get(_ORIGINAL, 1)) is int and rope.get(_ORIGINAL, 1) > 0)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _sound(config: PlainConfig, told: Declared) -> bool:
    """Tell whether a model can be built of the sizes."""
    size, layers, pad = head_dim(config), config.num_hidden_layers, getattr(config, "pad_token_id", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds, unrotated = getattr(config, "layer_types", None), getattr(config, "no_rope_layers", None)
    return (
        config.hidden_size % config.num_attention_heads == 0
        and size % 2 == 0
        and (pad is None or 0 <= pad < config.vocab_size)
        and (kinds is None or (len(kinds) == layers and {*kinds} <= {*_LAYERS}))
        and (unrotated is None or len(unrotated) == layers)
        and all(_usual(part, config) for part in (rope.values() if told.layered else [rope] if rope else []))
        and ("num_key_value_heads" not in told.fields or config.num_key_value_heads is not None)
        and all(_is_share(getattr(config, name)) for name in told.fields if name.endswith(_SHARES))
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1
