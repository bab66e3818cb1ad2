"""A head's loss and the gradients of it, computed together, so that each chunk of logits exists once.

In: hidden states and the head's weight. Out: one number, which torch can go back from. T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


class HeadLoss(torch.autograd.Function):
    """The sum of the losses of next tokens, each times its share: `HeadLoss.apply(hidden, weight, bias, targets,
    shares, chunk)`.

    Products are in the type of the hidden states, of logits, their softmax in 32 bits; the head's gradient is added up
    in 32. One may go back once, as both gradients are given away.

    Args:
        hidden: (T, D).
        weight: (V, D), of any floating type.
        bias: (V) or None.
        targets: the next token of each, (T); where it is negative nothing is to be predicted.
        shares: how much each counts, (T), 32 bits.
        chunk: tokens whose logits exist at a time.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        hidden, weight, bias, targets, shares, chunk = given
        there = targets >= 0
        some, targets, shares = hidden[there], targets[there], shares[there]
        matrix = weight.to(hidden.dtype)
        gradients = torch.empty_like(some)
        head = _HeadGradient(weight, bias, ctx.needs_input_grad)
        loss = torch.zeros((), device=hidden.device)
        rows = min(chunk, len(some))
        logits = hidden.new_empty(rows, len(matrix))
        powers = logits if logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        for begin in range(0, len(some), chunk):
            part = slice(begin, begin + chunk)
            states, targeted, share = some[part], targets[part, None], shares[part, None]
            scores, exp = logits[: len(states)], powers[: len(states)]
            torch.mm(states, matrix.t(), out=scores)
            if bias is not None:
                scores += bias
            own, highest = scores.gather(1, targeted).float(), scores.amax(1, keepdim=True).float()
            torch.sub(scores, highest, out=exp).exp_()
            total = exp.sum(1, keepdim=True)
            loss += ((highest + total.log() - own) * share).sum()
            # Softmax less one at the target, times the total: that is divided out where there is less to divide.
            exp.scatter_add_(1, targeted, -total)
            share = share / total
            if scores is not exp:
                scores.copy_(exp)
            torch.mm(scores, matrix, out=gradients[part])
            gradients[part] *= share
            head.add(scores, states, share)
        every = torch.zeros_like(hidden)
        every[there] = gradients
        ctx.gradients = every, head.weight, head.bias
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        given, ctx.gradients = ctx.gradients, None
        hidden, weight, bias = (None if gradient is None else gradient.mul_(above[0]) for gradient in given)
        return hidden, weight, bias, None, None, None


class _HeadGradient:
    """The gradient of a head, added up in 32 bits.

    Args:
        weight, bias: of the head.
        wanted: whether the gradient of hidden states, weight and bias are.

    Attributes:
        weight, bias: their gradients; None where not wanted.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        self._chunk: torch.Tensor | None = None  # the same memory each time: new pages take long

    def add(self, scores: torch.Tensor, states: torch.Tensor, share: torch.Tensor) -> None:
        """Add the gradients of a chunk.

        Args:
            scores: its gradient of logits but for a factor a token, (C, V).
            states: its hidden states, (C, D).
            share: this factor, (C, 1).
        """
        if self.weight is not None:
            states = (states * share).to(scores.dtype)
            if scores.dtype == torch.float32:
                self.weight.addmm_(scores.t(), states)
            else:
                self._chunk = scores.new_empty(self.weight.shape) if self._chunk is None else self._chunk
                self.weight += torch.mm(scores.t(), states, out=self._chunk)
        if self.bias is not None:
            self.bias += (scores * share).sum(0)
