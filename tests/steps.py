"""One training step of a small model, its loss and gradients, and the largest thing it allocates."""

from __future__ import annotations

import torch


def a_batch(tokens):
    torch.manual_seed(0)
    ids = torch.randint(2, 400, (2, tokens))
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_allocation(model, batch):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_and_gradients(model, **batch)
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
