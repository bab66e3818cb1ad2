"""Commands killed at random, started twice, and run out of disk: nothing lost, nothing wrong, nothing left.

In: counts and a seed. Out: a summary; a trial that ends in anything else is named in it. Commands are forks of this
process, which has imported everything, so that a kill costs a second. To be run in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

BYSTANDERS = {"mine.txt": "mine", "made.partial.txt": "mine, too"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Args:
        name: of its output.
        arguments: of the command line, by output.
        old: makes what is there before, at the output's path; `--overwrite` replaces it.
    """

    name: str
    arguments: Callable[[Path], list[object]]
    old: Callable[[Path], None] | None = None


@dataclass
class Summary:
    """What came of the trials: endings by kind of trial, and everything that was wrong."""

    endings: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        return {"seconds": round(self.seconds, 1), "endings": self.endings, "wrong": self.wrong}


def make_inputs(folder: Path) -> dict[str, Writer]:
    """Make a small model with its files; return every command that writes."""
    from helpers import make_llama

    model = make_llama(folder / "model", dtype="float16", vocab_size=410)
    gguf, text = folder / "exact.gguf", folder / "text.txt"
    text.write_text("Once upon a time there was a cat who sat on a mat. " * 200)
    assert _run(["convert", model, gguf, "--quant", "F32", "--check", "none"], 300) == 0

    def old_file(path: Path) -> None:
        path.write_text("what was there before")

    def old_folder(path: Path) -> None:
        path.mkdir()
        (path / "thesis.txt").write_text("what was there before")

    def copy(path: Path) -> None:
        shutil.copyfile(gguf, path)

    def converted(out: Path) -> list[object]:
        return ["convert", model, out, "--quant", "Q8_0", "--check", "none"]

    def extended(out: Path) -> list[object]:
        return ["extend", model, out, "--context", "256", "--steps", "0"]

    perplexity = ["eval", "perplexity", gguf, "--text", text, "--windows", "32,64", "--stride", "16", "--samples", "2"]
    return {
        "convert": Writer("made.gguf", converted),
        "convert over": Writer("made.gguf", converted, old_file),
        "convert checked": Writer("made.gguf", lambda out: ["convert", model, out, "--quant", "F16", "--no-certify"]),
        "extend": Writer("made", extended),
        "extend over": Writer("made", extended, old_folder),
        "quantize": Writer("made.gguf", lambda out: ["quantize", gguf, out, "--quant", "Q8_0"], old_file),
        "imatrix": Writer(
            "made.gguf", lambda out: ["imatrix", model, out, "--text", text, "--context", "64", "--tokens", "256"]
        ),
        "repair": Writer(
            "made.gguf", lambda out: ["repair", gguf, out, "--set", "general.name=x", "--check", "none"], old_file
        ),
        "card": Writer("made.md", lambda out: ["card", gguf, "--out", out], old_file),
        "plot": Writer("made.png", lambda out: [*perplexity, "--plot", out], old_file),
        "keep": Writer("made.jsonl", lambda out: [*perplexity, "--keep", out]),
        "certify": Writer("made.gguf", lambda out: ["certify", out, "--text", text], copy),
    }


# Running


def _fork(arguments: list[object], limit: int | None = None) -> int:
    """Start a command; return its process."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(os.environ["KILLS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number, where in ((0, null), (1, null), (2, log)):
            os.dup2(where, number)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        from pi_gguf.cli.app import entry_point

        sys.argv = ["pi-gguf", *map(str, arguments)]
        entry_point()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        with suppress(OSError):
            traceback.print_exc()
    finally:  # whatever happens, a child must not unwind into its parent's work
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    """Return the exit code, negative for a signal, or None where it runs on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _run(arguments: list[object], seconds: float, limit: int | None = None) -> int | None:
    child = _fork(arguments, limit)
    code = _wait(child, seconds)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code


def contents(path: Path) -> str | None:
    """Return a hash of a file, or of a folder's files; None where there is nothing."""
    if not os.path.lexists(path):
        return None
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(f"{part.relative_to(path)} {part.stat().st_size} ".encode() + part.read_bytes())
    return digest.hexdigest()


class Campaign:
    """All trials of all commands.

    Args:
        folder: where all of it happens.
        seed: of the trials.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        os.environ["KILLS_LOG"] = str(folder / "log")
        self.summary, self._folder, self._random = Summary(), folder, random.Random(seed)
        self.writers = make_inputs(folder)
        self._seconds: dict[str, float] = {}
        self._wanted: dict[str, str | None] = {}
        self._sizes: dict[str, int] = {}
        self._kept = b""
        for kind in self.writers:
            with self._place(kind) as (out, _):
                begun = time.monotonic()
                code = _run(self._command(kind, out), 300)
                assert code == 0, f"{kind} ends with {code}: {self._log()}"
                self._seconds[kind] = time.monotonic() - begun
                self._wanted[kind] = self._result(kind, out)
                if kind == "keep":
                    self._kept = out.read_bytes()
                files = [path for path in [out, *out.rglob("*")] if path.is_file()]
                self._sizes[kind] = max(path.stat().st_size for path in files)

    def _log(self) -> str:
        return Path(os.environ["KILLS_LOG"]).read_text()[-600:]

    def _command(self, kind: str, out: Path) -> list[object]:
        writer = self.writers[kind]
        over = ["--overwrite"] if writer.old and kind != "certify" else []
        return [*writer.arguments(out), *over]

    @contextmanager
    def _place(self, kind: str, folder: Path | None = None) -> Iterator[tuple[Path, str | None]]:
        """Give the path of an output among bystanders, and what was there before."""
        place = folder or self._folder / "place"
        place.mkdir(exist_ok=folder is not None)
        try:
            for name, text in BYSTANDERS.items():
                (place / name).write_text(text)
            out = place / self.writers[kind].name
            if make := self.writers[kind].old:
                make(out)
            yield out, contents(out)
        finally:
            for path in list(place.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if folder is None:
                place.rmdir()

    def _result(self, kind: str, out: Path) -> str | None:
        """Return what must be the same each time: of a certified file its tensors, of whose figures some are times."""
        if kind != "certify" or not out.exists():
            return contents(out)
        from pi_gguf.gguf.header import read_header, tensors_sha256

        return f"{tensors_sha256(out)} {'pi_gguf.header_sha256' in read_header(out).metadata}"

    def _check(self, trial: str, kind: str, out: Path, before: str | None) -> None:
        """Check what a trial left: what was there before or the whole new one, and nobody else's files touched."""
        restorable = out.with_name(f"{out.name}.partial") / "old"
        now = contents(out)
        if now is None and before is not None:
            now = contents(restorable)
        if kind == "keep" and out.exists() and not self._is_begun(out.read_bytes()):
            self._wrong(trial, "what is kept is not the first lines of what a whole run keeps")
        if kind != "keep" and now != before and self._result(kind, out) != self._wanted[kind]:
            self._wrong(trial, "what is under the name is neither the old nor the new")
        self._check_others(trial, out, f"{out.name}.partial")
        code = _run(self._command(kind, out), 300)
        if code == 2 and now is not None and now != before:
            code = 0  # it was whole, and is not replaced unasked
        if code != 0:
            self._wrong(trial, f"the same command ends with {code}: {self._log()}")
        elif self._result(kind, out) != self._wanted[kind]:
            self._wrong(trial, "the same command wrote something else")
        self._check_others(trial, out)

    def _is_begun(self, kept: bytes) -> bool:
        """Tell whether a file of finished items holds whole lines, the first of a whole run's."""
        return self._kept.startswith(kept) and (not kept or kept.endswith(b"\n"))

    def _check_others(self, trial: str, out: Path, *allowed: str) -> None:
        for name, text in BYSTANDERS.items():
            if (out.parent / name).read_text() != text:
                self._wrong(trial, f"{name} was touched")
        left = {path.name for path in out.parent.iterdir()} - {out.name, *BYSTANDERS, *allowed}
        if left:
            self._wrong(trial, f"{sorted(left)} is left")

    def _wrong(self, trial: str, what: str) -> None:
        self.summary.wrong.append(f"{trial}: {what}")

    def _count(self, kind: str, code: int | None) -> None:
        self.summary.endings.setdefault(kind, Counter())[str(code)] += 1

    # Trials

    def kill(self, number: int) -> None:
        """Kill a command at a random moment by a random signal."""
        kind = list(self.writers)[number % len(self.writers)]
        sent = self._random.choice(SIGNALS)
        after = self._random.uniform(0, 1.05 * self._seconds[kind])
        trial = f"kill {number}, {kind} by {sent.name} after {after:.3f} s"
        with self._place(kind) as (out, before):
            child = _fork(self._command(kind, out))
            code = _wait(child, after)
            if code is None:
                os.kill(child, sent)
                code = _wait(child, 60)
            expected = {0, -sent} if sent == signal.SIGKILL else {0, -sent, 128 + sent}  # it has no handlers at first
            if code not in expected:
                self._wrong(trial, f"exit code {code}: {self._log()}")
            self._count("kills", code)
            self._check(trial, kind, out, before)

    def pair(self, number: int) -> None:
        """Start a command twice on one output, a moment apart."""
        kinds = [kind for kind in self.writers if kind not in ("certify", "keep")]
        kind = kinds[number % len(kinds)]
        apart = self._random.uniform(0, 1.05 * self._seconds[kind])
        trial = f"pair {number}, {kind} {apart:.3f} s apart"
        with self._place(kind) as (out, _):
            first = _fork(self._command(kind, out))
            time.sleep(apart)
            second = _fork(self._command(kind, out))
            codes = [_wait(first, 300), _wait(second, 300)]
            self._count("pairs", None)
            if not set(codes) <= {0, 2} or 0 not in codes:
                self._wrong(trial, f"exit codes {codes}: {self._log()}")
            if self._result(kind, out) != self._wanted[kind]:
                self._wrong(trial, "what is under the name is wrong")
            self._check_others(trial, out)

    def limited(self, number: int) -> None:
        """Let no file become larger than a random size."""
        kind = list(self.writers)[number % len(self.writers)]
        limit = self._random.randrange(int(1.05 * self._sizes[kind]) + 1)
        trial = f"limit {number}, {kind} in {limit} of {self._sizes[kind]} bytes"
        with self._place(kind) as (out, before):
            code = _run(self._command(kind, out), 300, limit)
            self._count("limits", code)
            if code not in (0, 6, 8):
                self._wrong(trial, f"exit code {code}: {self._log()}")
            self._check(trial, kind, out, before)

    def full(self, number: int) -> None:
        """Run a command on a disk of a random size, then with more room; needs to be allowed to mount one."""
        kind = list(self.writers)[number % len(self.writers)]
        disk = self._folder / "disk"
        disk.mkdir(exist_ok=True)
        old = 4 * 4096 + (self._sizes[kind] if kind == "certify" else 0)
        size = old + self._random.randrange(4096, int(1.3 * self._sizes[kind]) + 3 * 4096)
        trial = f"full {number}, {kind} on {size} bytes for {self._sizes[kind]}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
        try:
            with self._place(kind, disk) as (out, before):
                code = _run(self._command(kind, out), 300)
                self._count("full disks", code)
                if code not in (0, 6, 8):
                    self._wrong(trial, f"exit code {code}: {self._log()}")
                subprocess.run(["mount", "-o", "remount,size=100M", disk], check=True)
                self._check(trial, kind, out, before)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


def can_mount() -> bool:
    if os.geteuid() or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def run(folder: Path, *, kills: int, pairs: int, limits: int, fulls: int, seed: int, seconds: float) -> Summary:
    """Run trials of each kind in turn; stop after so many seconds."""
    import pi_gguf.evaluate.perplexity
    import pi_gguf.gguf.certificate
    import pi_gguf.pipeline.convert
    import pi_gguf.prove.card
    import pi_gguf.prove.repair  # noqa: F401
    from pi_gguf.llamacpp.library import llama_cpp_library

    llama_cpp_library()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a child must not unwind into this function before it has begun
    begun = time.monotonic()
    campaign = Campaign(folder, seed)
    for number in range(max(kills, pairs, limits, fulls)):
        for count, trial in (
            (kills, campaign.kill), (pairs, campaign.pair), (limits, campaign.limited), (fulls, campaign.full),
        ):  # fmt: skip
            if number < count and time.monotonic() - begun < seconds:
                trial(number)
    campaign.summary.seconds = time.monotonic() - begun
    return campaign.summary


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(Path(scratch), **given).to_json(), indent=1))
