"""Position scaling: the one plan object, and its spellings for transformers 4 and 5, GGUF and llama.cpp.

Nobody else multiplies or divides by the factor. Pair j of a head with d rotary dimensions turns by
position * rope_theta^(-2j/d); Position Interpolation divides every such frequency by
factor = new window / original window, so that position m * factor has the angles position m had.

Source: arXiv 2306.15595, section 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import CheckpointError, GgufError, OptionError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_ROPE_THETA = 10000.0
"""What transformers takes for Llama when a config names no base."""

GGUF_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
"""What llama.cpp knows; any other ends its whole process."""

FACTOR_TENSORS = {
    "llama": ("rope_freqs.weight",),
    "granite": ("rope_freqs.weight",),
    "phi3": ("rope_factors_long.weight", "rope_factors_short.weight"),
}
"""Tensors that hold a divisor for each frequency, by GGUF's name of the architecture; others have none."""

NOPE_FACTOR = 2.0**40
"""Linear scaling by this is no rotation at all: position 2^21 turns by 2^-19 of a radian."""

_LONGROPE_TENSORS = ("rope_factors_long.weight", "rope_factors_short.weight")

FACTOR_TENSOR_NAMES = ("rope_freqs.weight", *_LONGROPE_TENSORS)

_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""The only values that llama.cpp computes with when it reads `yarn` off a file."""


@dataclass(frozen=True)
class OwnScaling:
    """How a model scales its frequencies before any Position Interpolation of ours.

    Args:
        rope_type: `llama3` (Llama 3.1), `yarn` or `longrope`.
        fields: the numbers it is made of, checked, by their names in a Hugging Face config.

    Source: of `yarn` arXiv 2309.00071, of `longrope` arXiv 2402.13753; `llama3` as transformers computes it.
    """

    rope_type: str
    fields: Mapping[str, Any]

    @property
    def switches(self) -> bool:
        """Whether prompts beyond the original window have other frequencies than shorter ones."""
        return self.rope_type == "longrope" and self.fields["short_factor"] != self.fields["long_factor"]

    @property
    def attention_factor(self) -> float:
        """What sine and cosine are multiplied by, dimensionless."""
        given = self.fields.get("attention_factor")
        return 1.0 if self.rope_type == "llama3" else self._default_attention_factor if given is None else float(given)

    @property
    def _default_attention_factor(self) -> float:
        factor = self.fields["factor"]
        if self.rope_type == "yarn":
            return 1 + 0.1 * math.log(max(factor, 1.0))
        return math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(self.fields["original_max_position_embeddings"]))

    def divisors(self, theta: float, rotary_dim: int, *, short: bool = False) -> list[float]:
        """Return what each frequency is divided by, from the fastest pair to the slowest: `rotary_dim / 2` numbers.

        Args:
            theta: base of the angles, dimensionless.
            rotary_dim: dimensions of a head that are rotated; even.
            short: those of prompts within the original window, where they differ.
        """
        if self.rope_type == "longrope":
            return list(self.fields["short_factor" if short else "long_factor"])
        pairs = range(rotary_dim // 2)
        kept = self._kept_yarn if self.rope_type == "yarn" else self._kept_llama3
        shares = [min(max(kept(pair, theta, rotary_dim), 0.0), 1.0) for pair in pairs]  # 1: fast, kept as it is
        return [1 / (share + (1 - share) / self.fields["factor"]) for share in shares]

    def _kept_llama3(self, pair: int, theta: float, rotary_dim: int) -> float:
        low, high = self.fields["low_freq_factor"], self.fields["high_freq_factor"]
        turns = self.fields["original_max_position_embeddings"] * theta ** (-2 * pair / rotary_dim) / (2 * math.pi)
        return float((turns - low) / (high - low))

    def _kept_yarn(self, pair: int, theta: float, rotary_dim: int) -> float:
        def pair_that_turns(times: float) -> float:
            window = self.fields["original_max_position_embeddings"]
            return rotary_dim * math.log(window / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(self.fields["beta_fast"]), pair_that_turns(self.fields["beta_slow"])
        if self.fields["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        return 1 - (pair - low) / (high - low or 0.001)

    @property
    def has_keys(self) -> bool:
        """Whether llama.cpp can compute it from keys, with no tensor."""
        return self.rope_type == "yarn" and self.fields["truncate"] and _YARN_DEFAULTS.items() <= self.fields.items()

    @classmethod
    def from_hf(
        cls, rope_type: str, rope: Mapping[str, Any], config: Mapping[str, Any], window: int, field: str, path: str
    ) -> OwnScaling:
        """Read and check the fields of a `rope_parameters` object."""

        def number(name: str, default: float | None = None) -> float:
            value = rope.get(name)
            return default if value is None and default is not None else positive_number(value, f"{field}.{name}", path)

        name = "original_max_position_embeddings"
        holder = next((fields for fields in (rope, config) if fields.get(name) is not None), {name: window})
        original = positive_int(holder, name, path)
        fields: dict[str, Any] = {
            name: original, "factor": number("factor", None if rope_type == "llama3" else window / original)
        }  # fmt: skip
        if fields["factor"] < 1:
            raise CheckpointError(
                f"{path}: {field}.factor must be at least 1, got {fields['factor']:g}", "correct the config"
            )
        if rope_type == "llama3":
            fields |= {name: number(name) for name in ("low_freq_factor", "high_freq_factor")}
            if fields["high_freq_factor"] <= fields["low_freq_factor"]:
                raise CheckpointError(
                    f"{path}: {field}.high_freq_factor must be above low_freq_factor "
                    f"{fields['low_freq_factor']:g}, got {fields['high_freq_factor']:g}",
                    "correct the config",
                )
            return cls(rope_type, fields)
        if rope.get("attention_factor") is not None:
            fields["attention_factor"] = number("attention_factor")
        if rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                values = rope.get(name)
                if not isinstance(values, list) or not values:
                    raise CheckpointError(
                        f"{path}: {field}.{name} must be a list of numbers, got {repr(values)[:80]}",
                        "correct the config",
                    )
                fields[name] = [positive_number(value, f"{field}.{name}", path) for value in values]
            return cls(rope_type, fields)
        fields |= {name: number(name, default) for name, default in _YARN_DEFAULTS.items()}
        fields["truncate"] = rope.get("truncate", True) is not False
        if rope.get("mscale") and rope.get("mscale_all_dim") and "attention_factor" not in fields:
            scales = [1 + 0.1 * number(name) * math.log(fields["factor"]) for name in ("mscale", "mscale_all_dim")]
            fields["attention_factor"] = scales[0] / scales[1]
        return cls(rope_type, fields)


@dataclass(frozen=True)
class RopeScaling:
    """How a model turns positions into angles, and up to which position.

    Args:
        rope_type: `default` (no interpolation), `linear` (Position Interpolation), `nope` (rotary positions switched
            off, spelled as linear scaling by NOPE_FACTOR) or `alibi` (a family without rotation).
        factor: of the interpolation, the new window by the original one, dimensionless; 1.0 for `default`.
        rope_theta: base of the angles, dimensionless.
        original_max_position_embeddings: window before it was extended, in tokens.
        max_position_embeddings: window of the model now, in tokens.
        own: scaling of its frequencies that the model had before; None for most.
        sliding_rope_theta: base in layers with a sliding window, whose short distances are never scaled; None where
            all layers are alike.
    """

    rope_type: str
    factor: float
    rope_theta: float
    original_max_position_embeddings: int
    max_position_embeddings: int
    own: OwnScaling | None = None
    sliding_rope_theta: float | None = None

    @property
    def rope_freq_scale(self) -> float:
        """What llama.cpp multiplies every position by; 1 but for linear scaling and for YaRN told by keys."""
        if self.own is not None and self._as_keys:
            return 1 / float(self.own.fields["factor"])
        return 1 / self.factor if self.rope_type in ("linear", "nope") else 1.0

    @property
    def is_extended(self) -> bool:
        """Whether the window is longer than the one the model had before."""
        return self.max_position_embeddings > self.original_max_position_embeddings

    def interpolated(self, context: int, rotary_dim: int) -> RopeScaling:
        """Return the Position Interpolation of this model to a window of `context` tokens.

        Where the model already scales, the two are composed: linear factors multiply, and a scaling of its own
        stays as the divisor of each frequency (of `longrope` that of long prompts, at any length) below the factor.

        Args:
            context: new window, in tokens.
            rotary_dim: dimensions of a head that are rotated.

        Raises:
            OptionError: `context` is not above the window.
            UnsupportedError: there is no rotation.
        """
        self.check_extendable(context)
        window = self.max_position_embeddings
        if self.rope_type == "linear":
            return replace(self, factor=self.factor * context / window, max_position_embeddings=context)
        return replace(
            self, rope_type="linear", factor=context / window, original_max_position_embeddings=window,
            max_position_embeddings=context, own=self.own and self._as_divisors(self.own, rotary_dim),
        )  # fmt: skip

    def check_extendable(self, context: int) -> None:
        """Check that the window can become `context` tokens, whatever the method.

        Raises:
            OptionError: `context` is not above the window.
            UnsupportedError: there is no rotation.
        """
        window = self.max_position_embeddings
        if self.rope_type == "alibi":
            raise UnsupportedError(
                "Position Interpolation needs rotary positions; this family has ALiBi, biases that grow with distance",
                "leave --context out to convert as is",
            )
        if self.rope_type == "nope":
            raise UnsupportedError(
                "this model's rotary positions are switched off (NoPE)", "take the model before that"
            )
        if context <= window:
            raise OptionError(
                f"context must be above the model's window of {window} tokens, got {context}",
                f"try --context {4 * window}, or leave --context out to convert as is",
            )
        if context >= 2**31:
            raise OptionError(f"context must be below 2^31 tokens, got {context}")

    def _as_divisors(self, own: OwnScaling, rotary_dim: int) -> OwnScaling:
        """Return a scaling of the same angles that is one list of divisors, whatever the prompt's length."""
        return divisors_scaling(own.divisors(self.rope_theta, rotary_dim), own.attention_factor)

    def grown(self, share: float) -> RopeScaling:
        """Return the interpolation part of the way from no scaling to this one; its factor grows geometrically.

        Args:
            share: of the way, from 0 (factor 1, the original window) to 1 (this scaling).
        """
        window = self.original_max_position_embeddings
        context = round(window * (self.max_position_embeddings / window) ** share)
        return replace(self, factor=context / window, max_position_embeddings=context)

    def frequencies(self, rotary_dim: int, *, short: bool = False) -> list[float]:
        """Return the angle of each pair at position 1, in radians, from the fastest to the slowest.

        Args:
            rotary_dim: dimensions of a head that are rotated; even.
            short: those of prompts within the original window, where they differ.
        """
        pairs = range(rotary_dim // 2)
        divisors = self.own.divisors(self.rope_theta, rotary_dim, short=short) if self.own else [1.0 for _ in pairs]
        plain = (self.rope_theta ** (-2 * pair / rotary_dim) for pair in pairs)
        return [frequency / (self.factor * divisor) for frequency, divisor in zip(plain, divisors, strict=True)]

    def positions_as_under(self, other: RopeScaling, positions: np.ndarray) -> np.ndarray:
        """Return the positions, float32, that have under this scaling the angles of `positions` under another one.

        Args:
            other: linear scaling of the same original window and base.
            positions: of any shape, in tokens.
        """
        return (positions * (self.factor / other.factor)).astype("float32")

    def factor_tensors(self, arch: str, rotary_dim: int) -> dict[str, list[float]]:
        """Return the divisors of the frequencies by the name of the GGUF tensor that holds them; empty for most models.

        Args:
            arch: GGUF's name of the architecture.
            rotary_dim: dimensions of a head that are rotated; even.
        """
        own = self.own
        if own is None or not self.needs_factor_tensors:
            return {}
        names = (
            _LONGROPE_TENSORS if self.rope_type == "default" and own.rope_type == "longrope" else FACTOR_TENSORS[arch]
        )
        return {name: own.divisors(self.rope_theta, rotary_dim, short="short" in name) for name in names}

    @property
    def _as_keys(self) -> bool:
        return self.own is not None and self.rope_type == "default" and self.own.has_keys

    @property
    def needs_factor_tensors(self) -> bool:
        """Whether keys alone cannot tell llama.cpp the frequencies."""
        if self.own is None or self._as_keys:
            return False
        return self.rope_type == "default" or set(self.own.fields["long_factor"]) != {1.0}

    # Hugging Face

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        path: str,
        *,
        window: int | None = None,
        sliding_theta: float | None = None,
    ) -> RopeScaling:
        """Read the scaling of a config, in the spelling of transformers 4 or 5.

        Args:
            config: `rope_parameters`, or `rope_scaling` and `rope_theta`, of a config as transformers has it.
            path: of the file, for messages.
            window: in tokens; `max_position_embeddings` of the config when None.
            sliding_theta: base of the layers with a sliding window; None where all layers are alike.

        Raises:
            CheckpointError: a field is missing or no number.
            UnsupportedError: an unknown rope type.
        """
        window = window or positive_int(config, "max_position_embeddings", path)
        field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # as transformers chooses
        rope = config.get(field) or {}
        rope = rope.get("full_attention") or rope
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        theta = rope.get("rope_theta", config.get("rope_theta", DEFAULT_ROPE_THETA))
        theta = positive_number(theta, f"{field}.rope_theta", path)
        plain = cls("default", 1.0, theta, window, window, sliding_rope_theta=sliding_theta)
        if rope_type in ("default", "dynamic"):  # dynamic is the default up to the window, which the file has
            return plain
        if rope_type in ("llama3", "yarn", "longrope") and sliding_theta is None:
            return _with_own(plain, OwnScaling.from_hf(rope_type, rope, config, window, field, path))
        if rope_type == "linear" and rope.get("factor") == NOPE_FACTOR:
            return replace(plain, rope_type="nope", factor=NOPE_FACTOR)
        if rope_type != "linear":
            own_types = "linear" if sliding_theta is not None else "linear, llama3, yarn, longrope"
            allowed = f"default, dynamic or {own_types}"
            raise UnsupportedError(
                f"{path}: {field}.rope_type must be {allowed}, got {rope_type!r}",
                "llama.cpp has no other position scaling: convert a checkpoint that uses one of these",
            )
        factor = positive_number(rope.get("factor"), f"{field}.factor", path)
        if factor < 1 or round(window / factor) < 1:
            raise CheckpointError(
                f"{path}: {field}.factor must be from 1 to the window of {window}, got {factor:g}", "correct the config"
            )
        original = round(window / factor)
        if rope.get("original_max_position_embeddings") is not None:
            original = positive_int(rope, "original_max_position_embeddings", path)
        if original == window or config.get("max_sequence_length") == round(window * factor):
            # The window was not edited, as transformers 4 once asked for; the new one is the product.
            original, window = window, round(window * factor)
        return replace(
            plain, rope_type="linear", factor=factor, original_max_position_embeddings=original,
            max_position_embeddings=window,
        )  # fmt: skip

    def to_parameters(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return this scaling as `rope_parameters` of transformers 5.

        Args:
            before: those of the config as it was; what they say of other things stays.
        """
        given = before.get("full_attention") or before
        parameters: dict[str, Any] = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        if "partial_rotary_factor" in given:
            parameters["partial_rotary_factor"] = given["partial_rotary_factor"]
        if self.own is not None and self.rope_type == "default":
            parameters |= {"rope_type": self.own.rope_type, **self.own.fields}
        elif self.own is not None:
            divisors = [self.factor * divisor for divisor in self.own.fields["long_factor"]]
            parameters |= {
                "rope_type": "longrope",
                "factor": self.factor,
                "short_factor": divisors,
                "long_factor": divisors,
                "attention_factor": self.own.attention_factor,
                "original_max_position_embeddings": self.original_max_position_embeddings,
            }
        elif self.rope_type in ("linear", "nope"):
            parameters |= {"rope_type": "linear", "factor": self.factor}
        if self.sliding_rope_theta is None:
            return parameters
        sliding = {"rope_type": "default", "rope_theta": self.sliding_rope_theta}
        return {"full_attention": parameters, "sliding_attention": sliding}

    def to_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config with this scaling, spelled for transformers 5 and for transformers 4."""
        if self.rope_type == "alibi":
            return dict(config)
        parameters = self.to_parameters(config.get("rope_scaling") or config.get("rope_parameters") or {})
        written = {**config, "max_position_embeddings": self.max_position_embeddings, "rope_parameters": parameters}
        if self.sliding_rope_theta is not None:
            return {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
        if "original_max_position_embeddings" in config and "original_max_position_embeddings" in parameters:
            written["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
        older = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return {
            **written,
            "rope_theta": self.rope_theta,
            "rope_scaling": older if parameters["rope_type"] != "default" else None,
        }

    def apply_to(self, config: Any) -> None:
        """Set this scaling in a config that transformers has opened, by its own fields."""
        if self.rope_type == "alibi":
            return
        config.max_position_embeddings = self.max_position_embeddings
        config.rope_parameters = self.to_parameters(config.rope_parameters)
        original = config.rope_parameters.get("original_max_position_embeddings")
        if original is not None and hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = original

    # GGUF

    def to_gguf(self, arch: str, *, finetuned: bool) -> dict[str, int | float | str | bool]:
        """Return the metadata of a GGUF file.

        Args:
            arch: GGUF's name of the architecture, the prefix of the keys.
            finetuned: whether the model was trained with this scaling.
        """
        keys: dict[str, int | float | str | bool] = {f"{arch}.context_length": self.max_position_embeddings}
        if self.rope_type == "alibi":
            return keys
        keys[f"{arch}.rope.freq_base"] = self.rope_theta
        if self.sliding_rope_theta is not None:
            keys[f"{arch}.rope.freq_base_swa"] = self.sliding_rope_theta
        if self.rope_type == "linear":
            keys[f"{arch}.rope.scaling.type"] = "linear"
            keys[f"{arch}.rope.scaling.factor"] = self.factor
            keys[f"{arch}.rope.scaling.original_context_length"] = self.original_max_position_embeddings
            keys[f"{arch}.rope.scaling.finetuned"] = finetuned
        if self.rope_type == "nope":
            keys |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": self.factor}
        if self.own is None:
            return keys
        attention = self.own.attention_factor
        if self.rope_type == "default" and (self._as_keys or self.own.rope_type == "longrope"):
            keys[f"{arch}.rope.scaling.type"] = self.own.rope_type
            if self._as_keys:
                keys[f"{arch}.rope.scaling.factor"] = self.own.fields["factor"]
                attention /= 1 + 0.1 * math.log(self.own.fields["factor"])  # llama.cpp multiplies by this by itself
            keys[f"{arch}.rope.scaling.original_context_length"] = self.own.fields["original_max_position_embeddings"]
        if abs(attention - 1) > 1e-7:
            keys[f"{arch}.rope.scaling.attn_factor"] = attention
        return keys

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: str) -> RopeScaling:
        """Read the scaling that the metadata of a GGUF file states.

        A file with `rope_freqs.weight` (Llama 3.1) reads as `default`: the factors are in the tensor.

        Raises:
            GgufError: a key is missing, or states what llama.cpp does not know.
        """
        arch = metadata.get("general.architecture")
        window = metadata.get(f"{arch}.context_length")
        if not isinstance(window, int) or window < 1:
            got = "it is missing" if window is None else f"got {window!r}"
            raise GgufError(
                f"{path}: {arch}.context_length must be a positive integer, {got}",
                "write the file again from its checkpoint",
            )
        rope_type = metadata.get(f"{arch}.rope.scaling.type", "none")
        if rope_type not in GGUF_ROPE_TYPES:
            raise GgufError(
                f"{path}: {arch}.rope.scaling.type must be one of {', '.join(GGUF_ROPE_TYPES)}, got {rope_type!r}",
                "write the file again from its checkpoint",
            )
        try:
            factor = positive_number(
                metadata.get(f"{arch}.rope.scaling.factor", 1.0), f"{arch}.rope.scaling.factor", path
            )
            theta = positive_number(
                metadata.get(f"{arch}.rope.freq_base", DEFAULT_ROPE_THETA), f"{arch}.rope.freq_base", path
            )
        except CheckpointError as error:
            raise GgufError(str(error), "write the file again from its checkpoint") from error
        if rope_type == "linear" and factor == NOPE_FACTOR:
            return cls("nope", factor, theta, window, window)
        original = metadata.get(f"{arch}.rope.scaling.original_context_length", round(window / factor))
        return cls("default" if rope_type == "none" else rope_type, factor, theta, original, window)


def divisors_scaling(divisors: Sequence[float], attention_factor: float = 1.0) -> OwnScaling:
    """Return the scaling that divides each frequency by a number, at any length, and the attention by none."""
    listed = list(divisors)
    return OwnScaling("longrope", {"short_factor": listed, "long_factor": listed, "attention_factor": attention_factor})


def _with_own(plain: RopeScaling, own: OwnScaling) -> RopeScaling:
    """Return window and interpolation of a config that scales its frequencies.

    One list of divisors at any length, with a factor between its windows, is Position Interpolation as `to_hf` spells
    it where the model had a scaling of its own, or where transformers takes no other spelling.
    """
    window, original, factor = plain.max_position_embeddings, own.fields["original_max_position_embeddings"], 1.0
    if own.rope_type == "longrope":
        factor = own.fields["factor"]
        if own.switches and window <= original:  # no prompt of the window is long
            own = OwnScaling(own.rope_type, {**own.fields, "long_factor": own.fields["short_factor"]})
        if own.switches or factor == 1 or abs(original * factor - window) > 1:
            return replace(plain, own=own)
        divisors = [divisor / factor for divisor in own.fields["long_factor"]]
        return replace(
            plain, rope_type="linear", factor=factor, original_max_position_embeddings=original,
            own=divisors_scaling(divisors, own.attention_factor),
        )  # fmt: skip
    if own.rope_type == "yarn":
        window = max(window, round(original * own.fields["factor"]))  # an unedited window is the original one
    return replace(plain, original_max_position_embeddings=window, max_position_embeddings=window, own=own)


def check_consistent(scaling: RopeScaling, path: str) -> list[str]:
    """Return what is wrong between the windows and the factor of a file, one sentence each; empty when sound."""
    problems = []
    new, original, factor = scaling.max_position_embeddings, scaling.original_max_position_embeddings, scaling.factor
    if scaling.rope_type == "linear" and not factor > 1:
        problems.append(f"{path}: rope scaling factor must be above 1 for linear scaling, got {factor:g}")
    if scaling.rope_type == "linear" and abs(original * factor - new) > max(1.0, 1e-3 * new):
        problems.append(f"{path}: window {new} is not original window {original} times factor {factor:g}")
    return problems


def positive_number(value: Any, name: str, path: str) -> float:
    """Return a field as a float.

    Raises:
        CheckpointError: it is no positive number, or beyond what GGUF's 32 bits hold.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 1e-37 < number < 1e38 or isinstance(value, bool):
        got = repr(value)[:80]
        raise CheckpointError(f"{path}: {name} must be a positive number, got {got}", "correct the config")
    return number


def positive_int(fields: Mapping[str, Any], name: str, path: str) -> int:
    """Return a field that must be an integer from 1 to 2^31 - 1.

    Raises:
        CheckpointError: otherwise.
    """
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        got = "nothing" if value is None else repr(value)[:80]
        raise CheckpointError(f"{path}: {name} must be a positive integer, got {got}", "correct the config")
    return value
