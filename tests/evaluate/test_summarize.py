"""Summaries: what is asked, what is cut, and the measures against rouge-score."""

from __future__ import annotations

import json
import shutil

import pytest
from rouge_score.rouge_scorer import RougeScorer

import pi_gguf
from pi_gguf import bundled
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError, TextError
from pi_gguf.evaluate.summarize import CUE, HEAD, TASK, prompt, rouge
from pi_gguf.models.hf import HfModel
from pi_gguf.runtime.model import Model
from pi_gguf.texts import read_pairs

WINDOW = 512


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=WINDOW, steps=0)
    return path


@pytest.fixture
def data(tmp_path):
    rows = [{"document": "The cat sat. " * 100, "summary": "A cat sat."}, {"report": "It rained.", "summary": "Rain."}]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def test_rouge_is_that_of_rouge_score():
    written, expected = ["The cats were sitting on a mat", "rain"], ["A cat sat on the mat", "rain fell"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for i, name in enumerate(("rouge1", "rouge2", "rougeL")):
        scores = [scorer.score(e, w)[name].fmeasure for e, w in zip(expected, written, strict=True)]
        assert rouge(written, expected)[i] == pytest.approx(100 * sum(scores) / 2)
    assert rouge(["rain fell"], ["rain fell"]) == [100, 100, 100]
    assert rouge(["rain"], ["rain fell here today"])[0] == pytest.approx(40), "one of 1, one of 4 words"


def test_both_backends_write_the_same_summaries(llama, gguf_path, data):
    options = {"data": str(data), "max_tokens": 12}
    report = pi_gguf.evaluate_summaries(str(gguf_path), **options)
    other = pi_gguf.evaluate_summaries(str(llama), context=WINDOW, **options)
    assert report.summaries[str(gguf_path)] == other.summaries[str(llama)] != ["", ""]
    (row,) = report.rows
    assert row.documents == 2 and 0 < row.tokens < 50
    assert [row.rouge1, row.rouge2, row.rougel] == rouge(report.summaries[str(gguf_path)], ["A cat sat.", "Rain."])


def test_a_document_is_cut_to_what_the_window_leaves_and_the_cue_comes_last(llama, data):
    checkpoint = load_checkpoint(str(llama))
    asked = []

    class Watched(HfModel):
        def generate(self, ids, max_tokens):
            asked.append(list(ids))
            return super().generate(ids, max_tokens)

    lm = Watched(checkpoint.extended(WINDOW))
    pi_gguf.evaluate_summaries(lm, data=str(data), max_tokens=3, documents=1)
    pi_gguf.evaluate_summaries(lm, data=str(data), max_tokens=3, documents=1, document_tokens=50)
    cue = lm.tokenize(CUE, add_special=False)
    head, document = lm.tokenize(HEAD), lm.tokenize("The cat sat. " * 100, add_special=False)
    assert asked == [head + document[: WINDOW - 3 - len(head + cue)] + cue, head + document[:50] + cue]


def test_a_file_is_opened_for_what_is_read_and_written(gguf_path, data, monkeypatch):
    sizes, generate = [], Model.generate

    def watched(self, ids, max_tokens):
        sizes.append((self.n_ctx, len(ids)))
        return generate(self, ids, max_tokens)

    monkeypatch.setattr(Model, "generate", watched)
    pi_gguf.evaluate_summaries(str(gguf_path), data=str(data), max_tokens=3, document_tokens=50, documents=1)
    ((n_ctx, read),) = sizes
    assert read > 50 + 3 and read + 3 <= n_ctx < 2 * read < WINDOW


def test_a_finished_summary_is_kept(gguf_path, data, tmp_path, monkeypatch):
    options = {"data": str(data), "max_tokens": 5, "keep": str(tmp_path / "kept.jsonl")}
    first = pi_gguf.evaluate_summaries(str(gguf_path), **options)
    monkeypatch.setattr("pi_gguf.evaluate.summarize.summarize", None)  # nothing is written again
    assert pi_gguf.evaluate_summaries(str(gguf_path), **options).rows == first.rows
    with pytest.raises(TypeError):
        pi_gguf.evaluate_summaries(str(gguf_path), **{**options, "max_tokens": 6})


def test_the_sample_has_passages_with_their_first_sentences():
    pairs = bundled.passages_with_leads()
    assert len(pairs) == 4 * len(bundled.novels("heldout"))
    whole = "".join(bundled.novels("heldout").values())
    for document, lead in pairs:
        assert lead in whole and len(lead) > 150 and lead not in document and len(document) > 5000


def test_what_cannot_be_summarized_is_refused(cli, gguf_path, tmp_path):
    code, _, err = cli("eval", "summarize", gguf_path)
    assert code == 2 and f"a window of {WINDOW} tokens leaves no room for a document beside 1000" in err
    with pytest.raises(OptionError, match="documents must be at least 1, got 0"):
        pi_gguf.evaluate_summaries(str(gguf_path), documents=0)
    path = tmp_path / "bad.jsonl"
    for text, says in (
        ('{"document": "a"}', "bad.jsonl:1: must have texts in fields document and summary, its fields are: document"),
        ('{"document": "a", "summary": " "}', "bad.jsonl:1: must have texts"),
        ("", "no rows"),
    ):
        path.write_text(text)
        with pytest.raises(TextError, match=says):
            read_pairs(str(path))


def give_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)


@pytest.fixture(scope="module")
def chatty(llama, tmp_path_factory):
    """A folder with a chat template, and a file of it."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(llama, folder)
    give_template(
        folder,
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}",
    )
    path = folder.with_suffix(".gguf")
    pi_gguf.convert(str(folder), path, quant="F32", check="none", context=WINDOW, steps=0)
    return folder, path


def test_a_model_with_a_chat_template_is_told_in_a_chat(chatty, data, tmp_path):
    folder, path = map(str, chatty)
    options = {"data": str(data), "max_tokens": 12, "keep": str(tmp_path / "kept.jsonl")}  # each form its own
    written = {}
    for form in (None, "chat", "plain"):
        of_file = pi_gguf.evaluate_summaries(path, form=form, **options).summaries[path]
        of_folder = pi_gguf.evaluate_summaries(folder, context=WINDOW, form=form, **options).summaries[folder]
        assert of_file == of_folder
        written[form] = of_file
    assert written[None] == written["chat"] != written["plain"]
    with Model(path) as model:
        before, behind = prompt(model, None)
        texts = [model.tokenize(text, add_special=False) for text in (f"<s><user>{HEAD}", f"{TASK}\n<answer>")]
        assert [before, behind] == texts and before[0] == model.bos[0]
        assert prompt(model, "plain") == (model.tokenize(HEAD), model.tokenize(CUE, add_special=False))


def test_a_chat_is_refused_where_no_template_shows_the_document(chatty, gguf_path, data, tmp_path, cli):
    code, _, err = cli("eval", "summarize", gguf_path, "--data", data, "--max-tokens", 5, "--form", "chat")
    assert code == 2 and "no chat template that shows a document" in err
    code, _, err = cli("eval", "summarize", gguf_path, "--data", data, "--form", "question")
    assert code == 2 and "form must be one of chat, plain, got question" in err
    shutil.copytree(chatty[0], tmp_path / "other")
    for template in ("{{ messages[0].content }}{{ messages[0].content }}", "{{ messages[0].content | upper }}:"):
        give_template(tmp_path / "other", template)
        file = tmp_path / "other.gguf"
        pi_gguf.convert(str(tmp_path / "other"), file, quant="F32", check="none", steps=0, overwrite=True)
        for lm in (HfModel(load_checkpoint(str(tmp_path / "other"))), Model(str(file))):
            assert prompt(lm, None)[0] == lm.tokenize(HEAD), "the paper's prompt, then"
            with pytest.raises(OptionError, match="no chat template that shows"):
                prompt(lm, "chat")
            lm.close()


def test_a_template_that_refuses_leads_to_the_plain_form(chatty, data, tmp_path, cli):
    folder = tmp_path / "other"
    shutil.copytree(chatty[0], folder)
    give_template(folder, "{{ raise_exception('no users here') }}")
    pi_gguf.convert(str(folder), tmp_path / "other.gguf", quant="F32", check="none", context=WINDOW, steps=0)
    for model, code in ((tmp_path / "other.gguf", 6), (folder, 3)):
        asked = ["eval", "summarize", model, "--data", data, "--max-tokens", 5, "--documents", 1]
        failed, _, err = cli(*asked, *(["--context", WINDOW] if model == folder else []))
        assert failed == code and "no users here" in err and "give --form plain" in err
    assert cli(*asked, "--context", WINDOW, "--form", "plain")[0] == 0
