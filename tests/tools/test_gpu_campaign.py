"""The GPU campaign's own logic, on a CPU: parts that fail or do not end, what is brought along, what is left out."""

from __future__ import annotations

import json
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_bundle  # noqa: E402
import gpu_campaign  # noqa: E402
from gpu_campaign import PARTS, Part  # noqa: E402


@pytest.fixture
def campaign(tmp_path, monkeypatch, capfd):
    """Run it with parts of one's own; return its record and what it printed."""

    def run(*options, parts):
        monkeypatch.setattr(gpu_campaign, "PARTS", parts)
        monkeypatch.setattr(gpu_campaign, "GRACE", 2)
        arguments = ["--device", "cpu", "--scale", "toy", "--out", str(tmp_path / "out"), "--bundle", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu_campaign.py", *arguments, *options])
        gpu_campaign.main()
        return json.loads((tmp_path / "out" / "campaign.json").read_text()), capfd.readouterr().out

    return run


def part(code, seconds=20, **more):
    return Part("a test", seconds, lambda device, scale, out, limit: ["-c", code, str(out)], **more)


@pytest.mark.slow
def test_a_part_that_fails_or_does_not_end_does_not_stop_the_rest(campaign):
    asleep = "import time, signal; signal.signal(signal.SIGINT, lambda *_: print('asked')); "
    asleep += "[time.sleep(1) for _ in range(99)]"
    written = "import sys, json; open(sys.argv[1] + '/found.json', 'w').write(json.dumps({'rows': 7})); print('there')"
    parts = {
        "fails": part("print('before'); raise SystemExit(3)"),
        "hangs": part(asleep, 1),
        "writes": part(written, results=("found.json", "missing.json"), told=lambda found: f"{found}"),
        "odd": part(written, results=("found.json",), told=lambda found: found["nothing"]),
    }
    started = time.time()
    # limits are five times as long on a CPU
    record, out = campaign("--parts", "fails,hangs,writes,odd", parts=parts)
    assert time.time() - started < 45
    found = record["parts"]
    assert [found[name]["outcome"] for name in parts] == ["exit code 3", "over its limit", "done", "done"]
    assert found["writes"]["told"] == "{'found.json': {'rows': 7}}" and found["writes"]["results"] == ["found.json"]
    assert "not understood" in found["odd"]["told"]
    assert "asked" in out and "before" in out and "there" in out


def test_parts_for_which_no_time_is_left_are_said(campaign):
    record, _ = campaign("--parts", "one", "--minutes", "0.1", parts={"one": part("print('ran')")})
    assert record["parts"]["one"]["outcome"] == "no time left"


def test_a_part_that_needs_llama_is_left_out_without(campaign, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "has_llama", lambda environment, device: False)
    parts = {"needs": part("print('ran')", needs_llama=True), "other": part("print('ran')")}
    record, _ = campaign("--parts", "needs,other", parts=parts)
    assert [record["parts"][name]["outcome"] for name in parts] == ["no llama.cpp", "done"]


def test_wheels_go_before_what_is_installed(campaign, tmp_path):
    with zipfile.ZipFile(tmp_path / "click-99-py3-none-any.whl", "w") as wheel:
        wheel.writestr("click/__init__.py", "place = 'the wheel'\n")
    record, out = campaign("--parts", "one", parts={"one": part("import click; print(click.place)")})
    assert "the wheel" in out and record["wheels"] == ["click-99-py3-none-any.whl"]


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("datasets-5.2.0-py3-none-any.whl", True),
        ("multiprocess-0.70.19-py312-none-any.whl", True),
        (f"x-1-cp{sys.version_info[0]}{sys.version_info[1]}-cp3-linux_x86_64.whl", True),
        ("xxhash-4.1.0-cp39-cp39-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", False),
        ("safetensors-1-cp38-abi3-manylinux_2_17_x86_64.whl", True),
    ],
)
def test_wheels_of_another_python_are_left_out(name, here):
    assert gpu_campaign.fits(name) == here


def test_kernels_are_measured_on_a_cpu(campaign, tmp_path):
    record, out = campaign("--parts", "kernels", parts={"kernels": PARTS["kernels"]})
    assert record["parts"]["kernels"]["outcome"] == "done", out
    assert "toy, math" in out and "layers     toy, chosen by torch" in out
    for part in ("attention", "layers"):
        assert f"{part:10} toy, groups of 32" in out
    found = json.loads((tmp_path / "out" / "kernels.json").read_text())["attention"]
    assert all(run["error"] < 1e-5 for run in found.values() if "seconds" in run) and len(found) == 6


def test_a_large_file_travels_in_pieces(tmp_path):
    path = tmp_path / "x.whl"
    data = bytes(range(256)) * 40
    path.write_bytes(data)
    gpu_campaign.split_in_pieces(path, size=1000)
    assert not path.exists() and len(list(tmp_path.iterdir())) == 11
    gpu_campaign.join_pieces(tmp_path)
    assert path.read_bytes() == data


def test_a_model_travels_in_several_folders(tmp_path):
    assert gpu_campaign.join_model(tmp_path / "gpu-model") is None
    for i, piece in ((2, b"def"), (3, b"gh"), (1, b"abc")):
        assert gpu_campaign.join_model(tmp_path / "gpu-model") is None, "a piece is missing"
        folder = tmp_path / f"gpu-model-{i}"
        folder.mkdir()
        (folder / f"x.gguf.{i}of3").write_bytes(piece)
    found = gpu_campaign.join_model(tmp_path / "gpu-model")
    assert found.name == "x.gguf" and found.read_bytes() == b"abcdefgh"


def test_every_part_names_what_exists():
    for name, found in PARTS.items():
        for scale in ("full", "toy"):
            command = found.command("cpu", scale, Path("out"), 60)
            scripts = [word for word in command if word.endswith(".py")]
            assert all(Path(script).is_file() for script in scripts), name
            assert scripts or command[:2] == ["-m", "pi_gguf"], name


def test_the_source_is_what_a_build_for_cuda_reads():
    kept = [
        "CMakeLists.txt", "llama_cpp/llama.py", "vendor/llama.cpp/CMakeLists.txt", "vendor/llama.cpp/src/models/a.cpp",
        "vendor/llama.cpp/ggml/src/ggml-cuda/mmq.cu", "vendor/llama.cpp/ggml/src/ggml.c",
        "vendor/llama.cpp/ggml/src/ggml-backend-impl.h", "vendor/llama.cpp/vendor/stb/stb_image.h",
    ]  # fmt: skip
    left = [
        "tests/test_llama.py", "docs/index.md", "vendor/llama.cpp/models/ggml-vocab-llama.gguf",
        "vendor/llama.cpp/docs/x.png", "vendor/llama.cpp/tests/test.cpp", "vendor/llama.cpp/tools/mtmd/mtmd.cpp",
        "vendor/llama.cpp/ggml/src/ggml-vulkan/ggml-vulkan.cpp",
    ]  # fmt: skip
    assert all(gpu_bundle.is_read(Path(name).parts) for name in kept)
    assert not any(gpu_bundle.is_read(Path(name).parts) for name in left)


def test_versions_of_the_bundle_are_the_tested_ones():
    versions = gpu_bundle.constraints()
    assert all(name in versions for name in (*gpu_bundle.WHEELS, gpu_bundle.SOURCE))


LEFT = {
    "bitsandbytes": (
        gpu_bundle.is_library,
        ["bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libbitsandbytes_cpu.so"],
        ["bitsandbytes/libbitsandbytes_cuda118.so"],
    ),
    "lm_eval": (
        gpu_bundle.is_harness,
        ["lm_eval/tasks/__init__.py", "lm_eval/api/task.py"],
        ["lm_eval/tasks/arc/arc.yaml"],
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_of_a_large_wheel_what_is_used_is_left(name, tmp_path):
    keeps, kept, dropped = LEFT[name]
    path = tmp_path / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside in (*dropped, *kept):
            wheel.writestr(inside, inside)
    gpu_bundle.strip(tmp_path, name, keeps)
    with zipfile.ZipFile(path) as wheel:
        assert {inside: wheel.read(inside).decode() for inside in wheel.namelist()} == {
            inside: inside for inside in kept
        }
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_that_compiles(tmp_path):
    source = tmp_path / "llama-cpp-python-0.tar.xz"
    (tmp_path / "pyproject.toml").write_text("")
    with tarfile.open(source, "w:xz") as archive:
        archive.add(tmp_path / "pyproject.toml", "llama_cpp_python-0/pyproject.toml")
    command, environment = gpu_campaign.build_command(source, tmp_path, tmp_path / "wheels", "cuda")
    assert command[-1] == str(tmp_path / "llama_cpp_python-0") and (tmp_path / "llama_cpp_python-0").is_dir()
    assert "-DGGML_CUDA=ON" in environment["CMAKE_ARGS"] and "-fno-dse" in environment["CXXFLAGS"]
    assert "CUDA" not in gpu_campaign.build_command(source, tmp_path, tmp_path, "cpu")[1]["CMAKE_ARGS"]
