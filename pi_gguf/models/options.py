"""How a model is opened that is to be measured."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import TypedDict

from pi_gguf.common.options import Options, option

CACHES = ("f32", "f16", "q8_0", "q4_0")
"""Types of a KV cache."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Options):
    """How a model is opened that is to be measured."""

    title: typing.ClassVar[str] = "Model"

    context: int | None = option(
        "extend Hugging Face models to this window, in tokens, without training.", default=None
    )
    method: str = option("of --context: linear (Position Interpolation), ntk, yarn, none or nope.", default="linear")
    type_k: str = option("K cache of GGUF files: f32, f16, q8_0 or q4_0.", default="f16", choices=CACHES)
    type_v: str = option("V cache of GGUF files.", default="f16", choices=CACHES)
    device: str = option("auto, cpu or cuda.", default="auto")


@dataclass(frozen=True, kw_only=True)
class ServerOptions(TargetOptions):
    """The same where a server may be asked, too."""

    tokenizer: str | None = option("MODEL whose tokenizer a server's model has; of URLs only.", default=None)


class DeviceKeywords(TypedDict, total=False):
    device: str


class TargetKeywords(DeviceKeywords, total=False):
    context: int | None
    method: str
    type_k: str
    type_v: str
