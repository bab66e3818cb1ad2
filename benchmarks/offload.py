"""llama.cpp on a card with a long window: how fast it reads and writes, what memory it takes, and whether it is right.

In: nothing. Random Llamas of real shapes are written straight to GGUF; speed does not depend on values. They have the
bundled model's 2048 tokens, so the output matrix is smaller than in a real one of the shape. Right or not is asked of
the bundled model extended to the window (not trained there), or of --model. Out: a JSON file, written after each
measurement, and a table: tokens per second read and written by depth, type of the cache, flash or plain attention,
batch and layers on the GPU; the share of the device's own speed that this is; memory; and KL divergence in nats from
transformers in float32, read in batches, few tokens at a time and one by one.

Measurements run in a child process, most wanted first. What ends the child is recorded with the measurement that it
was at, and another child takes the rest; what is not likely to end within --limit is not started.

Example (an H100, 80 GB; --device cpu --scale toy is a trial of a minute anywhere):
    python benchmarks/offload.py --device cuda --scale full --limit 150 --out offload.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pi_gguf import bundled  # noqa: E402
from pi_gguf.bundled.passkey import EVALUATION_FILLER, INTRODUCTION, QUESTION, key_sentence  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402

_COMPUTE_TYPE = "GGML_CUDA_CUBLAS_COMPUTE_TYPE"
"""What llama.cpp reads, at each product, for the type that cuBLAS adds up in."""

_KEY = "39482"
_VOCABULARY = 2048


@dataclass(frozen=True)
class Shape:
    """Of a Llama: width, inner width, layers, heads, heads of keys and values, and elements of a head."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int

    def tensors(self, kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape, as torch has it, and type of each tensor of a file."""
        tokens = ((_VOCABULARY, self.width), kind)
        found: dict[str, tuple[tuple[int, ...], str]] = {"token_embd.weight": tokens, "output.weight": tokens}
        q, kv = self.heads * self.head, self.kv_heads * self.head
        for i in range(self.layers):
            matrices = {
                "attn_q": (q, self.width), "attn_k": (kv, self.width), "attn_v": (kv, self.width),
                "attn_output": (self.width, q), "ffn_gate": (self.inner, self.width),
                "ffn_up": (self.inner, self.width), "ffn_down": (self.width, self.inner),
            }  # fmt: skip
            found |= {f"blk.{i}.{name}_norm.weight": ((self.width,), "F32") for name in ("attn", "ffn")}
            found |= {f"blk.{i}.{name}.weight": (shape, kind) for name, shape in matrices.items()}
        return found | {"output_norm.weight": ((self.width,), "F32")}

    @property
    def parameters(self) -> int:
        """Those of the products: all matrices but the embeddings, which are looked up."""
        return sum(math.prod(shape) for shape, _ in self.tensors("F32").values()) - _VOCABULARY * self.width

    def weight_bytes(self, kind: str) -> int:
        """Return the bytes that a token's pass reads of the weights."""
        from pi_gguf.gguf.file import tensor_nbytes

        return sum(tensor_nbytes(k, s) for n, (s, k) in self.tensors(kind).items() if n != "token_embd.weight")

    def operations(self, tokens: int) -> float:
        """Return the operations of reading so many tokens from their start: products, and causal attention."""
        return 2 * self.parameters * tokens + 4 * self.layers * self.heads * self.head * tokens**2 / 2


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128),
    "1b": Shape(2048, 8192, 16, 32, 8, 64),
    "toy": Shape(256, 512, 2, 4, 2, 64),
}


def speed(shape: str, quant: str, about: float, **options: Any) -> dict[str, Any]:
    """Return a measurement of speed.

    Args:
        about: seconds that it takes, guessed.
        options: what differs from all layers on the GPU, flash attention, an f16 cache, and batches of 512.
    """
    job = {
        "kind": "speed", "shape": shape, "quant": quant, "about": about, "layers": "all", "cache": "f16", "flash": True,
        "batch": 512, "op_offload": True, "read": [512, 2048, 8192, 32000], "write": [0, 8192, 32000], "tokens": 64,
        "rounds": 3, "window": 32768, **options,
    }  # fmt: skip
    name = f"{shape} {quant}, {'flash' if job['flash'] else 'plain'}, {job['cache']} cache, batch {job['batch']}"
    name += f", {job['layers']} layers on the GPU" * (job["layers"] != "all")
    return {**job, "name": name + ", no help from the GPU" * (not job["op_offload"])}


def right(about: float, cache: str, flash: bool, **options: Any) -> dict[str, Any]:
    """Return a comparison with transformers, with an F16 file unless `options` says otherwise."""
    job = {
        "kind": "kl", "about": about, "cache": cache, "flash": flash, "file": "F16", "compute": None, "context": 32768,
        "window": 32768, "short": 2048, "last": 1024, "single": 128, **options,
    }  # fmt: skip
    name = f"KL, {job['file']} file, {'flash' if flash else 'plain'}, {cache} cache"
    name += f", products in {job['compute']}" * bool(job["compute"])
    return {**job, "name": name + f", extended to {job['context']}" * (job["context"] != 32768)}


def list_jobs(scale: str) -> list[dict[str, Any]]:
    """Return all measurements, the most wanted first."""
    rates = {"kind": "rates", "name": "rates", "about": 6.0, "scale": scale}
    if scale == "toy":
        small: dict[str, Any] = {"window": 1024, "read": [64, 512], "write": [0, 512], "tokens": 4, "rounds": 1}
        less: dict[str, Any] = {"context": 4096, "window": 3072, "short": 512, "last": 128, "single": 8}
        return [
            rates,
            *(right(6, "f16", flash, **less) for flash in (True, False)),
            right(4, "q4_0", True, **{**less, "window": 1024}),
            *(speed("toy", quant, 2, **small) for quant in ("Q4_K", "Q8_0")),
            *(speed("toy", "Q4_K", 1, cache=cache, **small) for cache in ("q8_0", "q4_0")),
            speed("toy", "Q4_K", 1, flash=False, **small),
            speed("toy", "Q4_K", 1, layers="half", **small),
            speed("toy", "Q4_K", 1, layers="0", op_offload=False, **small),
        ]
    some: dict[str, Any] = {"read": [512, 2048], "write": [2048], "tokens": 16, "rounds": 1}
    return [
        rates,
        right(20, "f16", True),
        right(4, "f16", False),
        *(right(4, "f16", flash, context=8192, window=8192) for flash in (True, False)),
        speed("8b", "Q4_K", 18),
        speed("8b", "Q4_K", 14, flash=False),
        speed("8b", "Q4_K", 7, batch=2048, write=[]),
        speed("8b", "Q4_K", 11, cache="q8_0"),
        speed("8b", "Q4_K", 11, cache="q4_0"),
        speed("8b", "Q4_K", 6, flash=False, batch=32, read=[512, 2048, 8192], write=[], rounds=1),  # as Model has it
        speed("8b", "Q4_K", 10, layers="half", **some),
        speed("8b", "Q4_K", 14, layers="0", **some),
        *(right(4, cache, True) for cache in ("q8_0", "q4_0", "f32")),
        right(4, "f32", False),
        right(4, "f16", False, compute="f32"),
        speed("1b", "Q4_K", 5),
        speed("1b", "Q4_K", 4, flash=False),
        speed("1b", "Q4_K", 3, batch=2048, write=[]),
        speed("1b", "Q4_K", 4, cache="q8_0"),
        speed("1b", "Q4_K", 4, cache="q4_0"),
        right(4, "f16", True, file="F32"),
        right(4, "f32", False, file="F32"),
        speed("8b", "Q8_0", 22),
        speed("8b", "Q8_0", 11, cache="q8_0"),
        speed("1b", "Q8_0", 5),
        speed("1b", "Q4_K", 4, layers="half", **some),
        speed("1b", "Q4_K", 4, layers="0", **some),
        speed("8b", "Q4_K", 14, layers="half", flash=False, batch=32, **some),  # as Model has it
        speed("8b", "Q4_K", 16, layers="0", op_offload=False, **{**some, "read": [512], "write": []}),
    ]


# The child


def write_random(path: Path, shape: Shape, kind: str, pattern: Path, window: int) -> None:
    """Write a GGUF file of one random block over and over.

    Args:
        kind: tensor type of all matrices, e.g. Q4_K.
        pattern: sound file of a Llama, whose metadata is taken with the shape's numbers.
        window: that it states, in tokens.
    """
    import numpy as np

    from pi_gguf.gguf.file import TensorInfo, padded, read_gguf, tensor_nbytes, write_header
    from pi_gguf.llamacpp.quantizer import quantizations, quantize_rows

    entries = read_gguf(pattern).header.entries
    metadata = {
        key: entry.value for key, entry in entries.items()
        if key.startswith(("llama.", "tokenizer.")) and not (entry.type[0] == "[" and not entry.value)
    }  # fmt: skip
    metadata |= {
        "llama.context_length": window, "llama.embedding_length": shape.width, "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.inner, "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads, "llama.attention.key_length": shape.head,
        "llama.attention.value_length": shape.head, "llama.rope.dimension_count": shape.head,
        "llama.vocab_size": _VOCABULARY, "general.file_type": quantizations()[{"Q4_K": "Q4_K_M"}.get(kind, kind)],
    }  # fmt: skip
    tensors = [TensorInfo(n, s, k, tensor_nbytes(k, s)) for n, (s, k) in shape.tensors(kind).items()]
    values = np.random.default_rng(0).normal(0, 0.02, (256, 4096)).astype(np.float32)
    block = np.empty(tensor_nbytes(kind, values.shape), np.uint8)
    quantize_rows(kind, values, block)
    sources = {kind: block.tobytes() * max(1, 2**25 // block.nbytes), "F32": np.ones(2**16, np.float32).tobytes()}
    write_header(path, "llama", metadata, tensors)
    with path.open("ab") as file:
        file.write(bytes(padded(file.tell()) - file.tell()))
        for t in tensors:
            view = memoryview(sources[t.type])
            for start in range(0, t.nbytes, len(view)):
                file.write(view[: min(len(view), t.nbytes - start)])
            file.write(bytes(padded(t.nbytes) - t.nbytes))


def convert_plainly(model: str, path: Path, context: int | None, kind: str) -> None:
    """Convert a model, extended to a window without training, and measure nothing."""
    from pi_gguf.pipeline.convert import convert

    convert(model, path, context=context, steps=0, quant=kind, check="none", certify=False, overwrite=True)


def device_rates(device: str, scale: str) -> dict[str, Any]:
    """Return what the device does by itself: bytes a second of a copy, operations a second of a 16-bit product."""
    import torch

    cuda = device == "cuda"
    small = scale == "toy" or not cuda
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    side, nbytes, rounds = (1024, 2**26, 3) if small else (8192, 2**31, 10)

    def seconds(work: Any) -> float:
        for _ in range(2):
            work()
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / rounds

    a = torch.randn(side, side, dtype=kind, device=device)
    b = torch.empty_like(a)
    found: dict[str, Any] = {"operations_a_second": 2 * side**3 / seconds(partial(torch.mm, a, a, out=b))}
    a = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    found |= {"bytes_a_second": 2 * nbytes / seconds(partial(b.copy_, a)), "product": str(kind)}
    del a, b
    if cuda:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0)
        found |= {"card": whole.name, "card_bytes": whole.total_memory, "cuda": torch.version.cuda}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
        if program := shutil.which("nvidia-smi"):
            ask = [program, "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            found["driver"] = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return found


class Bench:
    """Carries out measurements; holds the files, the opened model and the reference between them."""

    def __init__(self, device: str, scratch: Path, model: str) -> None:
        self.device, self.scratch, self.model = device, scratch, model
        self.rates: dict[str, Any] = {}
        self._opened: tuple[Any, Any] = (None, None)
        self._references: dict[tuple[int, int], Any] = {}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["kind"] == "rates":
            self.rates = device_rates(self.device, job["scale"])
            return self.rates
        return self.speed(job) if job["kind"] == "speed" else self.kl(job)

    # Files

    def file(self, kind: str, context: int) -> Path:
        """Return the model to compare with transformers, in F16 or F32."""
        path = self.scratch / f"model-{context}-{kind}.gguf"
        if not path.exists():
            convert_plainly(self.model, path, context if self.model == bundled.TINY else None, kind)
        return path

    def random_file(self, shape: str, kind: str, window: int) -> Path:
        path = self.scratch / f"{shape}-{kind}-{window}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            pattern = self.scratch / "pattern.gguf"
            if not pattern.exists():
                convert_plainly(bundled.TINY, pattern, 32768, "F16")
            write_random(unfinished, SHAPES[shape], kind, pattern, window)
            unfinished.replace(path)
        return path

    # Speed

    @cached_property
    def _llama_cpp(self) -> Any:
        from pi_gguf.llamacpp.library import llama_cpp_library

        library = llama_cpp_library()
        library.llama_backend_init()
        return library

    def open(self, shape: str, kind: str, window: int, layers: str) -> None:
        """Open a model, which stays until another one is asked for."""
        from pi_gguf.llamacpp.library import compute, last_error, log
        from pi_gguf.llamacpp.trial import fast_buffers_work

        path = self.random_file(shape, kind, window)
        params = self._llama_cpp.llama_model_default_params()
        every = SHAPES[shape].layers
        on_gpu = {"all": every + 1, "half": every // 2 + 1}.get(layers, 0)  # the output matrix counts as one
        params.n_gpu_layers = on_gpu if self.device == "cuda" else 0
        params.use_extra_bufts = (self.device == "cuda" and layers == "all") or fast_buffers_work()
        log.clear()
        model = compute(self._llama_cpp.llama_model_load_from_file, os.fsencode(path), params)
        if not model:
            raise RuntimeError(f"llama.cpp does not open {path.name}: {last_error()}")
        self._opened = ((shape, kind, window, layers), model)

    def close(self) -> None:
        from pi_gguf.llamacpp.library import compute

        if self._opened[1]:
            compute(self._llama_cpp.llama_model_free, self._opened[1])
        self._opened = (None, None)

    def _free_bytes(self) -> int | None:
        if self.device != "cuda":
            return None
        import torch

        torch.cuda.synchronize()
        return int(torch.cuda.mem_get_info()[0])

    def speed(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return tokens per second by depth, their share of what the device does by itself, and memory."""
        from pi_gguf.common.machine import cores
        from pi_gguf.llamacpp.cache import CACHE_TYPES
        from pi_gguf.llamacpp.library import compute, last_error, log

        library = self._llama_cpp
        wanted = (job["shape"], job["quant"], job["window"], job["layers"])
        found: dict[str, Any] = {}
        if self._opened[0] != wanted:
            self.close()
            self.random_file(*wanted[:3])  # written before the clock starts
            free, started = self._free_bytes(), time.perf_counter()
            self.open(*wanted)
            found = {"opening_seconds": time.perf_counter() - started, "weights_mib": _buffers(log)}
            if free is not None:
                found["weights_bytes"] = free - (self._free_bytes() or 0)
        model, before = self._opened[1], self._free_bytes()
        params = library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = job["window"], max(512, job["batch"]), job["batch"]
        params.type_k = params.type_v = CACHE_TYPES[job["cache"]][0]
        params.flash_attn_type = int(job["flash"])
        params.op_offload = job["op_offload"] and self.device == "cuda"
        params.n_threads = params.n_threads_batch = cores()
        log.clear()
        context = compute(library.llama_init_from_model, model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no such context: {last_error()}")
        try:
            found["buffers_mib"] = _buffers(log)
            found |= compute(self._timed, context, job)
            after = self._free_bytes()
        finally:
            compute(library.llama_free, context)
        if before is not None and after is not None:
            found["cache_and_buffers_bytes"] = before - after
        if job["layers"] == "all" or self.device == "cpu":
            found |= self._shares(job, found)
        return found

    def _timed(self, context: Any, job: dict[str, Any]) -> dict[str, Any]:
        from pi_gguf.llamacpp.library import last_error

        library = self._llama_cpp
        memory = library.llama_get_memory(context)
        size = max(512, job["batch"])

        def read(begin: int, end: int) -> float:
            """Read the tokens of these positions behind what is there; return seconds."""
            started = time.perf_counter()
            for start in range(begin, end, size):
                ids = [i * 7919 % (_VOCABULARY - 8) + 4 for i in range(start, min(end, start + size))]
                held = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it
                batch = library.llama_batch_get_one(held, len(ids))
                if (code := library.llama_decode(context, batch)) != 0:
                    raise RuntimeError(f"llama_decode returned {code} at position {start}: {last_error()}")
            library.llama_synchronize(context)
            return time.perf_counter() - started

        def write(depth: int) -> float:
            """Read single tokens from this depth on, the logits waited for each time; return tokens per second."""
            seconds = [read(i, i + 1) for i in range(depth, depth + job["tokens"] + 2)][2:]  # graphs are made in two
            library.llama_memory_seq_rm(memory, 0, depth, -1)
            return 1 / statistics.median(seconds)

        read(0, min(job["read"][-1], 2 * size) if job["layers"] == "all" else job["read"][0])  # what is made once
        library.llama_memory_clear(memory, False)
        found: dict[str, Any] = {"read": {}, "write": {}}
        if 0 in job["write"]:
            read(0, 1)
            found["write"]["0"] = write(1)
            library.llama_memory_clear(memory, False)
        first, shorts = job["read"][0], []
        for _ in range(job["rounds"] - 1):
            shorts.append(read(0, first))
            library.llama_memory_clear(memory, False)
        position, seconds = 0, 0.0
        for depth in job["read"]:
            seconds += read(position, depth)
            position = depth
            took = statistics.median([*shorts, seconds]) if depth == first else seconds
            found["read"][str(depth)] = depth / took
            if depth in job["write"]:
                found["write"][str(depth)] = write(depth)
        return found

    def _shares(self, job: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Return used operations and bytes a second by those that the device does in torch."""
        if not self.rates:
            return {}
        from pi_gguf.llamacpp.cache import kv_cache_bytes

        shape = SHAPES[job["shape"]]
        shares: dict[str, dict[str, float]] = {"read_share": {}, "write_share": {}}
        for depth, rate in found["read"].items():
            used = shape.operations(int(depth)) / int(depth) * rate
            shares["read_share"][depth] = used / self.rates["operations_a_second"]
        for depth, rate in found["write"].items():
            cache = kv_cache_bytes(
                n_layers=shape.layers, n_kv_heads=shape.kv_heads, head_dim=shape.head, n_ctx=int(depth),
                type_k=job["cache"], type_v=job["cache"],
            )  # fmt: skip
            shares["write_share"][depth] = (
                (shape.weight_bytes(job["quant"]) + cache) * rate / self.rates["bytes_a_second"]
            )
        return shares

    # Right or not

    def kl(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return mean and largest KL divergence from transformers in float32, by text and way to read."""
        from pi_gguf.runtime.model import Model

        self.close()
        path, window = self.file(job["file"], job["context"]), job["window"]
        if job["compute"]:
            os.environ[_COMPUTE_TYPE] = job["compute"]
        try:
            with Model(
                path, n_ctx=window, type_k=job["cache"], type_v=job["cache"], flash_attn=job["flash"],
                device=self.device,
            ) as lm:  # fmt: skip
                prose = lm.tokenize(max(bundled.novels("heldout").values(), key=len)[: 16 * window])[:window]
                key = passkey_prompt(lm, window)
                last, single = job["last"], job["single"]
                found = {"ubatch": int(lm._llama.context_params.n_ubatch)}
                for name, ids, count, step in (
                    (f"prose {window}, batches", prose, last, 0),
                    (f"prose {window}, one by one", prose, single, 1),
                    (f"prose {job['short']}, batches", prose[: job["short"]], last // 2, 0),
                    (f"passkey {window}, batches", key, 64, 0),
                    (f"passkey {window}, 16 at a time", key, 64, 16),
                    (f"passkey {window}, one by one", key, 64, 1),
                ):
                    found[name] = self._compare(lm, ids, count, step, job["context"])
                return found
        finally:
            os.environ.pop(_COMPUTE_TYPE, None)

    def _compare(self, lm: Any, ids: list[int], count: int, step: int, context: int) -> dict[str, float]:
        import numpy as np

        from pi_gguf.measure.kl import kl_divergence

        theirs = self._reference(ids, count, context)
        started = time.perf_counter()
        ours = np.concatenate(list(read_in_steps(lm, ids[:-1], count, step)))
        seconds = time.perf_counter() - started
        kl, same = kl_divergence(theirs, ours)
        logprobs = [
            float(x[-1, ids[-1]] - np.log(np.exp(x[-1] - x[-1].max()).sum()) - x[-1].max())
            for x in (theirs.astype(np.float64), ours.astype(np.float64))
        ]
        return {
            "kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "top1": float(same.mean()), "tokens": len(kl),
            "last_logprob_reference": logprobs[0], "last_logprob": logprobs[1], "seconds": seconds,
        }  # fmt: skip

    def _reference(self, ids: list[int], count: int, context: int) -> Any:
        """Return transformers' logits (count, V) after the last ids but one; `count` of a text once, then from it."""
        import numpy as np
        import torch

        from pi_gguf.checkpoint.checkpoint import load_checkpoint
        from pi_gguf.models.hf import HfModel

        key = (hash(tuple(ids)), context)
        if key not in self._references or len(self._references[key]) < count:
            checkpoint = load_checkpoint(self.model)
            if self.model == bundled.TINY:
                checkpoint = checkpoint.extended(context)
            lm = HfModel(checkpoint, device=self.device)
            lm._model = checkpoint.load_model(dtype=torch.float32, device=self.device).eval()
            self._references[key] = np.concatenate(list(lm.logits_chunks(ids[:-1], count)))
            lm.close()
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        return self._references[key][-count:]


def passkey_prompt(lm: Any, window: int) -> list[int]:
    """Return a passkey question with its answer that fills the window, the key in the first tenth."""
    line = len(lm.tokenize(EVALUATION_FILLER, add_special=False))
    tail = f"{QUESTION} {_KEY}"
    lines = (window - len(lm.tokenize(INTRODUCTION + key_sentence(_KEY) + tail)) - 8) // line
    before = lines // 10
    text = INTRODUCTION + EVALUATION_FILLER * before + key_sentence(_KEY) + EVALUATION_FILLER * (lines - before) + tail
    ids: list[int] = lm.tokenize(text)[:window]
    return ids


def read_in_steps(lm: Any, ids: list[int], count: int, step: int) -> Iterator[Any]:
    """Yield logits after the last `count` ids: read from the start in large batches, or these `step` at a time, behind
    what was read in batches before."""
    if not step:
        lm._evaluated = []  # from the start
        yield from lm.logits_chunks(ids, count)
        return
    begin = len(ids) - count
    for _ in lm.logits_chunks(ids[:begin], 1):
        pass
    for start in range(begin, len(ids), step):
        upto = ids[: start + step]
        yield from lm.logits_chunks(upto, len(upto) - start)


def _buffers(log: Sequence[str]) -> dict[str, float]:
    """Return the sizes of buffers, in MiB, that llama.cpp has told of."""
    found: dict[str, float] = {}
    for place, what, size in re.findall(r"(\S+) +(\w+) buffer size = +([\d.]+) MiB", "".join(log)):
        found[f"{place} {what}"] = found.get(f"{place} {what}", 0) + float(size)
    return found


def child(work: Path) -> None:
    """Carry out the measurements of a file, and tell of each in a line of standard output."""
    order = json.loads(work.read_text())
    bench = Bench(order["device"], Path(order["scratch"]), order["model"])
    bench.rates = order["rates"]
    spent = guessed = 0.0

    def tell(**message: Any) -> None:
        print("@" + json.dumps(message), flush=True)

    for job in order["jobs"]:
        pace = min(4.0, max(0.3, spent / guessed)) if guessed > 10 else 1.0
        if time.time() + pace * job["about"] > order["deadline"]:
            tell(name=job["name"], result={"skipped": "not likely to end within the limit"})
            continue
        tell(started=job["name"])
        began = time.time()
        try:
            result = bench.run(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
            bench.close()
        if order["device"] == "cuda":
            import torch

            torch.cuda.empty_cache()
        result["seconds"] = time.time() - began
        spent, guessed = spent + result["seconds"], guessed + job["about"]
        tell(name=job["name"], result=result)
    bench.close()


# The parent


def carry_out(jobs: list[dict[str, Any]], args: argparse.Namespace, scratch: Path, record: dict[str, Any]) -> None:
    """Have children measure, and write the record after each measurement."""
    results, deadline = record["results"], args.started + args.limit
    waiting = list(jobs)

    def keep(name: str, result: dict[str, Any]) -> None:
        job = next(job for job in waiting if job["name"] == name)
        waiting.remove(job)
        results[name] = {**{k: v for k, v in job.items() if k not in ("name", "about")}, **result}
        record["elapsed_seconds"] = round(time.time() - args.started, 1)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{record['elapsed_seconds']:6.1f} s  {name}: {_short(result)}", flush=True)

    while waiting:
        work, errors = scratch / "work.json", scratch / "errors"
        rates = results.get("rates", {})
        order = {
            "jobs": waiting, "device": args.device, "scratch": str(scratch), "model": args.model, "deadline": deadline,
            "rates": rates if "bytes_a_second" in rates else {},
        }  # fmt: skip
        work.write_text(json.dumps(order))
        now: str | None = None
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, __file__, "--work", str(work)], stdout=subprocess.PIPE, stderr=stream, text=True
            )
            timer = threading.Timer(max(1.0, deadline - time.time()), process.kill)
            timer.start()
            for line in process.stdout or ():
                if not line.startswith("@"):
                    continue
                message = json.loads(line[1:])
                now = message.get("started")
                if "result" in message:
                    keep(message["name"], message["result"])
            code = process.wait()
            timer.cancel()
        if not waiting:
            return
        said = errors.read_text(errors="replace").strip()[-600:]
        late = time.time() >= deadline - 0.5
        keep(now or waiting[0]["name"], {"error": "the limit was reached" if late else f"exit code {code}: {said}"})
        if late or now is None:  # no time, or a child that does not begin
            for job in list(waiting):
                keep(job["name"], {"skipped": "the limit was reached" if late else "no child begins"})


def _short(result: dict[str, Any]) -> str:
    for word in ("error", "skipped"):
        if word in result:
            return f"{word}: {' '.join(str(result[word]).split())[:160]}"
    if "read" in result:
        parts = [f"{what} {depth}: {rate:,.0f}" for what in ("read", "write") for depth, rate in result[what].items()]
        return "tokens/s " + ", ".join(parts)
    if "bytes_a_second" in result:
        return f"{result['bytes_a_second'] / 1e9:,.0f} GB/s, {result['operations_a_second'] / 1e9:,.0f} G operations/s"
    return "nats " + ", ".join(
        f"{name} {value['kl_mean']:.1e}" for name, value in result.items() if isinstance(value, dict)
    )


def table(record: dict[str, Any]) -> str:
    """Return the record for people: tokens per second with their share of the device's own speed, and divergences."""
    from pi_gguf.common.tables import text_table

    found = {name: result for name, result in record["results"].items() if "error" not in result}
    speeds = {name: result for name, result in found.items() if "read" in result and "write" in result}
    speeds = {name: result for name, result in speeds.items() if isinstance(result["read"], dict)}
    depths = {
        what: sorted({int(depth) for result in speeds.values() for depth in result[what]}) for what in ("read", "write")
    }

    header = ("model", *(f"{what} {depth}" for what, several in depths.items() for depth in several))
    tables = []
    for title, end in (
        ("tokens per second, GiB of cache and buffers", ""),
        ("share of the device's own speed", "_share"),
    ):
        rows = []
        for name, result in speeds.items():
            values = [result.get(what + end, {}).get(str(depth)) for what in depths for depth in depths[what]]
            cells = ["" if value is None else f"{value:.1%}" if end else f"{value:,.0f}" for value in values]
            memory = result.get("cache_and_buffers_bytes")
            rows.append((name, *cells, *([] if end else [f"{memory / 2**30:.2f}" if memory else ""])))
        if rows:
            tables.append(text_table(title, header if end else (*header, "GiB"), rows))
    for name, result in found.items():
        if result.get("kind") == "kl" and "ubatch" in result:
            lines = [
                (way, f"{v['kl_mean']:.1e}", f"{v['kl_max']:.1e}", f"{v['top1']:.1%}",
                 f"{v['last_logprob']:.3f}", f"{v['last_logprob_reference']:.3f}")
                for way, v in result.items() if isinstance(v, dict)
            ]  # fmt: skip
            columns = ("read", "mean nats", "largest", "top-1", "last token", "in transformers")
            tables.append(text_table(name, columns, lines))
    return "\n".join(tables)


def _scratch_place(folder: Path | None, needed: int) -> str | None:
    """Return where files of so many bytes go: a folder in memory where there is one with room, else the usual one."""
    if folder:
        return str(folder)
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.2 * needed:
        return str(memory)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "toy"), default="full")
    parser.add_argument("--limit", type=float, default=150, help="seconds for all of it")
    parser.add_argument("--model", default=bundled.TINY, help="Hugging Face folder to compare with; its own window")
    parser.add_argument("--folder", type=Path, help="where models are written; in memory where there is room")
    parser.add_argument("--only", default="", help="measurements whose name has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "offload.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        child(args.work)
        return
    args.started = time.time()
    jobs = [job for job in list_jobs(args.scale) if args.only in job["name"] or job["kind"] == "rates"]
    record: dict[str, Any] = {"scale": args.scale, "limit_seconds": args.limit, "model": Path(args.model).name}
    record |= {**provenance(seed=0, device=args.device), "results": {}}
    place = _scratch_place(args.folder, 16 * 2**30 if args.scale == "full" else 2**26)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        carry_out(jobs, args, Path(scratch), record)
    print(table(record))


if __name__ == "__main__":
    main()
