"""What the runtime costs beside llama.cpp's own loop, and how long one waits for an answer about a document.

In: GGUF files. Out: `benchmarks/runtime.json`, for each file: tokens/s read and written in the same opened context by
us, by llama-cpp-python's `generate`, and by a bare loop of `llama_decode` and a greedy sampler, in turn, medians and
the best (all must write the same tokens); seconds to the first token of an answer about a document, of the first
question, of a second one, and in a new process; seconds to bring back what was kept against reading its file once, both
from memory. Lengths that a file's window does not hold are left out.

Example (half an hour for two files; --toy is a trial of seconds):
    python benchmarks/runtime.py SmolLM2-135M-Instruct.Q4_1.gguf tiny-32k.gguf
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pi_gguf import bundled  # noqa: E402
from pi_gguf.common.provenance import provenance  # noqa: E402
from pi_gguf.documents.formats import Document  # noqa: E402
from pi_gguf.llamacpp.library import compute, llama_cpp_library  # noqa: E402
from pi_gguf.runtime.model import Model  # noqa: E402
from pi_gguf.runtime.reading import ROOM, Reading  # noqa: E402
from pi_gguf.runtime.sampling import Sampling  # noqa: E402
from pi_gguf.runtime.states import States  # noqa: E402

QUESTIONS = ("Who is the story about?", "Where does it take place?")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        lengths: of prompts, in tokens.
        tokens: written after each.
        rounds: times that each reads and writes; three times as often below 2048 tokens.
        cpu: whether loops run in one thread and its CPU seconds count, as on a machine that others use too.
    """

    lengths: tuple[int, ...] = (512, 4096, 32768)
    tokens: int = 64
    rounds: int = 3
    cpu: bool = False

    def open(self, path: Path, **options: Any) -> Model:
        return Model(path, n_threads=1 if self.cpu else None, type_k="f16", **options)


TOY = Size((64, 512), 4, 1)

_clock = time.perf_counter

Times = tuple[float, float, list[int]]
"""Seconds to read and to write, and the tokens written."""


def ours(model: Model, ids: list[int], tokens: int) -> Times:
    """Read and write as `Model.complete` does, text and all."""
    written: list[int] = []
    started = _clock()
    first = started
    for token in model.session.write(ids, tokens + 1, Sampling()):
        model.session.piece(token)
        if not written:
            first = _clock()
        written.append(token)
    return first - started, _clock() - first, written


def binding(model: Model, ids: list[int], tokens: int) -> Times:
    """Read and write as llama-cpp-python does, by its `eval` and `sample`, in the same context."""
    model._llama.reset()
    written: list[int] = []
    started = _clock()
    first = started
    for token in model._llama.generate(ids, temp=0.0, reset=False):
        if model.is_end(token):
            break
        if not written:
            first = _clock()
        written.append(token)
        if len(written) > tokens:
            break
    return first - started, _clock() - first, written


def plainly(model: Model, ids: list[int], tokens: int) -> Times:
    """Let llama.cpp read and write in a loop of its own calls, in the same context."""
    llama_cpp, context, batch = llama_cpp_library(), model._llama.ctx, model.session._batch
    sampler = llama_cpp.llama_sampler_init_greedy()
    written: list[int] = []
    started = _clock()
    first = started
    for start in range(0, len(ids), batch):
        part = (llama_cpp.llama_token * len(ids[start : start + batch]))(*ids[start : start + batch])
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(part, len(part))) == 0
    while True:
        token = llama_cpp.llama_sampler_sample(sampler, context, -1)
        if model.is_end(token):
            break
        if not written:
            first = _clock()
        written.append(token)
        if len(written) > tokens:
            break
        part = (llama_cpp.llama_token * 1)(token)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(part, 1)) == 0
    seconds = _clock() - first
    llama_cpp.llama_sampler_free(sampler)
    return first - started, seconds, written


def novel_ids(model: Model, length: int) -> list[int]:
    text = max(bundled.novels("heldout").values(), key=len)
    return [*model.bos, *model.tokenize(text[: 8 * length], add_special=False)][:length]


def run_alone(loop: Callable[..., Times], model: Model, ids: list[int], tokens: int) -> Times:
    """Run a loop from an empty cache; the others in the thread that ours computes in, or two teams would be awake."""
    model.session.clear()
    found = loop(model, ids, tokens) if loop is ours else compute(loop, model, ids, tokens)
    model.session.clear()
    return found


def by_theirs(rates: dict[str, float]) -> dict[str, float]:
    return {who: round(rates["pi-gguf"] / rate, 3) for who, rate in rates.items() if who != "pi-gguf"}


def measure_loops(model: Model, length: int, size: Size) -> dict[str, Any]:
    """Return tokens/s of each, read and written: medians, and ours by theirs."""
    ids = novel_ids(model, length)
    loops: dict[str, Callable[[Model, list[int], int], Times]] = {
        "pi-gguf": ours, "llama-cpp-python": binding, "llama.cpp": plainly,
    }  # fmt: skip
    runs: dict[str, list[Times]] = {who: [] for who in loops}
    run_alone(plainly, model, ids[:64], 1)  # what comes first only
    for turn in range(size.rounds * (3 if length < 2048 else 1)):
        for who in (*loops,) if turn % 2 else reversed(tuple(loops)):
            runs[who].append(run_alone(loops[who], model, ids, size.tokens))
    wrote = runs["pi-gguf"][0][2]
    assert all(run[2] == wrote for found in runs.values() for run in found), "they write different tokens"
    found: dict[str, Any] = {}
    for place, what, count in ((0, "read", length), (1, "write", len(wrote) - 1)):
        if count:
            rates = {who: [count / run[place] for run in runs[who]] for who in loops}
            middle, best = ({who: round(of(rate), 1) for who, rate in rates.items()} for of in (statistics.median, max))
            found[what] = {
                "medians": middle, "best": best, "ratios": by_theirs(middle), "ratios of the best": by_theirs(best),
                "runs": {who: [round(one, 1) for one in rate] for who, rate in rates.items()},
            }  # fmt: skip
    return found


# Documents, each step in a process of its own


def wait(path: Path, text: str, folder: Path, questions: int) -> dict[str, Any]:
    """Ask about a document; return seconds to the first token of each answer, and of what came before the first."""
    started = time.perf_counter()
    with Model(path, type_k="f16") as model:
        opened = time.perf_counter()
        with Reading(model, Document("novel.txt", "txt", text), states=States(folder)) as book:
            begun = time.perf_counter() - opened
            waits = [next_token(book, question) for question in QUESTIONS[:questions]]
            return {"open": opened - started, "tokenize": begun, "waits": waits, "tokens": len(book.ids)}


def next_token(book: Reading, question: str) -> float:
    started = time.perf_counter()
    answer = book.ask(question, max_tokens=8)
    next(answer, None)
    answer.close()
    return time.perf_counter() - started


def restore(path: Path, folder: Path, times: int) -> dict[str, Any]:
    """Return seconds to bring back the one kept state, all of it verified, and to read its file once."""
    states = States(folder)
    (kept,) = states.entries()
    found: dict[str, list[float]] = {"restore": [], "read the file": []}
    buffer = bytearray(2**22)
    with Model(path, type_k="f16") as model:
        with states.longest(model.identity, wanted(kept.path), model.n_ctx) as state:
            ids = state.ids if state else []
        for _ in range(times):
            started = time.perf_counter()
            with states.longest(model.identity, ids, model.n_ctx) as state:
                assert state and model.session.restore(state.state, state.ids)
            found["restore"].append(time.perf_counter() - started)
            started = time.perf_counter()
            with kept.path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
            found["read the file"].append(time.perf_counter() - started)
    medians = {what: statistics.median(seconds) for what, seconds in found.items()}
    ratio = round(medians["restore"] / medians["read the file"], 2)
    return {**{what: round(seconds, 4) for what, seconds in medians.items()}, "ratio": ratio, "bytes": kept.nbytes}


def wanted(path: Path) -> list[int]:
    """Return the ids that a kept state has read."""
    from pi_gguf.runtime.states import _read_head

    with path.open("rb") as file:
        return list(_read_head(file, path)[1].tolist())


def in_a_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_document(path: Path, length: int, rounds: int) -> dict[str, Any]:
    """Return how long one waits for an answer about a document, medians, with what is kept of it between processes."""
    with Model(path, type_k="f16") as model:
        ids = novel_ids(model, min(length, model.n_ctx - min(ROOM, model.n_ctx // 8) - 128))
        text = model.detokenize(ids[len(model.bos) :])
    runs: dict[str, list[dict[str, Any]]] = {"first": [], "restart": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            runs["first"].append(in_a_new_process(wait, path, text, Path(name), 2))
            runs["restart"].append(in_a_new_process(wait, path, text, Path(name), 1))
            brought = in_a_new_process(restore, path, Path(name), 7)
    first, second = (statistics.median(run["waits"][i] for run in runs["first"]) for i in (0, 1))
    again = statistics.median(run["waits"][0] for run in runs["restart"])
    opened = statistics.median(run["open"] + run["tokenize"] + run["waits"][0] for run in runs["restart"])
    return {
        "tokens": runs["first"][0]["tokens"], "first": round(first, 3), "second": round(second, 3),
        "after a restart": round(again, 3), "after a restart, with opening": round(opened, 3),
        "second / first": round(second / first, 5), "after a restart / first": round(again / first, 5),
        "with opening / first": round(opened / first, 5), "kept": brought, "runs": runs,
    }  # fmt: skip


def measure(path: Path, size: Size, parts: list[str], found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found before with these parts made anew."""
    with Model(path, type_k="f16") as model:
        lengths = [length for length in size.lengths if length <= model.n_ctx]
    found["window"] = model.n_ctx
    for length in lengths if "loops" in parts else ():  # a window that holds it, as the scores' buffers grow with it
        with size.open(path, n_ctx=min(model.window, length + size.tokens + 1)) as opened:
            tokens = min(length, opened.n_ctx - size.tokens - 1)
            found.setdefault("loops", {})[str(length)] = measure_loops(opened, tokens, size)
        print(path.name, length, found["loops"][str(length)], flush=True)
    if "document" in parts:
        found["document"] = measure_document(path, lengths[-1], size.rounds)
        print(path.name, "document", {k: v for k, v in found["document"].items() if k != "runs"}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--toy", action="store_true", help="lengths of 64 and 512 tokens, once")
    parser.add_argument("--parts", default="loops,document", help="what is measured; others stay in --out")
    parser.add_argument("--lengths", help="of prompts, in tokens, e.g. 512,4096")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="loops run in one thread, and its CPU seconds count: for a machine that others use too",
    )
    parser.add_argument("--rounds", type=int, help="times that each is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "runtime.json")
    args = parser.parse_args()
    size = TOY if args.toy else Size()
    lengths = tuple(map(int, args.lengths.split(","))) if args.lengths else size.lengths
    size = replace(size, lengths=lengths, rounds=args.rounds or size.rounds, cpu=args.cpu_time)
    if args.cpu_time:
        global _clock
        _clock = time.process_time
    files: dict[str, Any] = json.loads(args.out.read_text())["runtime"] if args.out.exists() else {}
    for path in args.files:
        files[path.name] = measure(path, size, args.parts.split(","), files.get(path.name, {}))
        args.out.write_text(
            json.dumps({"runtime": files, "clock": _clock.__name__, **provenance(seed=0, device="cpu")}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
