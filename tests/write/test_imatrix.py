"""Importance matrices: what llama.cpp multiplies is what transformers multiplies; quantizing uses it to the byte."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import WINDOW, make_llama, tensors
from small_families import make_model

import pi_gguf
from pi_gguf import bundled
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.llamacpp import quantizer, watch
from pi_gguf.llamacpp.watch import ProductWatch
from pi_gguf.runtime.model import Model
from pi_gguf.write.imatrix import (
    ImportanceMatrix,
    SquareSums,
    compute_imatrix,
    read_imatrix,
    text_windows,
    write_imatrix,
)

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(next(iter(bundled.novels("train").values()))[2000:12000])
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama whose rows are whole blocks of 256, with eight layers, as mixtures differ by layer."""
    return make_llama(
        tmp_path_factory.mktemp("wide") / "model", dtype="bfloat16", hidden_size=256, intermediate_size=256,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide_experts(tmp_path_factory) -> Path:
    """Experts of whole blocks, of which the tokens of one short window leave some without any."""
    return make_model(
        tmp_path_factory.mktemp("experts") / "model", "mixtral",
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 8},
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(wide, wide_experts, text, tmp_path_factory) -> dict[str, tuple[Path, Path, Path]]:
    """Model, its F32 file and its importance matrix."""
    found = {}
    for name, model, tokens in (("dense", wide, 4 * WINDOW), ("experts", wide_experts, 4)):
        folder = tmp_path_factory.mktemp(name)
        pi_gguf.convert(str(model), folder / "exact.gguf", quant="F32", check="none")
        context = 4 if name == "experts" else None
        compute_imatrix(
            str(folder / "exact.gguf"), folder / "matrix.gguf", text=[str(text)], tokens=tokens, context=context
        )
        found[name] = (model, folder / "exact.gguf", folder / "matrix.gguf")
    return found


@pytest.fixture
def matrix(llama, text, tmp_path) -> Path:
    """An importance matrix of the small Llama, for a test to damage."""
    compute_imatrix(str(llama), tmp_path / "matrix.gguf", text=[str(text)], tokens=2 * WINDOW)
    return tmp_path / "matrix.gguf"


# Computing


def in_llama_cpp(path: Path, windows: list[list[int]]) -> SquareSums:
    sums = SquareSums()
    names = {t.name for t in gguf.GGUFReader(path).tensors}
    watch = ProductWatch({name for name in names if name.startswith("blk.")}, sums.add)
    with Model(path, type_k="f32", type_v="f32", flash_attn=False, watch=watch) as lm:
        for ids in windows:
            assert sum(lm.evaluate(ids)) == len(ids)
    return sums


def in_torch(model: Path, windows: list[list[int]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return sums and counts by GGUF name, from hooks on transformers' modules; experts by their own definition."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}

    def add(name: str, matrix: int, matrices: int, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        sums.setdefault(name, np.zeros((matrices, x.shape[1])))[matrix] += (x**2).sum(0).numpy()
        counts.setdefault(name, np.zeros(matrices))[matrix] += len(x)

    def watch_experts(block: str, mlp: Any) -> None:
        experts, many = mlp.experts, mlp.gate.weight.shape[0]

        def before(_: Any, arguments: tuple) -> None:
            x, chosen, _weights = arguments
            for e in range(many):
                rows = x[(chosen == e).any(-1)]
                if len(rows):
                    gate, up = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
                    for part in ("gate", "up"):
                        add(f"{block}.ffn_{part}_exps.weight", e, many, rows)
                    add(f"{block}.ffn_down_exps.weight", e, many, experts.act_fn(gate) * up)

        experts.register_forward_pre_hook(before)
        mlp.gate.register_forward_pre_hook(lambda _, a: add(f"{block}.ffn_gate_inp.weight", 0, 1, a[0]))

    for i, layer in enumerate(hf.model.layers):
        for name, module in layer.named_modules():
            if name in NAMES:
                full = f"blk.{i}.{NAMES[name]}.weight"
                module.register_forward_pre_hook(lambda _, a, full=full: add(full, 0, 1, a[0]))
        if hasattr(layer.mlp, "experts"):
            watch_experts(f"blk.{i}", layer.mlp)
    with torch.inference_mode():
        for ids in windows:
            hf(torch.tensor([ids]))
    return sums, counts


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
def test_the_sums_are_those_of_transformers(family, tmp_path):
    model = make_model(tmp_path / "model", family, {})
    pi_gguf.convert(str(model), tmp_path / "model.gguf", quant="F32", check="none")
    ids = np.random.default_rng(0).integers(2, 410, (2, 520)).tolist()  # more than a batch
    ours = in_llama_cpp(tmp_path / "model.gguf", ids)
    sums, counts = in_torch(model, ids)
    assert set(ours.sums) == set(sums) and len(sums) == 3 * (7 if family == "llama" else 8)
    for name in sums:
        assert ours.counts[name].tolist() == counts[name].tolist(), name
        np.testing.assert_allclose(ours.sums[name], sums[name], rtol=1e-4, err_msg=name)
    per_expert = [counts[name] for name in counts if "exps" in name]
    assert all(c.sum() == 2 * 1040 and len(set(c.tolist())) > 1 for c in per_expert)


def test_the_command_sums_the_windows_of_the_text(llama, text, tmp_path, cli):
    pi_gguf.convert(str(llama), tmp_path / "model.gguf", quant="F32", check="none")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    short = tmp_path / "short.txt"
    short.write_text("too short")
    arguments = ("--text", text, "--text", other, "--text", short, "--tokens", "200")
    code, out, err = cli("imatrix", tmp_path / "model.gguf", tmp_path / "m.gguf", *arguments)
    assert code == 0 and "1 texts are shorter" in err
    assert f"--quant IQ3_XXS --imatrix {tmp_path / 'm.gguf'}" in out and "192 tokens in 3 windows of 64" in out
    with pi_gguf.open(tmp_path / "model.gguf") as lm:
        first, second = (lm.tokenize(p.read_text(), add_special=False) for p in (text, other))
    step = WINDOW - 1
    windows = [[0, *first[:step]], [0, *second[:step]], [0, *first[step : 2 * step]]]
    expected, _ = in_torch(llama, windows)
    matrix = read_imatrix(tmp_path / "m.gguf")
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (3, 64, ["novel.txt", "other.txt"])
    for name, values in expected.items():
        np.testing.assert_allclose(matrix.sums[name], values, rtol=5e-3, err_msg=name)  # the cache is F16
    code, out, _ = cli("imatrix", llama, tmp_path / "n.gguf", *arguments, "--json")
    assert code == 0 and json.loads(out)["windows"] == 3
    again = read_imatrix(tmp_path / "n.gguf")
    assert all((again.sums[name] == matrix.sums[name]).all() for name in matrix.sums)
    assert not list(tmp_path.glob(".*"))


def test_windows_go_round_the_texts():
    class Letters:
        bos = (0,)

        def tokenize(self, text, add_special):
            return [ord(c) for c in text]

    texts = {"a": "a" * 6, "b": "b" * 20, "c": "c" * 2}
    found = list(text_windows(Letters(), texts, 4, 5))
    assert [name for name, _ in found] == ["a", "b", "a", "b", "b"]
    assert {len(ids) for _, ids in found} == {4} and all(ids[0] == 0 for _, ids in found)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "pi_gguf", "imatrix", "bundled:tiny", str(tmp_path / "m.gguf")]
    for wait_for in ("m.gguf.partial/tmp/model/model.gguf", None):
        process = subprocess.Popen([*command, "--tokens", "10000000"], stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 50
            while wait_for and not list(tmp_path.glob(wait_for)) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(3)  # inside llama.cpp, or before
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=50)
        finally:
            process.kill()
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


def test_an_error_inside_llama_cpps_call_is_raised(prepared):
    def fail(*_: Any) -> None:
        raise GgufError("inside")

    watch = ProductWatch({"blk.3.ffn_up.weight"}, fail)
    with Model(prepared["dense"][1], watch=watch) as lm, pytest.raises(GgufError, match="inside"):
        list(lm.evaluate([1, 2, 3]))


def test_inputs_that_are_not_numbers_are_an_error():
    with pytest.raises(GgufError, match=r"blk\.0\.x: its inputs"):
        SquareSums().add("blk.0.x", np.full((2, 1, 4), np.nan, np.float32), None, 1)


def test_another_layout_of_tensors_is_refused(monkeypatch):
    fields = [f for f in watch._Tensor._fields_ if f[0] not in ("op_params", "flags")]
    shifted = type("Shifted", (watch.ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(watch, "_Tensor", shifted)
    watch._products.cache_clear()
    with pytest.raises(OptionError, match=r"lays out a tensor's size, src, view_src, data, name otherwise"):
        ProductWatch(set(), SquareSums().add)
    monkeypatch.undo()
    ProductWatch(set(), SquareSums().add)


# Files


def test_what_is_written_is_read_again_and_is_llama_cpps_format(tmp_path):
    rng = np.random.default_rng(0)
    sums = {"blk.0.a.weight": rng.random((1, 6), np.float32), "blk.0.b_exps.weight": rng.random((3, 4), np.float32)}
    counts = {"blk.0.a.weight": np.float32([7]), "blk.0.b_exps.weight": np.float32([2, 0, 5])}
    written = ImportanceMatrix(tmp_path / "m.gguf", sums, counts, ["a.txt", "b.txt"], 3, 32768)
    write_imatrix(written, "llama")
    found = read_imatrix(tmp_path / "m.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (["a.txt", "b.txt"], 3, 32768)
    for name in sums:
        assert (found.sums[name] == sums[name]).all() and (found.counts[name] == counts[name]).all()
    values = found.importance["blk.0.b_exps.weight"]
    np.testing.assert_array_equal(values[0], sums["blk.0.b_exps.weight"][0] / np.float32(2))
    assert (values[1] == 1).all()
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {t.name: (t.shape.tolist(), t.tensor_type.name) for t in reader.tensors} == {
        "blk.0.a.weight.in_sum2": ([6, 1], "F32"), "blk.0.a.weight.counts": ([1, 1], "F32"),
        "blk.0.b_exps.weight.in_sum2": ([4, 3], "F32"), "blk.0.b_exps.weight.counts": ([1, 3], "F32"),
    }  # fmt: skip
    keys = {key: reader.fields[key] for key in reader.fields if key.startswith(("imatrix", "general.type"))}
    assert {key: field.contents() for key, field in keys.items()} == {
        "general.type": "imatrix", "imatrix.datasets": ["a.txt", "b.txt"], "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 32768,
    }  # fmt: skip
    assert keys["imatrix.chunk_count"].types == keys["imatrix.chunk_size"].types == [gguf.GGUFValueType.UINT32]


# Quantizing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "quant"),
    [
        *(("dense", quant) for quant in (
            "IQ1_M", "IQ2_XXS", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "Q2_K_S", "Q4_K_M",
        )),
        *(("experts", quant) for quant in ("IQ2_XXS", "Q2_K_S", "Q4_K_M")),
    ],
)  # fmt: skip
def test_every_type_has_the_tensors_that_llama_cpp_makes_with_the_same_matrix(prepared, model, quant, tmp_path):
    folder, exact, matrix = prepared[model]
    options = {"quant": quant, "imatrix": str(matrix)}
    pi_gguf.convert(str(folder), tmp_path / "ours.gguf", check="none", **options)
    pi_gguf.quantize(exact, tmp_path / "theirs.gguf", **options)
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
    assert {name: kind for name, (kind, _) in ours.items()} == {name: kind for name, (kind, _) in theirs.items()}
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    stated = []
    for path in ("ours.gguf", "theirs.gguf"):
        fields = gguf.GGUFReader(tmp_path / path).fields
        stated.append({key: (f.types, f.contents()) for key, f in fields.items() if key.startswith("quantize.")})
    assert stated[0] == stated[1]
    assert {key: value for key, (_, value) in stated[0].items()} == {
        "quantize.imatrix.file": "matrix.gguf", "quantize.imatrix.dataset": "novel.txt",
        "quantize.imatrix.entries_count": 56 if model == "dense" else 16,
        "quantize.imatrix.chunks_count": 4 if model == "dense" else 1,
    }  # fmt: skip
    if quant == "Q4_K_M":
        pi_gguf.convert(str(folder), tmp_path / "without.gguf", quant=quant, check="none")
        without = tensors(tmp_path / "without.gguf")
        assert ours["blk.1.attn_q.weight"] != without["blk.1.attn_q.weight"]


def test_some_expert_had_no_token_and_counts_alike(prepared):
    matrix = read_imatrix(prepared["experts"][2])
    without = [name for name, counts in matrix.counts.items() if (counts == 0).any()]
    assert without and all("exps" in name for name in without)
    name = without[0]
    assert (matrix.importance[name][matrix.counts[name] == 0] == 1).all()


def test_a_dry_run_with_a_matrix_is_exact(prepared, tmp_path):
    model, _, matrix = prepared["dense"]
    options = {"quant": "IQ2_M", "imatrix": str(matrix), "check": "none"}
    planned = pi_gguf.convert(str(model), tmp_path / "out.gguf", dry_run=True, **options)
    pi_gguf.convert(str(model), tmp_path / "out.gguf", **options)
    assert (tmp_path / "out.gguf").stat().st_size == planned.nbytes


def test_another_matrix_does_not_go_on(llama, matrix, tmp_path, monkeypatch):
    from pi_gguf.write import writer

    encode, left = writer._encode, [12]

    def stop_later(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(*arguments)

    options = {"quant": "Q4_0", "imatrix": str(matrix), "check": "none"}
    monkeypatch.setattr(writer, "_encode", stop_later)
    with pytest.raises(KeyboardInterrupt):
        pi_gguf.convert(str(llama), tmp_path / "out.gguf", **options)
    monkeypatch.undo()
    before = read_imatrix(matrix)
    write_imatrix(replace(before, sums={name: v * 2 for name, v in before.sums.items()}), "llama")  # the same keys
    with pytest.raises(OptionError, match="what the importance matrix was before it changed"):
        pi_gguf.convert(str(llama), tmp_path / "out.gguf", **options)
    write_imatrix(before, "llama")
    pi_gguf.convert(str(llama), tmp_path / "out.gguf", **options)
    pi_gguf.convert(str(llama), tmp_path / "whole.gguf", **options)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# Refusals


def refuse(cli, folder: Path, *arguments: Any, code: int, says: list[str], hint: str = "") -> None:
    before = sorted(folder.iterdir())
    got, _, err = cli(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert got == code and len(errors) == 1 and "Traceback" not in err, err
    assert all(text in errors[0] for text in says), errors[0]
    assert hint in err.splitlines()[-1]
    assert sorted(folder.iterdir()) == before


def change(path: Path, **arrays: Any) -> None:
    """Write the matrix again with other arrays, by names whose dots are double underscores; None leaves one out."""
    values = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    values |= {name.replace("__", "."): array for name, array in arrays.items()}
    from pi_gguf.gguf.file import write_values

    keys = {"general.type": "imatrix", "imatrix.datasets": ["x"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 64}
    write_values(path, "llama", keys, {name: np.array(v) for name, v in values.items() if v is not None})


DAMAGES = {
    "NaN": ({"blk__1__ffn_up__weight__in_sum2": np.full((1, 64), np.nan)}, ["blk.1.ffn_up.weight.in_sum2", "nan"]),
    "infinity": ({"blk__1__ffn_up__weight__counts": [[np.inf]]}, ["blk.1.ffn_up.weight.counts", "inf"]),
    "negative": ({"blk__1__ffn_up__weight__in_sum2": np.full((1, 64), -2.5)}, ["blk.1.ffn_up.weight", "-2.5"]),
    "no counts": ({"blk__1__ffn_up__weight__counts": None}, ["blk.1.ffn_up.weight.counts is missing"]),
    "counts do not divide": ({"blk__1__ffn_up__weight__counts": np.ones((3, 1))}, ["3 counts for 64 sums"]),
    "columns": (
        {"blk__1__ffn_up__weight__in_sum2": np.ones((1, 32))},
        ["blk.1.ffn_up.weight must have 1 x 64 columns", "got 1 x 32"],
    ),
    "matrices": (
        {"blk__1__ffn_up__weight__counts": np.ones((2, 1))},
        ["blk.1.ffn_up.weight must have 1 x 64 columns", "got 2 x 32"],
    ),
    "missing tensor": (
        {"blk__1__ffn_up__weight__in_sum2": None, "blk__1__ffn_up__weight__counts": None},
        ["blk.1.ffn_up.weight of", "is missing"],
    ),
    "another model": (
        {"blk__7__ffn_up__weight__in_sum2": np.ones((1, 64)), "blk__7__ffn_up__weight__counts": np.ones((1, 1))},
        ["blk.7.ffn_up.weight is no tensor of", "another model"],
    ),
    "one part only": ({"odd": np.ones((1, 1))}, ["missing"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_matrix_that_does_not_fit_is_refused(cli, llama, matrix, tmp_path, damage):
    arrays, says = DAMAGES[damage]
    pi_gguf.convert(str(llama), tmp_path / "exact.gguf", quant="F32", check="none")
    change(matrix, **arrays)
    for verb, source in (("convert", llama), ("quantize", tmp_path / "exact.gguf")):
        arguments = (verb, source, tmp_path / "out.gguf", "--quant", "Q4_0", "--imatrix", matrix)
        refuse(cli, tmp_path, *arguments, code=6, says=[str(matrix), *says], hint="pi-gguf imatrix")


def test_a_file_that_is_no_matrix_is_refused(cli, llama, matrix, tmp_path):
    data = matrix.read_bytes()
    exact, old, cut = tmp_path / "exact.gguf", tmp_path / "imatrix.dat", tmp_path / "cut.gguf"
    pi_gguf.convert(str(llama), exact, quant="F32", check="none")
    old.write_bytes(b"\x07\x00\x00\x00" + bytes(100))
    for path, said, hint in (
        (exact, "general.type must be imatrix, got 'model'", "pi-gguf imatrix"),
        (old, "neither GGUF nor the older form", "pi-gguf imatrix"),
        (tmp_path / "none.gguf", "No such file", "spelling"),
        (tmp_path, "cannot be read", "spelling"),
    ):
        arguments = ("convert", llama, tmp_path / "out.gguf", "--quant", "Q4_0", "--imatrix", path)
        refuse(cli, tmp_path, *arguments, code=6, says=[str(path), said], hint=hint)
    for length in range(4, len(data) - 32, len(data) // 40):
        cut.write_bytes(data[:length])
        with pytest.raises(GgufError, match=r"cut\.gguf"):
            read_imatrix(cut)


def test_a_type_that_needs_a_matrix_names_the_command(cli, llama, matrix, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "exact.gguf", quant="F32", check="none")
    out = tmp_path / "out.gguf"
    assert len(quantizer.NEED_IMPORTANCE_MATRIX) == 9
    for quant in quantizer.NEED_IMPORTANCE_MATRIX:
        for verb, source in (("convert", llama), ("quantize", tmp_path / "exact.gguf")):
            arguments = (verb, source, out, "--quant", quant)
            refuse(cli, tmp_path, *arguments, code=2, says=[quant, "importance matrix"], hint="pi-gguf imatrix")
    refuse(
        cli, tmp_path, "convert", llama, out, "--quant", "F16", "--imatrix", matrix, code=2,
        says=["imatrix is for quantized files, quant is F16"],
    )  # fmt: skip


@pytest.mark.parametrize("pattern", ["attn_q", "token_embd"])
def test_a_type_of_a_tensor_that_needs_a_matrix_is_refused_without(cli, wide, tmp_path, pattern):
    arguments = ("convert", wide, tmp_path / "out.gguf", "--quant", "Q4_0", "--tensor-type", f"{pattern}=IQ2_XXS")
    refuse(cli, tmp_path, *arguments, code=2, says=[pattern, "IQ2_XXS"], hint="pi-gguf imatrix")


def test_options_of_imatrix_that_cannot_work_are_refused(cli, llama, text, tmp_path):
    model = tmp_path / "model.gguf"
    pi_gguf.convert(str(llama), model, quant="F32", check="none")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for options, code, said in (
        (("--context", "65"), 2, "context must be at most the model's window of 64 tokens, got 65"),
        (("--context", "0"), 2, "context must be at least 1, got 0"),
        (("--tokens", "63"), 2, "tokens must be at least a window of 64, got 63"),
        (("--text", short), 5, "fewer than the window of 64"),
        (("--text", tmp_path / "none.txt"), 5, "no such file"),
        (("--device", "tpu"), 2, "device must be"),
    ):
        arguments = ("--text", text, *options) if "--text" not in options else options
        refuse(cli, tmp_path, "imatrix", model, tmp_path / "m.gguf", *arguments, code=code, says=[said])
    refuse(cli, tmp_path, "imatrix", model, tmp_path / "m.bin", code=2, says=["must end in .gguf"])
    refuse(cli, tmp_path, "imatrix", model, model, "--overwrite", code=2, says=["the same file"])
    (tmp_path / "m.gguf").write_bytes(b"old")
    refuse(cli, tmp_path, "imatrix", model, tmp_path / "m.gguf", code=2, says=["exists"])
    assert (tmp_path / "m.gguf").stat().st_size == 3


def test_a_model_that_computes_no_numbers_is_an_error(llama_copy, text, tmp_path):
    from safetensors.torch import load_file, save_file

    path = llama_copy / "model.safetensors"
    values = load_file(path)
    values["model.layers.0.post_attention_layernorm.weight"] *= 1e37
    save_file(values, path, {"format": "pt"})
    with pytest.raises(GgufError, match=r"blk\.0\.ffn_.* its inputs or their squares"):
        compute_imatrix(str(llama_copy), tmp_path / "m.gguf", text=[str(text)], tokens=WINDOW)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


# llama.cpp's older form


def older_form(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    """Return bytes as llama-imatrix wrote them before GGUF: per entry a name, its calls, and means times the calls."""
    parts = [len(entries).to_bytes(4, "little")]
    for name, (calls, means) in entries.items():
        parts += [len(name).to_bytes(4, "little"), name.encode(), calls.to_bytes(4, "little")]
        parts += [means.size.to_bytes(4, "little"), (means * max(1, calls)).astype("<f4").tobytes()]
    return b"".join([*parts, tail])


def test_the_older_form_gives_the_same_file_as_gguf(llama, matrix, tmp_path):
    new = read_imatrix(matrix)
    old = tmp_path / "imatrix.dat"
    entries = {name: (4, values) for name, values in new.importance.items()}
    old.write_bytes(older_form(entries, (12).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"words.txt"))
    read = read_imatrix(old)
    assert (read.chunks, read.datasets) == (12, ["words.txt"])
    assert read.importance.keys() == new.importance.keys()
    for name, values in read.importance.items():
        assert np.array_equal(values, new.importance[name])  # by four and back is exact
    files = {}
    for path in (matrix, old):
        files[path] = tmp_path / f"{path.name}.out.gguf"
        pi_gguf.convert(str(llama), files[path], quant="Q4_0", imatrix=str(path), check="none", certify=False)
    data = {path: {t.name: t.data.tobytes() for t in gguf.GGUFReader(out).tensors} for path, out in files.items()}
    assert data[matrix] == data[old]
    keys = gguf.GGUFReader(files[old]).fields
    assert keys["quantize.imatrix.dataset"].contents() == "words.txt"
    assert keys["quantize.imatrix.chunks_count"].contents() == 12


def test_the_older_form_may_end_behind_its_entries_and_state_no_calls(tmp_path):
    path, values = tmp_path / "x.dat", np.arange(6, dtype=np.float32)
    for tail in (b"", (3).to_bytes(4, "little"), (3).to_bytes(4, "little") + bytes(4)):
        path.write_bytes(older_form({"blk.0.ffn_up.weight": (0, values)}, tail))
        read = read_imatrix(path)
        assert np.array_equal(read.importance["blk.0.ffn_up.weight"], values[None])
        assert (read.chunks, read.datasets) == (3 if tail else 0, [])


def test_an_older_form_cut_or_with_numbers_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "x.dat"
    whole = older_form({"blk.0.ffn_up.weight": (2, np.ones(6)), "blk.1.ffn_up.weight": (2, np.ones(6))})
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError, match="no importance matrix"):
            read_imatrix(path)
    for at in (0, 4, 31):  # entries, length of a name, values
        for number in (0, 2**31 - 1, 2**32 - 1):
            path.write_bytes(whole[:at] + number.to_bytes(4, "little") + whole[at + 4 :])
            with pytest.raises(GgufError, match="no importance matrix"):
                read_imatrix(path)
    path.write_bytes(older_form({"blk.0.ffn_up.weight": (2, np.array([1.0, np.nan]))}))
    with pytest.raises(GgufError, match="must hold numbers from 0 on, got nan"):
        read_imatrix(path)
