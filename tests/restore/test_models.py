"""A GGUF file where a MODEL stands: planned, extended and converted as the folder that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tensors

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.restore.models import as_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pi-gguf"


def test_anything_else_is_as_it_is(llama):
    assert as_folder(str(llama)) == str(llama)
    assert as_folder("bundled:tiny") == "bundled:tiny" and as_folder("owner/name") == "owner/name"


def test_a_file_is_unpacked_once_for_each_of_its_states(f32_gguf, tmp_path, cache):
    file = tmp_path / "model.gguf"
    file.write_bytes(f32_gguf.read_bytes())
    folder = as_folder(str(file))
    assert load_checkpoint(folder).name == "model" and folder.startswith(str(cache))
    (cache / folder / "seen").touch()
    assert as_folder(str(file)) == folder and (cache / folder / "seen").exists()
    file.write_bytes(f32_gguf.read_bytes())
    assert as_folder(str(file)) != folder


def test_any_part_that_changed_or_is_gone_is_seen(llama, tmp_path):
    options = {"quant": "F32", "check": "none", "certify": False}
    parts = pi_gguf.convert(str(llama), tmp_path / "file.gguf", split_max_size="300K", **options).files
    assert len(parts) > 1
    folder = as_folder(parts[0])
    assert [as_folder(part) for part in parts] == [folder] * len(parts), "one folder, whichever part is given"
    last = Path(parts[-1])
    last.write_bytes(last.read_bytes()[:-64] + bytes(64))
    changed = as_folder(parts[0])
    assert changed != folder and load_checkpoint(changed).name == load_checkpoint(folder).name
    last.unlink()
    with pytest.raises(GgufError, match=f"{last.name}: no such file"):
        as_folder(parts[0])


def test_a_plan_writes_no_weights(f32_gguf, llama, cache):
    plans = [pi_gguf.plan(str(model), context=1024, device="cpu") for model in (f32_gguf, llama)]
    assert plans[0].parameters == plans[1].parameters
    assert (plans[0].factor, plans[0].original_window) == (16.0, 64)  # it was at 4 already
    assert not list(cache.rglob("*.safetensors")) and len(list(cache.rglob("config.json"))) == 1


def test_a_file_converts_as_its_folder(f32_gguf, llama, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "folder.gguf", quant="Q8_0", context=1024, steps=0, certify=False)
    [check] = pi_gguf.convert(
        str(f32_gguf), tmp_path / "file.gguf", quant="Q8_0", context=1024, steps=0, certify=False
    ).checks
    assert check.context_length == 1024 and check.kl_divergence is not None
    assert tensors(tmp_path / "file.gguf") == tensors(tmp_path / "folder.gguf")
    ropes = [read_gguf(tmp_path / f"{name}.gguf").rope for name in ("file", "folder")]
    assert ropes[0] == ropes[1]


@pytest.mark.parametrize("split", [False, True])
def test_another_window_is_another_header(split, llama, tmp_path, cache):
    options = {"quant": "Q8_0", "check": "none", "certify": False}
    pi_gguf.convert(str(llama), tmp_path / "file.gguf", **options, **({"split_max_size": "60K"} if split else {}))
    source = sorted(tmp_path.glob("file*.gguf"))[0]
    result = pi_gguf.convert(str(source), tmp_path / "out.gguf", context=256, steps=0, quant="Q8_0", certify=False)
    assert len(result.files) == len(list(tmp_path.glob("file*.gguf"))) and (len(result.files) > 1) == split
    assert not list(cache.rglob("*.safetensors"))
    folder = pi_gguf.convert(str(llama), tmp_path / "folder.gguf", context=256, steps=0, **options)
    for file, before in zip(result.files, sorted(tmp_path.glob("file*.gguf")), strict=True):
        assert tensors(file) == tensors(before)
    info, other = read_gguf(Path(result.path)), read_gguf(Path(folder.path))
    assert info.rope == other.rope and info.rope.factor == 4
    assert {k: v for k, v in info.metadata.items() if k.startswith("llama.")} == {
        k: v for k, v in other.metadata.items() if k.startswith("llama.")
    }
    back = pi_gguf.convert(result.path, tmp_path / "more.gguf", context=512, steps=0, quant="Q8_0")
    assert read_gguf(Path(back.path)).rope.factor == 8
    assert back.certificate is not None and back.certificate.window == 512
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_file_of_another_type_is_converted_through_its_folder(f32_gguf, tmp_path, cache):
    result = pi_gguf.convert(str(f32_gguf), tmp_path / "out.gguf", context=512, steps=0, quant="F16", check="none")
    assert read_gguf(Path(result.path)).quantization == "F16" and list(cache.rglob("*.safetensors"))


def test_a_file_is_extended(f32_gguf, tmp_path):
    out = pi_gguf.extend(str(f32_gguf), tmp_path / "out", context=512, steps=0, device="cpu")
    assert load_checkpoint(str(out)).rope.factor == 8
    assert json.loads((out / "pi_gguf.json").read_text())["source"] == f32_gguf.stem


def test_what_cannot_be_unpacked_on_the_way_is_said(f32_gguf, tmp_path, monkeypatch):
    with pytest.raises(GgufError, match="no such file"):
        pi_gguf.plan(str(tmp_path / "absent.gguf"))
    monkeypatch.setattr("pi_gguf.restore.models.process_count", lambda: 2)
    with pytest.raises(OptionError, match="not unpacked on the way by several processes") as refusal:
        as_folder(str(f32_gguf))
    assert "pi-gguf unpack" in refusal.value.hint
