"""The package as a whole: light imports, layers and help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

import pi_gguf
from pi_gguf.cli.app import main

ROOT = Path(__file__).parent.parent


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, pi_gguf, pi_gguf.cli.app\n"
        "try: pi_gguf.cli.app.main(['--help'], standalone_mode=False)\n"
        "finally: print([m for m in ('torch', 'transformers', 'llama_cpp', 'gguf', 'numpy', 'datasets', 'pyarrow')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_a_file_is_inspected_without_what_trains_and_downloads(f32_gguf):
    code = (
        "import sys, pi_gguf\n"
        "assert pi_gguf.inspect(sys.argv[1]).window == 256\n"
        "print([m for m in sys.modules if m in ('torch', 'transformers', 'huggingface_hub', 'datasets', 'pyarrow')])"
    )
    out = subprocess.run([sys.executable, "-c", code, f32_gguf], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_public_names_stay_functions_whatever_was_imported():
    import pi_gguf.pipeline.convert
    import pi_gguf.pipeline.demo

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
        "plan", "extend", "convert", "quantize", "imatrix", "inspect", "repair", "unpack", "certify", "card",
        "eval perplexity", "eval passkey", "eval needle", "eval ruler", "eval short", "eval summarize",
        "eval compare", "eval matrix", "eval report", "eval bounds", "eval kl", "export ollama", "models", "ask",
        "chat", "documents list", "documents show", "documents remove", "documents prune", "serve", "run", "demo",
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
