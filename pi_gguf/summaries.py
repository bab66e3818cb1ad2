"""Summaries of long documents against written ones, by ROUGE.

In: documents with their summaries. Out: a report, one row a model. The protocol is the paper's: its prompt, the
document cut at 15,000 tokens, at most 1000 tokens of summary; but the most probable token is taken each time, where the
paper draws with a temperature of 0.5.

Source: arXiv 2306.15595, section 3.5; the measures are rouge-score's, with its stemmer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pi_gguf import bundled
from pi_gguf.errors import OptionError
from pi_gguf.files import writes
from pi_gguf.kept import Kept
from pi_gguf.progress import progress_bar, say
from pi_gguf.provenance import provenance, sha256
from pi_gguf.results import SummariesReport, SummaryRow
from pi_gguf.scoring import LanguageModel
from pi_gguf.targets import check_targets, identity, opened
from pi_gguf.texts import read_pairs

HEAD = "Read the following article and then summarize it.\n\n"
CUE = "\n\nNow summarize the above article.\n\nSummary:"
"""The paper's prompt, around a document."""

MEASURES = ("rouge1", "rouge2", "rougeL")


@writes("keep")
def evaluate_summaries(
    *models: str | LanguageModel,
    data: str | None = None,
    documents: int = 20,
    document_tokens: int = 15000,
    max_tokens: int = 1000,
    context: int | None = None,
    method: str = "linear",
    type_k: str = "f16",
    type_v: str = "f16",
    tokenizer: str | None = None,
    keep: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> SummariesReport:
    """Measure summaries of long documents by ROUGE-1, ROUGE-2 and ROUGE-L, as on GovReport.

    Args:
        models: GGUF file, Hugging Face folder, Hub id, bundled:tiny, or URL of an OpenAI-compatible server; several
            make one table.
        data: JSONL with fields document and summary, or govreport, or owner/name:split of the Hub; when left out,
            passages of the bundled sample whose first sentences stand in for a summary: a trial, no benchmark.
        documents: to summarize, from the start.
        document_tokens: documents are cut here, and to what the window leaves.
        max_tokens: of a summary.
        context: extend Hugging Face models to this window, in tokens, without training.
        method: of --context: linear (Position Interpolation), ntk, yarn, none or nope.
        type_k: K cache of GGUF files: f32, f16, q8_0 or q4_0.
        type_v: V cache of GGUF files.
        tokenizer: MODEL whose tokenizer a server's model has; of URLs only.
        keep: file that keeps each finished summary, in JSON lines; the same command goes on from it.
        seed: recorded; nothing is random here.
        device: auto, cpu or cuda.

    Example:
        pi-gguf eval summarize model.gguf --data govreport --documents 50
    """
    options: dict[str, Any] = {
        "context": context, "method": method, "tokenizer": tokenizer, "type_k": type_k, "type_v": type_v,
        "device": device,
    }  # fmt: skip
    check_targets(models, **options)
    for name, value in (("documents", documents), ("document-tokens", document_tokens), ("max-tokens", max_tokens)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    if data is None:
        say("no --data: passages of the bundled sample, whose first sentences stand in for a summary")
    pairs = (read_pairs(data) if data else bundled.passages_with_leads())[:documents]
    kept = Kept(keep)
    needed = len(HEAD) + document_tokens + len(CUE) + max_tokens  # no token is less than a character
    names: list[str] = []
    rows: list[SummaryRow] = []
    summaries: dict[str, list[str]] = {}
    for model in models:
        settings = {**identity(model, **options), "document_tokens": document_tokens, "max_tokens": max_tokens}
        with (
            opened(model, n_ctx=None, at_most=needed, **options) as lm,
            progress_bar("summarize", len(pairs), "documents") as advance,
        ):
            names.append(lm.name)
            written: list[str] = []
            for document, _ in pairs:
                item = {**settings, "document": sha256([document])}
                if (found := kept.get(item)) is None:
                    found = summarize(lm, document, document_tokens, max_tokens)
                    kept.put(item, found)
                written.append(found)
                advance(1)
            tokens = sum(len(lm.tokenize(text, add_special=False)) for text in written) / len(written)
        summaries[lm.name] = written
        first, second, longest = rouge(written, [summary for _, summary in pairs])
        rows.append(SummaryRow(first, second, longest, len(pairs), tokens, lm.name))
    source = data or "bundled passages"
    return SummariesReport(
        names, source, rows, summaries, provenance(seed=seed, device=device, type_k=type_k, type_v=type_v)
    )


def summarize(lm: LanguageModel, document: str, document_tokens: int, max_tokens: int) -> str:
    """Return a greedy summary of a document that is cut to what the window leaves.

    Raises:
        OptionError: the window leaves nothing.
    """
    head, cue = lm.tokenize(HEAD), lm.tokenize(CUE, add_special=False)
    room = min(document_tokens, lm.window - len(head) - len(cue) - max_tokens)
    if room < 1:
        raise OptionError(
            f"{lm.name}: a window of {lm.window} tokens leaves no room for a document beside {max_tokens} of summary",
            f"give --max-tokens {max(1, lm.window // 4)}",
        )
    read = lm.tokenize(document, add_special=False)[:room]
    return lm.generate(head + read + cue, max_tokens).strip()


def rouge(written: Sequence[str], expected: Sequence[str]) -> list[float]:
    """Return the mean F-measures of `MEASURES`, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    scores = [scorer.score(target, text) for target, text in zip(expected, written, strict=True)]
    return [100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in MEASURES]
