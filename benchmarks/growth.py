"""How time and memory of each command grow with the model's size and with the window, on log axes.

In: nothing; random bf16 Llamas in the shapes of real models are made, and files of the bundled model with longer
windows. Out: `benchmarks/growth.json`, each command's seconds and peak memory by parameters and by tokens, and two
pictures beside it. A command is a whole process, with the start of Python. `slope` is the power that the last two
points are apart by: 1 doubles with what doubles, 2 is attention over a whole window.

Example (half an hour on 2 cores, 8 GB of disk; --toy is a trial):
    python benchmarks/growth.py
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from commands import measure  # noqa: E402

from pi_gguf import bundled  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402

SHAPES = {
    "15 M": (288, 768, 6, 6, 6, 32000),
    "135 M": (576, 1536, 30, 9, 3, 49152),
    "0.5 B": (896, 4864, 24, 14, 2, 151936),
    "1.1 B": (2048, 5632, 22, 32, 4, 32000),
}
"""Width, inner width, layers, heads, key-value heads, vocabulary of stories15M, SmolLM2-135M, Qwen2.5-0.5B (with tied
embeddings, as SmolLM2's) and TinyLlama-1.1B."""

WINDOWS = (4096, 8192, 16384, 32768, 65536, 131072)
LONGEST_CERTIFIED = 32768
"""Tokens; a certificate reads its window some twenty times."""

Curves = dict[str, list[dict[str, float]]]


def make_model(folder: Path, shape: tuple[int, ...]) -> int:
    """Save a random bf16 Llama with the bundled tokenizer; return its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads, groups, vocabulary = shape
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=vocabulary > 32000, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for path in bundled.TINY_DIR.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return model.num_parameters()


def in_a_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own: a child's peak begins with its parent's memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def ours(*words: object) -> list[str]:
    return [sys.executable, "-m", "pi_gguf", *map(str, words)]


def by_size(shapes: dict[str, tuple[int, ...]], found: Curves, keep: Callable[[], None]) -> None:
    """Measure what is done with a model of each size."""
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder, file = Path(scratch) / "model", Path(scratch) / "exact.gguf"
            parameters = in_a_child(make_model, folder, shape)
            other, back = Path(scratch) / "other.gguf", Path(scratch) / "back"
            unchecked = ("--check", "none", "--no-certify", "--overwrite")
            commands = {
                "cp": ["cp", "-r", str(folder), str(Path(scratch) / "copy")],
                "plan": ours("plan", folder, "--context", 8192, "--device", "cpu"),
                "convert --dry-run": ours("convert", folder, file, "--quant", "Q4_K_M", "--dry-run"),
                "convert --quant F16 --check none": ours("convert", folder, file, "--quant", "F16", *unchecked),
                "convert --quant Q8_0 --check none": ours("convert", folder, other, "--quant", "Q8_0", *unchecked),
                "convert --quant Q4_K_M --check none": ours("convert", folder, other, "--quant", "Q4_K_M", *unchecked),
                "convert --quant F16, checked": ours("convert", folder, file, "--quant", "F16", *unchecked[2:]),
                "inspect": ours("inspect", file),
                "unpack": ours("unpack", file, back),
            }  # fmt: skip
            for title, command in commands.items():
                note(found, title, {"parameters": parameters}, command, name)
                keep()


def by_window(windows: tuple[int, ...], longest_certified: int, found: Curves, keep: Callable[[], None]) -> None:
    """Measure what is done with the bundled model at each window."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n\n".join(bundled.novels("heldout").values()))
        for window in windows:
            file = Path(scratch) / f"{window}.gguf"
            made = ("--context", window, "--steps", 0, "--quant", "F16", "--check", "none", "--no-certify")
            commands = {
                "plan": ours("plan", bundled.TINY, "--context", window, "--device", "cpu"),
                "convert --check none": ours("convert", bundled.TINY, file, *made),
                "eval perplexity, one stretch": ours(
                    "eval", "perplexity", file, "--text", text, "--windows", window, "--samples", 1
                ),
            }
            if window <= longest_certified:
                commands["certify"] = ours("certify", file)
            for title, command in commands.items():
                note(found, title, {"tokens": window}, command, f"{window:,} tokens")
                keep()


def note(found: Curves, title: str, at: dict[str, int], command: list[str], name: str) -> None:
    """Measure a command, and put it behind the points of its curve."""
    measured = measure([command])
    found.setdefault(title, []).append({**at, **measured})
    print(f"{name}: {title}: {measured['seconds']} s, {measured['peak_mib']} MiB", flush=True)


def slopes(curves: Curves) -> dict[str, dict[str, float]]:
    """Return by command the power that its last two points are apart by, of time and of memory."""
    found = {}
    for title, points in curves.items():
        if len(points) > 1:
            (x, *_), (wider, *_) = points[-2].values(), points[-1].values()
            found[title] = {
                key: round(math.log(max(points[-1][key], 1e-3) / max(points[-2][key], 1e-3)) / math.log(wider / x), 2)
                for key in ("seconds", "peak_mib")
            }
    return found


def draw(curves: Curves, path: Path) -> None:
    """Draw time and memory on log axes, each with a line that grows as what grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5))
    what = next(key for key in next(iter(curves.values()))[0] if key not in ("seconds", "peak_mib"))
    for axis, key, label in zip(axes, ("seconds", "peak_mib"), ("seconds", "peak memory, MiB"), strict=True):
        for title, points in curves.items():
            axis.plot([p[what] for p in points], [max(p[key], 0.01) for p in points], marker="o", label=title)
        ends = [max(points, key=lambda p: p[what]) for points in curves.values()]
        top, right = max(end[key] for end in ends), max(end[what] for end in ends)
        left = min(points[0][what] for points in curves.values())
        axis.plot([left, right], [top * left / right, top], color="gray", linestyle="--", label=f"as {what}")
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two small models and two short windows")
    parser.add_argument("--only", choices=("size", "window"), help="one half of it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "growth.json")
    args = parser.parse_args()
    shapes, windows, certified = SHAPES, WINDOWS, LONGEST_CERTIFIED
    if args.toy:
        shapes, windows, certified = {"a": (64, 128, 2, 4, 2, 2048), "b": (128, 256, 4, 4, 2, 2048)}, (4096, 8192), 0
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}

    def keep() -> None:
        done = {half: record[half] for half in ("size", "window") if half in record}
        state = {**done, "slopes": {half: slopes(curves) for half, curves in done.items()}}
        args.out.write_text(json.dumps({**state, **provenance(seed=0, device="cpu")}, indent=1) + "\n")

    if args.only != "window":
        record["size"] = {}
        by_size(shapes, record["size"], keep)
    if args.only != "size":
        record["window"] = {}
        by_window(windows, certified, record["window"], keep)
    for half in ("size", "window"):
        if half in record:
            draw(record[half], args.out.with_name(f"{args.out.stem}-{half}.png"))


if __name__ == "__main__":
    main()
