"""The package as a whole: light imports, layers, help, and a README that is true."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pi_gguf
from pi_gguf.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# Imports go downward only: a module may import those of the layers before its own. The README draws the same.
LAYERS = [
    {
        "endings",
        "errors",
        "passkey",
        "progress",
        "data",
        "losses",
        "scoring",
        "tables",
        "tiles",
        "provenance",
        "results",
    },
    {
        "rope",
        "options",
        "markup",
        "files",
        "texts",
        "sample_texts",
        "pre_tokenizers",
        "sentencepieces",
        "bundled",
        "families",
        "weights",
    },
    {"findings", "processes", "plots", "kept", "archives"},
    {"templates", "formats"},
    {"methods", "quotes"},
    {"configs", "agreement"},
    {"record"},
    {"tensors"},
    {"checkpoint"},
    {"merging"},
    {"adapter_files"},
    {"adapters", "corpus", "lora"},
    {"vocabulary"},
    {"gguf_header", "token_check"},
    {"gguf_file", "hf_model"},
    {"loadable"},
    {"remote"},
    {"ggml"},
    {"trial"},
    {"session"},
    {"runtime", "writing"},
    {"imatrix"},
    {"planning", "targets", "check", "quantizing"},
    {"evaluate"},
    {"defects", "batches", "validation", "certificate", "divergence", "bounds", "summaries", "haystack", "short_tasks"},
    {"needle"},
    {"ruler"},
    {"training"},
    {"finetune", "inspection", "repairing", "model_card", "matrix", "comparison", "report"},
    {"conversion"},
    {"demo"},
    {"cli"},
    {"__main__", "__init__"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pi_gguf"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    found = {p.stem: p for p in (ROOT / "pi_gguf").glob("*.py")}
    return {**found, **{name: ROOT / "pi_gguf" / name / "__init__.py" for name in ("bundled", "families")}}


def test_every_module_has_its_layer_and_imports_go_downward():
    assert sorted(modules()) == sorted(m for layer in LAYERS for m in layer)
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for name, path in modules().items():
        for imported in imports(path) if name != "__init__" else ():
            assert level[imported] <= level[name], f"{name} imports {imported}, which is in a higher layer"


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("click", {"cli"}),
        ("llama_cpp", {"ggml"}),
        ("gguf", {"gguf_file"}),
        ("transformers", {"adapters", "checkpoint", "configs", "hf_model", "lora", "training", "vocabulary"}),
        ("peft", {"lora"}),
        ("datasets", {"texts"}),
        ("pyarrow", {"texts"}),
        ("lxml", {"archives", "markup"}),
        ("pypdfium2", {"formats"}),
        ("rapidfuzz", {"quotes"}),
    ],
)
def test_each_library_has_few_doors(library, doors):
    pattern = re.compile(rf"^\s*(from {library}[. ]|import {library}\b)", re.MULTILINE)
    assert {name for name, path in modules().items() if pattern.search(path.read_text())} == doors


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, pi_gguf, pi_gguf.cli\n"
        "try: pi_gguf.cli.main(['--help'], standalone_mode=False)\n"
        "finally: print([m for m in ('torch', 'transformers', 'llama_cpp', 'gguf', 'numpy', 'datasets', 'pyarrow')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_public_names_stay_functions_whatever_was_imported():
    import pi_gguf.conversion
    import pi_gguf.demo

    for name in pi_gguf.__all__:
        assert callable(getattr(pi_gguf, name)), name


def commands(group, prefix=()):
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def test_every_command_explains_every_option_and_shows_an_example():
    names = [" ".join(path) for path, _ in commands(main)]
    assert names == [
        "plan", "extend", "convert", "quantize", "imatrix", "inspect", "repair", "certify", "card", "eval perplexity",
        "eval passkey", "eval needle", "eval ruler", "eval short", "eval summarize", "eval compare", "eval matrix",
        "eval report", "eval bounds", "eval kl", "models", "run", "demo",
    ]  # fmt: skip
    for path, command in commands(main):
        text = command.get_help(click.Context(command))
        assert f"Example:\n    pi-gguf {' '.join(path)} " in text, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)


def test_plan_prints_the_figures_of_a_known_model(cli, tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = cli("plan", tmp_path, "--context", "32768", "--json", "--device", "cpu")
    plan = json.loads(out)
    assert code == 0
    assert plan["parameters"] == 6_738_415_616  # LLaMA 7B
    assert plan["kv_cache_bytes"]["f16"] == 16 * 2**30
    assert plan["factor"] == 16
    assert plan["training"]["learning_rate"] == 2e-5
    assert plan["tokens"] == 1000 * 131072
    assert plan["training"]["sequences"] == "PoSE"
    assert abs(plan["output_bytes"] / 4.08e9 - 1) < 0.02  # llama.cpp's own figure for a 7B at Q4_K_M
    code, out, _ = cli("plan", tmp_path, "--context", "32768", "--device", "cpu")
    assert code == 0 and "16.0 GiB" in out and "PoSE" in out


def test_inspect_shows_what_llama_cpp_reads(cli, llama, tmp_path):
    pi_gguf.convert(str(llama), tmp_path / "m.gguf", quant="F32", check="none", context=256, steps=0)
    code, out, _ = cli("inspect", tmp_path / "m.gguf", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["llama_cpp"] == {"n_ctx_train": 256, "rope_freq_scale_train": 0.25, "n_vocab": 410}
    assert report["rope"]["llama.rope.scaling.factor"] == 4.0
    assert report["warnings"] == report["findings"] == [] and report["repair"] is None
    code, out, _ = cli("inspect", llama, "--json")
    assert code == 0 and json.loads(out)["window"] == 64


def test_the_readme_maps_every_file():
    mapped = set(re.findall(r"^\| `([\w./-]+)` \|", README, re.MULTILINE))
    there = {p.name for p in (ROOT / "pi_gguf").glob("*.py")} | {"bundled/", "families/"}
    there |= {f"tools/{p.name}" for p in (ROOT / "tools").glob("*.py")}
    assert mapped == there


def test_every_package_is_installed():
    import tomllib

    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "pi_gguf").rglob("__init__.py")}
    assert set(named) == there


def test_the_readme_tables_are_the_recorded_ones(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from write_tables import with_tables

    assert README.count("<!-- table ") >= 2
    assert with_tables(README) == README


def test_the_readme_commands_exist():
    used = set(re.findall(r"^pi-gguf ((?:eval )?\w+)", README, re.MULTILINE))
    assert len(used) >= 5
    assert used <= {" ".join(path) for path, _ in commands(main)}
