"""A config opened without transformers has what transformers gives it, attributes, angles, tensors; or stays closed.

What is drawn are configs of every family as people have them: both spellings, defaults left out, leftovers, scalings of
all types, odd sizes, and values that nothing takes.
"""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_families import SHAPES, VARIANTS, make_config, odd_shape

from pi_gguf.checkpoint.checkpoint import Checkpoint, in_order, load_checkpoint
from pi_gguf.checkpoint.config import note
from pi_gguf.checkpoint.plain import open_plain
from pi_gguf.errors import PiGgufError
from pi_gguf.families import FAMILIES
from pi_gguf.families.declared import PATH, declared
from pi_gguf.families.shapes import LAYOUTS
from pi_gguf.gguf.places import places
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


def moved(checkpoint: Checkpoint) -> int:
    """Check that no transformation changes a shape; return how many there are."""
    found = 0
    for place in places(checkpoint, checkpoint.tensor_shapes):
        shapes = [checkpoint.tensor_shapes[name] for name in place.names]
        tensor = torch.empty((len(shapes), *shapes[0]) if place.stacked else shapes[0], device="meta")
        if place.transform:
            assert place.transform(tensor, checkpoint.hf_config).shape == tensor.shape
            assert place.transform.undo(tensor, checkpoint.hf_config).shape == tensor.shape
            found += 1
    return found


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
    assert bool(moved(plain)) == bool(full.family.transforms)
    for method in ("linear", "ntk", "yarn", "none", "nope"):
        assert extended(plain, method) == extended(full, method)


LINEAR, YARN = {"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"type": "longrope", "factor": 4.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    *(("llama", changes) for changes in (
        {"partial_rotary_factor": 0.5}, {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"layer_types": ["full_attention"] * 3}, {"num_heads": 4}, {"text_config": {"hidden_size": 64}},
        {"configuration_files": ["config.4.0.0.json"]}, {"is_encoder_decoder": True}, {"save_pretrained": 1},
        {"output_attentions": True}, {"id2label": {"0": "a"}}, {"_rope_type_labels": ["rope_type"]}, {"dtype": "int4"},
        {"torch_dtype": "odd"}, {"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "odd"},
        {"auto_map": ["x"]}, {"auto_map": {"AutoConfig": None}}, {"original_max_position_embeddings": "64"},
        {"pad_token_id": 500}, {"pad_token_id": -1}, {"hidden_size": 66}, {"head_dim": 15}, {"use_cache": 1},
        {"tie_word_embeddings": 1}, {"eos_token_id": [1, "2"]}, {"hidden_act": None}, {"initializer_range": 2.0},
        {"attention_dropout": None}, {"rope_theta": 0.5}, {"rope_theta": "1e4"}, {"use_sliding_window": True},
        {"rope_scaling": {**YARN, "mscale": 1.0}}, {"rope_scaling": {**YARN, "truncate": 0}},
        {"rope_scaling": {**YARN, "beta_slow": 64.0}}, {"rope_scaling": {**YARN, "factor": 0.5}},
        {"rope_scaling": {**YARN, "attention_factor": None}}, {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 64.0}}, {"rope_scaling": {"type": "mrope"}},
        {"rope_scaling": {**LONGROPE, "long_factor": [2.0] * 15}}, {"rope_scaling": {**LONGROPE, "short_factor": 1}},
        {"rope_scaling": {**LONGROPE, "long_factor": ["2"] * 16}}, {"rope_scaling": {"type": ["linear"]}},
        {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
    )),
    ("qwen2", {"head_dim": None}), ("mixtral", {"num_experts": 4}), ("mixtral", {"rope_scaling": YARN}),
    ("mixtral", {"num_local_experts": None, "num_experts": "4"}), ("qwen2_moe", {"num_key_value_heads": None}),
    ("smollm3", {"no_rope_layers": [1]}), ("gemma2", {"layer_types": ["full_attention"]}),
    ("gemma2", {"layer_types": ["odd_attention"] * 3}),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}),
    ("gemma3_text", {"partial_rotary_factor": 0.5}), ("gemma3_text", {"rope_parameters": LINEAR}),
    ("gemma3_text", {"rope_parameters": None, "rope_scaling": {**YARN}}), ("phi3", {"rope_scaling": LINEAR}),
    ("gemma2", {"use_bidirectional_attention": True}), ("bloom", {"rope_theta": 1e4}), ("bloom", {"n_embed": 64}),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}), ("mpt", {"attn_config": {"odd": 1}}),
    ("mpt", {"attn_config": {"clip_qkv": 1}}), ("falcon", {"head_dim": 16}), ("phi", {"partial_rotary_factor": 1.5}),
]  # fmt: skip


@cache
def usual(family: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(make_config(family, {}).to_json_string())
    if family != "gemma3_text":
        fields.pop("rope_parameters", None)
    return fields


def without_layers(family: str) -> dict[str, Any]:
    return {name: value for name, value in usual(family).items() if name != "layer_types"}


@pytest.mark.parametrize(("family", "changes"), UNUSUAL, ids=str)
def test_what_is_unusual_is_not_opened(family, changes):
    assert open_plain(usual(family)) is not None
    assert open_plain({**usual(family), **changes}) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma", {"hidden_act": "gelu"}), ("glm4", {"eos_token_id": None}), ("qwen2", {"sliding_window": 4096}),
        ("falcon", {"num_kv_heads": None, "ffn_hidden_size": None, "new_decoder_architecture": True}),
        (
            "gemma3_text",
            {"rope_parameters": None, "rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": LINEAR},
        ),
        ("gpt_neox", {"rotary_emb_base": 25000, "rotary_pct": 1.0}), ("mpt", {"attn_config": {"clip_qkv": 2.0}}),
        ("phi3", {"partial_rotary_factor": 0.75, "rope_theta": 5e3}), ("mistral", {"num_key_value_heads": 1}),
        ("qwen3_moe", {"mlp_only_layers": None}), ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 9}),
    ],
    ids=str,
)  # fmt: skip
def test_what_follows_from_fields_is_as_transformers_has_it(family, changes, tmp_path):
    plain, full = open_both(tmp_path / "model", {**without_layers(family), **changes})
    assert isinstance(plain, Checkpoint) and isinstance(full, Checkpoint) and plain.configuration.is_plain
    check_same(plain, full)


@pytest.mark.parametrize("value", [1, "1", 1.0])
def test_a_whole_number_where_transformers_asks_for_a_float_is_one(value, tmp_path):
    plain, full = open_both(tmp_path / "model", {**usual("llama"), "rms_norm_eps": value})
    assert isinstance(plain, Checkpoint) and isinstance(full, Checkpoint)
    check_same(plain, full)
    assert type(full.hf_config.rms_norm_eps) is float


@pytest.mark.parametrize("scaling", [LINEAR, YARN, LONGROPE], ids=str)
def test_two_spellings_of_one_scaling_are_one(scaling, tmp_path):
    fields = {**usual("llama"), "rope_scaling": scaling, "rope_theta": 5e5}
    plain, _ = open_both(tmp_path / "model", fields)
    assert isinstance(plain, Checkpoint)
    both = plain.extended(4 * plain.rope.max_position_embeddings).config
    assert both["rope_scaling"] and both["rope_parameters"]
    plain, full = open_both(tmp_path / "model", both)
    assert isinstance(plain, Checkpoint) and isinstance(full, Checkpoint) and plain.configuration.is_plain
    check_same(plain, full)


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


def test_tensors_are_in_order_of_their_layers():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2, 9, 10, 11)]
    assert sorted(["model.norm.weight", *reversed(names), "lm_head.weight"], key=in_order) == [
        "lm_head.weight", *names, "model.norm.weight",
    ]  # fmt: skip
