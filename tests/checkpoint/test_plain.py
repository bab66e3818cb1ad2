"""A config opened without transformers has what transformers gives it, attributes, angles, tensors; or stays closed.

What is drawn are configs of every family as people have them: both spellings, defaults left out, leftovers, scalings of
all types, odd sizes, and values that nothing takes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from small_families import SHAPES, VARIANTS, make_config, odd_shape

from pi_gguf.checkpoint.checkpoint import Checkpoint, load_checkpoint
from pi_gguf.checkpoint.config import note
from pi_gguf.errors import PiGgufError
from pi_gguf.families import FAMILIES
from pi_gguf.families.declared import PATH, declared
from pi_gguf.families.shapes import LAYOUTS
from pi_gguf.tune.lora import parts

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))
import write_declared

OLDER = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
LEFTOVERS: dict[str, Any] = {
    "torch_dtype": "bfloat16", "_name_or_path": "someone/model", "auto_map": {"AutoConfig": "configuration_x.XConfig"},
    "pretraining_tp": 1, "use_cache": False, "temperature": 0.7, "quantization_config": {"quant_method": "none"},
    "transformers_version": "4.31.0", "model_max_length": 4096, "num_experts": 3, "num_local_experts": 3,
    "original_max_position_embeddings": 128, "rope_theta": 5e5, "partial_rotary_factor": 0.5, "rotary_pct": 0.5,
    "head_dim": 24, "num_key_value_heads": 1, "sliding_window_pattern": 3, "layer_types": ["full_attention"],
    "attn_implementation": "eager", "unknown_field": [1, {"a": None}], "sliding_window": 4096, "is_decoder": True,
}  # fmt: skip
OBJECTS = ("rope_parameters", "attn_config")
ODD_VALUES = (None, 0, 1, -1, 3, "3", "x", 2.0, 2.5, 1e40, True, False, [], [1], {}, {"a": 1}, 2**33, "gelu")


def draw_scaling(draw: random.Random, pairs: int) -> dict[str, Any]:
    kind = draw.choice(["default", "linear", "linear", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "odd"])
    rope: dict[str, Any] = {draw.choice(["type", "rope_type"]): kind, "factor": draw.choice([2.0, 4, 16.0, 1.0])}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 160}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = draw.choice([160, 320])
        more = {"beta_fast": 16, "beta_slow": 2.0, "attention_factor": 1.25, "truncate": False, "mscale": 1.0}
        rope |= dict(draw.sample(list(more.items()), draw.randint(0, 3)))
    if kind in ("longrope", "su"):
        rope |= {"short_factor": [1.0 + i / 8 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
        rope["original_max_position_embeddings"] = 160
        if draw.random() < 0.5:
            del rope["factor"]
    if draw.random() < 0.1:
        rope[draw.choice([*rope, "beta_fast", "rope_theta"])] = draw.choice(ODD_VALUES)
    return rope


def draw_config(family: str, draw: random.Random) -> dict[str, Any]:
    """Return a config.json of a family, at random."""
    changes = odd_shape(family, draw.randint(0, 10**6)) if draw.random() < 0.7 else {}
    fields = json.loads(make_config(family, changes).to_json_string(use_diff=draw.random() < 0.5))
    fields = {name: value for name, value in fields.items() if not isinstance(value, dict) or name in OBJECTS}
    rope = fields.get("rope_parameters")
    if rope and draw.random() < 0.6:  # as transformers 4 spells it
        del fields["rope_parameters"]
        full = rope.get("full_attention", rope)
        theta, share = OLDER.get(family, ("rope_theta", "partial_rotary_factor"))
        older = {theta: full["rope_theta"], share: full.get("partial_rotary_factor")}
        if family == "gemma3_text":
            older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        fields |= {name: value for name, value in older.items() if value is not None and draw.random() < 0.8}
    if draw.random() < 0.5 and "max_position_embeddings" in fields:
        size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        share = (rope or {}).get("partial_rotary_factor", 1.0)
        scaling = draw_scaling(draw, int(size * share) // 2 + (draw.random() < 0.05))
        name = "rope_parameters" if "rope_parameters" in fields and draw.random() < 0.8 else "rope_scaling"
        fields[name] = {**fields[name], **scaling} if isinstance(fields.get(name), dict) else scaling
    for name in draw.sample(list(declared(family).fields), 3):
        if draw.random() < 0.5 and name not in ("vocab_size", "hidden_size"):
            fields.pop(name, None)
    if draw.random() < 0.4:
        name = draw.choice(list(LEFTOVERS))
        fields.setdefault(name, LEFTOVERS[name])
    if draw.random() < 0.15:
        fields[draw.choice(list(declared(family).fields))] = draw.choice(ODD_VALUES)
    return fields


def open_both(folder: Path, fields: dict[str, Any]) -> tuple[Checkpoint | str, Checkpoint | str]:
    """Return the checkpoint opened without and with transformers; the error in place of one that does not open."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    found: list[Checkpoint | str] = []
    for config_only in (True, False):
        try:
            found.append(load_checkpoint(str(folder), config_only=config_only))
        except PiGgufError as error:
            found.append(f"{type(error).__name__}: {error} {error.hint}")
    return found[0], found[1]


def check_same(plain: Checkpoint, full: Checkpoint) -> None:
    """Hold everything that is read of a plain config against what transformers makes of it."""
    family, ours, theirs = full.family, plain.hf_config, full.hf_config
    for name in {*declared(family.model_type).fields, *declared(family.model_type).aliases} - {"dtype", "attn_config"}:
        if declared(family.model_type).fields.get(name, declared("llama").fields["vocab_size"]).kinds != {"other"}:
            assert (name, getattr(ours, name)) == (name, getattr(theirs, name))
    for name in ("head_dim", "num_local_experts", "num_experts", "final_logit_softcapping", "num_key_value_heads"):
        assert (name, getattr(ours, name, None)) == (name, getattr(theirs, name, None))
    assert getattr(ours, "rope_parameters", None) == getattr(theirs, "rope_parameters", None)
    assert plain.rope == full.rope and plain.config == full.config
    assert family.keys(ours) == family.keys(theirs)
    assert family.complaint(ours) is None and family.unstated(ours) == family.unstated(theirs)
    assert plain.rotary_dim == full.rotary_dim if not family.alibi else True
    skeleton = full.skeleton
    assert plain._saved_shapes == full._saved_shapes
    assert (plain.tied, plain.tied_tensors, plain._tied_keys) == (full.tied, full.tied_tensors, full._tied_keys)
    assert plain.n_parameters() == full.n_parameters()
    theirs_adapted = parts(skeleton)
    assert plain.adapted.trained(7) == full.adapted.trained(7) == theirs_adapted.trained(7)
    assert plain.adapted.linear_parameters == theirs_adapted.linear_parameters
    assert "skeleton" not in vars(plain)  # what is compared was not asked of transformers


def extended(checkpoint: Checkpoint, method: str) -> Any:
    window = checkpoint.rope.max_position_embeddings
    try:
        longer = checkpoint.extended(4 * window, method)
    except PiGgufError as error:
        return str(error)
    return longer.rope, longer.config, getattr(longer.hf_config, "rope_parameters", None), longer.tensor_shapes


def test_what_is_declared_is_that_of_the_installed_transformers():
    assert PATH.read_text() == write_declared.text()


def test_every_family_has_a_layout():
    assert list(LAYOUTS) == list(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_usual_config_is_opened_without_transformers_as_with_it(variant, tmp_path):
    family, changes = VARIANTS[variant]
    fields = json.loads(make_config(family, changes).to_json_string())
    plain, full = open_both(tmp_path / "model", fields)
    assert isinstance(plain, Checkpoint) and isinstance(full, Checkpoint)
    assert plain.configuration.is_plain and not full.configuration.is_plain
    check_same(plain, full)
    for method in ("linear", "ntk", "yarn", "none", "nope"):
        assert extended(plain, method) == extended(full, method)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_config_at_random_is_opened_as_with_transformers_or_not_at_all(family, rounds, tmp_path):
    draw, opened, scaled = random.Random(f"{family} {rounds}"), 0, 0
    for _ in range(rounds):
        fields = draw_config(family, draw)
        plain, full = open_both(tmp_path / "model", fields)
        note.cache_clear()
        if isinstance(plain, str) or isinstance(full, str):
            assert plain == full, fields
        elif plain.configuration.is_plain:
            check_same(plain, full)
            assert all(extended(plain, method) == extended(full, method) for method in ("linear", "yarn")), fields
            opened += 1
            scaled += full.rope.rope_type not in ("default", "alibi") or full.rope.own is not None
    assert rounds < 60 or (opened > 15 and (scaled or FAMILIES[family].alibi))
