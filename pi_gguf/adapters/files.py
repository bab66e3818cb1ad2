"""An adapter of LoRA as peft saves it: its folder, its config and its tensors by the module that each is of.

In: a folder or Hub id with adapter_config.json and adapter_model.safetensors (or .bin). Out: an `AdapterFiles`, whose
fields are checked. The model it is for is not looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pi_gguf.adapters.merging import PickledTensor, load_pickled
from pi_gguf.checkpoint.config import read_json
from pi_gguf.checkpoint.hub import public_source
from pi_gguf.checkpoint.tensors import IGNORED_TENSORS, TensorSource, check_dtypes, read_tensors
from pi_gguf.common.files import is_file
from pi_gguf.common.progress import aside, say
from pi_gguf.errors import CheckpointError, UnsupportedError, one_line

CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", WEIGHTS_FILE]
_MERGE = "merge it with peft (merge_and_unload, then save_pretrained) and convert that folder"

_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    "velora_config",
}  # fmt: skip
"""Fields of adapter_config.json that are followed here, or that say nothing the tensors do not say: `target_modules`
chose the tensors that are there, `fan_in_fan_out` is for layers that no family here has (peft drops it as well), and
others are about the training alone. Any other field must be unset."""

_UNMERGEABLE = {
    "alora_invocation_tokens": "it counts from certain tokens of a text on, and no weights do that",
    "arrow_config": "it chooses among adapters for each token, and no weights do that",
    "layer_replication": "it makes a model of more layers",
}
"""Fields of peft that no merge of MODEL's own tensors can follow, and why."""

_VARIANTS = ("use_dora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config")
"""Fields that choose another product than B A, or another training; peft has no combination of two."""

_PLAIN_STARTS = {"gaussian", "eva", "orthogonal", "mica"}
"""Names for init_lora_weights that leave the base weights alone, as true and false do."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What compiling, sharding and recomputing put around modules; not part of their names."""

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag"
    r"|token_adapter\.trainable_tokens_delta)(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight|\.bias)?"
)
_COPY = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<end>weight|bias)")
_OF_TRAINING = re.compile(r"\.(?:trainable_tokens_original|lora_velora_embed|lora_monteclora_sampler)(?:\.|$)")

_PATTERN = r"(.*\.)?({})$"
"""How a pattern of rank_pattern and alpha_pattern is meant: the module's name, or an end of it."""

_T = TypeVar("_T")


@dataclass
class AdapterFiles:
    """A checked adapter, before the model it is for.

    Args:
        path: its folder.
        config: its fields.
        parts: lora_A and so on, by module (with one `.base_layer` for each adapter that is wrapped around).
        copies: tensors that peft trained as a whole, under their name in the model.
        bases: tensors of the model as they were in training, which peft puts in the place of the model's own.
    """

    path: Path
    weights: Path
    config: AdapterConfig
    parts: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    copies: dict[str, TensorSource] = field(default_factory=dict)
    bases: dict[str, TensorSource] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the adapter is called: its folder, or its id on the Hub."""
        return public_source(str(self.path))

    def sha256(self) -> str:
        """Return a hash of config and weights."""
        digest = hashlib.sha256((self.path / CONFIG_FILE).read_bytes())
        with self.weights.open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
        return digest.hexdigest()


def load_adapter_files(folder: str) -> AdapterFiles:
    """Read an adapter's config and the list of its tensors.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, or the Hub id of one.

    Raises:
        CheckpointError: it is missing, partial or damaged.
        UnsupportedError: something that cannot be merged exactly.
    """
    path = _find_folder(folder)
    weights = path / WEIGHTS_FILE
    if not is_file(weights) and is_file(path / PICKLED_FILE):
        weights = path / PICKLED_FILE
    for wanted in (path / CONFIG_FILE, weights):
        if not is_file(wanted):
            raise CheckpointError(f"{path}: {wanted.name} is missing", _hint_for(path))
    files = AdapterFiles(path, weights, AdapterConfig(read_json(path / CONFIG_FILE), path / CONFIG_FILE))
    found = read_tensors(weights) if weights.name == WEIGHTS_FILE else _read_pickled(weights)
    check_dtypes((source for name, source in found.items() if not IGNORED_TENSORS.search(name)), "F64")
    _sort_tensors(files, found)
    return files


def _find_folder(folder: str) -> Path:
    path = Path(folder)
    try:
        if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder) or path.exists() or path.is_symlink():
            return path
        if path.parent.is_dir() and str(path.parent) != ".":
            return path
    except (OSError, ValueError):
        return path
    from huggingface_hub import snapshot_download

    try:
        with aside():
            found = Path(snapshot_download(folder, allow_patterns=[*_HUB_FILES]))
            if not is_file(found / WEIGHTS_FILE):
                found = Path(snapshot_download(folder, allow_patterns=[*_HUB_FILES, PICKLED_FILE]))
    except Exception as error:  # network, permission and not-found errors of the Hub's client
        raise CheckpointError(
            f"{folder}: not a folder here with {CONFIG_FILE}, and not to be had from the Hub ({one_line(error)})",
            "check the spelling and the connection; for gated models run `hf auth login`",
        ) from error
    return found


def _hint_for(path: Path) -> str:
    """Say where an adapter may lie that is not in a folder, and which other tool's it may be.

    peft saves those with a name in a folder inside.
    """
    if is_file(path / "adapters.safetensors"):
        return "it is an adapter of MLX: merge it with mlx_lm.fuse and convert the folder that this writes"
    if path.suffix == ".gguf":
        return "an adapter in GGUF is for `pi-gguf run --lora`: give the folder that it was made from here"
    places = [path.parent, path.parent.parent] if is_file(path) else []
    with contextlib.suppress(OSError, ValueError):
        places += sorted(found.parent for found in path.glob(f"*/{CONFIG_FILE}"))
    place = next((place for place in places if is_file(place / CONFIG_FILE)), None)
    return f"try --lora {place}" if place else "--lora takes a folder as peft saves it"


def _read_pickled(path: Path) -> dict[str, TensorSource]:
    known = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
    found: dict[str, TensorSource] = {}
    for name, tensor in load_pickled(path).items():
        kind = str(tensor.dtype) if str(tensor.layout) == "torch.strided" else str(tensor.layout)
        found[str(name)] = PickledTensor(path, str(name), tuple(tensor.shape), known.get(kind, kind))
    return found


# The config


class AdapterConfig:
    """The fields of adapter_config.json, each of the kind that peft wants."""

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self.fields, self.path = fields, path
        if fields.get("peft_type") != "LORA":
            raise UnsupportedError(f"{path}: peft_type must be LORA, got {str(fields.get('peft_type'))[:80]!r}", _MERGE)
        self._check_known()
        self.rank, self.alpha = self._rank(fields, "r"), self._number(fields, "lora_alpha")
        ranks, alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        self.ranks = {name: self._rank(ranks, name, "rank_pattern: ") for name in ranks}
        self.alphas = {name: self._number(alphas, name, "alpha_pattern: ") for name in alphas}
        self.root, self.dora = self._flag("use_rslora"), self._flag("use_dora")
        self.modules_to_save = self._names("modules_to_save")
        self.target_parameters = self._names("target_parameters")
        self.ties = self._flag("ensure_weight_tying")
        self.diagonal = bool(fields.get("kasa_config"))
        self.blocks = self._block_diagonal()
        self.tokens = self._tokens()
        start = self._start()
        self.starts = [*([start] if start else []), *(["kasa"] if self.diagonal else [])]

    def scaling(self, module: str) -> tuple[int, float]:
        """Return rank and scaling of a module or parameter, by its name in the model."""
        rank, alpha = _matching(self.ranks, module, self.rank), _matching(self.alphas, module, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.root else alpha / rank

    def saves(self, module: str) -> bool:
        """Tell whether a module is trained as a whole, beside the adapter."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def blocks_of(self, module: str) -> tuple[int, int]:
        """Return how many blocks A and B of a module are made of."""
        of_a, of_b, count = self.blocks
        return (
            count if any(name in module for name in of_a) else 1,
            count if any(name in module for name in of_b) else 1,
        )

    def _check_known(self) -> None:
        for name, reason in _UNMERGEABLE.items():
            if self.fields.get(name):
                raise UnsupportedError(
                    f"{self.path}: {name} cannot be merged: {reason}; it must be unset, got "
                    f"{str(self.fields[name])[:80]}",
                    _MERGE if name == "layer_replication" else "such an adapter works in peft only",
                )
        for name, value in self.fields.items():
            if name not in _FIELDS and value not in (None, False) and value not in ([], {}, ""):
                raise UnsupportedError(
                    f"{self.path}: {name[:80]} must be unset, got {str(value)[:80]}",
                    f"if it says nothing about the weights, remove it there; otherwise {_MERGE}",
                )
        set_variants = [name for name in _VARIANTS if self.fields.get(name)]
        if self.fields.get("init_lora_weights") == "mica":
            set_variants.append("init_lora_weights mica")
        if len(set_variants) > 1:
            raise UnsupportedError(
                f"{self.path}: {' and '.join(set_variants)} exclude each other, in peft as well",
                "unset the one that the adapter was not trained with",
            )

    def _start(self) -> str | None:
        """Return what an initialization took out of the base weights, as peft takes it out when it loads the adapter.

        None where the adapter counts from the base weights themselves.
        """
        value, where = self.fields.get("init_lora_weights"), f"{self.path}: init_lora_weights"
        name = value if isinstance(value, str) else ""
        if value is None or isinstance(value, bool) or name.lower() in _PLAIN_STARTS:
            return None
        if name == "pissa" or name.lower() == "olora":
            return name.lower()
        if re.fullmatch(r"pissa_niter_\d{1,3}", name):
            say(
                f"note: {where}: {name} found the principal components with random numbers, which nobody kept; they "
                "are found anew, as peft does when it loads the adapter"
            )
            return name
        if name == "lora_ga":
            say(
                f"note: {where}: lora_ga moved the base weights before training and the adapter does not say how far; "
                "merged onto MODEL's own, as peft does"
            )
            return None
        kept = {
            "corda": "an average over texts that is not in the adapter",
            "loftq": "weights rounded to 4 bits on a GPU",
        }
        if name in kept:
            raise UnsupportedError(
                f"{where}: {name!r} changes the base weights before training, by {kept[name]}; peft does not load it "
                "either",
                "convert the base that was trained on and set init_lora_weights to true, or save the adapter with "
                "path_initial_model_for_weight_conversion",
            )
        raise UnsupportedError(
            f"{where} must be true, false or a name that peft knows, got {str(value)[:80]!r}",
            "set it to true if the adapter counts from MODEL's own weights",
        )

    def _rank(self, fields: Mapping[str, Any], name: str, where: str = "") -> int:
        value = fields.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            got = "nothing" if value is None else repr(value)[:80]
            raise CheckpointError(
                f"{self.path}: {where}{name[:80]} must be a positive integer, got {got}", "correct the config"
            )
        return value

    def _number(self, fields: Mapping[str, Any], name: str, where: str = "") -> float:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            got = "nothing" if value is None else repr(value)[:80]
            raise CheckpointError(f"{self.path}: {where}{name[:80]} must be a number, got {got}", "correct the config")
        return value

    def _patterns(self, name: str) -> dict[str, Any]:
        patterns = self.fields.get(name) or {}
        if not isinstance(patterns, dict):
            raise self._wrong(name, "map modules to numbers")
        for pattern in patterns:
            try:
                re.compile(_PATTERN.format(pattern))
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(
                    f"{self.path}: {name}: {pattern[:80]!r} is not a regular expression ({error})",
                    "correct the config",
                ) from error
        return patterns

    def _flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if not (value is None or isinstance(value, bool)):
            raise self._wrong(name, "be true or false")
        return bool(value)

    def _names(self, name: str) -> list[str]:
        value = self.fields.get(name)
        if not (value is None or (isinstance(value, list) and all(isinstance(item, str) and item for item in value))):
            raise self._wrong(name, "be a list of names")
        return value or []

    def _block_diagonal(self) -> tuple[list[str], list[str], int]:
        value = self.fields.get("use_bdlora") or {}
        if not isinstance(value, dict):
            raise self._wrong("use_bdlora", "have fields")
        names = [value.get(f"target_modules_bd_{side}") or [] for side in "ab"]
        if not all(isinstance(side, list) and all(isinstance(name, str) for name in side) for side in names):
            raise self._wrong("use_bdlora", "have lists of names")
        return names[0], names[1], self._rank({"nblocks": 1, **value}, "nblocks", "use_bdlora: ")

    def _tokens(self) -> dict[str, tuple[int, ...]]:
        """Return the rows that are trained of each embedding or head, by the end of its name; "" the embedding."""
        value = self.fields.get("trainable_token_indices")
        listed = value if isinstance(value, dict) else {} if value is None else {"": value}
        for rows in listed.values():
            if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < 2**31 for row in rows):
                raise self._wrong("trainable_token_indices", "list token numbers")
        return {name: tuple(rows) for name, rows in listed.items()}

    def _wrong(self, name: str, rule: str) -> CheckpointError:
        got = str(self.fields.get(name))[:80]
        return CheckpointError(f"{self.path}: {name} must {rule}, got {got}", "correct the config")


def _matching(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern that is the module's name or an end of it."""
    return next((v for pattern, v in patterns.items() if re.match(_PATTERN.format(pattern), module)), default)


# The tensors


def _sort_tensors(files: AdapterFiles, found: dict[str, TensorSource]) -> None:
    """Sort tensors by what they are, in all the spellings that releases of peft wrote."""
    if not found:
        raise CheckpointError(f"{files.weights}: holds no tensors", "save the adapter again")
    adapters: set[str] = set()
    saved: dict[str, TensorSource] = {}
    originals: dict[str, TensorSource] = {}
    for stored, source in found.items():
        name = _WRAPPERS.sub("", stored).removeprefix("module.").removeprefix("base_model.model.")
        if _OF_TRAINING.search(name):
            continue
        if match := _PART.fullmatch(name):
            kind = match["part"] + (".bias" if match["end"] == ".bias" else "")
            _put(files.parts.setdefault(match["module"], {}), kind, source, files.weights)
            adapters.add(match["adapter"] or "")
        elif match := _COPY.fullmatch(name):
            _put(saved, f"{match['module']}.{match['end']}", source, files.weights)
            adapters.add(match["adapter"] or "")
        elif ".original_module." in name:
            _put(originals, name.replace(".original_module.", "."), source, files.weights)
        elif files.config.saves(name.rpartition(".")[0]):
            _put(files.copies, name, source, files.weights)
        else:
            plain = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
            _put(files.bases, plain, source, files.weights)
    for name, source in saved.items():  # peft takes the name without modules_to_save where both are there
        files.copies.setdefault(name, files.bases.pop(name, source))
    files.bases = {**originals, **files.bases}
    if len(adapters - {""}) > 1:
        raise CheckpointError(
            f"{files.weights}: holds several adapters: {', '.join(sorted(adapters - {''}))[:200]}",
            "save each with save_pretrained",
        )


def _put(into: dict[str, TensorSource], name: str, source: TensorSource, path: Path) -> None:
    if name in into:
        raise _twice(path, source.name)
    into[name] = source


def _twice(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} is there under two names", "save the adapter again")
