"""Repair: a defect is named, mended to the sound file's own bytes, and read by llama.cpp; bad input writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SHARED_MODELS, in_place, make_llama, tensors

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.gguf.defects import SAME_SPLITTING
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import TYPES, Entry, read_header, type_of_key
from pi_gguf.llamacpp.trial import trust
from pi_gguf.vocabulary.probes import sample_texts

EOS = "tokenizer.ggml.eos_token_id"


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> Path:
    """A Hugging Face folder that states linear scaling by 4, from 64 to 256 tokens."""
    folder = tmp_path_factory.mktemp("scaled") / "model"
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}
    make_llama(folder, max_position_embeddings=256, rope_parameters=rope)
    settings = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def sound(scaled, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    pi_gguf.convert(str(scaled), path, quant="Q8_0")
    return path


def rewritten(source: Path, target: Path, changes: dict, *, drop: tuple[str, ...] = ()) -> Path:
    """Write a file with gguf's own writer, with other values and without some keys and tensors; None removes a key."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    stated = {key: (field.contents(), field.types) for key, field in reader.fields.items() if key[:5] != "GGUF."}
    for key, (value, types) in stated.items():
        if key != "general.architecture" and key not in changes:
            kind = types[0]
            writer.add_key_value(key, value, kind, types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for key, value in changes.items():
        if value is not None:
            name = value[0] if isinstance(value, tuple) else Entry.of(value).type
            kind = gguf.GGUFValueType.ARRAY if name[0] == "[" else gguf.GGUFValueType[name]
            sub = gguf.GGUFValueType[name.strip("[]")] if name[0] == "[" else None
            writer.add_key_value(key, value[1] if isinstance(value, tuple) else value, kind, sub)
    for t in reader.tensors:
        if t.name not in drop:
            writer.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def found(cli, *arguments) -> dict[str, dict]:
    code, out, err = cli("inspect", *arguments, "--json")
    assert code == 0, err
    return {finding["key"]: finding for finding in json.loads(out)["findings"]}


def types_with(sound: Path, index: int, kind: int) -> list[int]:
    types = list(read_header(sound).entries["tokenizer.ggml.token_type"].value)
    types[index] = kind
    return types


A, T, S = "llama.", "tokenizer.ggml.", "llama.rope.scaling."
DEFECTS = {
    "window not extended": ({A + "context_length": 64}, A + "context_length", 256),
    "window missing": ({A + "context_length": None}, A + "context_length", 256),
    "original window missing": ({S + "original_context_length": None}, S + "original_context_length", 64),
    "original window wrong": ({S + "original_context_length": 32}, S + "original_context_length", 64),
    "factor missing": ({S + "factor": None}, S + "factor", 4.0),
    "factor below 1": ({S + "factor": 0.25}, S + "factor", 4.0),
    "factor not a number": ({S + "factor": float("nan")}, S + "factor", 4.0),
    "another factor": ({S + "factor": 2.0}, S + "factor", 4.0),
    "type missing": ({S + "type": None}, S + "type", "linear"),
    "type unknown": ({S + "type": "dynamic"}, S + "type", "linear"),
    "type none": ({S + "type": "none"}, S + "type", "linear"),
    "all of the scaling missing": (
        {S + "type": None, S + "factor": None, S + "original_context_length": None, S + "finetuned": None},
        S + "factor", 4.0,
    ),
    "base missing": ({A + "rope.freq_base": None}, A + "rope.freq_base", 20000.0),
    "another base": ({A + "rope.freq_base": 1e6}, A + "rope.freq_base", 20000.0),
    "rotated dimensions": ({A + "rope.dimension_count": 16}, A + "rope.dimension_count", 32),
    "epsilon": ({A + "attention.layer_norm_rms_epsilon": 1e-2}, A + "attention.layer_norm_rms_epsilon", 1e-6),
    "window of 64 bits": ({A + "context_length": ("UINT64", 256)}, A + "context_length", 256),
    "no begin flag": ({T + "add_bos_token": None}, T + "add_bos_token", True),
    "wrong begin flag": ({T + "add_bos_token": False}, T + "add_bos_token", True),
    "no end flag": ({T + "add_eos_token": None}, T + "add_eos_token", False),
    "no pre-tokenizer": ({T + "pre": None}, T + "pre", "qwen2"),
    "default pre-tokenizer": ({T + "pre": "default"}, T + "pre", "qwen2"),
    "another pre-tokenizer": ({T + "pre": "gpt-2"}, T + "pre", "qwen2"),
    "no end token": ({EOS: None}, EOS, 1),
    "end token beyond the vocabulary": ({EOS: 410}, EOS, 1),
    "end token is a word": ({EOS: 300}, EOS, 1),
    "no begin token": ({T + "bos_token_id": None}, T + "bos_token_id", 0),
    "no types": ({T + "token_type": None}, T + "token_type", "410 values"),
    "no merges": ({T + "merges": None}, T + "merges", None),
    "no template": ({"tokenizer.chat_template": None}, "tokenizer.chat_template", None),
}  # fmt: skip
ALONE = {
    "window not extended", "window missing", "original window missing", "factor missing", "factor below 1",
    "factor not a number", "type missing", "window of 64 bits",
}  # fmt: skip
"""What the file tells without its checkpoint."""


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_and_mended(cli, scaled, sound, tmp_path, name):
    changes, key, expected = DEFECTS[name]
    broken, out = rewritten(sound, tmp_path / "broken.gguf", changes), tmp_path / "out.gguf"
    finding = found(cli, broken, "--against", scaled)[key]
    assert finding["remedy"] == "set" and (expected is None or finding["expected"] == expected)
    code, text, err = cli("repair", broken, out, "--against", scaled, "--check", "none")
    assert code == 0, err
    assert f"{key}: " in text and f"next: pi-gguf inspect {out}" in text
    assert found(cli, out, "--against", scaled) == found(cli, out) == {}
    assert tensors(out) == tensors(sound)
    ours, theirs = read_header(out).entries, read_header(sound).entries
    assert ours == theirs
    with pi_gguf.open(out) as model:
        assert (model.n_ctx_train, model.rope_freq_scale_train) == (256, 0.25)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_in_place_is_mended_to_the_sound_file_byte_for_byte(cli, scaled, sound, tmp_path, name):
    changes = {
        key: None if value is None else Entry.of(value[1], value[0]) if isinstance(value, tuple) else Entry.of(value)
        for key, value in DEFECTS[name][0].items()
    }
    broken, out = in_place(sound, tmp_path / "broken.gguf", changes), tmp_path / "out.gguf"
    assert broken.read_bytes() != sound.read_bytes()
    assert cli("repair", broken, out, "--against", scaled, "--check", "none")[0] == 0
    assert out.read_bytes() == sound.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.gguf", "out.gguf"]


@pytest.mark.parametrize("name", sorted(ALONE))
def test_what_the_file_tells_is_mended_without_the_checkpoint(cli, sound, tmp_path, name):
    changes, key, expected = DEFECTS[name]
    broken, out = rewritten(sound, tmp_path / "broken.gguf", changes), tmp_path / "out.gguf"
    assert found(cli, broken)[key]["expected"] == expected
    code, text, _ = cli("inspect", broken)
    assert code == 0 and "defect" in text and "next: pi-gguf repair" in text
    assert cli("repair", broken, out)[0] == 0
    assert read_header(out).entries == read_header(sound).entries and tensors(out) == tensors(sound)


@pytest.mark.parametrize("name", ["no pre-tokenizer", "no end token", "end token is a word", "no types", "no merges"])
def test_what_only_the_checkpoint_tells_is_named_and_asked_for(cli, sound, tmp_path, name):
    changes, key, _ = DEFECTS[name]
    broken = rewritten(sound, tmp_path / "broken.gguf", changes)
    finding = found(cli, broken)[key]
    assert (finding["expected"], finding["remedy"], finding["severity"]) == (None, "ask", "defect")
    assert "--against MODEL" in cli("inspect", broken)[1].replace("\n", " ")
    code, _, err = cli("repair", broken, tmp_path / "out.gguf")
    assert code == 6 and key in err and "--against MODEL" in err
    assert [p.name for p in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_repaired_file_passes_the_check_of_convert(scaled, sound, tmp_path):
    broken = rewritten(sound, tmp_path / "broken.gguf", {**DEFECTS["all of the scaling missing"][0], T + "pre": None})
    result = pi_gguf.repair(broken, tmp_path / "out.gguf", against=str(scaled))
    assert result.checks[0].kl_divergence < 0.05 and result.checks[0].prompt_tokens == 256
    assert result.left == []


def test_a_model_that_is_not_the_files_fails_the_check_and_leaves_nothing(cli, scaled, sound, tmp_path):
    other = Path(shutil.copytree(scaled, tmp_path / "other"))
    import torch
    from safetensors.torch import load_file, save_file

    values = load_file(other / "model.safetensors")
    torch.manual_seed(1)
    values = {name: torch.randn_like(value) * 0.2 for name, value in values.items()}
    save_file(values, other / "model.safetensors", {"format": "pt"})
    broken = rewritten(sound, tmp_path / "broken.gguf", {EOS: None})
    code, _, err = cli("repair", broken, tmp_path / "out.gguf", "--against", other)
    assert code == 7 and "KL divergence" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.gguf", "other"]


def test_an_interpolation_of_its_base_model_is_sound(cli, llama, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "m.gguf", quant="F32", check="none", context=256, steps=0)
    assert found(cli, tmp_path / "m.gguf", "--against", llama) == {}
    broken = rewritten(tmp_path / "m.gguf", tmp_path / "broken.gguf", {S + "factor": None})
    assert found(cli, broken, "--against", llama)[S + "factor"]["expected"] == 4.0


def test_scaling_that_the_model_does_not_have_is_removed(cli, llama, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "m.gguf", quant="F32", check="none")
    broken = in_place(
        tmp_path / "m.gguf", tmp_path / "broken.gguf",
        {S + "type": Entry.of("yarn"), S + "factor": Entry.of(4.0), S + "original_context_length": Entry.of(64)},
    )  # fmt: skip
    assert found(cli, broken)[A + "context_length"]["expected"] == 256
    assert found(cli, broken, "--against", llama)[S + "type"]["remedy"] == "remove"
    assert cli("repair", broken, tmp_path / "out.gguf", "--against", llama)[0] == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


@pytest.mark.slow
def test_names_of_one_splitting_give_one_tokenization(tmp_path):
    tokenizer = SHARED_MODELS.parent / "tokenizers" / "pythia.tokenizer.json"
    if not tokenizer.is_file():
        pytest.skip(f"needs {tokenizer}")
    folder = make_llama(tmp_path / "model", vocab_size=50304, hidden_size=32)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    pi_gguf.convert(str(folder), tmp_path / "m.gguf", quant="F16", check="none")
    of_group = []
    for names in SAME_SPLITTING:
        seen = set()
        for name in names:
            fixed = {T + "pre": Entry.of(name), T + "add_bos_token": Entry.of(False)}
            path = in_place(tmp_path / "m.gguf", tmp_path / "b.gguf", fixed)
            trust(read_header(path))  # or each would be tried in a process of its own first
            with pi_gguf.open(path, n_ctx=512) as model:
                seen.add(tuple(tuple(model.tokenize(text)) for text in sample_texts()))
        assert len(seen) == 1, names
        of_group += seen
    assert len(set(of_group)) >= 4


def test_another_name_of_the_same_pre_tokenizer_is_no_defect(cli, scaled, sound, tmp_path):
    same = rewritten(sound, tmp_path / "same.gguf", {T + "pre": "stablelm2"})
    assert found(cli, same, "--against", scaled) == {}


def test_lost_rope_factors_cannot_be_repaired(cli, tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = make_llama(tmp_path / "model", max_position_embeddings=512, rope_parameters=rope)
    pi_gguf.convert(str(folder), tmp_path / "m.gguf", quant="F32", check="none")
    assert found(cli, tmp_path / "m.gguf", "--against", folder) == {}
    lost = rewritten(tmp_path / "m.gguf", tmp_path / "lost.gguf", {}, drop=("rope_freqs.weight",))
    assert found(cli, lost, "--against", folder)["rope_freqs.weight"]["remedy"] == "convert"
    code, _, err = cli("repair", lost, tmp_path / "out.gguf", "--against", folder)
    assert code == 6 and "rope_freqs.weight" in err and "hint: convert the checkpoint again" in err
    assert not (tmp_path / "out.gguf").exists()
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["factor"] = 4.0
    (folder / "config.json").write_text(json.dumps(config))
    assert found(cli, tmp_path / "m.gguf", "--against", folder)["rope_freqs.weight"]["remedy"] == "convert"


def test_a_sound_file_is_said_to_be_so_and_nothing_is_written(cli, scaled, sound, tmp_path):
    code, out, _ = cli("repair", sound, tmp_path / "out.gguf", "--against", scaled)
    assert code == 0 and "nothing to repair" in out and "nothing was written" in out
    assert json.loads(cli("repair", sound, tmp_path / "out.gguf", "--json")[1])["path"] is None
    assert list(tmp_path.iterdir()) == []


def test_fewer_tokens_than_rows_are_filled_up(cli, scaled, sound, tmp_path):
    entries = read_header(sound).entries
    short = {T + name: entries[T + name].value[:400] for name in ("tokens", "token_type")}
    broken = rewritten(sound, tmp_path / "broken.gguf", short)
    assert "400 tokens for the 410 rows" in found(cli, broken)[T + "tokens"]["text"]
    assert cli("repair", broken, tmp_path / "out.gguf", "--against", scaled)[0] == 0
    assert read_header(tmp_path / "out.gguf").entries == entries


def test_an_end_token_that_became_a_word_is_a_control_token_again(cli, scaled, sound, tmp_path):
    broken = in_place(
        sound, tmp_path / "broken.gguf", {T + "token_type": Entry.of(types_with(sound, 1, 1))}
    )  # fmt: skip
    assert "type 1" in found(cli, broken)[EOS]["text"]
    assert cli("repair", broken, tmp_path / "out.gguf", "--against", scaled)[0] == 0
    assert (tmp_path / "out.gguf").read_bytes() == sound.read_bytes()


def test_a_sentencepiece_file_keeps_its_leading_space(cli, tmp_path):
    pi_gguf.convert("bundled:tiny", tmp_path / "m.gguf", quant="Q8_0", check="none")
    sound = tmp_path / "m.gguf"
    assert found(cli, sound, "--against", "bundled:tiny") == found(cli, sound) == {}
    kind = read_gguf(sound).metadata["tokenizer.ggml.model"]
    key = T + ("add_space_prefix" if kind == "llama" else "add_bos_token")
    broken = in_place(sound, tmp_path / "broken.gguf", {key: None})
    assert found(cli, broken)[key]["severity"] == "note"
    assert found(cli, broken, "--against", "bundled:tiny")[key]["remedy"] == "set"
    assert cli("repair", broken, tmp_path / "out.gguf", "--against", "bundled:tiny", "--check", "none")[0] == 0
    assert (tmp_path / "out.gguf").read_bytes() == sound.read_bytes()


def test_a_model_for_conversations_without_a_template_gets_a_note(cli, sound, tmp_path):
    named = rewritten(sound, tmp_path / "a.gguf", {"general.name": "Tiny-Instruct", "tokenizer.chat_template": None})
    assert found(cli, named)["tokenizer.chat_template"]["severity"] == "note"
    base = rewritten(sound, tmp_path / "b.gguf", {"general.name": "Split Tiny", "tokenizer.chat_template": None})
    assert found(cli, base) == {}


# --set


VALUES = {
    "UINT8": ("7", "256"), "INT8": ("-7", "128"), "UINT16": ("7", "-1"), "INT16": ("-7", "40000"),
    "UINT32": ("4294967295", "4294967296"), "INT32": ("-2147483648", "1.5"), "FLOAT32": ("0.5", "1e40"),
    "BOOL": ("true", "1"), "UINT64": ("18446744073709551615", "x"), "INT64": ("-9", str(2**63)),
    "FLOAT64": ("1e300", "nan"), "STRING": ("a=b c", None), "[INT32]": ("[1, -2]", "[1.5]"),
    "[STRING]": ('["a", "b"]', "a"),
    "[BOOL]": ("[true, false]", "[0]"), "[FLOAT32]": ("[1, 0.5]", '["a"]'),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
def test_a_set_value_keeps_the_type_of_the_key(cli, sound, tmp_path, kind):
    good, bad = VALUES[kind]
    value = {"S": "x", "B": False, "F": 0.0}.get(kind.strip("[")[0], 0)
    source = rewritten(sound, tmp_path / "m.gguf", {"general.mark": (kind, [value] if kind[0] == "[" else value)})
    before = read_header(source).entries
    assert before["general.mark"].type == kind
    out = tmp_path / "out.gguf"
    if bad is not None:
        code, _, err = cli("repair", source, out, "--set", f"general.mark={bad}")
        assert code == 2 and "error: set general.mark must be " in err and repr(bad) in err
        assert not out.exists()
    assert cli("repair", source, out, "--set", f"general.mark={good}")[0] == 0
    entry = read_header(out).entries["general.mark"]
    assert entry.type == kind and entry.value == (good if kind == "STRING" else json.loads(good))
    assert {**read_header(out).entries, "general.mark": None} == {**before, "general.mark": None}
    assert tensors(out) == tensors(sound)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("llama.rope.scaling.attn_factor=2", "FLOAT32", 2.0),
        ("llama.expert_feed_forward_length=7", "UINT32", 7),
        ("tokenizer.ggml.add_sep_token=FALSE", "BOOL", False),
        ("tokenizer.ggml.padding_token_id=1", "UINT32", 1),
        ("general.license=a = b", "STRING", "a = b"),
        ("llama.attention.key_length_swa=32", "UINT32", 32),
    ],
)
def test_a_new_key_has_the_type_of_the_convention(cli, sound, tmp_path, text, kind, value):
    assert cli("repair", sound, tmp_path / "out.gguf", "--set", text, "--check", "none")[0] == 0
    entry = read_header(tmp_path / "out.gguf").entries[text.partition("=")[0]]
    assert (entry.type, entry.value) == (kind, value)


def test_every_key_that_convert_writes_has_the_type_of_the_convention(sound):
    entries = {key: entry for key, entry in read_header(sound).entries.items() if not key.startswith("pi_gguf.")}
    single = {key: entry.type for key, entry in entries.items() if entry.type[0] != "["}
    assert len(single) >= 20
    assert {key: type_of_key(key) for key in single} == single


def test_the_last_word_is_the_users(cli, scaled, sound, tmp_path):
    text = "llama.context_length=128"
    code, out, _ = cli("repair", sound, tmp_path / "out.gguf", "--against", scaled, "--set", text, "--check", "none")
    assert code == 0 and "llama.context_length: 256 -> 128" in out and "left, defect: llama.context_length" in out
    assert read_gguf(tmp_path / "out.gguf").metadata["llama.context_length"] == 128


# Bad input


BAD = {
    "no value": (("--set", "llama.context_length"), 2, "KEY=VALUE"),
    "no key": (("--set", "=3"), 2, "KEY=VALUE"),
    "unknown key": (("--set", "llama.foo=3"), 2, "llama.foo"),
    "another architecture": (("--set", "qwen2.context_length=3"), 2, "qwen2.context_length"),
    "alignment": (("--set", "general.alignment=64"), 2, "general.alignment"),
    "a type that would end the process": (("--set", "llama.rope.scaling.type=dynamic"), 6, "rope.scaling.type"),
    "unknown check": (("--check", "some"), 2, "check"),
    "no such model": (("--against", "nowhere/at/all"), 3, "nowhere/at/all"),
    "a model of another shape": (("--against", "bundled:tiny"), 2, "was not made from bundled:tiny"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_one_line_and_writes_nothing(cli, sound, tmp_path, name):
    options, exit_code, said = BAD[name]
    code, _, err = cli("repair", sound, tmp_path / "out.gguf", *options)
    assert code == exit_code and [line[:6] for line in err.splitlines()] == ["error:", "hint: "], err
    assert said in err.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_stays_as_it_is(cli, sound, tmp_path):
    source, out = Path(shutil.copyfile(sound, tmp_path / "m.gguf")), tmp_path / "out.gguf"
    out.write_text("before")
    change = ("--set", "general.license=MIT")
    assert "exists" in cli("repair", source, out, *change)[2] and out.read_text() == "before"
    assert cli("repair", source, out, *change, "--overwrite")[0] == 0 and out.stat().st_size > 10_000
    (tmp_path / "link.gguf").symlink_to(source)
    for same in (source, tmp_path / "link.gguf"):
        code, _, err = cli("repair", source, same, *change, "--overwrite")
        assert code == 2 and "same file" in err
    assert source.read_bytes() == sound.read_bytes()
    assert "must end in .gguf" in cli("repair", source, tmp_path / "out", *change)[2]


def test_a_part_that_is_not_called_so_is_refused(cli, sound, tmp_path):
    part = rewritten(sound, tmp_path / "part.gguf", {"split.no": ("UINT16", 0), "split.count": ("UINT16", 2)})
    code, _, err = cli("repair", part, tmp_path / "out.gguf")
    assert code == 6 and "one of 2 parts and not called so" in err and "NAME-00001-of-00003.gguf" in err


def swapped(data: bytes) -> bytes:
    """A big-endian file of two keys and no tensors."""

    def text(value: bytes) -> bytes:
        return struct.pack(">Q", len(value)) + value

    keys = text(b"general.architecture") + struct.pack(">I", 8) + text(b"llama")
    keys += text(b"llama.context_length") + struct.pack(">II", 4, 64)
    return b"GGUF" + struct.pack(">IQQ", 3, 0, 2) + keys


DAMAGE = {
    "text": lambda data: b"This is a text.\n" * 50,
    "empty": lambda data: b"",
    "half of the header": lambda data: data[:3000],
    "half of the data": lambda data: data[: len(data) // 2],
    "big-endian": swapped,
    "unknown type of a key": lambda data: data.replace(b"llama.context_length\x04", b"llama.context_length\x63"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["inspect", "repair"])
def test_a_damaged_file_is_one_line(cli, sound, tmp_path, command, damage):
    source = tmp_path / "damaged.gguf"
    source.write_bytes(DAMAGE[damage](sound.read_bytes()))
    assert source.read_bytes() != sound.read_bytes()
    code, _, err = cli(command, source, *([tmp_path / "out.gguf"] if command == "repair" else []))
    assert code == 6 and [line[:6] for line in err.splitlines()] == ["error:", "hint: "], err
    assert str(source) in err
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.gguf"]


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_the_header_ends_in_an_exit_code(cli, sound, tmp_path, seed):
    import random

    rng = random.Random(seed)
    data = bytearray(sound.read_bytes())
    places = [data.index(b"llama.context_length"), data.index(b"tokenizer.ggml.tokens"), 4, 24]
    for _ in range(rng.randrange(1, 4)):
        data[min(len(data) - 1, rng.choice(places) + rng.randrange(400))] = rng.randrange(256)
    source = tmp_path / "damaged.gguf"
    source.write_bytes(data)
    arguments = ("repair", source, tmp_path / "out.gguf", "--check", "none", "--set", "general.license=MIT")
    code, _, err = cli(*arguments)
    assert code in (0, 2, 6, 8) and "Traceback" not in err
    assert (tmp_path / "out.gguf").exists() == (code == 0)


def test_an_interrupted_copy_leaves_nothing(sound, tmp_path, monkeypatch):
    from pi_gguf.gguf import header as gguf_header

    monkeypatch.setattr(gguf_header, "_BLOCK", 4096)
    copied, copy_block = [], gguf_header._copy

    def stop_later(*arguments):
        copied.append(arguments)
        if len(copied) > 3:
            raise KeyboardInterrupt
        return copy_block(*arguments)

    monkeypatch.setattr(gguf_header, "_copy", stop_later)
    with pytest.raises(KeyboardInterrupt):
        pi_gguf.repair(sound, tmp_path / "out.gguf", set=["general.license=MIT"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_kernel", [True, False])
def test_the_data_is_copied_in_blocks_within_the_kernel_or_not(sound, tmp_path, monkeypatch, in_kernel):
    from pi_gguf.gguf import header as gguf_header

    monkeypatch.setattr(gguf_header, "_BLOCK", 5000)
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    pi_gguf.repair(sound, tmp_path / "out.gguf", set=["general.license=MIT"])
    ours, theirs = read_header(tmp_path / "out.gguf"), read_header(sound)
    data = (tmp_path / "out.gguf").read_bytes()[ours.data_offset :]
    assert data == sound.read_bytes()[theirs.data_offset :]


def test_a_full_disk_leaves_nothing(cli, sound, tmp_path, monkeypatch):
    from pi_gguf.common import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    code, _, err = cli("repair", sound, tmp_path / "out.gguf", "--set", "general.license=MIT")
    assert code == 8 and "needed" in err and list(tmp_path.iterdir()) == []


# Files of other tools, and other alignments


def test_alignment_and_trailing_bytes_stay(sound, tmp_path):
    import gguf
    import numpy as np

    reader, path = gguf.GGUFReader(sound), tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for key, field in reader.fields.items():
        if key[:5] != "GGUF." and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for t in reader.tensors:
        writer.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pi_gguf.repair(path, tmp_path / "out.gguf", set=["general.license=MIT"])
    header = read_header(tmp_path / "out.gguf")
    assert header.data_offset % 256 == 0 and header.entries["general.alignment"].value == 256
    assert tensors(tmp_path / "out.gguf") == tensors(sound)


def test_a_header_that_is_not_changed_is_the_same_bytes(sound):
    header = read_header(sound)
    assert header.to_bytes() == sound.read_bytes()[: header.data_offset]
    assert header.metadata.items() <= {**read_gguf(sound).metadata}.items()
    assert len(TYPES) == 13


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "bloom", "stablelm", "qwen3_moe", "falcon"])
def test_a_file_of_another_family_is_sound_against_its_model(cli, family, tmp_path):
    from small_families import make_model

    folder = make_model(tmp_path / "model", family, {})
    pi_gguf.convert(str(folder), tmp_path / "m.gguf", quant="F16", check="none")
    assert found(cli, tmp_path / "m.gguf", "--against", folder) == found(cli, tmp_path / "m.gguf") == {}
    arch = load_checkpoint(str(folder)).family.arch
    broken = in_place(tmp_path / "m.gguf", tmp_path / "broken.gguf", {f"{arch}.context_length": Entry.of(77)})
    assert set(found(cli, broken, "--against", folder)) == {f"{arch}.context_length"}
    assert cli("repair", broken, tmp_path / "out.gguf", "--against", folder, "--check", "none")[0] == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_the_command_in_a_process_of_its_own(sound, tmp_path):
    broken = rewritten(sound, tmp_path / "broken.gguf", {S + "type": "dynamic"})
    command = [sys.executable, "-m", "pi_gguf", "inspect", broken]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "llama.rope.scaling.type is dynamic" in done.stdout
