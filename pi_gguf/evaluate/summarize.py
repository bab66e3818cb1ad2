"""Summaries of long documents against written ones, by ROUGE.

In: documents with their summaries. Out: a report, one row a model. The protocol is the paper's: its prompt, the
document cut at 15,000 tokens, at most 1000 tokens of summary; but the most probable token is taken each time, where the
paper draws with a temperature of 0.5, and a model with a chat template is told the same in a chat, as it was trained.

Source: arXiv 2306.15595, section 3.5; the measures are rouge-score's, with its stemmer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from pi_gguf import bundled
from pi_gguf.common.files import writes
from pi_gguf.common.options import flat, take
from pi_gguf.common.progress import Advance, say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import CheckpointError, GgufError, OptionError
from pi_gguf.evaluate.options import SuiteOptions, SummariesKeywords
from pi_gguf.evaluate.suite import Suite, check_counts
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.language_model import GAP, LanguageModel
from pi_gguf.measure.results import SummariesReport, SummaryRow
from pi_gguf.models.options import ServerOptions
from pi_gguf.texts import read_pairs

HEAD = "Read the following article and then summarize it.\n\n"
TASK = "\n\nNow summarize the above article."
CUE = f"{TASK}\n\nSummary:"
"""The paper's prompt, around a document; what a chat model is told ends with the task."""

FORMS = ("chat", "plain")

MEASURES = ("rouge1", "rouge2", "rougeL")


@writes("keep")
@flat(ServerOptions, SuiteOptions)
def evaluate_summaries(
    *models: str | LanguageModel,
    data: str | None = None,
    documents: int = 20,
    document_tokens: int = 15000,
    max_tokens: int = 1000,
    form: str | None = None,
    **options: Unpack[SummariesKeywords],
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
        form: chat, in the model's own chat template, or plain, the paper's prompt as text; when left out chat where
            there is a template. A server is asked plainly.

    Example:
        pi-gguf eval summarize model.gguf --data govreport --documents 50
    """
    suite = Suite(models, take(ServerOptions, options), take(SuiteOptions, options))
    if form is not None and form not in FORMS:
        raise OptionError(f"form must be one of {', '.join(FORMS)}, got {form}")
    lengths = {"document_tokens": document_tokens, "max_tokens": max_tokens}
    check_counts({"documents": documents, **lengths})
    if data is None:
        say("no --data: passages of the bundled sample, whose first sentences stand in for a summary")
    pairs = (read_pairs(data) if data else bundled.passages_with_leads())[:documents]
    needed = len(HEAD) + document_tokens + len(CUE) + max_tokens  # no token is less than a character
    settings = {**lengths, "form": form}
    measured = suite.measure(lambda lm, kept: _write(lm, kept, pairs, form, **lengths), settings, at_most=needed)
    rows = []
    for name, (written, tokens) in zip(suite.names, measured, strict=True):
        first, second, longest = rouge(written, [summary for _, summary in pairs])
        rows.append(SummaryRow(first, second, longest, len(pairs), tokens, name))
    summaries = {name: written for name, (written, _) in zip(suite.names, measured, strict=True)}
    return SummariesReport(suite.names, data or "bundled passages", rows, summaries, suite.record())


def _write(
    lm: LanguageModel,
    kept: Kept,
    pairs: Sequence[tuple[str, str]],
    form: str | None,
    *,
    document_tokens: int,
    max_tokens: int,
) -> tuple[list[str], float]:
    """Return an open model's summaries of documents, and the mean of their lengths in tokens."""

    around = prompt(lm, form)

    def write(document: str, advance: Advance) -> str:
        found = summarize(lm, document, document_tokens, max_tokens, around)
        advance(1)
        return found

    items = {document: {"document": sha256([document])} for document, _ in pairs}
    found = kept.values("summarize", "documents", items, write)
    written = [found[document] for document, _ in pairs]
    return written, sum(len(lm.tokenize(text, add_special=False)) for text in written) / len(written)


def prompt(lm: LanguageModel, form: str | None) -> tuple[list[int], list[int]]:
    """Return the ids that stand before and behind a document.

    Raises:
        OptionError: a chat is asked of a model that has no template for it.
        CheckpointError, GgufError: the template of a folder, of a file, is broken.
    """
    try:
        chat = None if form == "plain" else lm.chat_around(f"{HEAD}{GAP}{TASK}")
    except (CheckpointError, GgufError) as error:
        raise type(error)(str(error), "correct it, or give --form plain") from error
    if form == "chat" and chat is None:
        raise OptionError(f"{lm.name}: no chat template that shows a document", "give --form plain, or leave it out")
    return chat or (lm.tokenize(HEAD), lm.tokenize(CUE, add_special=False))


def summarize(
    lm: LanguageModel, document: str, document_tokens: int, max_tokens: int, around: tuple[list[int], list[int]]
) -> str:
    """Return a greedy summary of a document that is cut to what the window leaves.

    Args:
        around: what `prompt` returned.

    Raises:
        OptionError: the window leaves nothing.
    """
    head, cue = around
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
