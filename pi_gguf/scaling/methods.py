"""How a window is extended: Position Interpolation and what the field compares it with, one small class each.

In: the scaling a model has and a new window. Out: the scaling of the extended model, whose spellings for Hugging Face,
GGUF and llama.cpp are `RopeScaling`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from pi_gguf.errors import OptionError, PiGgufError, UnsupportedError
from pi_gguf.scaling.own import OwnScaling
from pi_gguf.scaling.rope import NOPE_FACTOR, RopeScaling


class Method(ABC):
    """A way to extend a window.

    Args:
        name: as `--method` takes it.
        summary: what it does, for tables and help.
    """

    name: str
    summary: str

    @abstractmethod
    def extended(self, rope: RopeScaling, context: int, rotary_dim: int) -> RopeScaling:
        """Return the scaling of a model of window `context`, in tokens, that had the scaling `rope`.

        Args:
            rope: of the model as it is.
            context: new window, in tokens.
            rotary_dim: dimensions of a head that are rotated.

        Raises:
            OptionError: `context` is not above the window.
            UnsupportedError: the method does not compose with the scaling that is there.
        """

    def _longer(self, rope: RopeScaling, context: int) -> RopeScaling:
        """Return the same frequencies with the new window."""
        rope.check_extendable(context)
        if rope.rope_type != "default" or rope.own is not None:
            kind = rope.own.rope_type if rope.own else rope.rope_type
            raise UnsupportedError(
                f"method {self.name} is for models without scaling, this one has rope_type {kind}",
                "--method linear composes with what is there",
            )
        window = rope.max_position_embeddings
        return replace(rope, original_max_position_embeddings=window, max_position_embeddings=context)


class Linear(Method):
    """Position Interpolation: every frequency divided by the factor. Source: arXiv 2306.15595."""

    name = "linear"
    summary = "Position Interpolation: every position divided by the factor"

    def extended(self, rope: RopeScaling, context: int, rotary_dim: int) -> RopeScaling:
        return rope.interpolated(context, rotary_dim)


class Ntk(Method):
    """A larger base, fixed: the slowest pair turns as under Position Interpolation, the fastest as before.

    Source: "NTK-aware scaled RoPE" as arXiv 2309.00071, section 3.1, writes it: base * factor^(d / (d - 2)).
    """

    name = "ntk"
    summary = "a larger base (NTK-aware): slow frequencies divided by the factor, fast ones kept"

    def extended(self, rope: RopeScaling, context: int, rotary_dim: int) -> RopeScaling:
        if rotary_dim < 4:
            raise UnsupportedError(f"method ntk needs at least 4 rotated dimensions a head, got {rotary_dim}")
        factor = context / rope.max_position_embeddings
        theta = rope.rope_theta * factor ** (rotary_dim / (rotary_dim - 2))
        return replace(self._longer(rope, context), rope_theta=theta)


class Yarn(Method):
    """Fast frequencies kept, slow ones divided by the factor, a ramp between, attention sharpened.

    Source: arXiv 2309.00071, with its betas of 32 and 1 and its attention factor 1 + 0.1 ln(factor).
    """

    name = "yarn"
    summary = "YaRN: a ramp between kept and divided frequencies, attention sharpened"

    def extended(self, rope: RopeScaling, context: int, rotary_dim: int) -> RopeScaling:
        window = rope.max_position_embeddings
        if context % window:
            raise OptionError(
                f"context must be a multiple of the window of {window} tokens for method yarn, got {context}",
                f"try --context {window * max(2, round(context / window))}",
            )
        fields = {
            "original_max_position_embeddings": window,
            "factor": context / window,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
        }
        return replace(self._longer(rope, context), own=OwnScaling("yarn", fields))


def takes_yarn(rope: RopeScaling, context: int) -> bool:
    """Tell whether YaRN extends a model to a window."""
    try:
        return bool(Yarn().extended(rope, context, 2))
    except PiGgufError:
        return False


class Unscaled(Method):
    """No scaling: positions beyond the window are trained as they are (the paper's direct fine-tuning)."""

    name = "none"
    summary = "direct fine-tuning: positions as they are"

    def extended(self, rope: RopeScaling, context: int, rotary_dim: int) -> RopeScaling:
        return self._longer(rope, context)


class Nope(Method):
    """No positions: linear scaling by a factor so large that nothing rotates. Source: arXiv 2305.19466."""

    name = "nope"
    summary = "NoPE: rotary positions switched off"

    def extended(self, rope: RopeScaling, context: int, rotary_dim: int) -> RopeScaling:
        return replace(self._longer(rope, context), rope_type="nope", factor=NOPE_FACTOR)


METHODS: dict[str, Method] = {method.name: method for method in (Linear(), Ntk(), Yarn(), Unscaled(), Nope())}


def find_method(name: str) -> Method:
    """Return a method by its name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in METHODS:
        raise OptionError(f"method must be one of {', '.join(METHODS)}, got {name}", "linear is Position Interpolation")
    return METHODS[name]
