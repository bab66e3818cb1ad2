"""Compile llama.cpp for a card beforehand, where there is no CUDA, into a wheel for `gpu_campaign.py --wheels`.

In: the source in `build/gpu-bundle` (`make gpu-bundle`), CUDA's compiler and headers as Python packages, and the
installed llama-cpp-python, whose Python files the wheel gets. Out: `build/gpu-wheels`, one wheel of some 14 MB for
Linux on x86-64 with AVX2. It takes half an hour of two cores, where everything for every model would take hours:
kernels are made for heads of `HEADS` elements and the weights of `TYPES`, and a call of another ends the process.

Example:
    make gpu-bundle
    python tools/gpu_wheel.py --architecture 90
    make gpu PARTS=smollm2 WHEELS=build/gpu-wheels
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
CUDA = (
    "nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85", "nvidia-cublas==13.0.2.14",
)  # fmt: skip
"""840 MB, for a driver of CUDA 13.0."""

HEADS = (64, 128)
TYPES = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
LINKED = ("cudart", "cublas", "cublasLt")
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "CMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "CMAKE_INSTALL_RPATH=$ORIGIN", "GGML_CUDA=ON", "GGML_CUDA_NO_VMM=ON", "GGML_NATIVE=OFF", "GGML_AVX2=ON",
    "GGML_FMA=ON", "GGML_F16C=ON", "GGML_BMI2=ON", "GGML_OPENMP=OFF", "LLAMA_CURL=OFF", "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_TOOLS=OFF",
    "LLAMA_BUILD_COMMON=OFF",
)  # fmt: skip
"""Of CMake. Libraries find each other beside themselves, CUDA's by LD_LIBRARY_PATH, which the campaign sets."""


def trim(kernels: Path) -> None:
    """Leave out the kernels of other heads and types, in llama.cpp's folder of template instances."""
    for path in kernels.glob("fattn-mma*.cu"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith("DECL") or _is_kept(line)))
    for path in kernels.glob("fattn-tile*.cu"):
        if not re.search(rf"dkq({'|'.join(map(str, HEADS))})-", path.name):
            path.unlink()
    for path in kernels.glob("mmq-instance-*.cu"):
        if path.stem.removeprefix("mmq-instance-") not in TYPES:
            path.unlink()


def _is_kept(line: str) -> bool:
    found = re.match(r"DECL_FATTN_MMA_F16_CASE\((\d+), *(\d+),", line)
    return found is not None and int(found[1]) in HEADS and int(found[2]) in HEADS


def filling(symbols: Iterable[str]) -> str:
    """Return the assembly of functions that end the process, for those that were left out."""
    lines = [".text"]
    for symbol in symbols:
        lines += [f".globl {symbol}", f".type {symbol},@function", f"{symbol}:"]
    return "\n".join([*lines, " ud2", '.section .note.GNU-stack,"",@progbits', ""])


def missing(library: Path) -> list[str]:
    """Return the kernels that a library calls and does not have."""
    listed = _output("nm", "-D", "--undefined-only", library)
    return re.findall(r"^\s*U (\S*(?:ggml_cuda_flash_attn_ext|mul_mat_q_case)[^\s@]*)", listed, re.MULTILINE)


def compile_all(source: Path, build: Path, cuda: Path, architecture: str) -> Path:
    """Compile, fill in what was left out, and return the folder of the libraries."""
    for name in LINKED:  # as the linker looks for them
        plain = cuda / "lib" / f"lib{name}.so"
        if not plain.exists():
            plain.symlink_to(f"lib{name}.so.13")
    if not (cuda / "lib64").exists():
        (cuda / "lib64").symlink_to("lib")
    options = [
        *OPTIONS, f"CMAKE_CUDA_ARCHITECTURES={architecture}-real", f"CMAKE_CUDA_COMPILER={cuda / 'bin' / 'nvcc'}",
        f"CUDAToolkit_ROOT={cuda}", f"CMAKE_CUDA_FLAGS=-I{cuda / 'include'}",
        f"CMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse -I{cuda / 'include'}",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": os.pathsep.join([str(cuda / "bin"), os.environ["PATH"]])}
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *(f"-D{one}" for one in options)]
    subprocess.run(configure, check=True, env=environment)
    subprocess.run(["ninja", "-C", str(build), "ggml-cuda", "llama"], check=True, env=environment)
    (library,) = (path for path in (build / "bin").glob("libggml-cuda.so*") if not path.is_symlink())
    (build / "filling.S").write_text(filling(missing(library)))
    subprocess.run(["as", build / "filling.S", "-o", build / "filling.o"], check=True)
    commands = _output("ninja", "-C", build, "-t", "commands", "ggml-cuda").splitlines()
    (link,) = (line for line in commands if f"-o bin/{library.name}" in line)
    link = link.replace(f"-o bin/{library.name}", f"-o bin/{library.name} filling.o")
    subprocess.run(link, shell=True, check=True, cwd=build)
    if left := missing(library):
        sys.exit(f"error: {library}: still without {', '.join(left[:4])}")
    return build / "bin"


def pack(libraries: Path, wheel: Path) -> None:
    """Write the wheel: the Python files of the installed package, and the libraries by the names they are sought by."""
    installed = distribution("llama-cpp-python")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in installed.files or ():
            if file.suffix in (".py", "") and "lib" not in file.parts and file.parts[0] != "..":
                archive.write(str(file.locate()), str(file))
        for path in sorted(libraries.glob("lib*.so*")):
            sought = path.name.endswith((".so", ".so.0")) and path.name != "libggml-cuda.so"
            if sought and path.name != "libllama.so.0":
                stripped = libraries / "stripped"
                subprocess.run(["strip", "-o", stripped, path.resolve()], check=True)
                archive.write(stripped, f"llama_cpp/lib/{path.name}")


def _output(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="90", help="compute capability: 90 for H100 and H200, 89 for 4090")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-llama", help="folder for CUDA and objects")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-wheels", help="folder for the wheel")
    args = parser.parse_args()
    work = args.work.resolve()
    (archive,) = (ROOT / "build" / "gpu-bundle").glob("llama-cpp-python-*.tar.xz")
    if not (work / "cuda").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(work / "cuda")]
        subprocess.run([*install, *CUDA], check=True)
    if not (work / "source").exists():
        with tarfile.open(archive) as packed:
            packed.extractall(work / "unpacked", filter="data")
        (tree,) = (work / "unpacked").iterdir()
        trim(tree / "vendor/llama.cpp/ggml/src/ggml-cuda/template-instances")
        (tree / "vendor/llama.cpp").rename(work / "source")
        shutil.rmtree(work / "unpacked")
    libraries = compile_all(work / "source", work / "build", work / "cuda" / "nvidia" / "cu13", args.architecture)
    args.out.mkdir(parents=True, exist_ok=True)
    version = distribution("llama-cpp-python").version
    wheel = args.out / f"llama_cpp_python-{version}-py3-none-linux_x86_64.whl"
    pack(libraries, wheel)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MB for compute capability {args.architecture}")
    print("next: copy the tree with build/gpu-bundle and this folder to the machine with the card")


if __name__ == "__main__":
    main()
