"""The options of all concerns together, and the keywords of `convert`."""

from __future__ import annotations

from collections.abc import Sequence

from pi_gguf.common.options import Options
from pi_gguf.evaluate.options import SuiteOptions
from pi_gguf.models.options import ServerOptions
from pi_gguf.prove.options import ProofOptions
from pi_gguf.tune.options import SpreadOptions, TuneKeywords, TuneOptions
from pi_gguf.write.options import WriteOptions

GROUPS: tuple[type[Options], ...] = (
    TuneOptions, SpreadOptions, WriteOptions, ProofOptions, ServerOptions, SuiteOptions,
)  # fmt: skip


class ConvertKeywords(TuneKeywords, total=False):
    quant: str
    tensor_type: Sequence[str]
    imatrix: str | None
    quantizer: str
    split_max_size: str | None
    lora: Sequence[str]
    adapter_only: bool
    check: str
    strict_tokenizer: bool
    certify: bool | None
    require: str | None
