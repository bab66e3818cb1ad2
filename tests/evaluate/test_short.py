"""Short benchmarks: our model class against the harness's own for transformers, whole tasks, and what is refused."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from helpers import WINDOW, make_llama

import pi_gguf
from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, TextError
from pi_gguf.evaluate.short import RACE_MIDDLE, evaluate_short, harness_model
from pi_gguf.models.hf import HfModel
from pi_gguf.runtime.model import Model

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")

TEXT = next(iter(bundled.novels("heldout").values()))[2000:6000]
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none")
    return path


@pytest.fixture(scope="module")
def gguf(gguf_path):
    with Model(gguf_path, type_k="f32", type_v="f32", flash_attn=False) as model:
        yield model


@pytest.fixture(scope="module", params=[None, 60])
def max_length(request):
    return request.param


@pytest.fixture(scope="module", params=["gguf", "hf"])
def ours(request, llama, gguf, max_length):
    lm = gguf if request.param == "gguf" else HfModel(load_checkpoint(str(llama)), device="cpu")
    return harness_model(lm, "a", max_length)


@pytest.fixture(scope="module")
def theirs(llama, max_length):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(llama), dtype="float32", device="cpu", batch_size=1, max_length=max_length)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


def likeliest_word(model, context):
    """A word of one token that the model puts first, so that something is greedy."""
    ids = model.tokenize(context)
    for _ in range(20):
        (logits,) = model.logits_chunks(ids, 1)
        word = model.detokenize([int(logits[0].argmax())])
        if model.tokenize(context + word) == [*ids, int(logits[0].argmax())]:
            return context, word
        context += " the"
        ids = model.tokenize(context)
    raise AssertionError("no such word")


def test_log_likelihoods_are_those_of_the_harness_for_transformers(ours, theirs, gguf):
    long = " ".join(WORDS[:200])
    context, word = likeliest_word(gguf, "It was a")
    asked = requests(
        "loglikelihood",
        ("Question: is it?\nAnswer:", " yes"),
        ("Question: is it?\nAnswer:", " no"),
        ("Question: is it?\nAnswer:", " no"),
        ("Question: is it? ", "perhaps it is not"),  # its space belongs to the answer
        ("", "It was a bright night"),
        ("<s>It was a", " dark night"),  # the begin token stands there already
        (long, " and more of it"),  # cut from the left
        (long[:300], " " + long[300:400]),
        (context, word),
        (context, word + " perhaps"),  # only its beginning is the likeliest
    )
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found[-2:]] == [True, False]


def test_the_log_likelihood_of_a_text_longer_than_the_window_is_the_harnesss(ours, theirs):
    asked = requests("loglikelihood_rolling", (" ".join(WORDS[:150]),), ("short",), ("<s>" + " ".join(WORDS[:70]),))
    assert len(theirs.tok_encode(asked[0].args[0])) > 3 * WINDOW
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=2e-3)


def test_texts_are_written_and_cut_as_the_harness_does(ours, theirs):
    long, short = " ".join(WORDS[:200]), "It was a"
    plain = {"until": [], "max_gen_toks": 20}
    (whole,) = theirs.generate_until(requests("generate_until", (short, plain)), disable_tqdm=True)
    stops = [{"until": until, "max_gen_toks": 20} for until in ([whole[8:10]], [whole[12:14], whole[5:7]], whole[3:5])]
    asked = requests("generate_until", (short, plain), (long, plain), *((short, stop) for stop in stops))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert found[0] == whole and len({*found}) == 5


# Whole tasks

BOOLQ = """
task: local_boolq
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{passage}}\\nQuestion: {{question}}?\\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
metric_list: [{metric: acc}]
"""
PIQA = """
task: local_piqa
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[passage, question]}}"
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
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
TASKS = "local_boolq,local_piqa,local_text,local_writing"


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"passage": " ".join(WORDS[9 * i : 9 * i + 6]), "question": " ".join(WORDS[7 * i : 7 * i + 4]), "label": i % 2}
        for i in range(12)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("boolq", BOOLQ), ("piqa", PIQA), ("text", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


def test_whole_tasks_give_what_they_give_with_the_harnesss_own_class(gguf, theirs, task_dir, capfd):
    from lm_eval.tasks import TaskManager

    report = evaluate_short(gguf, tasks=TASKS, task_dir=str(task_dir))
    out, err = capfd.readouterr()
    ours = re.compile(r"local_\w+ \d+/\d+ requests.*\n")  # where 30 s are over just then
    assert out == ours.sub("", err) == "", "bars and logs of the harness"
    loaded = TaskManager(include_path=str(task_dir), include_defaults=False).load(TASKS.split(","))
    loaded["tasks"]["local_piqa"].set_config("num_fewshot", 0)
    expected = lm_eval.evaluate(lm=theirs, task_dict=loaded)["results"]
    assert [(row.task, row.metric) for row in report.rows] == [
        ("local_boolq", "acc"), ("local_piqa", "acc"), ("local_piqa", "acc_norm"), ("local_text", "byte_perplexity"),
        ("local_writing", "exact_match"),
    ]  # fmt: skip
    for row in report.rows:
        assert row.value == pytest.approx(expected[row.task][f"{row.metric},none"], abs=1e-4)
        error = expected[row.task][f"{row.metric}_stderr,none"]
        assert row.standard_error == (None if error == "N/A" else pytest.approx(error, abs=1e-4))
        assert (row.items, row.difference, row.model) == (12, None, gguf.name)
    assert 0 < report.rows[0].value < 1
    assert report.provenance["libraries"]["lm-eval"] == lm_eval.__version__


def test_differences_are_from_the_first_model(gguf, task_dir, tmp_path):
    other = str(make_llama(tmp_path / "other", initializer_range=0.3))
    report = evaluate_short(gguf, other, tasks="local_piqa,local_text", task_dir=str(task_dir), limit=5, device="cpu")
    assert report.models == [gguf.name, other]
    before, after = ([row for row in report.rows if row.model == name] for name in report.models)
    assert [row.difference for row in before] == [None] * 3
    assert [row.difference for row in after] == [b.value - a.value for a, b in zip(before, after, strict=True)]
    assert after[-1].difference != 0
    assert {row.items for row in report.rows} == {5}


def test_finished_tasks_are_kept_until_what_is_asked_changes(gguf, task_dir, tmp_path):
    keep = tmp_path / "kept.jsonl"
    options = {"tasks": "local_piqa", "task_dir": str(task_dir), "keep": str(keep)}
    first = evaluate_short(gguf, limit=3, **options)
    record = json.loads(keep.read_text())
    record["value"][0][1] = 42.0
    keep.write_text(json.dumps(record) + "\n")
    assert [row.value for row in evaluate_short(gguf, limit=3, **options).rows] == [42.0, first.rows[1].value]
    for changed in ({"limit": 4}, {"limit": 3, "max_length": 50}):
        assert evaluate_short(gguf, **changed, **options).rows[0].value != 42.0
    path = task_dir / "piqa.yaml"
    text = path.read_text()
    try:
        path.write_text(text.replace("Answer:", "Reply:"))
        assert evaluate_short(gguf, limit=3, **options).rows[0].value != 42.0
    finally:
        path.write_text(text)


def test_race_middle_asks_the_last_question_of_each_article(gguf, tmp_path, monkeypatch):
    rows = [
        {"example_id": name, "article": f"About {name}.", "question": f"What is {name} {i}?", "answer": answer,
         "options": [f"{name} {i} {letter}" for letter in "abcd"]}
        for name in ("m1", "m2") for i, answer in enumerate("BDA")
    ]  # fmt: skip
    data = tmp_path / "race.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(RACE_MIDDLE, "dataset_path", "json")
    monkeypatch.setitem(RACE_MIDDLE, "dataset_name", None)
    monkeypatch.setitem(RACE_MIDDLE, "dataset_kwargs", {"data_files": {"test": str(data)}})
    asked = []
    monkeypatch.setattr(gguf, "tokenize", lambda text, **kw: asked.append(text) or Model.tokenize(gguf, text, **kw))
    (row,) = evaluate_short(gguf, tasks="race_middle").rows
    assert (row.task, row.metric, row.items) == ("race_middle", "acc", 2)
    prompt = (
        "Article: About m2.\n\nQuestion: What is m2 0?\nAnswer: m2 0 b\nQuestion: What is m2 1?\nAnswer: m2 1 d\n"
        "What is m2 2?"
    )
    assert {text for text in asked if text.startswith(prompt)} == {prompt, *(f"{prompt} m2 2 {c}" for c in "abcd")}


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": " , "}, "tasks must be names"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"task_dir": "no-such-folder"}, "no .yaml files in no-such-folder"),
    ],
)
def test_options_that_cannot_work_are_refused(gguf, options, message):
    with pytest.raises(OptionError, match=message):
        evaluate_short(gguf, **options)


def test_a_server_is_refused():
    with pytest.raises(OptionError, match="gives no log-probabilities"):
        evaluate_short("http://127.0.0.1:1/v1")


def test_without_the_harness_one_is_told_how_to_install_it(gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    with pytest.raises(OptionError, match="lm-evaluation-harness is not installed") as raised:
        evaluate_short(gguf)
    assert raised.value.hint == "pip install lm-eval"


def test_an_unknown_task_gets_a_hint(gguf):
    with pytest.raises(OptionError, match=r"no task is called winogrand$") as raised:
        evaluate_short(gguf, tasks="winogrand")
    assert "winogrande" in raised.value.hint


def test_data_of_the_hub_that_cannot_be_reached_end_in_one_line(gguf):
    with pytest.raises(TextError, match=r"task piqa: cannot be loaded .*baber/piqa") as raised:
        evaluate_short(gguf, tasks="piqa")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("doc_to_text: !function evil.run", "evil.yaml: would run code .*!function"),
        ("doc_to_text: !!python/name:os.system", "evil.yaml: would run code .*python/name"),
        ("unsafe_code: true", "evil.yaml: would run code .key unsafe_code"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "evil.yaml: would run code .key hf_evaluate"),
        ("metric_list: [{metric: ./evil}]", "evil.yaml: metric ./evil is none"),
        ("doc_to_image: passage", "task local_boolq: .* needs more than text"),
        ("include: ../base", "base: would run code .*!function"),
        ("include: [nowhere]", "nowhere: no readable YAML"),
        ("a: [", "evil.yaml: no readable YAML"),
        ("doc_to_text: \"{{''.__class__.__mro__}}\"", "task local_boolq: cannot be loaded .*__class__.*unsafe"),
        ("doc_to_text: '{{\"\" if label == 0 else missing}}'", "task local_boolq: a document does not fit .*missing"),
    ],
)
def test_task_files_that_run_code_or_cannot_be_asked_are_refused(gguf, task_dir, tmp_path, text, message):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "base").write_text("doc_to_text: !function evil.run\n")
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")
    lines = (task_dir / "boolq.yaml").read_text().splitlines()
    key = text.partition(":")[0]
    (folder / "evil.yaml").write_text("\n".join([*(x for x in lines if x.partition(":")[0] != key), text]))
    with pytest.raises((OptionError, TextError), match=message):
        evaluate_short(gguf, tasks="local_boolq", task_dir=str(folder))


@pytest.mark.parametrize("answer", ["", " ".join(WORDS[:100])])
def test_an_answer_of_no_token_or_more_than_the_window_is_refused(gguf, answer):
    with pytest.raises(TextError, match="task a: must score from 1 to 64 tokens after at least one, got"):
        harness_model(gguf, "a", 1000).loglikelihood(requests("loglikelihood", ("It was", answer)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": WINDOW}, "max_gen_toks must be below 64 tokens, got 64"),
        ({"do_sample": True, "temperature": 1.0}, "only the most probable ones"),
    ],
)
def test_texts_that_cannot_be_written_are_refused(gguf, settings, message):
    with pytest.raises(OptionError, match=message):
        harness_model(gguf, "a").generate_until(requests("generate_until", ("It was", settings)))


def test_the_task_of_the_bundled_sample_asks_for_the_sentence_that_follows(tmp_path):
    model = str(make_llama(tmp_path / "model", max_position_embeddings=512))
    items = bundled.next_sentences()
    prose = " ".join(" ".join(bundled.novels("heldout").values()).split())
    for item in items[:40]:
        follows = [item["context"] + choice in prose for choice in item["choices"]]
        assert follows == [i == item["label"] for i in range(4)]
    assert {item["label"] for item in items} == {0, 1, 2, 3}
    report = evaluate_short(model, tasks="next_sentence", limit=10)
    (acc,) = [row for row in report.rows if row.metric == "acc"]
    lm, right = HfModel(load_checkpoint(model), device="cpu"), 0
    for item in items[:10]:
        ids = lm.tokenize(item["context"])
        parts = [lm.tokenize(item["context"] + choice)[len(ids) :] for choice in item["choices"]]
        scores = [float(lm.score((ids + part)[-513:], len(part))[0].sum()) for part in parts]
        right += int(np.argmax(scores)) == item["label"]
    assert (acc.items, acc.value) == (10, pytest.approx(right / 10))
