"""Compare our GGUF files with those of llama.cpp's own converter, byte for byte: small random models of all families.

In: nothing; the models are made as in the tests, and the reference converter is
fetched from llama-cpp-python's source distribution into a cache outside this tree. Out: a line for each model and
type, and every metadata key that differs, with the reason why ours is meant to. The exit code is 1 if anything else
differs.

Example (5 minutes on 2 cores, or a few seconds for one model):
    python tools/compare_with_reference.py --only qwen3 --only "falcon, new decoder"
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import small_llamas  # noqa: E402
from helpers import make_llama, tensors  # noqa: E402
from small_families import VARIANTS, make_model  # noqa: E402

import pi_gguf  # noqa: E402
from pi_gguf.checkpoint.checkpoint import load_checkpoint  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pi-gguf"

# Runs the reference converter on many folders in one process. It recognizes pre-tokenizers by the hash of one sample,
# which no small vocabulary has, so it is told which one ours is, also where it expects a SentencePiece model.
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
    "general.name": "ours is the name of the folder or on the Hub; theirs is taken apart and capitalized",
    "general.source.repository": "ours says where the weights come from",
    "general.pi_gguf.": "our provenance: versions, steps, tokens",
    "general.size_label": "theirs counts parameters into a label",
    "general.quantization_version": "always stated by ours",
    "general.file_type": "ours names the type; theirs is 'guessed' for some",
    "tokenizer.ggml.add_bos_token": "ours is what the tokenizer does; theirs is left out where its settings are silent",
    "tokenizer.ggml.add_eos_token": "as add_bos_token",
    "tokenizer.ggml.unknown_token_id": "ours is tokenizer.json's; theirs that of a class chosen by model_type",
    "tokenizer.ggml.padding_token_id": "as unknown_token_id",
    "tokenizer.ggml.add_space_prefix": "theirs takes every Gemma's tokenizer for SentencePiece; these are not",
    "tokenizer.ggml.eot_token_id": "theirs is a fixed number for Gemma, right for its own tokenizer only",
    "qwen.* tokenizer.ggml.tokens": "theirs has one more, of a class chosen by model_type; ours tokenizer.json's",
    "qwen.* tokenizer.ggml.token_type": "as tokens",
    ".rope.scaling.": "'none' is stated by one and left out by the other; llama.cpp reads both alike",
    ".rope.dimension_count": "stated by ours for every family",
    ".attention.key_length": "stated by ours for every family",
    ".attention.value_length": "as key_length",
    ".vocab_size": "stated by ours for every family",
    ".rope.freq_base": "stated by ours for every family",
    "phi2.attention.head_count_kv": "theirs takes Phi's key-value heads for as many as its heads",
    "phi2.feed_forward_length": "theirs takes it for 4 x hidden, and the file does not open",
    "nemotron.attention.layer_norm_rms_epsilon": "Nemotron has no such norm; llama.cpp does not read it",
    "bloom.context_length": "theirs writes the width of the model",
    "falcon.context_length": "theirs is always 2048",
    "falcon.tensor_data_layout": "llama.cpp does not read it",
    "gemma3 token_embd.weight": "theirs cuts rows beyond the tokenizer's tokens; ours keeps them as unused tokens",
    "gemma3.vocab_size": "as token_embd.weight",
}
"""What may differ, by a pattern found in the architecture, a space and its name, and why."""


def fetch_reference() -> Path:
    """Return the folder with the reference converter of the installed llama-cpp-python."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = CACHE / f"llama-cpp-python-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary", "llama-cpp-python", "--dest", download, f"llama-cpp-python=={version}"]
            subprocess.run(command, check=True)
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                archive.extractall(download, filter="data")
            CACHE.mkdir(parents=True, exist_ok=True)
            next(Path(download).glob("llama_cpp_python-*/vendor/llama.cpp")).rename(folder)
    return folder


def reason(arch: str, name: str) -> str | None:
    """Return the pattern in REASONS that fits a key or tensor, if any."""
    return next((pattern for pattern in REASONS if re.search(pattern, f"{arch} {name}")), None)


def metadata(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name[:5] != "GGUF."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="name of a model, repeatable; all when left out")
    args = parser.parse_args()
    makers: dict[str, Callable[[Path], Path]] = {
        name: partial(make_model, family=family, changes=changes) for name, (family, changes) in VARIANTS.items()
    }
    for name, changes in small_llamas.VARIANTS.items():
        makers[f"llama: {name}"] = partial(make_llama, **changes)
    command = [sys.executable, "-c", REFERENCE, str(fetch_reference())]
    reference = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert reference.stdin and reference.stdout
    differing: dict[str, list[str]] = collections.defaultdict(list)
    bad = equal = refused = 0
    with tempfile.TemporaryDirectory() as scratch:
        for i, variant in enumerate(args.only or makers):
            folder = makers[variant](Path(scratch) / f"model{i}")
            checkpoint = load_checkpoint(str(folder))
            arch, stored = checkpoint.family.arch, next(iter(checkpoint.tensors.values())).dtype
            for kind in ("f32", "auto"):
                ours, theirs = Path(scratch) / f"{i}-{kind}-ours.gguf", Path(scratch) / f"{i}-{kind}-theirs.gguf"
                print(f"{folder}\t{kind}\t{theirs}", file=reference.stdin, flush=True)
                said = reference.stdout.readline().strip()
                # The default of theirs is the type of the checkpoint, F16 where that is F32.
                quant = "F32" if kind == "f32" else {"F32": "F16"}.get(stored, stored)
                pi_gguf.convert(str(folder), ours, quant=quant, check="none")
                if said != "ok":
                    refused += 1
                    print(f"{variant}, {kind}: the reference converter fails: {said}")
                    continue
                a, b = tensors(ours), tensors(theirs)
                wrong = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
                wrong = [name for name in wrong if not reason(arch, name)]
                keys, other = metadata(ours), metadata(theirs)
                unexplained = []
                for key in sorted(keys.keys() | other.keys()):
                    if keys.get(key) != other.get(key):
                        why = reason(arch, key)
                        differing[why or key].append(f"{variant}: {key} {keys.get(key)!r} / {other.get(key)!r}")
                        if why is None:
                            unexplained.append(f"{key}: ours {keys.get(key)!r}, theirs {other.get(key)!r}"[:200])
                verdict = f"{len(a)} tensors equal to the byte" if not wrong else f"DIFFERENT: {wrong[:5]}"
                bad += bool(wrong or unexplained)
                equal += not wrong
                print(
                    f"{variant}, {kind}: {verdict}", *(f"\n    UNEXPLAINED {text}" for text in unexplained), flush=True
                )
    reference.stdin.close()
    reference.wait()
    print(f"\n{equal} files equal in all tensors; the reference converter refused {refused}")
    print("what is meant to differ, and why:")
    for part, cases in differing.items():
        if part in REASONS:
            print(f"  {part} ({len(cases)} files; {cases[0][:110]}): {REASONS[part]}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
