"""llama.cpp for a card, compiled beforehand: what is left out, and what stands in its place. Nothing is compiled."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_wheel  # noqa: E402


def test_kernels_of_other_heads_and_types_are_left_out(tmp_path):
    cases = [(64, 64), (80, 80), (128, 128), (192, 128), (576, 512)]
    text = "// made\n" + "".join(f"DECL_FATTN_MMA_F16_CASE({k}, {v}, 8, 1);\n" for k, v in cases)
    (tmp_path / "fattn-mma-f16-instance-ncols1_8-ncols2_1.cu").write_text(text)
    names = [
        "fattn-tile-instance-dkq64-dv64.cu",
        "mmq-instance-q4_k.cu",
        "mmq-instance-q8_0.cu",
        "mmf-instance-ncols_1.cu",
    ]
    others = ["fattn-tile-instance-dkq96-dv96.cu", "fattn-tile-instance-dkq640-dv512.cu", "mmq-instance-iq2_xs.cu"]
    for name in (*names, *others):
        (tmp_path / name).write_text("")
    gpu_wheel.trim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("fattn-mma")) == sorted(names)
    kept = (tmp_path / "fattn-mma-f16-instance-ncols1_8-ncols2_1.cu").read_text().splitlines()
    assert kept == ["// made", *(f"DECL_FATTN_MMA_F16_CASE({n}, {n}, 8, 1);" for n in (64, 128))]


def test_what_is_missing_is_filled_in_so_that_the_library_opens(tmp_path):
    source, bare, whole = tmp_path / "kernels.c", tmp_path / "libbare.so", tmp_path / "libwhole.so"
    source.write_text("void mul_mat_q_case_x(void); int three(int x) { if (x) mul_mat_q_case_x(); return 3; }")
    compile_it = ["gcc", "-shared", "-fPIC", str(source)]
    subprocess.run([*compile_it, "-o", bare], check=True)
    assert gpu_wheel.missing(bare) == ["mul_mat_q_case_x"]
    with pytest.raises(OSError, match="undefined symbol"):
        ctypes.CDLL(str(bare))
    (tmp_path / "filling.S").write_text(gpu_wheel.filling(gpu_wheel.missing(bare)))
    subprocess.run(["as", tmp_path / "filling.S", "-o", tmp_path / "filling.o"], check=True)
    subprocess.run([*compile_it, tmp_path / "filling.o", "-o", whole], check=True)
    assert gpu_wheel.missing(whole) == [] and ctypes.CDLL(str(whole)).three(0) == 3
    called = f"import ctypes; ctypes.CDLL({str(whole)!r}).three(1)"
    assert subprocess.run([sys.executable, "-c", called]).returncode < 0, "the process ends"


def test_the_wheel_has_the_package_and_the_libraries_by_the_names_they_are_sought_by(tmp_path):
    (tmp_path / "x.c").write_text("int x;")
    for name in ("ggml-cuda", "ggml", "llama"):
        whole = tmp_path / f"lib{name}.so.0.1"
        subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "x.c", "-o", whole], check=True)
        (tmp_path / f"lib{name}.so.0").symlink_to(whole.name)
        (tmp_path / f"lib{name}.so").symlink_to(f"lib{name}.so.0")
    gpu_wheel.pack(tmp_path, tmp_path / "x.whl")
    with zipfile.ZipFile(tmp_path / "x.whl") as wheel:
        names = wheel.namelist()
    assert {"llama_cpp/__init__.py", "llama_cpp/llama_cpp.py"} <= set(names)
    libraries = [name for name in names if name.startswith("llama_cpp/lib/")]
    assert libraries == [f"llama_cpp/lib/lib{name}" for name in ("ggml-cuda.so.0", "ggml.so", "ggml.so.0", "llama.so")]
    assert any(name.endswith(".dist-info/METADATA") for name in names)
