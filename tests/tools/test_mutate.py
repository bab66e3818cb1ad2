"""A thousand damaged inputs, and how the commands on them end: well, or with two lines and an exit code."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
from mutants import Parts, judge, make_kinds, make_mutant, run_mutants

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and the memory of processes as Linux tells it"),
]

COUNT = 1000


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return make_kinds(tmp_path_factory.mktemp("kinds"))


def test_a_thousand_mutants_of_every_kind_end_well(kinds, tmp_path, monkeypatch):
    for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GGML_NO_BACKTRACE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert len(kinds) == 16
    seeds = [(list(kinds)[i % len(kinds)], i // len(kinds)) for i in range(COUNT)]
    ends, wrong, saved = Counter(), [], 0
    for outcome, by_trial in run_mutants(kinds, tmp_path / "mutant", seeds):
        ends[outcome.ended] += 1
        saved += by_trial
        wrong += [outcome] if not outcome.well else []
    assert not wrong, "\n".join(map(str, wrong))
    assert sum(ends.values()) == COUNT
    assert ends["refused"] > COUNT // 5  # else nothing was damaged
    assert ends["done"] > COUNT // 5  # else nothing was left whole
    assert saved <= COUNT // 100  # what no check of the header foresaw


def test_a_mutant_is_the_same_for_the_same_seed(kinds, tmp_path):
    for name, kind in kinds.items():
        made = []
        for _ in range(2):
            command = make_mutant(kind, name, 7, tmp_path / "mutant")
            damaged = tmp_path / "mutant" / kind.source.name
            damaged = damaged / kind.member if kind.member else damaged
            made.append((command, damaged.read_bytes()))
        assert made[0] == made[1], name


def test_a_file_taken_apart_and_put_together_is_the_same(kinds):
    for name, kind in kinds.items():
        if kind.source.suffix == ".gguf":
            assert Parts.read(kind.source).to_bytes() == kind.source.read_bytes(), name


@pytest.mark.parametrize(
    ("code", "said", "ended"),
    [
        (0, "", "done"),
        (6, "note: x\nerror: a\nhint: b\n", "refused"),
        (6, "error: a\n", "no hint"),
        (6, "hint: b\nerror: a\n", "no hint"),
        (6, "error: a\nerror: a\nhint: b\n", "no hint"),
        (1, "error: a\nhint: b\n", "code"),
        (6, "Traceback (most recent call last):\nerror: a\nhint: b\n", "traceback"),
    ],
)
def test_only_two_lines_and_a_code_are_a_clean_refusal(code, said, ended):
    assert judge(code, said) == ended


def test_a_process_that_dies_or_hangs_is_told_from_one_that_refuses(kinds, tmp_path, monkeypatch):
    """Its commands are replaced by a death and a sleep, so that the runner itself is seen to notice."""
    import mutants

    monkeypatch.setattr(mutants, "SECONDS", 1)
    monkeypatch.setattr(mutants, "run_here", lambda command, log: os.abort())
    worker = mutants.Worker(kinds, tmp_path / "mutant")
    died = worker.run("imatrix dat", 0)
    assert (died.ended, died.well) == ("died", False)
    monkeypatch.setattr(mutants, "run_here", lambda command, log: __import__("time").sleep(60))
    worker = mutants.Worker(kinds, tmp_path / "mutant")
    assert worker.run("imatrix dat", 0).ended == "hangs"
    worker.close()
