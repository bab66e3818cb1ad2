"""Random configurations of peft's LoRA, saved by peft, and what peft itself merges of them: a property's reference.

Run as a script it tries many: python tests/random_adapters.py 300.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pi_gguf.adapters.adapted import with_adapters
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.checkpoint.tensors import open_files
from pi_gguf.errors import PiGgufError

VOCABULARY = 40
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True,
         "tie_word_embeddings": False},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 3, "tie_word_embeddings": False}),
}  # fmt: skip
_LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_VARIANTS = ["use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "alora_invocation_tokens"]


@dataclass
class Case:
    """A model, the settings of one adapter or two in a row, and how many rows the vocabulary grew by before."""

    model: str
    adapters: list[dict[str, Any]]
    grown: int = 0


def make_models(folder: Path) -> dict[str, Path]:
    """Save the small random models that the cases are of."""
    for name, (family, changes) in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**_COMMON, **changes}))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


def random_case(seed: int) -> Case:
    """Draw a case; the same for the same seed."""
    draw = random.Random(seed)
    model = draw.choice(["llama", "llama", "tied", "tied", "qwen3_moe", "mixtral"])
    grown = draw.choice([0, 0, 0, 0, 3, -2])
    count = 2 if not grown and draw.random() < 0.2 else 1
    return Case(model, [_random_settings(draw, model) for _ in range(count)], grown)


def _random_settings(draw: random.Random, model: str) -> dict[str, Any]:
    moe = model in ("qwen3_moe", "mixtral")
    linear = _LINEAR["moe" if moe else "llama"]
    ends = ["embed_tokens", "lm_head"]
    targets = draw.sample(linear, draw.randint(1, len(linear)))
    settings: dict[str, Any] = {"r": draw.choice([1, 2, 4]), "lora_alpha": draw.choice([1, 3, 8])}
    settings["init_lora_weights"] = draw.choice(
        [False] * 6 + [True, "gaussian", "orthogonal", "pissa", "olora", "eva", "mica", "lora_ga"]
    )
    if settings["init_lora_weights"] == "orthogonal":
        settings["r"] = 2
    roll = draw.random()
    if roll < 0.25:
        targets += draw.sample(ends, draw.randint(1, 2))
    elif roll < 0.5:
        settings["modules_to_save"] = draw.sample([*ends, "norm", "input_layernorm", "mlp"], draw.randint(1, 2))
    if draw.random() < 0.15:
        settings["trainable_token_indices"] = draw.choice(
            [[3, 7], {"embed_tokens": [1, 2, 5]}, {"lm_head": [4]}, {"embed_tokens": [1, 2], "lm_head": [2, 9]}]
        )
    if moe and draw.random() < 0.6:
        settings["target_parameters"] = draw.sample(
            ["mlp.experts.gate_up_proj", "experts.down_proj", "gate.weight"], draw.randint(1, 3)
        )
        if "mlp" in settings.get("modules_to_save", ()):  # peft writes a file that it cannot read
            settings["modules_to_save"].remove("mlp")
    elif draw.random() < 0.1:
        settings["target_parameters"] = ["embed_tokens.weight"]
    settings["target_modules"] = draw.choice([targets] * 8 + ["all-linear", r".*\.(q_proj|up_proj)"])
    for name, chance, values in [
        ("use_rslora", 0.3, [True]), ("use_dora", 0.25, [True]), ("lora_bias", 0.15, [True]),
        ("bias", 0.2, ["all", "lora_only"]), ("fan_in_fan_out", 0.1, [True]), ("ensure_weight_tying", 0.2, [True]),
        ("rank_pattern", 0.3, [{"q_proj": 3}, {"^model.layers.0.self_attn.v_proj": 2}, {r"layers\.1\..*": 1},
                               {".*experts.gate_up_proj": 2, "q_proj": 5}]),
        ("alpha_pattern", 0.3, [{"o_proj": 5}, {r".*\.0\.mlp\..*": 2}, {"^lm_head": 4, "down_proj": 9}]),
        ("exclude_modules", 0.15, [["k_proj"], r".*\.1\.self_attn\..*"]),
        ("layers_to_transform", 0.15, [[1], 0]),
        ("kasa_config", 0.05, [{}]), ("velora_config", 0.03, [{"num_groups": 4}]), ("monteclora_config", 0.03, [{}]),
        ("use_bdlora", 0.05, [{"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj", "o_proj"],
                               "nblocks": 2, "match_strict": False}]),
        ("alora_invocation_tokens", 0.03, [[1, 2]]),
    ]:  # fmt: skip
        if draw.random() < chance:
            settings[name] = draw.choice(values)
    if "layers_to_transform" in settings and draw.random() < 0.5:
        settings["layers_pattern"] = "layers"
    return _that_go_together(settings, draw)


def _that_go_together(settings: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Drop most of what peft refuses to combine; a tenth stays as it is."""
    if draw.random() < 0.1:
        return settings
    variants = [name for name in _VARIANTS if name in settings]
    dropped = set(variants[1:])
    if "target_parameters" in settings:
        dropped |= {*variants, "lora_bias", "fan_in_fan_out"}
        settings["init_lora_weights"] = False
        if settings["target_parameters"] == ["embed_tokens.weight"] and "embed_tokens" in settings["target_modules"]:
            dropped.add("target_parameters")
    elif "lora_bias" in settings:
        dropped |= {"use_dora"}
        settings["init_lora_weights"] = False
    elif variants and settings["init_lora_weights"] == "mica":
        settings["init_lora_weights"] = True
    if settings["init_lora_weights"] == "orthogonal":
        dropped.add("rank_pattern")
    if isinstance(settings["target_modules"], str):
        dropped |= {"layers_to_transform", "layers_pattern"}
    return {name: value for name, value in settings.items() if name not in dropped}


def _open(folder: Path, grown: int) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if grown:
        torch.manual_seed(7)
        model.resize_token_embeddings(VOCABULARY + grown, mean_resizing=False)
    return model


def save_adapter(model: PreTrainedModel, settings: dict[str, Any], folder: Path, seed: int, **save: Any) -> None:
    """Save an adapter of which nothing is zero; peft refuses settings that do not go together."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    kinds = {
        "use_bdlora": BdLoraConfig, "kasa_config": KasaConfig, "monteclora_config": MontecloraConfig,
        "velora_config": VeloraConfig,
    }  # fmt: skip
    built = {name: kinds[name](**value) if name in kinds else value for name, value in settings.items()}
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **built))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, **save)


def merged_by_peft(base: Path, folders: list[Path], grown: int, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights that peft's merge of one adapter after the other leaves on disk."""
    from peft import PeftModel
    from safetensors.torch import load_file

    merged = _open(base, grown)
    for folder in folders:
        merged = PeftModel.from_pretrained(merged, folder).merge_and_unload()
    merged.save_pretrained(path)
    return load_file(path / "model.safetensors")


def merged_here(base: Path, folders: list[Path]) -> dict[str, torch.Tensor]:
    checkpoint = with_adapters(load_checkpoint(str(base)), [str(folder) for folder in folders])
    with open_files() as files:
        return {name: source.read(files) for name, source in checkpoint.tensors.items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Return what differs beyond rounding; nothing where nothing does."""
    if set(ours) != set(theirs):
        return f"other tensors: {set(ours) ^ set(theirs)}"
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            return f"{name}: shape {tuple(tensor.shape)}, {tuple(theirs[name].shape)}"
        far = float((tensor - theirs[name].float()).abs().max() / theirs[name].abs().max())
        if not far < 2e-5:
            return f"{name}: {far:.2g} apart"
    return ""


def try_case(case: Case, models: dict[str, Path], work: Path, seed: int) -> str:
    """Save a case's adapters, merge them with peft and here, and compare.

    Returns:
        `merged` where both gave the same, `refused` where both refused, `not made` where peft does not save it;
        anything else is a difference.
    """
    base, folders, save = models[case.model], [], {"save_embedding_layers": True} if case.grown else {}
    theirs = said = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for i, settings in enumerate(case.adapters):
                folders.append(work / f"{seed}-{i}")
                save_adapter(_open(base, case.grown), settings, folders[-1], seed + i, **save)
        except Exception as error:  # peft raises many kinds
            return f"not made: {type(error).__name__} {error}"
        try:
            theirs = merged_by_peft(base, folders, case.grown, work / f"{seed}-merged")
        except Exception as error:  # as above
            said = f"{type(error).__name__} {error}"
        try:
            ours = merged_here(base, folders)
        except PiGgufError as error:
            if case.grown and theirs:  # whoever has the model only as it was before cannot merge it with peft either
                with contextlib.suppress(Exception):
                    merged_by_peft(base, folders, 0, work / f"{seed}-as-it-was")
                    return f"refused alone: {error}"
                return "refused"
            return f"refused alone: {error}" if theirs else "refused"
        if case.grown and len(ours["model.embed_tokens.weight"]) == VOCABULARY:  # peft saved nothing of the new rows
            theirs = merged_by_peft(base, folders, 0, work / f"{seed}-as-it-was")
    if theirs is None:
        return f"merged alone: {said}"
    return difference(ours, theirs) or "merged"


def main(count: int, first: int = 0) -> None:
    """Try many cases, print those that differ and how many of each outcome there were."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder) / "models")
        for seed in range(first, first + count):
            case = random_case(seed)
            said = try_case(case, models, Path(folder), seed)
            kind = said.partition(":")[0] if said.startswith(("not made", "merged", "refused")) else "different"
            outcomes[kind] = outcomes.get(kind, 0) + 1
            if said not in ("merged", "refused") and not said.startswith("not made"):
                print(seed, said[:400], json.dumps([case.model, case.grown, case.adapters]), flush=True)
    print(outcomes)


if __name__ == "__main__":
    main(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))
