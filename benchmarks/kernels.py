"""What the kernels of a training step are worth on a card: torch's ways to compute attention, and Liger's fused layers.

In: nothing; random layers of real shape. Out: `benchmarks/kernels.json`: seconds forward and backward of causal
attention alone by each of torch's backends, and within groups (`--attention s2`), with operations a second and the
error against 32 bits, and of whole decoder layers of a Llama (bf16 by autocast, weights in 32 bits as in `--train
full`, each layer computed again in the backward pass) by backend, with and without Liger's norms, rotations and MLPs
where it is installed, and within groups. On a card the memory at its highest, too.

Example (a card, 20 seconds; then a trial anywhere):
    python benchmarks/kernels.py
    python benchmarks/kernels.py --device cpu --scale toy --out /tmp/kernels.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.tune.options import DEFAULT_GROUP  # noqa: E402
from pi_gguf.tune.sparse import attend_in_groups, group_tokens, sparse_attention  # noqa: E402

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
SHAPES = {
    "full": {"7b": (32, 32, 128, 11008), "8b": (32, 8, 128, 14336), "1b": (32, 8, 64, 8192)},
    "toy": {"toy": (4, 2, 16, 96)},
}
"""Heads, heads of keys and values, elements of a head, inner width."""

LAYERS = 2


def seconds_of(work: Callable[[], Any], device: str, rounds: int = 5) -> float:
    """Return the median time of a piece of work."""
    work()
    found = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def attention(
    backend: SDPBackend | None, shape: tuple[int, ...], tokens: int, device: str, group: int | None = None
) -> dict[str, float]:
    """Return seconds of attention forward and backward, and its largest error against 32 bits on the last tokens.

    Args:
        backend: None for what torch chooses.
        group: tokens within which is attended; None for all of them.
    """
    heads, kv_heads, head, _ = shape
    generator = torch.Generator(device).manual_seed(0)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, n, tokens, head, generator=generator, device=device).to(kind).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": heads != kv_heads}

    def once() -> torch.Tensor:
        for tensor in (q, k, v):
            tensor.grad = None
        with sdpa_kernel([backend]) if backend else nullcontext():
            if group:
                found = attend_in_groups(group, torch.nn.Identity(), q, k, v, None)[0].transpose(1, 2)
            else:
                found = scaled_dot_product_attention(q, k, v, **options)
        found.backward(torch.ones_like(found))
        return found

    seconds = seconds_of(once, device)
    found = once()[:, :2, -1].detach().float()
    near = tokens - (tokens - 1) // group * group if group else tokens  # that the last token sees in the first heads
    keys, values = (t.detach()[:, :, -near:].float().repeat_interleave(heads // kv_heads, 1)[:, :2] for t in (k, v))
    exact = scaled_dot_product_attention(q.detach().float()[:, :2, -1:], keys, values)[:, :, 0]
    operations = (
        3.5 * 4 * heads * head * tokens * (group or tokens) / 2
    )  # backward takes two and a half times the forward's products
    return {
        "seconds": seconds, "operations_a_second": operations / seconds,
        "error": ((found - exact).norm() / exact.norm()).item(),
    }  # fmt: skip


def make_layers(shape: tuple[int, ...], device: str, liger: bool) -> torch.nn.Module:
    """Return decoder layers of a Llama, by torch's own operations or with Liger's in their place."""
    import transformers.models.llama.modeling_llama as llama
    from transformers import LlamaConfig

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        own = (llama.LlamaRMSNorm, llama.LlamaMLP, llama.apply_rotary_pos_emb)
        apply_liger_kernel_to_llama(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    heads, kv_heads, head, inner = shape
    config = LlamaConfig(
        hidden_size=heads * head, intermediate_size=inner, num_hidden_layers=LAYERS, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=256, max_position_embeddings=32768, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = llama.LlamaModel(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if liger:  # the functions that the layers call are the module's: they stay until this model was run
        model.undo = lambda: [setattr(llama, name, value) for name, value in zip(
            ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"), own, strict=True)]  # fmt: skip
    else:
        model.undo = lambda: None
    return model


def layers(
    backend: SDPBackend | None, shape: tuple[int, ...], tokens: int, device: str, liger: bool, group: int | None = None
) -> dict[str, float]:
    """Return seconds of a layer forward, again and backward, and the mean of its output, which all ways must share but
    the one within groups."""
    model = make_layers(shape, device, liger)
    within = sparse_attention(model, group) if group else nullcontext()
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    try:

        def once() -> float:
            model.zero_grad(set_to_none=True)
            with sdpa_kernel([backend]) if backend else nullcontext(), torch.autocast(device, torch.bfloat16):
                hidden = model(input_ids=ids, use_cache=False).last_hidden_state
            found = hidden.float().square().mean()
            with sdpa_kernel([backend]) if backend else nullcontext():  # what is computed again
                found.backward()
            return found.item()

        with within:
            seconds = seconds_of(once, device, rounds=3) / LAYERS
            gradient = {name: p.grad.norm().item() for name, p in model.named_parameters() if "q_proj" in name}
            return {"seconds": seconds, "output": once(), "gradient": sum(gradient.values())}
    finally:
        model.undo()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "toy"), default="full")
    parser.add_argument("--tokens", type=int, help="of the sequence; 32768, or 128 at toy scale")
    parser.add_argument("--limit", type=float, default=60, help="seconds, after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kernels.json")
    args = parser.parse_args()
    tokens = args.tokens or (32768 if args.scale == "full" else 128)
    started, group = time.time(), group_tokens(DEFAULT_GROUP, tokens)
    record: dict[str, Any] = {"tokens": tokens, "attention": {}, "layers": {}}
    record |= provenance(seed=0, device=args.device)
    if args.device == "cuda":
        record["card"] = torch.cuda.get_device_name()
        record["capability"] = torch.cuda.get_device_capability()
    backends: dict[str, SDPBackend | None] = {"chosen by torch": None, **BACKENDS}
    if args.scale == "full":
        del backends["math"]  # a square of 32768

    def measure(part: str, name: str, work: Callable[[], dict[str, float]]) -> None:
        if time.time() - started > args.limit:
            return
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            found: dict[str, Any] = work()
            if args.device == "cuda":
                found["peak_bytes"] = torch.cuda.max_memory_allocated()
        except Exception as error:
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        if args.device == "cuda":
            torch.cuda.empty_cache()
        record[part][name] = found
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        shown = f"{1000 * found['seconds']:9.2f} ms" if "seconds" in found else found["error"][:80]
        speed = f"{found['operations_a_second'] / 1e12:7.1f} T/s" if "operations_a_second" in found else ""
        print(f"{part:10} {name:40} {shown} {speed}", flush=True)

    for shape_name, shape in SHAPES[args.scale].items():
        for name, backend in backends.items():
            measure(
                "attention", f"{shape_name}, {name}", lambda b=backend, s=shape: attention(b, s, tokens, args.device)
            )
        within = lambda s=shape: attention(None, s, tokens, args.device, group)  # noqa: E731
        measure("attention", f"{shape_name}, groups of {group}", within)
    for shape_name, shape in list(SHAPES[args.scale].items())[:2]:
        for liger in (False, True) if find_spec("liger_kernel") else (False,):
            for name in ("chosen by torch", "flash", "cudnn"):
                measure(
                    "layers",
                    f"{shape_name}, {name}{', Liger' * liger}",
                    lambda n=name, s=shape, fused=liger: layers(backends[n], s, tokens, args.device, fused),
                )
        within = lambda s=shape: layers(None, s, tokens, args.device, False, group)  # noqa: E731
        measure("layers", f"{shape_name}, groups of {group}", within)


if __name__ == "__main__":
    main()
