"""The paper's evaluation as one page: its tables 1 to 5 and its figure 2, in a model's own numbers beside the paper's.

In: a base, and what it was extended to: a Hugging Face folder and GGUF files. Out: a folder with `report.html`, which
has its pictures inside, `report.json`, and every finished item, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import base64
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any, Unpack

from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import open_folder, write_json, write_text, writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import say
from pi_gguf.common.provenance import provenance, without_folders
from pi_gguf.errors import OptionError, PiGgufError
from pi_gguf.evaluate.bounds import evaluate_bounds
from pi_gguf.evaluate.kl import evaluate_kl
from pi_gguf.evaluate.options import PageKeywords, SuiteOptions
from pi_gguf.evaluate.passkey import evaluate_passkey
from pi_gguf.evaluate.perplexity import evaluate_perplexity
from pi_gguf.evaluate.short import evaluate_short
from pi_gguf.gguf.header import is_gguf, tensors_sha256
from pi_gguf.measure.passkey import k_max
from pi_gguf.measure.plots import plot_bounds, plot_matrix, plot_passkeys, plot_perplexity
from pi_gguf.measure.results import (
    BoundsReport,
    DivergenceReport,
    MatrixReport,
    PageReport,
    PasskeyCell,
    PasskeyReport,
    PerplexityRow,
    ShortReport,
)
from pi_gguf.models.options import TargetOptions
from pi_gguf.models.targets import check_targets, doublings, is_url, window_of

PAPER_PERPLEXITY = {
    "LLaMA 7B, no scaling": ("7.20", "> 1000", "> 1000", "> 1000", "> 1000"),
    "LLaMA 7B, direct, to 8192": ("7.21", "7.34", "7.69", "", ""),
    "LLaMA 7B, PI to 8192": ("7.13", "6.96", "6.95", "", ""),
    "LLaMA 7B, PI to 16384": ("7.11", "6.93", "6.82", "6.83", ""),
    "LLaMA 7B, PI to 32768": ("7.23", "7.04", "6.91", "6.80", "6.77"),
}
"""PG19, at 2048 and its doublings to 32768."""
PAPER_SECOND_PERPLEXITY = {
    "LLaMA 7B, no scaling": ("2.77", "", "", "", ""),
    "LLaMA 7B, direct, to 8192": ("2.85", "2.74", "2.73", "", ""),
    "LLaMA 7B, PI to 8192": ("2.79", "2.57", "2.39", "", ""),
    "LLaMA 7B, PI to 16384": ("2.79", "2.57", "2.37", "2.25", ""),
    "LLaMA 7B, PI to 32768": ("2.82", "2.59", "2.39", "2.24", "2.48"),
}
"""The same on Proof-pile."""
PAPER_STEPS = {
    "LLaMA 7B to 8192": {0: "16.10", 200: "7.12", 400: "7.10", 600: "7.02", 800: "6.99", 1000: "6.95"},
    "LLaMA 7B to 16384": {0: "112.13", 200: "7.05", 400: "6.93", 600: "6.88", 800: "6.84", 1000: "6.83"},
}
"""PG19 at the new window, by steps of fine-tuning."""
PAPER_K_MAX = {
    "LLaMA 7B, PI to 32768": {200: "32768", 400: "32768", 600: "18432", 800: "32768", 1000: "32768"},
    "LLaMA 7B, direct, to 8192": {200: "1792", 400: "2048", 600: "2048", 800: "2048", 1000: "2304", 10000: "2560"},
}
PAPER_SHORT = {
    "BoolQ": ("76.1", "64.7"), "PIQA": ("78.9", "77.2"), "RACE-M": ("55.7", "50.1"), "RACE-H": ("42.2", "39.6"),
    "WinoGrande": ("69.6", "66.9"),
}  # fmt: skip
"""Percent correct of LLaMA 7B, before and after PI to 32768."""


_FILES = ("perplexity.png", "passkeys.png", "divergence.png", "figure-2.png", "report.json", "report.html")
_KEPT = "kept.jsonl"


Asked = Sequence[tuple[str, str, int | None]]
"""Label of each row, model, and the window that it is extended to without training, in tokens."""


@writes("out", parents=True)
@flat(TargetOptions, SuiteOptions)
def evaluate_all(
    base: str,
    *models: str,
    out: str = "report",
    text: Sequence[str] = (),
    second_text: Sequence[str] = (),
    samples: int = 2,
    distances: int = 32,
    keys: int = 5,
    tasks: str = "next_sentence",
    limit: int = 200,
    **options: Unpack[PageKeywords],
) -> PageReport:
    """Measure a base and what it was extended to, and write one page: the paper's tables beside your numbers.

    Args:
        base: Hugging Face folder, Hub id or bundled:tiny, as it was before it was extended.
        models: what it became: a Hugging Face folder and GGUF files, all of one window.
        out: folder to write to; the same command goes on with what is there.
        text: text of table 1 (the paper's is PG19), as for eval perplexity; a held-out novel of the bundled sample when
            left out. Repeatable.
        second_text: text of table 2 (the paper's is Proof-pile); a training novel of the bundled sample when left out.
            Repeatable.
        samples: stretches to score in each document.
        distances: after which a passkey is asked for, evenly spaced up to the new window.
        keys: passkeys, each read once.
        tasks: of table 5, as for eval short, e.g. boolq,piqa,race_middle,race,winogrande; without the Hub
            next_sentence.
        limit: items of each task.

    Example:
        pi-gguf eval report bundled:tiny tiny-32k-hf tiny-32k-Q8_0.gguf tiny-32k-Q4_K_M.gguf --out report
    """
    device, seed = take(TargetOptions, options).device, take(SuiteOptions, options).seed
    original, context = _old_and_new_window(base, models)
    folder = Path(out)
    open_folder(folder, _FILES, _KEPT)
    labels = _labels(base, models)
    asked = [(label, name, context if "untrained" in label else None) for label, name in labels.items()]
    common: dict[str, Any] = {"keep": str(folder / _KEPT), "device": device}
    stretches = {"windows": doublings(original, context), "stride": min(256, original - 1), "samples": samples}
    with _texts(text, "heldout", "text") as texts:
        first, first_read = _perplexity(asked, text=texts, **stretches, **common)
    with _texts(second_text, "train", "second-text") as texts:
        second, second_read = _perplexity(asked, text=texts, **stretches, **common)
    passkeys = _passkeys(asked, windows=(context,), distances=distances, keys=keys, seed=seed, **common)
    files = {label: tensors_sha256(Path(name)) for label, name in labels.items() if _is_gguf(name)}
    steps = {label: _validations(name) for label, name, _ in asked if name != base and not _is_gguf(name)}
    short, missing = _short((base, *models), tasks=tasks, limit=limit, **common)
    report = PageReport(
        str(folder / "report.html"), base, context, files, first, first_read, second, second_read, passkeys, steps,
        short,
        _divergences(models, device), evaluate_bounds(base, context=context, seed=seed), missing,
        provenance(seed=seed, device=device),
    )  # fmt: skip
    _draw(report, folder)
    write_json(folder / "report.json", report.to_json())
    write_text(Path(report.path), _page(report, folder))
    return report


def _old_and_new_window(base: str, models: Sequence[str]) -> tuple[int, int]:
    """Return the base's window and the one that all models reach, in tokens.

    Raises:
        OptionError: there is none, or several.
    """
    check_targets((base, *models), TargetOptions())
    if not models:
        raise OptionError("MODELS is missing", "give what the base became, such as a GGUF file")
    original = load_checkpoint(base).rope.max_position_embeddings
    reached = {model: window_of(model) for model in models}
    context = max(reached.values())
    if min(reached.values()) < context or context <= original:
        told = ", ".join(f"{model} {window}" for model, window in reached.items())
        raise OptionError(f"models must have one window above the base's {original} tokens, got {told}")
    return original, context


def _perplexity(asked: Asked, **how: Any) -> tuple[dict[str, list[PerplexityRow]], list[str]]:
    """Return perplexity by label, and the names of the texts read."""
    found: dict[str, list[PerplexityRow]] = {}
    read: list[str] = []
    for label, name, scaled_to in asked:
        say(f"perplexity: {label}")
        measured = evaluate_perplexity(name, context=scaled_to, **how)
        found[label] = [replace(row, model=label) for row in measured.rows]
        read = [Path(name).name for name in measured.texts]
    return found, read


def _passkeys(asked: Asked, **how: Any) -> dict[str, list[PasskeyCell]]:
    """Return the passkeys found by label."""
    found = {}
    for label, name, scaled_to in asked:
        say(f"passkeys: {label}")
        cells = evaluate_passkey(name, growing=True, context=scaled_to, **how).cells
        found[label] = [replace(cell, model=label) for cell in cells]
    return found


def _short(models: Sequence[str], *, tasks: str, **how: Any) -> tuple[ShortReport | None, list[str]]:
    """Return the short tasks, or none and what is missing."""
    say(f"tasks: {tasks}")
    try:
        return evaluate_short(*models, tasks=tasks, **how), []
    except PiGgufError as error:
        missing = without_folders(f"Table 5 was not measured: {error}")
        say(f"note: {missing}")
        return None, [missing]


def _is_gguf(model: str) -> bool:
    return not is_url(model) and is_gguf(model)


def _labels(base: str, models: Sequence[str]) -> dict[str, str]:
    """Return the names of the rows and what each is of."""
    short = [Path(model).name for model in models]
    shown = short if len(set(short)) == len(short) else list(models)
    rows = {"base, no scaling": base, "base, PI, untrained": base}
    return {**rows, **dict(zip(shown, models, strict=True))}


@contextmanager
def _texts(given: Sequence[str], split: str, option: str) -> Iterator[Sequence[str]]:
    """Yield the texts of a table; where none are given, the longest novel of a split of the sample as a file."""
    if given:
        yield given
        return
    name, body = max(bundled.novels(split).items(), key=lambda item: len(item[1]))
    say(f"no --{option}: {name} of the bundled sample ({split}) is read")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_text(body, encoding="utf-8")
        yield [str(Path(folder, name))]


def _validations(folder: str) -> list[dict[str, Any]]:
    record = load_checkpoint(folder).record
    return (record.validations if record else None) or []


def _divergences(models: Sequence[str], device: str) -> list[DivergenceReport]:
    """Hold every file against the Hugging Face folder, or the first file where there is none."""
    reference = next((model for model in models if not _is_gguf(model)), models[0])
    found = []
    for model in models:
        if model != reference and _is_gguf(model):
            say(f"KL divergence: {model}")
            found.append(evaluate_kl(model, against=reference, device=device))
    return found


def _draw(report: PageReport, folder: Path) -> None:
    draw_perplexity(report, folder / "perplexity.png")
    draw_passkeys(report, folder / "passkeys.png")
    if report.divergences:
        draw_divergences(report, folder / "divergence.png")
    plot_bounds(report.bounds, folder / "figure-2.png")


# Its tables and pictures; a model card shows them too


def draw_perplexity(report: PageReport, path: Path) -> None:
    plot_perplexity(report.perplexity, path, original=_windows(report)[0])


def draw_passkeys(report: PageReport, path: Path) -> None:
    cells = [cell for of_model in report.passkeys.values() for cell in of_model]
    plot_passkeys(PasskeyReport([*report.passkeys], cells, {}, growing=True), path)


def draw_divergences(report: PageReport, path: Path) -> None:
    plot_matrix(MatrixReport(report.divergences[0].against, report.divergences), path)


def _windows(report: PageReport) -> list[int]:
    return [row.window for row in next(iter(report.perplexity.values()))]


def perplexity_table(rows: dict[str, list[PerplexityRow]]) -> list[list[str]]:
    """Return the header and the rows of a table: perplexity by window."""
    windows = [str(row.window) for row in next(iter(rows.values()))]
    return [["", *windows], *([label, *(f"{row.perplexity:.2f}" for row in found)] for label, found in rows.items())]


def passkey_table(report: PageReport) -> list[list[str]]:
    """Return the header and the rows of a table: k_max, and the share of keys found by range of distances."""
    ranges = list(itertools.pairwise([0, *_windows(report)]))

    def share(cells: list[PasskeyCell], begin: int, end: int) -> str:
        here = [cell for cell in cells if begin < cell.distance <= end]
        return f"{sum(cell.found for cell in here) / sum(cell.keys for cell in here):.0%}" if here else ""

    rows = [
        [label, str(k_max(cells, growing=True)), *(share(cells, *bounds) for bounds in ranges)]
        for label, cells in report.passkeys.items()
    ]
    return [["", "k_max", *(f"{begin + 1}-{end}" for begin, end in ranges)], *rows]


def short_table(short: ShortReport) -> list[list[str]]:
    """Return the header and the rows of a table: percent correct by task."""
    kinds = list(dict.fromkeys((row.task, row.metric) for row in short.rows))
    found = {(row.model, row.task, row.metric): row for row in short.rows}
    rows = [[Path(model).name, *(f"{100 * found[model, *kind].value:.1f}" for kind in kinds)] for model in short.models]
    return [["", *(" ".join(kind) for kind in kinds)], *rows]


def divergence_table(reports: Sequence[DivergenceReport]) -> list[list[str]]:
    """Return the header and the rows of a table: mean KL divergence by position, and top-1 agreement."""
    ranges = [f"{row.begin}-{row.end - 1}" for row in reports[0].rows]
    rows = [[Path(r.model).name, *(f"{row.mean:.2g}" for row in r.rows), f"{r.rows[-1].top1:.1%}"] for r in reports]
    return [["mean by position", *ranges, "same first choice"], *rows]


# The page


def _table(lines: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>\n"

    header, *rows = lines
    return f"<table>\n{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>\n"


def _picture(folder: Path, name: str) -> str:
    data = base64.b64encode((folder / name).read_bytes()).decode()
    return f'<img alt="{name}" src="data:image/png;base64,{data}">\n'


def _by_steps(ours: dict[str, dict[int, str]], paper: dict[str, dict[int, str]]) -> str:
    together = {**ours, **paper}
    steps = sorted({step for found in together.values() for step in found})
    body = [[label, *(found.get(step, "") for step in steps)] for label, found in together.items()]
    return _table([["steps", *steps], *body])


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def _page(report: PageReport, folder: Path) -> str:
    original, base = _windows(report)[0], escape(report.base)
    untrained = report.perplexity["base, PI, untrained"][-1].perplexity
    at_window: dict[str, dict[int, str]] = {}
    reached: dict[str, dict[int, str]] = {}
    for label, entries in report.steps.items():
        name = f"eval_perplexity_{report.context}"
        # Of the same model on another text: a validation reads one, table 1 several.
        at_window[label] = {0: f"{untrained:.2f} (on table 1's text)"} if entries else {}
        at_window[label] |= {entry["step"]: f"{entry[name]:.2f}" for entry in entries if name in entry}
        reached[label] = {e["step"]: f"{e['eval_k_max']:.0f}" for e in entries if "eval_k_max" in e}
    divergence = []
    if report.divergences:
        divergence = [_table(divergence_table(report.divergences)), _picture(folder, "divergence.png")]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{base} to {report.context}</title>",
        f"<style>{_STYLE}</style><h1>{base}: from {original} to {report.context} tokens</h1>",
        "<p>The base was trained on texts of the first length. <b>Position Interpolation</b> (PI, arXiv 2306.15595) "
        "divides its positions, so that a longer text stays inside the range it knows, and fine-tunes it for a while. "
        "Every figure below was measured on the very files named, beside the paper's for LLaMA 7B.</p>",
        *(f"<p><b>{escape(text)}</b></p>" for text in report.missing),
        "<h2>Table 1: perplexity by window</h2><p>How surprised the model is by the next token, when it may look back "
        "as many tokens as the column says: lower is better, and a window that works never makes it worse.</p>",
        _table(perplexity_table(report.perplexity)), _picture(folder, "perplexity.png"),
        _read(report.texts), "<p>The paper, on PG19:</p>", _papers(PAPER_PERPLEXITY),
        "<h2>Table 2: the same on a second text</h2>",
        _table(perplexity_table(report.second_perplexity)),
        _read(report.second_texts), "<p>The paper, on Proof-pile:</p>", _papers(PAPER_SECOND_PERPLEXITY),
        f"<h2>Table 3: perplexity at {report.context} tokens, by steps of fine-tuning</h2>",
        _recorded(at_window), _by_steps({k: v for k, v in at_window.items() if v}, PAPER_STEPS),
        "<h2>Table 4: how far back a key is found (k_max), by steps</h2><p>A five-digit key is hidden in filler text "
        "and asked for at the end. k_max is the largest distance, in tokens, up to which at least a fifth of the keys "
        "are found at each.</p>",
        _recorded(reached), _by_steps({k: v for k, v in reached.items() if v}, PAPER_K_MAX),
        "<p>Measured on each file now, and the share of keys found by distance:</p>",
        _table(passkey_table(report)), _picture(folder, "passkeys.png"),
        "<h2>Table 5: short tasks, before and after</h2><p>What the longer window costs on questions that never needed "
        "it, in percent correct.</p>",
        _table(short_table(report.short)) if report.short else "<p>Not measured.</p>",
        "<p>The paper, before and after PI to 32768:</p>",
        _table([["", "before", "after"], *([name, *row] for name, row in PAPER_SHORT.items())]),
        "<h2>What quantization costs, by position</h2><p>KL divergence from the unquantized model, in nats: how far "
        "the predicted probabilities moved. Files that are worse only at depth show here.</p>",
        *divergence,
        "<h2>Figure 2: why it works</h2><p>An attention score as a function of distance, of this model's own queries "
        "and keys. Left: inside the window it was trained on. Middle: beyond it, where nothing keeps it small. Right: "
        "between trained distances, where interpolated positions lie, it is smooth.</p>",
        _picture(folder, "figure-2.png"), _bounds_table(report.bounds),
        f"<p><small>pi-gguf {escape(str(report.provenance.get('pi_gguf')))}, commit "
        f"{escape(str(report.provenance.get('commit')))}, seed {report.provenance.get('seed')}; everything is in "
        "report.json.</small></p></html>\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _papers(rows: Mapping[str, Sequence[str]]) -> str:
    return _table([["", *(2048 * 2**i for i in range(5))], *([name, *row] for name, row in rows.items())])


def _read(texts: Sequence[str]) -> str:
    return f"<p>Read here: {escape(', '.join(texts))}.</p>"


def _recorded(found: dict[str, dict[int, str]]) -> str:
    if any(found.values()):
        return ""
    return "<p>Not recorded for this model: <code>pi-gguf extend ... --eval-steps 100</code> records it.</p>"


def _bounds_table(bounds: BoundsReport) -> str:
    chosen = asdict(bounds)
    rows = [
        ("largest score beyond the window, by the largest inside: worst pair", chosen["extrapolated_worst"], ""),
        ("the same with interpolated positions", chosen["interpolated"], ""),
        ("bound of extrapolation by that of interpolation: median", chosen["bound_ratio"], "about 600"),
    ]
    return _table([["", "this model", "the paper"], *([name, f"{value:.4g}", paper] for name, value, paper in rows)])
