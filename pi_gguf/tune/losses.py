"""The loss without logits: [tokens, vocabulary] never exists, only a chunk of it at a time.

In: a causal model of transformers. Out: the same model, whose own forward computes the same loss: on a GPU by torch's
`linear_cross_entropy`, on a CPU, and where torch is older (before 2.13), by ours, which on a CPU takes a third of the
time. T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


CPU_CHUNK = 2**24
"""Logits of a chunk on a CPU, 64 MiB. Every chunk reads the head and adds to its gradient: in chunks of as many logits
as there are hidden states, 24 tokens of SmolLM2's 2048, a CPU waits for its memory."""


def chunk_logits(tokens: int, width: int, vocabulary: int, device: str) -> int:
    """Return how many logits exist at a time: as many as hidden states, on a CPU `CPU_CHUNK` or more, if there are."""
    return min(tokens * vocabulary, max(tokens * width, CPU_CHUNK if device == "cpu" else 0))


def loss_is_chunked(config: Any) -> bool:
    """Tell whether a model's logits are a linear function of its last hidden states.

    A factor on them (Command-R, Granite) may as well stand on the hidden states; a soft cap (Gemma 2) may not.

    Args:
        config: of transformers.
    """
    return not getattr(config, "final_logit_softcapping", None)


@contextmanager
def chunked_loss(model: Any) -> Iterator[None]:
    """Let a model compute its loss in chunks while this is open; what it returns as logits are then hidden states.

    The head hands its input through, so that everything a family does between its last layer and its loss is done to
    the hidden states, and the loss multiplies by the head's weight. A model whose logits are capped keeps its own loss;
    without gradients logits and loss are as ever.

    Args:
        model: a causal model, or peft's around one.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not loss_is_chunked(inner.config):
        yield
        return
    head, own_loss = inner.get_output_embeddings(), inner.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            own: torch.Tensor = own_loss(logits, labels, *more, **options)
            return own
        targets = options.get("shift_labels")
        if targets is None:
            targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        weights = options.get("label_weights")
        if weights is not None:
            weights = torch.nn.functional.pad(weights, (0, 1))[..., 1:]
        return _cross_entropy(logits, head, targets, options.get("num_items_in_batch"), weights)

    head.forward = lambda hidden: hidden if torch.is_grad_enabled() else type(head).forward(head, hidden)
    inner.loss_function = loss
    try:
        yield
    finally:
        del head.forward
        inner.loss_function = own_loss


def _cross_entropy(
    hidden: torch.Tensor, head: Any, targets: torch.Tensor, count: Any, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean loss of each next token, by their weights.

    Args:
        hidden: (B, T, D).
        head: with a weight (V, D), and perhaps a bias (V).
        targets: the next token of each, (B, T); -100 where nothing is to be predicted.
        count: what the sum is divided by; the targets that are there when None.
        weights: how much each target counts among those that are there, (B, T); alike when None.
    """
    import torch

    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    there = targets != -100
    shares = there.float()
    if weights is not None:
        shares = weights.reshape(-1).to(shares) * there
        shares *= there.sum() / shares.sum()
    shares = shares / (there.sum() if count is None else count)
    bias, hidden = getattr(head, "bias", None), hidden.to(dtype)
    vocabulary, (tokens, width) = len(head.weight), hidden.shape
    chunk = max(1, chunk_logits(tokens, width, vocabulary, kind) // vocabulary)
    if kind == "cpu" or not hasattr(torch.nn.functional, "linear_cross_entropy"):
        from pi_gguf.tune.head import HeadLoss

        targets = targets.masked_fill(shares == 0, -100)
        loss: torch.Tensor = HeadLoss.apply(hidden, head.weight, bias, targets, shares, chunk)  # type: ignore[no-untyped-call]
        return loss
    # A sum would be rounded to 16 bits, so that the gradient is computed again in the backward pass.
    losses = torch.nn.functional.linear_cross_entropy(
        hidden,
        head.weight.to(dtype),
        targets,
        linear_bias=None if bias is None else bias.to(dtype),
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return (losses.float() * shares).sum()
