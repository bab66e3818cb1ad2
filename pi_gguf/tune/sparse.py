"""Shifted sparse attention while a model trains: a token sees its group of tokens, not all that came before.

In: a model of transformers. Out: the same model, whose heads attend causally within groups of G tokens; the groups of
the second half of the heads end half a group earlier, so that neighbouring groups learn of each other. In evaluation
mode it attends to everything, as ever. B sequences of T tokens, H heads, K of keys and values, of D elements each.

LongLoRA moves tokens round the end, so that the last and the first ones share a group, in which the first see the last.
That is the future; here these are two groups of half the size.
Source: LongLoRA, arXiv 2309.12307, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.common.private import attention_of, takes_attention
from pi_gguf.errors import OptionError

if TYPE_CHECKING:
    import torch


def group_tokens(share: float, context: int) -> int:
    """Return the tokens of a group.

    Args:
        share: of the window.
        context: tokens of the window.

    Raises:
        OptionError: they are fewer than two, which cannot be halved.
    """
    group = round(share * context)
    if group < 2:
        raise OptionError(
            f"s2-group must leave groups of 2 tokens or more, got {share:g} of {context}",
            f"give at least {2 / context:g}",
        )
    return group


def check_sparse(checkpoint: Checkpoint) -> None:
    """Check that a model's attention can be replaced by one within groups.

    Raises:
        OptionError: otherwise, with the family's name.
    """
    config, context = checkpoint.hf_config, checkpoint.rope.max_position_embeddings
    cap, window = getattr(config, "attn_logit_softcapping", None), getattr(config, "sliding_window", None) or context
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    reason = ""
    if cap:
        reason = f"caps the scores of its attention (attn_logit_softcapping {cap:g})"
    elif window < context and any(kind != "full_attention" for kind in kinds):
        reason = f"has layers that see {window} tokens only (sliding_window)"
    elif not takes_attention(checkpoint.skeleton):
        reason = "computes its attention itself, transformers has no place for another"
    elif checkpoint.n_heads < 2:
        reason = "has one head, of which no half can be shifted"
    if reason:
        raise OptionError(f"attention s2 is not for this model: {config.model_type} {reason}", "leave --attention out")


@contextmanager
def sparse_attention(model: Any, group: int) -> Iterator[None]:
    """Let a model attend within groups in training mode while this is open.

    Args:
        model: a causal model that `check_sparse` found fit, or peft's around one.
        group: tokens of a group, at least 2.
    """
    from transformers import AttentionInterface

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, name = attention_of(inner), f"s2-{group}"
    AttentionInterface.register(name, partial(attend_in_groups, group))
    inner.set_attn_implementation(name)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def attend_in_groups(
    group: int, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend as transformers' layers ask for it: causally, in training mode within groups.

    transformers makes no mask for an attention that it knows none for. Sequences are padded behind their end only, so
    that none is needed.

    Args:
        module: the layer's attention.
        query: (B, H, T, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: None; it would be that of documents in a row.
        options: scaling of the scores, and dropout.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    import torch
    from transformers import AttentionInterface

    assert attention_mask is None, "rows of several documents are not for attention within groups"
    if not module.training:
        found: tuple[torch.Tensor, None] = AttentionInterface()["sdpa"](module, query, key, value, None, **options)
        return found
    heads, half = query.shape[1], query.shape[1] // 2
    each = heads // key.shape[1]
    halves = []
    for first, last, offset in ((0, half, 0), (half, heads, group // 2)):
        k, v = (_used(states, first, last, each).transpose(1, 2) for states in (key, value))
        halves.append(_within_groups(query[:, first:last].transpose(1, 2), k, v, offset, group, options))
    return torch.cat(halves, 2), None


def _used(states: torch.Tensor, first: int, last: int, each: int) -> torch.Tensor:
    """Return the heads of keys or values that query heads `first` to `last` use, each head as often as it must be.

    Args:
        states: (B, K, T, D).
        each: query heads that share one of them.
    """
    if first % each == 0 and last % each == 0:
        return states[:, first // each : last // each]
    return states.repeat_interleave(each, 1)[:, first:last]


def _within_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int, group: int, options: dict[str, Any]
) -> torch.Tensor:
    """Attend causally within groups: the first one ends at `offset`, the last one where the sequence does.

    Args:
        query: (B, T, H, D).
        key: (B, T, K, D).
        value: (B, T, K, D).
        offset: tokens of the first group; 0 where it is as large as the others.
        group: tokens of the others.
        options: scaling of the scores, and dropout.

    Returns:
        (B, T, H, D).
    """
    import torch

    length, gqa = query.shape[1], query.shape[2] != key.shape[2]
    offset = min(offset, length)
    end = offset + (length - offset) // group * group
    parts = []
    for start, stop, size in ((0, offset, offset), (offset, end, group), (end, length, length - end)):
        if start == stop:
            continue
        q, k, v = (x[:, start:stop].reshape(-1, size, *x.shape[2:]).transpose(1, 2) for x in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=gqa, scale=options.get("scaling"), dropout_p=options.get("dropout", 0.0)
        )
        parts.append(found.transpose(1, 2).reshape(len(query), stop - start, *query.shape[2:]))
    return torch.cat(parts, 1)
