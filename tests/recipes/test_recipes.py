"""Recipes: the small one is run, the others are commands that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pi_gguf.gguf.file import read_gguf

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.name for path in RECIPES.glob("*.sh"))


@pytest.fixture
def run(tmp_path):
    """Run a recipe with the commands of this environment; torchrun starts one process, without its options."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in (
        ("pi-gguf", f'exec {sys.executable} -m pi_gguf "$@"'),
        ("torchrun", f'while [ "$1" != -m ]; do shift; done\nexec {sys.executable} "$@"'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)

    def run_recipe(name, *arguments):
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "FIRST": "localhost"}
        command = ["bash", str(RECIPES / name), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run_recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_command_with_options_that_exist(name, run):
    arguments = ["out"] if name == "tiny-cpu.sh" else ["model", "out", "texts"]
    done = run(name, *arguments, "--help")
    assert done.returncode == 0, done.stderr
    assert "pi_gguf extend" in done.stdout or "pi_gguf convert" in done.stdout
    assert run(name).returncode != 0, "without arguments"


@pytest.mark.slow
def test_the_recipe_for_a_cpu_runs(run, tmp_path):
    out = tmp_path / "tiny.gguf"
    short = (
        "--context",
        "4096",
        "--steps",
        "2",
        "--train-window",
        "64",
        "--factor-warmup",
        "0",
        "--no-certify",
        "--batch-tokens",
        "64",
    )
    done = run("tiny-cpu.sh", out, *short)
    assert done.returncode == 0, done.stderr
    metadata = read_gguf(out).metadata
    assert metadata["llama.context_length"] == 4096
    assert metadata["llama.rope.scaling.factor"] == 2


def test_the_recipes_are_listed_and_say_whether_they_were_run():
    listed = re.findall(r"^\| `([\w-]+\.sh)` .*\| (yes|no)\b", (RECIPES / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in listed) == NAMES
    for name, ran in listed:
        assert ("Not run so far." in (RECIPES / name).read_text()) == (ran == "no"), name


def test_stories_become_conversations_and_summaries(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "smollm2-32k"))
    import run as recipe

    answers = [{"response_text": " It ends. "}, {"response_text": "Another."}]
    asked = [{"question_text": text, "responses": answers} for text in ("What is the plot?", "Who is Ann?")]
    (tmp_path / "SQuALITY_v1-3_train.jsonl").write_text(json.dumps({"document": "Once.\n", "questions": asked}) + "\n")
    stories = recipe._stories(tmp_path, "train")
    first, second = recipe._conversations(stories)
    assert first["messages"] == [
        {"role": "user", "content": "Once.\n\nWhat is the plot?"},
        {"role": "assistant", "content": "It ends."},
    ]
    assert second["messages"][0]["content"].endswith("Who is Ann?")
    assert list(recipe._summaries(stories)) == [{"document": "Once.", "summary": "It ends."}]
    with pytest.raises(SystemExit, match=r"one \*dev.jsonl must be there, found 0"):
        recipe._stories(tmp_path, "dev")


def test_what_is_made_waits_for_what_it_is_made_of(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "smollm2-32k"))
    from run import Recipe

    needs = {name: Recipe.needs(Recipe, name) for name in ("base", "linear", "ntk", "yarn", "base-Q8_0.gguf")}
    assert needs == {
        "base": set(), "linear": set(), "ntk": {"linear"}, "yarn": {"linear", "ntk"}, "base-Q8_0.gguf": {"base"}
    }  # fmt: skip
    assert Recipe.needs(Recipe, "linear-Q4_K_M-imatrix.gguf") == {"linear", "linear-F16.gguf"}


def test_files_are_written_and_measured_of_the_first_method_of_a_scale(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "smollm2-32k"))
    import run as recipe

    for scale, label, trained in (("full", "PI", 3), ("cpu", "YaRN", 1)):
        scale = recipe.SCALES[scale]
        rows = recipe.all_rows(scale)
        names = [row.name for row in rows]
        assert len({*names}) == len(names) and sum(name.endswith(" trained") for name in names) == trained
        assert sum(row.model.startswith(scale.methods[0]) for row in rows) == 5, "the folder and four files"
        by_suite = {suite: [row.name for row in rows if recipe.suits(suite, row, scale)] for suite in recipe.SUITES}
        assert by_suite["perplexity"] == by_suite["passkey"] == names
        assert by_suite["kl"] == [name for name in names if name.startswith(f"{label} trained, ")]
        few = ["base, no scaling", f"{label} trained", f"{label} trained, Q8_0", f"{label} trained, Q4_K_M"]
        assert by_suite["needle"] == by_suite["ruler"] == by_suite["short"] == few


@pytest.mark.slow
def test_the_recipe_of_a_real_model_runs_goes_on_and_reports(tiny_gguf, tmp_path):
    """On the bundled model, whose window stands for SmolLM2's."""
    command = [sys.executable, RECIPES / "smollm2-32k" / "run.py", tmp_path, "--scale", "toy", "--gguf", tiny_gguf]
    rows = ["--rows", "^base, no scaling$|^PI untrained|^PI trained(, Q8_0)?$"]
    names = ["base, no scaling", "PI untrained", "PI trained", "PI trained, Q8_0"]

    def run(*suites):
        done = subprocess.run([*command, *rows, "--suites", ",".join(suites)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr, json.loads((tmp_path / "report" / "results.json").read_text())

    run("perplexity")
    kept = json.loads((tmp_path / "report" / "results.json").read_text())["perplexity"]
    for path in [*(tmp_path / "results" / "perplexity").iterdir(), *(tmp_path / "kept").iterdir()]:
        path.unlink()
    command += ["--jobs", "2"]
    run("perplexity")
    again = json.loads((tmp_path / "report" / "results.json").read_text())["perplexity"]
    assert list(again) == list(kept)
    for name, one in again.items():
        figures = [[row["perplexity"] for row in found["rows"]] for found in (one, kept[name])]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4), f"{name}: another in a process beside others"
    trained = (tmp_path / "linear" / "model.safetensors").stat().st_mtime_ns
    said, found = run("perplexity", "kl")
    assert (tmp_path / "linear" / "model.safetensors").stat().st_mtime_ns == trained and "perplexity at" not in said
    assert list(found["perplexity"]) == names and list(found["kl"]) == names[3:]
    measured = {name: found["perplexity"][name]["rows"][0]["perplexity"] for name in names}
    assert measured["PI untrained"] > 1.5 * measured["base, no scaling"]
    assert measured["PI trained"] < measured["PI untrained"], "two steps help"
    assert measured["PI trained, Q8_0"] == pytest.approx(measured["PI trained"], rel=0.05)
    assert found["kl"]["PI trained, Q8_0"]["rows"][-1]["mean"] < 0.05
    assert found["training"]["linear"]["steps"] == 2 and found["context"] == 4 * found["original"]
    other = subprocess.run([*command, *rows, "--steps", "3"], capture_output=True, text=True)
    assert (
        other.returncode == 1 and other.stderr == f"error: {tmp_path} is of a run with other tune; give another OUT\n"
    )
    for wrong, field in (("--suites", "suites must be of perplexity"), ("--rows", "rows must fit one of base")):
        refused = subprocess.run([*command, wrong, "perplexty"], capture_output=True, text=True)
        assert refused.returncode == 2 and field in refused.stderr
    table = (tmp_path / "report" / "table.md").read_text()
    assert all(f"| {name} | {measured[name]:,.2f} |" in table for name in names)
    steps = json.loads((tmp_path / "linear" / "losses.json").read_text())
    curve = found["losses"]["linear"]
    assert curve["loss"] == [round(steps[0], 4), round(sum(steps) / 2, 4)]
    assert curve["tokens"] == [256, 512], "two steps of --batch-tokens"
    plots = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"perplexity.png", "losses.png", "kl-PI-trained-Q8_0.png"} <= plots
