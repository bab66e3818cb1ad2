"""The main job on the bundled model, proved: extend 2048 -> 32768, write F16, Q8_0 and Q4_K_M, measure all of them.

Out: one table (perplexity by window, passkey k_max), two plots and `results.json` in the output folder. What a table
row measures is the file of that row, in llama.cpp; the first three rows are the Hugging Face side. Each row is measured
and printed as soon as its model is there: what the base does beyond its window, before any training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import open_folder, write_json, write_text, writes
from pi_gguf.common.machine import torch_device
from pi_gguf.common.progress import duration, say
from pi_gguf.common.provenance import provenance, without_folders
from pi_gguf.common.tables import markdown_table, text_table
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.passkey import evaluate_passkey
from pi_gguf.evaluate.perplexity import evaluate_perplexity
from pi_gguf.measure.plots import plot_passkeys, plot_perplexity
from pi_gguf.measure.results import PasskeyCell, PasskeyReport, PerplexityRow
from pi_gguf.models.targets import doublings
from pi_gguf.pipeline.convert import convert
from pi_gguf.pipeline.plan import plan, reading_seconds
from pi_gguf.tune.extend import extend

QUANTIZATIONS = ("F16", "Q8_0", "Q4_K_M")
BASE, BEFORE, AFTER = (
    f"{what} (Hugging Face)" for what in ("base, no scaling", "PI before training", "PI after training")
)
FILES = tuple(f"{quant} (llama.cpp)" for quant in QUANTIZATIONS)
ROWS = (BASE, BEFORE, AFTER, *FILES)

_OF_PLAN = 0.55
"""Share of the planned time that training the bundled model takes: it reaches more of a product's speed than larger
models do (`recipes/demo`: 370 s)."""

CAPTION = (
    "Perplexity on stretches of held-out novels, the same tokens at every window (how many and how long: settings in "
    "results.json); the fine-tuning text is of the base model's own kind of mixture, novels and recall tasks, in which "
    "answers weigh more than prose. k_max: largest distance, in tokens, up to which at least 20 % of the passkeys are "
    "found at each, in prompts that fill a window."
)


@dataclass(frozen=True)
class DemoRow:
    """One line of the table."""

    name: str
    perplexity: list[PerplexityRow]
    k_max: int
    passkeys: list[PasskeyCell]


@dataclass(frozen=True)
class DemoReport:
    """The table with the settings and versions that made it."""

    out: str
    rows: list[DemoRow]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = without_folders(asdict(self))
        return found

    def __str__(self) -> str:
        context = self.settings["context"]
        title = f"{bundled.TINY}, window 2048 -> {context} (x{context / 2048:g})"
        table = text_table(title, *table_cells(self.to_json()))
        last = f"{self.out}/{_stem(context)}-{QUANTIZATIONS[-1]}.gguf"
        return (
            f"{table}\n{CAPTION}\nwrote {self.out}: models, results.json, perplexity.png, passkey.png\n"
            f'next: pi-gguf run {last} --prompt "The captain" --max-tokens 100'
        )


def table_cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table, from the contents of `results.json`."""
    windows = [row["window"] for row in results["rows"][0]["perplexity"]]
    return _header(windows), [_cells(row) for row in results["rows"]]


def _header(windows: Sequence[int]) -> list[str]:
    return ["perplexity at", *map(str, windows), "k_max"]


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["name"], *(f"{p['perplexity']:.2f}" for p in row["perplexity"]), str(row["k_max"])]


_FILES = ("perplexity.png", "passkey.png", "results.json", "table.md")


@writes("out", parents=True)
def demo(
    *,
    out: str = "out/demo",
    context: int = 32768,
    steps: int = 690,
    train_window: int | str = "512x600,2048+512+8192",
    batch_tokens: int = 4096,
    factor_warmup: int = 350,
    samples: int = 1,
    documents: int = 1,
    stride: int = 1024,
    distances: int = 4,
    other_distances: int = 1,
    keys: int = 2,
    seed: int = 0,
    device: str = "auto",
) -> DemoReport:
    """Run the main job on the bundled model and print the table: perplexity by window and passkey k_max.

    Takes about 14 minutes on 2 cores with the defaults. Each row is printed when it is measured, the base's first.

    Args:
        out: folder to write to: models, results.json and plots.
        context: new window, in tokens; each doubling from 2048 up to it is measured.
        steps: optimizer steps of the fine-tune.
        train_window: tokens of a training sequence, or several with their steps: 512x600,8192+512.
        batch_tokens: tokens of an optimizer step, but at least one sequence.
        factor_warmup: steps over which the factor grows from 1, e.g. 300; 0 (the paper's) starts with the whole.
        samples: stretches scored in each document.
        documents: held-out novels to read, at most 4.
        stride: tokens scored in each stretch.
        distances: places of the passkey in each window, for the trained Hugging Face model and the heatmap.
        other_distances: places for the other rows; 1 is the far end of each window only.
        keys: passkeys tried at each place.
        seed: of data, skips and keys.
        device: auto, cpu or cuda.

    Example:
        pi-gguf demo --out out/demo
    """
    heldout = list(bundled.novels("heldout").items())
    if not 1 <= documents <= len(heldout):
        raise OptionError(f"documents must be from 1 to {len(heldout)}, got {documents}")
    settings = {key: value for key, value in locals().items() if key not in ("heldout", "out")}
    out_dir = Path(out)
    texts_dir = out_dir / "texts"
    open_folder(out_dir, _FILES, texts_dir.name)
    texts_dir.mkdir(exist_ok=True)
    texts = []
    for name, body in heldout[:documents]:
        write_text(texts_dir / name, body)
        texts.append(str(texts_dir / name))

    hf_dir = out_dir / f"{_stem(context)}-hf"
    training: dict[str, Any] = {
        "context": context, "steps": steps, "train_window": train_window, "batch_tokens": batch_tokens,
        "schedule": "decay", "factor_warmup": factor_warmup, "seed": seed, "device": device,
    }  # fmt: skip
    table = _Table(texts, settings, training_seconds=_OF_PLAN * plan(bundled.TINY, **training).training_seconds)
    table.begin(steps)
    table.measure(BASE, bundled.TINY)
    table.measure(BEFORE, bundled.TINY, scaled_to=context)
    extend(bundled.TINY, hf_dir, **training, overwrite=True)
    table.training_seconds = 0
    plot_passkeys(table.measure(AFTER, str(hf_dir)), out_dir / "passkey.png")
    for quant, name in zip(QUANTIZATIONS, FILES, strict=True):
        path = out_dir / f"{_stem(context)}-{quant}.gguf"
        convert(str(hf_dir), path, quant=quant, overwrite=True, certify=False)  # it is measured here
        table.measure(name, str(path))
    report = DemoReport(str(out_dir), table.rows, settings, _record(hf_dir, seed, device))
    curves = {row.name: row.perplexity for row in table.rows}
    plot_perplexity(curves, out_dir / "perplexity.png", original=2048)
    write_json(out_dir / "results.json", report.to_json())
    write_text(out_dir / "table.md", markdown_table(*table_cells(report.to_json())))
    return report


class _Table:
    """Measures the rows, and prints each as soon as it is there with about how long the rest takes.

    Args:
        texts: paths of the held-out documents.
        settings: of the demo, by the name of its options.
        training_seconds: that the fine-tune, which is to come, takes, about.
    """

    def __init__(self, texts: list[str], settings: dict[str, Any], training_seconds: float) -> None:
        self.rows: list[DemoRow] = []
        self._texts, self._settings = texts, settings
        self._windows = doublings(2048, settings["context"])
        self._device = torch_device(settings["device"])
        self.training_seconds = training_seconds
        self._planned = {name: self._seconds(name) for name in ROWS}
        self._taken: dict[str, float] = {}

    def begin(self, steps: int) -> None:
        """Say what follows, and the head of the table."""
        here = f"about {self._left()} here" if self._device == "cpu" else "the time left is at the end of each row"
        say(
            f"{bundled.TINY} at {self._windows[0]} to {self._windows[-1]} tokens: as it is, with Position "
            f"Interpolation untrained and after {steps} steps, and {len(FILES)} files of it in llama.cpp; {here}"
        )
        say(self._line(_header(self._windows)))

    def measure(self, name: str, model: str, scaled_to: int | None = None) -> PasskeyReport:
        """Measure one row; `scaled_to` is the window that the model is interpolated to without training, in tokens."""
        given = self._settings
        device = given["device"]
        device = "auto" if device == "cuda" and name in FILES else device  # llama.cpp may be built for the CPU
        common: dict[str, Any] = {
            "windows": self._windows, "context": scaled_to, "device": device,
        }  # fmt: skip
        started = time.monotonic()
        perplexity = evaluate_perplexity(
            model, text=self._texts, stride=given["stride"], samples=given["samples"], **common
        )
        passkey = evaluate_passkey(
            model, distances=self._distances(name), keys=given["keys"], seed=given["seed"], **common
        )
        self._taken[name] = time.monotonic() - started
        (reached,) = passkey.k_max.values()
        self.rows.append(DemoRow(name, perplexity.rows, reached, passkey.cells))
        left = f"   about {self._left()} left" if name != ROWS[-1] else ""
        say(self._line(_cells(asdict(self.rows[-1]))) + left)
        return passkey

    def _distances(self, name: str) -> int:
        return int(self._settings["distances" if name == AFTER else "other_distances"])

    def _seconds(self, name: str) -> float:
        """Return about how long a row takes: each prompt fills its window."""
        given = self._settings
        prompts = given["samples"] * given["documents"] + self._distances(name) * given["keys"]
        tiny = load_checkpoint(bundled.TINY, config_only=True)
        return reading_seconds(tiny, {window: prompts * window for window in self._windows}, self._device)

    def _left(self) -> str:
        """Return about how long the rest takes: as planned, by as much slower or faster as the rows so far were."""
        slower = sum(self._taken.values()) / sum(self._planned[name] for name in self._taken) if self._taken else 1.0
        rows = sum(seconds for name, seconds in self._planned.items() if name not in self._taken)
        return duration(slower * (self.training_seconds + rows))

    def _line(self, cells: Sequence[str]) -> str:
        return f"{cells[0]:<{max(map(len, ROWS))}}" + "".join(f"{cell:>9}" for cell in cells[1:])


def _stem(context: int) -> str:
    return f"tiny-{context // 1024}k"


def _record(hf_dir: Path, seed: int, device: str) -> dict[str, Any]:
    record = load_checkpoint(str(hf_dir)).record
    return {**provenance(seed=seed, device=device), "fine_tune": record.to_json() if record else {}}
