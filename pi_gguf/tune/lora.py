"""LoRA for long context: which parts of a model are adapted, which are trained whole, and how many that makes.

In: a model of transformers. Out: the same model with peft's adapters in it. Every linear layer but the head gets a
product of low rank; embeddings and norms are trained as a whole, as the window does not grow without them.
Source: LongLoRA, arXiv 2309.12307, section 3.3 and table 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.checkpoint.tensors import open_files
from pi_gguf.common.machine import Machine
from pi_gguf.errors import OptionError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

WAYS = ("full", "lora", "qlora")
"""What `--train` takes beside auto, from the most memory to the least: every weight; adapters on weights in 16 bits; on
weights in 4."""


@dataclass(frozen=True)
class Parts:
    """The parts of a model, by their names in it.

    Args:
        linear: layers that get an adapter.
        whole: embeddings and norms.
    """

    linear: dict[str, torch.nn.Linear]
    whole: dict[str, torch.nn.Module]

    def trained(self, rank: int) -> int:
        """Return how many parameters are trained with adapters of a rank."""
        low_rank = sum(rank * (module.in_features + module.out_features) for module in self.linear.values())
        return low_rank + sum(p.numel() for module in self.whole.values() for p in module.parameters())

    @property
    def linear_parameters(self) -> int:
        """How many parameters the adapted layers have themselves."""
        return sum(module.weight.numel() for module in self.linear.values())


def parts(model: PreTrainedModel) -> Parts:
    """Find the parts of a model of any family; experts and routers of a mixture are in neither and stay as they are."""
    import torch

    linear: dict[str, torch.nn.Linear] = {}
    whole: dict[str, torch.nn.Module] = {}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if module is ends[0] or (own and all(parameter.ndim == 1 for parameter in own)):
            whole[name] = module
        elif isinstance(module, torch.nn.Linear) and module is not ends[1]:
            linear[name] = module
    return Parts(linear, whole)


def check_way(way: str, machine: Machine, rank: int, alpha: int) -> None:
    """Check that a way of training can run on a machine.

    Raises:
        OptionError: otherwise.
    """
    if way not in (*WAYS, "auto"):
        raise OptionError(f"train must be auto or one of {', '.join(WAYS)}, got {way}")
    if rank < 1:
        raise OptionError(f"lora-rank must be at least 1, got {rank}")
    if alpha < 1:
        raise OptionError(f"lora-alpha must be at least 1, got {alpha}")
    if way == "qlora" and (reason := no_4_bits(machine)):
        raise OptionError(f"train qlora {reason[0]}", reason[1])


def no_4_bits(machine: Machine) -> tuple[str, str] | None:
    """Return why weights cannot be held in 4 bits on a machine, and a hint; None where they can."""
    if machine.device != "cuda":
        return f"needs a CUDA GPU, got device {machine.device}", "--train lora holds the weights in 16 bits"
    if machine.card is None and find_spec("bitsandbytes") is None:
        return "needs bitsandbytes, which is not installed", "pip install bitsandbytes, or --train lora"
    return None


def add_adapters(checkpoint: Checkpoint, model: PreTrainedModel, rank: int, alpha: int) -> PeftModel:
    """Return the model with adapters, all that is trained in 32 bits and all else frozen.

    What embeddings and norms return is in the base's bits: what goes from layer to layer would be in 32 otherwise.

    Args:
        checkpoint: the model's.
        rank: of each adapter.
        alpha: each product counts alpha / rank times.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    found = parts(model)
    dtype = model.get_input_embeddings().weight.dtype
    whole = _last_names([*found.whole, *(name.removesuffix(".weight") for name in checkpoint.tied_tensors)])
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_last_names(found.linear),
        modules_to_save=whole,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, see below, and a name that transformers gave up
        adapted: PeftModel = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = checkpoint.source
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    with open_files() as files:
        for name in found.whole:  # as they are on disk: the base may be in fewer bits
            trained = model.get_submodule(name).modules_to_save["default"]
            if dtype != torch.float32:
                trained.register_forward_hook(lambda _, __, output: output.to(dtype))
            for own, parameter in trained.named_parameters():
                if source := checkpoint.tensors.get(f"{name}.{own}"):
                    parameter.data.copy_(source.read(files))
    if checkpoint.tied:  # peft ties the copies itself only where they are called embed_tokens and lm_head
        embedding, head = (
            module.modules_to_save["default"]
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        head.weight = embedding.weight
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter as peft does, without its draft of a model card."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def _last_names(modules: Iterable[str]) -> list[str]:
    """Return the last part of each name, once: peft takes a module whose name ends so."""
    return sorted({name.rpartition(".")[2] for name in modules})
