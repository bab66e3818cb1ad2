"""Write the recorded tables into `PAGES`, between the marks `<!-- table FILE -->` and `<!-- end -->`.

In: `recipes/*/results.json`, as `pi-gguf demo` writes them, `recipes/report/report.json`, `recipes/gpu/*.json` and
`benchmarks/*.json`. Out: the texts with their tables. Where a file has several, the mark names one behind a `#`; a
file of Markdown, as a recipe writes its tables, is put in as it is.

Example:
    python tools/write_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pi_gguf.common.tables import markdown_table
from pi_gguf.measure.passkey import k_max
from pi_gguf.measure.results import PasskeyCell
from pi_gguf.pipeline.demo import table_cells

ROOT = Path(__file__).parent.parent
PAGES = tuple(
    ROOT / name
    for name in (
        "README.md", "docs/results.md", "docs/elsewhere.md", "recipes/gpu/README.md", "recipes/smollm2-32k/README.md",
    )
)  # fmt: skip


def benchmark_table(record: dict[str, Any]) -> str:
    """Return the medians of a benchmark, and each of ours by the peer's."""
    lines = ["| | seconds | peak memory, MiB |", "| --- | ---: | ---: |"]
    for name, median in record["medians"].items():
        ratio = {key: record["ratios"].get(f"{name.removesuffix(', pi-gguf')}, {key}") for key in median}
        cells = [
            f"{median[key]:,.1f}" if key == "seconds" else f"{median[key]:,.0f}" for key in ("seconds", "peak_mib")
        ]
        if name.endswith("pi-gguf"):
            cells = [f"{cell} ({ratio[key]:.2f} x)" for cell, key in zip(cells, ("seconds", "peak_mib"), strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report_table(record: dict[str, Any]) -> str:
    """Return perplexity of the held-out text and the passkeys, a row for each model of a page."""
    windows = [f"{row['window']:,}" for row in next(iter(record["perplexity"].values()))]
    rows = []
    for name, cells in record["passkeys"].items():
        found, asked = (sum(cell[key] for cell in cells) for key in ("found", "keys"))
        reached = k_max([PasskeyCell(**cell) for cell in cells], growing=True)
        figures = [f"{row['perplexity']:.1f}" for row in record["perplexity"][name]]
        rows.append([name, *figures, f"{found} of {asked}", f"{reached:,}"])
    return markdown_table(["perplexity at", *windows, "passkeys", "k_max"], rows)


def real_table(record: dict[str, Any], rows: tuple[str, ...] = ()) -> str:
    """Return perplexity by window and k_max of `recipes/smollm2-32k`, of some rows or of all."""
    windows = [row["window"] for row in next(iter(record["perplexity"].values()))["rows"]]
    found = []
    for name, one in record["perplexity"].items():
        if not rows or name in rows:
            measured = {row["window"]: row["perplexity"] for row in one["rows"]}
            (reached,) = record["passkey"][name]["k_max"].values()
            cells = [f"{measured[window]:,.2f}" if window in measured else "" for window in windows]
            found.append([name, *cells, f"{reached:,}"])
    return markdown_table(["perplexity at", *(f"{window:,}" for window in windows), "k_max"], found)


def short_real_table(record: dict[str, Any]) -> str:
    """Return the rows that the first page shows."""
    shown = "base, no scaling", "PI untrained", "YaRN untrained", "PI trained", "YaRN trained", "PI trained, Q8_0"
    return real_table(record, (*shown, "PI trained, Q4_K_M"))


def methods_table(record: dict[str, Any]) -> str:
    """Return the ways to spend the same tokens, one row each."""
    windows = [str(window) for window in next(iter(record["rows"].values()))["perplexity"]]
    header = [
        "",
        *(f"perplexity at {window}" for window in windows),
        "k_max",
        "passkeys",
        "seconds",
        "peak memory, MiB",
    ]
    rows = [
        [
            name, *(f"{row['perplexity'][window]:.1f}" for window in windows), str(row["k_max"]),
            f"{row['passkeys_found']:.0%}", f"{row['seconds']:,.0f}", f"{row['peak_mib']:,}",
        ]
        for name, row in record["rows"].items()
    ]  # fmt: skip
    return markdown_table(header, rows)


def training_table(record: dict[str, Any]) -> str:
    """Return speed and memory of training, a row for each contender."""
    header = [
        "model, weights trained",
        "by",
        "seconds a step",
        "tokens/s",
        "of the device's speed",
        "peak, GB",
        "x Trainer",
    ]
    rows = []
    for case, found in record["cases"].items():
        for who, run in found.get("contenders", {}).items():
            if "step_seconds" not in run:
                continue
            rows.append([
                case, who, f"{run['step_seconds']:.2f}", f"{run['tokens_a_second']:,.0f}", f"{run['share']:.0%}",
                f"{run['peak_memory_bytes'] / 1e9:.1f}",
                f"{run['times_the_trainer']:.2f}" if "times_the_trainer" in run else "",
            ])  # fmt: skip
    return markdown_table(header, rows)


def memory_table(record: dict[str, Any]) -> str:
    """Return what was predicted beside what was taken."""
    header = ["weights trained", "activations", "tokens", "predicted, GB", "taken, GB", "ratio"]
    rows = [
        [
            case["train"], case["activations"], f"{case['tokens']:,}", f"{case['predicted'] / 1e9:.2f}",
            f"{case['peak'] / 1e9:.2f}", f"{case['ratio']:.2f}",
        ]
        for case in record["cases"]
    ]  # fmt: skip
    return markdown_table(header, rows)


def kernels_table(record: dict[str, Any]) -> str:
    """Return the time of attention and of layers by kernel."""
    rows = [
        [part, name, f"{1000 * run['seconds']:.1f}"]
        for part in ("attention", "layers")
        for name, run in record[part].items()
        if "seconds" in run
    ]
    return markdown_table(["", "kernel", "ms, forward and backward"], rows)


def speed_table(record: dict[str, Any]) -> str:
    """Return tokens a second that llama.cpp reads and writes on a card, by depth."""
    runs = {name: run for name, run in record["results"].items() if run.get("kind") == "speed" and "seconds" in run}
    places = [
        (what, depth)
        for what in ("read", "write")
        for depth in sorted({int(d) for run in runs.values() if "error" not in run for d in run[what]})
    ]
    rows = [
        [name, *(f"{run[w].get(str(d), 0):,.0f}" if str(d) in run[w] else "" for w, d in places)]
        for name, run in runs.items()
        if "error" not in run
    ]
    return markdown_table(["", *(f"{what} at {depth:,}" for what, depth in places)], rows)


def divergence_table(record: dict[str, Any]) -> str:
    """Return mean KL divergence from transformers in 32 bits, in nats, by setting and way to read."""
    ways = ("prose 32768, batches", "prose 32768, one by one", "passkey 32768, batches", "passkey 32768, one by one")
    rows = [
        [name.removeprefix("KL, "), *(f"{run[way]['kl_mean']:.1e}" for way in ways)]
        for name, run in record["results"].items()
        if run.get("kind") == "kl" and ways[0] in run
    ]
    return markdown_table(["file and setting", *ways], rows)


def loops_table(record: dict[str, Any]) -> str:
    """Return tokens a second, read and written, by us and by others in turn in one context: medians."""
    rows = [
        [
            file, f"{int(length):,}", what, *(f"{rate:,.1f}" for rate in run["medians"].values()),
            *(f"{ratio:.2f}" for ratio in (*run["ratios"].values(), *run["ratios of the best"].values())),
        ]
        for file, found in record["runtime"].items()
        for length, runs in found["loops"].items()
        for what, run in runs.items()
    ]  # fmt: skip
    header = [
        "file",
        "at",
        "",
        "pi-gguf",
        "llama-cpp-python",
        "bare loop",
        "ratio",
        "to bare",
        "of the best",
        "to bare",
    ]
    return markdown_table(header, rows)


def waits_table(record: dict[str, Any]) -> str:
    """Return seconds to the first token of an answer about a document."""
    rows = [
        [
            file, f"{run['tokens']:,}", f"{run['first']:.2f}",
            f"{run['second']:.3f} ({run['second / first']:.2%})",
            f"{run['after a restart']:.3f} ({run['after a restart / first']:.2%})",
            f"{run['after a restart, with opening']:.3f} ({run['with opening / first']:.2%})",
            f"{run['kept']['bytes'] / 2**20:.0f}", f"{run['kept']['ratio']:.2f}",
        ]
        for file, found in record["runtime"].items()
        for run in (found["document"],)
    ]  # fmt: skip
    header = [
        "file", "tokens", "first question, s", "second", "after a restart", "with opening the file", "kept, MiB",
        "restore / read",
    ]  # fmt: skip
    return markdown_table(header, rows)


def kv_table(record: dict[str, Any]) -> str:
    """Return speed and quality by types of the KV cache, speeds also by those of f16."""
    rows = []
    for file, lengths in record["files"].items():
        for length, found in lengths.items():
            plain = found["K f16, V f16"]
            for name, run in found.items():
                speeds = [f"{run[what]:,.0f} ({run[what] / plain[what]:.2f})" for what in ("read", "write")]
                keys = f"{run['passkeys']:.0%}" if "passkeys" in run else ""
                size = f"{run['bytes'] / 2**20:,.0f}"
                rows.append([file, f"{int(length):,}", name, size, *speeds, f"{run['perplexity']:.2f}", keys])
    return markdown_table(["file", "tokens", "cache", "MiB", "read", "write", "perplexity", "passkeys"], rows)


def quantizers_table(record: dict[str, Any]) -> str:
    """Return millions of weights a second of both searches of K-quants."""
    rows = [
        [
            kind, *(f"{run['medians'][who]:,.0f}" for who in ("ggml", "numba")), f"{run['ratio']:.1f}",
            f"{run['bytes that differ']:,} of {run['bytes']:,}",
        ]
        for kind, run in record["quantizers"].items()
    ]  # fmt: skip
    return markdown_table(["M weights/s", "ggml", "numba", "times", "bytes that differ"], rows)


def growth_table(record: dict[str, Any], half: str) -> str:
    """Return seconds and peak memory of each command by what grows, and the power of the last step."""
    curves = record[half]
    what = next(key for key in next(iter(curves.values()))[0] if key not in ("seconds", "peak_mib"))
    heads = sorted({point[what] for points in curves.values() for point in points})
    rows = []
    for title, points in curves.items():
        by_head = {point[what]: f"{point['seconds']:.1f} s, {point['peak_mib']:,}" for point in points}
        slope = record["slopes"][half][title]
        power = f"{slope['seconds']:.2f}, {slope['peak_mib']:.2f}"
        rows.append([f"`{title}`", *(by_head.get(head, "") for head in heads), power])
    named = [f"{head / 1e6:,.0f} M" if what == "parameters" else f"{head:,}" for head in heads]
    return markdown_table([f"seconds, MiB at {what}", *named, "power"], rows)


def growth_size_table(record: dict[str, Any]) -> str:
    return growth_table(record, "size")


def growth_window_table(record: dict[str, Any]) -> str:
    return growth_table(record, "window")


def clients_table(record: dict[str, Any]) -> str:
    """Return tokens a second that clients of both servers are written at once."""
    rows = []
    for file, found in record["server"].items():
        for clients, run in found["write"].items():
            ours, *theirs = (f"{rate:,.1f}" for rate in run["medians"].values())
            more = [f"{times:.2f}" for times in run["by one client"].values()]
            rows.append([file, clients, ours, *theirs, *(f"{ratio:.2f}" for ratio in run["ratios"].values()), *more])
    peer = record["peer"]
    return markdown_table(["file", "clients", "pi-gguf", peer, "ratio", "x one client", f"x one, {peer}"], rows)


def _gap_cells(gap: dict[str, Any] | None, who: str) -> list[str]:
    """Return how long an answer stands still beside a long request; nothing where that was not measured."""
    if gap is None:
        return [""] * 4
    found = gap["medians"][who]
    return [f"{gap['tokens']:,}", *(f"{found[by]:.2f}" for by in ("gap", "by a mean batch", "by the longest batch"))]


def streams_table(record: dict[str, Any]) -> str:
    """Return what a server adds to a token, and how long a running answer stands still."""
    rows = []
    for file, found in record["server"].items():
        gap, more = found.get("gap"), list(found["added"].values())
        for who in more[0]["added"]:
            cells = [f"{part['added'][who]:.2f}" for part in more]
            session = f"{more[0]['medians']['session']:.2f}"
            rows.append([file, who, session, *cells, *_gap_cells(gap, who)])
    slots = next(iter(record["server"].values()))["slots"]
    header = [
        "file", "server", "ms a token, session", "one slot adds", f"{slots} slots add", "beside so many tokens",
        "longest gap, s", "in mean batches", "in the longest",
    ]  # fmt: skip
    return markdown_table(header, rows)


def served_table(record: dict[str, Any]) -> str:
    """Return seconds to the first token about a document that is given to a server, and what its page takes."""
    rows = []
    for file, found in record["server"].items():
        if "document" not in found:
            continue
        document, page = found["document"], found["page"]
        for who, waits in document["medians"].items():
            shares = document["by the first"][who]
            cells = [
                f"{waits[key]:.3f} ({shares[key]:.2%})" if key in waits else "" for key in ("second", "after a restart")
            ]
            ours = who == "pi-gguf"
            shown = [f"{1000 * page['with all']:.0f}", f"{page['bytes'] / 1000:.0f}"] if ours else ["", ""]
            rows.append([file, who, f"{document['tokens']:,}", f"{waits['first']:.2f}", *cells, *shown])
    header = [
        "file", "server", "tokens", "first question, s", "second", "after a restart", "page with all, ms", "page, KB",
    ]  # fmt: skip
    return markdown_table(header, rows)


def opens_in_table(record: dict[str, Any]) -> str:
    """Return how many tokens of other programs are ours, by the model and kind of a file, in its types."""
    names = [file.split(", ") for file in record["ours"]]
    models, kinds, quants = ([*dict.fromkeys(column)] for column in zip(*names, strict=True))
    rows = []
    for reader, found in record["rows"].items():
        for model in models:
            longer = f"{model}, {kinds[1]}, {quants[0]}"
            told = [[_opened(found[f"{model}, {kind}, {quant}"]) for quant in quants] for kind in kinds]
            cells = [" / ".join(dict.fromkeys(one)) for one in told]  # once where they are alike
            rows.append([f"{reader} {record['readers'][reader]}", model, _window_read(found[longer]), *cells])
    header = ["opens in", "model", f"window of {kinds[1]}", *(f"{kind}: {' / '.join(quants)}" for kind in kinds)]
    return markdown_table(header, rows)


def _opened(row: dict[str, Any]) -> str:
    return "not opened" if row["error"] else f"{row['tokens']} of {row['of']}"


def _window_read(row: dict[str, Any]) -> str:
    if row["error"] or row["window"] is None:
        return "" if row["error"] else "not said"
    return f"{row['window']:,}" + (", factor lost" if row["scale"] == 1 else "")


def scalings_table(record: dict[str, Any]) -> str:
    """Return how far a wrong position scaling is from transformers, a row for each model, mistake and length."""
    types = dict.fromkeys((row["quant"], row["limit"]) for row in record["rows"])
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in record["rows"]:
        name = (f"{row['model']}, {row['factor']:g}", row["wrong"], f"{row['tokens']:,}")
        found.setdefault(name, {})[row["quant"]] = row["kl_divergence"]
    rows = [[*name, *(_seen(figures.get(quant), limit) for quant, limit in types)] for name, figures in found.items()]
    return markdown_table(["model, factor", "scaling", "tokens", *(f"{q} ({limit:g})" for q, limit in types)], rows)


def _seen(divergence: float | None, limit: float) -> str:
    """Return a divergence, in bold where the check refuses it."""
    if divergence is None:
        return ""
    return f"**{divergence:.2g}**" if divergence > limit else f"{divergence:.2g}"


def paper_table(record: dict[str, Any]) -> str:
    """Return the paper's runs as planned, or why they do not fit."""
    rows = []
    for run in record["paper"]:
        first = [run["model"], run["on"], str(run["sequences"])]
        if "error" in run:
            rows.append([*first, f"{run['error']}; {run['hint']}", "", "", ""])
            continue
        rows.append([
            *first, run["activations"], f"{run['memory_bytes'] / 2**30:.1f}", f"{run['tokens_a_second']:,.0f}",
            f"{run['seconds'] / 3600:,.1f}",
        ])  # fmt: skip
    header = ["", "on", "sequences a step", "activations", "GiB a card", "tokens/s", "hours"]
    return markdown_table(header, rows)


def torchtitan_table(record: dict[str, Any]) -> str:
    """Return tokens a second and memory of a card, recorded by torchtitan and planned."""
    rows = [
        [
            run["model"], run["on"], run["again"], f"{run['recorded']:,}", f"{run['planned']:,.0f}",
            f"{run['planned'] / run['recorded'] - 1:+.0%}", f"{run['recorded_gib'] or ''}",
            f"{run['recomputed_gib']:.1f} to {run['kept_gib']:.1f}",
        ]
        for run in record["torchtitan"]
    ]  # fmt: skip
    header = [
        "", "on", "computed again", "tokens/s a card, recorded", "planned", "difference", "GiB a card, recorded",
        "planned, all computed again to nothing",
    ]  # fmt: skip
    return markdown_table(header, rows)


def unsloth_table(record: dict[str, Any]) -> str:
    """Return what we need for the longest sequence of Unsloth's on a card."""
    rows = [
        [
            f"{run['gb']}", f"{run['tokens']:,}", f"{run['need_gib']:.1f}", f"{run['need_gib'] / run['gb'] - 1:+.0%}",
            f"{run['without_gib']:.1f}", f"{run['without_gib'] / run['gb'] - 1:+.0%}",
        ]
        for run in record["unsloth"]
    ]  # fmt: skip
    header = [
        "card, GB", "Unsloth's longest, tokens", "planned for it, GiB", "difference", "without embeddings",
        "difference",
    ]  # fmt: skip
    return markdown_table(header, rows)


def planned_table(record: dict[str, Any]) -> str:
    """Return what was measured on a card beside what is planned for it."""
    rows = [
        [
            run["case"], run["activations"], f"{run['seconds']:.2f}", f"{run['planned_seconds']:.2f}",
            f"{run['planned_seconds'] / run['seconds'] - 1:+.0%}", f"{run['gb']:.1f}", f"{run['planned_gb']:.1f}",
            f"{run['planned_gb'] / run['gb'] - 1:+.0%}",
        ]
        for run in record["ours"]
    ]  # fmt: skip
    header = ["", "activations", "s a step", "planned", "difference", "GB", "planned", "difference"]
    return markdown_table(header, rows)


_SEVERAL = {
    "paper": paper_table, "torchtitan": torchtitan_table, "unsloth": unsloth_table, "planned": planned_table,
    "training": training_table, "memory": memory_table, "kernels": kernels_table, "speed": speed_table,
    "divergence": divergence_table, "loops": loops_table, "waits": waits_table, "kv": kv_table,
    "clients": clients_table, "streams": streams_table, "served": served_table, "opens-in": opens_in_table,
    "scalings": scalings_table, "short-real": short_real_table,
    "quantizers": quantizers_table, "growth-size": growth_size_table, "growth-window": growth_window_table,
}  # fmt: skip


def with_tables(text: str) -> str:
    """Return a text with what lies between its marks made anew."""

    def table(match: re.Match[str]) -> str:
        path, _, which = match[1].partition("#")
        if path.endswith(".md"):  # a table that a recipe has made
            return f"<!-- table {match[1]} -->\n{(ROOT / path).read_text()}<!-- end -->"
        record = json.loads((ROOT / path).read_text())
        if which:
            made = _SEVERAL[which](record)
        elif "passkey" in record and "perplexity" in record:
            made = real_table(record)
        elif "second_perplexity" in record:
            made = report_table(record)
        elif "settings" in record and "original_window" in record["settings"]:
            made = methods_table(record)
        else:
            made = benchmark_table(record) if "medians" in record else markdown_table(*table_cells(record))
        return f"<!-- table {match[1]} -->\n{made}<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
