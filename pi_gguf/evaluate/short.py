"""The paper's benchmarks inside the original window, by EleutherAI's lm-evaluation-harness.

In: targets and names of the harness's tasks. Out: a report, one row a metric. The harness makes prompts and metrics, a
`LanguageModel` answers: GGUF files and Hugging Face models are asked alike. Nothing in a folder of tasks is run.

Source: arXiv 2306.15595, section 3.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Unpack

import yaml  # type: ignore[import-untyped]
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from pi_gguf import bundled
from pi_gguf.common.files import open_plain, writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.provenance import library_versions, package_version, sha256
from pi_gguf.errors import OptionError, TextError, one_line
from pi_gguf.evaluate.options import ShortKeywords, SuiteOptions
from pi_gguf.evaluate.suite import Suite, check_counts
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.results import ShortReport, TaskRow
from pi_gguf.models.options import TargetOptions
from pi_gguf.models.targets import identity
from pi_gguf.texts import as_dataset

_FOLDERS = ("super_glue/boolq", "piqa", "race", "winogrande")
"""Of the harness's tasks, those of the paper: all of its 14,000 files take long to read."""

RACE_MIDDLE = {"task": "race_middle", "dataset_path": "ehovy/race", "dataset_name": "middle"}
"""What differs from the harness's `race`, which is the high school's; its data set has no other."""

NEXT_SENTENCE = {
    "task": "next_sentence", "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
"""A task of the bundled sample, for a trial without the Hub: which of four sentences follows a passage."""

_RUNS_CODE = {"class", "custom_dataset", "hf_evaluate", "unsafe_code", "use_prompt"}
"""Keys of a task file with which the harness may run what the file names."""


@writes("keep")
@flat(TargetOptions, SuiteOptions)
def evaluate_short(
    *models: str | LanguageModel,
    tasks: str = "boolq,piqa,race_middle,race,winogrande",
    limit: int | None = None,
    max_length: int | None = None,
    task_dir: str | None = None,
    **options: Unpack[ShortKeywords],
) -> ShortReport:
    """Measure benchmarks of short texts, zero-shot, with lm-evaluation-harness.

    Differences are from the first model: give the one before first. The harness's race is RACE-H, and asks the last
    question of each article after the others with their answers; race_middle is RACE-M, asked in the same way.

    Args:
        models: GGUF file, Hugging Face folder, Hub id or bundled:tiny; several make one table.
        tasks: of lm-evaluation-harness, race_middle, or next_sentence (of the bundled sample, without the Hub),
            separated by commas.
        limit: documents of each task, from the start; all when left out.
        max_length: most tokens of a request, the rest being cut off at its start, as the harness does; less than the
            window takes less memory. Each model's own window when left out.
        task_dir: folder of task files of your own, as the harness reads them but for what would run code; with data on
            disk they need no network.

    Example:
        pi-gguf eval short my-llama my-llama-32k-hf my-llama-32k-Q4_K_M.gguf --limit 200
    """
    suite = Suite(models, take(TargetOptions, options), take(SuiteOptions, options))
    if limit is not None:
        check_counts({"limit": limit})
    if max_length is not None and max_length < 2:
        raise OptionError(f"max-length must be at least 2 tokens, got {max_length}")
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    if not wanted:
        raise OptionError(f"tasks must be names separated by commas, got {tasks!r}", "leave it out for the paper's")
    _import_harness()
    if task_dir is not None:
        _check_task_files(task_dir)
    for model in models:
        identity(model)  # what is not there is said before data are loaded
    loaded = _load_tasks(wanted, task_dir)
    asked = {
        name: sha256([str(task.dump_config()), *map(str, itertools.islice(task.eval_docs, limit))])
        for name, task in loaded.items()
    }
    versions = library_versions() | {"lm-eval": package_version("lm-eval")}

    def measure(lm: LanguageModel, kept: Kept) -> list[tuple[str, list[Any]]]:
        found = []
        for name, task in loaded.items():
            item = {"task": name, "asked": asked[name]}
            of_task = kept.value(item, partial(_measure, lm, name, task, limit, max_length))
            found += [(name, row) for row in of_task]
        return found

    measured = suite.measure(measure, {"max_length": max_length, "versions": versions}, at_most=max_length)
    record = suite.record(text_sha256=sha256(list(asked.values())))
    return ShortReport(suite.names, _rows(suite.names, measured), {**record, "libraries": versions})


def _rows(names: Sequence[str], measured: Sequence[Sequence[tuple[str, list[Any]]]]) -> list[TaskRow]:
    """Return a row of each model, task and metric, with the difference from the first model."""
    rows: list[TaskRow] = []
    first: dict[tuple[str, str], float] = {}
    for i, (model, found) in enumerate(zip(names, measured, strict=True)):
        for task, (metric, value, error, items) in found:
            before = first.setdefault((task, metric), value)
            difference = value - before if i else None
            rows.append(TaskRow(task, metric, value, error, items, difference, model))
    return rows


def _import_harness() -> None:
    """Import lm-evaluation-harness, and keep the templates of task files to what is harmless.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import lm_eval.utils
    except ModuleNotFoundError as error:
        raise OptionError("lm-evaluation-harness is not installed", "pip install lm-eval") from error
    plain = lm_eval.utils.env
    sandbox = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    sandbox.filters.update(plain.filters)
    lm_eval.utils.env = sandbox


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness's own bars, logs and prints from the user."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


# Tasks


def _check_task_files(folder: str) -> None:
    """Check that no task file of a folder, nor one that it includes, would run code.

    Raises:
        OptionError: one would, or is no YAML, or there is none.
    """
    import lm_eval.api.metrics  # fills the registry

    paths = [path.resolve() for path in sorted(Path(folder).glob("**/*.yaml"))]
    if not paths:
        raise OptionError(f"task-dir: no .yaml files in {folder}", "give the folder of your own task files")
    for path in paths:  # those that are included are added on the way
        try:
            with open_plain(path) as file:
                config = yaml.safe_load(file.read())
        except yaml.constructor.ConstructorError as error:
            raise OptionError(f"{path}: would run code ({error.problem})", "write it without tags") from error
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{path}: no readable YAML ({one_line(error)})") from error
        for key, value in _entries(config):
            if key in _RUNS_CODE:
                raise OptionError(f"{path}: would run code (key {key})", "leave it out")
            if key == "metric" and str(value) not in lm_eval.api.registry.metric_registry:
                raise OptionError(f"{path}: metric {value} is none of the harness's own", "e.g. acc or exact_match")
            if key == "include":
                included = value if isinstance(value, list) else [value]
                paths += {(path.parent / str(name)).resolve() for name in included} - {*paths}


def _entries(config: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every key and its value, at any depth."""
    if isinstance(config, dict):
        yield from config.items()
        config = [*config.values()]
    if isinstance(config, list):
        for part in config:
            yield from _entries(part)


def _load_tasks(names: Sequence[str], task_dir: str | None) -> dict[str, Any]:
    """Load the harness's tasks with their data, by name; groups give several.

    Raises:
        OptionError: a name is unknown, or a task runs what a model writes or shows pictures.
        TextError: a task or its data cannot be read.
    """
    import lm_eval.tasks

    own = [task_dir] if task_dir else []
    found: dict[str, Any] = {}
    with _silence():
        few = [*(Path(lm_eval.tasks.__file__).parent / folder for folder in _FOLDERS), *own]
        manager = lm_eval.tasks.TaskManager(include_path=few, include_defaults=False)
        if not {*names} <= {*manager.all_subtasks, *_OURS}:
            manager = lm_eval.tasks.TaskManager(include_path=own)
    for name in names:
        if name not in _OURS and name not in manager.all_tasks:
            close = " or ".join(get_close_matches(name, manager.all_tasks))
            raise OptionError(f"no task is called {name}", f"try {close}" if close else "lm-eval ls tasks lists them")
        try:
            with _silence():
                found |= manager.load([_OURS[name]() if name in _OURS else name])["tasks"]
        except Exception as error:  # of many kinds: the network, data sets, templates, packages that a task needs
            raise TextError(
                f"task {name}: cannot be loaded ({one_line(error)})",
                "the harness's data are on the Hub, which needs the network; --task-dir takes tasks with data on disk",
            ) from error
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise OptionError(f"task {name}: runs what a model writes or needs more than text", "leave it out")
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(0)
    return found


def _next_sentence() -> dict[str, Any]:
    """Return the task of the bundled sample, with its data."""
    return {**NEXT_SENTENCE, "custom_dataset": lambda **_: {"test": as_dataset(bundled.next_sentences())}}


def _race_middle() -> dict[str, Any]:
    """Return the harness's `race` with what makes it RACE-M."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    high = load_yaml(Path(lm_eval.tasks.__file__).parent / "race" / "race.yaml")
    return {**high, **RACE_MIDDLE, "process_docs": _by_article}


def _by_article(rows: Any) -> Any:
    """Put the questions of an article into one document, as the harness's data of RACE-H have them."""
    articles: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for row in rows:
        _, problems = articles.setdefault(row["example_id"], (row["article"], []))
        problems.append({key: row[key] for key in ("question", "options", "answer")})
    return rows.from_list([{"article": text, "problems": str(problems)} for text, problems in articles.values()])


_OURS = {"next_sentence": _next_sentence, "race_middle": _race_middle}
"""Tasks that are not the harness's own."""


def _measure(lm: LanguageModel, name: str, task: Any, limit: int | None, max_length: int | None) -> list[list[Any]]:
    """Return [metric, value, standard error, documents] of each metric of a task.

    Raises:
        OptionError: the task asks for what the model cannot do.
        TextError: a document does not fit the task.
    """
    import lm_eval

    model = harness_model(lm, name, max_length)
    try:
        with _silence():
            report = lm_eval.evaluate(lm=model, task_dict={"tasks": {name: task}}, limit=limit, log_samples=False)
    except TemplateError as error:
        raise TextError(f"task {name}: a document does not fit its template ({error})") from error
    found, measured = report["results"][name], []
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")  # by which filter of the answers
        if comma and not metric.endswith("_stderr"):
            title = metric if chosen == "none" else f"{metric} ({chosen})"
            spread = found[f"{metric}_stderr,{chosen}"]
            documents = report["n-samples"][name]["effective"]
            measured.append([title, float(value), None if spread == "N/A" else float(spread), documents])
    return measured


def harness_model(lm: LanguageModel, task: str, max_length: int | None = None) -> Any:
    """Return an open model as the harness takes one, equal to its own class for transformers.

    Args:
        lm: the model.
        task: for messages.
        max_length: most tokens that it is asked at once; its window when None, or when that is less.
    """
    from pi_gguf.evaluate.harness import HarnessModel

    return HarnessModel(lm, task, min(lm.window, max_length or lm.window))
