"""Whether llama.cpp lives through a file and this CPU: children that really die, verdicts that are kept."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pytest

from pi_gguf.common.children import run_child
from pi_gguf.errors import GgufError
from pi_gguf.gguf.header import Entry, read_header, write_changed
from pi_gguf.llamacpp import trial
from pi_gguf.llamacpp.trial import check_opens, check_quantizes, fast_buffers_work, trust
from pi_gguf.runtime.model import Model


@pytest.fixture(autouse=True)
def own_verdicts(tmp_path, monkeypatch):
    """Verdicts of no other test, and none that this one leaves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fast_buffers_work.cache_clear()
    yield
    fast_buffers_work.cache_clear()


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    trial._write_tiny(path)  # it has no tokenizer: llama.cpp ends the process at the first text
    return path


@pytest.fixture
def dying_children(tmp_path, monkeypatch):
    """Children of the trial are ended by a signal as soon as they begin."""
    (tmp_path / "dying").mkdir()
    (tmp_path / "dying" / "sitecustomize.py").write_text(
        "import os, signal, sys\nif 'pi_gguf.llamacpp.trial' in sys.orig_argv: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "dying"), *sys.path]))


def test_a_child_that_was_killed_says_nothing_of_the_cpu(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\nif 'pi_gguf.llamacpp.trial' in sys.orig_argv: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        assert not fast_buffers_work()
    fast_buffers_work.cache_clear()
    assert fast_buffers_work()


def no_more_children(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")


@pytest.fixture(scope="module")
def quantized(llama, tmp_path_factory):
    from pi_gguf import convert

    out = tmp_path_factory.mktemp("quantized") / "q8.gguf"
    convert(str(llama), out, quant="Q8_0", certify=False)
    return out


def test_the_installed_llama_cpp_lives_through_every_fast_form_of_weights_and_that_is_asked_once(monkeypatch):
    assert fast_buffers_work()
    fast_buffers_work.cache_clear()
    no_more_children(monkeypatch)
    assert fast_buffers_work()


def test_where_the_child_dies_files_open_with_plain_buffers_and_say_the_same(
    quantized, dying_children, monkeypatch, capfd
):
    trust(read_header(quantized))
    assert not fast_buffers_work()
    assert "SIGSEGV" in capfd.readouterr().err
    fast_buffers_work.cache_clear()
    no_more_children(monkeypatch)
    with Model(quantized, device="cpu") as model:
        assert not model._llama.model_params.use_extra_bufts
        plain = np.concatenate(list(model.logits_chunks(range(2, 42), 40)))
    assert "plain buffers" in capfd.readouterr().err
    monkeypatch.setattr("pi_gguf.runtime.model.fast_buffers_work", lambda: True)
    with Model(quantized, device="cpu") as model:
        assert model._llama.model_params.use_extra_bufts
        fast = np.concatenate(list(model.logits_chunks(range(2, 42), 40)))
    assert np.abs(plain - fast).max() < 0.05 * np.abs(plain).max()


def test_files_without_quantized_weights_ask_no_child_for_the_cpu(llama, tmp_path, dying_children):
    from pi_gguf import convert

    convert(str(llama), tmp_path / "f16.gguf", quant="F16", certify=False)
    with Model(tmp_path / "f16.gguf", device="cpu") as model:
        assert model._llama.model_params.use_extra_bufts


def test_a_file_at_which_llama_cpp_ends_the_process_is_an_error_with_its_last_words(tiny):
    with pytest.raises(GgufError, match=r"SIGABRT: llama-vocab\.cpp:\d+: GGML_ASSERT") as caught:
        check_opens(read_header(tiny))
    assert "pi-gguf inspect" in caught.value.hint


def test_a_file_of_others_is_opened_in_a_child_once_and_a_changed_header_again(quantized, tmp_path, monkeypatch):
    theirs, header = tmp_path / "theirs.gguf", read_header(quantized)
    write_changed(header.changed({"general.name": Entry.of("theirs")}), theirs)
    check_opens(read_header(theirs))
    with monkeypatch.context() as patched:
        no_more_children(patched)
        check_opens(read_header(theirs))
        with pytest.raises(OSError, match="nowhere"):
            check_opens(header.changed({"general.name": Entry.of("others")}))


def test_a_file_with_a_certificate_and_one_that_was_just_written_need_no_child(quantized, monkeypatch):
    no_more_children(monkeypatch)
    header = read_header(quantized)
    with pytest.raises(OSError, match="nowhere"):
        check_opens(header)
    check_opens(header.changed({"pi_gguf.header_sha256": Entry.of(header.fingerprint())}))
    with pytest.raises(OSError, match="nowhere"):
        check_opens(header.changed({"pi_gguf.header_sha256": Entry.of("0" * 64)}))
    trust(header)
    check_opens(header)


def test_quantizing_is_tried_in_a_child_too(quantized, dying_children):
    with pytest.raises(GgufError, match=r"quantize it to Q8_0 .SIGSEGV"):
        check_quantizes(read_header(quantized), "Q8_0")


def test_no_verdict_is_kept_where_the_cache_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fast_buffers_work()


HOSTILE = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "no text": lambda path: path.write_bytes(b"\xff" * 10),
    "huge": lambda path: path.write_text("SIGSEGV" * 100_000),
    "something else": lambda path: path.write_text("lives no more"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_trial_wrote_into_the_cache_is_no_verdict(quantized, tmp_path, what, monkeypatch):
    key = trial._key("open", read_header(quantized).fingerprint())
    key.parent.mkdir(parents=True)
    HOSTILE[what](key)
    check_opens(read_header(quantized))
    no_more_children(monkeypatch)
    if what not in ("a folder",):  # that stays: each time costs a child
        check_opens(read_header(quantized))


def test_a_user_without_a_home_has_no_verdicts_and_all_else(quantized, monkeypatch):
    import pwd

    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    check_opens(read_header(quantized))
    trust(read_header(quantized))


def test_a_child_that_dies_is_seen_where_nobody_waits_for_children(tiny):
    """With SIGCHLD ignored, as some parents leave it, the system keeps no exit codes."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(GgufError, match="did not end as it should"):
            check_opens(read_header(tiny))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_nothing_in_the_folder_one_stands_in_is_run(quantized, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("numpy", "jinja2", "llama_cpp", "pi_gguf"):
        (theirs / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(theirs)
    check_opens(read_header(quantized))
    assert not (tmp_path / "ran").exists()
    no_more_children(monkeypatch)
    check_opens(read_header(quantized))  # the child did its work: there is a verdict


def test_a_child_imports_what_its_parent_does(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_child("trial", "works", seconds=60).returncode == 7
