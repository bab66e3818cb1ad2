"""The position scaling that a model brings with it: Llama 3's, YaRN's, LongRoPE's, or plain divisors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pi_gguf.errors import CheckpointError

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


def divisors_scaling(divisors: Sequence[float], attention_factor: float = 1.0) -> OwnScaling:
    """Return the scaling that divides each frequency by a number, at any length, and the attention by none."""
    listed = list(divisors)
    return OwnScaling("longrope", {"short_factor": listed, "long_factor": listed, "attention_factor": attention_factor})


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
