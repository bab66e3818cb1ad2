"""What is told while work goes on: bars on a terminal, lines elsewhere, nothing where that is asked for."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from typing import Any

import pytest

from pi_gguf.common import progress
from pi_gguf.common.progress import Lines, Work, duration, output, progress_bar, say

STEP = """
import sys, time
from pi_gguf.common import progress
progress.FIRST_SECONDS = progress.LINE_SECONDS = 0.2
with progress.output(*eval(sys.argv[1])):
    progress.say("a note")
    with progress.progress_bar("quick", 3, "steps") as advance:
        advance(3)
    with progress.phase("open [bold]it"):
        time.sleep(0.5)
    with progress.progress_bar("fine-tune", 4, "steps") as advance:
        for i in range(4):
            time.sleep(0.25)
            advance(text=f"loss {4 - i}")
print("the result")
"""


def told(*arguments: object, **environment: str) -> str:
    """Run the steps above, standard error being a pipe; return what it holds."""
    command = [sys.executable, "-c", STEP, repr(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, env={**os.environ, **environment})
    assert run.returncode == 0 and run.stdout == "the result\n", run.stderr
    return run.stderr


NESTED = """
import time
from pi_gguf.common import progress
with progress.output(*eval(__import__("sys").argv[1])), progress.phase("outside"):
    time.sleep(0.4)
    with progress.progress_bar("inside", 3, "steps") as advance:
        for i in range(3):
            time.sleep(0.2)
            advance()
    with progress.aside():
        print("another library", file=__import__("sys").stderr)
    time.sleep(0.4)
"""


def told_on_a_terminal(*arguments: object, step: str = STEP) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", step, repr(arguments)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    found: list[bytes] = []

    def read() -> None:
        while part := _read(ours):
            found.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, timeout=50, env=environment, check=True)
    finally:
        os.close(theirs)
        reader.join(10)
        os.close(ours)
    return b"".join(found).decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # its other side is closed
        return b""


def spoken(lines: Lines, seconds: range) -> dict[int, str]:
    """Ask at each of these seconds, as the thread does; return what was due."""
    return {now: line for now in seconds if (line := lines.tick(now))}


def begun(lines: Lines, now: float, title: str = "fine-tune", total: float | None = 690, unit: str = "steps") -> Work:
    work = Work(title, total, unit, now)
    lines.begin(work)
    return work


@pytest.fixture(autouse=True)
def first_line_after_a_second(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 1.0)


# When


def test_the_first_line_comes_after_a_second_and_one_each_30_then():
    lines = Lines()
    begun(lines, 1000)
    assert list(spoken(lines, range(1000, 1100))) == [1001, 1031, 1061, 1091]


def test_work_of_less_than_a_second_says_nothing():
    lines = Lines()
    work = begun(lines, 1000.5)
    assert spoken(lines, range(1000, 1002)) == {}
    lines.end(work)
    assert not work.spoken and spoken(lines, range(1002, 1200)) == {}
    begun(lines, 2000)
    assert list(spoken(lines, range(2000, 2040))) == [2001, 2031]  # not at once because none came for long


def test_each_of_several_pieces_of_work_has_a_line():
    lines = Lines()
    for start, names in ((0, "read"), (20, "write"), (21, "check")):
        work = begun(lines, start, names, None, "")
        assert spoken(lines, range(start, start + 5)) == {start + 1: names}
        lines.end(work)


def test_pieces_of_one_name_in_a_row_have_a_line_now_and_then():
    lines, found = Lines(), []
    for start in range(0, 100, 4):
        work = begun(lines, start, "copy")
        found += spoken(lines, range(start, start + 4))
        lines.end(work)
    assert found == [1, 31, 61, 91]


def test_of_work_within_work_the_inner_one_has_the_line():
    lines = Lines()
    outer, inner = begun(lines, 0), begun(lines, 20, "passkey", 40, "keys")
    assert spoken(lines, range(20, 52)) == {21: "passkey 0/40 keys", 51: "passkey 0/40 keys, 31 s so far"}
    lines.end(inner)
    assert spoken(lines, range(51, 83)) == {
        52: "fine-tune 0/690 steps, 52 s so far",
        82: "fine-tune 0/690 steps, 82 s so far",
    }
    assert inner.spoken and outer.spoken


# What


def test_a_line_says_what_is_done_and_the_time_left():
    work = Work("fine-tune", 690, "steps", 0)
    for step in range(1, 121):
        work.advance(step * 0.5, text=f"loss {2.41:g}")
    assert work.line(60) == "fine-tune 120/690 steps, loss 2.41, 5 min left"  # 570 steps of 0.5 s are 285 s
    assert work.line(160) == "fine-tune 120/690 steps, loss 2.41, 3 min left"  # of a long step that time passes, too
    assert work.line(400) == "fine-tune 120/690 steps, loss 2.41, 7 min so far"  # longer than its speed can tell
    assert work.last_line(420) == "fine-tune 120/690 steps, loss 2.41, in 7 min"


def test_before_the_first_step_a_line_says_how_long_it_took_so_far():
    work = Work("passkey", 40, "keys", 0)
    assert work.line(1.2) == "passkey 0/40 keys"
    assert work.line(50) == "passkey 0/40 keys, 50 s so far"
    work.advance(60)
    assert work.line(60) == "passkey 1/40 keys, 39 min left"


def test_the_time_left_follows_the_speed_of_late():
    work = Work("fine-tune", 300, "steps", 0)
    for step in range(1, 101):
        work.advance(step)  # a second each
    for step in range(1, 101):
        work.advance(100 + 10 * step)  # ten seconds each, as with longer sequences
    assert work.line(1100) == "fine-tune 200/300 steps, 17 min left"  # at the mean of all it would be 9


def test_the_time_left_knows_of_what_costs_more():
    work = Work("fine-tune", 30, "steps", 0, [1] * 20 + [10] * 10)
    for step in range(1, 11):
        work.advance(step)
    assert work.line(10) == "fine-tune 10/30 steps, 110 s left"  # ten seconds, and ten times as many
    for step in range(1, 11):
        work.advance(10 + step)
    work.advance(30)
    assert work.line(30) == "fine-tune 21/30 steps, 90 s left"
    for step in range(1, 10):
        work.advance(30 + 10 * step)
    assert work.last_line(120) == "fine-tune 30/30 steps, in 2 min"


def test_what_an_earlier_run_did_says_nothing_of_the_speed():
    work = Work("fine-tune", 690, "steps", 0)
    work.advance(2, 300, earlier=True)
    assert work.line(10) == "fine-tune 300/690 steps, 10 s so far"
    for step in range(1, 11):
        work.advance(2 + 10 * step)
    assert work.line(102) == "fine-tune 310/690 steps, 63 min left"


def test_bytes_are_written_for_people_and_a_total_may_be_unknown():
    work = Work("hash m.gguf", 4.1e9, "bytes", 0)
    work.advance(1, 1.2e9)
    assert work.line(1).startswith("hash m.gguf 1.2/4.1 GB, ")
    work = Work("tokenize", None, "documents", 0)
    work.advance(10, 1200, text="3.1 M tokens")
    assert work.line(90) == "tokenize 1200 documents, 3.1 M tokens, 90 s so far"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h"), (180000, "2.1 days")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


# Where


def test_in_a_pipe_there_are_lines_while_it_goes_on_and_one_at_the_end():
    note, *lines = told().splitlines()
    phases = [line for line in lines if line.startswith("open ")]
    assert note == "a note" and phases[0] == lines[0] == "open [bold]it", "and nothing where it is over"
    assert not any(" in " in line for line in phases)
    lines = lines[len(phases) :]
    assert len(lines) >= 3
    assert all(re.fullmatch(r"fine-tune [0-4]/4 steps(, loss [1-4])?(, \d+ s (left|so far))?", x) for x in lines[:-1])
    assert lines[-1] == "fine-tune 4/4 steps, loss 1, in 1 s"


def test_quiet_says_nothing_and_none_only_notes():
    assert told(None, True) == told("bar", True) == ""
    assert told("none") == "a note\n"


def test_of_many_processes_the_first_one_speaks():
    assert told("plain", RANK="1") == told("bar", RANK="1") == ""
    assert "fine-tune 4/4 steps" in told("plain", RANK="0")


def test_on_a_terminal_there_is_a_bar_unless_lines_are_asked_for():
    bar = told_on_a_terminal()
    assert "━" in bar and "\x1b[" in bar and "4/4" in bar and "open [bold]it" in bar
    lines = told_on_a_terminal("plain")
    assert "\x1b[" not in lines and "fine-tune 4/4 steps, loss 1, in 1 s" in lines
    assert "━" in (asked := told("bar")) and "\x1b[" in asked


def test_work_that_fails_has_no_last_line(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    with output("plain"), pytest.raises(RuntimeError), progress_bar("check", 2, "files") as advance:
        advance(1)
        threading.Event().wait(0.3)
        raise RuntimeError
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("check 1/2 files") and "in 0 s" not in line for line in lines)


def test_a_choice_ends_with_the_command(capsys):
    with output("none", quiet=True):
        say("not heard")
    say("heard")
    assert capsys.readouterr().err == "heard\n"


def test_a_command_takes_the_choice(cli, llama: Any, tmp_path: Any):
    command = ("convert", llama, tmp_path / "m.gguf", "--context", 256, "--steps", 0, "--quant", "F16")
    code, out, err = cli(*command, "--quiet")
    assert code == 0 and out.startswith("wrote ") and err == ""
    code, _, err = cli(*command, "--overwrite", "--progress", "none")
    assert code == 0 and err != ""
    code, _, err = cli(*command, "--quiet")
    assert code == 2 and "exists" in err
    code, _, err = cli(*command, "--progress", "lines")
    assert code == 2 and "'bar', 'plain', 'none'" in err


def test_control_codes_are_written_out(capfd):
    progress.say("page \x1b]52;c;aGk=\x07 of\ta\nbook\x9b2J")
    assert capfd.readouterr().err == "page \\x1b]52;c;aGk=\\x07 of\ta\nbook\\x9b2J\n"


def test_one_display_draws_at_a_time():
    said = told_on_a_terminal("bar", False, step=NESTED)
    frames = re.findall(r"outside|inside|another library", said)
    order = [frame for i, frame in enumerate(frames) if not i or frame != frames[i - 1]]
    assert order[:2] == ["outside", "inside"] and order[-2:] == ["another library", "outside"], order
    assert len(order) <= 5, "they do not take turns on one row"
