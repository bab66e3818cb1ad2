"""Evaluation: the windows, the figures against plain definitions, and the same figures from both backends."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WINDOW, make_llama

import pi_gguf
from pi_gguf import bundled
from pi_gguf.bundled.passkey import EVALUATION_FILLER, INTRODUCTION, draw_key, is_evaluation_key
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import OptionError
from pi_gguf.measure.language_model import common_prefix
from pi_gguf.measure.passkey import PasskeyPrompts, k_max
from pi_gguf.measure.perplexity import sampled_windows, sliding_windows
from pi_gguf.measure.plots import plot_passkeys
from pi_gguf.measure.results import PasskeyCell, PasskeyReport
from pi_gguf.models.hf import HfModel
from pi_gguf.models.options import ServerOptions, TargetOptions
from pi_gguf.models.targets import choose_windows
from pi_gguf.runtime.model import Model


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), path, quant="F32", check="none", context=1024, steps=0)
    return path


@pytest.fixture(scope="module")
def text_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(next(iter(bundled.novels("heldout").values()))[2000:4500])
    return path


@pytest.mark.parametrize("bos", [[], [7]])
def test_sliding_windows_score_every_token_once_with_full_windows(bos):
    ids = list(range(100, 200))
    jobs = sliding_windows(ids, 40, 16, bos)
    scored = [t for window, last in jobs for t in window[len(window) - last :]]
    assert scored == ids[1:]
    assert all(len(window) == 40 for window, _ in jobs)
    assert [last for _, last in jobs] == [39, 16, 16, 16, 12]
    assert all(window[: len(bos)] == bos for window, _ in jobs[1:])


def test_sampled_windows_score_the_same_tokens_at_every_window():
    ids = list(range(1000))
    short, long = (sampled_windows(ids, window, 300, 20, 3, [7]) for window in (50, 300))
    assert [w[-20:] for w, _ in short] == [w[-20:] for w, _ in long]
    assert [w[-1] for w, _ in short] == [299, 649, 999]
    assert {len(w) for w, _ in short} == {50} and {len(w) for w, _ in long} == {300}


def test_perplexity_is_the_exponential_of_the_mean_loss(llama, text_path):
    report = pi_gguf.evaluate_perplexity(str(llama), text=[str(text_path)], windows=[48], stride=16, max_tokens=48)
    checkpoint = load_checkpoint(str(llama))
    ids = torch.tensor([checkpoint.load_tokenizer()(text_path.read_text())["input_ids"][:48]])
    with torch.inference_mode():
        loss = checkpoint.load_model(dtype=torch.float32)(ids, labels=ids).loss
    assert report.rows[0].tokens == 47
    assert report.rows[0].perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_both_backends_measure_the_same(llama, gguf_path, text_path):
    options = {"text": [str(text_path)], "windows": [64, 256], "stride": 32, "max_tokens": 300}
    ours = pi_gguf.evaluate_perplexity(str(gguf_path), **options)
    theirs = pi_gguf.evaluate_perplexity(str(llama), context=1024, **options)
    plain = pi_gguf.evaluate_perplexity(str(llama), **options)
    for a, b, c in zip(ours.rows, theirs.rows, plain.rows, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-4)
        assert a.tokens == b.tokens == 299
        assert a.standard_error == pytest.approx(b.standard_error, rel=1e-3)
        assert a.perplexity != pytest.approx(c.perplexity, rel=1e-3), "the scaling made no difference"


@pytest.fixture(scope="module")
def two_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, novel in enumerate(list(bundled.novels("heldout").values())[:2]):
        (folder / f"{i}.txt").write_text(novel[3000:4000])
    return folder


def losses_in_torch(llama, ids, window, stride):
    """Compute the paper's protocol plainly: windows that end every `stride` tokens, each scoring what is new in it."""
    model = load_checkpoint(str(llama)).load_model(dtype=torch.float32)
    losses, before = [], 1
    for end in range(window, len(ids) + stride, stride):
        end = min(end, len(ids))
        part = torch.tensor([ids[:1] + ids[end - window + 1 : end]] if end > window else [ids[:window]])
        with torch.inference_mode():
            logits = model(part).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none")[before - end :])
        before = end
        if end == len(ids):
            return torch.cat(losses).numpy()


def test_perplexity_is_that_of_the_papers_protocol_in_torch(llama, two_texts):
    report = pi_gguf.evaluate_perplexity(str(llama), text=[str(two_texts)], windows=[48, 64], stride=16)
    tokenizer = load_checkpoint(str(llama)).load_tokenizer()
    documents = [tokenizer(path.read_text())["input_ids"] for path in sorted(two_texts.glob("*.txt"))]
    for row in report.rows:
        nll = [losses_in_torch(llama, ids, row.window, 16) for ids in documents]
        mean = np.concatenate(nll).mean()
        assert row.tokens == sum(map(len, nll)) == sum(len(ids) - 1 for ids in documents)
        assert row.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
        deviations = [(x - mean).sum() for x in nll]  # a ratio of sums over documents, as survey statistics has it
        error = math.sqrt(2 * sum(d**2 for d in deviations)) / row.tokens
        assert row.standard_error == pytest.approx(row.perplexity * error, rel=1e-3)
    first = [losses_in_torch(llama, ids, 64, 16)[:63] for ids in documents]
    (row,) = report.by_position
    assert (row.begin, row.end, row.tokens) == (0, 64, 126)
    assert row.perplexity == pytest.approx(math.exp(np.concatenate(first).mean()), rel=1e-4)


def test_perplexity_by_position_is_of_one_pass(llama, two_texts, monkeypatch):
    monkeypatch.setattr("pi_gguf.measure.kl.FIRST_RANGE", 16)
    options = {"text": [str(two_texts)], "stride": 8, "max_tokens": 1}
    whole = pi_gguf.evaluate_perplexity(str(llama), windows=[64], **options)
    assert [(row.begin, row.end, row.tokens) for row in whole.by_position] == [(0, 16, 30), (16, 32, 32), (32, 64, 64)]
    start = pi_gguf.evaluate_perplexity(str(llama), windows=[16], **options).rows[0]
    assert whole.by_position[0].perplexity == pytest.approx(start.perplexity, rel=1e-5)
    assert pi_gguf.evaluate_perplexity(str(llama), windows=[64], samples=1, **options).by_position == []


def test_several_models_make_one_table(cli, llama, gguf_path, text_path):
    options = ("--windows", "48,64", "--stride", "16", "--text", text_path)
    code, out, _ = cli("eval", "perplexity", llama, gguf_path, *options, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and [(row["model"], row["window"]) for row in rows] == [
        (model.name, window) for model in (llama, gguf_path) for window in (48, 64)
    ]
    alone = json.loads(cli("eval", "perplexity", gguf_path, *options, "--json")[1])["rows"]
    assert alone == rows[2:] != rows[:2]
    out = cli("eval", "perplexity", llama, gguf_path, *options)[1]
    assert f"{rows[3]['perplexity']:.3f} ± " in out and "k_max" not in out
    options = ("--windows", "512,1024", "--distances", "2", "--keys", "1")
    report = json.loads(cli("eval", "passkey", llama, gguf_path, *options, "--json")[1])
    assert [cell["model"] for cell in report["cells"]] == [llama.name] * 4 + [gguf_path.name] * 4
    assert report["k_max"] == {llama.name: 0, gguf_path.name: 0}
    out = cli("eval", "passkey", llama, gguf_path, *options)[1]
    assert out.count("0%") == 4 and "k_max" in out
    for suite in ("passkey", "perplexity"):
        code, _, err = cli("eval", suite, llama, llama, "--windows", "300")
        assert code == 2 and "models must differ" in err
    code, _, err = cli("eval", "passkey", llama, gguf_path, "--plot", "a.png")
    assert code == 2 and "plot is for one model, got 2" in err


def test_a_quantized_cache_is_measured_and_recorded(cli, llama, gguf_path, two_texts, monkeypatch):
    options = {"text": [str(two_texts)], "windows": (64,), "stride": 16, "max_tokens": 128}
    exact, cut = (
        pi_gguf.evaluate_perplexity(str(gguf_path), **options, type_k=kind, type_v=kind) for kind in ("f16", "q4_0")
    )
    with Model(gguf_path, type_k="q4_0", type_v="q4_0", n_ctx=64) as lm:
        assert pi_gguf.evaluate_perplexity(lm, **options).rows == cut.rows
    assert exact.rows != cut.rows and cut.provenance["type_k"] == cut.provenance["type_v"] == "q4_0"
    opened = []
    monkeypatch.setattr(
        "pi_gguf.runtime.model.Model.__init__", lambda self, *_, **options: opened.append(options) or 1 / 0
    )
    short = {"tasks": "next_sentence", "max_length": 20}
    for suite, more in (("passkey", {}), ("needle", {}), ("ruler", {}), ("summaries", {}), ("short", short)):
        with pytest.raises(ZeroDivisionError):
            getattr(pi_gguf, f"evaluate_{suite}")(str(gguf_path), **more, type_k="q8_0", type_v="q4_0")
    assert [(o["type_k"], o["type_v"]) for o in opened] == [("q8_0", "q4_0")] * 5
    assert [o["n_ctx"] for o in opened] == [1024, 1024, 1024, 1024, 20], "no more than is needed"


def test_windows_go_to_the_models_own_when_none_are_asked_for(llama, gguf_path, tmp_path, monkeypatch):
    long = make_llama(tmp_path / "long", max_position_embeddings=131072)
    some = make_llama(tmp_path / "some", max_position_embeddings=5000)
    lm = HfModel(load_checkpoint(str(llama)))
    for models, options, expected in (
        ((gguf_path,), {}, [1024]),
        ((some,), {}, [2048, 4096, 5000]),
        ((llama, some), {}, [2048, 4096, 5000]),
        ((llama,), {"context": 8192, "device": "cpu"}, [2048, 4096, 8192]),
        (("http://127.0.0.1/v1",), {"tokenizer": str(some)}, [2048, 4096, 5000]),
        ((long,), {}, [2048, 4096, 8192, 16384, 32768]),
        ((long,), {"least": 4096}, [4096, 8192, 16384, 32768]),
        ((lm,), {}, [lm.window]),
    ):
        models = [model if model is lm else str(model) for model in models]
        least, target = options.pop("least", 2048), ServerOptions(**options)
        assert choose_windows(None, models, target, least=least) == expected
        assert choose_windows((7, 100_000), models, target) == [7, 100_000]
    with pytest.raises(OptionError, match="windows must be token counts above 1"):
        choose_windows((1,), [lm], TargetOptions())


def test_what_one_of_several_targets_cannot_do_is_refused_before_the_first_is_measured(
    cli, llama, gguf_path, text_path
):
    for suite in ("perplexity", "passkey", "needle", "ruler", "summarize", "short"):
        where = ("--text", text_path) if suite == "perplexity" else ()
        code, _, err = cli("eval", suite, gguf_path, llama, "--type-k", "q8_0", *where)
        assert code == 2 and err.startswith(f"error: type-k and type-v are for GGUF files, {llama} is none"), err
        code, _, err = cli("eval", suite, llama, gguf_path, "--context", "1024", *where)
        assert code == 2 and err.startswith("error: context is for Hugging Face models;"), err


def test_finished_items_are_not_measured_again(llama, gguf_path, two_texts, tmp_path, monkeypatch):
    perplexity = {"text": [str(two_texts)], "windows": [32, 64], "stride": 16, "keep": str(tmp_path / "p.jsonl")}
    passkey = {"windows": (512,), "distances": 2, "keys": 2, "keep": str(tmp_path / "k.jsonl")}
    models = (str(llama), str(gguf_path))
    first = pi_gguf.evaluate_perplexity(*models, **perplexity), pi_gguf.evaluate_passkey(*models, **passkey)
    lines = [len(Path(options["keep"]).read_text().splitlines()) for options in (perplexity, passkey)]
    assert lines == [2 * 2 * 2, 2 * 2 * 2], "models x windows x documents, models x distances x keys"
    monkeypatch.setattr("pi_gguf.measure.language_model.LanguageModel.score", None)
    again = pi_gguf.evaluate_perplexity(*models, **perplexity), pi_gguf.evaluate_passkey(*models, **passkey)
    assert (again[0].rows, again[0].by_position, again[1].cells) == (
        first[0].rows,
        first[0].by_position,
        first[1].cells,
    )
    for changed in ({"stride": 8}, {"max_tokens": 70}, {"context": 256}):
        with pytest.raises(TypeError):
            pi_gguf.evaluate_perplexity(models[0], **{**perplexity, **changed})
    for changed in ({"keys": 3}, {"seed": 1}, {"windows": (600,)}, {"context": 1024}):
        with pytest.raises(TypeError):
            pi_gguf.evaluate_passkey(models[0], **{**passkey, **changed})


def test_a_file_that_was_written_anew_is_measured_anew(llama, two_texts, tmp_path):
    path, rows = tmp_path / "model.gguf", []
    for context in (512, 1024):
        pi_gguf.convert(str(llama), path, quant="F32", check="none", context=context, steps=0, overwrite=True)
        options = {"text": [str(two_texts)], "windows": [128], "stride": 64, "keep": str(tmp_path / "kept.jsonl")}
        rows.append(pi_gguf.evaluate_perplexity(str(path), **options).rows)
    assert rows[0] != rows[1]


@pytest.mark.parametrize("backend", ["hf", "gguf"])
def test_growing_prompts_ask_after_each_distance_and_read_each_key_once(llama, gguf_path, backend, monkeypatch):
    kind = HfModel if backend == "hf" else Model
    asked, read = [], []
    predicts, chunks = kind.predicts, kind.logits_chunks

    def watched_predicts(self, ids, last):
        asked.append((list(ids), last, predicts(self, ids, last)))
        return asked[-1][2]

    def watched_chunks(self, ids, last):
        before = list(self._evaluated if backend == "hf" else self.session.ids)
        yield from chunks(self, ids, last)
        read.append(len(ids) - common_prefix(before, ids))

    monkeypatch.setattr(kind, "predicts", watched_predicts)
    monkeypatch.setattr(kind, "logits_chunks", watched_chunks)
    target = llama if backend == "hf" else gguf_path
    report = pi_gguf.evaluate_passkey(str(target), windows=(256, 1000), distances=4, keys=2, growing=True)
    assert report.growing and [(c.window, c.distance, c.keys) for c in report.cells] == [
        (distance, distance, 2) for distance in (250, 500, 750, 1000)
    ]
    lm = HfModel(load_checkpoint(str(llama)))
    line = len(lm.tokenize(EVALUATION_FILLER, add_special=False))
    texts = [lm.detokenize(ids) for ids, _, _ in asked]
    keys = [text.rpartition(" ")[2] for text in texts]
    assert len(set(keys)) == 2 and keys == [keys[0]] * 4 + [keys[4]] * 4
    assert all(text.split("Here we go")[0].count(key) == 2 for text, key in zip(texts, keys, strict=True)), "key first"
    for (ids, _, _), cell in zip(asked, report.cells * 2, strict=True):
        assert len(ids) <= 1000 and abs(cell.exact_distance - cell.distance) <= line + len(lm.tokenize(INTRODUCTION))
        assert len(ids) - cell.exact_distance == len(lm.tokenize(INTRODUCTION))
    assert sum(read) < 2 * (1000 + 4 * 2 * line), "about what two readings take"
    monkeypatch.undo()
    fresh = [HfModel(load_checkpoint(str(llama))) if backend == "hf" else Model(gguf_path) for _ in asked]
    assert [m.predicts(ids, last) for m, (ids, last, _) in zip(fresh, asked, strict=True)] == [a[2] for a in asked]


def test_growing_prompts_count_what_is_found(llama, tmp_path, cli, monkeypatch):
    """A reader that finds each key up to 600 tokens away, none at 750, and one of five at 1000."""

    def reads(self, ids, last):
        number = keys.index(tuple(ids[-last:])) if tuple(ids[-last:]) in keys else len(keys)
        keys.append(tuple(ids[-last:]))
        return len(ids) < 600 or (number == 0 and len(ids) > 900)

    keys = []
    monkeypatch.setattr(HfModel, "predicts", reads)
    plot = tmp_path / "growing.png"
    where = ("--windows", "1000", "--distances", "4", "--keys", "5", "--growing", "--keep", tmp_path / "kept")
    code, out, _ = cli("eval", "passkey", llama, *where, "--plot", plot)
    assert code == 0 and plot.read_bytes()[:4] == b"\x89PNG"
    rows = dict(re.findall(r"│ (\w+) +│ +(\S+) │", out))
    assert rows == {"250": "100%", "500": "100%", "750": "0%", "1000": "20%", "k_max": "500"}
    monkeypatch.setattr(HfModel, "predicts", lambda *_: 1 / 0)
    assert cli("eval", "passkey", llama, *where)[1] == out, "kept"
    with pytest.raises(ZeroDivisionError):
        pi_gguf.evaluate_passkey(str(llama), windows=(1000,), distances=4, keys=5, keep=str(tmp_path / "kept"))


def test_quick_asks_for_fewer_keys(llama, monkeypatch):
    asked = []
    monkeypatch.setattr("pi_gguf.evaluate.passkey.passkey_cells", lambda lm, **options: asked.append(options) or [])
    for options in ({}, {"quick": True}, {"quick": True, "keys": 5}, {"distances": 3}):
        pi_gguf.evaluate_passkey(str(llama), **options)
    assert [(o["distances"], o["keys"]) for o in asked] == [(32, 10), (8, 2), (8, 5), (3, 10)]
    for wrong in ({"keys": -1}, {"keys": 0}, {"distances": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(OptionError, match=f"{name} must be at least 1, got {value}"):
            pi_gguf.evaluate_passkey(str(llama), **wrong)


def test_generation_takes_the_most_probable_token_in_both_backends(llama, gguf_path):
    checkpoint = load_checkpoint(str(llama)).extended(1024)
    model = checkpoint.load_model(dtype=torch.float32)
    hf = HfModel(checkpoint)
    ids = hf.tokenize("It was a dark and stormy night. " * 3)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    with Model(gguf_path) as lm:
        assert hf.generate(ids, 8) == lm.generate(ids, 8) == hf.detokenize(expected) != ""
        assert hf.generate(ids, 3) == hf.detokenize(expected[:3])
        whole = hf.detokenize(expected)
        stopped = hf.generate(ids, 8, [whole[3]])
        assert whole.startswith(stopped) and whole[3] in stopped and len(stopped) < len(whole)
        last = next(i for i in range(1, 8) if expected[i] not in expected[:i])
        ending = type("Ending", (HfModel,), {"is_end": lambda self, token: token == expected[last]})
        assert ending(checkpoint).generate(ids, 8) == hf.detokenize(expected[:last])
        assert [m.is_end(1) for m in (hf, lm)] == [True, True] and [m.is_end(300) for m in (hf, lm)] == [False, False]


@pytest.mark.parametrize("backend", ["gguf", "hf"])
def test_what_was_read_before_does_not_change_a_score(llama, gguf_path, backend):
    """Calls share the cache of a common start; every order must give what a fresh model gives."""

    def fresh():
        if backend == "gguf":
            return Model(gguf_path, type_k="f32", type_v="f32", flash_attn=False)
        return HfModel(load_checkpoint(str(llama)).extended(1024))

    rng = np.random.default_rng(0)
    first = rng.integers(2, 400, 700).tolist()
    second = first[:600] + rng.integers(2, 400, 60).tolist()
    warm = fresh()
    warm.score(first, 5)
    for ids, last in ((second, 30), (first, 699), (first, 20), (second[:100], 99), (second, 659)):
        np.testing.assert_allclose(warm.score(ids, last)[0], fresh().score(ids, last)[0], atol=2e-3)


def test_passkey_prompts_fill_the_window_with_the_key_at_its_distance(llama):
    lm = HfModel(load_checkpoint(str(llama)))
    prompts = PasskeyPrompts(lm, 2000)
    line = len(lm.tokenize(EVALUATION_FILLER, add_special=False))
    decode = lm._tokenizer.decode
    for distance in (300, 1000, 2000):
        ids, last, exact = prompts.make("54321", distance)
        assert 2000 - line < len(ids) <= 2000
        assert decode(ids[-last:]).strip() == "54321"
        assert decode(ids).endswith("What is the pass key? The pass key is 54321")
        assert decode(ids).count("The pass key is 54321. Remember it.") == 1
        before = decode(ids, skip_special_tokens=True).split("The pass key is 54321.")[0]
        assert abs(len(ids) - len(lm.tokenize(before)) - exact) <= 1
        assert abs(exact - distance) <= (line if distance < 2000 else line + len(prompts._start))


def test_k_max_is_the_largest_distance_up_to_which_a_fifth_is_found_at_each():
    def cells(window, *found):
        n = len(found)
        return [PasskeyCell(window, window * i // n, 0, count, 10) for i, count in enumerate(found, 1)][::-1]

    assert k_max(cells(100, 10, 2)) == 100
    assert k_max(cells(100, 10, 1)) == 50
    assert k_max(cells(400, 9, 8, 1, 10)) == 200, "one that fails ends it"
    assert k_max(cells(400, 1, 10, 10, 10)) == k_max([]) == 0
    assert k_max(cells(100, 9, 9) + cells(400, 1, 9)) == 100, "whole in one window, broken in the other"
    growing = [PasskeyCell(d, d, d, found, 10) for d, found in ((100, 9), (200, 0), (300, 9))]
    assert k_max(growing, growing=True) == 100
    assert k_max(growing) == 300, "each alone in a window of its own"


def test_no_evaluation_key_filler_or_novel_is_in_the_training_mixture():
    mixture = bundled.training_mixture(3, 512)
    text = "".join(next(mixture) for _ in range(400))
    keys = {draw_key(random.Random(i), for_evaluation=True) for i in range(3000)}
    assert all(is_evaluation_key(key) for key in keys)
    assert not [key for key in keys if key in text]
    assert EVALUATION_FILLER.split(". ")[0] not in text
    assert not set(bundled.novels("train")) & set(bundled.novels("heldout"))
    assert text.count("The pass key is ") > 50
    predicates = {sentence.rpartition(" is ")[2] for sentence in EVALUATION_FILLER.split(". ") if " is " in sentence}
    assert len(predicates) == 3 and not predicates & set(bundled.QUALITIES)
    assert len(re.findall(r"The \w+ is \w+\.", text)) > 500, "other things are said to be something, as the key is"


def test_the_reports_are_json_with_provenance(cli, llama, text_path):
    code, out, _ = cli(
        "eval", "perplexity", llama, "--text", text_path, "--windows", "32,64", "--stride", "16", "--json"
    )
    assert code == 0
    report = json.loads(out)
    assert [row["window"] for row in report["rows"]] == [32, WINDOW]
    assert {"pi_gguf", "libraries", "seed", "device", "text_sha256", "elapsed_seconds"} <= set(report["provenance"])
    code, out, _ = cli("eval", "passkey", llama, "--windows", "512", "--distances", "2", "--keys", "1", "--json")
    assert code == 0 and len(json.loads(out)["cells"]) == 2


def test_growing_passkeys_are_drawn_a_line_a_model(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.append(figure) or path.touch()
    )
    cells = [
        PasskeyCell(d, d, d, found, 4, name) for name, d, found in (("a", 1, 4), ("a", 2, 2), ("b", 1, 1), ("b", 2, 0))
    ]
    plot_passkeys(PasskeyReport(["a", "b"], cells, {}, growing=True), tmp_path / "a.png")
    first, second, _ = drawn[0].axes[0].lines
    assert [line.get_label() for line in (first, second)] == ["a", "b"]
    assert [list(line.get_ydata()) for line in (first, second)] == [[100, 50], [25, 0]]


def test_reports_are_drawn(cli, llama, text_path, tmp_path):
    for command in (
        ("perplexity", llama, "--text", text_path, "--windows", "32,64", "--stride", "16"),
        ("passkey", llama, "--windows", "512,1024", "--distances", "2", "--keys", "1"),
        ("kl", llama, "--against", llama, "--text", text_path),
    ):
        path = tmp_path / f"{command[0]}.png"
        code, _, err = cli("eval", *command, "--plot", path)
        assert code == 0 and f"wrote {path}" in err
        assert path.read_bytes()[:4] == b"\x89PNG"
    for path, message in (
        (tmp_path / "a.xls", "plot must end in one of"),
        (tmp_path / "no" / "a.png", "does not exist"),
    ):
        code, _, err = cli("eval", *command, "--plot", path)
        assert code == 2 and message in err


def test_a_loss_beyond_what_64_bits_can_say_has_their_largest_perplexity():
    from pi_gguf.measure.perplexity import _perplexity

    assert 1e307 < _perplexity([(8000.0, 8000.0**2, 8)])[0] < float("inf")
