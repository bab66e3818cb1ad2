"""Split files, in the layout of llama.cpp's own tool: inspected, repaired, quantized and unpacked as one."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

import pi_gguf
from pi_gguf.common.files import publish
from pi_gguf.errors import GgufError
from pi_gguf.gguf.file import read_gguf
from pi_gguf.gguf.header import Entry, read_header, write_changed
from pi_gguf.gguf.parts import complete, name_of_all, part_paths, whole
from pi_gguf.prove.inspect import inspect
from pi_gguf.prove.repair import repair


def split_as_llama_cpp(source, target, count, *, empty_first=False):
    """Write a file in `count` parts as llama-gguf-split does: all keys and as many of the tensors in the first, or none
    (--no-tensor-first-split), and in each split.no (u16), split.count (u16) and split.tensors.count (i32)."""
    header, reader = read_header(source), GGUFReader(source)
    names = [place.name for place in header.tensors]
    paths = part_paths(target, count)
    for number, path in enumerate(paths):
        begin, end = ((n - empty_first) * len(names) // (count - empty_first) for n in (number, number + 1))
        mine = names[max(0, begin) : end]
        keys = {
            "split.no": Entry.of(number, "UINT16"), "split.count": Entry.of(count, "UINT16"),
            "split.tensors.count": Entry.of(len(names), "INT32"),
        }  # fmt: skip
        entries = {**(header.entries if number == 0 else {}), **keys}
        infos, data = b"", b""
        for tensor in reader.tensors:
            if tensor.name not in mine:
                continue
            sides = [int(side) for side in tensor.shape]
            infos += struct.pack("<Q", len(tensor.name)) + tensor.name.encode() + struct.pack("<I", len(sides))
            infos += struct.pack(f"<{len(sides)}Q", *sides) + struct.pack("<IQ", int(tensor.tensor_type), len(data))
            raw = np.ascontiguousarray(tensor.data).tobytes()
            data += raw + bytes(-len(raw) % 32)
        places = [place for place in header.tensors if place.name in mine]
        made = type(header)(path, header.version, entries, places, infos, 0)
        front = made.to_bytes()
        path.write_bytes(front + bytes(-len(front) % 32) + data)
    return paths


@pytest.fixture
def parts(f32_gguf, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return split_as_llama_cpp(f32_gguf, folder / "model.gguf", 3)


def damaged(parts, **changes):
    """Change keys of the first part; None removes one."""
    header = read_header(parts[0])
    kinds = {key: entry.type for key, entry in header.entries.items()}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    rekeyed(parts[0], {key: None if value is None else Entry.of(value, kinds[key]) for key, value in named.items()})


def rekeyed(part, entries):
    """Give one part other keys; None removes one."""
    write_changed(read_header(part).changed(entries), part.with_suffix(".new"))
    part.with_suffix(".new").replace(part)


def test_any_part_shows_the_whole(parts, f32_gguf, cli):
    alone = inspect(f32_gguf)
    reports = [inspect(part) for part in parts]
    assert reports[0] == reports[1] == reports[2]
    report = reports[0]
    assert report.path == str(parts[0]) and report.parts == [str(part) for part in parts]
    assert (report.tensors, report.window, report.rope, report.findings) == (
        alone.tensors,
        alone.window,
        alone.rope,
        [],
    )
    assert report.nbytes == sum(part.stat().st_size for part in parts) and report.llama_cpp == alone.llama_cpp != {}
    assert sum(len(read_gguf(part).tensors) for part in parts) == len(read_gguf(f32_gguf).tensors)
    code, out, _ = cli("inspect", parts[2])
    assert code == 0 and all(part.name in "".join(out.split()).replace("│", "") for part in parts)
    assert alone.parts == []


@pytest.mark.parametrize("given", [0, 1])
def test_a_first_part_may_have_no_tensors(given, f32_gguf, tmp_path):
    parts = split_as_llama_cpp(f32_gguf, tmp_path / "model.gguf", 2, empty_first=True)
    assert not read_header(parts[0]).tensors and read_header(parts[0]).data_offset % 32
    report = inspect(parts[given])
    assert report.findings == [] and report.llama_cpp == inspect(f32_gguf).llama_cpp != {}
    pi_gguf.quantize(parts[given], tmp_path / "q.gguf", quant="Q8_0")
    assert len(read_gguf(tmp_path / "q.gguf").tensors) == len(read_gguf(f32_gguf).tensors)
    repair(parts[given], tmp_path / "named.gguf", set=["general.name=another"])
    assert inspect(tmp_path / "named-00002-of-00002.gguf").findings == []


def test_missing_parts_are_named(parts, cli):
    parts[1].unlink()
    report = inspect(parts[2])
    assert [finding.key for finding in report.findings] == [parts[1].name]
    assert whole(parts[2]).header.metadata["split.count"] == 3, "tensors of others are not taken for lost"
    assert "is missing" in str(report.findings[0]) and report.repair is None and report.warnings
    for command in (
        ("repair", parts[0], parts[0].with_name("out.gguf")),
        ("quantize", parts[2], parts[0].with_name("q.gguf")),
    ):
        code, _, err = cli(*command)
        assert code == 6 and f"{parts[1].name}: no such file, and it is one of 3 parts" in err
    parts[0].unlink()
    code, _, err = cli("inspect", parts[2])
    assert code == 6 and f"{parts[0].name}: no such file, and it has the metadata of all 3 parts" in err


def test_defects_are_those_of_all_parts(parts, f32_gguf, llama):
    damaged(parts, llama__block_count=7)  # known only when the tensors of all parts are
    findings = {finding.key: finding for finding in inspect(parts[1]).findings}
    assert findings["llama.block_count"].expected == 2
    assert complete(parts[0]).header.metadata.get("split.count") is None


def test_what_does_not_go_together_is_found(parts, f32_gguf, tmp_path):
    others = split_as_llama_cpp(f32_gguf, tmp_path / "other.gguf", 3)
    shutil.copy(others[1], parts[2])
    report = inspect(parts[0])
    keys = [finding.key for finding in report.findings]
    assert "split.no" in keys and "in several parts" in {finding.found for finding in report.findings}
    with pytest.raises(GgufError, match=r"split\.no is 1, should be 2"):
        complete(parts[1])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(GgufError, match="is one of 3 parts and not called so"):
        whole(renamed)


LOST = {
    "absent": None,
    "float": Entry.of(3.0, "FLOAT32"),
    "bool": Entry.of(True, "BOOL"),
    "list": Entry.of([3], "[UINT16]"),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("lost", LOST)
def test_a_lost_count_is_found_and_not_taken_for_one_file(number, lost, parts, tmp_path, cli):
    rekeyed(parts[number], {"split.count": LOST[lost]})
    for part in parts:
        assert (
            whole(part).paths == parts and len(whole(part).tensors) == whole(part).first.metadata["split.tensors.count"]
        )
    report = inspect(parts[number])
    assert [(finding.key, finding.expected) for finding in report.findings] == [("split.count", 3)]
    assert parts[number].name in report.findings[0].text
    code, _, err = cli("repair", parts[number], tmp_path / "out.gguf", "--set", "general.name=another")
    assert code == 6 and "split.count" in err and not list(tmp_path.glob("out*"))


def test_either_keys_or_other_parts_tell_that_a_file_is_a_part(parts, f32_gguf, tmp_path):
    rekeyed(parts[0], {"split.count": None})
    for part in parts[1:]:
        part.unlink()
    assert whole(parts[0]).missing == parts[1:], "its other keys say so"
    alone = part_paths(tmp_path / "alone.gguf", 2)
    shutil.copy(f32_gguf, alone[0])
    assert not whole(alone[0]).is_split, "nothing but its name does"
    shutil.copy(f32_gguf, alone[1])
    assert whole(alone[0]).paths == alone
    assert {finding.key for finding in whole(alone[1]).findings()} >= {"split.no", "split.count"}


def test_tensors_that_are_lost_between_parts_are_counted(parts):
    rekeyed(parts[0], {"split.tensors.count": Entry.of(99, "INT32")})
    assert [finding.key for finding in inspect(parts[1]).findings] == ["split.tensors.count"]


@pytest.mark.parametrize("number", [0, 2])
def test_a_misplaced_tensor_is_found_in_any_part(parts, number):
    part = parts[number]
    data, header = part.read_bytes(), read_header(part)
    place = header.tensors[-1]
    old, new = (struct.pack("<Q", place.offset + more) for more in (0, 32))
    at = data.rindex(old, 0, header.data_offset)
    part.write_bytes(data[:at] + new + data[at + 8 :] + bytes(32))
    assert [finding.key for finding in inspect(parts[0]).findings] == [place.name]


@pytest.mark.parametrize("given", [0, 2])
def test_repair_writes_every_part_again(given, parts, llama, tmp_path, cli):
    sound = [part.read_bytes() for part in parts]
    damaged(parts, llama__context_length=128)
    broken = parts[0].read_bytes()
    report = repair(parts[given], tmp_path / "mended.gguf", against=str(llama))
    finals = part_paths(tmp_path / "mended.gguf", 3)
    assert report.path == str(finals[0])
    assert [(change.key, change.old, change.new) for change in report.changes] == [("llama.context_length", 128, 256)]
    assert [final.read_bytes() for final in finals] == sound, "to the byte"
    assert inspect(finals[1], against=str(llama)).findings == []
    assert parts[0].read_bytes() == broken and not list(tmp_path.glob("*.partial"))
    code, out, _ = cli("inspect", parts[0], "--against", llama)
    assert code == 0 and "model-repaired.gguf" in "".join(out.split()).replace("│", "")


def test_repair_replaces_no_part_of_its_own_and_none_unasked(parts, llama, tmp_path, cli):
    damaged(parts, llama__rope__scaling__factor=2.0)
    before = [part.read_bytes() for part in parts]
    code, _, err = cli("repair", parts[0], name_of_all(parts[0]), "--against", llama, "--overwrite")
    assert code == 2 and "source and target are the same file" in err
    (tmp_path / "new-00002-of-00003.gguf").write_bytes(b"of somebody")
    code, _, err = cli("repair", parts[0], tmp_path / "new.gguf", "--against", llama)
    assert code == 2 and "new-00002-of-00003.gguf" in err
    assert (tmp_path / "new-00002-of-00003.gguf").read_bytes() == b"of somebody"
    assert [part.read_bytes() for part in parts] == before
    assert sorted(path.name for path in tmp_path.glob("new*")) == ["new-00002-of-00003.gguf"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [(), (0, 1, 2), (0, 2)])
def test_a_repair_that_is_stopped_leaves_what_was_there(stop, there, parts, llama, tmp_path, monkeypatch):
    damaged(parts, llama__rope__scaling__factor=2.0)
    folder = tmp_path / "out"
    folder.mkdir()
    finals = part_paths(folder / "new.gguf", 3)
    for number in there:
        finals[number].write_bytes(b"older %d" % number)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    named = []

    def stopped(partial, final):
        if final == finals[0]:
            assert not final.exists(), "an older first part opens with no new ones"
            raise stop("stopped")
        publish(partial, final)
        named.append(final)

    with monkeypatch.context() as patched:
        patched.setattr("pi_gguf.prove.repair.publish", stopped)
        with pytest.raises(stop, match="stopped"):
            repair(parts[0], folder / "new.gguf", against=str(llama), overwrite=True)
    assert named[-2:] == finals[:0:-1], "the one that is opened comes last"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    repair(parts[0], folder / "new.gguf", against=str(llama), overwrite=bool(there))
    assert sorted(folder.iterdir()) == finals and inspect(finals[0]).findings == []


def test_parts_that_a_kill_left_unnamed_are_brought_back(parts, llama, tmp_path, cli):
    damaged(parts, llama__rope__scaling__factor=2.0)
    finals = part_paths(tmp_path / "new.gguf", 3)
    for final in finals:
        final.write_bytes(b"older " + final.name.encode())
    script = (
        "import os, sys\nfrom pi_gguf.prove import repair as module\nnormal = module.publish\n"
        "def publish(partial, final):\n    if final.name == 'new-00001-of-00003.gguf':\n        os._exit(9)\n"
        "    normal(partial, final)\nmodule.publish = publish\n"
        "module.repair(sys.argv[1], sys.argv[2], against=sys.argv[3], check='none', overwrite=True)\n"
    )
    command = [sys.executable, "-c", script, str(parts[0]), str(tmp_path / "new.gguf"), str(llama)]
    assert subprocess.run(command, check=False).returncode == 9 and not finals[0].exists()
    code, _, err = cli("repair", parts[0], tmp_path / "new.gguf", "--against", llama)
    assert code == 2 and "exists" in err
    assert [final.read_bytes() for final in finals] == [b"older " + final.name.encode() for final in finals]
    assert not list(tmp_path.glob("*.partial"))


def test_quantize_and_convert_take_any_part(parts, f32_gguf, tmp_path, cli):
    for i, source in enumerate((f32_gguf, parts[0], parts[2])):
        pi_gguf.quantize(source, tmp_path / f"{i}.gguf", quant="Q8_0")
    contents = [
        {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(tmp_path / f"{i}.gguf").tensors} for i in range(3)
    ]
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == len(read_gguf(f32_gguf).tensors)
    assert read_header(tmp_path / "2.gguf").metadata.get("split.count", 1) in (0, 1)
    code, out, _ = cli("plan", parts[1], "--context", "512", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["context"] == 512
    code, _, err = cli("quantize", parts[0], parts[1], "--overwrite", "--quant", "Q8_0")
    assert code == 2 and "same file" in err
