"""The options that the suites share."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from pi_gguf.common.options import Options, option
from pi_gguf.models.options import DeviceKeywords, TargetKeywords


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(Options):
    """What a suite measures on, and what it leaves behind; each takes those that it has a use for."""

    title: typing.ClassVar[str] = "Measurement"

    windows: Sequence[int] | None = option(
        "lengths of a text, or of prompt and answer together, in tokens, e.g. 2048,8192; when left out 2048 (ruler: "
        "4096) and its doublings, up to the models' window and 32768.",
        default=None,
        needed=True,
    )
    text: Sequence[str] = option(
        "text file, folder of them, or of the Hub pg19, proof-pile or owner/name:split; the held-out novels of the "
        "bundled sample when left out. Repeatable.",
        default=(),
        needed=True,
        each="PATH",
    )
    keep: str | None = option(
        "file that keeps what is finished, in JSON lines; the same command goes on from it.", default=None
    )
    plot: str | None = option("file to draw the figures to, e.g. plot.png.", default=None)
    overwrite: bool = option("replace the plot that is there.", default=False)
    seed: int = option("of what is drawn: keys, needles, items, pairs.", default=0)


class TextKeywords(TypedDict, total=False):
    text: Sequence[str]


class KeepKeywords(TypedDict, total=False):
    keep: str | None


class PlotKeywords(TypedDict, total=False):
    plot: str | None
    overwrite: bool


class SeedKeywords(TypedDict, total=False):
    seed: int


class PerplexityKeywords(TargetKeywords, TextKeywords, KeepKeywords, PlotKeywords, total=False):
    windows: Sequence[int] | None


class RetrievalKeywords(TargetKeywords, KeepKeywords, PlotKeywords, SeedKeywords, total=False):
    tokenizer: str | None
    windows: Sequence[int] | None


class NeedleKeywords(RetrievalKeywords, TextKeywords, total=False):
    pass


class ShortKeywords(TargetKeywords, KeepKeywords, total=False):
    pass


class SummariesKeywords(ShortKeywords, total=False):
    tokenizer: str | None


class DivergenceKeywords(TargetKeywords, TextKeywords, PlotKeywords, total=False):
    pass


class MatrixKeywords(DeviceKeywords, TextKeywords, KeepKeywords, PlotKeywords, total=False):
    pass


class ComparisonKeywords(MatrixKeywords, SeedKeywords, total=False):
    pass


class BoundsKeywords(PlotKeywords, SeedKeywords, total=False):
    pass


class PageKeywords(DeviceKeywords, SeedKeywords, total=False):
    pass
