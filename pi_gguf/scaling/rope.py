"""Position scaling: the one plan object, and its spellings for transformers 4 and 5, GGUF and llama.cpp.

Nobody else multiplies or divides by the factor. Pair j of a head with d rotary dimensions turns by
position * rope_theta^(-2j/d); Position Interpolation divides every such frequency by
factor = new window / original window, so that position m * factor has the angles position m had.

Source: arXiv 2306.15595, section 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pi_gguf.errors import CheckpointError, GgufError, OptionError, UnsupportedError
from pi_gguf.scaling.own import OwnScaling, divisors_scaling, positive_int, positive_number

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

LONGROPE_TENSORS = ("rope_factors_long.weight", "rope_factors_short.weight")

FACTOR_TENSOR_NAMES = ("rope_freqs.weight", *LONGROPE_TENSORS)


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
            LONGROPE_TENSORS if self.rope_type == "default" and own.rope_type == "longrope" else FACTOR_TENSORS[arch]
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
