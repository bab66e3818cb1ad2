"""RULER-style tasks: that the answers follow from the prompts, and that the scores say how many are right."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
from readers import NEEDLE, Reader, look_up, watched

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.ruler import TASKS, draw_item, effective_length, evaluate_ruler, mean_scores
from pi_gguf.measure.haystack import fit, score
from pi_gguf.measure.results import RulerRow
from pi_gguf.models.hf import HfModel
from pi_gguf.runtime.model import Model

WINDOW = 4096


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=WINDOW, steps=0)
    return path


def assignments(prompt):
    return re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", prompt, re.MULTILINE)


def listed(prompt):
    return re.findall(r"\d+\. ([a-z]+)", prompt)


def message(prompt):
    return prompt.split("\n\n")[1].split()


def solve(prompt):
    """Answer a prompt of any task by parsing it."""
    question = prompt.split("\n\n")[-1]
    if "secret number" in question:
        return look_up(prompt)
    if "variables" in question:
        value, sources = re.search(r"the value (\d+)", question)[1], dict(assignments(prompt))
        found = []
        for name in sources:
            end = name
            while end in sources:
                end = sources[end]
            found += [name] if end == value else []
        return " " + ", ".join(found)
    words = listed(prompt) if "this list" in question else message(prompt)
    many = int(re.search(r"The (\d+) words", question)[1])
    return " " + ", ".join(word for word, _ in Counter(words).most_common(many))


def prompts(task, window=WINDOW, items=3):
    lm = Reader(solve)
    report = evaluate_ruler(lm, tasks=task, windows=(window,), items=items)
    assert [(row.task, row.score, row.items) for row in report.rows] == [(task, 100, items)]
    return lm.asked


def test_who_solves_every_prompt_has_everything_and_who_is_silent_nothing():
    report = evaluate_ruler(Reader(solve), windows=(WINDOW, 6000), items=2)
    assert [(row.task, row.window, row.score, row.items) for row in report.rows] == [
        (task, window, 100, 2) for window in (WINDOW, 6000) for task in TASKS
    ]
    assert list(TASKS) == ["single", "multikey", "variables", "common", "frequent"]
    assert report.effective_length == {"reader": 6000}
    report = evaluate_ruler(Reader(lambda prompt: ""), windows=(WINDOW,), items=2)
    assert [row.score for row in report.rows] == [0] * 5 and report.effective_length == {"reader": 0}
    lm = Reader(lambda prompt: look_up(prompt) if "secret number" in prompt else solve(prompt).split(",")[0])
    report = evaluate_ruler(lm, windows=(WINDOW,), items=2, threshold=52)
    assert [row.score for row in report.rows] == pytest.approx([100, 100, 20, 10, 100 / 3])
    assert report.effective_length == {"reader": WINDOW}, "the mean is 52.67"
    lm = Reader(lambda prompt: solve(prompt) if len(lm.asked) % 4 == 0 else "")
    assert evaluate_ruler(lm, windows=(600,), tasks="single", items=4).rows[0].score == 25, "the mean over the items"


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_the_window_and_differ(task):
    lm = Reader(solve)
    for window in (WINDOW, 5001):
        item, built = draw_item(task, window, 0, 0), []
        ids, room = fit(
            lm, replace(item, build=lambda n, item=item, built=built: built.append(n) or item.build(n)), window
        )
        assert ids == lm.tokenize(item.build(built[-1])) and len(ids) + room <= window
        assert len(lm.tokenize(item.build(built[-1] + 1))) + room > window, "a unit more does not fit"
        assert room > 1.5 * len(lm.tokenize(", ".join(item.expected)))
    assert draw_item(task, 99, 0, 0).build(50) == draw_item(task, 99, 0, 0).build(50)
    drawn = {draw_item(task, *other).build(50) for other in ((99, 0, 0), (98, 0, 0), (99, 1, 0), (99, 0, 1))}
    assert len(drawn) == 4, "window, number and seed each draw another item"


def test_needles_lie_among_needles_of_the_same_form():
    for task, count in (("single", 1), ("multikey", 4)):
        places = []
        for prompt, _ in prompts(task, 1000, 12):
            needles = NEEDLE.findall(prompt)
            assert len(needles) == count == len({thing for thing, _ in needles}) == len({n for _, n in needles})
            places.append(prompt.index(look_up(prompt).split(".")[0]) / len(prompt))
        assert min(places) < 0.25 and max(places) > 0.75, "anywhere"


def test_a_chain_of_variables_is_told_in_order():
    for prompt, _ in prompts("variables"):
        pairs = assignments(prompt)
        assert len(pairs) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name, _ in pairs)
        assert re.fullmatch(r"\d{5}", pairs[0][1]) and prompt.count("VAR ") == 5 + 4
        assert [source for _, source in pairs[1:]] == [name for name, _ in pairs[:-1]]
        assert f"The 5 variables that have the value {pairs[0][1]}" in prompt
        assert prompt.count("The grass is green.") > 0 and prompt.index(pairs[4][0]) - prompt.index(pairs[0][0]) > 500


def test_common_words_are_listed_thirty_times_and_others_three_times():
    for prompt, _ in prompts("common"):
        counts = Counter(Counter(listed(prompt)).values())
        assert counts[30] == 10 and set(counts) == {30, 3} and counts[3] >= 10
        assert [int(n) for n in re.findall(r"(\d+)\. ", prompt)] == list(range(1, 300 + 3 * counts[3] + 1))
        assert len(set(listed(prompt)[:100])) > 20, "shuffled"


def test_frequent_words_follow_zipfs_law():
    for prompt, _ in prompts("frequent"):
        counts = [count for _, count in Counter(message(prompt)).most_common()]
        first = counts[0]
        assert counts == [first // rank**2 for rank in range(1, math.isqrt(first) + 1)] and first > 100
        assert counts[2] > counts[3] and len(set(message(prompt)[:20])) > 2
        assert all(re.fullmatch("[a-z]{6}", word) for word in message(prompt))


def test_a_score_is_the_share_of_the_words_that_are_whole_in_the_answer():
    for answer, expected, share in (
        (" river, Garden", ["garden", "river"], 1),
        ("1. RIVER\n2. house", ["garden", "river"], 0.5),
        ("rivers and gardens", ["garden", "river"], 0),
        ("**1234567**", ["1234567"], 1),
        ("12345678 and 91234567", ["1234567"], 0),
        ("", ["a", "b", "c"], 0),
        ("b b b", ["a", "b", "c"], 1 / 3),
    ):
        assert score(answer, expected) == pytest.approx(share), answer


def test_the_effective_length_is_the_longest_window_with_the_mean():
    rows = [RulerRow("a", 10, 100, 1), RulerRow("b", 10, 71.2, 1), RulerRow("a", 20, 90, 1), RulerRow("b", 20, 80, 1)]
    means = mean_scores(rows)
    assert means == pytest.approx({10: 85.6, 20: 85})
    assert [effective_length(means, threshold) for threshold in (85, 85.1, 90)] == [20, 10, 0]
    assert effective_length({10: 50, 20: 90, 40: 85.6, 80: 85.5}, 85.6) == 40


def test_a_finished_task_is_not_asked_again(tmp_path):
    keep = tmp_path / "kept.jsonl"

    def asked(**options):
        lm = Reader(solve)
        options = {"windows": (600, 700), "tasks": "single, frequent", "items": 2, "keep": str(keep), **options}
        report = evaluate_ruler(lm, **options)
        return len(lm.asked), report.rows

    first = asked()
    assert first[0] == 8 and len(keep.read_text().splitlines()) == 4
    assert asked() == (0, first[1]) == asked(threshold=10)
    keep.write_text("".join(keep.read_text().splitlines(keepends=True)[:3]))
    assert asked() == (2, first[1])
    assert asked(tasks="single,variables,frequent")[0] == 4
    assert asked(items=1)[0] == 4 and asked(seed=1)[0] == 8


def test_both_backends_answer_the_same(llama, gguf_path):
    checkpoint = load_checkpoint(str(llama))
    hf = watched(HfModel, checkpoint.extended(WINDOW))
    with watched(Model, gguf_path, n_ctx=WINDOW, type_k="f32", type_v="f32", flash_attn=False) as gguf:
        rows = [
            evaluate_ruler(lm, windows=(window,), tasks=tasks, items=1).rows
            for lm in (hf, gguf)
            for window, tasks in ((800, "single,multikey,variables,frequent"), (3500, "common"))
        ]
        assert hf.answers == gguf.answers and len(set(gguf.answers)) > 1 and all(gguf.answers)
    rows = [[(row.task, row.window, row.score) for row in [*a, *b]] for a, b in (rows[:2], rows[2:])]
    assert rows[0] == rows[1] and len(rows[0]) == 5 and {score for _, _, score in rows[0]} == {0}, "random weights"


def test_the_command_prints_and_draws(cli, llama, gguf_path, tmp_path):
    options = ("--windows", "512,1024", "--tasks", "single,frequent", "--items", "1")
    code, out, err = cli("eval", "ruler", gguf_path, *options, "--plot", tmp_path / "ruler.png")
    assert code == 0 and f"wrote {tmp_path / 'ruler.png'}" in err
    assert (tmp_path / "ruler.png").read_bytes()[:4] == b"\x89PNG"
    assert "frequent" in out and "mean" in out and "effective length: 0" in out
    out = cli("eval", "ruler", gguf_path, llama, *options)[1]
    assert out.count("0.0") == 4 and "effective length" in out and str(llama) in out
    report = json.loads(cli("eval", "ruler", gguf_path, *options, "--json")[1])
    assert len(report["rows"]) == 4 and report["threshold"] == 85.6 and "seed" in report["provenance"]


def test_what_cannot_be_asked_is_refused():
    lm = Reader(solve)
    for options, says in (
        ({"tasks": "single,many"}, "tasks must be of single, multikey, variables, common, frequent, got single,many"),
        ({"tasks": ""}, "tasks must be of"),
        ({"items": 0}, "items must be at least 1, got 0"),
        ({"threshold": math.nan}, "threshold must be from 0 to 100 percent, got nan"),
        ({"windows": ()}, "windows must be token counts above 1"),
    ):
        with pytest.raises(OptionError, match=says):
            evaluate_ruler(lm, **options)
    for task in TASKS:
        with pytest.raises(OptionError, match=r"windows must be at least about \d+ tokens for .*, got 50") as error:
            evaluate_ruler(lm, tasks=task, windows=(8192, 50), items=1)
        least = int(re.search(r"about (\d+)", str(error.value))[1])
        assert evaluate_ruler(lm, tasks=task, windows=(int(1.2 * least),), items=1).rows[0].score == 100
    assert len(lm.asked) == len(TASKS), "the rest was said before anything was asked"
