"""Compare our GGUF files with those of llama.cpp's own converter, byte for byte, on a small random model of every family.

In: nothing; the models are made as in `tests/test_families.py`, and the reference converter is fetched from llama-cpp-python's
source distribution into a cache outside this tree. Out: a line for each model and type, and every metadata key that differs, with
the reason why ours is meant to. The exit code is 1 if anything else differs.

Example (8 minutes on 2 cores):
    python tools/compare_with_reference.py --families llama,qwen3
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import tensors
from test_families import VARIANTS, make_model

import pi_gguf

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pi-gguf"

# Runs the reference converter on many folders in one process. It recognizes pre-tokenizers by the hash of one sample, which
# no small vocabulary has, so it is told which one ours is, also where it expects a family's own SentencePiece model.
REFERENCE = """
import sys, traceback
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf as reference
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
base.TextModel._set_vocab_sentencepiece = lambda self, *_, **__: self._set_vocab_gpt2()
for line in sys.stdin:
    folder, kind, out = line.rstrip("\\n").split("\\t")
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", out]
    try:
        reference.main()
        print("ok", flush=True)
    except BaseException as error:
        print(type(error).__name__, " ".join(str(error).split())[:150], flush=True)
"""

REASONS = {
    "general.name": "ours is the folder's or the Hub's name as it is; theirs is taken apart and capitalized",
    "general.type": "",
    "general.file_type": "theirs says 'guessed' for the default type and for F32 with exact vectors; ours names the type",
    "general.source.repository": "ours says where the weights come from",
    "general.pi_gguf.": "our provenance: versions, steps, tokens",
    "general.basename": "theirs guesses it from the folder's name",
    "general.size_label": "theirs counts parameters into a label",
    "general.finetune": "theirs guesses it from the folder's name",
    "general.sampling.": "theirs copies generation defaults; ours leaves sampling to whoever runs the file",
    "general.quantization_version": "always stated by ours",
    "tokenizer.ggml.add_bos_token": "ours is what the tokenizer does; theirs is left out where tokenizer_config.json is silent",
    "tokenizer.ggml.add_eos_token": "as add_bos_token",
    "tokenizer.ggml.unknown_token_id": "ours is what the tokenizer says",
    "tokenizer.ggml.padding_token_id": "ours is what the tokenizer says; theirs takes config.json's too",
    "tokenizer.ggml.token_type": "padding rows are 'unused' in both; theirs marks unknown and byte tokens of other vocabularies",
    ".rope.scaling.": "ours is stated for every file, 'none' too, so that a lost key shows",
    ".rope.dimension_count": "stated by ours for every family",
    ".attention.key_length": "stated by ours for every family; theirs where head_dim is in config.json",
    ".attention.value_length": "as key_length",
    ".vocab_size": "stated by ours for every family",
    ".rope.freq_base": "stated by ours for every family",
    ".attention.head_count_kv": "stated by ours where it equals head_count",
}
"""Why a key may differ, by a part of its name."""


def fetch_reference() -> Path:
    """Return the folder with the reference converter of the installed llama-cpp-python."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = CACHE / f"llama-cpp-python-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            command += ["--no-binary", "llama-cpp-python", "--dest", download, f"llama-cpp-python=={version}"]
            subprocess.run(command, check=True)
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                archive.extractall(download, filter="data")
            CACHE.mkdir(parents=True, exist_ok=True)
            next(Path(download).glob("llama_cpp_python-*/vendor/llama.cpp")).rename(folder)
    return folder


def metadata(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name[:5] != "GGUF."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", help="names as in test_families.VARIANTS, separated by commas; all when left out")
    args = parser.parse_args()
    variants = args.families.split(",") if args.families else list(VARIANTS)
    command = [sys.executable, "-c", REFERENCE, str(fetch_reference())]
    reference = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert reference.stdin and reference.stdout
    differing: dict[str, list[str]] = collections.defaultdict(list)
    bad = equal = refused = 0
    with tempfile.TemporaryDirectory() as scratch:
        for i, variant in enumerate(variants):
            family, changes = VARIANTS[variant]
            folder = make_model(Path(scratch) / f"model{i}", family, changes)
            for kind in ("f32", "auto"):
                ours, theirs = Path(scratch) / f"{i}-{kind}-ours.gguf", Path(scratch) / f"{i}-{kind}-theirs.gguf"
                print(f"{folder}\t{kind}\t{theirs}", file=reference.stdin, flush=True)
                said = reference.stdout.readline().strip()
                quant = "F32" if kind == "f32" else "F16"  # what theirs makes of a checkpoint in 32 bits
                pi_gguf.convert(str(folder), ours, quant=quant, check="none")
                if said != "ok":
                    refused += 1
                    print(f"{variant}, {kind}: the reference converter fails: {said}")
                    continue
                a, b = tensors(ours), tensors(theirs)
                wrong = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
                keys, other = metadata(ours), metadata(theirs)
                unexplained = []
                for key in sorted(keys.keys() | other.keys()):
                    if keys.get(key) != other.get(key):
                        reason = next((part for part in REASONS if part in key), None)
                        differing[reason or key].append(f"{variant}: {key} {keys.get(key)!r} / {other.get(key)!r}")
                        if reason is None:
                            unexplained.append(f"{key}: ours {keys.get(key)!r}, theirs {other.get(key)!r}"[:200])
                verdict = f"{len(a)} tensors equal to the byte" if not wrong else f"DIFFERENT: {wrong[:5]}"
                bad += bool(wrong or unexplained)
                equal += not wrong
                print(f"{variant}, {kind}: {verdict}", *(f"\n    UNEXPLAINED {text}" for text in unexplained), flush=True)
    reference.stdin.close()
    reference.wait()
    print(f"\n{equal} files equal in all tensors; the reference converter refused {refused}")
    print("keys that are meant to differ, and why:")
    for part, cases in differing.items():
        if part in REASONS:
            print(f"  {part} ({len(cases)} files; {cases[0][:110]}): {REASONS[part]}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
