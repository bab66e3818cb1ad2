"""The evaluation commands and what they print for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi_gguf.cli.building import command
from pi_gguf.common.tables import text_table


def _show_perplexity(report: Any) -> str:
    title = f"perplexity, stride {report.stride}"
    if len(report.models) == 1:
        rows = [(str(r.window), f"{r.perplexity:.3f}", f"{r.standard_error:.3f}", str(r.tokens)) for r in report.rows]
        return text_table(f"{report.models[0]}: {title}", ("window", "perplexity", "± s.e.", "tokens"), rows)
    found = {(r.model, r.window): f"{r.perplexity:.3f} ± {r.standard_error:.2g}" for r in report.rows}
    return _by_model(f"{title}, ± standard error", report.models, found)


def _by_model(
    title: str, models: Sequence[str], found: dict[tuple[str, Any], str], more: dict[str, dict[str, int]] | None = None
) -> str:
    """Draw a table of one row a model; `found` by model and column, `more` by column and model."""
    more = more or {}
    columns = list(dict.fromkeys(column for _, column in found))
    rows = [
        (model, *(found.get((model, column), "") for column in columns), *(str(part[model]) for part in more.values()))
        for model in models
    ]
    return text_table(title, ("model", *map(str, columns), *more), rows)


def _shares(cells: Sequence[Any], of: str) -> dict[tuple[str, Any], str]:
    """Return the share found by model and window; `of` names the field with how many there were."""
    found: dict[tuple[str, Any], str] = {}
    for key in dict.fromkeys((cell.model, cell.window) for cell in cells):
        here = [cell for cell in cells if (cell.model, cell.window) == key]
        found[key] = f"{sum(c.found for c in here) / sum(getattr(c, of) for c in here):.0%}"
    return found


def _show_needle(report: Any) -> str:
    if len(report.models) > 1:
        return _by_model("needles found, by window", report.models, _shares(report.cells, "needles"))
    windows, depths = (sorted({getattr(c, key) for c in report.cells}) for key in ("window", "depth"))
    found = {(c.window, c.depth): f"{c.found / c.needles:.0%}" for c in report.cells}
    rows = [(f"{depth:.0%}", *(found[window, depth] for window in windows)) for depth in depths]
    return text_table(f"{report.models[0]}: needles found", ("depth", *map(str, windows)), rows)


def _show_ruler(report: Any) -> str:
    from pi_gguf.evaluate.ruler import mean_scores

    means = {model: mean_scores([row for row in report.rows if row.model == model]) for model in report.models}
    title = f"score in percent; effective length: mean of at least {report.threshold:g}"
    if len(report.models) > 1:
        found = {(m, window): f"{value:.1f}" for m, by_window in means.items() for window, value in by_window.items()}
        return _by_model(f"mean {title}", report.models, found, {"effective length": report.effective_length})
    (model,), windows = report.models, list(means[report.models[0]])
    scores = {(row.task, row.window): f"{row.score:.1f}" for row in report.rows}
    rows = [(task, *(scores[task, w] for w in windows)) for task in dict.fromkeys(row.task for row in report.rows)]
    rows.append(("mean", *(f"{means[model][w]:.1f}" for w in windows)))
    table = text_table(f"{model}: {title}", ("task", *map(str, windows)), rows)
    return f"{table}\neffective length: {report.effective_length[model]}"


def _show_short(report: Any) -> str:
    def cell(row: Any) -> str:
        error = "" if row.standard_error is None else f" ± {row.standard_error:.3f}"
        difference = "" if row.difference is None else f" ({row.difference:+.3f})"
        return f"{row.value:.3f}{error}{difference}"

    found = {(row.model, row.task, row.metric): cell(row) for row in report.rows}
    kinds = list(dict.fromkeys((row.task, row.metric) for row in report.rows))
    rows = [(" ".join(kind), *(found[model, *kind] for model in report.models)) for kind in kinds]
    title = "± standard error" + (", difference from the first" if len(report.models) > 1 else "")
    return text_table(title, ("task", *report.models), rows)


def _show_summaries(report: Any) -> str:
    rows = [
        (r.model, f"{r.rouge1:.1f}", f"{r.rouge2:.1f}", f"{r.rougel:.1f}", str(r.documents), f"{r.tokens:.0f}")
        for r in report.rows
    ]
    header = ("model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "documents", "tokens each")
    return text_table(f"summaries of {report.source}", header, rows)


def _show_report(report: Any) -> str:
    windows = [row.window for row in next(iter(report.perplexity.values()))]
    found = {(label, row.window): f"{row.perplexity:.2f}" for label, rows in report.perplexity.items() for row in rows}
    table = _by_model(f"perplexity by window, to {windows[-1]}", list(report.perplexity), found)
    return f"{table}\nwrote {report.path}"


def _show_kl(report: Any) -> str:
    numbers = ("mean", "median", "p90", "p99", "worst")
    rows = [
        (f"{r.begin}-{r.end - 1}", *(f"{getattr(r, name):.3g}" for name in numbers), f"{r.top1:.2%}", str(r.tokens))
        for r in report.rows
    ]
    title = f"{report.model} from {report.against}: KL divergence, nats (KV cache {report.type_k}, {report.type_v})"
    return text_table(title, ("positions", *numbers, "top-1", "tokens"), rows)


def _show_matrix(report: Any) -> str:
    ranges = [f"{row.begin}-{row.end - 1}" for row in report.cells[0].rows]
    rows = []
    for cell in report.cells:
        means = [f"{row.mean:.3g}" for row in cell.rows]
        rows.append((f"{Path(cell.model).name}, {cell.type_k}", *means, f"{cell.rows[-1].top1:.2%}"))
    title = f"mean KL divergence from {report.against}, nats, by position"
    return text_table(title, ("file, KV cache", *ranges, "top-1"), rows)


def _show_compare(report: Any) -> str:
    windows = [str(row.window) for row in report.rows[0].perplexity]
    rows = [
        (row.name, *(f"{p.perplexity:.4g}" for p in row.perplexity), str(row.k_max), f"{row.found:.0%}")
        for row in report.rows
    ]
    title = f"{report.model} to {report.context}, untrained: perplexity by window, passkeys"
    return text_table(title, ("way", *windows, "k_max", "found"), rows)


def _show_bounds(report: Any) -> str:
    of_pairs = f"{report.extrapolated:.3g} (median of {report.pairs} pairs), {report.extrapolated_worst:.3g} (worst)"
    of_distances = f"{report.bound_ratio:,.0f} (median over distances), {report.bound_ratio_least:,.0f} (least)"
    rows = [
        ("largest score beyond the window, by the largest inside", of_pairs),
        ("the same with interpolated positions", f"{report.interpolated:.3g} (worst)"),
        ("error halfway between two positions, by its bound", f"{report.error_share:.3g} (worst)"),
        ("that bound, by the largest |h|", f"{report.bound_exact:.4g} (as the paper writes it, {report.bound:.4g})"),
        ("bound of extrapolation by that of interpolation", of_distances),
    ]
    shape = f"base {report.rope_theta:g}, {report.rotary_dim} dimensions, window {report.window}"
    return text_table(f"{report.model}: {shape}, followed to {report.context}", (), rows, numbers=False)


def _show_passkey(report: Any) -> str:
    if report.growing:
        shares = {(c.distance, c.model): f"{c.found / c.keys:.0%}" for c in report.cells}
        distances = list(dict.fromkeys(distance for distance, _ in shares))
        rows = [(str(distance), *(shares[distance, name] for name in report.models)) for distance in distances]
        rows.append(("k_max", *(str(report.k_max[name]) for name in report.models)))
        return text_table("passkeys found", ("distance", *(Path(name).name for name in report.models)), rows)
    if len(report.models) > 1:
        title = "passkeys found, by window; k_max (at least 20 % found)"
        return _by_model(title, report.models, _shares(report.cells, "keys"), {"k_max": report.k_max})
    (name,) = report.models
    windows = sorted({c.window for c in report.cells})
    places = sorted({round(c.distance / c.window, 4) for c in report.cells})
    found = {(c.window, round(c.distance / c.window, 4)): f"{c.found / c.keys:.0%}" for c in report.cells}
    rows = [(f"{place:.0%} of the window", *(found.get((w, place), "") for w in windows)) for place in places]
    table = text_table(f"{name}: passkeys found", ("distance", *map(str, windows)), rows)
    return f"{table}\nk_max (at least 20 % found): {report.k_max[name]}"


EVALUATIONS = {
    "perplexity": (
        "Sliding-window perplexity at several windows.",
        lambda: command("evaluate.perplexity:evaluate_perplexity", _show_perplexity, name="perplexity"),
    ),
    "passkey": (
        "Passkey retrieval by distance, and k_max.",
        lambda: command("evaluate.passkey:evaluate_passkey", _show_passkey, name="passkey"),
    ),
    "needle": (
        "A needle in a haystack of prose, by window and depth.",
        lambda: command("evaluate.needle:evaluate_needle", _show_needle, name="needle"),
    ),
    "ruler": (
        "Needles, variables and counts of words; the effective length.",
        lambda: command("evaluate.ruler:evaluate_ruler", _show_ruler, name="ruler"),
    ),
    "short": (
        "Short benchmarks by lm-evaluation-harness, before and after.",
        lambda: command("evaluate.short:evaluate_short", _show_short, name="short"),
    ),
    "summarize": (
        "Summaries of long documents, by ROUGE.",
        lambda: command("evaluate.summarize:evaluate_summaries", _show_summaries, name="summarize"),
    ),
    "compare": (
        "Ways to reach a longer window without training, side by side.",
        lambda: command("evaluate.compare:compare", _show_compare),
    ),
    "matrix": (
        "What quantizations and quantized KV caches cost at depth.",
        lambda: command("evaluate.matrix:evaluate_matrix", _show_matrix, name="matrix"),
    ),
    "report": (
        "The paper's tables and figure 2 on one page, beside your numbers.",
        lambda: command("evaluate.report:evaluate_all", _show_report, name="report"),
    ),
    "bounds": (
        "The paper's bounds and attention curves on a model's own weights.",
        lambda: command("evaluate.bounds:evaluate_bounds", _show_bounds, name="bounds"),
    ),
    "kl": (
        "KL divergence from a reference, by position.",
        lambda: command("evaluate.kl:evaluate_kl", _show_kl, name="kl"),
    ),
}
