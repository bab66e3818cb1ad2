"""Programs of others against the server: lm-evaluation-harness, schemathesis, and our own evaluations by URL."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import Serving

import pi_gguf
from pi_gguf import bundled
from pi_gguf.bundled import TINY, TINY_DIR

pytest.importorskip("starlette", reason="needs pi-gguf[serve]")

WINDOW = 1024
WORDS = next(iter(bundled.novels("heldout").values()))[2000:6000].split()


@pytest.fixture(scope="module")
def served(tiny_gguf, tmp_path_factory) -> Iterator[Serving]:
    with Serving(tiny_gguf, "--n-ctx", WINDOW, cache=tmp_path_factory.mktemp("cache")) as server:
        yield server


def test_a_server_finds_the_passkeys_that_its_file_finds(served, tiny_gguf):
    options = {"windows": (300, 600), "distances": 2, "keys": 2, "seed": 3}
    remote = pi_gguf.evaluate_passkey(f"{served.url}/v1", tokenizer=TINY, **options)
    local = pi_gguf.evaluate_passkey(str(tiny_gguf), **options)
    assert [(c.distance, c.found) for c in remote.cells] == [(c.distance, c.found) for c in local.cells]
    assert len(remote.cells) == 4


# lm-evaluation-harness

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{passage}}\\nQuestion: {{question}}?\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[other, question]}}"
num_fewshot: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: byte_perplexity}]
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{passage}}"
doc_to_target: "{{other}}"
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
TASKS = ["local_choice", "local_text", "local_writing"]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory, tiny_gguf) -> Path:
    """Tasks of a dozen items; half of the answers to be written are the model's own; after one text comes the end."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW) as model:
        for i in range(12):
            passage, question = " ".join(WORDS[9 * i : 9 * i + 30]), " ".join(WORDS[7 * i : 7 * i + 4])
            written = "".join(model.complete(passage, max_tokens=12, stop=["."]))
            other = written if i % 2 else " ".join(WORDS[5 * i : 5 * i + 3])
            rows.append({"passage": passage, "question": question, "other": other, "label": i % 2})
        ending = next(part for i in range(200, 2000) if ends_after(model, part := " ".join(WORDS)[:i]))
    texts = [*rows[:5], {**rows[5], "passage": ending}]
    for name, task, items in (("choice", CHOICE, rows), ("text", ROLLING, texts), ("writing", WRITING, rows)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in items))
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    return folder


def ends_after(model, text):
    """Tell whether the end token is the most probable one behind a text."""
    (row,) = np.concatenate(list(model.logits_chunks(model.tokenize(text), 1)))
    return model.is_end(int(row.argmax()))


def test_the_harness_measures_through_the_server_what_it_measures_of_the_file(served, tiny_gguf, task_dir):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval.tasks import TaskManager

    done = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": served.name, "base_url": f"{served.url}/v1/completions", "tokenizer": str(TINY_DIR),
            "tokenizer_backend": "huggingface", "add_bos_token": True, "max_length": WINDOW, "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW) as model:
        report = pi_gguf.evaluate_short(model, tasks=",".join(TASKS), task_dir=str(task_dir))
    expected = {(row.task, row.metric): row.value for row in report.rows}
    found = {(task, metric): done["results"][task][f"{metric},none"] for task, metric in expected}
    assert found == pytest.approx(expected, abs=1e-3) and len(found) == 4
    assert 0.4 < found["local_writing", "exact_match"] < 1


# schemathesis


@pytest.mark.slow
def test_nothing_that_the_description_allows_or_not_ends_in_a_fault(served, tmp_path):
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists() and not shutil.which("schemathesis"):
        pytest.skip("needs schemathesis")
    prompt = {"model": served.name, "prompt": "It was a", "max_tokens": 8, "temperature": 0}
    before = served.json("POST", "/v1/completions", prompt)["choices"]
    done = subprocess.run(
        [
            program, "run", f"{served.url}/openapi.json", "--checks", "not_a_server_error", "--max-time", "45",
            "--request-timeout", "30", "--seed", "1", "--continue-on-failure", "--suppress-health-check", "all",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + served.said()[-2000:]
    described = json.loads(served.ask("GET", "/openapi.json")[2])["paths"]
    assert len(described) >= 12
    assert served.json("POST", "/v1/completions", prompt)["choices"] == before
    assert "Traceback" not in served.said()
