"""The options of what is checked and measured before a file gets its name."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from pi_gguf.common.options import Options, option


@dataclass(frozen=True, kw_only=True)
class ProofOptions(Options):
    """What is checked and measured before a file gets its name."""

    title: typing.ClassVar[str] = "Proof"

    check: str = option(
        "quick compares logits on some 600 tokens, on more where a model computes otherwise behind them (LongRoPE, "
        "short sliding windows); full on the whole window; none.",
        default="quick",
        choices=("quick", "full", "none"),
    )
    strict_tokenizer: bool = option(
        "refuse a file in which any text of the check is tokenized otherwise than in Hugging Face. When left out, "
        "prose must be alike; texts that begin with spaces, or have an added token inside, are counted.",
        default=False,
    )
    certify: bool | None = option(
        "measure the file in llama.cpp at its window, perplexity and passkeys, and write the figures into its header; "
        "where the whole window would take more than some ten minutes, a half, a quarter and so on of it. When left "
        "out, unless --check none.",
        default=None,
    )
    require: str | None = option(
        "figures and what they must be, e.g. k_max>=32768,ppl_ratio<=1.02; a file that falls short is kept as "
        "OUT-uncertified.gguf.",
        default=None,
    )
