"""KL divergence by position: torch's own figures, and what a cache in fewer bits costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import WINDOW, make_llama

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.errors import OptionError, TextError
from pi_gguf.measure.kl import in_step, kl_divergence, position_ranges

CONTEXT = 4 * WINDOW


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for quant in ("F32", "Q4_0"):
        out = folder / f"{quant}.gguf"
        pi_gguf.convert(str(llama), out, context=CONTEXT, steps=0, quant=quant, check="none")
    return folder


def torch_divergence(reference, logits):
    p, q = (torch.log_softmax(torch.from_numpy(np.asarray(x)).double(), 1) for x in (reference, logits))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1).numpy()


def test_kl_divergence_is_that_of_torch():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 50)).astype(np.float32), rng.normal(size=(7, 50)).astype(np.float32)
    kl, same = kl_divergence(a, b)
    np.testing.assert_allclose(kl, torch_divergence(a, b), rtol=1e-9)
    np.testing.assert_array_equal(same, a.argmax(1) == b.argmax(1))
    np.testing.assert_allclose(kl_divergence(a, np.pad(b, ((0, 0), (0, 3)), constant_values=50))[0], kl)
    kl, same = kl_divergence(a, a)
    assert abs(kl).max() < 1e-12 and same.all()


def test_chunks_are_cut_alike():
    a = np.arange(20.0).reshape(10, 2)
    pairs = list(in_step(iter([a[:7], a[7:]]), iter([a[:2], a[2:4], a[4:]])))
    assert [len(x) for x, _ in pairs] == [2, 2, 3, 3]
    for side in zip(*pairs, strict=True):
        np.testing.assert_array_equal(np.concatenate(side), a)


def test_ranges_of_positions():
    assert position_ranges(256) == [(0, 256)]
    assert position_ranges(4096) == [(0, 1024), (1024, 2048), (2048, 4096), (0, 4096)]
    assert position_ranges(5000) == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 5000), (0, 5000)]


def test_each_token_is_compared_with_the_reference(files, llama, monkeypatch):
    """Against torch on the logits of both sides, range by range, in the very positions."""
    monkeypatch.setattr("pi_gguf.measure.kl.FIRST_RANGE", 64)
    report = pi_gguf.evaluate_kl(str(files / "Q4_0.gguf"), against=str(files / "F32.gguf"), documents=2)
    assert [(row.begin, row.end) for row in report.rows] == [(0, 64), (64, 128), (128, 256), (0, 256)]
    texts = sorted(novels("heldout").values(), key=len)[::-1][:2]
    both, agreements = [], []
    for text in texts:
        sides = []
        for name in ("F32", "Q4_0"):
            with pi_gguf.open(files / f"{name}.gguf", type_k="f16") as model:
                ids = model.tokenize(text[:2000])[:CONTEXT]
                sides.append(np.concatenate(list(model.logits_chunks(ids, CONTEXT))))
        kl = torch_divergence(*sides)
        both.append(np.concatenate([[np.nan], kl[:-1]]))  # by the position of the token that is predicted
        agreements.append((sides[0].argmax(1) == sides[1].argmax(1))[:-1])
    for row in report.rows:
        part = np.array(both)[:, row.begin : row.end]
        part = part[~np.isnan(part)]
        assert row.tokens == len(part)
        assert (row.mean, row.worst) == pytest.approx((part.mean(), part.max()), rel=1e-6)
        assert (row.median, row.p90, row.p99) == pytest.approx(tuple(np.percentile(part, (50, 90, 99))), rel=1e-6)
    assert report.rows[-1].top1 == pytest.approx(np.mean(agreements))
    assert report.rows[-1].mean > 1e-5, "four bits differ"


def test_the_reference_may_be_the_checkpoint(files, llama):
    found = pi_gguf.evaluate_kl(str(files / "F32.gguf"), against=str(llama), window=WINDOW)
    assert found.rows[-1].mean > 1e-6, "interpolated against not"
    options = {"against": str(llama), "context": CONTEXT}
    with pytest.raises(OptionError, match="context is for Hugging Face models"):
        pi_gguf.evaluate_kl(str(files / "F32.gguf"), **options)
    assert pi_gguf.evaluate_kl(str(llama), **options).rows[-1].worst < 1e-9


def test_a_cache_in_fewer_bits_costs(files):
    exact, model = str(files / "F32.gguf"), str(files / "F32.gguf")
    f16, q8, q4 = (
        pi_gguf.evaluate_kl(model, against=exact, type_k=kind, type_v=kind).rows[-1].mean
        for kind in ("f16", "q8_0", "q4_0")
    )
    assert 0 <= f16 < 1e-9 < q8 < q4


def test_a_model_with_another_vocabulary_is_no_reference(files, tmp_path):
    from helpers import make_tokenizer

    other = make_llama(tmp_path / "other")
    make_tokenizer(other, vocab_size=390)
    with pytest.raises(OptionError, match=r"tokenizes .* differently from .*F32.gguf, from token \d+ on"):
        pi_gguf.evaluate_kl(str(files / "F32.gguf"), against=str(other), window=WINDOW)


def test_values_that_cannot_work_are_refused(files, llama, tmp_path, cli):
    exact = files / "F32.gguf"
    for options, message in (
        (("--documents", "0"), "documents must be at least 1"),
        (("--window", "1"), "window must be at least 2"),
        (("--type-k", "q3"), "type-k must be one of f32, f16, q8_0, q4_0, got q3"),
    ):
        code, _, err = cli("eval", "kl", exact, "--against", exact, *options)
        assert code == 2 and message in err
    code, _, err = cli("eval", "kl", llama, "--against", exact, "--type-k", "q8_0")
    assert code == 2 and "type-k and type-v are for GGUF files" in err
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(TextError, match=r"short.txt: \d+ tokens, fewer than the window of 256"):
        pi_gguf.evaluate_kl(str(exact), against=str(exact), text=[str(short)])
    code, out, _ = cli("eval", "kl", exact, "--against", exact)
    assert code == 0 and "100.00%" in out


# The matrix


def test_the_matrix_holds_each_file_with_each_cache(files, tmp_path, cli):
    names = [str(files / "F32.gguf"), str(files / "Q4_0.gguf")]
    report = pi_gguf.evaluate_matrix(*names, against=names[0], cache_types="f16,q4_0")
    assert [(cell.model, cell.type_k, cell.type_v) for cell in report.cells] == [
        (name, kind, kind) for name in names for kind in ("f16", "q4_0")
    ]
    alone = pi_gguf.evaluate_kl(names[1], against=names[0], type_k="q4_0", type_v="q4_0")
    assert report.cells[3].rows == alone.rows
    command = ("eval", "matrix", *names, "--against", names[0], "--plot", tmp_path / "matrix.png")
    code, out, _ = cli(*command)
    assert code == 0 and "Q4_0.gguf, q8_0" in out and (tmp_path / "matrix.png").stat().st_size > 1000


def test_a_matrix_that_was_stopped_goes_on(files, tmp_path, monkeypatch):
    names, keep = [str(files / "F32.gguf"), str(files / "Q4_0.gguf")], tmp_path / "kept.jsonl"
    options = {"against": names[0], "cache_types": "f16,q8_0", "keep": str(keep)}
    measured, evaluate = [], pi_gguf.evaluate_kl

    def watched(model, *, stop=99, **more):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append((model, more["type_k"]))
        return evaluate(model, **more)

    monkeypatch.setattr("pi_gguf.evaluate.matrix.evaluate_kl", lambda *a, **k: watched(*a, stop=3, **k))
    with pytest.raises(KeyboardInterrupt):
        pi_gguf.evaluate_matrix(*names, **options)
    with keep.open("ab") as file:
        file.write(b'{"item": {"mod')  # as a kill leaves it
    monkeypatch.setattr("pi_gguf.evaluate.matrix.evaluate_kl", watched)
    report = pi_gguf.evaluate_matrix(*names, **options)
    assert measured == [(name, kind) for name in names for kind in ("f16", "q8_0")], "each once"
    assert len(keep.read_text().splitlines()) == 4
    whole = pi_gguf.evaluate_matrix(*names, **{**options, "keep": None})
    assert [cell.rows for cell in report.cells] == [cell.rows for cell in whole.cells]
    pi_gguf.evaluate_matrix(*names, **{**options, "window": 128})
    assert len(measured) == 12, "another window is measured anew"


def test_a_matrix_that_cannot_be_is_refused(files, tmp_path):
    exact = str(files / "F32.gguf")
    other = tmp_path / "other.jsonl"
    other.write_text("no json\n{}\n")
    for options, message in (
        ({"cache_types": "f16,q3"}, "cache-types must be some of .*, got 'q3'"),
        ({"keep": str(other)}, "line 1 is no finished item"),
        ({"keep": str(tmp_path / "no" / "kept")}, "does not exist"),
    ):
        with pytest.raises(OptionError, match=message):
            pi_gguf.evaluate_matrix(exact, against=exact, **options)
    with pytest.raises(OptionError, match="matrix needs GGUF files"):
        pi_gguf.evaluate_matrix(against=exact)
