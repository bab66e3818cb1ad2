"""What `pi-gguf serve` costs beside llama.cpp's own server, for one client and for several.

In: GGUF files, and llama-server, compiled from the source distribution of the installed llama-cpp-python, so that both
compute alike. Out: `benchmarks/server.json`, for each file, both servers in turn, medians of rounds:

write: tokens/s written by 1, 4 and 8 clients at once, reading of their prompts included
added: milliseconds a token of a stream, beside the same text written by `Model.complete` in this process; of servers
    with one slot, and with all slots, where each token also looks past what the others keep in the shared cache
gap: the longest time between two tokens of a running answer while another request reads 8000, in batches of 512
document: seconds to the first token about a document: the first question, the second, and after a restart
page: seconds and bytes of / and all that it loads

Both servers are open all the time and compute in turn; the one that waits takes no CPU. A round's texts are the same
for both, and new. With --cpu-time, for a machine that others use too, everything runs on one core, and write and added
count the CPU seconds of a server in place of those that pass.

Example (half an hour for two files; --toy is a trial of seconds):
    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    CXXFLAGS="-fno-tree-dse -fno-dse" cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama.cpp \
        -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build llama.cpp -j2 --target llama-server
    python benchmarks/server.py SmolLM2-135M-Instruct.Q4_1.gguf tiny-32k.gguf --llama-server llama.cpp/bin/llama-server
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pi_gguf import bundled  # noqa: E402
from pi_gguf.common.machine import cores  # noqa: E402
from pi_gguf.common.provenance import package_version, provenance  # noqa: E402
from pi_gguf.gguf.file import read_gguf  # noqa: E402
from pi_gguf.runtime.model import Model  # noqa: E402

OURS = "pi-gguf"
QUESTIONS = ("Who is the story about?", "Where does it take place?", "What happens in the end?")
PARTS = ("write", "added", "gap", "document", "page")

_clock = time.perf_counter
_HOST = "127.0.0.1"
_SECONDS = 600
"""To wait for an answer, or for a server to open."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        clients: that ask at once.
        slots: of both servers.
        prompt: tokens of each prompt.
        tokens: written after each.
        rounds: times that each writes.
        document: tokens of a document, or of the request that is read beside an answer, as far as they fit.
        readings: times that one is read.
        n_ctx: window to open, in tokens; the file's own where that is smaller.
        cpu: whether CPU seconds of a process count.
    """

    clients: tuple[int, ...] = (1, 4, 8)
    slots: int = 8
    prompt: int = 200
    tokens: int = 128
    rounds: int = 5
    document: int = 8000
    readings: int = 3
    n_ctx: int = 16384
    cpu: bool = False


TOY = Size((1, 2), 2, 20, 8, 1, 600, 1, 2048)

BATCH = 512
"""Tokens that both servers read at a time."""

_BESIDE = 256
"""Tokens of the window that are left for an answer beside a long request."""

_XLLAMACPP = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
path, port, n_ctx, slots, batch, threads = sys.argv[1], *map(int, sys.argv[2:])
params.model.path, params.port, params.n_ctx, params.n_parallel = path, port, n_ctx, slots
params.hostnames, params.kv_unified, params.cache_ram_mib, params.ui = ["127.0.0.1"], True, 0, False
params.n_batch = params.n_ubatch = batch
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
threading.Event().wait()
"""


# Servers


class Server:
    """A server in a process of its own; a context manager.

    Args:
        name: of who serves.
        command: that starts it, with PORT for the port and SLOTS for slots.
        slots: that it has.
        environment: added to this process's.
    """

    cpu = False

    def __init__(self, name: str, command: list[str], slots: int, **environment: str) -> None:
        self.name, self._command, self._slots = name, command, slots
        self._environment = {**os.environ, **environment}

    def again(self, slots: int) -> Server:
        """Return another one of the kind with so many slots."""
        other = copy(self)
        other._slots = slots
        return other

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind((_HOST, 0))
            self.port = int(free.getsockname()[1])
        values = {"PORT": str(self.port), "SLOTS": str(self._slots)}
        command = [values.get(word, word) for word in self._command]
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=self._environment)
        end = _clock() + _SECONDS
        while not self._answers():
            if self._process.poll() is not None or _clock() > end:
                self._log.seek(0)
                said = self._log.read()[-2000:].decode(errors="replace")
                self.__exit__()
                raise SystemExit(f"{self.name}: it does not serve\n{said}")
            time.sleep(0.05)
        (model, *_) = self.get("/v1/models")["data"]
        self.model = model["id"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def seconds(self) -> float:
        """Return the clock that counts: this process's, or the CPU seconds that the server has taken."""
        if not self.cpu:
            return _clock()
        return time.clock_gettime((~self._process.pid << 3) | 2)  # Linux's clock of another process, all its threads

    def _answers(self) -> bool:
        try:
            return "data" in self.get("/v1/models") and bool(self.get("/health"))
        except (OSError, RuntimeError, ValueError):
            return False

    def get(self, path: str) -> Any:
        with answer(self.port, "GET", path) as response:
            return json.loads(response.read())

    def stream(self, path: str, **body: Any) -> Iterator[tuple[float, dict[str, Any]]]:
        """Ask for a stream; yield its objects with the time that each came at. Closing it leaves the server alone."""
        yield from ((at, json.loads(line)) for at, line in self.lines(path, **body))

    def lines(self, path: str, **body: Any) -> Iterator[tuple[float, bytes]]:
        """Yield the objects of a stream as they come, unread."""
        body = {"model": self.model, "temperature": 0, "stream": True, **body}
        with answer(self.port, "POST", path, json.dumps(body).encode()) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield _clock(), line[6:]

    def write(self, prompt: str, tokens: int) -> Answer:
        """Continue a prompt, and wait for all of it."""
        found = Answer()
        usage = {"stream_options": {"include_usage": True}}
        for _, line in self.lines("/v1/completions", prompt=prompt, max_tokens=tokens, **usage):
            if found.first is None or b'"usage":{' in line:  # the clients share the cores with the server
                found.add(json.loads(line), self.seconds)
        found.ended = self.seconds()
        return found


@dataclass
class Answer:
    """A streamed answer: when its first text came and when it ended, by the clock that counts, and its tokens."""

    first: float | None = None
    ended: float = 0.0
    tokens: int = 0

    def add(self, chunk: dict[str, Any], seconds: Callable[[], float]) -> None:
        if self.first is None and text_of(chunk):
            self.first = seconds()
        if usage := chunk.get("usage"):
            self.tokens = int(usage["completion_tokens"])

    @property
    def milliseconds(self) -> float:
        """Of a token, from the first to the end."""
        assert self.first is not None
        return 1000 * (self.ended - self.first) / (self.tokens - 1)


def text_of(chunk: dict[str, Any]) -> str:
    """Return the text of an object of a stream, of either endpoint."""
    for choice in chunk.get("choices", ()):
        return choice.get("text") or choice.get("delta", {}).get("content") or ""
    return ""


@contextlib.contextmanager
def answer(
    port: int, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
) -> Iterator[Any]:
    """Ask on a connection of its own; give what answers, and leave."""
    connection = HTTPConnection(_HOST, port, timeout=_SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": kind} if body else {})
        response = connection.getresponse()
        if response.status >= 400:
            raise RuntimeError(f"{path}: {response.status} {response.read(500).decode(errors='replace')}")
        yield response
        response.close()
    finally:
        connection.close()


def our_server(path: Path, n_ctx: int, slots: int, cache: Path) -> Server:
    words = ["-m", "pi_gguf", "serve", str(path), "--port", "PORT", "--n-ctx", str(n_ctx), "--slots", "SLOTS"]
    words += ["--type-k", "f16"]  # as the peer has
    return Server(OURS, [sys.executable, *words], slots, PI_GGUF_CACHE=str(cache), PYTHONPATH=str(ROOT))


def peer_server(peer: str, llama_server: str, path: Path, n_ctx: int, slots: int) -> Server:
    """Return llama.cpp's server with the same window for all its slots, attention, batches and threads."""
    window, threads = str(n_ctx), str(cores())
    if peer == "xllamacpp":
        words = ["-c", _XLLAMACPP, str(path), "PORT", window, "SLOTS", str(BATCH), threads]
        return Server(peer, [sys.executable, *words], slots)
    words = (
        f"-c {window} -np SLOTS -kvu -b {BATCH} -ub {BATCH} -t {threads} -tb {threads} -fa off --cache-ram 0".split()
    )
    return Server(peer, [llama_server, "-m", str(path), "--host", _HOST, "--port", "PORT", *words], slots)


# Texts


class Prose:
    """The sample's novels, cut in pieces that are given once."""

    def __init__(self, model: Model) -> None:
        self._model, self._at = model, 0
        self._text = "".join(bundled.novels("train").values())

    def take(self, tokens: int) -> str:
        """Return a text of so many tokens, about."""
        part = self._text[self._at : self._at + 8 * tokens]
        self._at = (self._at + len(part)) % (len(self._text) - 10 * tokens)
        return self._model.detokenize(self._model.tokenize(part, add_special=False)[:tokens])


# Measuring


@dataclass(frozen=True)
class Trial:
    """What is measured: a file, opened here and by the servers."""

    path: Path
    size: Size
    model: Model
    servers: tuple[Server, ...]
    prose: Prose
    cache: Path

    def turns(self, rounds: int) -> Iterator[tuple[int, tuple[Server, ...]]]:
        """Yield the rounds with the servers in this order and the other one in turn."""
        for turn in range(rounds):
            yield turn, self.servers if turn % 2 else self.servers[::-1]

    @property
    def long(self) -> int:
        """Tokens of a long request."""
        return min(self.size.document, self.model.n_ctx - _BESIDE)


def summary(runs: dict[str, list[float]], digits: int = 1) -> dict[str, Any]:
    """Return medians, ours by each other, and the runs."""
    medians = {who: round(statistics.median(found), digits) for who, found in runs.items()}
    ratios = {who: round(medians[OURS] / value, 3) for who, value in medians.items() if who != OURS and value}
    return {
        "medians": medians,
        "ratios": ratios,
        "runs": {who: [round(x, digits) for x in r] for who, r in runs.items()},
    }


def measure_write(trial: Trial) -> dict[str, Any]:
    """Return tokens/s of all clients together, from the first question to the last answer's end."""
    size, found = trial.size, {}
    for clients in size.clients:
        runs: dict[str, list[float]] = {server.name: [] for server in trial.servers}
        with ThreadPoolExecutor(clients) as pool:
            for turn, order in trial.turns(size.rounds + 1):
                prompts = [trial.prose.take(size.prompt) for _ in range(clients)]
                for server in order:
                    started = server.seconds()
                    answers = list(pool.map(server.write, prompts, [size.tokens] * clients))
                    if turn:  # the first is warming up
                        runs[server.name].append(sum(a.tokens for a in answers) / (server.seconds() - started))
        found[str(clients)] = summary(runs)
    ones = found[str(size.clients[0])]["medians"]
    for clients in found:
        more = found[clients]["medians"]
        found[clients]["by one client"] = {who: round(more[who] / ones[who], 2) for who in more}
    return found


def measure_added(trial: Trial) -> dict[str, Any]:
    """Return milliseconds a token, of streams and of the session in this process, by slots that the servers have."""
    with contextlib.ExitStack() as stack:
        single = [stack.enter_context(server.again(1)) for server in trial.servers]
        return {"1": added(replace(trial, servers=tuple(single))), str(trial.size.slots): added(trial)}


def added(trial: Trial) -> dict[str, Any]:
    size = trial.size
    runs: dict[str, list[float]] = {who: [] for who in (*(s.name for s in trial.servers), "session")}
    for turn, order in trial.turns(2 * size.rounds + size.slots):
        prompt = trial.prose.take(size.prompt)
        tried: list[tuple[str, Callable[[str, int], Answer]]] = [(server.name, server.write) for server in order]
        tried.insert(turn % (len(tried) + 1), ("session", partial(by_session, trial)))
        answers = {who: write(prompt, size.tokens) for who, write in tried}
        if turn >= size.slots and all(a.first is not None and a.tokens > 1 for a in answers.values()):
            for who, found in answers.items():
                runs[who].append(found.milliseconds)
    medians = {who: statistics.median(found) for who, found in runs.items()}
    more = {who: round(value - medians["session"], 3) for who, value in medians.items() if who != "session"}
    return {**summary(runs, 3), "added": more}


def by_session(trial: Trial, prompt: str, tokens: int) -> Answer:
    found, seconds = Answer(), time.process_time if trial.size.cpu else _clock

    def note(_read: int, _to_read: int, written: int) -> None:
        found.tokens = written

    for _ in trial.model.complete(prompt, max_tokens=tokens, on_progress=note):
        if found.first is None:
            found.first = seconds()
    found.ended = seconds()
    return found


def measure_gap(trial: Trial) -> dict[str, Any]:
    """Return the longest wait between tokens of a running answer while another request is read, beside its batches."""
    runs: dict[str, list[dict[str, float]]] = {server.name: [] for server in trial.servers}
    for _, order in trial.turns(trial.size.readings):
        texts, prompts = [trial.prose.take(trial.long) for _ in "ab"], [trial.prose.take(32) for _ in range(8)]
        for server in order:
            run = batches(server, texts[0])
            run["gap"] = next((gap for prompt in prompts if (gap := gap_beside(server, prompt, texts[1]))), 0.0)
            if not run["gap"]:
                raise SystemExit(f"{server.name}: every answer ended before the long request was read")
            run["by the longest batch"], run["by a mean batch"] = run["gap"] / run["longest"], run["gap"] / run["mean"]
            runs[server.name].append(run)
    return {
        "tokens": trial.long,
        "medians": {
            who: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0]}
            for who, found in runs.items()
        },
        "runs": {who: [{key: round(x, 4) for key, x in run.items()} for run in found] for who, found in runs.items()},
    }


def batches(server: Server, text: str) -> dict[str, float]:
    """Read a text alone; return the seconds of a batch: the mean, and the longest."""
    points = [(0.0, _clock())]
    for moment, chunk in server.stream("/v1/completions", prompt=text, max_tokens=1, return_progress=True):
        if progress := chunk.get("prompt_progress"):
            points.append((progress["processed"], moment))
        elif text_of(chunk):
            break
    return seconds_of_batches(points)


def seconds_of_batches(points: list[tuple[float, float]]) -> dict[str, float]:
    """Return how long it takes to read a batch, from how far reading was at some moments.

    Between two moments it goes on evenly. The longest is that of the slowest batch that lies anywhere.
    """
    points = [
        max(group, key=lambda point: point[1]) for _, group in itertools.groupby(points, key=lambda point: point[0])
    ]
    read, moments = [p[0] for p in points], [p[1] for p in points]
    if read[-1] < BATCH:
        raise SystemExit(f"no progress of a batch was told, only {read}")

    def when(tokens: float) -> float:
        after = next(i for i, value in enumerate(read) if value >= tokens)
        if not after:
            return moments[0]
        share = (tokens - read[after - 1]) / (read[after] - read[after - 1])
        return moments[after - 1] + share * (moments[after] - moments[after - 1])

    ends = [tokens for tokens in (*read, *(value + BATCH for value in read)) if BATCH <= tokens <= read[-1]]
    longest = max(when(end) - when(end - BATCH) for end in ends)
    return {"mean": (moments[-1] - moments[0]) * BATCH / read[-1], "longest": longest}


def gap_beside(server: Server, prompt: str, text: str) -> float:
    """Return the longest wait between tokens of an answer while a text is read; 0 where the answer ended too early."""
    moments: list[float] = []
    ended = threading.Event()
    span = [0.0, 0.0]

    def read() -> None:
        span[0] = _clock()
        server.write(text, 1)
        span[1] = _clock()
        ended.set()

    reader = threading.Thread(target=read)
    answered = server.stream("/v1/completions", prompt=prompt, max_tokens=_BESIDE - 64)
    for moment, chunk in answered:
        if text_of(chunk):
            moments.append(moment)
        if len(moments) == 8 and reader.ident is None:
            reader.start()
        if ended.is_set() and moments[-1] > span[1]:
            answered.close()
            break
    if reader.ident is None:
        return 0.0
    reader.join()
    seen = [moment for moment in moments if moment >= span[0]]
    if not seen or seen[-1] < span[1]:
        return 0.0
    return max(after - before for before, after in itertools.pairwise([span[0], *seen]))


# Documents


def first_token(server: Server, path: str, started: float, **body: Any) -> float:
    """Return the seconds from `started` to the first token of an answer."""
    answered = server.stream(path, max_tokens=8, **body)
    for moment, chunk in answered:
        if text_of(chunk) or any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
            answered.close()
            return moment - started
    raise SystemExit(f"{server.name}: an answer without an end")


def about(server: Server, document: str, question: str, started: float) -> float:
    messages = [{"role": "user", "content": question}]
    return first_token(server, "/v1/chat/completions", started, messages=messages, document=document)


def upload(server: Server, name: str, text: str) -> str:
    """Give a document; return its id."""
    head = (
        f'--cut\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: text/plain\r\n\r\n'
    )
    body = head.encode() + text.encode() + b"\r\n--cut--\r\n"
    with answer(server.port, "POST", "/v1/documents", body, "multipart/form-data; boundary=cut") as response:
        return str(json.loads(response.read())["id"])


def wait_until_kept(server: Server, document: str) -> dict[str, Any]:
    end = _clock() + _SECONDS
    while (entry := server.get(f"/v1/documents/{document}"))["status"] in ("waiting", "reading"):
        if _clock() > end:
            break
        time.sleep(0.05)
    if entry["status"] != "kept":
        raise SystemExit(f"{OURS}: a document was not kept but {entry['status']}: {entry['error']}")
    return dict(entry)


def measure_document(trial: Trial) -> dict[str, Any]:
    """Return seconds to the first token about a document; ours with a restart, from a server of its own."""
    texts = [trial.prose.take(trial.long - 128) for _ in range(trial.size.readings)]
    runs: dict[str, dict[str, list[float]]] = {server.name: {"first": [], "second": []} for server in trial.servers}
    for text in texts:
        for server in trial.servers[1:]:
            for key, question in zip(("first", "second"), QUESTIONS, strict=False):
                prompt = f"{text}\n\nQuestion: {question}\nAnswer:"
                runs[server.name][key].append(first_token(server, "/v1/completions", _clock(), prompt=prompt))
    mine, kept = runs[OURS], {"kept bytes": 0, "tokens": 0}
    mine["after a restart"] = []
    with tempfile.TemporaryDirectory() as name:
        ids = []
        with our_server(trial.path, trial.model.n_ctx, trial.size.slots, Path(name)) as server:
            for i, text in enumerate(texts):
                started = _clock()
                ids.append(upload(server, f"novel-{i}.txt", text))
                mine["first"].append(about(server, ids[-1], QUESTIONS[0], started))
                entry = wait_until_kept(server, ids[-1])
                mine["second"].append(about(server, ids[-1], QUESTIONS[1], _clock()))
                kept = {"kept bytes": entry["kept_bytes"], "tokens": entry["tokens"]}
        with our_server(trial.path, trial.model.n_ctx, trial.size.slots, Path(name)) as server:
            for document in ids:
                mine["after a restart"].append(about(server, document, QUESTIONS[2], _clock()))
    medians = {
        who: {key: round(statistics.median(seconds), 4) for key, seconds in found.items()}
        for who, found in runs.items()
    }
    by_first = {
        who: {key: round(value / found["first"], 4) for key, value in found.items() if key != "first"}
        for who, found in medians.items()
    }
    return {**kept, "medians": medians, "by the first": by_first, "runs": runs}


# Page


def load_page(port: int) -> tuple[float, int, list[str]]:
    """Load / and what it names, and what that names; return the seconds, the bytes and the paths."""
    started, size, seen, todo = _clock(), 0, set[str](), ["/"]
    while todo:
        path = todo.pop(0)
        seen.add(path)
        with answer(port, "GET", path) as response:
            kind, data = response.headers.get_content_type(), response.read()
        size += len(data)
        todo += [link for link in links(kind, data.decode(errors="replace"), path) if link not in {*seen, *todo}]
    return _clock() - started, size, sorted(seen)


def links(kind: str, text: str, base: str) -> list[str]:
    """Return the paths that a page, a style or a module loads."""
    patterns = {
        "text/html": r"<(?:script|img|source)\b[^>]*?\bsrc=[\"']([^\"'#]+)|<link\b[^>]*?\bhref=[\"']([^\"'#]+)",
        "text/css": r"url\(\s*[\"']?([^\"')#]+)|@import\s+[\"']([^\"']+)",
        "text/javascript": r"\b(?:import|from)\s*\(?\s*[\"'](\.{0,2}/[^\"']+)[\"']()",
    }
    pattern = patterns.get("text/javascript" if "javascript" in kind else kind)
    found = [one or other for one, other in re.findall(pattern, text)] if pattern else []
    return [urljoin(base, link) for link in found if not link.startswith(("data:", "http:", "https:", "//"))]


def measure_page(trial: Trial) -> dict[str, Any]:
    """Return the seconds of the page alone, and of it with all that it loads; and the bytes of all."""
    (server,) = [server for server in trial.servers if server.name == OURS]
    alone, whole = [], []
    for _ in range(4 * trial.size.rounds):
        started = _clock()
        with answer(server.port, "GET", "/") as response:
            response.read()
        alone.append(_clock() - started)
        seconds, size, paths = load_page(server.port)
        whole.append(seconds)
    first, every = (round(statistics.median(found), 4) for found in (alone, whole))
    return {"page": first, "with all": every, "slowest": round(max(whole), 4), "bytes": size, "files": len(paths)}


_MEASURES = {
    "write": measure_write, "added": measure_added, "gap": measure_gap, "document": measure_document,
    "page": measure_page,
}  # fmt: skip


def measure(path: Path, args: argparse.Namespace, size: Size, found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found before with these parts made anew."""
    n_ctx = min(size.n_ctx, read_gguf(path).rope.max_position_embeddings)
    found.update({"window": n_ctx, "slots": size.slots})
    with contextlib.ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(our_server(path, n_ctx, size.slots, cache))]
        if args.peer != "none":
            servers.append(stack.enter_context(peer_server(args.peer, args.llama_server, path, n_ctx, size.slots)))
        model = stack.enter_context(Model(path, n_ctx=n_ctx, type_k="f16"))
        trial = Trial(path, size, model, tuple(servers), Prose(model), cache)
        for part in args.parts.split(","):
            found[part] = _MEASURES[part](trial)
            print(path.name, part, without_runs(found[part]), flush=True)
    return found


def without_runs(value: Any) -> Any:
    return {k: without_runs(v) for k, v in value.items() if k != "runs"} if isinstance(value, dict) else value


def version_of(peer: str, llama_server: str) -> str:
    """Return what the peer calls itself."""
    if peer == "llama-server":
        said = subprocess.run([llama_server, "--version"], capture_output=True, text=True)
        return next((line for line in (said.stderr + said.stdout).splitlines() if line.startswith("version")), "?")
    return package_version("xllamacpp") if peer == "xllamacpp" else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--toy", action="store_true", help="few clients and short texts, once")
    parser.add_argument("--peer", choices=["llama-server", "xllamacpp", "none"], default="llama-server")
    parser.add_argument("--llama-server", default="llama-server", metavar="PATH", help="where llama-server is")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is measured; others stay in --out")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one core, and CPU seconds: for a machine that others use too"
    )
    parser.add_argument("--rounds", type=int, help="times that each writes")
    parser.add_argument("--slots", type=int, help="of both servers; 8 when left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "server.json")
    args = parser.parse_args()
    size = TOY if args.toy else Size()
    size = replace(size, rounds=args.rounds or size.rounds, slots=args.slots or size.slots, cpu=args.cpu_time)
    if args.cpu_time:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of all that is started from here, too
        Server.cpu = True
    files: dict[str, Any] = json.loads(args.out.read_text())["server"] if args.out.exists() else {}
    for path in args.files:
        files[path.name] = measure(path, args, size, files.get(path.name, {}))
        more = {
            "peer": args.peer,
            "peer_version": version_of(args.peer, args.llama_server),
            "threads": cores(),
            "cpu_time": size.cpu,
        }
        record = {"server": files, **more, **provenance(seed=0, device="cpu")}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
