"""The door to GGUF files: write one from a checkpoint, tensor by tensor, and read metadata back.

In: a `Checkpoint`, its tokenizer and a `RopeScaling`. Out: an unquantized GGUF (F32, F16 or BF16). One tensor is in
memory at a time. Quantizing is llama.cpp's work and lives in `runtime`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint import Checkpoint, TensorSource
from pi_gguf.errors import CheckpointError, GgufError, OptionError, UnsupportedError
from pi_gguf.families.family import Config, Transform
from pi_gguf.files import check_free_disk
from pi_gguf.progress import progress_bar
from pi_gguf.rope import RopeScaling

if TYPE_CHECKING:
    import numpy as np
    import torch

UNQUANTIZED = ("F32", "F16", "BF16")
FREQUENCY_FACTORS = "rope_freqs.weight"

_NUMBERED = re.compile(r"(\.experts)\.\d+\.|\.norms\.\d+\.")
"""Parts that a checkpoint stores one by one and GGUF as one tensor: experts, and norms of single heads."""


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file states: its scalar metadata, the length of its arrays, and its tensors."""

    path: Path
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    tensors: list[TensorInfo]

    @property
    def arch(self) -> str:
        return str(self.metadata.get("general.architecture"))

    @property
    def rope(self) -> RopeScaling:
        return RopeScaling.from_gguf(self.metadata, str(self.path))

    @property
    def quantization(self) -> str:
        import gguf

        try:
            return str(gguf.LlamaFileType(self.metadata["general.file_type"]).name.split("_", 1)[1])
        except (KeyError, ValueError, IndexError):
            return "unknown"

    def hyperparameter(self, name: str) -> int:
        """Return a positive integer key of the architecture.

        Raises:
            GgufError: it is missing or below 1.
        """
        value = self.metadata.get(f"{self.arch}.{name}")
        if not isinstance(value, int) or value < 1:
            got = "it is missing" if value is None else f"got {value!r}"
            raise GgufError(
                f"{self.path}: {self.arch}.{name} must be a positive integer, {got}",
                "write the file again from its checkpoint",
            )
        return value


def read_gguf(path: Path) -> GgufInfo:
    """Read a GGUF file's metadata and tensor list; the weights stay on disk.

    Raises:
        GgufError: the file is missing, truncated or no GGUF.
    """
    import gguf

    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_file = False
    if not is_file:
        raise GgufError(f"{path}: no such file", "check the spelling")
    try:
        reader = gguf.GGUFReader(path)
        metadata, lengths = {}, {}
        for name, field in reader.fields.items():
            if field.types[:1] == [gguf.GGUFValueType.ARRAY]:
                lengths[name] = len(field.data)
            else:
                metadata[name] = field.contents()
        tensors = [
            TensorInfo(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, int(t.n_bytes))
            for t in reader.tensors
        ]
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeDecodeError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GgufError(f"{path}: truncated or not a GGUF file ({reason})", "copy or convert the file again") from error
    return GgufInfo(path, metadata, lengths, tensors)


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    *,
    rope: RopeScaling,
    vocabulary: dict[str, Any],
    general: dict[str, Any],
    finetuned: bool,
    quantization: str,
) -> None:
    """Write the checkpoint to `path`; one-dimensional tensors are always F32.

    Args:
        rope: the scaling to state in the file.
        vocabulary: from `gguf_vocabulary`.
        general: `general.*` keys.
        finetuned: whether the weights were trained with `rope`.
        quantization: F32, F16 or BF16.

    Raises:
        CheckpointError: a weight is not a number, or beyond F16.
        OptionError: another quantization.
        ResourceError: not enough disk.
    """
    import gguf
    import torch

    if quantization not in UNQUANTIZED:
        raise OptionError(f"quantization must be one of {', '.join(UNQUANTIZED)} here, got {quantization}")
    arch = checkpoint.family.arch
    writer = gguf.GGUFWriter(path, arch)
    file_type = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
    metadata = {
        **general,
        "general.file_type": int(file_type.get(quantization, gguf.LlamaFileType.MOSTLY_BF16)),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{arch}.{key}": value for key, value in checkpoint.family.keys(checkpoint.hf_config).items()},
        **rope.to_gguf(arch, finetuned=finetuned or checkpoint.family.rope_finetuned),
        **vocabulary,
    }
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)

    outputs = plan_tensors(checkpoint, quantization)
    factors = rope.rope_factors(checkpoint.rotary_dim)
    total = sum(output.nbytes for output in outputs)
    for o in outputs:
        writer.add_tensor_info(o.name, o.shape, _numpy_dtype(o.dtype), o.nbytes, _ggml_type(o.dtype))
    if factors is not None:
        writer.add_tensor_info(FREQUENCY_FACTORS, (len(factors),), _numpy_dtype(torch.float32), 4 * len(factors), None)
    check_free_disk(path.parent, total)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(f"write {quantization}", total, "bytes") as advance:
            for output in outputs:
                made = output.make([_load(checkpoint.tensors[name]) for name in output.sources])
                array = _to_numpy(made, output.dtype, checkpoint.tensors[output.sources[0]])
                writer.write_tensor_data(array)
                advance(array.nbytes)
        if factors is not None:
            writer.write_tensor_data(torch.tensor(factors).numpy())
    finally:
        writer.close()


@dataclass(frozen=True)
class Output:
    """A tensor of the GGUF file: what it is made of, and how.

    Args:
        name: GGUF's name.
        sources: Hugging Face tensors; several are experts, stacked along a new first dimension.
        make: of the sources' values.
        shape: as torch has it.
        dtype: in the file.
    """

    name: str
    sources: tuple[str, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def plan_tensors(checkpoint: Checkpoint, quantization: str) -> list[Output]:
    """Return the tensors of the GGUF file in their order; nothing is read but their shapes.

    Args:
        quantization: F32, F16 or BF16.
    """
    import gguf
    import torch

    family, config = checkpoint.family, checkpoint.hf_config
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[quantization]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
    table = gguf.get_tensor_name_map(arch, checkpoint.n_layers)
    groups: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        groups.setdefault(_NUMBERED.sub(r"\1.", name), []).append(name)
    outputs = []
    for merged, names in groups.items():
        names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
        gguf_name = table.get_name(family.rename(merged), try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UnsupportedError(f"{checkpoint.path}: gguf has no name for {merged} in {family.arch}")
        make = _maker(family.transform(merged), config, stacked=merged != names[0])
        shape = tuple(make([torch.empty(checkpoint.tensors[n].shape, device="meta") for n in names]).shape)
        exact = len(shape) == 1 or gguf_name.endswith("_norm.weight") or "ffn_gate_inp" in gguf_name
        outputs.append(Output(gguf_name, tuple(names), make, shape, torch.float32 if exact else torch_dtype))
    return outputs


def _maker(
    transform: Transform | None, config: Config, *, stacked: bool
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        tensor = torch.stack(list(tensors)) if stacked else tensors[0]
        return transform(tensor, config) if transform else tensor

    return make


def _load(source: TensorSource) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    with safe_open(source.path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(source.name)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{source.path}: {source.name} holds NaN or infinity", "the checkpoint is damaged or diverged"
        )
    return tensor


def _to_numpy(tensor: torch.Tensor, dtype: torch.dtype, source: TensorSource) -> np.ndarray:
    import torch

    converted = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all():
        raise CheckpointError(
            f"{source.path}: {source.name} holds values beyond F16's 65504", "use --quant BF16 or F32"
        )
    if dtype == torch.bfloat16:
        converted = converted.view(torch.uint16)
    array: np.ndarray = converted.contiguous().numpy()
    return array


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    import numpy as np

    return np.dtype({2: "uint16", 4: "float32"}[dtype.itemsize])


def _ggml_type(dtype: torch.dtype) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)[6:]]]
