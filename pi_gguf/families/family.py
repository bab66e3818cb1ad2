"""What a family of models is to a conversion: GGUF's architecture, hyper-parameters and tensor transformations.

In: the opened config of transformers, which knows each family's defaults. gguf's own tables give the tensor names, and
transformers itself the tensors that a checkpoint must have; a family's file says only what differs. Each part goes both
ways: `keys` and `fields`, a transformation and what undoes it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import GgufError
from pi_gguf.families.declared import declared
from pi_gguf.scaling.own import positive_number

if TYPE_CHECKING:
    import torch

Config = Any
"""A transformers `PretrainedConfig`."""

Handled = Mapping[str, "Sequence[Any] | Callable[[Config], Sequence[Any]]"]
"""Fields of a config -> the values that llama.cpp computes, or a function that gives them."""

Change = Callable[["torch.Tensor", Config], "torch.Tensor"]
"""A tensor and the config -> another tensor."""


@dataclass(frozen=True)
class Transform:
    """What is done to a tensor on its way into a file, and on the way back; its shape stays.

    Args:
        do: from the checkpoint's tensor to the file's.
        undo: from the file's to the checkpoint's.
    """

    do: Change
    undo: Change

    def __call__(self, tensor: torch.Tensor, config: Config) -> torch.Tensor:
        return self.do(tensor, config)


@dataclass(frozen=True)
class Stated:
    """What a GGUF file states of its model.

    Args:
        path: of the file, for messages.
        arch: its architecture, the prefix of the keys.
        keys: values by key without the prefix.
        shapes: of its tensors by GGUF's names, as torch has them.
    """

    path: str
    arch: str
    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number from 1 on.

        Raises:
            GgufError: it is something else, or missing where there is no default.
        """
        value = self.keys.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self._wrong(name, "a positive integer", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number, as the shortest decimal that has its 32 bits: 1e-05, not 9.999999747378752e-06.

        Raises:
            GgufError: it is something else, or missing where there is no default.
        """
        value = self.keys.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(name, "a number", value)
        return shortest(value)

    def _wrong(self, name: str, what: str, value: Any) -> GgufError:
        got = "it is missing" if value is None else f"got {repr(value)[:80]}"
        return GgufError(
            f"{self.path}: {self.arch}.{name} must be {what}, {got}", "write the file again from its checkpoint"
        )

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.keys.get(name, default))

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor of this name in the first layer."""
        return f"blk.0.{name}" in self.shapes


def shortest(value: float) -> float:
    """Return the number of fewest digits that is the same in 32 bits."""
    stored = struct.pack("<f", value)
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((number for number in decimals if struct.pack("<f", number) == stored), value)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        model_type: of config.json.
        arch: GGUF's name of the architecture, the prefix of its keys.
        models: which models these are, for people.
        keys: hyper-parameters by GGUF key without the prefix, all but those of position scaling.
        fields: what a file states -> fields of config.json, the way back of `keys`; None where a file of this
            architecture is unpacked as another family, which computes the same.
        transforms: what is done to a tensor, by a pattern found in its Hugging Face name; the first that is found.
        handles: fields of the config of which llama.cpp computes some values only.
        alibi: positions are biases of the attention, not rotations; Position Interpolation does not apply.
        rename: of a Hugging Face name before it is looked up in gguf's tables.
        rope_finetuned: llama.cpp reads `rope.scaling.finetuned` false as "no rotation" here, so it is always true.
        longrope_only: transformers takes no other scaling in the config, so that Position Interpolation is spelled so.
        window: field of the config that holds the trained window, in tokens.
        default_window: what a config without this field means; None where it must be there.
        split_width: llama.cpp takes the size of a head to be the width by the number of heads.
        needs_head: llama.cpp asks for a head where it is the embedding too, so that it is written twice.
        experts: its layers have experts.
    """

    model_type: str
    arch: str
    models: str
    keys: Callable[[Config], dict[str, Any]]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    handles: Handled = field(default_factory=dict)
    alibi: bool = False
    rename: Callable[[str], str] = lambda name: name
    rope_finetuned: bool = False
    longrope_only: bool = False
    window: str = "max_position_embeddings"
    default_window: int | None = None
    split_width: bool = False
    needs_head: bool = False
    fields: Callable[[Stated], dict[str, Any]] | None = None
    experts: bool = False

    def transform(self, name: str) -> Transform | None:
        """Return what is done to a tensor, by its Hugging Face name; None when it is written as it is."""
        return next((t for pattern, t in self.transforms.items() if re.search(pattern, name)), None)

    def unstated(self, config: Config) -> dict[str, Any]:
        """Return what fields must be that a file has no key for, as llama.cpp computes one value of them only."""
        found = {name: (handled(config) if callable(handled) else handled) for name, handled in self.handles.items()}
        plain = {name: values for name, values in found.items() if "." not in name}
        return {name: values[0] for name, values in plain.items() if getattr(config, name) not in values}

    def complaint(self, config: Config) -> tuple[str, Any, str] | None:
        """Return field, value and what it must be, of the first field that llama.cpp cannot compute; None if none."""
        for name, handled in self.handles.items():
            values = handled(config) if callable(handled) else handled
            value = attrgetter(name)(config)
            if value not in values:
                return name, value, " or ".join(map(str, values))
        if self.split_width and head_dim(config) * config.num_attention_heads != config.hidden_size:
            return "head_dim", head_dim(config), f"{config.hidden_size / config.num_attention_heads:g}"
        return None


# Hyper-parameters that most families share


def head_dim(config: Config) -> int:
    """Return the size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: Config) -> int:
    """Return the number of key-value heads; a family without groups computes with all heads, whatever a config says."""
    grouped = "num_key_value_heads" in declared(config.model_type).fields
    return int((grouped and config.num_key_value_heads) or config.num_attention_heads)


def full_attention(config: Config) -> Sequence[Any]:
    """Return the values of `sliding_window` under which every layer sees the whole window, which is all that GGUF can
    say for some families."""
    window = config.sliding_window
    return (None, window) if window is not None and window >= config.max_position_embeddings else (None,)


def rotary_dim(config: Config) -> int:
    """Return how many dimensions of a head are rotated."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = positive_number(rope.get("partial_rotary_factor", 1.0), "partial_rotary_factor", "config.json")
    return int(head_dim(config) * share)


def common_keys(config: Config, *, feed_forward: int | None = None) -> dict[str, Any]:
    """Return layers, widths, heads and rotary dimensions.

    Args:
        feed_forward: inner width; the config's `intermediate_size` when None.
    """
    return {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": feed_forward or config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "rope.dimension_count": rotary_dim(config),
        "vocab_size": config.vocab_size,
    }


def rms_keys(config: Config) -> dict[str, Any]:
    """Return the common keys of a family that normalizes by the root mean square."""
    return {**common_keys(config), "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}


def expert_keys(config: Config) -> dict[str, Any]:
    """Return how many experts there are and how many are used for a token."""
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}


# The same on the way back


def common_fields(stated: Stated) -> dict[str, Any]:
    """Return layers, widths and heads as config.json has them; of a size that is absent, what llama.cpp takes."""
    width, heads = stated.whole("embedding_length"), stated.whole("attention.head_count")
    return {
        "num_hidden_layers": stated.whole("block_count"),
        "hidden_size": width,
        "intermediate_size": stated.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated.whole("attention.head_count_kv", heads),
        "head_dim": stated.whole("attention.key_length", max(1, width // heads)),
    }


def rms_fields(stated: Stated) -> dict[str, Any]:
    """Return the common fields of a family that normalizes by the root mean square."""
    return {**common_fields(stated), "rms_norm_eps": stated.number("attention.layer_norm_rms_epsilon")}


def bias_fields(stated: Stated) -> dict[str, Any]:
    """Return whether attention and feed-forward have biases, as the tensors tell."""
    return {"attention_bias": stated.has("attn_q.bias"), "mlp_bias": stated.has("ffn_up.bias")}


def expert_fields(stated: Stated, name: str = "num_experts") -> dict[str, Any]:
    """Return how many experts there are and how many are used for a token.

    Args:
        name: of the former in config.json.
    """
    return {name: stated.whole("expert_count"), "num_experts_per_tok": stated.whole("expert_used_count")}


# Transformations that several families share. H heads, d head size, D width.


def interleave(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of a head: Hugging Face rotates element j with j + d/2, llama.cpp element 2j with 2j + 1.

    Args:
        tensor: weight (H * d, D) or bias (H * d).
    """
    rest = tensor.shape[1:]
    return tensor.reshape(n_heads, 2, -1, *rest).transpose(1, 2).reshape(tensor.shape)


def part(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo `interleave`."""
    rest = tensor.shape[1:]
    return tensor.reshape(n_heads, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape)


INTERLEAVED_ROTARY: dict[str, Transform] = {
    r"\.q_proj\.": Transform(
        lambda tensor, config: interleave(tensor, config.num_attention_heads),
        lambda tensor, config: part(tensor, config.num_attention_heads),
    ),
    r"\.k_proj\.": Transform(
        lambda tensor, config: interleave(tensor, kv_heads(config)),
        lambda tensor, config: part(tensor, kv_heads(config)),
    ),
}
"""Rows of Q and K in the order of llama.cpp's interleaved rotation."""

NORM_PLUS_ONE: dict[str, Transform] = {
    r"norm\.weight$": Transform(lambda tensor, config: tensor.float() + 1, lambda tensor, config: tensor.float() - 1)
}
"""Norm weights stored around zero, where llama.cpp multiplies by the whole. The sum has 24 bits: a weight of 16 bits
comes back whole from 2^-16 on, one of 32 bits to 2^-24."""


def ungroup_qkv(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Turn Q, K and V that alternate head by head into all of Q, all of K, all of V.

    Args:
        tensor: weight (H * 3 * d, D) or bias (H * 3 * d).
    """
    rest = tensor.shape[1:]
    return tensor.reshape(config.num_attention_heads, 3, -1, *rest).transpose(0, 1).reshape(tensor.shape)


def group_qkv(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Undo `ungroup_qkv`."""
    rest = tensor.shape[1:]
    return tensor.reshape(3, config.num_attention_heads, -1, *rest).transpose(0, 1).reshape(tensor.shape)


GROUPED_QKV = Transform(ungroup_qkv, group_qkv)
"""One matrix of Q, K and V, head by head in a checkpoint."""
