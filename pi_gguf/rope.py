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
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import CheckpointError, GgufError, OptionError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_ROPE_THETA = 10000.0
"""What transformers takes for Llama when a config names no base."""

GGUF_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
"""What llama.cpp knows; any other ends its whole process."""

_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor")


@dataclass(frozen=True)
class RopeScaling:
    """How a model turns positions into angles, and up to which position.

    Args:
        rope_type: `default` (no scaling), `linear` (Position Interpolation), `llama3` (Llama 3.1's own) or `alibi` (no
            rotation at all).
        factor: multiplier of the window, dimensionless; 1.0 for `default`.
        rope_theta: base of the angles, dimensionless.
        original_max_position_embeddings: trained window before scaling, in tokens.
        max_position_embeddings: window of the model now, in tokens.
        low_freq_factor: of `llama3`, dimensionless.
        high_freq_factor: of `llama3`, dimensionless.
        sliding_rope_theta: base in layers with a sliding window, whose short distances are never scaled; None where
            all layers are alike.
    """

    rope_type: str
    factor: float
    rope_theta: float
    original_max_position_embeddings: int
    max_position_embeddings: int
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    sliding_rope_theta: float | None = None

    @property
    def rope_freq_scale(self) -> float:
        """What llama.cpp multiplies every position by; 1 unless the scaling is linear."""
        return 1 / self.factor if self.rope_type == "linear" else 1.0

    def interpolated(self, context: int) -> RopeScaling:
        """Return the Position Interpolation of this model to a window of `context` tokens.

        Raises:
            OptionError: `context` is not above the window.
            UnsupportedError: the model already scales its positions.
        """
        window = self.max_position_embeddings
        if self.rope_type == "alibi":
            raise UnsupportedError(
                "Position Interpolation needs rotary positions; this family has ALiBi, biases that grow with distance",
                "leave --context out to convert as is",
            )
        if self.rope_type != "default":
            raise UnsupportedError(
                f"rope_type must be default to be interpolated, got {self.rope_type} with factor {self.factor:g} "
                f"(window {window})",
                "start from the checkpoint before its scaling, or convert without --context",
            )
        if context <= window:
            raise OptionError(
                f"context must be above the model's window of {window} tokens, got {context}",
                f"try --context {4 * window}, or leave --context out to convert as is",
            )
        if context >= 2**31:
            raise OptionError(f"context must be below 2^31 tokens, got {context}")
        return replace(self, rope_type="linear", factor=context / window, max_position_embeddings=context)

    def grown(self, share: float) -> RopeScaling:
        """Return the interpolation part of the way from no scaling to this one; its factor grows geometrically.

        Args:
            share: of the way, from 0 (factor 1, the original window) to 1 (this scaling).
        """
        window = self.original_max_position_embeddings
        context = round(window * (self.max_position_embeddings / window) ** share)
        return replace(self, factor=context / window, max_position_embeddings=context)

    def positions_as_under(self, other: RopeScaling, positions: np.ndarray) -> np.ndarray:
        """Return the positions, float32, that have under this scaling the angles of `positions` under another one.

        Args:
            other: linear scaling of the same original window and base.
            positions: of any shape, in tokens.
        """
        return (positions * (self.factor / other.factor)).astype("float32")

    def rope_factors(self, rotary_dim: int) -> list[float] | None:
        """Return the divisor of each frequency for GGUF's `rope_freqs.weight`, or None when no tensor is needed.

        Args:
            rotary_dim: dimensions of a head that are rotated; even.

        Returns:
            `rotary_dim / 2` divisors, dimensionless, from the fastest pair to the slowest.
        """
        if self.rope_type != "llama3":
            return None
        assert self.low_freq_factor is not None and self.high_freq_factor is not None
        divisors = []
        for pair in range(0, rotary_dim, 2):
            freq = self.rope_theta ** (-pair / rotary_dim)
            turns = self.original_max_position_embeddings * freq / (2 * math.pi)
            share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            share = min(max(share, 0.0), 1.0)  # 1: fast, kept as it is; 0: slow, divided by the whole factor
            divisors.append(1 / (share + (1 - share) / self.factor))
        return divisors

    # Hugging Face

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        path: str,
        *,
        window: int | None = None,
        theta: float = DEFAULT_ROPE_THETA,
        sliding_theta: float | None = None,
    ) -> RopeScaling:
        """Read the scaling of a config, in the spelling of transformers 4 or 5.

        Args:
            config: the parsed config.json.
            path: of the file, for messages.
            window: in tokens; `max_position_embeddings` of the config when None.
            theta: base where the config names none, the family's default.
            sliding_theta: base of the layers with a sliding window; None where all layers are alike.

        Raises:
            CheckpointError: a field is missing or no number.
            UnsupportedError: an unknown rope type.
        """
        window = window or positive_int(config, "max_position_embeddings", path)
        field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        rope = config.get(field) or {}
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{path}: {field} must be an object, got {rope!r}")
        rope = rope.get("full_attention", rope)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        theta = positive_number(rope.get("rope_theta", config.get("rope_theta", theta)), f"{field}.rope_theta", path)
        if rope_type == "default":
            return cls("default", 1.0, theta, window, window, sliding_rope_theta=sliding_theta)
        if rope_type not in ("linear", "llama3"):
            raise UnsupportedError(
                f"{path}: {field}.rope_type must be default, linear or llama3, got {rope_type!r}",
                "convert a checkpoint that uses one of these",
            )
        factor = positive_number(rope.get("factor"), f"{field}.factor", path)
        if factor < 1 or round(window / factor) < 1:
            raise CheckpointError(
                f"{path}: {field}.factor must be from 1 to the window of {window}, got {factor:g}", "correct the config"
            )
        if rope_type == "linear":
            original = rope.get("original_max_position_embeddings")
            if config.get("max_sequence_length") == round(window * factor):
                # Written for transformers 4 before it asked for an edited window: the new one is here.
                original, window = window, round(window * factor)
            original = original or round(window / factor)
            return cls("linear", factor, theta, original, window, sliding_rope_theta=sliding_theta)
        low, high = (positive_number(rope.get(name), f"{field}.{name}", path) for name in _LLAMA3_FIELDS)
        if high <= low:
            raise CheckpointError(
                f"{path}: {field}.high_freq_factor must be above low_freq_factor {low:g}, got {high:g}"
            )
        original = positive_int(rope, "original_max_position_embeddings", path)
        return cls("llama3", factor, theta, original, window, low, high)

    def to_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config with this scaling, spelled for transformers 5 and for transformers 4."""
        if self.rope_type == "alibi":
            return dict(config)
        before = config.get("rope_parameters") or {}
        parameters: dict[str, Any] = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        if "partial_rotary_factor" in before:
            parameters["partial_rotary_factor"] = before["partial_rotary_factor"]
        if self.rope_type != "default":
            parameters["factor"] = self.factor
        if self.rope_type == "llama3":
            parameters["low_freq_factor"] = self.low_freq_factor
            parameters["high_freq_factor"] = self.high_freq_factor
            parameters["original_max_position_embeddings"] = self.original_max_position_embeddings
        older = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if self.sliding_rope_theta is not None:
            sliding = {"rope_type": "default", "rope_theta": self.sliding_rope_theta}
            return {
                **{key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")},
                "max_position_embeddings": self.max_position_embeddings,
                "rope_parameters": {"full_attention": parameters, "sliding_attention": sliding},
            }
        return {
            **config,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": parameters,
            "rope_theta": self.rope_theta,
            "rope_scaling": older if self.rope_type != "default" else None,
        }

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
        original = metadata.get(f"{arch}.rope.scaling.original_context_length", round(window / factor))
        return cls("default" if rope_type == "none" else rope_type, factor, theta, original, window)


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
