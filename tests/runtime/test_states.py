"""States on disk: what comes back is what was kept, or nothing; whatever becomes of the files and the disk."""

from __future__ import annotations

import os
import random
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from kills import can_mount

from pi_gguf.errors import OptionError
from pi_gguf.runtime import states as module
from pi_gguf.runtime.states import Kept, States, file_digest, file_mark, user_states

READER = {"file": "a", "llama_cpp": "b"}
SIZE = 10_000


def ids_of(seed: int, count: int = 400) -> list[int]:
    return np.random.default_rng(seed).integers(0, 2**31, count).tolist()


def state_of(ids: list[int], size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(ids[-1]).integers(0, 256, size, np.uint8)


def keep(states: States, ids: list[int], size: int = SIZE, **options: object) -> Kept | None:
    def fill(place: np.ndarray) -> int:
        place[:] = state_of(ids, size)
        return size

    return states.keep(
        **{"identity": READER, "document": "book", "model": "m", **options}, ids=ids, size=size, fill=fill
    )


def found(states: States, ids: list[int], reader: dict[str, str] = READER, window: int = 10**6) -> list[int] | None:
    """The ids of the state that is given for `ids`, whose bytes are what was kept."""
    with states.longest(reader, ids, window) as one:
        if one is None:
            return None
        assert (one.state == state_of(one.ids, one.kept.state_bytes)).all()
        return one.ids


@pytest.fixture
def states(tmp_path):
    return States(tmp_path / "cache" / "documents")


def test_what_was_kept_comes_back(states):
    ids = ids_of(1)
    kept = keep(states, ids, whole=False)
    assert (kept.tokens, kept.state_bytes, kept.document, kept.whole) == (400, SIZE, "book", False)
    assert found(states, ids) == found(states, [*ids, 7]) == found(states, ids[:300]) == ids
    assert states.entries()[0].path == kept.path and len(states.entries()) == 1
    assert kept.nbytes == kept.path.stat().st_size


def test_only_the_same_reader_gets_it(states):
    ids = ids_of(1)
    mine = keep(states, ids).path
    assert found(states, ids, {**READER, "llama_cpp": "c"}) is None
    assert found(states, ids, {"llama_cpp": "b", "file": "a"}) == ids
    other = {**READER, "file": "z"}
    of_other = keep(states, ids, identity=other).path
    mine.replace(of_other)
    assert found(states, ids, other) is None, "a file under another's name is not what it is called"


def test_the_one_with_most_in_common_is_given(states):
    ids = ids_of(1, 2000)
    for kept in (ids[:500], [*ids[:900], *ids_of(2, 500)], [*ids[:900], 5], ids_of(3)):
        keep(states, kept)
    assert found(states, ids) == [*ids[:900], 5], "of two that have as much in common the shorter one"
    assert found(states, ids, window=900) == ids[:500], "one that the window has no room for is not"
    few = module.WORTH_IT - 1
    assert found(states, [*ids[:few], *ids_of(4)]) is None and found(states, ids[: few + 1])


def test_others_cannot_read_them(states):
    before = os.umask(0)
    try:
        kept = keep(states, ids_of(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(states.folder.stat().st_mode) == 0o700


# Damaged files


def parts(path: Path) -> dict[str, int]:
    """A place in each part of a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[32:40], "little")
    return {
        "name": 3, "version": 14, "checksum": 20, "length": 33, "header": 40 + 5, "identity": data.index(b'"b"') + 1,
        "tokens": data.index(b'"tokens"') + 3, "ids": 40 + length + 4 * 350, "zeros": len(data) - SIZE - 1,
        "state": len(data) - SIZE + 77, "end": len(data) - 1,
    }  # fmt: skip


PARTS = (
    "name", "version", "checksum", "length", "header", "identity", "tokens", "ids", "zeros", "state", "end",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bit", [0, 6])
def test_a_flipped_bit_is_never_a_state(states, part, bit, capsys):
    ids = ids_of(1)
    shorter = keep(states, ids[:300])
    kept = keep(states, ids)
    data = bytearray(kept.path.read_bytes())
    data[parts(kept.path)[part]] ^= 1 << bit
    kept.path.write_bytes(data)
    assert found(states, ids) == ids[:300], "the next best one is given"
    states.entries()
    if part != "identity":  # then it is another reader's, as far as one can see
        assert not kept.path.exists() and f"{kept.path}: not used and removed" in capsys.readouterr().err
    assert shorter.path.exists()


def test_no_damage_at_all_is_an_error(states):
    ids, chance = ids_of(1), random.Random(5)
    whole = keep(states, ids).path.read_bytes()
    path = states.entries()[0].path
    for _ in range(300):
        data = bytearray(whole)
        head = 40 + int.from_bytes(whole[32:40], "little")
        for _ in range(chance.choice([1, 1, 5])):
            data[chance.randrange(head if chance.random() < 0.8 else len(data))] = chance.randrange(256)
        path.write_bytes(data)
        states.entries()
        assert found(states, ids) in ((None,) if data != whole else (ids,))


@pytest.mark.parametrize("left", [0, 1, 39, 40, 100, 1000, 4096, 4096 + SIZE - 1])
def test_a_file_that_is_cut_off_is_never_a_state(states, left, capsys):
    kept = keep(states, ids_of(1))
    os.truncate(kept.path, left)
    assert found(states, ids_of(1)) is None and not states.entries() and not kept.path.exists()
    assert capsys.readouterr().err.count("not used and removed") == 1


@pytest.mark.parametrize(
    "head",
    [b"[]", b"{}", b"3", b"[" * 50_000, b'{"tokens": 1e999, "state": 1}', b'{"tokens": [], "state": 1}', b"\xff"],
)
def test_headers_of_other_kinds_are_no_states(states, head):
    kept = keep(states, ids_of(1))
    fixed = kept.path.read_bytes()[:32]
    kept.path.write_bytes(fixed + len(head).to_bytes(8, "little") + head)
    assert states.entries() == [] and found(states, ids_of(1)) is None


def test_what_is_no_file_of_ours_is_let_be(states, tmp_path):
    ids = ids_of(1)
    kept = keep(states, ids)
    names = [kept.path.with_name(f"{kept.path.name[:17]}{digit * 32}.state") for digit in "abcd"]
    names[0].mkdir()
    (names[0] / "thesis.txt").write_text("mine")
    os.mkfifo(names[1])
    names[2].symlink_to(tmp_path / "nowhere")
    names[3].symlink_to("/dev/zero")
    (states.folder / "my-notes.state").write_text("mine")
    assert found(states, ids) == ids and [one.path for one in states.entries()] == [kept.path]
    states.prune(0)
    assert {path.name for path in states.folder.iterdir()} == {"my-notes.state", *(path.name for path in names)}
    kept = keep(states, ids)
    kept.path.unlink()
    kept.path.mkdir()
    assert found(states, ids) is None and keep(states, ids) is None and kept.path.is_dir()


# The limit


def test_the_least_recently_used_go_first(states):
    every = [ids_of(seed) for seed in range(4)]
    for age, ids in enumerate(every):
        kept = keep(states, ids)
        os.utime(kept.path, (1, time.time() - 1000 + age))
    found(states, every[0])
    assert [one.tokens for one in states.entries()] == [400] * 4
    gone = states.prune(2 * kept.nbytes)
    assert len(gone) == 2 and found(states, every[0]) and found(states, every[3])
    states.limit = 2 * kept.nbytes
    os.utime(states.entries()[-1].path, (1, 1))
    keep(states, ids_of(9))
    assert sum(one.nbytes for one in states.entries()) <= states.limit
    assert found(states, ids_of(9)), "the new one is in"
    keep(states, ids_of(9))
    assert len(states.entries()) == 2, "in place of itself it takes no more room"


def test_a_state_above_the_limit_is_not_kept_and_drives_nothing_out(states, capsys):
    kept = keep(states, ids_of(1))
    states.limit = kept.nbytes
    assert keep(states, ids_of(2), size=10 * SIZE) is None
    assert capsys.readouterr().err.startswith("what was read of book is not kept: it takes ")
    assert found(states, ids_of(1))


def test_a_state_that_goes_while_it_is_used_stays_readable(states, monkeypatch):
    ids = ids_of(1)
    shorter, kept = keep(states, ids[:300]), keep(states, ids)
    with states.longest(READER, ids, 10**6) as one:
        kept.path.unlink()
        assert (one.state == state_of(ids)).all()
    keep(states, ids)
    heads = States._heads

    def gone_after_listing(self, *reader):
        listed = list(heads(self, *reader))
        kept.path.unlink()
        return iter(listed)

    monkeypatch.setattr(States, "_heads", gone_after_listing)
    assert found(states, ids) == ids[:300] and shorter.path.exists()


# The disk


def child(states: States, code: str, **settings: object) -> subprocess.Popen[str]:
    """A process with this module's names and `states`."""
    lines = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
    lines += f"from test_states import *\nstates = States(Path({str(states.folder)!r}))\n{code}"
    return subprocess.Popen([sys.executable, "-c", lines], stderr=subprocess.PIPE, text=True, **settings)


def test_a_kill_while_saving_leaves_no_name_and_the_next_one_tidies(states):
    before = keep(states, ids_of(1))
    code = (
        "import signal\n"
        "def fill(place):\n    place[: len(place) // 2] = 1\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "states.keep(READER, ids_of(2), SIZE, fill, document='book', model='m')"
    )
    assert child(states, code).wait(60) == -9
    assert [one.path for one in states.entries()] == [before.path] and found(states, ids_of(2)) is None
    assert [path.suffix for path in states.folder.iterdir() if path.is_dir()] == [".partial"]
    keep(states, ids_of(3))
    assert {path.suffix for path in states.folder.iterdir()} == {".state"}, "what it had begun is gone"


def test_two_processes_on_one_cache(states):
    code = (
        "states.limit = 6 * 16384\n"
        "for i in range(60):\n"
        "    for kept in states.entries()[::3]: kept.path.unlink(missing_ok=True)\n"
        "    ids = ids_of(i % 7)\n"
        "    keep(states, ids)\n"
        "    assert found(states, ids) in (None, ids)\n"
    )
    children = [child(states, code) for _ in range(2)]
    said = [one.communicate(timeout=120)[1] for one in children]
    assert [one.returncode for one in children] == [0, 0], said
    assert not any("removed" in text for text in said), "nobody ever sees half a state"
    assert {path.suffix for path in states.folder.iterdir()} == {".state"}


def test_files_that_may_not_grow_keep_nothing(states, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
    try:
        assert keep(states, ids_of(1)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "book is not kept: " in (err := capsys.readouterr().err) and "files may not become so large" in err
    assert list(states.folder.iterdir()) == [] and keep(states, ids_of(1))


@pytest.mark.skipif(not can_mount(), reason="needs to be allowed to mount a disk")
def test_a_full_disk_keeps_nothing(states, monkeypatch, capsys):
    states.folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", states.folder], check=True)
    try:
        assert keep(states, ids_of(1), size=2**20) is None
        assert "1.0 MiB needed" in capsys.readouterr().err
        monkeypatch.setattr(module, "check_free_disk", lambda *_: None)  # filled by another one in between
        assert keep(states, ids_of(1), size=2**20) is None
        assert "the disk is full" in capsys.readouterr().err
        assert list(states.folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", states.folder], check=True)


def test_a_folder_that_cannot_be_keeps_nothing(tmp_path, capsys):
    (tmp_path / "file").touch()
    states = States(tmp_path / "file" / "documents")
    assert keep(states, ids_of(1)) is None and capsys.readouterr().err.count("\n") == 1
    assert found(states, ids_of(1)) is None and states.entries() == [] == states.prune(0)


def test_a_state_that_llama_cpp_does_not_fill_is_not_kept(states, capsys):
    assert states.keep(READER, ids_of(1), SIZE, lambda place: SIZE - 1, document="book", model="m") is None
    assert "gave 9,999 of 10,000 bytes" in capsys.readouterr().err and states.entries() == []


def test_without_a_home_nothing_is_kept_and_that_is_said(monkeypatch, tmp_path, capsys):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("PI_GGUF_CACHE", str(tmp_path / "here"))
    assert user_states().folder == tmp_path / "here" / "documents"
    assert user_states(tmp_path, 5).folder == tmp_path / "documents" and user_states(tmp_path, 5).limit == 5
    monkeypatch.delenv("PI_GGUF_CACHE")
    assert user_states().folder == Path(os.environ["XDG_CACHE_HOME"]) / "pi-gguf" / "documents"
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_states() is None and "nothing that is read is kept" in capsys.readouterr().err
    (tmp_path / "data").write_bytes(b"data")
    digest = file_digest(tmp_path / "data", file_mark(tmp_path / "data"))
    assert digest == xxhash.xxh3_128_hexdigest(b"data"), "and files have checksums all the same"


# Names


def test_what_is_kept_has_names(states):
    keep(states, ids_of(1), document="a")
    keep(states, ids_of(2), document="book, part 1 of 2")
    keep(states, ids_of(3), document="book, part 2 of 2")
    two = keep(states, ids_of(3), document="other", identity={"file": "z"})
    assert len({one.key for one in states.entries()}) == 4, "a key is of a document as one reader has read it"
    assert [one.tokens for one in states.named("a")] == [400], "not all whose key begins with it"
    assert len(states.named("book")) == 2 and len(states.named("book, part 2 of 2")) == 1
    assert [one.path for one in states.named(two.key)] == [two.path] == [one.path for one in states.named(two.key[:8])]
    for name in ("", "b", two.key[:3], "none"):
        with pytest.raises(OptionError, match="nothing of this name is kept"):
            states.named(name)


# Checksums of files


def test_a_checksum_is_remembered_while_the_file_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    mark = file_mark(path)
    first = file_digest(path, mark)
    assert first == xxhash.xxh3_128_hexdigest(b"one")
    (memo,) = (tmp_path / "cache" / "pi-gguf" / "digests").iterdir()
    memo.write_text("0" * 32)
    assert file_digest(path, mark) == "0" * 32, "it is not read again"
    for damage in ("", "0" * 31, "0" * 33, "x" * 32):
        memo.write_text(damage)
        assert file_digest(path, mark) == first
    path.write_bytes(b"two")
    assert file_digest(path, mark) == mark != first, "what was opened is not what lies there now"
    assert file_digest(path, file_mark(path)) == xxhash.xxh3_128_hexdigest(b"two")
