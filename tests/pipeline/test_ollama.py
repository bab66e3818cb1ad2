"""Modelfiles for Ollama: what they say of a file, read as Ollama's own parser reads them."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from books import CHATML, with_template
from helpers import make_chat_model, make_llama

import pi_gguf
from pi_gguf.errors import GgufError, OptionError, ResourceError, UnsupportedError
from pi_gguf.gguf.header import Entry, read_header, write_changed


def read_modelfile(path):
    """Read instructions, as Ollama does: a value is a line, in quotes or not, and quotes have no escapes."""
    found = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, value = line.split(" ", 1)
            if name == "PARAMETER":
                name, value = value.split(" ", 1)
            value = value.strip()
            found.append((name, value[1:-1] if value.startswith('"') else value))
    return found


def from_of(path):
    """Return the file that a Modelfile names, from wherever Ollama is called."""
    source = dict(read_modelfile(path))["FROM"]
    return Path(source) if source.startswith("/") else path.parent / source


def test_a_modelfile_says_window_end_and_file(f32_gguf, tmp_path):
    made = pi_gguf.export_ollama(f32_gguf, tmp_path / "some" / "ollama")
    path = tmp_path / "some" / "ollama" / "Modelfile"
    assert read_modelfile(path) == [("FROM", str(f32_gguf)), ("num_ctx", "256"), ("stop", "</s>")]
    assert (made.path, made.name, made.num_ctx, made.stop) == (str(path), "sound", 256, ["</s>"])
    assert made.cache_bytes == 2 * 2 * 32 * 256 * (2 + 2), "layers, heads, their size, tokens, K and V in 16 bits"
    assert made.has_template is False
    assert sorted(p.name for p in path.parent.iterdir()) == ["Modelfile"]


def test_a_file_in_the_folder_is_named_by_its_name(f32_gguf, tmp_path, monkeypatch):
    shutil.copy(f32_gguf, tmp_path / "my model.gguf")
    monkeypatch.chdir(tmp_path)
    made = pi_gguf.export_ollama("my model.gguf", ".")
    assert read_modelfile(Path("Modelfile"))[0] == ("FROM", "./my model.gguf")
    assert made.commands == ("ollama create my-model -f Modelfile", "ollama run my-model")
    (tmp_path / "link").symlink_to(tmp_path)
    pi_gguf.export_ollama("my model.gguf", "link", overwrite=True)
    assert from_of(Path("Modelfile")).samefile("my model.gguf")
    pi_gguf.export_ollama("./my model.gguf", "else where")
    assert from_of(Path("else where/Modelfile")) == tmp_path / "my model.gguf"


def test_stops_are_the_special_tokens_that_end_an_answer(tmp_path):
    folder = make_chat_model(make_llama(tmp_path / "chat"), CHATML, ["<|im_start|>", "<|im_end|>"], None, "</s>")
    pi_gguf.convert(str(folder), tmp_path / "chat.gguf", quant="F32", check="none")
    with pi_gguf.open(tmp_path / "chat.gguf") as model:
        ends = [i for i in range(model.n_vocab) if model.is_end(i)]
    made = pi_gguf.export_ollama(tmp_path / "chat.gguf", tmp_path / "out")
    assert made.has_template and made.stop == ["</s>", "<|im_end|>"] and len(ends) == 2
    assert [value for name, value in read_modelfile(tmp_path / "out" / "Modelfile") if name == "stop"] == made.stop
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()


def test_a_word_that_any_text_may_have_is_no_stop(f32_gguf, tmp_path):
    header = read_header(f32_gguf)
    word = header.entries["tokenizer.ggml.tokens"].value.index("e")
    write_changed(header.changed({"tokenizer.ggml.eos_token_id": Entry.of(word)}), tmp_path / "word.gguf")
    with pi_gguf.open(tmp_path / "word.gguf") as model:
        assert model.is_end(word)
    assert pi_gguf.export_ollama(tmp_path / "word.gguf", tmp_path / "out").stop == ["</s>"]


def test_the_command_prints_the_two_commands(cli, f32_gguf, tmp_path):
    with_template(f32_gguf, tmp_path / "-it's 32k_.gguf", CHATML)
    code, out, _ = cli("export", "ollama", tmp_path / "-it's 32k_.gguf", tmp_path / "a b")
    assert code == 0
    create, run = out.splitlines()[-2:]
    assert create == f"next: ollama create it-s-32k -f '{tmp_path}/a b/Modelfile'"
    assert run.strip() == "ollama run it-s-32k"
    assert "num_ctx: 256; its cache takes 128.0 KiB" in out and "template: left to the file" in out
    code, out, _ = cli("export", "ollama", tmp_path / "-it's 32k_.gguf", tmp_path / "a b", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["commands"][1] == "ollama run it-s-32k"


def test_a_modelfile_that_is_there_stays(cli, f32_gguf, tmp_path):
    (tmp_path / "Modelfile").write_text("FROM my-own")
    code, _, err = cli("export", "ollama", f32_gguf, tmp_path)
    assert code == 2 and err == f"error: {tmp_path}/Modelfile: exists\nhint: give another name, or --overwrite\n"
    assert (tmp_path / "Modelfile").read_text() == "FROM my-own"


def damaged(path, f32_gguf):
    path.write_bytes(f32_gguf.read_bytes()[:2000])


def of_two_parts(path, f32_gguf):
    write_changed(read_header(f32_gguf).changed({"split.count": Entry.of(2)}), path)


def without_window(path, f32_gguf):
    write_changed(read_header(f32_gguf).changed({"llama.context_length": None}), path)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path, _: path.write_text("no model"), GgufError, "not a GGUF file"),
        (damaged, GgufError, "truncated"),
        (without_window, GgufError, "llama.context_length must be a positive integer, it is missing"),
        (of_two_parts, UnsupportedError, "is one of 2 parts"),
    ],
)
def test_what_is_no_file_of_a_model_leaves_nothing(make, error, said, f32_gguf, tmp_path):
    make(tmp_path / "m.gguf", f32_gguf)
    with pytest.raises(error, match=said) as caught:
        pi_gguf.export_ollama(tmp_path / "m.gguf", tmp_path / "out")
    assert str(caught.value).startswith(str(tmp_path / "m.gguf")) and caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", ["a\nb.gguf", "a\tb.gguf", os.fsdecode(b"a\xffb.gguf"), "a\u00a0b.gguf"])
def test_a_name_that_ollama_cannot_read_is_an_error(name, f32_gguf, tmp_path):
    shutil.copy(f32_gguf, tmp_path / name)
    with pytest.raises(OptionError, match="Ollama reads no name with such characters"):
        pi_gguf.export_ollama(tmp_path / name, tmp_path)
    assert not (tmp_path / "Modelfile").exists()


def test_no_room_is_an_error(f32_gguf, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = pi_gguf.export_ollama(f32_gguf, tmp_path / "first")  # what else is written once is there now
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(ResourceError, match="Modelfile: files may not become so large"):
            pi_gguf.export_ollama(f32_gguf, tmp_path / "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(made.path).stat().st_size > 64 and not list((tmp_path / "second").iterdir())
