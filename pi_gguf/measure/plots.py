"""Reports as pictures, where one would rather look than read. Of matplotlib only what needs no display.

In: a report, and a path whose ending is the format. Out: a file, there only when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pi_gguf.common.files import check_writable, replace_when_complete
from pi_gguf.common.progress import say
from pi_gguf.errors import OptionError

_LEAST = 1e-12
"""Nats; what is below is rounding, and zero has no place on a logarithmic axis."""


def check_plot(path: str | None, overwrite: bool, *, of_one: Sequence[Any] = ()) -> None:
    """Check before long work that a plot can be written.

    Args:
        overwrite: whether a file that is there may be replaced.
        of_one: models, of which the plot can show one only.

    Raises:
        OptionError: no format that matplotlib writes, no such folder, something is there, or several models.
    """
    if path is None:
        return
    if len(of_one) > 1:
        raise OptionError(f"plot is for one model, got {len(of_one)}", "eval report draws several")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in kinds:
        raise OptionError(f"plot must end in one of {', '.join(sorted(kinds))}, got {path}", f"try {path}.png")
    check_writable(Path(path), overwrite)


def plot_perplexity(curves: Mapping[str, Sequence[Any]], path: str | Path, *, original: int | None = None) -> None:
    """Draw perplexity by window.

    Args:
        curves: rows with `window`, `perplexity` and `standard_error` by the name of a model.
        original: window that was trained, in tokens, for a line there.
    """
    from matplotlib.ticker import LogLocator

    with _figure(path) as figure:
        axes = figure.add_subplot()
        for i, (name, rows) in enumerate(curves.items()):
            style = {"marker": "o^s+x1"[i % 6], "linestyle": "-" if i < 3 else ":"}
            values, errors = [row.perplexity for row in rows], [row.standard_error for row in rows]
            axes.errorbar([row.window for row in rows], values, errors, label=name, **style)
        if original:
            axes.axvline(original, color="grey", linewidth=0.8)
        windows = sorted({row.window for rows in curves.values() for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="window, tokens", ylabel="perplexity")
        axes.set_xticks(windows, [str(window) for window in windows])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8)


def plot_passkeys(report: Any, path: str | Path) -> None:
    """Draw the share of passkeys found, window across and distance up, from red to green; where prompts grew, a line a
    model by distance."""
    if report.growing:
        with _figure(path) as figure:
            axes = figure.add_subplot()
            for i, name in enumerate(report.models):
                cells = [cell for cell in report.cells if cell.model == name]
                percent = [100 * cell.found / cell.keys for cell in cells]
                axes.plot([cell.distance for cell in cells], percent, label=Path(name).name, marker="o^s+x1"[i % 6])
            axes.axhline(20, color="grey", linewidth=0.8)
            axes.set(
                ylim=(-2, 102), xlabel="distance of the key from the end, tokens", ylabel="passkeys found, percent"
            )
            axes.legend(fontsize=8)
        return
    title = f"passkeys found: {Path(report.models[0]).name}"
    shares = {(c.window, c.distance * 1000 // c.window / 10): c.found / c.keys for c in report.cells}
    axis = "distance of the key from the end, share of the window"
    _heatmap(shares, path, title, axis, "lower")


def plot_needle(report: Any, path: str | Path) -> None:
    """Draw the share of needles found, window across and depth down, from red to green."""
    shares = {(c.window, 100 * c.depth): c.found / c.needles for c in report.cells}
    _heatmap(shares, path, f"needles found: {Path(report.models[0]).name}", "depth, share of the window", "upper")


def _heatmap(shares: Mapping[tuple[int, float], float], path: str | Path, title: str, axis: str, origin: str) -> None:
    """Draw shares by window and place, in percent; the first place lies at `origin`, lower or upper."""
    windows, places = (sorted({key[i] for key in shares}) for i in (0, 1))
    grid = np.full((len(places), len(windows)), np.nan)
    for (window, place), share in shares.items():
        grid[places.index(place), windows.index(window)] = share
    with _figure(path) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin=origin)
        for (y, x), share in np.ndenumerate(grid):
            if len(places) <= 16 and not np.isnan(share):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center")
        axes.set_xticks(range(len(windows)), [str(w) for w in windows])
        shown = range(0, len(places), -(-len(places) // 16))
        axes.set_yticks(shown, [f"{places[i]:.0f} %" for i in shown])
        axes.set(xlabel="window, tokens", ylabel=axis)
        axes.set_title(title)
        figure.colorbar(image)


def plot_ruler(means: Mapping[str, Mapping[int, float]], threshold: float, path: str | Path) -> None:
    """Draw the mean score by window, a line a model, and the score that counts as effective."""
    with _figure(path) as figure:
        axes = figure.add_subplot()
        for name, by_window in means.items():
            axes.plot(list(by_window), list(by_window.values()), marker="o", label=name)
        axes.axhline(threshold, color="grey", linewidth=0.8)
        windows = sorted({window for by_window in means.values() for window in by_window})
        axes.set(xscale="log", ylim=(0, 102), xlabel="window, tokens", ylabel="mean score, percent")
        axes.set_xticks(windows, [str(window) for window in windows])
        axes.minorticks_off()
        axes.legend(fontsize=8)


def plot_losses(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path) -> None:
    """Draw losses by the tokens trained on.

    Args:
        curves: tokens before and in each step, and losses in nats, by the name of a run.
    """
    with _figure(path) as figure:
        axes = figure.add_subplot()
        for name, (tokens, losses) in curves.items():
            axes.plot([n / 1e6 for n in tokens], losses, label=name)
        axes.set(xlabel="millions of tokens", ylabel="loss, nats a token")
        axes.legend(fontsize=8)


def plot_divergence(report: Any, path: str | Path) -> None:
    """Draw KL divergence by position, its mean and percentiles."""
    rows = report.rows[:-1] or report.rows
    with _figure(path) as figure:
        axes = figure.add_subplot()
        for name, marker in (("mean", "o"), ("median", "s"), ("p90", "^"), ("p99", "x")):
            axes.plot(range(len(rows)), [max(_LEAST, getattr(row, name)) for row in rows], marker=marker, label=name)
        axes.set_xticks(range(len(rows)), [f"{row.begin}-{row.end - 1}" for row in rows], fontsize=8)
        axes.set(yscale="log", xlabel="position, tokens", ylabel="KL divergence, nats")
        axes.set_title(f"{Path(report.model).name} from {Path(report.against).name}", fontsize=10)
        axes.legend(fontsize=8)


def plot_matrix(report: Any, path: str | Path) -> None:
    """Draw mean KL divergence by position, a line a file and cache type."""
    with _figure(path) as figure:
        axes = figure.add_subplot()
        files = list(dict.fromkeys(cell.model for cell in report.cells))
        kinds = list(dict.fromkeys(cell.type_k for cell in report.cells))
        for cell in report.cells:
            rows = cell.rows[:-1] or cell.rows
            axes.plot(
                range(len(rows)), [max(_LEAST, row.mean) for row in rows], color=f"C{files.index(cell.model)}",
                linestyle=["-", "--", ":", "-."][kinds.index(cell.type_k) % 4], marker="o", markersize=3,
                label=f"{Path(cell.model).name}, {cell.type_k} cache",
            )  # fmt: skip
        axes.set_xticks(range(len(rows)), [f"{row.begin}-{row.end - 1}" for row in rows], fontsize=8)
        axes.set(yscale="log", xlabel="position, tokens", ylabel="mean KL divergence, nats")
        axes.set_title(f"from {Path(report.against).name}", fontsize=10)
        axes.legend(fontsize=7)


def plot_bounds(report: Any, path: str | Path) -> None:
    """Draw the paper's figure 2: scores inside the window, beyond it, and between trained distances."""
    with _figure(path, (12, 3.6)) as figure:
        inside, beyond, between = figure.subplots(1, 3)
        distances, scores = report.figure["beyond"]
        n = sum(s < report.window for s in distances)
        inside.plot(distances[:n], scores[:n])
        inside.set(title="inside the window", xlabel="distance, tokens", ylabel="score, by its largest inside")
        beyond.plot(distances, scores, linewidth=0.7)
        beyond.axvline(report.window, color="grey", linewidth=0.8)
        beyond.set(title=f"extrapolated to {report.context}", xlabel="distance, tokens")
        between.plot(*report.figure["between"], ".-", label="interpolated positions")
        between.plot(*report.figure["trained"], "o", label="trained positions")
        between.set(title="between trained distances", xlabel="distance, divided by the factor")
        between.ticklabel_format(useOffset=False)
        between.legend(fontsize=8)
        for axes in (inside, beyond, between):
            axes.locator_params(axis="x", nbins=4)


@contextmanager
def _figure(path: str | Path, size: tuple[float, float] = (7.5, 5)) -> Iterator[Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure
    for axes in figure.axes:
        legend = axes.get_legend()
        for text in (axes.title, *(legend.get_texts() if legend else ())):  # names of files are no formulas, nor texts
            text.set(parse_math=False, text=text.get_text().encode(errors="replace").decode())
    with replace_when_complete(Path(path)) as partial:
        figure.savefig(partial, dpi=120, format=Path(path).suffix.lstrip("."))
    say(f"wrote {path}")
