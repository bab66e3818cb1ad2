"""Strangers' texts: what is no file, what is no text, and what is too long to be held at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_llama

from pi_gguf import texts as texts_module
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.provenance import without_folders
from pi_gguf.data import tokens as corpus_module
from pi_gguf.data.tokens import load_corpus
from pi_gguf.errors import TextError
from pi_gguf.texts import LONGEST, open_texts, read_texts


def test_what_is_no_file_in_a_folder_is_left_out_and_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "notes.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.md").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "null.txt").symlink_to("/dev/zero")
    assert read_texts([str(tmp_path)]) == {str(tmp_path / "a.txt"): "a text"}
    assert open_texts([str(tmp_path)]).labels == ["a.txt"]
    said = capsys.readouterr().err
    for name in ("pipe.txt", "gone.md", "loop.txt", "null.txt"):
        assert f"{name} is left out" in said
    assert "notes.txt" not in said


@pytest.mark.parametrize("name", ["pipe.txt", "zero.txt", "gone.txt", "loop.txt", "a\0b.txt", "a" * 300 + ".txt"])
def test_a_text_that_is_no_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for read in (read_texts, open_texts):
        with pytest.raises(TextError) as error:
            read([str(tmp_path / name)])
        assert error.value.hint


def test_a_byte_that_is_no_text_is_named_wherever_it_lies(tmp_path):
    path = tmp_path / "a.txt"
    at = 3 * texts_module._BLOCK + 17
    body = ("ä" * (at // 2) + "a" * (at % 2)).encode()
    for broken in (b"\xff", b"\xc3("):
        path.write_bytes(body + broken + b" and so on")
        with pytest.raises(TextError, match=rf"not UTF-8 at byte {at}$"):
            read_texts([str(path)])
    path.write_bytes(body + b"\xe2\x82")  # cut off inside of a letter
    with pytest.raises(TextError, match=rf"not UTF-8 at byte {at}$"):
        read_texts([str(path)])


def test_letters_across_blocks_and_ends_of_lines_are_read_as_python_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "_BLOCK", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffAnna zählt\r\n17 → 🦆\rEnde\n".encode())
    assert read_texts([str(path)]) == {str(path): path.read_text(encoding="utf-8-sig")}


SPARSE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20,) * 2)
from pi_gguf.texts import LONGEST, open_texts, read_texts
(text,) = read_texts([sys.argv[1]]).values()
assert len(text) == LONGEST
(text,) = open_texts([sys.argv[1]]).read(1000)
print(len(text))
"""


def test_a_sparse_file_takes_little_memory(tmp_path):
    path = tmp_path / "sparse.txt"
    with path.open("wb") as file:
        file.truncate(2**29)
    done = subprocess.run([sys.executable, "-c", SPARSE, path], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1000\n"
    assert f"the first {LONGEST:,} characters are read" in done.stderr


def test_a_line_of_json_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * 2000}))
    with pytest.raises(TextError, match=r"a\.jsonl:2: a line of more than 1,000 bytes"):
        read_texts([str(path)])


@pytest.mark.parametrize("ends", ["a line", "a word", "nothing"])
def test_a_long_text_is_tokenized_in_pieces_that_are_the_same_text(llama, tmp_path, monkeypatch, ends):
    text = {"a line": "the cat sat\non a mat", "a word": "the cat sat on a mat ", "nothing": "abcdefghij"}[ends] * 300
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "short.txt").write_text("a short one")
    texts, checkpoint = open_texts([str(tmp_path)]), load_checkpoint(str(llama))
    folders = [tmp_path / name for name in ("whole", "pieces")]
    for folder in folders:
        folder.mkdir()
    whole = load_corpus(checkpoint, texts, folders[0])
    monkeypatch.setattr(corpus_module, "_PIECE_CHARACTERS", 1000)
    pieces = load_corpus(checkpoint, texts, folders[1])
    tokenizer = checkpoint.load_tokenizer()
    assert len(pieces) == len(whole) == 2
    assert list(pieces[0]) == list(whole[0])
    assert tokenizer.decode(pieces[1]) == tokenizer.decode(whole[1])
    assert (pieces[1] == tokenizer.bos_token_id).sum() == (pieces[1] == tokenizer.eos_token_id).sum() == 1
    assert len(pieces[1]) <= len(whole[1]) * 1.02 + 3
    if ends == "a word":
        assert list(pieces[1]) == list(whole[1])


def test_of_a_text_that_is_longer_than_a_run_the_rest_is_left_out(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "LONGEST", 256)
    (tmp_path / "t.txt").write_text("the cat sat on a mat " * 1000)
    texts, checkpoint = open_texts([str(tmp_path / "t.txt")]), load_checkpoint(str(llama))
    short = load_corpus(checkpoint, texts, tmp_path, tokens=100)
    longer = load_corpus(checkpoint, texts, tmp_path, tokens=1000)
    assert 100 < len(short[0]) < len(longer[0]) and len(longer[0]) > 1000


def test_training_says_which_documents_it_cuts(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus_module, "LONGEST", 256)
    (tmp_path / "long.txt").write_text("a cat sat " * 26)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (256, 257)))
    (tmp_path / "short.txt").write_text("a" * 254 + "\r\n")
    load_corpus(load_checkpoint(str(llama)), open_texts([str(tmp_path)]), tmp_path)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    cut = [tmp_path / "long.txt", f"{tmp_path / 'rows.jsonl'}:2"]
    assert notes == [f"note: {name}: the first 256 characters are read" for name in cut]


def test_reports_name_files_without_their_folders():
    told = {
        "models": ["/home/alice/ACME/a.gguf", "/home/bob/a.gguf", "rel/a.gguf", "org/model"],
        "k_max": {"/home/alice/ACME/a.gguf": 1, "/home/bob/a.gguf": 2},
        "missing": "failed: /home/alice/ACME/a.gguf: no such file, see https://a.org/b/c or 3 tokens/s",
        "n": (1, 2.5, None, True),
    }
    assert without_folders(told) == {
        "models": ["a.gguf", "a.gguf (2)", "rel/a.gguf", "org/model"],
        "k_max": {"a.gguf": 1, "a.gguf (2)": 2},
        "missing": "failed: a.gguf: no such file, see https://a.org/b/c or 3 tokens/s",
        "n": [1, 2.5, None, True],
    }


def test_no_report_on_the_command_line_tells_where_things_are(cli, llama, tmp_path):
    (tmp_path / "secret.txt").write_text("Once upon a time there was a cat. " * 100)
    options = ("--text", tmp_path / "secret.txt", "--windows", "32", "--stride", "16", "--samples", "1", "--json")
    code, out, err = cli("eval", "perplexity", llama, *options)
    assert code == 0, err
    assert str(tmp_path) not in out and str(llama.parent) not in out and "secret.txt" in out


def test_a_card_holds_whatever_a_file_states_as_one_value(tmp_path):
    import yaml

    from pi_gguf.gguf.header import Entry, read_header, write_changed
    from pi_gguf.pipeline.convert import convert
    from pi_gguf.prove.card import card

    model = make_llama(tmp_path / "model")
    convert(str(model), tmp_path / "plain.gguf", quant="F32", check="none")
    hostile = 'mit\n---\nbase_model: x: "y" # \x07 \u2028 <script>`|'
    path = tmp_path / "a ; rm -rf `x` $(y).gguf"
    header = read_header(tmp_path / "plain.gguf").changed(
        {"general.license": Entry.of(hostile), "general.name": Entry.of(hostile)}
    )
    write_changed(header, path)
    text = card(path).text
    _, front, body = text.split("---\n", 2) if text.startswith("---\n") else ("", "", "")
    stated = yaml.safe_load(front)
    assert stated["license"] == hostile and set(stated) <= {"library_name", "tags", "base_model", "license"}
    assert "<script>" not in body and "\n---\n" not in body
    assert "pi-gguf run 'a ; rm -rf x $(y).gguf' <" in body


def test_a_name_that_is_no_utf8_is_converted_quantized_and_read(cli, llama, tmp_path):
    plain = tmp_path / os.fsdecode(b"pl\xffin.gguf")
    assert cli("convert", llama, plain, "--quant", "F32", "--check", "none")[0] == 0
    quantized = tmp_path / os.fsdecode(b"q\xfe.gguf")
    assert cli("quantize", plain, quantized, "--quant", "Q8_0")[0] == 0
    code, out, err = cli("run", quantized, "--prompt", "Once", "--max-tokens", "2")
    assert code == 0 and out, err
    assert cli("inspect", plain)[0] == 0
    assert sorted(Path(p).name for p in map(os.fspath, tmp_path.iterdir())) == sorted([plain.name, quantized.name])
