"""What llama.cpp does not survive is found in the header: named, mended where that can be, and nothing else refused."""

from __future__ import annotations

import ctypes
import math
import os
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SHARED_MODELS, in_place, make_llama
from small_families import make_model

import pi_gguf
from pi_gguf.errors import GgufError, OptionError, TextError
from pi_gguf.families import FAMILIES
from pi_gguf.gguf.file import read_gguf, tensor_nbytes, tensor_types
from pi_gguf.gguf.header import TYPES, Entry, is_gguf, read_header
from pi_gguf.gguf.loadable import check_adapter, check_loadable, find_fatal
from pi_gguf.llamacpp.library import ggml_base
from pi_gguf.llamacpp.quantizer import check_quantization, quantizations, spelled
from pi_gguf.runtime.model import Model

pytestmark = pytest.mark.usefixtures("never_a_hang")

A, T = "llama.", "tokenizer.ggml."


@pytest.fixture(scope="module")
def sound(llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "sound.gguf"
    pi_gguf.convert(str(llama), out, quant="F32", check="none", certify=False)
    return out


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    out = folder / "experts.gguf"
    pi_gguf.convert(str(make_model(folder / "mixtral", "mixtral", {})), out, quant="F32", check="none", certify=False)
    return out


def pieces(source: Path, target: Path, **more: Entry | None) -> Path:
    """Write the file with a SentencePiece vocabulary: all bytes, and the letters."""
    rows = read_header(source).entries[f"{T}tokens"].length
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))]
    tokens += [f"<{i}>" for i in range(len(tokens), rows)]
    keys = {
        "model": Entry.of("llama"), "pre": None, "merges": None, "tokens": Entry.of(tokens),
        "scores": Entry.of([-float(i) for i in range(rows)]), "bos_token_id": Entry.of(1), "eos_token_id": Entry.of(2),
        "token_type": Entry.of([2, 3, 3, *[6] * 256, *[1] * (rows - 259)]), **more,
    }  # fmt: skip
    return in_place(source, target, {f"{T}{name}": entry for name, entry in keys.items()})


def dies(path: Path, *, quantize: bool = False) -> bool:
    """Tell whether llama.cpp itself ends on a file, in a process of its own that checks nothing."""
    code = (
        "import sys, ctypes, llama_cpp as c\n"
        "if sys.argv[2] == 'quantize':\n"
        "    p = c.llama_model_quantize_default_params(); p.ftype, p.dry_run = 7, True\n"
        "    c.llama_model_quantize(sys.argv[1].encode(), b'', ctypes.byref(p)); sys.exit(0)\n"
        "m = c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params())\n"
        "if not m: sys.exit(0)\n"
        "v = c.llama_model_get_vocab(m); out = (ctypes.c_int32 * 64)()\n"
        "n = c.llama_tokenize(v, b'Once, 12\\n', 9, out, 64, True, True)\n"
        "s = c.llama_context_default_params(); s.n_ctx = 64; s.n_threads = 1\n"
        "x = c.llama_init_from_model(m, s)\n"
        "if x: c.llama_decode(x, c.llama_batch_get_one(out, max(1, n)))\n"
    )
    command = [sys.executable, "-c", code, str(path), "quantize" if quantize else "open"]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=10, check=False, preexec_fn=_no_core,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True
    return done.returncode < 0


def _no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (2**31,) * 2)


FATAL = {
    "no layers": ({A + "block_count": Entry.of(0)}, A + "block_count", 2),
    "more layers than llama.cpp holds": ({A + "block_count": Entry.of(70_000)}, A + "block_count", 2),
    "predicted layers": ({A + "nextn_predict_layers": Entry.of(9)}, A + "nextn_predict_layers", None),
    "experts without tensors": ({A + "expert_count": Entry.of(64)}, A + "expert_count", None),
    "experts used and none there": ({A + "expert_used_count": Entry.of(2)}, A + "expert_used_count", None),
    "groups without experts": ({A + "expert_group_count": Entry.of(4)}, A + "expert_group_count", None),
    "epsilon below zero": ({A + "attention.layer_norm_rms_epsilon": Entry.of(-1e-6)}, "layer_norm_rms_epsilon", None),
    "epsilon no number": ({A + "attention.layer_norm_rms_epsilon": Entry.of(math.nan)}, "layer_norm_rms_epsilon", None),
    "scaling unknown": ({A + "rope.scaling.type": Entry.of("ntk")}, A + "rope.scaling.type", None),
    "two tokens the same": ({}, T + "tokens", None),
    "begin token asked for": (
        {T + "add_eos_token": Entry.of(True), T + "eos_token_id": Entry.of(99_999), T + "pre": Entry.of("glm4"),
         T + "add_bos_token": Entry.of(True), T + "bos_token_id": None},
        T + "bos_token_id", None,
    ),
    "no vocabulary": ({T + "model": Entry.of("no_vocab")}, T + "model", None),
    "words": ({T + "model": Entry.of("bert"), T + "seperator_token_id": None}, T + "model", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FATAL)
def test_what_llama_cpp_does_not_survive_is_named(name, sound, tmp_path, cli):
    changes, key, right = FATAL[name]
    if name == "two tokens the same":
        tokens = read_header(sound).entries[T + "tokens"].value
        changes = {T + "tokens": Entry.of([*tokens[:300], tokens[7], *tokens[301:]])}
    if name == "words":
        types = [6, *read_header(sound).entries[T + "token_type"].value[1:]]
        changes = {**changes, T + "token_type": Entry.of(types)}
    path = in_place(sound, tmp_path / "model.gguf", changes)
    assert dies(path, quantize="layers" in name or "experts" in name or "scaling" in name)
    findings = list(find_fatal(read_header(path), read_gguf(path).tensors))
    assert [f for f in findings if f.key.endswith(key)], findings
    assert all(f.expected == right for f in findings if f.key.endswith(key))
    code, out, err = cli("run", path, "--prompt", "Once", "--max-tokens", "1")
    assert code == 6, err
    assert len(err.splitlines()) == 2
    assert str(path) in err.splitlines()[0]
    assert key in err.splitlines()[0]
    assert err.splitlines()[1].startswith("hint: ")
    code, out, err = cli("inspect", path)
    assert code == 0, err
    assert key in out


def test_a_number_of_layers_or_experts_is_mended_by_the_tensors(sound, experts, tmp_path, cli):
    for source, key, wrong in (
        (sound, "block_count", 7), (sound, "block_count", 0), (sound, "expert_count", 4), (experts, "expert_count", 16),
        (sound, "expert_used_count", 1), (experts, "expert_count", None),
    ):  # fmt: skip
        header = read_header(source)
        path = in_place(source, tmp_path / "wrong.gguf", {A + key: None if wrong is None else Entry.of(wrong)})
        out = tmp_path / "right.gguf"
        code, _, err = cli("repair", path, out, "--overwrite")
        assert code == 0, err
        assert read_header(out).entries.get(A + key) == header.entries.get(A + key), (key, wrong)


def test_layers_are_as_many_as_llama_cpp_holds_where_no_tensor_tells(sound, tmp_path):
    header = replace(read_header(sound), tensors=[], tensor_infos=b"")
    for count, fatal in ((0, True), (1, False), (512, False), (513, True)):
        path = tmp_path / "m.gguf"
        path.write_bytes(header.changed({A + "block_count": Entry.of(count)}).to_bytes())
        assert dies(path, quantize=True) is fatal
        assert [f.key for f in find_fatal(read_header(path), [])] == [A + "block_count"] * fatal


def test_experts_that_cannot_be_chosen_are_found(experts, tmp_path):
    count = read_header(experts).metadata[A + "expert_count"]
    for used in (0, count + 1):
        path = in_place(experts, tmp_path / "model.gguf", {A + "expert_used_count": Entry.of(used)})
        assert dies(path)
        with pytest.raises(GgufError, match="expert_used_count"):
            check_loadable(read_gguf(path))
    check_loadable(read_gguf(experts))


def test_a_vocabulary_of_pieces_must_have_what_plain_text_needs(sound, tmp_path):
    whole = pieces(sound, tmp_path / "whole.gguf")
    assert not dies(whole)
    check_loadable(read_gguf(whole))
    tokens = read_header(whole).entries[T + "tokens"].value
    lost = [f"[{i}]" if token == "<0x0A>" else token for i, token in enumerate(tokens)]
    path = pieces(sound, tmp_path / "lost.gguf", tokens=Entry.of(lost))
    assert dies(path)
    with pytest.raises(GgufError, match=r"no pieces and no bytes for 1 characters of plain text such as '\\n'"):
        check_loadable(read_gguf(path))
    no_bytes = [f"[{i}]" if token[1:3] == "0x" and token != "<0x0A>" else token for i, token in enumerate(tokens)]
    path = pieces(sound, tmp_path / "letters.gguf", tokens=Entry.of(no_bytes), token_type=None)
    with Model(path, n_ctx=32, device="cpu") as model, Model(whole, n_ctx=32, device="cpu") as sure:
        assert model.tokenize("Once, 12 cats\n") == sure.tokenize("Once, 12 cats\n")
        assert sure.tokenize("é")
        with pytest.raises(TextError, match="no token and no bytes for 'é'"):
            model.tokenize("a café")


def test_heads_given_layer_by_layer_are_counted(sound, tmp_path):
    per_layer = {A + "attention.head_count": Entry.of([4, 4]), A + "attention.head_count_kv": Entry.of([2, 2])}
    path = in_place(sound, tmp_path / "m.gguf", per_layer)
    with Model(path, n_ctx=32, device="cpu") as model, Model(sound, n_ctx=32, device="cpu") as other:
        assert model.kv_cache_bytes == other.kv_cache_bytes
        assert model.tokenize("Once") == other.tokenize("Once")
    check_loadable(read_gguf(path))


def test_a_token_is_what_is_before_a_zero_byte(sound, tmp_path):
    tokens = read_header(sound).entries[T + "tokens"].value
    for other, fatal in ((f"{tokens[300]}\0x", True), ("\0", False), ("", False)):
        path = in_place(sound, tmp_path / "m.gguf", {T + "tokens": Entry.of([*tokens[:301], other, *tokens[302:]])})
        assert dies(path) is fatal
        assert [f.key for f in find_fatal(read_header(path), read_gguf(path).tensors)] == [T + "tokens"] * fatal


def test_a_trie_without_its_single_bytes_never_ends(sound, tmp_path):
    rows = read_header(sound).entries[T + "tokens"].length
    world = ["<s>", *(f"\\x{b:02x}" for b in range(256)), "ab", "\\n\\n", "é"]
    world += [f"a{i}" for i in range(rows - len(world))]
    for tokens, fatal in ((world, False), (["\\n\\t" if t == "\\x0a" else t for t in world], True)):
        path = pieces(sound, tmp_path / "m.gguf", model=Entry.of("rwkv"), tokens=Entry.of(tokens), token_type=None)
        assert fatal or not dies(path)  # the other takes ever more memory, and how that ends is the system's business
        assert [f.key for f in find_fatal(read_header(path), read_gguf(path).tensors)] == [T + "model"] * fatal


def test_heads_that_cannot_be_shared_or_rotated_are_found(sound, tmp_path):
    for key, value in (("attention.head_count_kv", 3), ("attention.value_length", 16), ("rope.dimension_count", 15),
                       ("rope.dimension_count", 0)):  # fmt: skip
        path = in_place(sound, tmp_path / "m.gguf", {A + key: Entry.of(value)})
        with pytest.raises(GgufError, match=rf"{key} is {value}"):
            check_loadable(read_gguf(path))
        check_loadable(read_gguf(path), texts=False)


def test_a_rotation_of_nothing_never_ends(sound, tmp_path):
    """In an architecture that may rotate a part of a head."""
    header = read_header(sound)
    theirs = {key.replace("llama.", "gemma2."): entry for key, entry in header.entries.items() if key[:5] == "llama"}
    theirs |= {"general.architecture": Entry.of("gemma2"), "gemma2.rope.dimension_count": Entry.of(0)}
    path = in_place(sound, tmp_path / "m.gguf", theirs)
    assert "gemma2.rope.dimension_count" in [f.key for f in find_fatal(read_header(path), read_gguf(path).tensors)]


def test_norms_in_16_bits_are_found(sound, tmp_path):
    import gguf
    import numpy as np

    path, narrow = tmp_path / "m.gguf", "blk.1.ffn_norm.weight"
    reader, writer = gguf.GGUFReader(sound), gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for t in reader.tensors:
        writer.add_tensor(t.name, np.array(t.data).astype(np.float16 if t.name == narrow else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert dies(path)
    with pytest.raises(GgufError, match=f"{narrow} is F16, should be F32"):
        check_loadable(read_gguf(path))


def test_what_reads_texts_only_is_not_run_but_quantized(sound, tmp_path):
    path = in_place(sound, tmp_path / "m.gguf", {A + "attention.causal": Entry.of(False)})
    with pytest.raises(GgufError, match="does not continue texts"):
        check_loadable(read_gguf(path))
    check_loadable(read_gguf(path), texts=False)
    assert all(f.severity == "note" for f in find_fatal(read_header(path), read_gguf(path).tensors))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_file_of_ours_is_refused(family, tmp_path):
    model = make_model(tmp_path / "model", family, {})
    out = tmp_path / "model.gguf"
    pi_gguf.convert(str(model), out, quant="F16", check="none", certify=False)
    assert list(find_fatal(read_header(out), read_gguf(out).tensors)) == []


def test_real_models_are_not_refused(tmp_path):
    if not SHARED_MODELS.exists():
        pytest.skip(f"needs the models in {SHARED_MODELS}")
    for name in ("stories260K", "stories15M"):
        out = tmp_path / f"{name}.gguf"
        pi_gguf.convert(str(SHARED_MODELS / name), out, quant="F16", check="none", certify=False)
        check_loadable(read_gguf(out))


# Adapters


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory) -> Path:
    from small_adapters import make_adapter

    folder = tmp_path_factory.mktemp("adapter")
    out = folder / "adapter.gguf"
    saved = make_adapter(llama, folder / "peft", target_modules=["q_proj", "down_proj"])
    pi_gguf.convert(str(llama), out, lora=[str(saved)], adapter_only=True, quant="F32")
    return out


ADAPTERS = {
    "alpha a whole number": (
        {"adapter.lora.alpha": Entry.of(6)},
        "adapter.lora.alpha must be a number of 32 bits, got 6",
    ),
    "alpha infinite": ({"adapter.lora.alpha": Entry.of(math.inf)}, "adapter.lora.alpha"),
    "type a number": ({"general.type": Entry.of(3)}, "general.type must be 'adapter', got 3"),
    "type of a model": ({"general.type": Entry.of("model")}, "general.type must be 'adapter', got 'model'"),
    "kind missing": ({"adapter.type": None}, "adapter.type must be 'lora', it is missing"),
    "another architecture": ({"general.architecture": Entry.of("qwen2")}, "general.architecture must be 'llama'"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_llama_cpp_does_not_survive_is_named(name, adapter, sound, tmp_path, cli):
    changes, said = ADAPTERS[name]
    path = in_place(adapter, tmp_path / "adapter.gguf", changes)
    with pytest.raises(GgufError) as caught:
        check_adapter(read_gguf(path), read_gguf(sound))
    assert said in str(caught.value)
    code, _, err = cli("run", sound, "--lora", path, "--prompt", "Once", "--max-tokens", "1")
    assert (code, len(err.splitlines())) == (6, 2), err


def test_an_adapter_is_of_the_tensors_of_its_base(adapter, sound, tmp_path):
    base = read_gguf(sound)
    check_adapter(read_gguf(adapter), base)
    data = adapter.read_bytes()
    for old, new, said in (
        (b"blk.0.attn_q", b"blk.7.attn_q", "blk.7.attn_q.weight is no tensor of"),
        (b"blk.0.attn_q", b"blk.0.attn_k", "blk.0.attn_k.weight of (4, 64) and (128, 4) does not fit"),
        (b"attn_q.weight.lora_b", b"attn_q.weight.lora_c", "neither a lora_a nor a lora_b"),
    ):
        path = tmp_path / "adapter.gguf"
        path.write_bytes(data.replace(old, new))
        with pytest.raises(GgufError) as caught:
            check_adapter(read_gguf(path), base)
        assert said in str(caught.value)


def test_factors_must_be_of_the_rows_and_the_columns_of_their_tensor(adapter, sound):
    whole, base = read_gguf(adapter), read_gguf(sound)
    name = "blk.0.ffn_down.weight"
    shapes = {t.name: t.shape for t in whole.tensors if t.name.startswith(name)}
    assert shapes == {f"{name}.lora_a": (4, 96), f"{name}.lora_b": (64, 4)}
    for side, shape in (
        ("a", (4, 95)),
        ("a", (5, 96)),
        ("a", (2, 4, 96)),
        ("b", (63, 4)),
        ("b", (64, 5)),
        ("b", (64,)),
    ):
        tensors = [replace(t, shape=shape) if t.name == f"{name}.lora_{side}" else t for t in whole.tensors]
        with pytest.raises(GgufError, match=f"{name} of .* does not fit .64, 96."):
            check_adapter(replace(whole, tensors=tensors), base)


def test_an_adapter_of_an_embedding_that_is_the_head_is_refused(adapter, sound):
    whole, base = read_gguf(adapter), read_gguf(sound)
    rows = next(t.shape for t in base.tensors if t.name == "token_embd.weight")
    pair = [
        replace(whole.tensors[0], name=f"token_embd.weight.lora_{s}", shape=(n, 4))
        for s, n in zip("ab", rows, strict=True)
    ]
    check_adapter(replace(whole, tensors=pair), base)
    tied = replace(base, tensors=[t for t in base.tensors if t.name != "output.weight"])
    with pytest.raises(GgufError, match="the embedding is the head, too"):
        check_adapter(replace(whole, tensors=pair), tied)


def test_what_is_no_model_is_named_with_what_it_is_for(adapter, sound, cli, tmp_path):
    for arguments in (("run", adapter, "--prompt", "a"), ("quantize", adapter, tmp_path / "o.gguf", "--quant", "Q8_0")):
        code, _, err = cli(*arguments)
        assert (code, err.splitlines()[-1][:5]) == (6, "hint:")
        assert "general.type is adapter, it is no model" in err
        assert "--lora" in err
    code, out, _ = cli("inspect", adapter, "--json")
    assert code == 0
    assert "no model" in out
    check_loadable(read_gguf(in_place(sound, tmp_path / "m.gguf", {"general.type": Entry.of("adapter")})))


# Headers


def header_bytes(*, keys: int = 0, tensors: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors % 2**64, keys % 2**64) + body


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


U8, STRING, ARRAY = (TYPES.index(kind) for kind in ("UINT8", "STRING", "ARRAY"))
HUGE = {
    "2^63 keys": header_bytes(keys=2**63),
    "2^63 tensors": header_bytes(tensors=2**63),
    "a million tensors without names": header_bytes(tensors=2**20),
    "a key of 2^60 bytes": header_bytes(keys=1, body=struct.pack("<Q", 2**60)),
    "a text of 2^60 bytes": header_bytes(keys=1, body=text(b"k") + struct.pack("<IQ", STRING, 2**60)),
    "a text of 1.5 GB": header_bytes(keys=1, body=text(b"k") + struct.pack("<IQ", STRING, 3 * 2**29)),
    "a billion bytes": header_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", ARRAY, U8, 2**30)),
    "2^61 bytes": header_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", ARRAY, U8, 2**61)),
    "a billion texts": header_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", ARRAY, STRING, 2**30)),
    "a hundred million texts": header_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", ARRAY, STRING, 10**8)),
    "a tensor of 2^31 sides": header_bytes(tensors=1, body=text(b"t") + struct.pack("<I", 2**31)),
    "a tensor of 10^8 sides": header_bytes(tensors=1, body=text(b"t") + struct.pack("<I", 10**8)),
    "an alignment of 2^31": header_bytes(
        keys=1, tensors=1, body=text(b"general.alignment") + struct.pack("<II", 4, 2**31) + text(b"t") + bytes(24)
    ),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("length", [0, 2**31])
def test_a_header_of_huge_numbers_is_refused_at_once(name, length, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(HUGE[name])
    os.truncate(path, max(length, path.stat().st_size))  # a hole behind it: as many zeros as it asks for
    started = time.monotonic()
    with pytest.raises(GgufError, match="truncated or not a GGUF file"):
        read_gguf(path)
    assert time.monotonic() - started < 1


def test_a_file_cut_anywhere_is_refused(sound, tmp_path):
    data, path = sound.read_bytes(), tmp_path / "m.gguf"
    end = read_header(sound).data_offset
    for length in [*range(0, end, 37), end, len(data) // 2, len(data) - 40]:
        path.write_bytes(data[:length])
        with pytest.raises(GgufError):
            read_gguf(path)


# Names


def test_a_file_is_gguf_by_its_first_bytes_whatever_it_is_called(sound, llama, tmp_path):
    blob, other, missing = tmp_path / "sha256-0123", tmp_path / "weights.bin", tmp_path / "none.gguf"
    blob.write_bytes(sound.read_bytes())
    other.write_bytes(b"PK\3\4 and more")
    for path, known in ((blob, True), (sound, True), (other, False), (missing, True), (llama, False)):
        assert is_gguf(path) is known, path
    (tmp_path / "broken.gguf").write_bytes(b"PK")
    assert is_gguf(tmp_path / "broken.gguf")
    assert not is_gguf("bundled:tiny")
    assert not is_gguf("a\0b")


def test_a_file_without_its_ending_is_evaluated(sound, tmp_path, cli):
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(sound.read_bytes())
    words = tmp_path / "words.txt"
    words.write_text("Once upon a time there was a cat on a wall. " * 20)
    options = ("--text", words, "--windows", "32", "--stride", "16", "--samples", "1")
    assert cli("eval", "perplexity", blob, *options)[0] == 0
    assert cli("imatrix", blob, tmp_path / "m.gguf", "--text", words, "--context", "32", "--tokens", "64")[0] == 0
    assert cli("card", blob)[0] == 0
    code, _, err = cli("eval", "perplexity", tmp_path / "none.gguf", *options)
    assert code == 6
    assert "no such file" in err


SPELLINGS = {
    "q4_k_m": "Q4_K_M", "q4_K_M": "Q4_K_M", "Q4_K": "Q4_K_M", "q5_k": "Q5_K_M", "q3_k": "Q3_K_M", "q4km": "Q4_K_M",
    "Q4-K-M": "Q4_K_M", "q8": "Q8_0", "q80": "Q8_0", "fp16": "F16", "float16": "F16", "bfloat16": "BF16", "fp32": "F32",
    "not_quantized": "F16", "fast_quantized": "Q8_0", "mostly_q4_0": "Q4_0", "Q6_K_L": "Q6_K", "q4_0_4_8": "Q4_0",
    "iq4nl": "IQ4_NL", "tq1_0": "TQ1_0", "q2_k": "Q2_K", " f16 ": "F16",
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_a_type_are_understood_and_told(name, capfd):
    assert check_quantization(name) == SPELLINGS[name]
    said = capfd.readouterr().err
    alias = name.upper() != SPELLINGS[name]
    assert said == (f"note: {name} is taken for {SPELLINGS[name]}\n" if alias else "")


def test_every_name_of_llama_cpp_is_itself_and_an_unknown_one_has_neighbours():
    for known in (quantizations(), tensor_types()):
        for name in known:
            assert spelled(name, known) == spelled(name.lower(), known) == name
    with pytest.raises(OptionError) as caught:
        check_quantization("Q4_K_X")
    assert "Q4_K_M" in caught.value.hint
    assert spelled("q4_k_m", tensor_types()) == "Q4_K"
    assert spelled("fp16", tensor_types()) == "F16"
    for name in ("", "x", "Q99", "IQ", "K"):
        assert spelled(name, quantizations()) is None


def test_sizes_of_types_are_those_of_ggml():
    library = ggml_base()
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_row_size.restype = ctypes.c_size_t
    for name, number in tensor_types().items():
        assert tensor_nbytes(name, (3, 512)) == 3 * library.ggml_row_size(number, 512), name


def test_the_newest_type_is_written_and_read(tmp_path):
    out = tmp_path / "m.gguf"
    wide = make_llama(tmp_path / "wide", hidden_size=256, intermediate_size=256)
    pi_gguf.convert(str(wide), out, quant="Q2_0", check="none", certify=False)
    assert "Q2_0" in {t.type for t in read_gguf(out).tensors}
    with Model(out, n_ctx=32, device="cpu") as model:
        assert model.tokenize("Once")


@pytest.mark.parametrize("name", ["output.weight", "blk.1.ffn_down.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_a_matrix_of_indices_is_found_before_it_is_multiplied_with(sound, name):
    info = read_gguf(sound)
    assert name in {t.name for t in info.tensors} and not list(find_fatal(info.header, info.tensors))
    for kind in ("I8", "I32", "F64", "Q8_1"):
        tensors = [replace(t, type=kind) if t.name == name else t for t in info.tensors]
        assert [finding.key for finding in find_fatal(info.header, tensors) if finding.found == kind] == [name]
