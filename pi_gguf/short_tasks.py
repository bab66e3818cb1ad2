"""The paper's benchmarks inside the original window, by EleutherAI's lm-evaluation-harness.

In: targets and names of the harness's tasks. Out: a report, one row a metric. The harness makes prompts and metrics, a
`LanguageModel` answers: GGUF files and Hugging Face models are asked alike. Nothing in a folder of tasks is run.

Source: arXiv 2306.15595, section 3.4.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from pi_gguf import bundled
from pi_gguf.errors import OptionError, TextError, one_line
from pi_gguf.files import open_plain, writes
from pi_gguf.hf_model import HfTokens
from pi_gguf.kept import Kept
from pi_gguf.progress import Advance, progress_bar
from pi_gguf.provenance import library_versions, package_version, provenance, sha256
from pi_gguf.results import ShortReport, TaskRow
from pi_gguf.runtime import Model
from pi_gguf.scoring import LanguageModel
from pi_gguf.targets import check_targets, identity, opened
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
def evaluate_short(
    *models: str | LanguageModel,
    tasks: str = "boolq,piqa,race_middle,race,winogrande",
    limit: int | None = None,
    max_length: int | None = None,
    task_dir: str | None = None,
    context: int | None = None,
    method: str = "linear",
    type_k: str = "f16",
    type_v: str = "f16",
    keep: str | None = None,
    seed: int = 0,
    device: str = "auto",
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
        context: extend Hugging Face models to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        type_k: K cache of GGUF files: f32, f16, q8_0 or q4_0.
        type_v: V cache of GGUF files.
        keep: file that keeps each finished task of a model, in JSON lines; the same command goes on from it.
        seed: recorded; nothing is random here.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval short my-llama my-llama-32k-hf my-llama-32k-Q4_K_M.gguf --limit 200
    """
    options: dict[str, Any] = {
        "context": context, "method": method, "type_k": type_k, "type_v": type_v, "device": device
    }  # fmt: skip
    check_targets(models, servers=False, **options)
    if limit is not None and limit < 1:
        raise OptionError(f"limit must be at least 1, got {limit}")
    if max_length is not None and max_length < 2:
        raise OptionError(f"max-length must be at least 2 tokens, got {max_length}")
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    if not wanted:
        raise OptionError(f"tasks must be names separated by commas, got {tasks!r}", "leave it out for the paper's")
    _import_harness()
    if task_dir is not None:
        _check_task_files(task_dir)
    identities = [identity(model, **options) for model in models]
    loaded = _load_tasks(wanted, task_dir, seed)
    asked = {
        name: sha256([str(task.dump_config()), *map(str, itertools.islice(task.eval_docs, limit))])
        for name, task in loaded.items()
    }
    versions = library_versions() | {"lm-eval": package_version("lm-eval")}
    kept = Kept(keep)
    names: list[str] = []
    rows: list[TaskRow] = []
    first: dict[tuple[str, str], float] = {}
    for model, target in zip(models, identities, strict=True):
        settings = {**target, "max_length": max_length, "versions": versions}
        with opened(model, n_ctx=None, at_most=max_length, **options) as lm:
            names.append(lm.name)
            for name, task in loaded.items():
                item = {**settings, "task": name, "asked": asked[name]}
                if kept.get(item) is None:
                    kept.put(item, _measure(lm, name, task, limit, max_length))
                for metric, value, error, items in kept.get(item):
                    before = first.setdefault((name, metric), value)
                    difference = value - before if len(names) > 1 else None
                    rows.append(TaskRow(name, metric, value, error, items, difference, lm.name))
    record = provenance(
        seed=seed, device=device, type_k=type_k, type_v=type_v, text_sha256=sha256(list(asked.values()))
    )
    return ShortReport(names, rows, {**record, "libraries": versions})


def _import_harness() -> None:
    """Import lm-evaluation-harness, and keep the templates of task files to what is harmless.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import lm_eval.utils
    except ModuleNotFoundError as error:
        raise OptionError("lm-evaluation-harness is not installed", "pip install lm-eval") from error
    from jinja2.sandbox import SandboxedEnvironment

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
    import yaml  # type: ignore[import-untyped]

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


def _load_tasks(names: Sequence[str], task_dir: str | None, seed: int) -> dict[str, Any]:
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
        task.set_fewshot_seed(seed)
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
    from jinja2 import TemplateError

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


# The model


def harness_model(lm: LanguageModel, task: str, max_length: int | None = None) -> Any:
    """Return an open model as the harness takes one, equal to its own class for transformers.

    Args:
        lm: the model.
        task: for messages.
        max_length: most tokens that it is asked at once; its window when None, or when that is less.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    bos, prefix, terminal = lm.bos, _prefix_token(lm), sys.stderr
    window = min(lm.window, max_length or lm.window)

    @contextmanager
    def bar(total: int) -> Iterator[Advance]:
        with redirect_stderr(terminal), progress_bar(task, total, "requests") as advance:
            yield advance

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        eot_token_id = prefix_token_id = prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = lm.tokenize(string, add_special=add_special_tokens is not False)
            written = add_special_tokens is None and bos and ids[:2] == bos * 2  # in the text, and added to it
            return ids[1:] if written else ids

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            """Answer (anything, context, continuation) in an order in which neighbors share their beginnings."""
            found = [(0.0, False)] * len(requests)
            with bar(len(requests)) as advance:
                for i in sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2]):
                    _, before, scored = requests[i]
                    if not (before and 0 < len(scored) <= window):
                        raise TextError(
                            f"task {task}: must score from 1 to {window} tokens after at least one, got "
                            f"{len(scored)} after {len(before)}"
                        )
                    logprobs, chosen = lm.score((before + scored)[-(window + 1) :], len(scored))
                    found[i] = float(logprobs.sum()), bool(chosen.all())
                    advance(1)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            windows = [
                [
                    (None, *make_disjoint_window(part))
                    for part in get_rolling_token_windows(self.tok_encode(request.args[0]), prefix, window, 1)
                ]
                for request in requests
            ]
            scores = iter(self._loglikelihood_tokens([*itertools.chain(*windows)]))
            return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            found = [""] * len(requests)
            with bar(len(requests)) as advance:
                for i in sorted(range(len(requests)), key=lambda i: prompts[i]):
                    settings = normalize_gen_kwargs(requests[i].args[1])
                    limit = settings["max_gen_toks"]
                    if settings["do_sample"]:
                        raise OptionError(f"task {task}: draws its tokens; only the most probable ones are taken here")
                    if limit >= window:
                        raise OptionError(f"task {task}: max_gen_toks must be below {window} tokens, got {limit}")
                    stops = [stop for stop in settings["until"] if stop]
                    found[i] = lm.generate(prompts[i][limit - window :], limit, stops)
                    for stop in stops:
                        found[i] = found[i].split(stop)[0]
                    advance(1)
            return found

    return HarnessModel()


def _prefix_token(lm: LanguageModel) -> int:
    """Return the token that a text with nothing before it is read after.

    It is the tokenizer's begin token whether or not the model adds it, the end token where there is none.
    """
    if isinstance(lm, Model):
        known = [lm.info.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")]
    elif isinstance(lm, HfTokens):
        known = [lm._tokenizer.bos_token_id, lm._tokenizer.eos_token_id]
    else:
        known = [*lm.bos]
    token = next((token for token in known if token is not None), None)
    if token is None:
        raise OptionError(f"{lm.name}: the tokenizer has neither begin nor end token")
    return int(token)
