"""Inputs damaged at random, by a seed each, and commands run on them: whatever a file states, a command ends well.

In: small sound files of each kind. Out: for each mutant how its command ended. Workers are forked from a process that
has everything imported; one that dies or hangs is replaced, and the others go on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS, MORE_MEMORY = 20, 2 * 2**30
"""What a command may take: time, and memory beyond that of the process that it starts in."""

INTEGERS = (
    0, 1, 2, 3, 5, 7, 8, 31, 64, 100, 255, 256, 511, 512, 513, 1024, 1025, 4096, 65535, 65536, 2**20, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-30,
    1e-3,
    3.4e38,
    -3.4e38,
    1e6,
    float("nan"),
    float("inf"),
    -float("inf"),
)
TEXTS = (
    "", " ", "a", "none", "no_vocab", "llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "test", "default",
    "qwen2", "llama-bpe", "glm4", "tekken", "linear", "yarn", "longrope", "dynamic", "gemma2", "phi3", "phi-3", "mamba",
    "clip", "adapter", "imatrix", "lora", "x" * 100_000, "a\0b", "../../etc", "ü\n\t", "{{ 1/0 }}", "{% for %}",
)  # fmt: skip


# The bytes of a GGUF file, apart and together again

_FORMATS = "BbHhIif?__Qqd"
_STRING, _ARRAY = 8, 9


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    """Encode a value as a type, cut to its size where it does not fit."""
    if kind == _STRING:
        return _text(str(value).encode(errors="replace") if not isinstance(value, bytes) else value)
    code = _FORMATS[kind]
    try:
        if code in "fd":
            return struct.pack(f"<{code}", float(value))
        if code == "?":
            return bytes([bool(value)])
        size = struct.calcsize(code)
        return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
    except (ValueError, OverflowError):
        return bytes(struct.calcsize(code))


@dataclass
class Parts:
    """A GGUF file in parts: keys with type and value, tensors as name, sides, type and offset, and the data."""

    version: int
    keys: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes
    counts: list[int | None] = field(default_factory=lambda: [None, None])
    magic: bytes = b"GGUF"

    @classmethod
    def read(cls, path: Path) -> Parts:
        from pi_gguf.gguf.header import TYPES, read_header

        header = read_header(path)
        keys = []
        for key, entry in header.entries.items():
            if entry.type[0] == "[":
                item = TYPES.index(entry.type.strip("[]"))
                values = entry.texts if entry.type == "[STRING]" else entry.value
                keys.append([key.encode(), _ARRAY, [item, list(values), None]])
            else:
                value = entry.data[8:] if entry.type == "STRING" else entry.value
                keys.append([key.encode(), TYPES.index(entry.type), value])
        tensors = [[t.name.encode(), list(t.sides), t.type, t.offset, None] for t in header.tensors]
        return cls(header.version, keys, tensors, path.read_bytes()[header.data_offset :])

    def to_bytes(self) -> bytes:
        n_tensors, n_keys = (
            given if given is not None else len(there)
            for given, there in zip(self.counts, (self.tensors, self.keys), strict=True)
        )
        parts = [self.magic, struct.pack("<IQQ", self.version, n_tensors % 2**64, n_keys % 2**64)]
        for key, kind, value in self.keys:
            parts += [_text(key), struct.pack("<I", kind % 2**32)]
            if kind == _ARRAY:
                item, values, count = value
                coded = item if item < len(_FORMATS) and item != _ARRAY else 0
                parts.append(struct.pack("<IQ", item % 2**32, (len(values) if count is None else count) % 2**64))
                parts += [_value(coded, v) for v in values]
            else:
                parts.append(_value(kind if kind < len(_FORMATS) else 0, value))
        for name, sides, kind, offset, n_sides in self.tensors:
            parts += [_text(name), struct.pack("<I", (len(sides) if n_sides is None else n_sides) % 2**32)]
            parts.append(struct.pack(f"<{len(sides)}Q", *[side % 2**64 for side in sides]))
            parts.append(struct.pack("<IQ", kind % 2**32, offset % 2**64))
        header = b"".join(parts)
        return header + bytes(-len(header) % 32) + self.data


OPTIONAL = (
    ("expert_count", 4), ("expert_used_count", 4), ("expert_group_count", 4), ("expert_group_used_count", 4),
    ("nextn_predict_layers", 4), ("attention.sliding_window", 4), ("attention.sliding_window_pattern", 4),
    ("attention.key_length", 4), ("attention.value_length", 4), ("attention.key_length_swa", 4),
    ("attention.value_length_swa", 4), ("attention.causal", 7), ("attention.scale", 6), ("attention.clamp_kqv", 6),
    ("attention.max_alibi_bias", 6), ("attention.layer_norm_epsilon", 6), ("attention.head_count_kv", 4),
    ("attention.temperature_scale", 6), ("attn_logit_softcapping", 6), ("final_logit_softcapping", 6),
    ("logit_scale", 6), ("residual_scale", 6), ("embedding_scale", 6), ("pooling_type", 4), ("vocab_size", 4),
    ("rope.dimension_count", 4), ("rope.dimension_count_swa", 4), ("rope.freq_base", 6), ("rope.freq_base_swa", 6),
    ("rope.scale_linear", 6), ("rope.scaling.factor", 6), ("rope.scaling.type", 8), ("rope.scaling.finetuned", 7),
    ("rope.scaling.original_context_length", 4), ("rope.scaling.attn_factor", 6), ("rope.scaling.yarn_beta_fast", 6),
    ("use_parallel_residual", 7), ("tensor_data_layout", 8), ("embedding_length_out", 4), ("context_length", 4),
    ("general.alignment", 4), ("general.file_type", 4), ("general.quantization_version", 4), ("general.type", 8),
    ("general.name", 8), ("split.count", 2), ("split.no", 2), ("split.tensors.count", 5),
    ("tokenizer.ggml.add_bos_token", 7), ("tokenizer.ggml.add_eos_token", 7), ("tokenizer.ggml.add_space_prefix", 7),
    ("tokenizer.ggml.bos_token_id", 4), ("tokenizer.ggml.eos_token_id", 4), ("tokenizer.ggml.eot_token_id", 4),
    ("tokenizer.ggml.unknown_token_id", 4), ("tokenizer.ggml.padding_token_id", 4), ("tokenizer.ggml.pre", 8),
    ("tokenizer.ggml.remove_extra_whitespaces", 7), ("tokenizer.ggml.token_type_count", 4),
    ("tokenizer.chat_template", 8),
)  # fmt: skip
"""Keys that a file may have, with the number of their type; those without a wing are the architecture's."""


def _boundary(rng: random.Random, kind: int) -> Any:
    if kind == _STRING:
        return rng.choice((*TEXTS, b"\xff\xfe", b"\xed\xa0\x80"))
    return rng.choice(FLOATS if _FORMATS[kind] in "fd" else INTEGERS)


def _change_value(rng: random.Random, parts: Parts) -> None:
    entry = rng.choice([e for e in parts.keys if e[1] != _ARRAY])
    if _FORMATS[entry[1]] in "BbHhIiQq" and rng.random() < 0.3:
        entry[2] = max(0, entry[2] + rng.choice((-2, -1, 1, 2, entry[2])))
    else:
        entry[2] = _boundary(rng, entry[1])


def _change_type(rng: random.Random, parts: Parts) -> None:
    entry = rng.choice(parts.keys)
    if entry[1] == _ARRAY:
        entry[1:] = (
            [entry[1], [rng.choice(range(15)), *entry[2][1:]]]
            if rng.random() < 0.5
            else [4, len(entry[2][1])]
        )  # fmt: skip
    elif rng.random() < 0.2:
        entry[1:] = [_ARRAY, [entry[1], [entry[2]] * rng.choice((0, 1, 2, 5)), None]]
    else:
        entry[1] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 99])


def _change_keys(rng: random.Random, parts: Parts) -> None:
    at = rng.randrange(len(parts.keys))
    how = rng.choice(["remove", "remove", "double", "rename", "swap"])
    if how == "remove":
        del parts.keys[at]
    elif how == "double":
        parts.keys.insert(rng.randrange(len(parts.keys)), list(parts.keys[at]))
    elif how == "rename":
        name = parts.keys[at][0]
        parts.keys[at][0] = rng.choice((name + b"x", name[:-1], b"", name.upper(), b"\xff", rng.choice(parts.keys)[0]))
    else:
        other = rng.choice(parts.keys)
        parts.keys[at][1:], other[1:] = other[1:], parts.keys[at][1:]


def _add_key(rng: random.Random, parts: Parts) -> None:
    name, kind = rng.choice(OPTIONAL)
    stated = next((e[2] for e in parts.keys if e[0] == b"general.architecture"), b"llama")
    arch = stated.decode(errors="replace") if isinstance(stated, bytes) else str(stated)
    full = name if name.startswith(("general.", "tokenizer.", "split.")) else f"{arch}.{name}"
    parts.keys = [e for e in parts.keys if e[0] != full.encode()]
    value = _boundary(rng, kind) if rng.random() < 0.5 or kind == _STRING else rng.choice((0, 1, 2, 3, 4, 8, 1000))
    parts.keys.append([full.encode(), kind, value])


def _change_array(rng: random.Random, parts: Parts) -> None:
    array = rng.choice([e for e in parts.keys if e[1] == _ARRAY] or [[b"", _ARRAY, [4, [1], None]]])[2]
    item, values = array[0], array[1]
    how = rng.choice(["cut", "grow", "count", "item", "items", "same", "shuffle"])
    if how == "cut":
        array[1] = values[: rng.choice((0, 1, len(values) // 2, max(0, len(values) - 1)))]
    elif how == "grow":
        array[1] = values + values[: rng.choice((1, 7, len(values)))]
    elif how == "count":
        array[2] = rng.choice((0, len(values) - 1, len(values) + 1, *INTEGERS))
    elif how == "same":
        array[1] = [rng.choice([*values[:50], _boundary(rng, item)])] * len(values)
    elif how == "shuffle":
        rng.shuffle(values)
    elif values:
        for _ in range(1 if how == "item" else rng.choice((5, 50))):
            other = rng.choice(values)
            values[rng.randrange(len(values))] = rng.choice((_boundary(rng, item), other))


def _change_tensor(rng: random.Random, parts: Parts) -> None:
    if not parts.tensors:
        return
    tensor = rng.choice(parts.tensors)
    how = rng.choice(["name", "swap", "remove", "double", "side", "side", "sides", "type", "type", "offset", "count"])
    if how == "name":
        tensor[0] = rng.choice(
            (tensor[0][:-1], tensor[0] + b"x", b"", b"n" * 70, tensor[0].replace(b"blk.0", b"blk.9"))
        )
    elif how == "swap":
        other = rng.choice(parts.tensors)
        part = rng.choice((0, 1, 2, 3))
        tensor[part], other[part] = other[part], tensor[part]
    elif how == "remove":
        parts.tensors.remove(tensor)
    elif how == "double":
        parts.tensors.append(list(tensor))
    elif how == "side" and tensor[1]:
        i = rng.randrange(len(tensor[1]))
        tensor[1][i] = rng.choice((tensor[1][i] - 1, tensor[1][i] + 1, 2 * tensor[1][i], *INTEGERS))
    elif how == "sides":
        tensor[1] = rng.choice((tensor[1][::-1], tensor[1][:1], [*tensor[1], 1], [*tensor[1], 2], [], [1] * 5))
    elif how == "type":
        tensor[2] = rng.choice((*range(43), 99, 2**31, 2**32 - 1))
    elif how == "offset":
        tensor[3] = rng.choice((0, tensor[3] + 32, tensor[3] + 1, tensor[3] - 32, *INTEGERS))
    else:
        tensor[4] = rng.choice((0, 1, 3, 4, 5, 2**16, 2**31, 2**32 - 1))


def _change_frame(rng: random.Random, parts: Parts) -> None:
    how = rng.choice(["version", "magic", "keys", "tensors"])
    if how == "version":
        parts.version = rng.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))
    elif how == "magic":
        parts.magic = rng.choice((b"GGUf", b"\0\0\0\0", b"ggml", b"PK\3\4"))
    else:
        which = how == "keys"
        there = len((parts.tensors, parts.keys)[which])
        parts.counts[which] = rng.choice((0, there - 1, there + 1, *INTEGERS))


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return bytes cut off, with others in their place, or with more behind them."""
    data = bytearray(data)
    how = rng.choice(["cut", "flip", "flips", "zero", "more", "insert"])
    at = rng.randrange(max(1, len(data))) if rng.random() < 0.3 else rng.randrange(max(1, min(4096, len(data))))
    if how == "cut":
        return bytes(data[:at])
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else 20):
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            at = rng.randrange(len(data))
    elif how == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif how == "more":
        data += rng.randbytes(rng.choice((1, 100)))
    else:
        data[at:at] = rng.randbytes(rng.choice((1, 8)))
    return bytes(data)


_CHANGES: tuple[tuple[int, Callable[[random.Random, Parts], None]], ...] = (
    (6, _change_value), (2, _change_type), (2, _change_keys), (5, _add_key), (3, _change_array), (4, _change_tensor),
    (1, _change_frame),
)  # fmt: skip


def mutate_gguf(rng: random.Random, path: Path) -> None:
    """Change one thing of a GGUF file, now and then two, or its bytes."""
    if rng.random() < 0.12:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
        return
    parts = Parts.read(path)
    for _ in range(rng.choice((1, 1, 1, 2))):
        with contextlib.suppress(IndexError, TypeError, struct.error):  # the first change left nothing for the second
            rng.choices([change for _, change in _CHANGES], [weight for weight, _ in _CHANGES])[0](rng, parts)
    path.write_bytes(parts.to_bytes())


# JSON and safetensors


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*path, key))


def _chosen_place(rng: random.Random, value: Any) -> tuple[Any, ...]:
    """Choose a level by level, so that long lists do not hide the fields beside them."""
    path: tuple[Any, ...] = ()
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.7):
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        path, value = (*path, key), value[key]
    return path


def mutate_json(rng: random.Random, path: Path) -> None:
    """Change one value of a JSON file, now and then two, or its bytes."""
    if rng.random() < 0.12:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
        return
    value = json.loads(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2))):
        place = _chosen_place(rng, value)
        if not place:
            continue
        inside = value
        for key in place[:-1]:
            inside = inside[key]
        _change_json(rng, inside, place[-1])
    if rng.random() < 0.03:
        value = rng.choice(([], {}, None, 3, "x", [value]))
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = rng.choice(
            ("\ufeff" + text, text[:-1] + ',"model_type":"llama"}', "[" * 5000, text + text, f"//x\n{text}")
        )
    path.write_text(text)


def _change_json(rng: random.Random, inside: Any, key: Any) -> None:
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    others = (
        None, True, False, *rng.sample(INTEGERS, 4), *rng.sample(FLOATS, 4), 2**70, -(2**70), 0.1, "", "x", "3", "1e3",
        "\ud800", "a\0b", "é" * 5000, [], {}, [1], [None], {"a": 1}, {"rope_type": "yarn"}, deep, *rng.sample(TEXTS, 3),
    )  # fmt: skip
    how = rng.choice(["other", "other", "other", "remove", "rename", "add", "near"])
    if how == "other":
        inside[key] = rng.choice(others)
    elif how == "near" and isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
        inside[key] = rng.choice((-inside[key], inside[key] + 1, inside[key] - 1, 2 * inside[key], str(inside[key])))
    elif how == "remove" or isinstance(inside, list):
        del inside[key]
    elif how == "rename":
        inside[rng.choice((f"{key}x", key[:-1], key.upper(), ""))] = inside.pop(key)
    else:
        inside[rng.choice(_FIELDS)] = rng.choice(others)


_FIELDS = (
    "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window", "layer_types", "quantization_config",
    "tie_word_embeddings", "num_local_experts", "attention_bias", "partial_rotary_factor", "hidden_act", "dtype",
    "modules_to_save", "rank_pattern", "use_dora", "bias", "layers_to_transform", "target_parameters", "fan_in_fan_out",
    "model_type", "architectures", "auto_map", "text_config",
)  # fmt: skip


def mutate_safetensors(rng: random.Random, path: Path) -> None:
    """Change the header of a safetensors file, its length, or its bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.2:
        path.write_bytes(damaged_bytes(rng, data))
        return
    if rng.random() < 0.15:
        path.write_bytes(struct.pack("<Q", rng.choice(INTEGERS) % 2**64) + data[8:])
        return
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(header))
        entry = header[name]
        how = rng.choice(["dtype", "shape", "offsets", "remove", "rename", "double", "other"])
        if how == "dtype" and isinstance(entry, dict):
            entry["dtype"] = rng.choice(
                ("F64", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None)
            )
        elif how == "shape" and isinstance(entry, dict):
            shape = [n for n in entry.get("shape", [1]) if isinstance(n, int)]
            entry["shape"] = rng.choice(
                (shape[::-1], [*shape, 1], shape[:-1], [rng.choice(INTEGERS), *shape[1:]], "x", None)
            )
        elif how == "offsets" and isinstance(entry, dict):
            begin, end = entry.get("data_offsets", [0, 0])
            entry["data_offsets"] = rng.choice(
                ([end, begin], [begin, end - 1], [begin + 1, end], [rng.choice(INTEGERS), end], [0], None)
            )
        elif how == "remove":
            del header[name]
        elif how == "rename":
            header[rng.choice((name + "x", name.replace("0", "7"), "", "lm_head.weight", f"model.{name}"))] = (
                header.pop(name)
            )
        elif how == "double":
            header[rng.choice((f"{name}.copy", name.replace("0", "1")))] = entry
        else:
            header[name] = rng.choice((None, 3, [], {}, "x"))
        if not header:
            break
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def mutate_older_imatrix(rng: random.Random, path: Path) -> None:
    """Change one number or byte of an importance matrix in llama.cpp's older form."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(damaged_bytes(rng, bytes(data)))
        return
    at = rng.randrange(0, min(len(data) - 4, 4096), 1)
    data[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) % 2**32)
    path.write_bytes(bytes(data))


# Sound files, and what is done with the mutants of each


@dataclass(frozen=True)
class Kind:
    """A kind of input: the file that is damaged, and the commands of which one is run on it.

    `{}` in a command stands for the damaged file or folder, `{out}` for a file to write, `{other}` for a sound one.
    """

    source: Path
    mutate: Callable[[random.Random, Path], None]
    commands: Sequence[Sequence[str]]
    member: str | None = None
    other: Path | None = None


_RUN = ("run", "{}", "--prompt", "Once upon a time, 12 cats", "--max-tokens", "2", "--n-ctx", "64")
_FILE_COMMANDS = (
    _RUN, _RUN, ("inspect", "{}"), ("quantize", "{}", "{out}", "--quant", "Q8_0"),
    ("repair", "{}", "{out}", "--check", "none"), ("repair", "{}", "{out}"),
    ("eval", "perplexity", "{}", "--text", "{other}", "--windows", "64", "--stride", "32", "--samples", "1"),
)  # fmt: skip
_CONVERT = ("convert", "{}", "{out}", "--quant", "F32", "--check", "none", "--no-certify")
_FOLDER_COMMANDS = (
    (*_CONVERT, "--dry-run"),
    _CONVERT,
    (*_CONVERT[:-1], "--context", "256", "--steps", "0"),
    ("inspect", "{}"),
)


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Make a small sound input of each kind, and say what is done with its mutants."""
    from helpers import make_llama
    from small_adapters import make_adapter
    from small_families import make_model

    import pi_gguf

    text = folder / "text.txt"
    text.write_text("Once upon a time there was a cat. She sat on the wall and watched 12 boats.\n" * 20)
    models = {"llama": make_llama(folder / "llama", max_shard_size="100KB")}
    models |= {name: make_model(folder / name, name, {}) for name in ("gemma2", "qwen2_moe")}
    files = {}
    for name, model in models.items():
        files[name] = folder / f"{name}.gguf"
        pi_gguf.convert(str(model), files[name], quant="F32", check="none", certify=False)
    files["pieces"] = _with_pieces(files["llama"], folder / "pieces.gguf")
    files["quantized"] = folder / "quantized.gguf"
    pi_gguf.quantize(files["llama"], files["quantized"], quant="Q8_0")
    kinds = {f"gguf {name}": Kind(path, mutate_gguf, _FILE_COMMANDS, other=text) for name, path in files.items()}
    adapter = make_adapter(models["llama"], folder / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    adapter_file = folder / "adapter.gguf"
    pi_gguf.convert(str(models["llama"]), adapter_file, lora=[str(adapter)], adapter_only=True, quant="F32")
    applied = ((*_RUN[:1], "{other}", *_RUN[2:], "--lora", "{}"),)
    kinds["gguf adapter"] = Kind(adapter_file, mutate_gguf, applied, other=files["llama"])
    matrix = folder / "matrix.gguf"
    pi_gguf.compute_imatrix(str(files["llama"]), matrix, text=[str(text)], context=32, tokens=64)
    used = (("quantize", "{other}", "{out}", "--quant", "Q4_0", "--imatrix", "{}"),)
    kinds["imatrix"] = Kind(matrix, mutate_gguf, used, other=files["llama"])
    kinds["imatrix dat"] = Kind(
        _older_form(matrix, folder / "matrix.dat"), mutate_older_imatrix, used, other=files["llama"]
    )
    single = make_llama(folder / "single")
    settings = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    kinds |= {name: Kind(single, mutate_json, _FOLDER_COMMANDS, name) for name in settings}
    index = "model.safetensors.index.json"
    kinds[index] = Kind(models["llama"], mutate_json, _FOLDER_COMMANDS, index)
    kinds["model.safetensors"] = Kind(single, mutate_safetensors, _FOLDER_COMMANDS, "model.safetensors")
    merged = tuple((c[0], "{other}", *c[2:], "--lora", "{}") for c in _FOLDER_COMMANDS[:2])
    kinds["adapter_config.json"] = Kind(adapter, mutate_json, merged, "adapter_config.json", single)
    kinds["adapter_model.safetensors"] = Kind(adapter, mutate_safetensors, merged, "adapter_model.safetensors", single)
    return kinds


def _with_pieces(source: Path, target: Path) -> Path:
    """Write the same file with a SentencePiece vocabulary of bytes, letters and a few words."""
    from pi_gguf.gguf.header import Entry, read_header

    header = read_header(source)
    rows = header.entries["tokenizer.ggml.tokens"].length
    words = [
        f"▁{word}" for word in ["once", "upon", "a", "time", "there", "was", "cat", "the", "and", "of", "to", "in"]
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127)), *words]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), rows)]
    types = [2, 3, 3, *[6] * 256, *[1] * (rows - 259)]
    new = {
        "model": Entry.of("llama"), "pre": Entry.of("default"), "tokens": Entry.of(tokens), "merges": None,
        "scores": Entry.of([-float(i) for i in range(rows)]), "token_type": Entry.of(types),
        "bos_token_id": Entry.of(1), "eos_token_id": Entry.of(2), "add_space_prefix": Entry.of(True),
    }  # fmt: skip
    changed = header.changed({f"tokenizer.ggml.{key}": entry for key, entry in new.items()})
    target.write_bytes(changed.to_bytes() + source.read_bytes()[header.data_offset :])
    return target


def _older_form(source: Path, target: Path) -> Path:
    from pi_gguf.write.imatrix import read_imatrix

    matrix = read_imatrix(source)
    parts = [struct.pack("<i", len(matrix.importance))]
    for name, values in matrix.importance.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 3, values.size)]
        parts.append((values.reshape(-1) * 3).astype("<f4").tobytes())
    target.write_bytes(b"".join([*parts, struct.pack("<ii", 3, 8), b"text.txt"]))
    return target


# Running


@dataclass(frozen=True)
class Outcome:
    """How a command on a mutant ended.

    Args:
        kind: of the input.
        seed: of the mutant.
        command: that was run.
        ended: `done`, `refused`, or what is wrong: `died`, `hangs`, `traceback`, `no hint`, `code`.
        code: exit code; the negative signal where the process died.
        said: the last lines on standard error.
    """

    kind: str
    seed: int
    command: list[str]
    ended: str
    code: int
    said: str

    @property
    def well(self) -> bool:
        return self.ended in ("done", "refused")


def make_mutant(kind: Kind, name: str, seed: int, folder: Path) -> list[str]:
    """Write a mutant into a folder, and return the command to run on it; the same for the same seed."""
    rng = random.Random(f"{name} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = folder / kind.source.name
    if kind.member is None:
        shutil.copyfile(kind.source, target)
        damaged = target
    else:
        shutil.copytree(kind.source, target)
        damaged = target / kind.member
    kind.mutate(rng, damaged)
    places = {"{}": target, "{out}": folder / "out.gguf", "{other}": kind.other}
    return [str(places.get(part, part)) for part in rng.choice(kind.commands)]


def run_here(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Run a command line in this process; return its exit code and what it wrote to standard error."""
    from pi_gguf.cli.app import entry_point

    sys.argv = ["pi-gguf", *command]
    with log.open("w", buffering=1, errors="replace") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        code = 0
        try:
            entry_point()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # a bug, as the interpreter would show it
            traceback.print_exc()
            code = 1
    return code, log.read_text(errors="replace")


def judge(code: int, said: str) -> str:
    """Tell how a command ended by its exit code and standard error."""
    if "Traceback (most recent" in said:
        return "traceback"
    if code == 0:
        return "done"
    if not 2 <= code <= 9:
        return "code"
    lines = said.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    hinted = len(errors) == 1 and errors[0] + 1 < len(lines) and re.match(r"hint: \S", lines[errors[0] + 1])
    return "refused" if hinted else "no hint"


def _work(kinds: dict[str, Kind], folder: Path, jobs: Any, results: Any) -> None:
    """Run one mutant after the other; in a process of its own."""
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # pytest's: a death here is told by its outcome
    _without_trials()
    while (job := jobs.recv()) is not None:
        name, seed = job
        command = make_mutant(kinds[name], name, seed, folder)
        results.send((command, *run_here(command, folder / "log.txt")))


def _without_trials() -> None:
    """Leave out the child that tries a stranger's file first: what the checks of headers let through then shows here.

    `run_mutants` runs the commands that die so once more in a process of their own, children and all.
    """
    import pi_gguf.runtime.model
    import pi_gguf.write.quantize

    pi_gguf.runtime.model.check_opens = lambda *_: None
    pi_gguf.write.quantize.check_quantizes = lambda *_: None


class Worker:
    """A forked process that runs mutants; started again after one that it does not survive."""

    def __init__(self, kinds: dict[str, Kind], folder: Path) -> None:
        self._kinds, self._folder = kinds, folder
        self._start()

    def _start(self) -> None:
        fork = multiprocessing.get_context("fork")
        (jobs, self._jobs), (self._results, results) = fork.Pipe(False), fork.Pipe(False)
        self._process = fork.Process(target=_work, args=(self._kinds, self._folder, jobs, results), daemon=True)
        self._process.start()
        jobs.close()
        results.close()

    def run(self, name: str, seed: int) -> Outcome:
        self._jobs.send((name, seed))
        ended, code = "hangs", -int(signal.SIGKILL)
        with contextlib.suppress(EOFError, ConnectionError):
            if self._results.poll(SECONDS):
                command, code, said = self._results.recv()
                return Outcome(name, seed, command, judge(code, said), code, said[-600:])
            self._process.kill()
        self._process.join()
        if ended != "hangs" or self._process.exitcode != -signal.SIGKILL:
            ended, code = "died", self._process.exitcode or 0
        log = self._folder / "log.txt"
        said = log.read_text(errors="replace")[-600:] if log.exists() else ""
        self._start()
        command = make_mutant(self._kinds[name], name, seed, self._folder)
        return Outcome(name, seed, command, ended, code, said)

    def close(self) -> None:
        self._jobs.send(None)
        self._process.join(5)
        self._process.kill()


def run_whole(outcome: Outcome) -> Outcome:
    """Run the command of a mutant that a worker died of as users do, with all that comes before llama.cpp."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    start = [sys.executable, "-m", "pi_gguf", *outcome.command]
    try:
        done = subprocess.run(
            start, capture_output=True, stdin=subprocess.DEVNULL, timeout=3 * SECONDS, preexec_fn=limit
        )
    except subprocess.TimeoutExpired:
        return Outcome(outcome.kind, outcome.seed, outcome.command, "hangs", -9, "")
    said = done.stderr.decode(errors="replace")
    return Outcome(
        outcome.kind, outcome.seed, outcome.command, judge(done.returncode, said), done.returncode, said[-600:]
    )


def run_mutants(
    kinds: dict[str, Kind], folder: Path, seeds: Sequence[tuple[str, int]], *, seconds: float = float("inf")
) -> Iterator[tuple[Outcome, bool]]:
    """Yield how the command on each mutant ended, and whether only the child before it kept it from dying.

    Args:
        seeds: pairs of a kind and a seed.
        seconds: no further mutants are begun after so many.
    """
    worker, started = Worker(kinds, folder), time.monotonic()
    try:
        for name, seed in seeds:
            if time.monotonic() - started > seconds:
                return
            outcome = worker.run(name, seed)
            if outcome.ended in ("died", "hangs") and "gguf" in name:
                whole = run_whole(outcome)
                yield (whole if whole.well else outcome), whole.well
            else:
                yield outcome, False
    finally:
        worker.close()


def to_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)
