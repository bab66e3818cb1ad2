"""The options of what is written."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass

from pi_gguf.common.options import Options, option


@dataclass(frozen=True, kw_only=True)
class WriteOptions(Options):
    """What is written."""

    title: typing.ClassVar[str] = "File"

    quant: str = option(
        "any type llama.cpp has, e.g. F16, Q8_0 or Q4_K_M; quantized in one pass, with no file in between.",
        default="Q4_K_M",
        needed=True,
    )
    tensor_type: Sequence[str] = option(
        "PATTERN=TYPE: another type for the tensors whose GGUF name has the pattern in it, e.g. attn_v=Q8_0. "
        "Repeatable; the first that fits holds.",
        default=(),
        each="PATTERN=TYPE",
    )
    imatrix: str | None = option(
        "importance matrix, a file of pi-gguf imatrix or of llama.cpp; IQ2, IQ3_XXS and the like need one.",
        default=None,
    )
    quantizer: str = option(
        "of K-quants but Q3_K and of IQ4, which make the same bytes: numba (several times as fast, and compiled at its "
        "first use; extra fast), ggml, or auto: numba where it is installed and the model large enough to be worth it.",
        default="auto",
        choices=("auto", "ggml", "numba"),
    )
    split_max_size: str | None = option(
        "of a file, e.g. 4G or 500M (decimal): larger models become OUT-00001-of-00003.gguf and so on; one file when "
        "left out.",
        default=None,
    )
    lora: Sequence[str] = option(
        "LoRA adapter of the model to merge, as peft saves it: a folder with adapter_config.json and "
        "adapter_model.safetensors (or .bin), or the Hub id of one. Repeatable. With --context it needs --steps 0.",
        default=(),
        each="ADAPTER",
    )
    adapter_only: bool = option(
        "write the adapter alone, as a GGUF file for llama.cpp to apply to the base's; F32 or F16.", default=False
    )
