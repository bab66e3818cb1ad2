"""The door to GGUF files: write one from a checkpoint, tensor by tensor, and read metadata back.

In: a `Checkpoint`, its tokenizer and a `RopeScaling`. Out: an unquantized GGUF (F32, F16 or BF16). One tensor is in
memory at a time. Quantizing is llama.cpp's work and lives in `runtime`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_gguf.checkpoint import Checkpoint
from pi_gguf.errors import CheckpointError, GgufError, OptionError
from pi_gguf.files import check_free_disk
from pi_gguf.llama import ARCH, gguf_hyperparameters, transform
from pi_gguf.progress import progress_bar
from pi_gguf.rope import RopeScaling

if TYPE_CHECKING:
    import numpy as np
    import torch

UNQUANTIZED = ("F32", "F16", "BF16")
FREQUENCY_FACTORS = "rope_freqs.weight"


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
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[quantization]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.n_layers)
    writer = gguf.GGUFWriter(path, ARCH)
    file_type = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
    metadata = {
        **general,
        "general.file_type": int(file_type.get(quantization, gguf.LlamaFileType.MOSTLY_BF16)),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **gguf_hyperparameters(checkpoint),
        **rope.to_gguf(ARCH, finetuned=finetuned),
        **vocabulary,
    }
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)

    plan: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, source in checkpoint.tensors.items():
        plan.append((name, source.shape, torch.float32 if len(source.shape) == 1 else torch_dtype))
    factors = rope.rope_factors(checkpoint.head_dim)
    total = 0
    for name, shape, dtype in plan:
        nbytes = dtype.itemsize * int(torch.Size(shape).numel())
        total += nbytes
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor_info(gguf_name, shape, _numpy_dtype(dtype), nbytes, _ggml_type(dtype))
    if factors is not None:
        writer.add_tensor_info(FREQUENCY_FACTORS, (len(factors),), _numpy_dtype(torch.float32), 4 * len(factors), None)
    check_free_disk(path.parent, total)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(f"write {quantization}", total, "bytes") as advance:
            for name, _, dtype in plan:
                array = _to_numpy(_load(checkpoint, name), dtype, checkpoint.tensors[name].path, name)
                writer.write_tensor_data(array)
                advance(array.nbytes)
        if factors is not None:
            writer.write_tensor_data(_to_numpy(torch.tensor(factors), torch.float32, path, FREQUENCY_FACTORS))
    finally:
        writer.close()


def _load(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(checkpoint.tensors[name].path, framework="pt") as file:
        return transform(checkpoint, name, file.get_tensor(name))


def _to_numpy(tensor: torch.Tensor, dtype: torch.dtype, path: Path, name: str) -> np.ndarray:
    import torch

    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name} holds NaN or infinity", "the checkpoint is damaged or diverged")
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all():
        raise CheckpointError(f"{path}: {name} holds values beyond F16's 65504", "use --quant BF16 or F32")
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
