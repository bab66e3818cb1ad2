"""A file's own measurements: right, stored with the file, held against what is required; broken files are caught."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers import WINDOW, change_data, make_llama, reversed_rows, tensors

import pi_gguf
from pi_gguf.bundled import novels
from pi_gguf.errors import CertificateError, CheckError, OptionError, ResourceError
from pi_gguf.gguf.certificate import Certificate, store
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import MEASURED, Entry, read_header, write_changed
from pi_gguf.measure.perplexity import Yardstick
from pi_gguf.prove.requirements import read_requirements

CONTEXT = 4 * WINDOW


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, llama):
    """A random model interpolated by 4, not certified."""
    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    pi_gguf.convert(str(llama), out, context=CONTEXT, steps=0, quant="F32", certify=False)
    return out


@pytest.fixture
def copy(gguf, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(gguf.read_bytes())
    return out


def certificate_of(path):
    return Certificate.read(read_header(path))


# What is measured


def test_the_figures_are_those_of_the_evaluations(copy, llama, tmp_path):
    found = pi_gguf.certify(copy, against=str(llama), context=CONTEXT).certificate
    text = tmp_path / "text.txt"
    yardstick = Yardstick.of((), WINDOW, CONTEXT)
    text.write_text(yardstick.text)
    options = {"text": [str(text)], "stride": WINDOW - 1, "samples": Yardstick.SAMPLES}
    report = pi_gguf.evaluate_perplexity(str(copy), windows=(WINDOW, CONTEXT), **options)
    assert list(found.perplexity) == [WINDOW, CONTEXT]
    assert list(found.perplexity.values()) == pytest.approx([row.perplexity for row in report.rows], rel=1e-6)
    passkeys = pi_gguf.evaluate_passkey(str(copy), windows=(CONTEXT,), distances=4, keys=4, growing=True)
    assert (found.k_max, found.passkeys_asked) == (passkeys.k_max[str(copy)], 16)
    assert found.reference == "base"
    assert found.ppl_ratio == found.perplexity[CONTEXT] / found.reference_perplexity
    base = pi_gguf.evaluate_perplexity(str(llama), windows=(WINDOW, CONTEXT), **options).rows[0].perplexity
    assert found.reference_perplexity == pytest.approx(base, rel=1e-5)
    assert abs(found.reference_perplexity / found.perplexity[WINDOW] - 1) > 1e-4, "interpolation changed the model"
    assert 0 <= found.kl_divergence < 1e-4 and found.top1_agreement > 0.99


def test_without_a_base_a_file_is_held_against_itself(copy):
    found = pi_gguf.certify(copy).certificate
    assert (found.reference, found.against, found.kl_divergence) == ("itself", None, None)
    assert found.reference_perplexity == found.perplexity[WINDOW]


def test_the_base_is_that_of_the_fine_tune(llama, tmp_path):
    out, text = tmp_path / "model.gguf", tmp_path / "own.txt"
    text.write_text(next(iter(novels("train").values()))[:6000])
    options = {"steps": 2, "batch_tokens": 256, "learning_rate": 0.01, "data": [str(text)], "device": "cpu"}
    found = pi_gguf.convert(str(llama), out, context=CONTEXT, quant="F16", **options).certificate
    price = json.loads((tmp_path / "model-hf" / "pi_gguf.json").read_text())["price"]
    assert (found.reference, found.reference_perplexity) == ("base", price["before"])
    assert found.perplexity[WINDOW] == pytest.approx(price["after"], rel=1e-3)
    other = pi_gguf.certify(out, against=str(tmp_path / "model-hf"), text=[str(text)]).certificate
    assert other.reference == "itself", "the base was measured on another text"


def test_a_text_of_ones_own(copy, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text(next(iter(novels("train").values()))[:6000])
    found = pi_gguf.certify(copy, text=[str(text)]).certificate
    assert found.text == "own.txt"
    assert found.perplexity != pi_gguf.certify(copy).certificate.perplexity


def test_a_window_that_takes_too_long_is_measured_as_far_as_it_goes(copy, monkeypatch, capfd):
    monkeypatch.setattr("pi_gguf.prove.certify.SECONDS", 1e-9)
    found = pi_gguf.certify(copy).certificate
    assert (found.window, list(found.perplexity), found.ppl_ratio) == (WINDOW, [WINDOW], 1.0)
    err = capfd.readouterr().err
    assert "not at 256 tokens, it would take about" in err and "not at 128 tokens" in err


def test_a_model_whose_own_window_takes_too_long_is_measured_below_it(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("pi_gguf.prove.certify.SECONDS", 1e-9)
    monkeypatch.setattr("pi_gguf.prove.certify._PROBE", 16)
    found = pi_gguf.convert(str(llama), tmp_path / "own.gguf", quant="F16").certificate
    assert (found.window, list(found.perplexity), found.reference) == (16, [16], "itself")


def test_a_window_that_does_not_fit_in_memory_is_measured_as_far_as_it_goes(copy, monkeypatch, capfd):
    def check_memory(info, cache_bytes, n_ctx):
        if n_ctx == CONTEXT:
            raise ResourceError("too little memory")

    monkeypatch.setattr("pi_gguf.runtime.model._check_memory", check_memory)
    monkeypatch.setattr("pi_gguf.prove.certify._PROBE", 16)
    assert pi_gguf.certify(copy).certificate.window == CONTEXT // 2
    assert "not at 256 tokens, too little memory" in capfd.readouterr().err


def test_a_window_longer_than_the_text_is_measured_as_far_as_it_goes(copy, tmp_path, capfd):
    text = tmp_path / "short.txt"
    text.write_text(next(iter(novels("train").values()))[:760])
    found = pi_gguf.certify(copy, text=[str(text)]).certificate
    assert found.window == CONTEXT // 2
    assert "not at 256 tokens, " in capfd.readouterr().err


# What is stored


def test_a_certificate_travels_in_the_file(copy, gguf, cli):
    found = pi_gguf.certify(copy).certificate
    stored = certificate_of(copy)
    assert stored.to_json() == {
        **found.to_json(),
        "perplexity": pytest.approx(found.perplexity, rel=1e-6),
        **{name: pytest.approx(getattr(found, name), rel=1e-6) for name in ("ppl_ratio", "reference_perplexity")},
        "seconds": pytest.approx(found.seconds, rel=1e-6),
    }
    assert tensors(copy) == tensors(gguf)
    before, after = read_gguf(gguf).metadata, read_gguf(copy).metadata
    assert {key: value for key, value in after.items() if not key.startswith(MEASURED)} == before
    code, out, _ = cli("inspect", copy)
    assert code == 0 and "ppl_ratio" in out and f"to {CONTEXT} tokens" in out
    _, out, _ = cli("inspect", copy, "--json")
    assert json.loads(out)["certificate"]["k_max"] == found.k_max
    again = pi_gguf.certify(copy).certificate
    assert again.perplexity == found.perplexity, "it replaces the one that is there"


def test_a_perplexity_beyond_32_bits_is_stored_as_their_largest(copy):
    found = dataclasses.replace(pi_gguf.certify(copy).certificate, perplexity={WINDOW: 1e300}, ppl_ratio=float("inf"))
    store(copy, found)
    stored = certificate_of(copy)
    assert stored.perplexity[WINDOW] == stored.ppl_ratio == pytest.approx(3.4e38, rel=1e-6)


def test_a_certificate_of_another_header_is_not_believed(copy, cli, tmp_path):
    pi_gguf.certify(copy)
    changed = tmp_path / "changed.gguf"
    header = read_header(copy)
    write_changed(header.changed({"llama.rope.scaling.factor": Entry.of(2.0)}), changed)
    _, out, _ = cli("inspect", changed, "--json")
    report = json.loads(out)
    assert report["certificate"] is None
    assert any("its certificate is of a file with another header" in warning for warning in report["warnings"])
    quantized = pi_gguf.quantize(copy, tmp_path / "q8.gguf", quant="Q8_0")
    assert any("another header" in warning for warning in pi_gguf.inspect(quantized).warnings)


def test_convert_certifies_unless_told_not_to(llama, gguf, tmp_path):
    assert certificate_of(gguf) is None
    result = pi_gguf.convert(str(llama), tmp_path / "plain.gguf", quant="F16")
    assert certificate_of(tmp_path / "plain.gguf").window == result.certificate.window == WINDOW
    result = pi_gguf.convert(str(llama), tmp_path / "long.gguf", context=CONTEXT, steps=0, quant="Q8_0")
    stored = certificate_of(tmp_path / "long.gguf")
    assert (stored.window, stored.reference) == (CONTEXT, "base")
    assert stored.kl_divergence == pytest.approx(result.checks[0].kl_divergence, rel=1e-6)


def test_each_key_is_asked_for_after_each_quarter_of_the_window(copy, monkeypatch):
    asked = []

    def reads(self, ids, last):
        asked.append(len(ids))
        return len(ids) != lengths[1]

    options = {"windows": (1024,), "distances": 4, "keys": 4, "growing": True}
    monkeypatch.setattr("pi_gguf.prove.certify._window_that_fits", lambda *_: (1024, 0.0))
    monkeypatch.setattr("pi_gguf.runtime.model.Model.predicts", reads)
    lengths = [0, 0]
    pi_gguf.evaluate_passkey(str(copy), **options)
    lengths = sorted(set(asked))
    assert len(lengths) == 4
    found = pi_gguf.certify(copy).certificate
    assert (found.k_max, found.passkeys_found, found.passkeys_asked) == (256, 12, 16), "none at the second ends it"
    assert asked[16:] == lengths * 4


def test_a_split_file_carries_it_in_its_first_part(tmp_path):
    model = make_llama(tmp_path / "llama", num_hidden_layers=4)
    result = pi_gguf.convert(str(model), tmp_path / "out.gguf", quant="F32", split_max_size="300K")
    assert len(result.files) > 1
    assert Certificate.read(read_header(tmp_path / result.files[0])) is not None


def test_a_card_shows_what_stands_in_the_file(copy, tmp_path, cli):
    code, out, _ = cli("card", copy)
    assert code == 0 and "no certificate" in out
    found = pi_gguf.certify(copy).certificate
    code, out, _ = cli("card", copy, "--out", tmp_path / "README.md")
    assert code == 0 and out.strip() == f"wrote {tmp_path}/README.md"
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: gguf\n")
    assert "| window | 256 tokens, 64 before it was extended |" in text
    assert "| rope scaling | linear, factor 4 |" in text
    for name, value in found.rows():
        assert f"| {name} | {value} |" in text, name
    assert "base_model" not in text, "a folder's name is no model of the Hub"
    header = read_header(copy)
    changes = {
        "general.source.repository": Entry.of("owner/name"),
        "general.license": Entry.of("mit"),
        "general.name": Entry.of("A | B\nC"),
    }
    write_changed(header.changed({**changes, f"{MEASURED}version": None}), tmp_path / "hub.gguf")
    text = pi_gguf.card(tmp_path / "hub.gguf").text
    assert 'base_model: "owner/name"\nlicense: "mit"\n---\n\n# A \\| B C, F32, 256 tokens' in text
    code, _, err = cli("card", copy, "--out", tmp_path / "README.md")
    assert code == 2 and "README.md" in err


# What is required


def test_requirements_are_read_and_held(copy):
    certificate = pi_gguf.certify(copy).certificate
    for text, missed in (
        ("window>=256", None),
        (" window > 255 , ppl_ratio<1e3", None),
        ("window<=256", None),
        ("window<256", "window is 256, required < 256"),
        ("window>256", "window is 256, required > 256"),
        ("window>=257", "window is 256, required >= 257"),
        ("kl_divergence<=1", "kl_divergence is not measured, required <= 1"),
    ):
        found = [r.missed(certificate, CONTEXT) for r in read_requirements(text)]
        assert [f for f in found if f] == ([missed] if missed else [])
    for text in ("k_max", "k_max=3", "speed>=3", "k_max>=", "k_max>=1e", "k_max>=1,,"):
        with pytest.raises(OptionError, match="require must be figures with"):
            read_requirements(text)


def test_a_file_that_falls_short_is_kept_under_another_name(llama, tmp_path, cli):
    out = tmp_path / "model.gguf"
    command = ("convert", llama, out, "--context", CONTEXT, "--steps", "0", "--quant", "F16")
    code, _, err = cli(*command, "--require", "k_max>=256,window>=256")
    assert code == 9
    assert f"error: {tmp_path}/model-uncertified.gguf: k_max is 0, required >= 256" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-uncertified.gguf"]
    assert certificate_of(tmp_path / "model-uncertified.gguf").k_max == 0
    code, _, err = cli(*command, "--require", "k_max>=256")
    assert code == 2 and "model-uncertified.gguf" in err, "what is there is not replaced"
    assert cli(*command, "--require", "window>=256", "--overwrite")[0] == 0
    assert out.exists()


def test_certify_stores_the_figures_of_a_file_that_falls_short(copy):
    with pytest.raises(CertificateError, match="k_max is 0, required >= 1"):
        pi_gguf.certify(copy, require="k_max>=1")
    assert certificate_of(copy).k_max == 0


def test_values_that_cannot_work_are_refused(copy, llama):
    for options, message in (
        ({"context": 256}, "context is for --against, got 256"),
        ({"require": "nonsense"}, "require must be"),
    ):
        with pytest.raises(OptionError, match=message):
            pi_gguf.certify(copy, **options)
    with pytest.raises(OptionError, match="require is for files that are certified"):
        pi_gguf.convert(str(llama), "out.gguf", certify=False, require="k_max>=1")


def test_a_ratio_of_a_part_of_the_window_is_not_enough(copy, monkeypatch):
    pi_gguf.certify(copy, require="ppl_ratio<=2")
    monkeypatch.setattr("pi_gguf.prove.certify.SECONDS", 1e-9)
    with pytest.raises(CertificateError, match="ppl_ratio is measured to 64 of 256 tokens only"):
        pi_gguf.certify(copy, require="ppl_ratio<=2")


def test_a_certificate_takes_the_room_that_was_planned_for_it(llama, tmp_path):
    for certify in (True, False):
        options = {"quant": "F16", "certify": certify}
        planned = pi_gguf.convert(str(llama), tmp_path / f"{certify}.gguf", dry_run=True, **options)
        pi_gguf.convert(str(llama), tmp_path / f"{certify}.gguf", **options)
        path = tmp_path / f"{certify}.gguf"
        assert path.stat().st_size == planned.nbytes
        assert (f"{MEASURED}room" in read_header(path).entries) == certify
    size = (tmp_path / "True.gguf").stat().st_size
    pi_gguf.certify(tmp_path / "True.gguf", against=str(llama))
    assert (tmp_path / "True.gguf").stat().st_size == size
    assert certificate_of(tmp_path / "True.gguf") is not None


def test_a_certificate_with_a_damaged_key_is_a_warning(copy, tmp_path):
    pi_gguf.certify(copy)
    changes = {f"{MEASURED}perplexity.64": None, f"{MEASURED}perplexity.abc": Entry.of(1.0)}
    for more, message in ((changes, "perplexity of no window"), ({f"{MEASURED}text": None}, "pi_gguf.text is missing")):
        damaged = tmp_path / "damaged.gguf"
        write_changed(read_header(copy).changed(more), damaged)
        assert any(message in warning for warning in pi_gguf.inspect(damaged).warnings)


# Broken files


def rewrite(source, target, changes):
    header = read_header(source)
    write_changed(header.changed(changes), target)


def drop_factor(source, target, llama):
    keys = [key for key in read_header(source).entries if ".rope.scaling." in key]
    rewrite(source, target, dict.fromkeys(keys))


def invert_factor(source, target, llama):
    rewrite(source, target, {"llama.rope.scaling.factor": Entry.of(0.25)})


def keep_window(source, target, llama):
    rewrite(source, target, {"llama.context_length": Entry.of(WINDOW)})


def shuffle_rows(source, target, llama):
    target.write_bytes(source.read_bytes())
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        change_data(target, name, reversed_rows)


def other_splitting(source, target, llama):
    rewrite(source, target, {"tokenizer.ggml.pre": Entry.of("gpt-2")})


def zero_embedding(source, target, llama):
    pi_gguf.convert(str(llama), target, context=CONTEXT, steps=0, quant="Q8_0", certify=False)
    change_data(target, "token_embd.weight", lambda data, rows: bytes(len(data)))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (drop_factor, "rope_freq_scale"),
        (invert_factor, "rope_freq_scale"),
        (keep_window, "window of 64"),
        (shuffle_rows, "KL divergence"),
        (other_splitting, "tokenizes differently"),
        (zero_embedding, "KL divergence"),
    ],
)
def test_broken_files_fail(breaks, message, gguf, llama, tmp_path, cli):
    broken = tmp_path / "broken.gguf"
    breaks(gguf, broken, llama)
    with pytest.raises(CheckError, match=message):
        pi_gguf.certify(broken, against=str(llama), context=CONTEXT)
    assert certificate_of(broken) is None
    code, _, err = cli("certify", broken, "--against", llama, "--context", CONTEXT)
    assert code == 7 and "hint: convert it again, or: pi-gguf repair" in err
