"""What was read of a config, held against the model that transformers builds from the same folder.

In: the modules of a model without memory for its weights, and what is about to be written. Out: nothing, or an error
with both values. Nothing here looks at config.json: sizes are those of modules, angles those of the rotary embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.errors import CheckpointError, one_line
from pi_gguf.scaling.rope import RopeScaling

if TYPE_CHECKING:
    import torch

Model = Any
"""A transformers `PreTrainedModel`."""

_HINT = "this is a mistake of pi-gguf: nothing was written; please report it with this config.json"

_OUT_PROJECTIONS = ("o_proj", "dense", "out_proj")
_DOWN_PROJECTIONS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
_ANGLES_TOLERANCE = 1e-4
"""Of 32-bit powers of large bases; relative."""


def check_rotation(skeleton: Model, config: Any, rope: RopeScaling, rotary_dim: int, path: Path) -> None:
    """Check that a scaling's angles are those of transformers' own rotary embedding.

    Args:
        skeleton: the model as transformers builds it.
        config: with the position scaling as transformers has it.
        rope: as it would be written.
        rotary_dim: dimensions of a head that are rotated, as they would be written.
        path: of config.json, for messages.

    Raises:
        CheckpointError: they differ, or transformers cannot compute any.
    """
    if rope.rope_type == "alibi":
        return
    rotation = _rotation(skeleton, config, path)
    if rope.sliding_rope_theta is not None and _has(rotation, "sliding_attention"):
        plain = RopeScaling("default", 1.0, rope.sliding_rope_theta, 1, 1)
        theirs, _ = _angles(rotation, "sliding_attention")
        _compare_angles(plain.frequencies(rotary_dim), theirs, "rope_parameters.sliding_attention", path)
    if not _has(rotation, "full_attention"):
        return
    theirs, scaling = _angles(rotation, "full_attention")
    switches = rope.own is not None and rope.own.switches
    _compare_angles(rope.frequencies(rotary_dim, short=switches), theirs, "rope_parameters", path)
    if rope.own is not None and switches:
        theirs = _angles_beyond(rotation, rope.own.fields["original_max_position_embeddings"])
        _compare_angles(rope.frequencies(rotary_dim), theirs, "rope_parameters.long_factor", path)
    attention = 1.0 if rope.own is None else rope.own.attention_factor
    if not math.isclose(attention, scaling, rel_tol=1e-6):
        raise _difference("rope_parameters.attention_factor", attention, scaling, path)


def rotated_dimensions(skeleton: Model, config: Any, path: Path) -> int:
    """Return how many dimensions of a head transformers rotates where positions are not scaled."""
    plain = copy.deepcopy(config)
    for parameters in (plain.rope_parameters, plain.rope_parameters.get("full_attention") or {}):
        parameters["rope_type"] = "default"
    rotation = _rotation(skeleton, plain, path)
    kind = "full_attention" if _has(rotation, "full_attention") else "sliding_attention"
    return 2 * len(_angles(rotation, kind)[0])


def check_sizes(skeleton: Model, metadata: Mapping[str, Any], arch: str, *, tied: bool, path: Path) -> None:
    """Check the keys of a GGUF file that is about to be written against the modules of the model.

    Args:
        metadata: keys of the file.
        tied: whether the file would have no head of its own.

    Raises:
        CheckpointError: a key differs.
    """
    for key, theirs in _sizes(skeleton):
        ours = metadata.get(f"{arch}.{key}")
        if ours is not None and not math.isclose(float(ours), float(theirs), rel_tol=1e-6):
            raise _difference(f"{arch}.{key}", ours, theirs, path)
    head = skeleton.get_output_embeddings()
    if tied and head is not None and head.weight is not skeleton.get_input_embeddings().weight:
        raise _difference("tie_word_embeddings", True, False, path)


def _sizes(skeleton: Model) -> Iterator[tuple[str, float]]:
    """Yield what the modules say, by GGUF's key."""
    import torch

    embedding = skeleton.get_input_embeddings().weight
    yield "vocab_size", embedding.shape[0]
    yield "embedding_length", embedding.shape[1]
    layers = next(part for part in skeleton.base_model.children() if isinstance(part, torch.nn.ModuleList))
    yield "block_count", len(layers)
    layer = layers[0]
    attention = next(m for m in layer.modules() if hasattr(m, "head_dim") or hasattr(m, "head_size"))
    size = int(next(vars(attention)[name] for name in ("head_dim", "head_size") if name in vars(attention)))
    linear = {name: m for name, m in attention.named_children() if isinstance(m, torch.nn.Linear)}
    heads = next(m.in_features for name, m in linear.items() if name in _OUT_PROJECTIONS) // size
    rows = sum(m.out_features for name, m in linear.items() if name not in _OUT_PROJECTIONS)
    yield "attention.head_count", heads
    yield "attention.head_count_kv", (rows // size - heads) / 2
    yield "attention.key_length", size
    yield "attention.value_length", size
    for name, number in (("scaling", "attention.scale"), ("attn_logit_softcapping", "attn_logit_softcapping")):
        if getattr(attention, name, None):
            yield number, getattr(attention, name)
    sliding = [getattr(m, "sliding_window", None) for m in layers.modules() if hasattr(m, "sliding_window")]
    if any(sliding):
        yield "attention.sliding_window", next(window for window in sliding if window)
    yield from _widths(layer)
    yield from _epsilons(layer)


def _widths(layer: torch.nn.Module) -> Iterator[tuple[str, float]]:
    """Yield inner widths, and how many experts there are."""
    experts: Any = getattr(getattr(layer, "mlp", None), "experts", None)
    if experts is not None:
        yield "expert_count", experts.down_proj.shape[0]
        yield "expert_feed_forward_length", experts.down_proj.shape[2]
        yield "expert_used_count", next(vars(m)["top_k"] for m in layer.modules() if "top_k" in vars(m))
    for name, parameter in layer.named_parameters():
        if name.endswith(tuple(f"{down}.weight" for down in _DOWN_PROJECTIONS)):
            yield (
                "expert_shared_feed_forward_length" if experts is not None else "feed_forward_length",
                (parameter.shape[1]),
            )


def _epsilons(layer: torch.nn.Module) -> Iterator[tuple[str, float]]:
    for module in layer.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(epsilon, float):
            for kind in ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"):
                yield kind, epsilon
            return


# Angles


def _rotation(skeleton: Model, config: Any, path: Path) -> Any:
    """Return transformers' rotary embedding of a config, with its numbers."""
    kind = next(type(m) for m in skeleton.modules() if any("inv_freq" in name for name in vars(m)["_buffers"]))
    try:
        return kind(copy.deepcopy(config))
    except Exception as error:  # whatever a wrong number leads to
        raise CheckpointError(
            f"{path}: rope_parameters: transformers computes no angles with it ({one_line(error)})",
            "correct the config",
        ) from error


def _has(rotation: Any, layer_type: str) -> bool:
    """Tell whether a model has layers of a kind; small ones may have none that see the whole window."""
    return hasattr(rotation, "inv_freq") or hasattr(rotation, f"{layer_type}_inv_freq")


def _angles(rotation: Any, layer_type: str) -> tuple[list[float], float]:
    """Return angles at position 1 and the attention factor, of one kind of layers where there are several."""
    prefix = "" if hasattr(rotation, "inv_freq") else f"{layer_type}_"
    return getattr(rotation, f"{prefix}inv_freq").tolist(), float(getattr(rotation, f"{prefix}attention_scaling"))


def _angles_beyond(rotation: Any, window: int) -> list[float]:
    """Return the angles at position 1 of a prompt that is longer than `window` tokens."""
    import torch

    rotation(torch.zeros(1), torch.tensor([[window + 1]]))
    return _angles(rotation, "full_attention")[0]


def _compare_angles(ours: list[float], theirs: list[float], field: str, path: Path) -> None:
    if len(ours) != len(theirs):
        raise _difference(f"{field}: rotated dimensions", 2 * len(ours), 2 * len(theirs), path)
    for pair, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if not math.isclose(our, their, rel_tol=_ANGLES_TOLERANCE):
            raise _difference(f"{field}: angle of pair {pair}", our, their, path)


def _difference(what: str, ours: Any, theirs: Any, path: Path) -> CheckpointError:
    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return CheckpointError(f"{path}: {what} was read as {shown(ours)}, transformers reads {shown(theirs)}", _HINT)
