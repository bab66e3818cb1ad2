"""One pass: the bytes are llama.cpp's own, the plan is exact, and a run that was killed ends in the same file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from helpers import make_llama, tensors
from safetensors.torch import load_file, save_file

import pi_gguf
from pi_gguf import bundled
from pi_gguf.errors import CheckpointError, OptionError

MIXTURES = [
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
    "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_M",
]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole K-quant blocks, with nine layers, as mixtures differ by layer; bfloat16, shards."""
    return make_llama(
        tmp_path_factory.mktemp("wide") / "model", dtype="bfloat16", max_shard_size="2MB", hidden_size=256,
        intermediate_size=512, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact") / "exact.gguf"
    pi_gguf.convert(str(wide), path, quant="F32", check="none")
    return path


@pytest.mark.parametrize("quant", MIXTURES)
def test_every_type_has_the_tensors_that_llama_cpp_makes_of_the_exact_file(wide, exact, tmp_path, quant):
    pi_gguf.convert(str(wide), tmp_path / "ours.gguf", quant=quant, check="none")
    pi_gguf.quantize(exact, tmp_path / "theirs.gguf", quant=quant)
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
    assert {name: kind for name, (kind, _) in ours.items()} == {name: kind for name, (kind, _) in theirs.items()}
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.gguf", "theirs.gguf"]


@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_a_dry_run_is_exact_to_the_byte_and_writes_nothing(cli, wide, tmp_path, quant):
    arguments = ("convert", wide, tmp_path / "out.gguf", "--quant", quant, "--context", "128", "--steps", "0")
    arguments += ("--check", "none", "--certify")
    code, out, _ = cli(*arguments, "--dry-run", "--json")
    assert code == 0 and list(tmp_path.iterdir()) == []
    planned = json.loads(out)
    assert cli(*arguments)[0] == 0
    assert (tmp_path / "out.gguf").stat().st_size == planned["nbytes"], "the certificate included"
    written = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert [[t.name, t.tensor_type.name, t.n_bytes] for t in written] == [[t[0], *t[2:]] for t in planned["tensors"]]
    code, out, _ = cli(*arguments, "--dry-run")
    assert code == 0 and f"{planned['nbytes']:,} bytes" in out and "nothing was written" in out


def test_a_dry_run_of_a_fine_tune_is_exact_too(cli, llama, tmp_path):
    (tmp_path / "novel.txt").write_text(next(iter(bundled.novels("train").values()))[:6000])
    arguments = (
        "convert", llama, tmp_path / "out.gguf", "--quant", "Q8_0", "--context", "128", "--steps", "2",
        "--batch-tokens", "128", "--data", tmp_path / "novel.txt",
    )  # fmt: skip
    planned = json.loads(cli(*arguments, "--dry-run", "--json")[1])
    assert cli(*arguments)[0] == 0
    assert (tmp_path / "out.gguf").stat().st_size == planned["nbytes"], "the certificate included"


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_a_model_in_several_files_is_the_same_model(cli, wide, tmp_path, quant):
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    convert = ("convert", wide, "--quant", quant, "--context", "128", "--steps", "0")
    assert cli(*convert, whole, "--check", "none")[0] == 0
    limit = whole.stat().st_size // 3
    planned = json.loads(cli(*convert, out, "--split-max-size", str(limit), "--dry-run", "--json")[1])
    code, text, err = cli(*convert, out, "--split-max-size", str(limit), "--json")
    assert code == 0, err
    result = json.loads(text)
    names = sorted(path.name for path in tmp_path.glob("out*"))
    assert len(names) >= 3 and names[0] == f"out-00001-of-{len(names):05}.gguf"
    assert result["files"] == [str(tmp_path / name) for name in names] and result["path"] == result["files"][0]
    assert [[name, Path(name).stat().st_size] for name in result["files"]] == planned["files"]
    assert max(nbytes for _, nbytes in planned["files"]) <= limit
    parts = [tensors(tmp_path / name) for name in names]
    assert {name: data for part in parts for name, data in part.items()} == tensors(whole)
    assert result["checks"][0]["prompt_tokens"] > 64  # llama.cpp opened it by the first file
    code, _, err = cli(*convert, out, "--split-max-size", str(limit))
    assert code == 2 and f"{names[0]}: exists" in err
    assert pi_gguf.convert(str(wide), out, quant=quant, check="none", split_max_size="1G").files == [str(out)]


@pytest.mark.parametrize(("size", "says"), [("2,5G", "such as 500M or 4G"), ("0", "such as"), ("9K", "at least")])
def test_a_size_of_files_that_cannot_be(cli, wide, tmp_path, size, says):
    code, _, err = cli("convert", wide, tmp_path / "out.gguf", "--split-max-size", size)
    assert code == 2 and says in err and not list(tmp_path.iterdir())


def test_types_of_single_tensors_can_be_chosen(wide, tmp_path):
    pi_gguf.convert(
        str(wide),
        tmp_path / "out.gguf",
        quant="Q4_K_M",
        check="none",
        tensor_type=[r"blk\.[0-3]\.attn_v=f16", "ffn=q5_1"],
    )
    kinds = {name: kind for name, (kind, _) in tensors(tmp_path / "out.gguf").items()}
    assert [kinds[f"blk.{i}.attn_v.weight"] for i in (0, 3)] == ["F16", "F16"]
    assert kinds["blk.4.attn_v.weight"] in ("Q4_K", "Q6_K")  # llama.cpp's own choice
    assert {kinds[f"blk.{i}.ffn_{part}.weight"] for i in range(9) for part in ("up", "gate", "down")} == {"Q5_1"}


@pytest.mark.parametrize("wrong", ["attn_v", "=Q8_0", "attn_v=Q9", "(=Q8_0"])
def test_a_wrong_tensor_type_is_an_error(cli, llama, tmp_path, wrong):
    code, _, err = cli("convert", llama, tmp_path / "out.gguf", "--tensor-type", wrong)
    assert code == 2 and "tensor-type" in err and wrong.split("=")[0] in err
    assert list(tmp_path.iterdir()) == []


# Going on after a kill

DRIVER = """
import os, random, resource, signal, sys, time
import torch, llama_cpp, transformers
from transformers import AutoTokenizer, LlamaForCausalLM  # once, and not in every attempt
from pi_gguf.pipeline.convert import convert

def attempt(model, out, quant, prepare):
    child = os.fork()
    if child == 0:
        prepare()
        convert(model, out, quant=quant, check="none")
        os._exit(0)
    return child

def limited(nbytes):
    def prepare():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    return prepare

model, out, quant, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
random.seed(0)
if quant == "F16":  # the kernel kills at a random byte of the file
    for nbytes in sorted(random.randrange(size) for _ in range(20)):
        _, status = os.waitpid(attempt(model, out, quant, limited(nbytes)), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ, (nbytes, status)
        assert not os.path.exists(out)
else:  # a kill at a random moment
    for _ in range(20):
        child = attempt(model, out, quant, lambda: None)
        time.sleep(random.random() * float(sys.argv[5]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if os.path.exists(out):
            os.remove(out)
_, status = os.waitpid(attempt(model, out, quant, lambda: None), 0)
assert status == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_twenty_kills_end_in_the_same_file(wide, tmp_path, quant):
    whole, killed = tmp_path / "whole.gguf", tmp_path / "killed.gguf"
    pi_gguf.convert(str(wide), whole, quant=quant, check="none")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(wide), str(killed), quant, str(whole.stat().st_size), "0.5"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.gguf", "whole.gguf"]
    if quant == "F16":
        went_on = [int(line.split(": ")[1].split()[0]) for line in done.stderr.splitlines() if line.startswith("go on")]
        assert len(went_on) >= 15 and went_on == sorted(went_on) and went_on[-1] > 50


@pytest.fixture
def stopped(llama_copy, tmp_path, monkeypatch):
    """A conversion that was stopped after some tensors, and the file it should have become."""
    from pi_gguf.write import writer

    pi_gguf.convert(str(llama_copy), tmp_path / "whole.gguf", quant="Q8_0", check="none")
    encode, left = writer._encode, [12]

    def stop_later(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(writer, "_encode", stop_later)
    with pytest.raises(KeyboardInterrupt):
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="Q8_0", check="none")
    monkeypatch.undo()
    assert not (tmp_path / "out.gguf").exists()
    return llama_copy, tmp_path / "out.gguf", tmp_path / "whole.gguf"


def test_a_stopped_conversion_goes_on_behind_the_last_whole_tensor(stopped, capfd):
    model, out, whole = stopped
    pi_gguf.convert(str(model), out, quant="Q8_0", check="none")
    assert "of 21 tensors are there" in capfd.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name("out.gguf.partial").exists()


@pytest.mark.parametrize("damage", ["a byte of data", "cut off", "state cut off", "no state", "a byte of the header"])
def test_what_is_left_may_be_damaged(stopped, damage):
    model, out, whole = stopped
    partial = out.with_name("out.gguf.partial") / "out.gguf"
    state = partial.with_name("out.gguf.state")
    data = bytearray(partial.read_bytes())
    if damage == "a byte of data":
        data[-3000] ^= 1
        partial.write_bytes(data)
    elif damage == "a byte of the header":
        data[100] ^= 1
        partial.write_bytes(data)
    elif damage == "cut off":
        partial.write_bytes(data[:-100])
    elif damage == "state cut off":
        state.write_text(state.read_text()[:-5])
    else:
        state.unlink()
    pi_gguf.convert(str(model), out, quant="Q8_0", check="none")
    assert out.read_bytes() == whole.read_bytes()


def test_a_source_that_changed_is_an_error_and_not_a_mixture(stopped):
    model, out, whole = stopped
    weights = model / "model.safetensors"
    values = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**values, name: values[name] * 2}, weights, {"format": "pt"})
    with pytest.raises(OptionError, match=r"unfinished conversion of what model.safetensors was before it changed"):
        pi_gguf.convert(str(model), out, quant="Q8_0", check="none")
    assert not out.exists() and (out.with_name("out.gguf.partial") / "out.gguf").exists()
    pi_gguf.convert(str(model), out, quant="Q8_0", check="none", overwrite=True)
    assert tensors(out)["blk.0.ffn_up.weight"] != tensors(whole)["blk.0.ffn_up.weight"]


def test_a_source_that_is_replaced_while_it_is_read_leaves_nothing(llama_copy, tmp_path, monkeypatch):
    from pi_gguf.write import writer

    weights, encode = llama_copy / "model.safetensors", writer._encode

    def replace(output, *arguments):
        weights.with_suffix(".new").write_bytes(weights.read_bytes())
        weights.with_suffix(".new").replace(weights)
        return encode(output, *arguments)

    monkeypatch.setattr(writer, "_encode", replace)
    with pytest.raises(CheckpointError, match=r"model.safetensors changed while it was read"):
        pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="Q8_0", check="none")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_other_settings_do_not_go_on(stopped):
    model, out, whole = stopped
    with pytest.raises(OptionError, match="other settings"):
        pi_gguf.convert(str(model), out, quant="Q5_0", check="none")
    pi_gguf.convert(str(model), out, quant="Q8_0", check="none")  # the first command still does
    assert out.read_bytes() == whole.read_bytes()


def test_a_weight_that_is_not_a_number_leaves_nothing(llama_copy, tmp_path):
    weights = llama_copy / "model.safetensors"
    for value, said in ((float("nan"), "NaN"), (float("inf"), "NaN or infinity"), (7e4, "beyond F16")):
        values = load_file(weights)
        values["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(values, weights, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"model.layers.1.mlp.up_proj.weight holds .*{said}"):
            pi_gguf.convert(str(llama_copy), tmp_path / "out.gguf", quant="F16", check="none")
        assert [p.name for p in tmp_path.iterdir()] == ["copy"]
        values["model.layers.1.mlp.up_proj.weight"] = torch.zeros_like(values["model.layers.1.mlp.up_proj.weight"])
        save_file(values, weights, {"format": "pt"})


LIMITED = """
import json, resource, signal, sys
from pi_gguf.pipeline.convert import convert

model, out, nbytes, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
convert(model, out, **arguments)
"""


def test_a_model_in_several_files_goes_on_where_it_was_killed(wide, tmp_path):
    def sizes(limit: int) -> list[int]:
        options = {"quant": "F16", "check": "none", "split_max_size": str(limit), "dry_run": True}
        planned = pi_gguf.convert(str(wide), tmp_path / "x.gguf", **options)
        return [nbytes for _, nbytes in planned.files]

    limit = next(limit for limit in range(400_000, 900_000, 50_000) if max(sizes(limit)) > sizes(limit)[0])
    arguments = {"quant": "F16", "check": "none", "split_max_size": str(limit)}
    command = [sys.executable, "-c", LIMITED, str(wide), str(tmp_path / "two.gguf"), str(max(sizes(limit)) - 1000)]
    killed = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr[-2000:]  # by the kernel, in a file behind the first
    assert [path.name for path in tmp_path.iterdir()] == ["two.gguf.partial"]
    first, *rest = sorted((tmp_path / "two.gguf.partial").glob("*.gguf"))
    assert rest and first.stat().st_size == sizes(limit)[0]
    begun = first.stat().st_ino
    two = pi_gguf.convert(str(wide), tmp_path / "two.gguf", **arguments).files
    assert Path(two[0]).stat().st_ino == begun
    one = pi_gguf.convert(str(wide), tmp_path / "one.gguf", **arguments).files
    assert [Path(path).read_bytes() for path in one] == [Path(path).read_bytes() for path in two]
    assert not list(tmp_path.glob("*.partial"))
