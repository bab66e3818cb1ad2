"""Write files in many ways from small models and print a hash of each: a change of the code that is to change none is
held against the hashes from before it.

In: where the hashes go, and the ones from before. Out: JSON with SHA-256 by file, losses, and what the checks found;
exits 1 with every difference. Two runs on one machine, with the same libraries, agree.

Example:
    python tools/same_bytes.py before.json
    python tools/same_bytes.py after.json --against before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from small_families import VARIANTS, make_model

import pi_gguf
import pi_gguf.checkpoint.checkpoint
import pi_gguf.scaling.methods
from pi_gguf import bundled
from pi_gguf.families import FAMILIES

_MEASURED = ("seconds", "peak_memory_bytes", "predicted_memory_bytes", "reason", "train_reason")
"""What a record has from clocks and from the machine's free memory."""


def main() -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of an earlier run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)  # files name the models as they are given: in the same words in every run
        found: dict[str, Any] = {}
        for part in (_families, _tiny, _methods, _adapters):
            part(found)
            print(f"{part.__name__.removeprefix('_')}: {len(found)} results", file=sys.stderr)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if not options.against:
        return 0
    before = json.loads(options.against.read_text())
    found = json.loads(options.out.read_text())
    differing = sorted(key for key in {*before, *found} if before.get(key) != found.get(key))
    for key in differing:
        print(f"{key}: {before.get(key)} before, {found.get(key)} now")
    print(f"{len(found)} results, {len(differing)} differ")
    return 1 if differing else 0


def _families(found: dict[str, Any]) -> None:
    """Every family: its file, the one with four times the window, and the Hugging Face folder of that."""
    for variant, (family, changes) in VARIANTS.items():
        model = make_model(Path(variant.replace(", ", "-").replace(" ", "-")), family, changes)
        _convert(found, model, f"{model}.gguf", quant="F32", check="none")
        if FAMILIES[family].alibi:
            continue
        window = pi_gguf.checkpoint.checkpoint.load_checkpoint(str(model)).rope.max_position_embeddings
        _convert(found, model, f"{model}-scaled.gguf", context=4 * window, steps=0, quant="Q8_0", certify=False)
        pi_gguf.extend(str(model), f"{model}-scaled-hf", context=4 * window, steps=0)
        _hash(found, Path(f"{model}-scaled-hf"))


def _tiny(found: dict[str, Any]) -> None:
    """The bundled model: types, splits, and a fine-tune of 20 steps with its losses."""
    for quant in ("F16", "Q4_K_M"):
        _convert(found, bundled.TINY, f"tiny-{quant}.gguf", quant=quant, context=32768, steps=0, certify=False)
    _convert(found, bundled.TINY, "tiny-split.gguf", quant="Q8_0", split_max_size="4M", check="none")
    _convert(
        found, bundled.TINY, "tiny-tuned.gguf", context=4096, steps=20, train_window=512, batch_tokens=1024,
        quant="Q4_K_M", certify=False,
    )  # fmt: skip
    _hash(found, Path("tiny-tuned-hf"))


def _methods(found: dict[str, Any]) -> None:
    """Every method after two steps, with what the check compares, and again from the folder that was written."""
    text = Path("text.txt")
    text.write_text(next(iter(bundled.novels("train").values()))[:60_000])
    for method in pi_gguf.scaling.methods.METHODS:
        _convert(
            found, "llama", f"{method}.gguf", context=2560, method=method, steps=2, batch_tokens=1280,
            data=[str(text)], quant="F16", certify=False,
        )  # fmt: skip
        _hash(found, Path(f"{method}-hf"))
        _convert(found, f"{method}-hf", f"{method}-again.gguf", quant="F16", certify=False)
    _convert(
        found, "linear-hf", "twice.gguf", context=5120, steps=2, train_window=640, batch_tokens=1280,
        data=[str(text)], quant="F16", certify=False,
    )  # fmt: skip
    _hash(found, Path("twice-hf"))


def _adapters(found: dict[str, Any]) -> None:
    """An adapter: merged into the folder, written alone, merged from there, and as a file of its own."""
    options: dict[str, Any] = {
        "context": 2560, "steps": 2, "batch_tokens": 1280, "data": ["text.txt"], "train": "lora", "lora_rank": 4
    }  # fmt: skip
    pi_gguf.extend("llama", "lora-hf", **options)
    _hash(found, Path("lora-hf"))
    pi_gguf.extend("llama", "adapter", adapter_only=True, **options)
    _hash(found, Path("adapter"))
    _convert(found, "llama", "merged.gguf", lora=["adapter"], quant="F16", certify=False)
    _convert(found, "llama", "same.gguf", lora=["adapter"], context=2560, steps=0, quant="F16", certify=False)


def _convert(found: dict[str, Any], model: Path | str, out: str, **options: Any) -> None:
    """Convert a model; note the hashes of what was written, and what was checked."""
    made = pi_gguf.convert(str(model), out, **options)
    found[f"{out} checks"] = [[c.prompt_tokens, c.kl_divergence, c.rope_freq_scale] for c in made.checks]
    for path in made.files:
        _hash(found, Path(path))


def _hash(found: dict[str, Any], path: Path) -> None:
    """Note the hash of a file, or of each in a folder; of a record without what the machine has put there."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.name == "pi_gguf.json":
            record = {key: value for key, value in json.loads(file.read_text()).items() if key not in _MEASURED}
            found[str(file)] = record
        elif file.name == "losses.json":
            found[str(file)] = json.loads(file.read_text())
        elif file.name == "adapter_config.json":  # peft lists modules in any order
            record = json.loads(file.read_text())
            found[str(file)] = {key: sorted(v) if isinstance(v, list) else v for key, v in record.items()}
        elif file.is_file():
            found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
