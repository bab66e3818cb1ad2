"""How commands end: signals, closed and full outputs, crashes of native code, errors of other code."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from children import Command

from pi_gguf import errors
from pi_gguf.common.endings import translated
from pi_gguf.common.files import one_writer
from pi_gguf.errors import CheckpointError, OptionError, PiGgufError, ResourceError, TextError

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def gguf(llama, tmp_path_factory) -> Path:
    from pi_gguf.pipeline.convert import convert

    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    convert(str(llama), path, context=256, steps=0, quant="F16", check="none")
    return path


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, **options)


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Signals


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_a_command_inside_llama_cpp_and_leaves_nothing(gguf, tmp_path, number, times):
    """Started with Ctrl-C ignored, as the background of a shell has it."""
    text = tmp_path / "t.txt"
    text.write_text("Once upon a time there was a cat. " * 60_000)
    out = tmp_path / "out"
    out.mkdir()
    command = Command("imatrix", gguf, out / "m.gguf", "--text", text, "--tokens", "400000")
    wait_for(lambda: (out / "m.gguf.partial" / "lock").exists())
    time.sleep(0.7)
    for _ in range(times):
        command.send(number)
        time.sleep(0.05)
    code, _, err = command.wait(60)
    assert (code, err.strip().splitlines()[-1]) == (128 + number, "interrupted")
    assert "Traceback" not in err
    if times == 2:  # where the end took long, it was forced; what that leaves goes with the next writer
        with one_writer(out / "m.gguf"):
            pass
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_fine_tune_stops_after_its_step_and_goes_on(llama, tmp_path, number):
    text = tmp_path / "t.txt"
    text.write_text("Once upon a time there was a cat who sat on a mat and slept. " * 2000)
    out = tmp_path / "out"
    arguments = ("extend", llama, out, "--context", "256", "--data", text, "--device", "cpu", "--batch-tokens", "256")
    command = Command(*arguments, "--steps", "4000")
    wait_for(lambda: (tmp_path / "out.partial").exists() and list((tmp_path / "out.partial").glob("tokens-*/ids.bin")))
    time.sleep(1)
    command.send(number)
    code, _, err = command.wait(100)
    assert code == 128 + number and "Traceback" not in err, err
    if "stopping after this step" in err:
        assert list((tmp_path / "out.partial").glob("checkpoint-*/trainer_state.json"))
    assert not out.exists()


LOST = """
import ctypes, os, signal, sys, time
from pi_gguf.common.endings import signals
from pi_gguf.errors import Interrupted
inside = ctypes.CFUNCTYPE(None)(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.01)))
try:
    with signals():
        inside()
        print("inside", flush=True)
        time.sleep(5)
except Interrupted as stop:
    print(stop.number)
"""


def test_a_signal_that_is_met_in_a_callback_of_native_code_is_not_lost():
    done = python(LOST)
    assert done.stdout.split() == ["inside", str(int(signal.SIGTERM))], done.stderr
    assert done.stderr == ""


MADE_OF_IT = """
import os, signal, sys
from pi_gguf.cli import app as cli

def main(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except BaseException:
        pass
    raise ModuleNotFoundError("could not import: an optional part is not there")

cli.main = main
sys.argv = ["pi-gguf", "plan"]
cli.entry_point()
"""


def test_a_signal_that_a_library_takes_for_an_error_of_its_own_ends_like_any():
    done = python(MADE_OF_IT)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "interrupted\n")


STUCK = """
import hashlib
from pi_gguf.common.endings import signals
with signals():
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000_000)
"""


def test_a_second_signal_ends_a_process_that_native_code_holds():
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "stuck\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_hang_up_that_the_parent_had_ignored_stays_ignored():
    code = (
        "import os, signal\nfrom pi_gguf.common.endings import signals\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with signals():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('on')"
    )
    assert python(code).stdout == "on\n"


def test_handlers_are_put_back():
    from pi_gguf.common.endings import signals

    before = [signal.getsignal(number) for number in SIGNALS], sys.unraisablehook, signal.set_wakeup_fd(-1)
    with signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0][1]
    assert ([signal.getsignal(number) for number in SIGNALS], sys.unraisablehook, signal.set_wakeup_fd(-1)) == before


# Crashes of native code


CRASH = """
import ctypes, os, sys
from pi_gguf.cli import app as cli
from pi_gguf.common.progress import stage

how = sys.argv[1]

@stage("check {path} in llama.cpp")
def check(path):
    ctypes.string_at(0) if how == "null" else os.kill(os.getpid(), int(how))

cli.main = lambda **_: check(sys.argv[2])
sys.argv = ["pi-gguf", "inspect", "/models/größe.gguf"]
cli.entry_point()
"""


@pytest.mark.parametrize("how", ["null", signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGBUS])
def test_a_crash_says_what_was_done_to_which_file(how):
    done = python(CRASH, how if how == "null" else int(how))
    assert done.returncode == -(signal.SIGSEGV if how == "null" else how), done.stderr
    assert '"crashed while: check /models/gr\\xf6\\xdfe.gguf in llama.cpp"' in done.stderr
    assert '"crashed while: pi-gguf inspect /models/gr\\xf6\\xdfe.gguf"' in done.stderr


# Standard output


def shell(line: str) -> tuple[int, str]:
    command = f"set -o pipefail; {sys.executable} -m pi_gguf {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=50)
    return done.returncode, done.stderr


@pytest.mark.parametrize("line", ["models --json", "--help", "inspect {file}", "run {file} --prompt a --max-tokens 3"])
@pytest.mark.parametrize("where", [">&-", "> /dev/full"])
def test_a_closed_or_full_output_is_two_lines_and_an_exit_code(gguf, line, where):
    code, err = shell(f"{line.format(file=gguf)} {where}")
    assert code == 8 and "Traceback" not in err, err
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: ") and ("standard output" in error or "full" in error)
    assert hint.startswith("hint: ") and "Exception ignored" not in err


def test_a_reader_that_leaves_is_no_traceback(gguf):
    code, err = shell(f"inspect {gguf} --json | true")
    assert code in (0, 8) and "Traceback" not in err and "Exception ignored" not in err


def test_what_is_written_to_a_file_never_gets_what_is_printed(cli, gguf, tmp_path):
    """Where descriptor 1 is closed, the next file that is opened would have it."""
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    options = ("--set", "general.name=x", "--check", "none")
    assert cli("repair", gguf, whole, *options)[0] == 0
    assert shell(f"repair {gguf} {out} {' '.join(options)} <&- >&- 2>&-") == (8, "")
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("given", ["< /dev/null", "<&-"])
def test_a_prompt_may_be_empty(gguf, given):
    code, err = shell(f"run {gguf} --max-tokens 2 {given}")
    assert code in (0, 2, 5) and "Traceback" not in err


def test_a_prompt_that_is_no_text_is_refused(gguf):
    code, err = shell(f"run {gguf} --max-tokens 2 < <(printf 'Gr\\xf6\\xdfe')")
    assert code == 5 and "not UTF-8 at byte 2" in err and "hint: " in err


def test_a_limit_on_files_that_a_library_meets_is_said():
    code = (
        "import resource, sys, numpy\nfrom safetensors.numpy import save_file\n"
        "from pi_gguf.common.endings import translated\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    save_file({'x': numpy.zeros(10**6)}, sys.argv[1])\n"
        "except Exception as error:\n    print(translated(error))"
    )
    with tempfile.TemporaryDirectory() as folder:
        assert "files may not become so large" in python(code, Path(folder) / "x.safetensors").stdout


# Errors


def all_errors(kind: type[PiGgufError] = PiGgufError) -> list[type[PiGgufError]]:
    return [kind, *(each for inner in kind.__subclasses__() for each in all_errors(inner))]


def test_every_refusal_has_a_hint():
    kinds = [kind for kind in all_errors() if kind.__module__ == errors.__name__]
    assert len(kinds) == 9
    for kind in kinds:
        assert len(kind("x").hint) > 10 and kind("x", "y").hint == "y"


@pytest.mark.parametrize("words", [("convrt",), ("inspect",), ("eval", "perplexity", "--nope"), ("eval", "kl", "x")])
def test_a_wrong_command_is_two_lines(cli, words):
    code, _, err = cli(*words)
    assert code == 2 and len(err.splitlines()) == 2
    assert err.splitlines()[0].startswith("error: ") and "--help" in err.splitlines()[1]


def test_a_name_of_several_lines_is_one_line(cli, tmp_path):
    name = "a\nhint: b\x1b[31m\u2028größe.gguf"
    code, _, err = cli("run", tmp_path / name, "--prompt", "a")
    assert code == 6 and len(err.splitlines()) == 2 and "\x1b" not in err
    assert r"a\nhint: b\x1b[31m\u2028größe.gguf: no such file" in err.splitlines()[0]


def raised(function: Any) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _nested() -> Any:
    return json.loads("[" * 100_000)


def _no_memory_in_numpy() -> Any:
    import numpy as np

    return np.empty(2**60, np.uint8)


def _no_memory_in_torch() -> Any:
    import torch

    return torch.empty(2**60, dtype=torch.uint8)


def _full_disk_in_torch() -> Any:
    import torch

    with Path("/dev/full").open("wb") as file:
        torch.save(torch.zeros(10**6), file)


def _full_disk_in_safetensors() -> Any:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(10**6)}, "/dev/full")


def _inside_another() -> Any:
    try:
        _no_memory_in_torch()
    except RuntimeError as error:
        raise ImportError("transformers cannot be imported") from error


FOREIGN = [
    (_nested, ResourceError, "nested"),
    (_no_memory_in_numpy, ResourceError, "out of memory"),
    (_no_memory_in_torch, ResourceError, "out of memory"),
    (_inside_another, ResourceError, "out of memory"),
    (_full_disk_in_torch, ResourceError, "full"),
    (lambda: Path("/dev/full").write_bytes(b"x"), ResourceError, "No space left"),
    (lambda: Path("/").read_bytes(), OptionError, "/: Is a directory"),
    (lambda: Path("/no/such").read_bytes(), OptionError, "/no/such: No such file"),
    (lambda: b"\xff".decode(), TextError, "not valid Unicode"),
    (lambda: "\ud800".encode(), TextError, "not valid Unicode"),
]


@pytest.mark.parametrize(("function", "kind", "says"), FOREIGN)
def test_an_error_of_other_code_becomes_one_of_ours(function, kind, says):
    found = translated(raised(function))
    assert type(found) is kind and says.lower() in str(found).lower()
    assert "\n" not in str(found) and found.hint


def test_a_bug_keeps_its_traceback():
    for bug in (KeyError("x"), TypeError("x"), AssertionError(), ValueError("x")):
        assert translated(bug) is None


def test_a_closed_pipe_of_a_library_is_standard_output():
    assert "standard output" in str(translated(OSError(errno.EPIPE, os.strerror(errno.EPIPE))))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) * 2**20,) * 2)
from pi_gguf.cli.app import entry_point
sys.argv = ["pi-gguf", *sys.argv[2:]]
entry_point()
"""


@pytest.mark.parametrize("mebibytes", [500, 900])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_too_little_address_space_is_exit_code_8(llama, gguf, tmp_path, mebibytes, command):
    arguments = {"convert": (llama, tmp_path / "o.gguf", "--quant", "F16"), "inspect": (gguf,)}[command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = python(LIMITED, mebibytes, command, *arguments, env=environment)
    assert done.returncode in (0, 8), done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    assert command == "inspect" or done.returncode == 8
    assert list(tmp_path.iterdir()) == []


# Sources that change


def test_a_source_that_is_cut_while_it_is_read_is_an_error(llama_copy):
    """Mapped into memory it would end the process by SIGBUS."""
    from pi_gguf.checkpoint.checkpoint import load_checkpoint

    sources = list(load_checkpoint(str(llama_copy)).tensors.values())
    files: dict[Path, Any] = {}
    sources[0].read(files)
    os.truncate(sources[0].path, 4096)
    with pytest.raises(CheckpointError, match="cut while it was read"):
        for source in sources:
            source.read(files)


def test_tensors_are_read_as_safetensors_reads_them(tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from pi_gguf.checkpoint.weights import WeightFile

    torch.manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn)
    made = {f"t{i}": torch.randn(3, i).to(kind) for i, kind in enumerate(kinds)} | {"scalar": torch.tensor(2.5)}
    assert list(made["t0"].shape) == [3, 0]
    save_file(made, tmp_path / "x.safetensors")
    ours = WeightFile(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as theirs:
        for name in theirs.keys():  # noqa: SIM118  it has no iterator
            tensor = theirs.get_tensor(name)
            assert ours.get_tensor(name).dtype == tensor.dtype and ours.get_tensor(name).shape == tensor.shape
            assert torch.equal(ours.get_tensor(name).float(), tensor.float())
