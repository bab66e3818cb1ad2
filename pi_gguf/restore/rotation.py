"""The position scaling of a GGUF file, with what its tensors say -> the one plan object.

In: an opened file. Out: a `RopeScaling` that `to_hf` spells for config.json. What llama.cpp reads of keys and of lists
of divisors comes back as what it computes; a list that is Llama 3's formula comes back as that formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pi_gguf.errors import GgufError, UnsupportedError
from pi_gguf.families.family import Family, shortest
from pi_gguf.restore.opened import OpenedFile
from pi_gguf.scaling.own import OwnScaling, divisors_scaling
from pi_gguf.scaling.rope import DEFAULT_ROPE_THETA, LONGROPE_TENSORS, RopeScaling

_FREQUENCIES = "rope_freqs.weight"

_LOW, _HIGH = 1.0, 4.0
"""Llama 3's low_freq_factor and high_freq_factor, the same in all its models."""

_TOLERANCE = 1e-5
"""Of divisors of 32 bits; relative."""


def rope_of_file(opened: OpenedFile, family: Family, rotary_dim: int) -> RopeScaling:
    """Return the scaling that llama.cpp reads off a file.

    Args:
        family: as which it is unpacked.
        rotary_dim: dimensions of a head that are rotated.

    Raises:
        GgufError: a key or a tensor is missing, or is not as it must be.
        UnsupportedError: a combination that no config of transformers can say.
    """
    stated, path = opened.stated, str(opened.path)
    if family.alibi:
        window = stated.whole("context_length")
        return RopeScaling("alibi", 1.0, DEFAULT_ROPE_THETA, window, window)
    read = RopeScaling.from_gguf(opened.info.metadata, path)
    window, factor = read.max_position_embeddings, shortest(read.factor)
    if family.model_type == "gemma3_text":
        read = replace(read, sliding_rope_theta=stated.number("rope.freq_base_swa", DEFAULT_ROPE_THETA))
    read = replace(read, factor=factor, rope_theta=shortest(read.rope_theta))
    plain = replace(read, rope_type="default", factor=1.0, original_max_position_embeddings=window)
    attention = stated.number("rope.scaling.attn_factor", 1.0)
    long, short = _lists(opened, rotary_dim // 2)
    if read.rope_type in ("linear", "nope"):
        own = divisors_scaling(long, attention) if long else None
        if own is None and family.longrope_only:
            own = divisors_scaling([1.0] * (rotary_dim // 2), attention)
        elif own is None:
            _check_attention(attention, path)
        return replace(read, own=own)
    if read.rope_type == "yarn":
        return replace(plain, own=_yarn(read, factor, attention, path, listed=bool(long)))
    original = stated.whole("rope.scaling.original_context_length", window)
    if not long:
        _check_attention(attention, path)
        if read.rope_type == "longrope":
            raise GgufError(f"{path}: {LONGROPE_TENSORS[0]} is missing", "write the file again from its checkpoint")
        return plain
    plainly = _FREQUENCIES in opened.tensors and math.isclose(attention, 1)
    if plainly and (formula := llama3(long, plain.rope_theta, rotary_dim, original)):
        return replace(plain, own=formula)
    fields = {
        "original_max_position_embeddings": original, "factor": window / original,
        "short_factor": short, "long_factor": long, "attention_factor": attention,
    }  # fmt: skip
    return replace(plain, own=OwnScaling("longrope", fields))


def _lists(opened: OpenedFile, pairs: int) -> tuple[list[float], list[float]]:
    """Return the divisors of the frequencies for long prompts and for short ones; empty where there are none."""
    named = [_FREQUENCIES] * 2 if _FREQUENCIES in opened.tensors else list(LONGROPE_TENSORS)
    found = [opened.vector(name) for name in named]
    if found == [None, None]:
        return [], []
    lists = []
    for name, values in zip(named, found, strict=True):
        if values is None or len(values) != pairs or not all(0 < value < math.inf for value in values):
            got = "it is missing" if values is None else f"got {len(values)} from {values[:1]}"
            raise GgufError(
                f"{opened.path}: {name} must be {pairs} positive numbers, {got}",
                "write the file again from its checkpoint",
            )
        lists.append([shortest(value) for value in values])
    return lists[0], lists[1]


def _check_attention(attention: float, path: str) -> None:
    if not math.isclose(attention, 1, rel_tol=1e-6):
        raise UnsupportedError(
            f"{path}: rope.scaling.attn_factor is {attention:g} without YaRN or LongRoPE",
            "no config of transformers can say that; take another file of the model",
        )


def _yarn(read: RopeScaling, factor: float, attention: float, path: str, *, listed: bool) -> OwnScaling:
    if listed:
        raise UnsupportedError(
            f"{path}: rope.scaling.type is yarn, and there are divisors of the frequencies too",
            "no config of transformers can say that; take another file of the model",
        )
    fields = {
        "original_max_position_embeddings": read.original_max_position_embeddings, "factor": factor,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    }  # fmt: skip
    if not math.isclose(attention, 1, rel_tol=1e-6):  # llama.cpp multiplies by the usual one by itself
        fields["attention_factor"] = shortest(attention * (1 + 0.1 * math.log(factor)))
    return OwnScaling("yarn", fields)


def llama3(divisors: Sequence[float], theta: float, rotary_dim: int, original: int) -> OwnScaling | None:
    """Return Llama 3's scaling that gives a list of divisors; None where none does.

    The slowest frequency is divided by the whole factor, and one that is divided in part tells the original window.

    Args:
        divisors: from the fastest frequency to the slowest.
        theta: base of the angles, dimensionless.
        rotary_dim: dimensions of a head that are rotated.
        original: what the original window may be, in tokens.
    """
    factor = shortest(divisors[-1])
    if factor <= 1:
        return None
    candidates = [original]
    for pair, divisor in enumerate(divisors):
        kept = (1 / divisor - 1 / factor) / (1 - 1 / factor)
        if 0.01 < kept < 0.99:
            turns = _LOW + kept * (_HIGH - _LOW)
            candidates.append(round(2 * math.pi * turns * theta ** (2 * pair / rotary_dim)))
    for window in (w for w in (*candidates, 8192) if 0 < w < 2**31):
        fields = {
            "original_max_position_embeddings": window, "factor": factor,
            "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
        }  # fmt: skip
        own = OwnScaling("llama3", fields)
        ours = own.divisors(theta, rotary_dim)
        if all(math.isclose(one, other, rel_tol=_TOLERANCE) for one, other in zip(ours, divisors, strict=True)):
            return own
    return None


def agree(one: RopeScaling, other: RopeScaling, rotary_dim: int) -> bool:
    """Tell whether two scalings turn by the same angles up to the same window.

    Args:
        rotary_dim: dimensions of a head that are rotated.
    """
    if one.rope_type == "alibi" or one.max_position_embeddings != other.max_position_embeddings:
        return (one.rope_type, one.max_position_embeddings) == (other.rope_type, other.max_position_embeddings)
    return all(
        math.isclose(ours, theirs, rel_tol=_TOLERANCE)
        for short in (False, True)
        for ours, theirs in zip(_numbers(one, rotary_dim, short), _numbers(other, rotary_dim, short), strict=True)
    )


def _numbers(scaling: RopeScaling, rotary_dim: int, short: bool) -> list[float]:
    """Return all that a scaling computes with."""
    attention = scaling.own.attention_factor if scaling.own else 1.0
    sliding = scaling.sliding_rope_theta or scaling.rope_theta
    return [*scaling.frequencies(rotary_dim, short=short), attention, sliding]
