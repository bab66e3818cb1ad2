"""The main job on the bundled model, proved: extend 2048 -> 32768, write F16, Q8_0 and Q4_K_M, measure all of them.

Out: one table (perplexity by window, passkey k_max), two plots and `results.json` in the output folder. What a table
row measures is the file of that row, in llama.cpp; the first three rows are the Hugging Face side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi_gguf import bundled
from pi_gguf.checkpoint import load_checkpoint
from pi_gguf.conversion import convert
from pi_gguf.errors import OptionError
from pi_gguf.evaluate import evaluate_passkey, evaluate_perplexity
from pi_gguf.files import open_folder, write_json, write_text, writes
from pi_gguf.finetune import extend
from pi_gguf.plots import plot_passkeys, plot_perplexity
from pi_gguf.progress import say
from pi_gguf.provenance import provenance, without_folders
from pi_gguf.results import PasskeyCell, PerplexityRow
from pi_gguf.tables import markdown_table
from pi_gguf.targets import doublings

QUANTIZATIONS = ("F16", "Q8_0", "Q4_K_M")
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
        from pi_gguf.tables import text_table

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
    header = ["perplexity at", *map(str, windows), "k_max"]
    return header, [
        [row["name"], *(f"{p['perplexity']:.2f}" for p in row["perplexity"]), str(row["k_max"])]
        for row in results["rows"]
    ]


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

    Takes about 14 minutes on 2 cores with the defaults.

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
    extend(
        bundled.TINY, hf_dir, context=context, steps=steps, train_window=train_window, batch_tokens=batch_tokens,
        schedule="decay", factor_warmup=factor_warmup, seed=seed, device=device, overwrite=True,
    )  # fmt: skip
    files = {quant: out_dir / f"{_stem(context)}-{quant}.gguf" for quant in QUANTIZATIONS}
    for quant, path in files.items():
        convert(str(hf_dir), path, quant=quant, overwrite=True, certify=False)  # all of them are measured below

    rows = []
    models: list[tuple[str, str, int | None]] = [
        ("base, no scaling (Hugging Face)", bundled.TINY, None),
        ("PI before training (Hugging Face)", bundled.TINY, context),
        ("PI after training (Hugging Face)", str(hf_dir), None),
        *((f"{quant} (llama.cpp)", str(path), None) for quant, path in files.items()),
    ]
    windows = doublings(2048, context)
    for name, model, scaled_to in models:
        say(f"measure {name}")
        on = "auto" if device == "cuda" and model.endswith(".gguf") else device  # llama.cpp may be built for the CPU
        perplexity = evaluate_perplexity(
            model, text=texts, windows=windows, stride=stride, samples=samples, context=scaled_to, seed=seed,
            device=on,
        )  # fmt: skip
        trained = model == str(hf_dir)
        passkey = evaluate_passkey(
            model, windows=windows, distances=distances if trained else other_distances, keys=keys,
            context=scaled_to, seed=seed, device=on,
        )  # fmt: skip
        (reached,) = passkey.k_max.values()
        rows.append(DemoRow(name, perplexity.rows, reached, passkey.cells))
        say("  perplexity " + ", ".join(f"{p.perplexity:.2f}" for p in perplexity.rows) + f"; k_max {reached}")
        if trained:
            plot_passkeys(passkey, out_dir / "passkey.png")
    report = DemoReport(str(out_dir), rows, settings, _record(hf_dir, seed, device))
    curves = {row.name: row.perplexity for row in rows}
    plot_perplexity(curves, out_dir / "perplexity.png", original=2048)
    write_json(out_dir / "results.json", report.to_json())
    write_text(out_dir / "table.md", markdown_table(*table_cells(report.to_json())))
    return report


def _stem(context: int) -> str:
    return f"tiny-{context // 1024}k"


def _record(hf_dir: Path, seed: int, device: str) -> dict[str, Any]:
    return {**provenance(seed=seed, device=device), "fine_tune": load_checkpoint(str(hf_dir)).provenance}
