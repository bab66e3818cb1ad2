"""Hostile input: damaged checkpoints, files, options and disks end in an exit code and one clear line, and in nothing
else. Every case goes through the real command line on a real small model.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import WINDOW, contents, make_llama

pytestmark = pytest.mark.usefixtures("never_a_hang")

OPTION, CHECKPOINT, UNSUPPORTED, TEXT, GGUF, RESOURCE = 2, 3, 4, 5, 6, 8
"""Exit codes, as the table in `pi_gguf/errors.py` has them."""

ABSENT = object()
OLD_FILE = b"what was there before"


# What every case needs


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The random Llama in several shards with an index. Not to be changed by a test."""
    path = make_llama(tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def sharded_copy(sharded, tmp_path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "sharded"))


@pytest.fixture
def out_folder(tmp_path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def assert_error(result: tuple[int, str, str], code: int, *says: Any, hint: str | None = None) -> None:
    """Check exit code, the `error:` line and the `hint:` line of a run of the command line."""
    got, out, err = result
    assert got == code, f"exit code {got}, not {code}: {out}{err}"
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors, f"no line begins with error: in {err!r}"
    for text in says:
        assert str(text) in errors[0]
    if hint is not None:
        hints = [line for line in err.splitlines() if line.startswith("hint:")]
        assert hints and hint in hints[0], f"no hint with {hint!r} in {err!r}"


def assert_not_converted(
    cli, model, folder: Path, code: int, *says: Any, hint: str | None = None, options: tuple = ()
) -> None:
    """Check that a conversion is refused and leaves `folder` as it was, with and without an older file in the way."""
    out = folder / "model.gguf"
    chosen = ("--context", "256", "--steps", "0", "--check", "none", "--quant", "F32", *options)
    before = contents(folder)
    assert_error(cli("convert", model, out, *chosen), code, *says, hint=hint)
    assert contents(folder) == before
    out.write_bytes(OLD_FILE)
    assert_error(cli("convert", model, out, *chosen, "--overwrite"), code, *says, hint=hint)
    assert contents(folder) == {**before, "model.gguf": OLD_FILE}


def edit_config(model: Path, **changes: Any) -> Path:
    """Set fields of config.json; `ABSENT` removes one."""
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    return path


def edit_tokenizer(model: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = model / "tokenizer.json"
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))
    return path


def edit_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def cut(path: Path, length: int) -> Path:
    data = path.read_bytes()
    assert length < len(data)
    path.write_bytes(data[:length])
    return path


@pytest.mark.parametrize("share", [{}, [], "", "half", -0.5, True])
def test_a_share_of_rotation_that_is_no_number_is_refused(cli, llama_copy, out_folder, share):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    edit_config(llama_copy, rope_parameters=rope)
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, "partial_rotary_factor", hint="")


def test_a_tokenizer_that_breaks_with_the_first_text_is_refused(cli, llama_copy, out_folder):
    out, settings = out_folder / "model.gguf", llama_copy / "tokenizer_config.json"
    sound = settings.read_text()
    for length in ("x", {}, [1]):  # it says nothing of a file
        settings.write_text(json.dumps({**json.loads(sound), "model_max_length": length}))
        assert cli("convert", llama_copy, out, "--quant", "F32", "--dry-run")[0] == 0
    settings.write_text(sound)
    edit_tokenizer(llama_copy, lambda parsed: parsed["post_processor"]["special_tokens"].clear())
    assert_error(cli("convert", llama_copy, out, "--quant", "F32", "--dry-run"), CHECKPOINT, "does not open")


def test_the_unharmed_model_converts(cli, llama_copy, out_folder):
    """Without this, every refusal below could come from the model of the tests."""
    out = out_folder / "model.gguf"
    code, _, err = cli("convert", llama_copy, out, "--context", "256", "--steps", "0", "--check", "none")
    assert code == 0, err
    assert list(contents(out_folder)) == ["model.gguf"]


# Weights


def test_a_shard_that_the_index_names_is_missing(cli, sharded_copy, out_folder):
    shard = sorted(sharded_copy.glob("*.safetensors"))[1]
    shard.unlink()
    index = sharded_copy / "model.safetensors.index.json"
    assert_not_converted(cli, sharded_copy, out_folder, CHECKPOINT, index, shard.name, hint="download")


def test_a_shard_is_truncated(cli, sharded_copy, out_folder):
    shard = cut(sorted(sharded_copy.glob("*.safetensors"))[1], 50_000)
    assert_not_converted(cli, sharded_copy, out_folder, CHECKPOINT, shard, "truncated", hint="download")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("garbage {", "no readable JSON", id="the index is garbage"),
        pytest.param("", "no readable JSON", id="the index is empty"),
        pytest.param("[" * 100_000, "no readable JSON", id="the index is nested without end"),
        pytest.param("[]", "JSON object", id="the index is a list"),
        pytest.param("{}", "weight_map", id="the index has no weight_map"),
        pytest.param('{"weight_map": ["a"]}', "weight_map", id="the weight_map is a list"),
        pytest.param('{"weight_map": {"lm_head.weight": 7}}', "weight_map", id="the weight_map names a number"),
    ],
)
def test_the_index_is_broken(cli, sharded_copy, out_folder, text, says):
    index = sharded_copy / "model.safetensors.index.json"
    index.write_text(text)
    assert_not_converted(cli, sharded_copy, out_folder, CHECKPOINT, index, says)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../model.safetensors", id="outside the folder"),
        pytest.param("/etc/passwd", id="an absolute path"),
        pytest.param("", id="no name"),
        pytest.param("a\0b", id="a zero byte"),
        pytest.param("a" * 300, id="a name longer than a file's can be"),
        pytest.param("\ud800", id="a character that no file's name can hold"),
    ],
)
def test_the_index_names_what_cannot_be_a_shard(cli, sharded_copy, out_folder, name):
    index = sharded_copy / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    parsed["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(parsed))
    assert_not_converted(cli, sharded_copy, out_folder, CHECKPOINT, index)


@pytest.mark.parametrize("length", [0, 5, 300, 200_000, -1])
def test_the_weights_are_truncated(cli, llama_copy, out_folder, length):
    path = llama_copy / "model.safetensors"
    cut(path, length if length >= 0 else path.stat().st_size + length)
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, "truncated", hint="download")


def test_the_weights_are_a_folder(cli, llama_copy, out_folder):
    path = llama_copy / "model.safetensors"
    path.unlink()
    path.mkdir()
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path)


def test_there_are_no_weights(cli, llama_copy, out_folder):
    (llama_copy / "model.safetensors").unlink()
    assert_not_converted(
        cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "model.safetensors", hint="model.safetensors"
    )


class CreatesAFile:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_only_pickled_weights_are_there_and_they_are_not_unpickled(cli, llama_copy, out_folder, tmp_path):
    marker = tmp_path / "executed"
    pickled = pickle.dumps(CreatesAFile(marker))
    pickle.loads(pickled)
    marker.unlink()  # it was there: the pickle does what it says
    (llama_copy / "model.safetensors").unlink()
    (llama_copy / "pytorch_model.bin").write_bytes(pickled)
    assert_not_converted(
        cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "model.safetensors", hint="safe_serialization=True"
    )
    assert not marker.exists()


def test_a_tensor_is_missing(cli, llama_copy, out_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama_copy, lambda tensors: tensors.pop(name))
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, llama_copy, name, "missing", hint="download")


def test_a_tensor_is_unknown(cli, llama_copy, out_folder):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    path = edit_weights(llama_copy, lambda tensors: tensors.update({name: tensors["model.norm.weight"].clone()}))
    assert_not_converted(cli, llama_copy, out_folder, UNSUPPORTED, path, name, hint="merge adapters")


@pytest.mark.parametrize(
    ("changes", "name", "wanted", "hint"),
    [
        ({"intermediate_size": 97}, "model.layers.0.mlp.down_proj.weight", [64, 97], "config.json and weights"),
        ({"vocab_size": 411}, "lm_head.weight", [411, 64], "set vocab_size to 410"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight", [128, 64], "config.json and weights"),
        ({"head_dim": ABSENT}, "model.layers.0.self_attn.k_proj.weight", [32, 64], "config.json and weights"),
    ],
)
def test_a_shape_contradicts_the_config(cli, llama_copy, out_folder, changes, name, wanted, hint):
    edit_config(llama_copy, **changes)
    path = llama_copy / "model.safetensors"
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, name, f"{wanted}", hint=hint)


def test_a_tensor_is_transposed(cli, llama_copy, out_folder):
    name = "model.layers.0.mlp.down_proj.weight"
    path = edit_weights(llama_copy, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, name, "[64, 96]", "[96, 64]")


def test_a_tensor_is_of_integers(cli, llama_copy, out_folder):
    name = "model.layers.0.mlp.down_proj.weight"
    path = edit_weights(llama_copy, lambda tensors: tensors.update({name: tensors[name].int()}))
    assert_not_converted(cli, llama_copy, out_folder, UNSUPPORTED, path, name, "I32")


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_is_not_a_finite_number(cli, llama_copy, out_folder, value, quant):
    name = "model.layers.1.mlp.down_proj.weight"
    path = edit_weights(llama_copy, lambda tensors: tensors[name][5].fill_(value))
    assert_not_converted(
        cli, llama_copy, out_folder, CHECKPOINT, path, name, hint="damaged", options=("--quant", quant)
    )


def test_a_norm_holds_nan(cli, llama_copy, out_folder):
    path = edit_weights(llama_copy, lambda tensors: tensors["model.norm.weight"][:1].fill_(float("nan")))
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, "model.norm.weight", hint="damaged")


def test_a_weight_is_beyond_f16(cli, llama_copy, out_folder):
    name = "lm_head.weight"
    path = edit_weights(llama_copy, lambda tensors: tensors[name][7].fill_(1e5))
    assert_not_converted(
        cli, llama_copy, out_folder, CHECKPOINT, path, name, "65504", hint="--quant BF16", options=("--quant", "F16")
    )
    out = out_folder / "wide.gguf"
    for quant in ("BF16", "F32"):  # what the hint says
        assert cli("convert", llama_copy, out, "--quant", quant, "--check", "none", "--overwrite")[0] == 0


# config.json

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(None, "config.json is missing", id="missing"),
        pytest.param("", "no readable JSON", id="empty"),
        pytest.param("{'model_type': 'llama'}", "no readable JSON", id="not JSON"),
        pytest.param(b"\xff\xfe\x00", "no readable JSON", id="not text"),
        pytest.param('{"a":' * 100_000, "no readable JSON", id="nested without end"),
        pytest.param('["llama"]', "JSON object, got list", id="a list"),
        pytest.param("7", "JSON object, got int", id="a number"),
    ],
)
def test_the_config_is_not_a_json_object(cli, llama_copy, out_folder, text, says):
    path = llama_copy / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path if text is not None else llama_copy, says)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [ABSENT, 0, "many", 64.5, True])
def test_a_size_is_not_a_positive_integer(cli, llama_copy, out_folder, name, value):
    path = edit_config(llama_copy, **{name: value})
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, f"{name} must be a positive integer")


@pytest.mark.parametrize(
    ("value", "got"),
    [
        pytest.param(ABSENT, "nothing", id="absent"),
        pytest.param("long", "'long'", id="a string"),
        pytest.param(0, "0", id="zero"),
        pytest.param(-64, "-64", id="negative"),
        pytest.param(True, "True", id="true"),
        pytest.param(64.5, "64.5", id="a fraction"),
        pytest.param([64], "[64]", id="a list"),
    ],
)
def test_the_window_is_not_a_positive_integer(cli, llama_copy, out_folder, value, got):
    path = edit_config(llama_copy, max_position_embeddings=value)
    says = f"max_position_embeddings must be a positive integer, got {got}"
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, says, hint="config")


@pytest.mark.parametrize("value", [2**32, pytest.param(10**400, id="1 and 400 zeros")])
def test_the_window_is_too_large_for_a_gguf_file(cli, llama_copy, out_folder, value):
    path = edit_config(llama_copy, max_position_embeddings=value)
    out = out_folder / "model.gguf"
    result = cli("convert", llama_copy, out, "--quant", "F32", "--check", "none")
    assert_error(result, CHECKPOINT, path, "max_position_embeddings")
    assert contents(out_folder) == {}


@pytest.mark.parametrize("value", ["mamba", ABSENT, None, ["llama"]])
def test_the_model_type_is_not_handled(cli, llama_copy, out_folder, value):
    path = edit_config(llama_copy, model_type=value)
    assert_not_converted(
        cli, llama_copy, out_folder, UNSUPPORTED, path, "model_type must be one of llama, ", hint="family"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rope_parameters": ABSENT, "rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "got 'mrope'"),
        ({"rope_parameters": {"rope_type": ["linear"], "factor": 4.0}}, "got ['linear']"),
    ],
)
def test_the_config_asks_for_what_is_not_handled(cli, llama_copy, out_folder, changes, says):
    path = edit_config(llama_copy, **changes)
    assert_not_converted(cli, llama_copy, out_folder, UNSUPPORTED, path, says)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"), float("inf"), 0, -4.0, "four", "NaN", None, True, [4.0], 5e-324, 1e-300, 1e300,
        pytest.param(10**400, id="1 and 400 zeros"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["rope_scaling type", "rope_parameters rope_type"])
def test_the_linear_factor_cannot_be_a_factor(cli, llama_copy, out_folder, spelling, value):
    field, key = spelling.split()
    path = edit_config(llama_copy, **{"rope_parameters": ABSENT, field: {key: "linear", "factor": value}})
    out = out_folder / "model.gguf"
    result = cli("convert", llama_copy, out, "--quant", "F32", "--check", "none")
    assert_error(result, CHECKPOINT, path, f"{field}.factor")
    assert contents(out_folder) == {}


@pytest.mark.parametrize(
    "value", [float("nan"), 0, -1.0, "much", [1], 1e39, pytest.param(10**400, id="1 and 400 zeros")]
)
def test_the_base_of_the_angles_cannot_be_one(cli, llama_copy, out_folder, value):
    path = edit_config(llama_copy, rope_parameters={"rope_type": "default", "rope_theta": value})
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, "rope_theta")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"low_freq_factor": None}, "low_freq_factor"),
        ({"high_freq_factor": 0}, "high_freq_factor"),
        ({"high_freq_factor": 1.0}, "high_freq_factor"),  # the same as the low one: nothing lies between
        ({"original_max_position_embeddings": "half"}, "original_max_position_embeddings"),
    ],
)
def test_llama_3_scaling_is_incomplete(cli, llama_copy, out_folder, changes, says):
    path = edit_config(llama_copy, rope_parameters={**LLAMA3, **changes})
    out = out_folder / "model.gguf"
    result = cli("convert", llama_copy, out, "--quant", "F32", "--check", "none")
    assert_error(result, CHECKPOINT, path, says)
    assert contents(out_folder) == {}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LONGROPE = {**YARN, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**YARN, "factor": "x"}, "rope_parameters.factor"),
        ({**YARN, "factor": 0.5}, "rope_parameters.factor must be at least 1"),
        ({**YARN, "beta_fast": "many"}, "beta_fast"),
        ({**YARN, "attention_factor": -1}, "attention_factor"),
        ({**LONGROPE, "short_factor": None}, "short_factor must be a list"),
        ({**LONGROPE, "long_factor": [1.0, "x"]}, "long_factor must be a positive number"),
        ({**LONGROPE, "long_factor": [2.0] * 7}, "long_factor must be a list of"),
    ],
)
def test_a_scaling_of_the_models_own_is_incomplete(cli, llama_copy, out_folder, rope, says):
    path = edit_config(llama_copy, rope_parameters=rope)
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, says)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_the_scaling_is_not_an_object(cli, llama_copy, out_folder, field):
    path = edit_config(llama_copy, **{"rope_parameters": ABSENT, field: "linear"})
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, field, "'linear'")


@pytest.mark.parametrize("value", [float("nan"), -1e-6, "small", 1e39])
def test_the_epsilon_of_the_norms_cannot_be_one(cli, llama_copy, out_folder, value):
    path = edit_config(llama_copy, rms_norm_eps=value)
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, path, "rms_norm_eps")


def test_a_billion_layers_are_refused_at_once(cli, llama_copy):
    path = edit_config(llama_copy, num_hidden_layers=10**9)
    signal.alarm(3)  # counting them all would take hours, and all of the memory
    code, _, err = cli("inspect", llama_copy)
    assert code == CHECKPOINT
    assert str(path.parent) in err


@pytest.mark.parametrize("text", ["garbage", '{"steps": "many"}', '{"steps": null, "tokens": []}'])
def test_the_record_of_a_fine_tune_is_broken(cli, llama_copy, out_folder, text):
    record = llama_copy / "pi_gguf.json"
    record.write_text(text)
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, record)


# Options


@pytest.mark.parametrize("context", [WINDOW, WINDOW - 1, 1, 0, -256])
def test_the_context_is_not_above_the_window(cli, llama, out_folder, context):
    assert_not_converted(
        cli, llama, out_folder, OPTION, "context must be above", f"{WINDOW} tokens", f"got {context}",
        hint=f"--context {4 * WINDOW}", options=("--context", str(context)),
    )  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "eval perplexity"])
def test_a_context_of_zero_is_not_the_same_as_none(cli, llama, tmp_path, command):
    text = tmp_path / "text.txt"
    text.write_text("A short text, so that going on without a context ends soon.")
    options = ("--text", text, "--windows", "64", "--stride", "32") if command.startswith("eval") else ()
    assert_error(cli(*command.split(), llama, "--context", "0", *options), OPTION, "context", "got 0")


def test_the_context_is_too_large_for_a_gguf_file(cli, llama, out_folder):
    assert_not_converted(cli, llama, out_folder, OPTION, "context", "5000000000", options=("--context", "5000000000"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--quant", ""), ("quant must be one of",)),
        (("--check", "some"), ("check must be one of", "got some")),
        (("--steps", "-1"), ("steps must not be negative", "got -1")),
        (("--steps", "2", "--schedule", "cosine"), ("schedule must be", "got cosine")),
        (("--steps", "2", "--learning-rate", "nan"), ("learning-rate must be", "got nan")),
        (("--steps", "2", "--train-window", "1"), ("train-window must be", "got 1")),
        (("--steps", "2", "--device", "tpu"), ("device must be", "got tpu")),
    ],
)
def test_an_option_has_a_value_that_cannot_work(cli, llama, out_folder, options, says):
    assert_not_converted(cli, llama, out_folder, OPTION, *says, options=options)


@pytest.mark.parametrize(("command", "hint"), [("convert", "Q4_K_M is a good choice"), ("plan", "convert --dry-run")])
def test_a_type_that_does_not_exist(cli, llama, out_folder, command, hint):
    out = [out_folder / "out.gguf"] if command == "convert" else []
    assert_error(cli(command, llama, *out, "--quant", "Q99_X"), OPTION, "quant must be one of", "got Q99_X", hint=hint)
    assert contents(out_folder) == {}


@pytest.mark.parametrize("name", ["model.bin", "model", "model.gguf.txt"])
def test_the_output_does_not_end_in_gguf(cli, llama, out_folder, name):
    out = out_folder / name
    assert_error(cli("convert", llama, out, "--context", "256", "--steps", "0"), OPTION, out, ".gguf")
    assert contents(out_folder) == {}


def test_the_folder_of_the_output_is_missing(cli, llama, out_folder):
    out = out_folder / "none" / "model.gguf"
    result = cli("convert", llama, out, "--context", "256", "--steps", "0")
    assert_error(result, OPTION, out, "does not exist", hint=f"mkdir -p {out.parent}")
    assert contents(out_folder) == {}


def test_the_folder_of_the_output_is_a_file(cli, llama, out_folder):
    (out_folder / "file").write_bytes(OLD_FILE)
    out = out_folder / "file" / "model.gguf"
    assert_error(cli("convert", llama, out, "--context", "256", "--steps", "0"), OPTION, out)
    assert contents(out_folder) == {"file": OLD_FILE}


@pytest.mark.parametrize("length", [250, 300])
def test_the_name_of_the_output_is_too_long(cli, llama, out_folder, length):
    out = out_folder / f"{'a' * length}.gguf"
    result = cli("convert", llama, out, "--context", "256", "--steps", "0", "--quant", "F32", "--check", "none")
    assert_error(result, OPTION, out)
    assert contents(out_folder) == {}


def test_an_output_that_exists_is_kept_without_overwrite(cli, llama, f32_gguf, out_folder):
    out = out_folder / "model.gguf"
    out.write_bytes(OLD_FILE)
    result = cli("convert", llama, out, "--context", "256", "--steps", "0")
    assert_error(result, OPTION, out, "exists", hint="--overwrite")
    assert_error(cli("quantize", f32_gguf, out), OPTION, out, "exists", hint="--overwrite")
    assert_error(cli("extend", llama, out_folder, "--context", "256"), OPTION, out_folder, "exists", hint="--overwrite")
    assert contents(out_folder) == {"model.gguf": OLD_FILE}


def test_a_folder_in_the_place_of_the_output_file_is_kept_even_with_overwrite(cli, llama, f32_gguf, out_folder):
    out = out_folder / "model.gguf"
    out.mkdir()
    (out / "work.txt").write_bytes(OLD_FILE)
    before = contents(out_folder)
    options = ("--context", "256", "--steps", "0", "--quant", "F32", "--check", "none", "--overwrite")
    assert_error(cli("convert", llama, out, *options), OPTION, out, "folder")
    assert contents(out_folder) == before
    assert_error(cli("quantize", f32_gguf, out, "--overwrite"), OPTION, out, "folder")
    assert contents(out_folder) == before


def test_a_file_is_not_quantized_onto_itself(cli, f32_gguf):
    before = f32_gguf.read_bytes()
    assert_error(cli("quantize", f32_gguf, f32_gguf, "--overwrite"), OPTION, f32_gguf, "same file")
    assert f32_gguf.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        pytest.param("/nowhere/at/all", "folder", id="a path that is not there"),
        pytest.param("./llama", "spelling", id="a relative path that is not there"),
        pytest.param("nobody-here/nothing", "spelling", id="a Hub id without a connection"),
        pytest.param("bundled:huge", "bundled:tiny", id="an unknown bundled model"),
        pytest.param("~nobody-here/llama", "", id="the home of a user there is not"),
        pytest.param("a" * 300, "", id="a name longer than a file's can be"),
    ],
)
def test_the_model_is_not_there(cli, out_folder, monkeypatch, model, hint):
    monkeypatch.chdir(out_folder)
    assert_not_converted(cli, model, out_folder, CHECKPOINT, f"{model}:", hint=hint or None)


def test_the_model_is_a_file(cli, llama, out_folder):
    model = llama / "config.json"
    assert_not_converted(cli, model, out_folder, CHECKPOINT, model, "is a file", hint=str(llama))


# Tokenizers


def test_the_tokenizer_is_missing(cli, llama_copy, out_folder):
    (llama_copy / "tokenizer.json").unlink()
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "tokenizer", hint="tokenizer.json")


@pytest.mark.parametrize("text", ["garbage {", "", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_the_tokenizer_is_garbage(cli, llama_copy, out_folder, text):
    (llama_copy / "tokenizer.json").write_text(text)
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "tokenizer", hint="tokenizer.json")


def test_the_sentencepiece_model_is_garbage(cli, llama_copy, out_folder):
    (llama_copy / "tokenizer.json").unlink()
    (llama_copy / "tokenizer.model").write_bytes(b"garbage")
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "tokenizer", hint="tokenizer.model")


def test_the_vocabulary_is_empty(cli, llama_copy, out_folder):
    edit_tokenizer(llama_copy, lambda parsed: parsed["model"].update(vocab={}, merges=[]))
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "tokenizer")


@pytest.mark.parametrize("more", [11, 3_000_000])
def test_the_tokenizer_is_larger_than_the_embedding(cli, llama_copy, out_folder, more):
    size = len(json.loads((llama_copy / "tokenizer.json").read_text())["model"]["vocab"])
    edit_tokenizer(llama_copy, lambda parsed: parsed["model"]["vocab"].update(beyond=size + more - 1))
    assert size + more > 410
    assert_not_converted(
        cli, llama_copy, out_folder, CHECKPOINT, llama_copy, f"{size + more} tokens", "vocab_size is 410",
        hint="different models",
    )  # fmt: skip


def test_an_unknown_pre_tokenizer_shows_its_pattern(cli, llama_copy, out_folder):
    def change(parsed: dict[str, Any]) -> None:
        parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[aeiou]+|[^aeiou]+"}

    path = edit_tokenizer(llama_copy, change)
    assert_not_converted(
        cli, llama_copy, out_folder, UNSUPPORTED, path, "pre_tokenizer", "[aeiou]+|[^aeiou]+", hint="report"
    )


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "byte_fallback"),
        ("normalizer", {"type": "Lowercase"}, '{"type": "Lowercase"}'),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "got 'WordLevel'"),
    ],
)
def test_a_kind_of_tokenizer_that_llama_cpp_lacks(cli, llama_copy, out_folder, part, value, says):
    path = edit_tokenizer(llama_copy, lambda parsed: parsed.update({part: value}))
    assert_not_converted(cli, llama_copy, out_folder, UNSUPPORTED, path, says)


# Code in a checkpoint


@pytest.mark.parametrize("mapped", ["config", "model", "tokenizer"])
def test_code_in_a_checkpoint_is_not_executed(cli, llama_copy, out_folder, tmp_path, mapped):
    marker = tmp_path / "executed"
    code = llama_copy / "hostile.py"
    code.write_text(f"open({str(marker)!r}, 'w').close()\nclass Hostile: pass\n")
    runpy.run_path(str(code))
    marker.unlink()  # it was there: the code does what it says
    if mapped == "tokenizer":
        settings = llama_copy / "tokenizer_config.json"
        auto_map = {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "auto_map": auto_map}))
    else:
        name = {"config": "AutoConfig", "model": "AutoModelForCausalLM"}[mapped]
        edit_config(llama_copy, auto_map={name: "hostile.Hostile"}, trust_remote_code=True)
    out = out_folder / "model.gguf"
    result = cli("convert", llama_copy, out, "--context", "256", "--steps", "0", "--quant", "F32", "--check", "quick")
    assert not marker.exists()
    assert result[0] == 0, result[2]


def test_a_tokenizer_that_needs_its_own_code_is_refused(cli, llama_copy, out_folder, tmp_path):
    marker = tmp_path / "executed"
    (llama_copy / "hostile.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Hostile: pass\n")
    settings = {"auto_map": {"AutoTokenizer": ["hostile.Hostile", None]}, "tokenizer_class": "Hostile"}
    (llama_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_not_converted(cli, llama_copy, out_folder, CHECKPOINT, llama_copy, "tokenizer")
    assert not marker.exists()


# Texts


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"A short text.", "fewer than the largest window of 64", id="shorter than the window"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b" \n\t\n", "empty", id="nothing but white space"),
        pytest.param(b"\xef\xbb\xbf", "empty", id="nothing but a byte order mark"),
        pytest.param(None, "no such file", id="missing"),
        pytest.param("Größe ".encode("latin-1") * 100, "not UTF-8 at byte 2", id="not UTF-8"),
        pytest.param("Hello ".encode("utf-16") * 100, "not UTF-8 at byte 0", id="UTF-16"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_perplexity_of_a_text_that_cannot_be_measured(cli, llama, f32_gguf, tmp_path, kind, data, says):
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    model = llama if kind == "folder" else f32_gguf
    result = cli("eval", "perplexity", model, "--text", text, "--windows", str(WINDOW), "--stride", "32")
    assert_error(result, TEXT, text, says)


def test_a_folder_without_texts(cli, llama, tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    result = cli("eval", "perplexity", llama, "--text", tmp_path, "--windows", "64", "--stride", "32")
    assert_error(result, TEXT, tmp_path, ".txt")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"A short text.", f"fewer than the training window of {WINDOW}", id="shorter than the window"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(None, "no such file", id="missing"),
        pytest.param(b"\xff\xfe" * 100, "not UTF-8", id="not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", ["extend", "convert"])
def test_training_on_a_text_that_cannot_be_trained_on(cli, llama, tmp_path, out_folder, command, data, says):
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    out = out_folder / ("model.gguf" if command == "convert" else "model-hf")
    result = cli(command, llama, out, "--context", "256", "--steps", "1", "--data", text)
    assert_error(result, TEXT, text, says)
    assert contents(out_folder) == {}


# GGUF files

COMMANDS = {
    "inspect": lambda source, folder: ("inspect", source),
    "run": lambda source, folder: ("run", source, "--prompt", "Once", "--max-tokens", "2"),
    "eval": lambda source, folder: ("eval", "passkey", source, "--windows", "256", "--distances", "1", "--keys", "1"),
    "quantize": lambda source, folder: ("quantize", source, folder / "out.gguf", "--quant", "Q8_0"),
}


@pytest.mark.parametrize("damage", ["3 bytes", "100 bytes", "half", "all but a byte", "text", "empty", "zeros"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_gguf_file_is_damaged(cli, f32_gguf, tmp_path, out_folder, command, damage):
    data = f32_gguf.read_bytes()
    damaged = {
        "3 bytes": data[:3],
        "100 bytes": data[:100],
        "half": data[: len(data) // 2],
        "all but a byte": data[:-1],
        "text": b"This is a text, not a model.\n" * 50,
        "empty": b"",
        "zeros": bytes(4096),
    }
    source = tmp_path / "damaged.gguf"
    source.write_bytes(damaged[damage])
    result = cli(*COMMANDS[command](source, out_folder))
    assert_error(result, GGUF, source, "truncated or not a GGUF file", hint="again")
    assert contents(out_folder) == {}


@pytest.mark.parametrize("kind", ["missing", "a folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_gguf_file_is_not_there(cli, tmp_path, out_folder, command, kind):
    source = tmp_path / "absent.gguf"
    if kind == "a folder":
        source.mkdir()
    assert_error(cli(*COMMANDS[command](source, out_folder)), GGUF, source, "no such file")
    assert contents(out_folder) == {}


def test_the_name_of_a_gguf_file_is_too_long(cli):
    source = f"{'a' * 300}.gguf"
    assert_error(cli("inspect", source), GGUF, source)


def edited_gguf(source: Path, target: Path, key: str, value: float) -> Path:
    """Copy a GGUF file and write one number of its metadata anew, in place."""
    import gguf

    shutil.copyfile(source, target)
    field = gguf.GGUFReader(target, "r+").fields[key]
    field.parts[field.data[0]][0] = value
    return target


IMPOSSIBLE = [
    ("llama.rope.scaling.factor", 0.0),
    ("llama.rope.scaling.factor", float("nan")),
    ("llama.attention.head_count", 0),
    ("llama.context_length", 0),
]


@pytest.mark.parametrize("command", ["run", "eval"])
@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_a_gguf_file_states_what_cannot_be(cli, f32_gguf, tmp_path, out_folder, command, key, value):
    source = edited_gguf(f32_gguf, tmp_path / "edited.gguf", key, value)
    assert_error(cli(*COMMANDS[command](source, out_folder)), GGUF, source, key)


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_inspect_shows_what_cannot_be_or_refuses_it(cli, f32_gguf, tmp_path, key, value):
    source = edited_gguf(f32_gguf, tmp_path / "edited.gguf", key, value)
    result = cli("inspect", source)
    if result[0]:
        assert_error(result, GGUF, source, key)
    else:
        assert "warning" in result[1] or "defect" in result[1]


def test_a_gguf_file_without_layers_does_not_end_the_process(f32_gguf, tmp_path):
    """In a process of its own: llama.cpp aborts the whole process when it is given such a file."""
    source = edited_gguf(f32_gguf, tmp_path / "edited.gguf", "llama.block_count", 0)
    command = [sys.executable, "-m", "pi_gguf", "run", source, "--prompt", "Once", "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert_error((done.returncode, done.stdout, done.stderr), GGUF, source, "llama.block_count")


# Text that terminals' markup would eat


def test_square_brackets_in_a_name_are_shown_as_they_are(cli, llama, tmp_path):
    model = tmp_path / "[red]llama"
    model.symlink_to(llama)
    code, out, _ = cli("inspect", model)
    assert code == 0
    assert "[red]llama" in out.replace("\n", "")


def test_a_value_that_looks_like_markup_is_shown_as_it_is(cli, llama_copy):
    edit_config(llama_copy, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "note": "[/b]"})
    code, out, _ = cli("inspect", llama_copy)
    assert code == 0
    assert "[/b]" in out


# Disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount a file system of a few bytes, in whole pages; it goes away with the test."""
    folder = tmp_path / "disk"
    mounted = False

    def mount(size: int, *, read_only: bool = False) -> Path:
        nonlocal mounted
        if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("mounting a small disk needs Linux, root and mount(8)")
        folder.mkdir()
        option = f"size={whole_pages(size)}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small disk needs CAP_SYS_ADMIN: {done.stderr.strip()}")
        mounted = True
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def weights_nbytes(model: Path) -> int:
    from pi_gguf.checkpoint.checkpoint import load_checkpoint

    return 4 * load_checkpoint(str(model)).n_parameters()


def test_the_disk_is_too_small_for_the_output(cli, llama, small_disk):
    disk = small_disk(weights_nbytes(llama) // 2)
    assert_not_converted(cli, llama, disk, RESOURCE, disk, "needed", "free", hint="disk space")


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_the_disk_fills_while_the_file_is_written(cli, llama, small_disk, out_folder, quant, monkeypatch):
    """Another program takes the space that was there when it was checked; then there is more."""
    from pi_gguf.common import files

    whole = out_folder / "whole.gguf"
    options = ("--context", "256", "--steps", "0", "--quant", quant, "--check", "none")
    assert cli("convert", llama, whole, *options)[0] == 0
    size = whole.stat().st_size
    disk = small_disk(size * 3 // 4)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * size, 0, 2 * size))
    result = cli("convert", llama, disk / "model.gguf", *options)
    assert_error(result, RESOURCE, disk, "the disk is full", hint="disk space")
    assert not (disk / "model.gguf").exists()
    subprocess.run(["mount", "-o", f"remount,size={2 * whole_pages(size)}", disk], check=True)
    code, _, err = cli("convert", llama, disk / "model.gguf", *options)
    assert code == 0 and "tensors are there" in err
    assert contents(disk) == {"model.gguf": whole.read_bytes()}


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.1, id="too small from the start"), pytest.param(0.15, id="filling up while it is written")],
)
def test_the_disk_is_too_small_to_quantize(cli, f32_gguf, small_disk, share):
    disk = small_disk(int(f32_gguf.stat().st_size * share))
    result = cli("quantize", f32_gguf, disk / "model.gguf", "--quant", "Q8_0")
    assert_error(result, RESOURCE, disk, hint="disk space")
    assert contents(disk) == {}


def test_the_disk_is_too_small_for_the_extended_folder(cli, llama, small_disk):
    disk = small_disk(weights_nbytes(llama) // 2)
    result = cli("extend", llama, disk / "model-hf", "--context", "256", "--steps", "0")
    assert_error(result, RESOURCE, disk, hint="disk space")
    assert contents(disk) == {}


@pytest.mark.parametrize("command", ["convert", "quantize", "extend"])
def test_the_disk_is_read_only(cli, llama, f32_gguf, small_disk, command):
    disk = small_disk(4 * weights_nbytes(llama), read_only=True)
    arguments = {
        "convert": ("convert", llama, disk / "model.gguf", "--quant", "F32", "--check", "none"),
        "quantize": ("quantize", f32_gguf, disk / "model.gguf", "--quant", "Q8_0"),
        "extend": ("extend", llama, disk / "model-hf", "--context", "256", "--steps", "0"),
    }
    assert_error(cli(*arguments[command]), OPTION, disk)


# Random damage

HOSTILE = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**64, 10**400, 0.5, 5e-324, 1e308, float("inf"), float("nan"), "", "64",
    "nan", "[/b]", "\0", "\ud800", "a" * 300, "../config.json", [], [64], {}, {"a": 1},
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Replace, insert or remove one byte, or cut the rest off."""
    at, new = rng.randrange(len(data)), bytes([rng.randrange(256)])
    return rng.choice((data[:at] + new + data[at + 1 :], data[:at] + new + data[at:], data[:at] + data[at + 1 :]))


def mutate_field(data: bytes, rng: random.Random) -> bytes:
    """Give one field, at any depth of a JSON text, a hostile value, or remove it."""
    parsed = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(parsed)
    container, key = rng.choice(places)
    if rng.random() < 0.15:
        del container[key]
    else:
        container[key] = rng.choice(HOSTILE)
    return json.dumps(parsed).encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    change = rng.choice((mutate_bytes, mutate_field, mutate_field))
    while (mutated := change(data, rng)) == data:
        pass
    return mutated


@pytest.mark.parametrize("seed", range(170))
@pytest.mark.parametrize("part", ["config.json", "header of the weights", "index"])
def test_random_damage_ends_in_an_exit_code(cli, request, tmp_path, part, seed):
    sound = request.getfixturevalue("sharded" if part == "index" else "llama")
    model = Path(shutil.copytree(sound, tmp_path / "model"))
    rng = random.Random(f"{part} {seed}")
    if part == "header of the weights":
        path = model / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = mutate(data[8 : 8 + length], rng)
        # Half of the time the length is told right, so that what is inside is read.
        length = len(header) if rng.random() < 0.5 else length
        path.write_bytes(struct.pack("<Q", length) + header + data[8 + length :])
    else:
        path = model / {"config.json": "config.json", "index": "model.safetensors.index.json"}[part]
        path.write_bytes(mutate(path.read_bytes(), rng))
    before = contents(model)
    signal.alarm(10)
    code, out, err = cli("inspect", model)
    assert code == 0 or 2 <= code <= 8
    if code:
        assert re.search(rf"^error: .*{re.escape(str(model))}", err, re.MULTILINE)
    else:
        assert "Hugging Face, llama" in out
    assert contents(model) == before
