"""Speed and memory of the fine-tune on Llamas of real shape, beside transformers' Trainer and a loop written by hand.

In: nothing; folders of random bf16 weights are made, all layers of a model alike. Out: `benchmarks/training.json`,
written after every run: seconds of a step, tokens a second, peak memory (and what `plan` predicts, for us), and shares
of the card's measured speed in a large matrix product: that of the model's own operations, without credit for what is
computed again, and that of all operations (`hardware_share`).

Three contenders, in turn on each case, each in a process of its own that stays:
    pi-gguf: `run_training`, as `extend` calls it; its adapters come with embeddings and norms trained whole.
    Trainer: transformers', sdpa attention, gradient checkpointing, bf16, fused AdamW, peft's usual adapters.
    loop: the same without Trainer, the loss in chunks of 2048 tokens.
A run is a short step (memory for Adam's moments), a full one to warm up, and --timed full ones, of which the median
counts. Of the 7B and 8B shapes a few layers are run, two counts of them; time and memory of the whole are the line
through both ("extrapolated"). The activations are then kept or computed again as they would be in the whole model.

A case is SHAPE:TRAIN at --context or SHAPE:TRAIN:CONTEXT, or SHAPE:TRAIN:CONTEXT:LAYERS for the least memory: pi-gguf
alone, with all that saves memory, on so many layers (fewer than all: on half of them too, for the line).

Examples (a card; a trial of two minutes anywhere; what two cores take):
    python benchmarks/training.py --limit 300
    python benchmarks/training.py --device cpu --scale toy --out /tmp/training.json
    python benchmarks/training.py --device cpu --cases 135m:full:2048,135m:full:8192 --limit 2000
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, by transformers' names.

    Args:
        all_measured: it is run with all its layers, where they fit.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    all_measured: bool

    def toy(self) -> Shape:
        """Return a model of this kind that a CPU trains in no time."""
        few = 2 if self.all_measured else 4
        return Shape(64, 192, few, 4, 4 // min(2, self.num_attention_heads // self.num_key_value_heads), 512,
                     self.tie_word_embeddings, self.all_measured)  # fmt: skip


SHAPES = {
    "135m": Shape(576, 1536, 30, 9, 3, 49152, True, True),  # SmolLM2
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, True, True),  # Llama 3.2
    "7b": Shape(4096, 11008, 32, 32, 32, 32000, False, False),  # Llama 2
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, False, False),  # Llama 3.1
}
CASES = "7b:full,8b:qlora,1b:full,8b:qlora:32768:32,8b:qlora:81920:8,1b:lora,135m:full,8b:full,8b:lora"
CONTENDERS = ("pi-gguf", "Trainer", "loop")
MEMORY_GOALS = {("8b:qlora", 32768): 16e9, ("8b:qlora", 81920): 24e9}
"""Bytes, of cases of the least memory."""
TIMED_LEAST = 1
CHUNK = 2048
LEFT_BYTES = 2**28
"""A process that holds more after a run is replaced before the next."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        name: as it was asked for.
        shape: of SHAPES.
        train: full, lora or qlora.
        context: tokens of a sequence, and the new window.
        least: layers of a case of the least memory; 0 for any other.
    """

    name: str
    shape: str
    train: str
    context: int
    least: int

    @classmethod
    def of(cls, name: str, context: int) -> Case:
        shape, train, *least = name.split(":")
        if shape not in SHAPES or train not in ("full", "lora", "qlora") or len(least) > 2:
            raise SystemExit(f"a case is SHAPE:TRAIN, SHAPE:TRAIN:CONTEXT or SHAPE:TRAIN:CONTEXT:LAYERS, got {name}")
        return cls(name, shape, train, int(least[0]) if least else context, int(least[1]) if least[1:] else 0)


# What a step computes


def operations(
    shape: Shape,
    layers: int,
    train: str,
    context: int,
    *,
    head: bool = True,
    recomputed: bool = False,
    tiled: bool = False,
    head_again: bool = False,
) -> float:
    """Return the operations of a step on one sequence: products forward and backward, of frozen weights without their
    gradients; causal attention over half the window. Adapters, norms and the optimizer are not counted.

    Args:
        layers: of the decoder.
        head: with the last product, by the vocabulary.
        recomputed: every layer once more forward, but for its last product: torch stops before it.
        tiled: every MLP once more than that, but for its last product; a layer then stops before its last tile, which
            counts as run here.
        head_again: the head once more forward.
    """
    width = shape.hidden_size
    kv = width // shape.num_attention_heads * shape.num_key_value_heads
    mlp = 2 * 3 * width * shape.intermediate_size
    products = 2 * (2 * width * width + 2 * width * kv) + mlp
    attention = 4 * width * context / 2
    passes = 3 if train == "full" else 2
    again = recomputed * (products + attention) + (mlp * 2 / 3 if tiled else -recomputed * mlp / 3)
    layer = passes * products + 3 * attention + again
    return context * (layers * layer + head * (passes + head_again) * 2 * shape.vocab_size * width)


def device_speed(device: str) -> float:
    """Return operations a second of a matrix product in bf16 (in 32 bits where those are faster), the median of ten."""
    import torch

    from pi_gguf.common.machine import fast_bf16

    side, dtype = 8192 if device == "cuda" else 512, torch.bfloat16 if fast_bf16(device) else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(50):
        a @ b
    seconds = []
    for _ in range(10):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            a @ b
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds)


# Random models


def make_config(place: Path, name: str, shape: Shape, layers: int, window: int) -> Path:
    """Write a folder with the config of a model alone.

    Args:
        place: where the folders are.
        name: of the shape.
        window: tokens that the config says it was trained for.
    """
    from transformers import LlamaConfig

    folder = place / f"{name}-{layers}-{window}"
    sizes = asdict(shape) | {"num_hidden_layers": layers, "max_position_embeddings": window}
    del sizes["all_measured"]
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, architectures=["LlamaForCausalLM"])
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder


def add_weights(folder: Path, name: str, shape: Shape, layers: int, device: str) -> None:
    """Add random weights to a config's folder: links to shards that all folders of the shape share, made when needed,
    a layer each."""
    import torch
    from safetensors.torch import save_file

    width, kv = shape.hidden_size, shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return made.normal_(0, 0.02, generator=generator).cpu()

    def ends() -> dict[str, torch.Tensor]:
        found = {"model.embed_tokens.weight": random(shape.vocab_size, width), "model.norm.weight": torch.ones(width)}
        return found if shape.tie_word_embeddings else found | {"lm_head.weight": random(shape.vocab_size, width)}

    def layer() -> dict[str, torch.Tensor]:
        sizes = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
        found = {f"self_attn.{part}_proj.weight": random(*size) for part, size in sizes.items()}
        for part in ("gate", "up"):
            found[f"mlp.{part}_proj.weight"] = random(shape.intermediate_size, width)
        found["mlp.down_proj.weight"] = random(width, shape.intermediate_size)
        return found | {f"{part}_layernorm.weight": torch.ones(width) for part in ("input", "post_attention")}

    def write(path: Path, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
        save_file({prefix + key: value.bfloat16() for key, value in tensors.items()}, path, {"format": "pt"})

    shards = folder.parent / name
    shards.mkdir(exist_ok=True)
    paths = [shards / "ends.safetensors", *(shards / f"layer-{i}.safetensors" for i in range(layers))]
    if not paths[0].exists():
        write(paths[0], ends())
    missing = [i for i in range(layers) if not paths[i + 1].exists()]
    if missing:
        tensors = layer()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: write(paths[i + 1], tensors, f"model.layers.{i}."), missing))
    places: dict[str, str] = {}
    for path in paths:
        (folder / path.name).unlink(missing_ok=True)
        (folder / path.name).symlink_to(path)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        places |= {tensor: path.name for tensor in header if tensor != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# The contenders. Each gets a job: folder (of the model), whole (a folder with the config of all layers), train,
# context, rows (arrays of token ids, one a step), least (of memory), work_dir. `found` takes what it has to tell.


class Done(Exception):
    """The last step of a run was made; what would follow, such as saving, is not measured."""


class Clock:
    """Takes the time after every step, when the device has done it. It stands where a run takes a validation, too."""

    def __init__(self, device: str, steps: int) -> None:
        self._device, self._steps, self._times = device, steps, list[float]()

    def tick(self) -> None:
        """Call this after a step.

        Raises:
            Done: it was the last.
        """
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        self._times.append(time.perf_counter())
        if len(self._times) == self._steps:
            raise Done

    def is_due(self, step: int) -> bool:
        self.tick()
        return False

    def seconds(self) -> list[float]:
        """Return the time of each step after the short one and the warm-up."""
        times = self._times[1:]
        return [after - before for before, after in itertools.pairwise(times)]


def plan(folder: str | Path, train: str, context: int, steps: int, device: str) -> tuple[Any, Any]:
    """Return the extended checkpoint and the plan of a run on one whole sequence a step."""
    from pi_gguf.checkpoint.checkpoint import load_checkpoint
    from pi_gguf.common.machine import Machine
    from pi_gguf.tune.choose import plan_training
    from pi_gguf.tune.options import TuneOptions

    checkpoint = load_checkpoint(str(folder)).extended(context)
    tune = TuneOptions(steps=steps, train_window=context, learning_rate=1e-6, batch_tokens=context, train=train)
    training = plan_training(checkpoint, tune, Machine.here(device))
    return checkpoint, training


def run_ours(job: dict[str, Any], device: str, clock: Clock, found: dict[str, Any]) -> None:
    import numpy as np
    import torch

    from pi_gguf.common.machine import Machine
    from pi_gguf.tune import compiled
    from pi_gguf.tune import trainer as module
    from pi_gguf.tune.memory import Activations, estimate_training_memory, fit_activations
    from pi_gguf.tune.processes import Spread

    checkpoint, training = plan(job["folder"], job["train"], job["context"], len(job["rows"]), device)
    whole = plan(job["whole"], job["train"], job["context"], len(job["rows"]), device)[0]
    here, alone = Machine.here(device), Spread()
    way, need = fit_activations(whole, training, here, alone)
    if job["least"]:
        way = Activations("recomputed, MLPs in tiles, inputs of layers in the host's memory", True, True, True)
        if device == "cpu":
            way = Activations("recomputed, MLPs in tiles", True, True)
    elif need > here.free_bytes:  # the whole is for several cards, which share weights and recompute activations
        way = Activations("recomputed", True)
    predicted, predicted_whole = (estimate_training_memory(c, training, here, alone, way) for c in (checkpoint, whole))
    found |= {"predicted_memory_bytes": predicted, "predicted_whole_bytes": predicted_whole, "activations": way.name}
    found["again"] = {
        "recomputed": way.recompute, "tiled": way.tiled,
        "head_again": device == "cuda" and hasattr(torch.nn.functional, "linear_cross_entropy"),
    }  # fmt: skip
    module.fit_activations = lambda *_, **__: (way, predicted)
    batches = [[[row.astype(np.int32)]] for row in job["rows"]]
    compiled.LEAST_OPERATIONS = 0  # as in a run that is long
    run = module.Run(checkpoint, training, batches, Path(job["work_dir"]), 0, device, [], Spread(), clock)
    module.run_training(run)


def peer_model(job: dict[str, Any], device: str, *, prepare: bool) -> Any:
    """Open the model as one does without us: all of it in 32 bits, or peft's usual adapters on 16 or 4.

    Args:
        prepare: call peft's `prepare_model_for_kbit_training` on one in 4 bits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pi_gguf.common.machine import fast_bf16

    half = fast_bf16(device) and job["train"] != "full"
    options: dict[str, Any] = {"dtype": torch.bfloat16 if half else torch.float32}
    if job["train"] == "qlora":
        from transformers import BitsAndBytesConfig

        options["device_map"] = {"": 0}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(job["folder"], attn_implementation="sdpa", **options)
    model = model if job["train"] == "qlora" else model.to(device)
    model.config.use_cache = False
    if job["train"] != "full":
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if job["train"] == "qlora" and prepare:
            model = prepare_model_for_kbit_training(
                model, gradient_checkpointing_kwargs={"use_reentrant": False}
            )  # fmt: skip
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model.train()


def run_trainer(job: dict[str, Any], device: str, clock: Clock, found: dict[str, Any]) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from pi_gguf.common.machine import fast_bf16

    found["again"] = {"recomputed": True}

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [torch.from_numpy(row) for row in job["rows"]]
    trainer = InOrder(
        model=peer_model(job, device, prepare=True),
        args=TrainingArguments(
            output_dir=job["work_dir"], max_steps=len(rows), per_device_train_batch_size=1, bf16=fast_bf16(device),
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[],
            optim="adamw_bnb_8bit" if job["train"] == "qlora" else "adamw_torch_fused", use_cpu=device == "cpu",
            disable_tqdm=True, learning_rate=1e-6, save_strategy="no", logging_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[Ticks()],
    )  # fmt: skip
    trainer.train()


def run_loop(job: dict[str, Any], device: str, clock: Clock, found: dict[str, Any]) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    from pi_gguf.common.machine import fast_bf16

    found["again"] = {"recomputed": True, "head_again": True}
    model = peer_model(job, device, prepare=False)
    llama = model if job["train"] == "full" else model.get_base_model()
    for layer in llama.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if job["train"] == "qlora":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(trained, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of (T, D) hidden states and (T) next tokens."""
        return torch.nn.functional.cross_entropy(llama.lm_head(hidden).float(), targets, reduction="sum")

    for row in job["rows"]:
        ids = torch.from_numpy(row).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device)):
            hidden = llama.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            chunks = zip(hidden.split(CHUNK), ids[1:].split(CHUNK), strict=True)
            loss = sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks) / (len(ids) - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["loss"] = loss.item()
        clock.tick()


def work(who: str, device: str, pipe: Any) -> None:
    """Be a contender's process: take jobs, answer with what was measured, until the pipe is closed."""
    import peft  # noqa: F401  before the first job, while the others do so, too
    import torch
    import transformers

    import pi_gguf.tune.trainer  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    pipe.send("ready")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        found = measure(who, device, job)
        if "bitsandbytes" in sys.modules:  # it remembers embeddings
            sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()
        gc.collect()
        found["left_bytes"] = 0
        if device == "cuda":
            torch.cuda.empty_cache()
            found["left_bytes"] = torch.cuda.memory_allocated()
        pipe.send(found)


def measure(who: str, device: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job; a failure is what was found, then."""
    import torch

    found: dict[str, Any] = {}
    clock = Clock(device, len(job["rows"]))
    run = {"pi-gguf": run_ours, "Trainer": run_trainer, "loop": run_loop}[who]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    try:
        run(job, device, clock, found)
    except Done:
        pass
    except Exception as error:  # whatever it is, the other contenders go on
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    seconds = clock.seconds()
    if not seconds:
        found.setdefault("failed", "no step was timed")
    elif "failed" not in found:
        found |= {"step_seconds": statistics.median(seconds), "all_step_seconds": seconds}
    if device == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        found["peak_memory_bytes"] = resident_peak()
    return found


def resident_peak() -> int:
    """Return the most memory of this process since that was last set back, in bytes."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


class Worker:
    """A contender's process, seen from outside."""

    def __init__(self, who: str, device: str) -> None:
        self._who, self._device = who, device
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(self._who, self._device, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def wait(self) -> None:
        """Return when it can begin."""
        if not self._is_ready:
            self._is_ready = self._pipe.recv() == "ready"

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one job; a process that ended, or keeps memory, is replaced."""
        try:
            self.wait()
            self._pipe.send(job)
            found: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            found = {"failed": f"the process ended ({self._process.exitcode})", "left_bytes": LEFT_BYTES + 1}
        if found["left_bytes"] > LEFT_BYTES:
            self.close()
            self._start()
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


# Cases


def measured_layers(case: Case, shape: Shape, folder: Any, device: str) -> list[int]:
    """Return how many layers are run: all, or two counts of them for a line; those that fit by our own prediction.

    Args:
        folder: makes one with the config of so many layers.
    """
    from pi_gguf.common.machine import Machine
    from pi_gguf.tune.memory import Activations, estimate_training_memory
    from pi_gguf.tune.processes import Spread

    here, whole = Machine.here(device), shape.num_hidden_layers
    if case.least:
        layers = min(case.least, whole)
        return [layers] if layers == whole else [layers, layers // 2]
    choices = [[whole]] * shape.all_measured + [[4, 2], [2, 1]]
    for choice in choices:
        checkpoint, training = plan(folder(choice[0]), case.train, case.context, 2, device)
        need = estimate_training_memory(checkpoint, training, here, Spread(), Activations("recomputed", True))
        if need < 0.9 * here.free_bytes:
            return choice
    return choices[-1]


def line(counts: list[int], values: list[float], at: int) -> float:
    """Return the value at so many layers, on the line through two others; of one count its value."""
    if len(counts) == 1:
        return values[0]
    slope = (values[0] - values[1]) / (counts[0] - counts[1])
    return values[0] + slope * (at - counts[0])


def summary(case: Case, shape: Shape, counts: list[int], runs: list[dict[str, Any]], speed: float) -> dict[str, Any]:
    """Return what a contender's runs say of the whole model."""
    whole, found = shape.num_hidden_layers, {}
    if failed := [run["failed"] for run in runs if "failed" in run]:
        return {"failed": failed[0]}
    step = line(counts, [run["step_seconds"] for run in runs], whole)
    used = partial(operations, shape, train=case.train, context=case.context)
    found |= {
        "step_seconds": step,
        "tokens_a_second": case.context / step,
        "share": used(layers=whole) / step / speed,
        "hardware_share": used(layers=whole, **runs[0]["again"]) / step / speed,
    }
    if len(counts) > 1:
        layer = (runs[0]["step_seconds"] - runs[1]["step_seconds"]) / (counts[0] - counts[1])
        found |= {"layer_seconds": layer, "layer_share": used(layers=1, head=False) / layer / speed}
    for key in ("peak_memory_bytes", "peak_reserved_bytes"):
        if key in runs[0]:
            found[key] = int(line(counts, [run[key] for run in runs], whole))
    if "predicted_whole_bytes" in runs[0]:
        found["predicted_memory_bytes"] = runs[0]["predicted_whole_bytes"]
    return found


def card() -> dict[str, Any]:
    """Return what the GPU and its driver are."""
    import torch

    found: dict[str, Any] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        found |= zip(("driver", "power_limit", "max_clock"), done.stdout.splitlines()[0].split(", "), strict=True)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass
    return found


def print_table(record: dict[str, Any]) -> None:
    print(
        f"{record['operations_a_second'] / 1e12:.3g} TFLOP/s; shares of it: the model's own operations, all, a layer's"
    )
    heads = ("case", "contender", "layers", "s/step", "tokens/s", "share", "all", "layer", "GB", "plan GB", "x Trainer")
    print("{:<20} {:<9} {:>7} {:>8} {:>9} {:>6} {:>6} {:>6} {:>7} {:>7} {:>9}".format(*heads))
    for name, case in record["cases"].items():
        if "skipped" in case:
            print(f"{name:<20} skipped: {case['skipped']}")
        for who, found in case.get("contenders", {}).items():
            if "failed" in found:
                print(f"{name:<20} {who:<9} failed: {found['failed'][:90]}")
                continue
            counts = "+".join(map(str, case["measured_layers"])) + f"/{case['layers']}" * case["extrapolated"]
            sizes = [found.get(key, 0) / 1e9 for key in ("peak_memory_bytes", "predicted_memory_bytes")]
            print(
                f"{name:<20} {who:<9} {counts:>7} {found['step_seconds']:>8.3f} {found['tokens_a_second']:>9.0f} "
                f"{found['share']:>6.1%} {found['hardware_share']:>6.1%} {found.get('layer_share', 0):>6.1%} "
                f"{sizes[0]:>7.2f} {sizes[1]:>7.2f} {found.get('times_the_trainer', 0):>9.2f}"
            )
    if record["not_reached"]:
        print("not reached:", ", ".join(record["not_reached"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=CASES, help="separated by commas, in order of worth")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="separated by commas")
    parser.add_argument("--context", type=int, help="tokens of a sequence; 32768 when left out, 256 of toys")
    parser.add_argument("--timed", type=int, default=3, help="steps of a run that are timed")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no run is begun")
    parser.add_argument("--scale", choices=("full", "toy"), default="full", help="toy: 2 or 4 layers of 64")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training.json")
    args = parser.parse_args()
    args.context = args.context or (32768 if args.scale == "full" else 256)
    if args.scale == "toy":  # threads would wait for each other more than they compute
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = [Case.of(name, args.context) for name in args.cases.split(",")]
    contenders = args.contenders.split(",")
    if not set(contenders) <= set(CONTENDERS):
        parser.error(f"contenders are {', '.join(CONTENDERS)}, got {args.contenders}")
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 24 * 2**30
    with tempfile.TemporaryDirectory(prefix="pi-gguf-", dir=shared if in_memory else None) as place:
        bench(args, cases, contenders, Path(place))


def bench(args: argparse.Namespace, cases: list[Case], contenders: list[str], place: Path) -> None:
    """Measure the cases in their order, and write the record after every run."""
    started = time.perf_counter()
    workers = {who: Worker(who, args.device) for who in contenders}  # they import while this one does

    import numpy as np
    import torch

    from pi_gguf.common.files import write_json
    from pi_gguf.common.machine import Machine
    from pi_gguf.common.provenance import package_version, provenance
    from pi_gguf.tune.lora import no_4_bits

    device, cuda = args.device, args.device == "cuda"
    record: dict[str, Any] = {"scale": args.scale, "card": card() if cuda else None}
    for worker in workers.values():
        worker.wait()
    record |= {"operations_a_second": device_speed(device), "cases": {}, "not_reached": [case.name for case in cases]}

    def save() -> None:
        more = provenance(seed=0, device=device)
        more["libraries"] |= {name: package_version(name) for name in ("peft", "accelerate", "bitsandbytes")}
        write_json(args.out, record | more)

    def late() -> bool:
        return time.perf_counter() - started > args.limit

    for turn, case in enumerate(cases):
        if late():
            break
        record["not_reached"].remove(case.name)
        if case.train == "qlora" and (reason := no_4_bits(Machine.here(device))):
            record["cases"][case.name] = {"skipped": f"qlora {reason[0]}"}
            continue
        shape = SHAPES[case.shape] if args.scale == "full" else SHAPES[case.shape].toy()
        folder = partial(make_config, place, case.shape, shape, window=min(2048, case.context // 16))
        counts = measured_layers(case, shape, folder, device)
        whole = shape.num_hidden_layers
        steps = 1 + (TIMED_LEAST if case.least else args.timed)
        lengths = [max(16, case.context // 16)] + [case.context] * steps
        random = np.random.default_rng(0)
        job = {
            "train": case.train, "context": case.context, "least": case.least, "whole": str(folder(whole)),
            "rows": [random.integers(2, shape.vocab_size, n) for n in lengths],
        }  # fmt: skip
        entry: dict[str, Any] = {"train": case.train, "context": case.context, "layers": whole}
        entry |= {"measured_layers": counts, "extrapolated": len(counts) > 1, "contenders": {}, "runs": {}}
        if goal := MEMORY_GOALS.get((f"{case.shape}:{case.train}", case.context)) if case.least else None:
            entry["goal_memory_bytes"] = goal
        record["cases"][case.name] = entry
        for layers in counts:
            add_weights(folder(layers), case.shape, shape, layers, device)
        if cuda:
            torch.cuda.empty_cache()
        own = [who for who in contenders if who == "pi-gguf" or not case.least]
        for who in own[turn % len(own) :] + own[: turn % len(own)] if own else []:
            if late():
                record["not_reached"].append(f"{case.name} {who}")
                continue
            runs: list[dict[str, Any]] = []
            for layers in counts:
                with tempfile.TemporaryDirectory(dir=place) as work_dir:
                    runs.append(workers[who].run(job | {"folder": str(folder(layers)), "work_dir": work_dir}))
                if "failed" in runs[-1]:
                    break
            entry["runs"][who] = runs
            entry["contenders"][who] = summary(case, shape, counts, runs, record["operations_a_second"])
            if trainer := entry["contenders"].get("Trainer", {}).get("step_seconds"):
                for found in entry["contenders"].values():
                    if "failed" not in found:
                        found["times_the_trainer"] = trainer / found["step_seconds"]
            save()
            print(f"{time.perf_counter() - started:.0f} s: {case.name} {who}: {entry['contenders'][who]}", flush=True)
    for worker in workers.values():
        worker.close()
    save()
    print_table(record)


if __name__ == "__main__":
    main()
