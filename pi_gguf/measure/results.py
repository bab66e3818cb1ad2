"""What the evaluations return: one typed report each, all of them here.

A report is a frozen dataclass; what it measured lies in lists of flat rows, each with the model it is of, so that
`pandas.DataFrame(report.rows)` and matplotlib take them as they are. `to_json` gives the same as plain values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from pi_gguf.common.provenance import without_folders


class Report:
    """A dataclass with provenance: versions, commit, seed, device, hashes, time and memory."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, models and files named without folders."""
        found: dict[str, Any] = without_folders(asdict(self))  # type: ignore[call-overload]
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the report that `to_json` gave.

        Raises:
            ValueError: it is of another type.
        """
        try:
            found: Self = _decoded(cls, value)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no {cls.__name__} ({error})") from error
        return found


def _decoded(kind: Any, value: Any) -> Any:
    """Turn plain values into the dataclasses that a type names."""
    inner = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _decoded(kinds[name], part) for name, part in value.items()})
    if get_origin(kind) is list:
        return [_decoded(inner[0], part) for part in value]
    if get_origin(kind) is dict:
        return {key: _decoded(inner[1], part) for key, part in value.items()}
    if get_origin(kind) is UnionType:
        return None if value is None else _decoded(inner[0], value)
    return value


# Perplexity


@dataclass(frozen=True)
class PerplexityRow:
    """Perplexity of a model at one window, in tokens.

    `standard_error` is of the perplexity: over documents where there are several, over tokens in one. `tokens` is how
    many were scored.
    """

    window: int
    perplexity: float
    standard_error: float
    tokens: int
    model: str = ""


@dataclass(frozen=True)
class PositionRow:
    """Perplexity of the tokens at positions from `begin` to below `end`, read in one pass from a document's start."""

    begin: int
    end: int
    perplexity: float
    standard_error: float
    tokens: int
    model: str = ""


@dataclass(frozen=True)
class PerplexityReport(Report):
    """Rows by model and window. `by_position` is of the first pass over each document, to the largest window; empty
    where stretches were sampled."""

    models: list[str]
    texts: list[str]
    stride: int
    samples: int | None
    rows: list[PerplexityRow]
    by_position: list[PositionRow] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


# Retrieval


@dataclass(frozen=True)
class PasskeyCell:
    """How many of `keys` were found in a prompt of `window` tokens, `distance` tokens before its end.

    `exact_distance` is from the key's sentence to the end as built: whole filler lines, and never before the
    introduction, so that a distance of the whole window is some 60 tokens less. Of prompts that grow with the
    distance, `window` is the distance.
    """

    window: int
    distance: int
    exact_distance: int
    found: int
    keys: int
    model: str = ""


@dataclass(frozen=True)
class PasskeyReport(Report):
    """All cells. `k_max` by model is the largest distance up to which at least 20 % were found at each, in prompts of
    one window; 0 if none. `growing`: the key came first and prompts were as long as the distance."""

    models: list[str]
    cells: list[PasskeyCell]
    k_max: dict[str, int]
    growing: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NeedleCell:
    """How many of `needles` were answered with, hidden at `depth` (0 the start, 1 the end) of `window` tokens."""

    window: int
    depth: float
    found: int
    needles: int
    model: str = ""


@dataclass(frozen=True)
class NeedleReport(Report):
    models: list[str]
    texts: list[str]
    cells: list[NeedleCell]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RulerRow:
    """Mean score of one task at one window, in percent: the share of the expected words that the answer has."""

    task: str
    window: int
    score: float
    items: int
    model: str = ""


@dataclass(frozen=True)
class RulerReport(Report):
    """Rows by model, task and window. `effective_length` by model is the longest window whose mean over the tasks is at
    least `threshold`; 0 if none."""

    models: list[str]
    rows: list[RulerRow]
    threshold: float
    effective_length: dict[str, int]
    provenance: dict[str, Any] = field(default_factory=dict)


# Tasks


@dataclass(frozen=True)
class SummaryRow:
    """Mean ROUGE F-measures of a model's summaries, in percent, and their mean length in tokens."""

    rouge1: float
    rouge2: float
    rougel: float
    documents: int
    tokens: float
    model: str = ""


@dataclass(frozen=True)
class SummariesReport(Report):
    """Rows by model; `summaries` has each document's text by model, in the order of the documents."""

    models: list[str]
    source: str
    rows: list[SummaryRow]
    summaries: dict[str, list[str]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task; `difference` is from the first model's, None for itself."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    items: int
    difference: float | None = None
    model: str = ""


@dataclass(frozen=True)
class ShortReport(Report):
    models: list[str]
    rows: list[TaskRow]
    provenance: dict[str, Any] = field(default_factory=dict)


# What a quantization or a cache costs


@dataclass(frozen=True)
class DivergenceRow:
    """Figures of the tokens at positions from `begin` to below `end`, over all texts.

    Args:
        mean: KL divergence in nats; `median`, `p90`, `p99` and `worst` are of single tokens.
        top1: share of tokens whose first choice is the reference's.
        tokens: that were compared.
    """

    begin: int
    end: int
    mean: float
    median: float
    p90: float
    p99: float
    worst: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class DivergenceReport(Report):
    """Rows in order of position, the last one of all positions together."""

    model: str
    against: str
    type_k: str
    type_v: str
    texts: list[str]
    rows: list[DivergenceRow]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixReport(Report):
    """Every file with every type of its cache, against one reference."""

    against: str
    cells: list[DivergenceReport]


# Theory and methods


@dataclass(frozen=True)
class BoundsReport(Report):
    """What the theory says and what the model's own queries and keys do.

    Args:
        model: what was read.
        rope_theta: base c of the angles.
        rotary_dim: D.
        window: trained, in tokens.
        context: how far both ways are followed, in tokens.
        pairs: P.
        extrapolated: largest |a(s)| from `window` to `context` by the largest inside the window; the pairs' median.
        extrapolated_worst: the same, of the worst pair.
        interpolated: largest |a(s)| to `context` with positions divided by the factor, by the same; the worst pair.
        error_share: largest distance of a(s + 1/2) from the straight line between its neighbours, by `bound_exact`.
        bound: Theorem 2.1 halfway between two positions, D max|h| / (32 ln c), by max|h|. It takes D / (4 ln c) for the
            sum of theta_j^2, which is below it: by 13 % at D = 128, by more where D is small.
        bound_exact: the same with that sum itself, by max|h|.
        bound_ratio: the bound of extrapolation, 2 max|h_j - h_j+1| sum_k |A_k+1(s)|, by that one, with differences
            as large as max|h|; the median over s to `context`.
        bound_ratio_least: its least over s.
        figure: one pair's curves: distances and scores inside the window and beyond (`beyond`), and with positions
            divided by the factor between four neighbours (`between`).
    """

    model: str
    rope_theta: float
    rotary_dim: int
    window: int
    context: int
    pairs: int
    extrapolated: float
    extrapolated_worst: float
    interpolated: float
    error_share: float
    bound: float
    bound_exact: float
    bound_ratio: float
    bound_ratio_least: float
    figure: dict[str, list[list[float]]] = field(repr=False, default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonRow:
    """One way, untrained.

    Args:
        name: for people.
        method: as `--method` takes it.
        context: window that it was scaled to, in tokens; longer windows are read all the same.
        perplexity: by window.
        k_max: largest distance, in tokens, up to which at least 20 % of the passkeys are found at each.
        found: share of all passkeys; of `asked`.
    """

    name: str
    method: str
    context: int
    perplexity: list[PerplexityRow]
    k_max: int
    found: float
    asked: int


@dataclass(frozen=True)
class ComparisonReport(Report):
    model: str
    context: int
    rows: list[ComparisonRow]
    provenance: dict[str, Any] = field(default_factory=dict)


# All of them


@dataclass(frozen=True)
class PageReport(Report):
    """Everything that stands on the page.

    Args:
        path: of the page.
        files: SHA-256 of the tensors of each GGUF file, by label.
        perplexity: table 1, by label of the model, and `texts` that were read; `second_perplexity` is table 2.
        steps: tables 3 and 4: what each Hugging Face folder recorded while it was fine-tuned.
        passkeys: cells, by label.
        short: table 5; None where it was not measured, and `missing` says why.
    """

    path: str
    base: str
    context: int
    files: dict[str, str]
    perplexity: dict[str, list[PerplexityRow]]
    texts: list[str]
    second_perplexity: dict[str, list[PerplexityRow]]
    second_texts: list[str]
    passkeys: dict[str, list[PasskeyCell]]
    steps: dict[str, list[dict[str, Any]]]
    short: ShortReport | None
    divergences: list[DivergenceReport]
    bounds: BoundsReport
    missing: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
