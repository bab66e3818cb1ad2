"""Nothing is lost and nothing is left: one writer for each output, private work folders, interrupts, full disks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import contents

from pi_gguf.common.files import (
    check_writable,
    one_writer,
    parse_bytes,
    publish,
    replace_when_complete,
    temporary,
    write_text,
)
from pi_gguf.errors import OptionError, ResourceError

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # children end at once

EVERY_WRITER = {
    "convert": lambda model, gguf, out: ("convert", model, f"{out}.gguf", "--quant", "F16", "--check", "none"),
    "extend": lambda model, gguf, out: ("extend", model, out, "--context", "256", "--steps", "0"),
    "quantize": lambda model, gguf, out: ("quantize", gguf, f"{out}.gguf", "--quant", "Q8_0"),
    "imatrix": lambda model, gguf, out: ("imatrix", gguf, f"{out}.gguf", "--context", "64", "--tokens", "64"),
    "repair": lambda model, gguf, out: ("repair", gguf, f"{out}.gguf", "--set", "general.name=x"),
    "card": lambda model, gguf, out: ("card", gguf, "--out", f"{out}.md"),
    "plot": lambda model, gguf, out: ("eval", "bounds", model, "--context", "128", "--plot", f"{out}.png"),
    "keep": lambda model, gguf, out: (
        "eval", "passkey", gguf, "--windows", "256", "--distances", "1", "--keys", "1", "--keep", f"{out}.jsonl"
    ),
    "report": lambda model, gguf, out: ("eval", "report", model, gguf, "--out", out),
    "demo": lambda model, gguf, out: ("demo", "--out", out),
}  # fmt: skip
"""Every kind of output, by what writes it."""

SUFFIXES = {"card": ".md", "plot": ".png", "keep": ".jsonl", "extend": "", "report": "", "demo": ""}


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "made"


def refused(result: tuple[int, str, str], code: int, *says: Any) -> None:
    got, _, err = result
    lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert got == code and "Traceback" not in err, err
    assert len(lines) == 2 and lines[1].startswith("hint: ") and len(lines[1]) > 10, err
    for text in says:
        assert str(text) in lines[0]


# One writer


def _hold(paths: list[Path], ready: Any, leave: Any) -> None:
    with ExitStack() as held:
        for path in paths:
            (held.enter_context(one_writer(path)) / "unfinished").write_text("x")
        ready.set()
        leave.wait(60)


class Holder:
    """A process that writes outputs, as far as others can see."""

    def __init__(self, *paths: Path) -> None:
        context = multiprocessing.get_context("fork")
        ready, self._leave = context.Event(), context.Event()
        self.process = context.Process(target=_hold, args=(paths, ready, self._leave), daemon=True)
        self.process.start()
        assert ready.wait(60)

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self.process.join(30)
        self.process.kill()


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """One process for all of the outputs: it holds `made` with every suffix."""
    folder = tmp_path_factory.mktemp("held")
    with Holder(*(folder / f"made{suffix}" for suffix in {*SUFFIXES.values(), ".gguf"})) as holder:
        yield folder / "made", holder.process.pid


@pytest.mark.parametrize("command", EVERY_WRITER)
def test_a_second_writer_is_refused_with_who_the_first_is(cli, llama, f32_gguf, held, command):
    out, holder = held
    before = contents(out.parent)
    result = cli(*EVERY_WRITER[command](llama, f32_gguf, out))
    refused(result, 2, f"made{SUFFIXES.get(command, '.gguf')}: is being written by process", "since")
    assert f"process {holder} " in result[2]
    assert contents(out.parent) == before


def test_certify_is_a_writer_of_its_file(cli, f32_gguf, tmp_path):
    path = tmp_path / "own.gguf"
    path.write_bytes(f32_gguf.read_bytes())
    with Holder(path):
        refused(cli("certify", path), 2, path, "is being written by process")
    assert path.read_bytes() == f32_gguf.read_bytes()


def test_the_lock_is_gone_with_its_process_and_what_it_left_stays(out):
    holder = Holder(out)
    holder.process.kill()
    holder.process.join()
    with one_writer(out) as folder:
        assert (folder / "unfinished").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["made.partial"]
    with one_writer(out) as folder:
        (folder / "unfinished").unlink()
    assert list(out.parent.iterdir()) == []


def test_threads_of_one_process_exclude_each_other_and_a_thread_not_itself(out):
    found: list[BaseException] = []

    def second() -> None:
        try:
            write_text(out, "second")
        except OptionError as error:
            found.append(error)

    with one_writer(out):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        write_text(out, "first")
    assert len(found) == 1 and f"process {os.getpid()} " in str(found[0])
    assert contents(out.parent) == {"made": b"first"}


RACE = """
import sys, time
from pathlib import Path
from pi_gguf.errors import OptionError
from pi_gguf.common.files import replace_when_complete
out, name, end = Path(sys.argv[1]), sys.argv[2], time.time() + float(sys.argv[3])
wrote = refused = 0
while time.time() < end:
    try:
        with replace_when_complete(out) as partial:
            with partial.open("x") as file:
                file.write(name * 1000)
                file.flush()
                assert partial.read_text() == name * 1000
        wrote += 1
    except OptionError as error:
        assert "is being written by process" in str(error), error
        refused += 1
assert wrote and refused, (wrote, refused)
"""


def test_writers_that_race_never_share_a_work_folder(out):
    """Locks come and go some thousand times; a lock file that is deleted while another opens it must not count."""
    commands = [[sys.executable, "-c", RACE, str(out), name, "2.5"] for name in "abc"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, err = process.communicate(timeout=50)
        assert process.returncode == 0, err
    assert len(set(out.read_text())) == 1 and len(out.read_text()) == 1000
    assert list(out.parent.iterdir()) == [out]


# Work folders of others


def _folder_of_files(partial: Path) -> None:
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")


def _folder_with_link(partial: Path) -> None:
    partial.mkdir()
    (partial / "lock").symlink_to(partial.parent / "precious")


def _own_folder_with(add: Any) -> Any:
    def make(partial: Path) -> None:
        with one_writer(partial.with_name(partial.name.removesuffix(".partial"))) as folder:
            (folder / "kept").write_text("x")
            add(folder)

    return make


FOREIGN = {
    "a folder of files": _folder_of_files,
    "a file": lambda partial: partial.write_text("mine"),
    "a link to a folder": lambda partial: partial.symlink_to(partial.parent),
    "a dangling link": lambda partial: partial.symlink_to("nowhere"),
    "a lock that is a link": _folder_with_link,
    "a pipe": os.mkfifo,
    "our folder with a link in it": _own_folder_with(lambda f: (f / "made.gguf").symlink_to("../../precious")),
    "our folder with a second name of a file in it": _own_folder_with(
        lambda f: os.link(f.parent / "precious", f / "made.gguf")
    ),
    "our folder with a pipe in it": _own_folder_with(lambda f: os.mkfifo(f / "made.gguf.state")),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", ["convert", "extend", "quantize", "imatrix"])
def test_what_is_in_the_way_is_left_as_it_is(cli, llama, f32_gguf, out, kind, command):
    (out.parent / "precious").write_text("precious")
    FOREIGN[kind](out.with_name(f"made{SUFFIXES.get(command, '.gguf')}.partial"))
    before = contents(out.parent)
    refused(cli(*EVERY_WRITER[command](llama, f32_gguf, out)), 2, ".partial")
    assert contents(out.parent) == before


def test_what_another_put_into_our_folder_outlives_the_run(cli, llama, out):
    with one_writer(out.with_suffix(".gguf")) as folder:
        (folder / "mine.txt").write_text("mine")
    code, _, err = cli(*EVERY_WRITER["convert"](llama, None, out))
    assert code == 0 and "note: " in err and "it stays" in err
    assert (out.with_name("made.gguf.partial") / "mine.txt").read_text() == "mine"


def test_the_work_folder_is_private(out):
    with one_writer(out) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    write_text(out, "x")
    (out.parent / "plain").write_text("x")
    assert out.stat().st_mode == (out.parent / "plain").stat().st_mode


def test_what_a_dead_writer_left_in_tmp_is_deleted(out):
    child = os.fork()
    if not child:
        with temporary(out, "half") as half:
            half.write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (out.with_name("made.partial") / "tmp" / "half").exists()
    write_text(out, "whole")
    assert contents(out.parent) == {"made": b"whole"}


# Publishing


def test_a_folder_is_never_replaced_by_a_file_nor_a_file_by_a_folder(out):
    out.mkdir()
    (out / "thesis.txt").write_text("work")
    with pytest.raises(OptionError, match="is a folder"), replace_when_complete(out) as partial:
        partial.write_text("x")
    assert contents(out.parent) == {"made": None, "made/thesis.txt": b"work"}
    file = out.with_name("file")
    file.write_text("work")
    with pytest.raises(OptionError, match="is a file"), replace_when_complete(file) as partial:
        partial.mkdir()
    assert file.read_text() == "work" and len(list(out.parent.iterdir())) == 2


@pytest.mark.parametrize("made", [os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(str(path))])
def test_an_output_that_is_no_file_is_refused(out, made, monkeypatch):
    monkeypatch.chdir(out.parent)
    made(Path("made"))
    with pytest.raises(OptionError, match="a device or a pipe"):
        check_writable(Path("made"), overwrite=True)


def test_a_dangling_link_counts_as_something_that_is_there(out):
    out.symlink_to("nowhere")
    with pytest.raises(OptionError, match="exists"):
        check_writable(out, overwrite=False)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_kill_while_a_folder_replaces_a_folder_loses_neither(out, when):
    out.mkdir()
    (out / "old").write_text("old")
    child = os.fork()
    if not child:
        rename = Path.rename

        def killed(self: Path, target: Path) -> Path:
            if when == ("before" if self == out else "between"):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(self, target)
            if when == "after" and self != out:
                os.kill(os.getpid(), signal.SIGKILL)
            return target

        Path.rename = killed  # type: ignore[method-assign]
        with replace_when_complete(out) as partial:
            partial.mkdir()
            (partial / "new").write_text("new")
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with one_writer(out):
        pass
    expected = {"made": None, "made/new": b"new"} if when == "after" else {"made": None, "made/old": b"old"}
    assert contents(out.parent) == expected


def test_what_is_published_is_on_the_disk_first(out, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd))[1]
    )
    with replace_when_complete(out) as partial:
        partial.mkdir()
        (partial / "weights").write_text("x")
    assert synced == ["made", "weights", "out"]


@pytest.mark.parametrize("command", ["bounds", "perplexity"])
def test_a_plot_asks_before_it_replaces_a_file(cli, llama, f32_gguf, out, command, tmp_path):
    plot = out.with_suffix(".svg")
    plot.write_text("drawn by hand")
    (tmp_path / "t.txt").write_text("Once upon a time there was a cat. " * 100)
    arguments = {
        "bounds": ("eval", "bounds", llama, "--context", "128", "--plot", plot),
        "perplexity": (
            "eval", "perplexity", f32_gguf, "--text", tmp_path / "t.txt", "--windows", "64", "--stride", "32",
            "--samples", "1", "--plot", plot,
        ),
    }[command]  # fmt: skip
    refused(cli(*arguments), 2, plot, "exists")
    assert plot.read_text() == "drawn by hand"
    assert cli(*arguments, "--overwrite")[0] == 0
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(("command", "name"), [("report", "report.html"), ("demo", "results.json")])
def test_a_folder_of_other_results_is_not_written_over(cli, llama, f32_gguf, out, command, name):
    out.mkdir()
    (out / name).write_text("mine")
    refused(cli(*EVERY_WRITER[command](llama, f32_gguf, out)), 2, name, "exists")
    assert contents(out) == {name: b"mine"}


# Disks and limits


def test_a_limit_of_the_size_of_files_is_an_error_of_ours(out):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(ResourceError, match="may not become so large"), replace_when_complete(out) as partial:
            partial.write_bytes(bytes(10000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(out.parent.iterdir()) == []


def test_names_that_are_none_are_refused():
    for name in (".", "..", "/"):
        with pytest.raises(OptionError, match="is no name of an output"), one_writer(Path(name)):
            pass


def test_a_record_of_who_writes_is_one_line_of_json(out):
    with one_writer(out) as folder:
        record = json.loads((folder / "lock").read_text())
        assert record["pi_gguf"] == os.getpid() and record["since"].startswith("20")


def test_publishing_needs_no_more_than_a_rename(out):
    with one_writer(out) as folder:
        made = folder / "made"
        made.write_text("x")
        number = made.stat().st_ino
        publish(made, out)
    assert out.stat().st_ino == number and list(out.parent.iterdir()) == [out]


def test_names_of_models_are_drawn_as_they_are(tmp_path):
    """They are no formulas, and need not be text."""
    from types import SimpleNamespace

    from pi_gguf.measure.plots import plot_perplexity

    rows = [SimpleNamespace(window=n, perplexity=3.0, standard_error=0.1) for n in (64, 128)]
    plot_perplexity({r"a$\nope{$.gguf": rows, os.fsdecode(b"b\xff.gguf"): rows}, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_nobody_waits_for_a_pipe(cli, f32_gguf, tmp_path):
    os.mkfifo(tmp_path / "report.json")
    os.mkfifo(tmp_path / "task.yaml")
    for code, *words in (
        (6, "quantize", f32_gguf, tmp_path / "o.gguf", "--quant", "Q8_0", "--imatrix", tmp_path / "report.json"),
        (2, "card", f32_gguf, "--report", tmp_path),
        (2, "eval", "short", f32_gguf, "--task-dir", tmp_path, "--tasks", "task"),
    ):
        found, _, err = cli(*words)
        assert found == code and "a pipe or a device" in err, err


def test_a_file_of_settings_that_no_checkpoint_has_is_not_read(cli, llama_copy, tmp_path):
    for name in ("generation_config.json", "tokenizer.json"):
        path = llama_copy / name
        whole = path.read_bytes()
        os.truncate(path, 2**40)
        code, _, err = cli("convert", llama_copy, tmp_path / "o.gguf", "--quant", "F16", "--check", "none")
        assert code == 3 and f"{name}: of 1,099,511,627,776 bytes" in err
        path.write_bytes(whole)


def test_sizes_are_read_in_decimal_units():
    sizes = {"500M": 5 * 10**8, "1.5G": 15 * 10**8, "2k": 2000, "3TB": 3 * 10**12, " 20 ": 20}
    assert {text: parse_bytes(text, "cache-size") for text in sizes} == sizes
    assert parse_bytes("0", "cache-size", least=0) == 0
    for wrong in ("0", "", "M", "-1", "4X", "1e9", "\u0664G"):
        with pytest.raises(OptionError, match="split-max-size must be a number of bytes such as 500M or 4G, got "):
            parse_bytes(wrong, "split-max-size")
