"""What a GGUF file states -> the fields of config.json.

In: an opened file. Out: a `Restored`; and, when the folder is there, the proof that its config says what the file
states. Every key of the architecture must be known: what one changes that is not cannot be said in a config.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.plain import open_plain
from pi_gguf.errors import GgufError, UnsupportedError, one_line
from pi_gguf.families import FAMILIES, Family
from pi_gguf.families.declared import declared
from pi_gguf.families.family import Config, Stated, rotary_dim
from pi_gguf.gguf.keys import model_metadata
from pi_gguf.restore.opened import OpenedFile
from pi_gguf.restore.rotation import agree, rope_of_file
from pi_gguf.scaling.rope import RopeScaling

_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"

_USUAL: dict[str, Any] = {
    "attention.causal": True, "expert_gating_func": 1, "expert_weights_norm": True, "tensor_data_layout": "jploski",
    "attention.max_alibi_bias": 8.0, "rope.scaling.finetuned": True, "use_parallel_residual": True,
    "expert_weights_scale": 1.0, "rope.scale_linear": 1.0, "rope.scaling.alpha": 1.0,
}  # fmt: skip
"""Keys that say what llama.cpp does for the architecture anyway."""

_OF_SCALING = (
    "context_length", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
)  # fmt: skip

_OF_SHAPES = (
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "feed_forward_length",
)  # fmt: skip
"""Keys that some writers leave out and others state for every architecture; the shapes of the tensors check them."""


@dataclass(frozen=True)
class Restored:
    """A config as it will be written.

    Args:
        family: as which the file is unpacked.
        fields: of config.json, but for the ids of special tokens.
        rope: the scaling that they say.
    """

    family: Family
    fields: dict[str, Any]
    rope: RopeScaling


def restore_config(opened: OpenedFile, dtype: str, *, tied: bool) -> Restored:
    """Return the fields of config.json.

    Args:
        dtype: of the weights to be written, `bfloat16` or `float32`.
        tied: whether the head is the embedding.

    Raises:
        GgufError: a key is missing, or is not as it must be.
        UnsupportedError: an architecture that is not known, or a variant of it.
    """
    stated = opened.stated
    family = _family(stated)
    assert family.fields
    if _EMBEDDING not in stated.shapes or len(stated.shapes[_EMBEDDING]) != 2:
        raise GgufError(f"{stated.path}: {_EMBEDDING} is missing", "copy or convert the file again")
    fields = {"model_type": family.model_type, **family.fields(stated), "tie_word_embeddings": tied}
    fields["vocab_size"] = stated.shapes[_EMBEDDING][0]
    if family.split_width and fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]:
        del fields["head_dim"]
    if family.alibi:
        fields[family.window] = stated.whole("context_length")
        rope = rope_of_file(opened, family, 0)
    else:
        size = stated.whole("attention.key_length", fields["hidden_size"] // fields["num_attention_heads"])
        rotated = stated.whole("rope.dimension_count", size)
        rope = rope_of_file(opened, family, rotated)
        if family.longrope_only:
            own = rope.own.fields if rope.own else {}
            original = own.get("original_max_position_embeddings", rope.original_max_position_embeddings)
            fields["original_max_position_embeddings"] = original
        fields = _with_share(fields, rope, rotated, size, stated)
    fields = {**family.unstated(_open(fields, stated)), **fields, "dtype": dtype}
    return Restored(family, {"architectures": [declared(family.model_type).model], **fields}, rope)


def _family(stated: Stated) -> Family:
    """Return the family as which a file of an architecture is unpacked.

    Raises:
        UnsupportedError: there is none.
    """
    of_arch = [family for family in FAMILIES.values() if family.arch == stated.arch and family.fields]
    experts = bool(stated.keys.get("expert_count"))
    found = next((family for family in of_arch if family.experts == experts), None)
    if found is None:
        what = f"{stated.arch} with{'' if experts else 'out'} experts" if of_arch else stated.arch
        raise UnsupportedError(
            f"{stated.path}: general.architecture is {what[:80]}, which is not unpacked here",
            f"these are: {', '.join(sorted({family.arch for family in FAMILIES.values()}))}",
        )
    return found


def _with_share(fields: dict[str, Any], rope: RopeScaling, rotated: int, size: int, stated: Stated) -> dict[str, Any]:
    """Return the config with its scaling, and with the share of a head that is rotated where it is not the usual."""
    written = rope.to_hf(fields)
    if rotary_dim(_open(written, stated)) != rotated:
        share = rotated / size
        share = share if int(size * share) == rotated else math.nextafter(share, 1)
        written = rope.to_hf({**fields, "rope_parameters": {"partial_rotary_factor": share}})
    return written


def _open(fields: Mapping[str, Any], stated: Stated) -> Config:
    """Open a config with its family's defaults, by transformers where anything is unusual."""
    if plain := open_plain(fields):
        return plain
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**copy.deepcopy(dict(fields)))
        if getattr(config, "rope_parameters", None):
            config.standardize_rope_params()
    except Exception as error:  # transformers raises many kinds for a field it does not take
        raise GgufError(
            f"{stated.path}: transformers does not open a config of what it states ({one_line(error)})",
            "pi-gguf inspect shows what the file states",
        ) from error
    return config


def check_config(checkpoint: Checkpoint, restored: Restored, stated: Stated) -> None:
    """Check that a folder's config, as it is read again, says what the file states.

    Raises:
        GgufError: a key that both state differs.
        UnsupportedError: a key of the file that no config says anything of, or a scaling that none can say.
    """
    ours = model_metadata(checkpoint, finetuned=True)
    for name, theirs in stated.keys.items():
        our = ours.get(f"{stated.arch}.{name}")
        if name in _OF_SCALING or (our is None and (name in _OF_SHAPES or not theirs)):
            continue
        if our is None and theirs != _USUAL.get(name):
            raise UnsupportedError(
                f"{stated.path}: {stated.arch}.{name} is {repr(theirs)[:80]}, which config.json of a "
                f"{restored.family.model_type} model cannot say",
                "take another file of the model, or its checkpoint",
            )
        if our is not None and not _equal(our, theirs):
            raise GgufError(
                f"{stated.path}: {stated.arch}.{name} is {repr(theirs)[:80]}, its tensors and other keys say {our!r}",
                "pi-gguf repair corrects keys; or take another file of the model",
            )
    dim = 0 if restored.family.alibi else checkpoint.rotary_dim
    if not agree(checkpoint.rope, restored.rope, dim):
        raise UnsupportedError(
            f"{stated.path}: its position scaling is none that a config of transformers can say "
            f"(window {restored.rope.max_position_embeddings}, type {stated.keys.get('rope.scaling.type', 'none')})",
            "take another file of the model, or its checkpoint",
        )


def _equal(our: Any, theirs: Any) -> bool:
    if isinstance(our, float) and isinstance(theirs, int | float):
        return math.isclose(our, theirs, rel_tol=1e-6)
    return bool(our == theirs)


def is_tied(opened: OpenedFile) -> bool:
    """Tell whether a file has no head of its own."""
    return _HEAD not in opened.tensors


def may_be_tied(opened: OpenedFile) -> bool:
    """Tell whether the head may be a copy of the embedding, which llama.cpp asks for in some architectures."""
    family = _family(opened.stated)
    head, embedding = opened.tensors.get(_HEAD), opened.tensors.get(_EMBEDDING)
    return bool(
        family.needs_head and head and embedding and (head.type, head.shape) == (embedding.type, embedding.shape)
    )
